from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from make_verified import BPB, BUNDLE, CAP, data_of, edit_result, edit_score, make_run, write_data

from orchestrator import verify
from orchestrator.checks import FAILED, PASSED, UNDECIDED, Check
from orchestrator.errors import ConfigError, DataError, MachineError, ProtocolError
from orchestrator.findings import failure_lines, recorded_verdict, write
from orchestrator.home import Home, home_of
from orchestrator.runs import find_run
from orchestrator.verify import Verification
from trainer import protocol
from trainer.protocol import VALIDATION, Failure, RunDir


def check_run(run: RunDir, **options: Any) -> Verification:
    return verify.verify(run, **{"timeout_seconds": 60.0, **options})


def verdict_on(run: RunDir, result_file: Path) -> str:
    return recorded_verdict(run.verify, result_file, f"caddie verify {run.run_id}")


def failures(found: Verification) -> list[str]:
    return [check.name for check in found.failed]


def named(found: Verification, name: str) -> Check:
    [check] = [check for check in found.checks if check.name == name]
    return check


def failing(found: Verification, name: str) -> Check:
    """The named check, which has failed and tells all that a failure must."""
    check = named(found, name)
    assert check.status == FAILED
    assert check.rule and check.place and check.remedy
    return check


# ── sound runs ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_is_what_it_claims_passes_every_check(tmp_path: Path) -> None:
    found = check_run(make_run(tmp_path))
    assert (found.verdict, found.exit_code) == (PASSED, 0)
    assert {check.status for check in found.checks} == {PASSED}
    assert (found.device, found.world_size, found.data_dir) == ("cpu", 1, str(tmp_path / "data" / "made-up"))
    assert found.stage_seconds == dict.fromkeys(BPB, 0.25)
    assert "verified, 27 of 27 checks passed" in verify.summary(found)


def test_the_record_of_a_verification_holds_every_check_with_its_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    found = check_run(run)
    write(run.verify, found)
    record = json.loads(run.verify.read_text())
    assert (record["verdict"], len(record["checks"])) == (PASSED, len(found.checks))
    [ttt] = [check for check in record["checks"] if check["name"] == "ttt.bpb"]
    assert (ttt["expected"], ttt["found"], ttt["tolerance"]) == (1.98, 1.98, 1e-6)
    assert record["environment"]["python"] and record["time"] > 1.7e9


def test_another_copy_of_the_validation_data_serves_where_the_runs_own_is_gone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    copy = tmp_path / "copy"
    shutil.move(data_of(run).root, copy)
    assert failures(check_run(run)) == ["data.manifest"]
    assert check_run(run, data_dir=copy).verdict == PASSED


def test_a_run_without_test_time_training_is_verified_without(tmp_path: Path) -> None:
    run = make_run(tmp_path, knobs={"ttt.method": "off"}, bpb={stage: BPB[stage] for stage in ("roundtrip", "sliding")})
    scores = protocol.read_result(run.attempt(1).result).scores
    edit_result(run, scores={stage: scores[stage] for stage in ("roundtrip", "sliding")})
    found = check_run(run)
    assert found.verdict == PASSED
    assert not [check for check in found.checks if check.name.startswith("ttt")]


def test_the_last_complete_attempt_stands_for_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    result = protocol.read_result(run.attempt(1).result)
    failed = dataclasses.replace(result, status=protocol.FAILED, failure=Failure(kind="code", message="x"), scores={})
    protocol.write_result(run.attempt(2).result, failed)
    assert check_run(run).verdict == PASSED


# ── runs that are not what they claim ───────────────────────────────────────────────────────────────────────────────


def test_a_tampered_byte_of_the_model_file_is_told_by_hash_and_by_what_the_reader_says(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    content = bytearray(run.artifact.read_bytes())
    content[0] ^= 1
    run.artifact.write_bytes(content)
    found = check_run(run)
    assert failures(found) == ["model.sha256", "evaluation"]
    assert failing(found, "model.sha256").place == str(run.artifact)
    assert "compressed content is damaged" in str(failing(found, "evaluation").found)
    assert found.exit_code == ProtocolError.exit_code
    assert any("compressed content is damaged" in line for line in failure_lines(found))


def test_another_model_file_is_told_by_its_hash_and_its_scores_are_not_held_against_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.artifact.write_text(run.artifact.read_text().replace("1.98", "1.97"))
    found = check_run(run)
    assert failures(found) == ["model.sha256"]
    ttt = named(found, "ttt.bpb")
    assert (ttt.status, ttt.found, ttt.note) == (UNDECIDED, 1.97, "the model file is not the run's")


def test_a_tampered_bundle_is_named_and_not_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    marker = tmp_path / "it ran"
    run.bundle.write_bytes(BUNDLE + f"\nPath({str(marker)!r}).touch()\n".encode())
    found = check_run(run)
    assert failures(found) == ["bundle.sha256", "bundle.bytes", "artifact.bytes"]
    assert failing(found, "bundle.sha256").expected == protocol.read_spec(run.spec).bundle_sha256
    evaluation = named(found, "evaluation")
    assert (evaluation.status, evaluation.note) == (UNDECIDED, "not run: the bundle is not the one that was planned")
    assert not marker.exists()


@pytest.mark.parametrize("stage", BPB)
def test_an_edited_score_does_not_come_out_again(tmp_path: Path, stage: str) -> None:
    run = make_run(tmp_path)
    size, tokens = 1800, 300
    nats = (BPB[stage] - 0.01) * math.log(2) * size
    edit_score(run, stage, bpb=BPB[stage] - 0.01, nats=nats, loss=nats / tokens)
    found = check_run(run)
    assert failures(found) == [f"{stage}.bpb"]
    check = failing(found, f"{stage}.bpb")
    assert (check.expected, check.found, check.tolerance) == (BPB[stage] - 0.01, BPB[stage], 1e-6)


def test_a_score_whose_sums_say_something_else_was_edited(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    edit_score(run, "sliding", loss=1.0)
    edit_score(run, "ttt", bpb=1.98 + 5e-7)  # within the tolerance of the re-evaluation
    found = check_run(run)
    assert failures(found) == ["result.sums"]
    assert failing(found, "result.sums").found == ["sliding.loss", "ttt.bpb"]


@pytest.mark.parametrize(("bpb", "is_close"), [(1.98 + 9e-7, True), (1.98 - 2e-6, False), (math.nan, False)])
def test_bits_per_byte_agree_within_a_millionth_on_the_cpu(tmp_path: Path, bpb: float, is_close: bool) -> None:
    run = make_run(tmp_path, bpb={**BPB, "ttt": bpb})
    found = check_run(run)
    assert (named(found, "ttt.bpb").status == PASSED) == is_close
    assert found.tolerance_reason.startswith("float32 on the CPU")


@pytest.mark.parametrize("count", ["tokens", "bytes"])
def test_tokens_and_bytes_are_compared_exactly(tmp_path: Path, count: str) -> None:
    run = make_run(tmp_path)
    score = protocol.read_result(run.attempt(1).result).scores["ttt"]
    edit_score(run, "ttt", **{count: getattr(score, count) + 1})
    found = check_run(run)
    assert failures(found) == ["result.sums", f"ttt.{count}"]


def test_a_score_that_was_left_out_is_missed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    scores = protocol.read_result(run.attempt(1).result).scores
    edit_result(run, scores={stage: scores[stage] for stage in ("roundtrip", "ttt")})
    found = check_run(run)
    assert failures(found) == ["result.stages", "sliding.bpb", "sliding.tokens", "sliding.bytes"]
    assert failing(found, "sliding.bpb").expected == "missing"


def test_a_stage_that_the_bundle_does_not_score_again_is_missed(tmp_path: Path) -> None:
    found = check_run(make_run(tmp_path, bpb={stage: BPB[stage] for stage in ("roundtrip", "sliding")}))
    assert failures(found) == ["ttt.bpb", "ttt.tokens", "ttt.bytes"]


def test_an_artifact_over_the_cap_is_named_by_its_size(tmp_path: Path) -> None:
    run = make_run(tmp_path, padding="x" * CAP)
    failure = Failure(kind=protocol.OVER_CAP, message="too many bytes")
    edit_result(run, status=protocol.FAILED, failure=failure)
    found = check_run(run)
    assert failures(found) == ["result", "artifact.cap"]
    check = failing(found, "artifact.cap")
    assert (check.expected, check.found) == (CAP, len(BUNDLE) + run.artifact.stat().st_size)
    assert failing(found, "result").found == "failed: over_cap: too many bytes"


def test_sizes_that_the_result_makes_smaller_are_counted_again(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    edit_result(run, bundle_bytes=10, model_bytes=20, artifact_bytes=30)
    assert failures(check_run(run)) == ["bundle.bytes", "model.bytes", "artifact.bytes"]


def test_a_result_of_another_run_is_told_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    edit_result(run, seed=8, bundle_sha256="ab" * 32)
    assert failures(check_run(run)) == ["result.run", "result.bundle"]


def test_an_edited_spec_no_longer_has_its_id(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    spec = protocol.read_json(run.spec)
    spec["config"]["limits"]["artifact_bytes"] = 10**9
    protocol.write_json_atomically(run.spec, spec)
    assert failures(check_run(run)) == ["spec.run_id"]


def test_a_spec_without_a_knob_has_another_id_and_may_be_of_another_version(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    spec = protocol.read_json(run.spec)
    del spec["config"]["limits"]["artifact_bytes"]
    protocol.write_json_atomically(run.spec, spec)
    found = check_run(run)
    assert failures(found) == ["spec.run_id"]
    assert "a version of caddie with other knobs" in failing(found, "spec.run_id").remedy


@pytest.mark.parametrize(
    ("mode", "words"),
    [("crash", "code: RuntimeError: a plain mistake"), ("hang", "timeout: not done after 2 s, and ended")],
)
def test_an_evaluation_that_does_not_come_to_its_end_is_a_failure(tmp_path: Path, mode: str, words: str) -> None:
    found = check_run(make_run(tmp_path, mode=mode), timeout_seconds=60.0 if mode == "crash" else 2.0)
    assert failures(found) == ["evaluation"]
    assert failing(found, "evaluation").found == words
    assert named(found, "ttt.bpb").status == UNDECIDED
    assert found.exit_code == ProtocolError.exit_code


def test_every_failure_is_named_and_not_only_the_first(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.bundle.write_bytes(BUNDLE + b"#" * CAP)
    run.artifact.unlink()
    data_of(run).tokenizer.write_bytes(b"others")
    edit_score(run, "ttt", bpb=1.0)
    found = check_run(run)
    assert failures(found) == [
        "result.sums", "bundle.sha256", "bundle.bytes", "model.sha256", "model.bytes", "artifact.bytes", "artifact.cap",
        "data.tokenizer",
    ]  # fmt: skip
    assert found.exit_code == ProtocolError.exit_code


# ── time ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_evaluation_that_took_longer_than_its_limit_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    edit_score(run, "ttt", seconds=301.0)
    found = check_run(run)
    assert failures(found) == ["result.seconds"]
    assert failing(found, "result.seconds").found == 301.5


def test_a_slow_evaluation_counts_on_the_runs_kind_of_machine_only(tmp_path: Path) -> None:
    run = make_run(tmp_path, seconds=200.0)
    assert failures(check_run(run)) == ["evaluation.seconds"]
    edit_result(run, device="cpu", world_size=4)
    found = check_run(run)
    assert found.verdict == PASSED
    assert named(found, "evaluation.seconds").status == UNDECIDED


# ── data that are not the run's ─────────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_tokenizer_is_named_and_says_nothing_against_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    data_of(run).tokenizer.write_bytes(b"more pieces")
    found = check_run(run)
    assert failures(found) == ["data.tokenizer"]
    assert failing(found, "data.tokenizer").place == str(data_of(run).tokenizer)
    counted = named(found, "ttt.bytes")
    assert (counted.status, counted.expected, counted.found) == (UNDECIDED, 1800, 3300)
    assert found.exit_code == DataError.exit_code
    assert "not verified, the data at hand are not the run's" in verify.summary(found)


def test_another_validation_split_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    other = write_data(tmp_path / "other", validation=b"shorter")
    found = check_run(run, data_dir=other.root)
    assert failures(found) == ["data.manifest"]
    assert "another split" in failing(found, "data.manifest").remedy
    assert named(found, "ttt.tokens").found == 7
    assert found.exit_code == DataError.exit_code


def test_a_changed_validation_shard_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    data_of(run).shard(VALIDATION, 0).write_bytes(b"x" * 300)
    assert failures(check_run(run)) == ["data.validation.val_000000.bin"]


def test_a_manifest_that_leads_out_of_its_folder_is_not_followed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    manifest = data_of(run).manifest
    manifest.write_text(manifest.read_text().replace('"val_000000.bin"', '"/etc/hostname"'))
    found = check_run(run)
    assert failures(found) == ["data.manifest", "data.manifest"]
    assert "must lie in its folder" in str(found.failed[1].found)


# ── files that are missing or damaged ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "failed", "note"),
    [
        ("bundle", ["bundle.sha256", "bundle.bytes", "artifact.bytes", "artifact.cap"], "not run: train_gpt.py missing"),
        ("artifact", ["model.sha256", "model.bytes", "artifact.bytes", "artifact.cap"], "not run: artifact.bin missing"),
        ("result", ["result"], "not run: there is no result to compare with"),
        ("spec", ["spec"], "not run: there is no data set that can be read"),
        ("manifest", ["data.manifest"], "not run: manifest.json missing"),
        ("tokenizer", ["data.tokenizer"], "not run: tokenizer.model missing"),
        ("shard", ["data.validation.val_000000.bin"], "not run: val_000000.bin missing"),
    ],
)  # fmt: skip
def test_a_missing_file_is_named(tmp_path: Path, name: str, failed: list[str], note: str) -> None:
    run = make_run(tmp_path)
    data = data_of(run)
    {
        "bundle": run.bundle, "artifact": run.artifact, "result": run.attempt(1).result, "spec": run.spec,
        "manifest": data.manifest, "tokenizer": data.tokenizer, "shard": data.shard(VALIDATION, 0),
    }[name].unlink()  # fmt: skip
    found = check_run(run)
    assert failures(found) == failed
    assert all(failing(found, name).found == "missing" for name in failed)
    assert (named(found, "evaluation").status, named(found, "evaluation").note) == (UNDECIDED, note)
    assert found.exit_code == (DataError.exit_code if failed[0].startswith("data") else ProtocolError.exit_code)


@pytest.mark.parametrize("content", ["{", "[]", '{"protocol": 1}', '{"protocol": 99}'])
def test_a_damaged_spec_and_a_damaged_result_are_both_named(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path)
    run.spec.write_text(content)
    run.attempt(1).result.write_text(content)
    assert failures(check_run(run)) == ["spec", "result"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", "7"), ("config", {"model": {"width": "wide"}}), ("config", []), ("config", {"ttt": 1})],
)
def test_a_spec_with_a_value_that_cannot_be_meant_is_named(tmp_path: Path, field: str, value: object) -> None:
    run = make_run(tmp_path)
    protocol.write_json_atomically(run.spec, {**protocol.read_json(run.spec), field: value})
    found = check_run(run)
    assert failures(found)[0] == "spec"


# ── GPUs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_on_gpus_is_compared_with_the_tolerance_of_gpus(tmp_path: Path) -> None:
    run = make_run(tmp_path, bpb={**BPB, "sliding": BPB["sliding"] + 1.5e-5, "ttt": BPB["ttt"] + 3e-5})
    edit_result(run, device="NVIDIA H100", world_size=8)
    found = check_run(run, gpus=0)
    assert failures(found) == ["ttt.bpb"]
    assert found.tolerance_bpb == 2e-5
    assert "a GPU took part" in found.tolerance_reason
    assert "--gpus" in failing(found, "ttt.bpb").remedy


def test_a_run_on_gpus_asks_for_as_many_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = make_run(tmp_path)
    edit_result(run, device="NVIDIA H100", world_size=8)
    with pytest.raises(MachineError, match="8 GPUs are needed to evaluate as the run did, this machine offers 0"):
        check_run(run)
    with pytest.raises(MachineError, match="2 GPUs are needed to evaluate as asked, this machine offers 0"):
        check_run(run, gpus=2)
    with pytest.raises(ConfigError, match="--gpus must be at least 0, got -1"):
        check_run(run, gpus=-1)


# ── finding runs, and what others read ──────────────────────────────────────────────────────────────────────────────


def test_a_run_is_found_by_its_id_its_beginning_and_its_directory(tmp_path: Path) -> None:
    run = make_run(tmp_path / "home")
    home = home_of(run)
    elsewhere = shutil.copytree(run.root, tmp_path / "copy")
    assert find_run(home, run.run_id) == find_run(home, run.run_id[:3]) == find_run(home, str(run.root)) == run
    assert find_run(home, str(elsewhere)) == RunDir(elsewhere)


def test_an_unknown_and_an_ambiguous_run_are_refused_with_those_that_there_are(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with pytest.raises(ConfigError) as caught:
        find_run(home, "ab")
    assert caught.value.hint == "there are none yet"
    for run_id in ("abc1", "abc2"):
        home.run(run_id).root.mkdir(parents=True)
    with pytest.raises(ConfigError, match="'ab' is the beginning of 2 runs") as caught:
        find_run(home, "ab")
    assert caught.value.hint == "there are: abc1, abc2"
    with pytest.raises(ConfigError, match="there is no run 'x'") as caught:
        find_run(home, "x")
    assert caught.value.hint in ("the latest are: abc1, abc2", "the latest are: abc2, abc1")


def test_a_verdict_holds_for_the_result_that_was_checked_and_no_other(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    result_file = run.attempt(1).result
    assert verdict_on(run, result_file) == ""
    write(run.verify, check_run(run))
    assert verdict_on(run, result_file) == PASSED
    edit_score(run, "ttt", bpb=1.0)
    assert verdict_on(run, result_file) == ""
    write(run.verify, check_run(run))
    assert verdict_on(run, result_file) == FAILED


def test_a_verdict_that_is_none_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.verify.write_text('{"verdict": "splendid"}')
    with pytest.raises(ProtocolError, match="no verdict on a run: its verdict is 'splendid'") as caught:
        verdict_on(run, run.attempt(1).result)
    assert caught.value.hint == f"make it again: caddie verify {run.run_id}"


def test_the_text_shows_every_check_and_each_failure_in_full(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    data_of(run).tokenizer.write_bytes(b"more pieces")
    edit_result(run, artifact_bytes=30)
    found = check_run(run)
    text = verify.as_text(found)
    for check in found.checks:
        assert f"\n{check.name} " in text
    assert f"≤ {CAP:,}" in text
    assert text.endswith(f"{run.run_id}: NOT VERIFIED, 2 of {len(found.checks)} checks failed")
    told = "\n".join(failure_lines(found))
    size = len(BUNDLE) + run.artifact.stat().st_size
    assert f"expected 30, found {size} ({run.attempt(1).result})\nhint: put back the file" in told
    assert "error: data.tokenizer: the tokenizer must be the one that the manifest names: expected " in told
    assert "note: undecided: roundtrip.bytes, sliding.bytes, ttt.bytes: the data are not the run's" in told
