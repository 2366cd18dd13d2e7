from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import make_study
import pytest

from orchestrator import imports, review
from orchestrator import package as packages
from orchestrator.checks import FAILED, PASSED, UNDECIDED
from orchestrator.cli import main
from orchestrator.errors import ConfigError
from orchestrator.home import Home
from orchestrator.package import Submitter, collect, package
from orchestrator.record_folder import read_record
from orchestrator.review import Evaluated, Review
from trainer import protocol
from trainer.protocol import RunDir, read_result, read_spec, write_result, write_spec

WHO = Submitter(author="A. Player", github_id="aplayer", date="2026-04-30")
NAME = "wd-qk-ttt-smoke"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_study.make_study(tmp_path / "home")


def runs(home: Home, arm: str = "best") -> list[RunDir]:
    return [seed.run for seed in collect(home, f"{NAME}:{arm}").seeds]


def change_result(run: RunDir, **changes: object) -> None:
    path = run.attempt(1).result
    write_result(path, dataclasses.replace(read_result(path), **changes))  # type: ignore[arg-type]


def statuses(found: Review) -> dict[str, str]:
    return {check.name: check.status for check in found.checks}


def test_a_packaged_folder_imported_back_has_the_very_same_numbers(home: Home, tmp_path: Path) -> None:
    found = collect(home, NAME)
    package(home, found, tmp_path / "out", WHO)
    record = imports.keep(Home(tmp_path / "other"), tmp_path / "out").record
    assert not record.conflicts
    for ours, theirs in zip(found.seeds, record.seeds, strict=True):
        assert theirs.score is not None
        assert theirs.run is not None
        assert (theirs.seed, theirs.score.bpb, theirs.score.loss) == (ours.seed, ours.scored.bpb, ours.scored.loss)
        for stage, score in ours.result.scores.items():
            line = theirs.stage(stage)
            assert line is not None
            assert (line.bpb, line.loss, line.seconds) == (score.bpb, score.loss, score.seconds)
        assert theirs.total_bytes == ours.result.artifact_bytes
        assert theirs.steps == ours.result.steps
        assert theirs.run.seconds("train_seconds") == pytest.approx(ours.result.train_seconds, abs=1e-5)
    assert record.summary.mean == pytest.approx(sum(found.values) / 3, abs=1e-15)


def test_the_folder_has_what_the_challenge_asks_for(home: Home, tmp_path: Path) -> None:
    package(home, collect(home, NAME), tmp_path / "out", WHO)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "submission.json", "train_gpt.py", "requirements.txt", "train_seed42.log"} <= names
    described = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert {
        "author",
        "github_id",
        "name",
        "date",
        "val_bpb",
        "val_loss",
        "seeds",
        "seed_results",
        "val_bpb_std",
    } <= set(described)
    assert described["bytes_total"] == max(r["artifact_bytes"] for r in described["seed_results"].values())
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "| Seed | Steps | Sliding BPB | TTT BPB | TTT gain | Artifact bytes |" in readme
    assert "[42](train_seed42.log)" in readme
    assert str(home.root) not in readme + json.dumps(described)  # nobody's paths are published


def test_every_seed_can_be_run_from_the_folder(home: Home, tmp_path: Path) -> None:
    found = collect(home, NAME)
    package(home, found, tmp_path / "out", WHO)
    for seed in found.seeds:
        spec = protocol.read_spec(tmp_path / "out" / packages.spec_name(tmp_path / "out", seed.seed))
        assert spec == dataclasses.replace(seed.spec, data_dir="data")
    assert RunDir(tmp_path / "out").bundle.read_bytes() == found.first.run.bundle.read_bytes()


def test_the_review_of_a_sound_folder_passes_and_leaves_what_nobody_tried_open(home: Home, tmp_path: Path) -> None:
    found = package(home, collect(home, NAME), tmp_path / "out", WHO)
    assert found.exit_code == 0
    assert set(statuses(found).values()) == {PASSED, UNDECIDED}
    assert statuses(found)["evaluation.ran.42"] == UNDECIDED
    assert statuses(found)["seeds.source.42"] == PASSED


def test_runs_of_the_same_configuration_that_are_not_shown_are_named(home: Home, tmp_path: Path) -> None:
    found = collect(home, NAME)
    [other] = found.others  # the trial that was found best, on the search's seed
    package(home, found, tmp_path / "out", WHO)
    described = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert [run["run_id"] for run in described["other_runs_of_this_configuration"]] == [other.run_id]
    assert other.run_id in (tmp_path / "out" / "README.md").read_text()


def test_the_presets_arm_is_packaged_by_its_name(home: Home, tmp_path: Path) -> None:
    package(home, collect(home, f"{NAME}:preset"), tmp_path / "out", WHO)
    assert read_record(tmp_path / "out").summary.count == 3


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────


def refusal(home: Home, text: str = NAME) -> str:
    with pytest.raises(ConfigError) as caught:
        collect(home, text)
    return str(caught.value)


def test_a_seed_without_a_result_refuses_the_set(tmp_path: Path) -> None:
    home = make_study.make_study(tmp_path / "home", failing_seed=314)
    assert "seed 314 has no complete result (failed: not_finite" in refusal(home)


def test_seeds_of_two_bundles_or_data_sets_refuse_the_set(home: Home) -> None:
    run = runs(home)[1]
    write_spec(run.spec, dataclasses.replace(read_spec(run.spec), bundle_sha256="0" * 64, manifest_sha256="1" * 64))
    told = refusal(home)
    assert "its seeds are of 2 bundles" in told
    assert "its seeds are of 2 data sets" in told
    assert "train_gpt.py is not the one that it ran" in told


def test_a_changed_script_refuses_the_set(home: Home) -> None:
    runs(home)[0].bundle.write_bytes(b"print('another')\n")
    assert "is not the one that it ran" in refusal(home)


def test_an_artifact_over_the_cap_refuses_the_set(home: Home) -> None:
    change_result(runs(home)[2], artifact_bytes=16_000_001)
    assert "16,000,001 bytes, the cap is 16,000,000" in refusal(home)


def test_a_resumed_run_refuses_the_set(home: Home) -> None:
    change_result(runs(home)[0], resumed_from={"1": 4.0})
    assert "a record run is uninterrupted" in refusal(home)


def test_a_preset_that_is_marked_as_not_accepted_refuses_the_set(home: Home, tmp_path: Path) -> None:
    preset = tmp_path / "slot.toml"
    preset.write_text('not_accepted = "it learns from what it scores (#1336)"\n')
    for run in runs(home):
        write_spec(run.spec, dataclasses.replace(read_spec(run.spec), preset=str(preset)))
    assert "not accepted in submissions: it learns from what it scores (#1336)" in refusal(home)


def test_a_technique_that_reviewers_refuse_is_refused_by_its_knob(home: Home) -> None:
    for run in runs(home):
        spec = read_spec(run.spec)
        config = {**spec.config, "ttt": {**spec.config["ttt"], "method": "off"}}
        config["evaluation"] = {**spec.config["evaluation"], "slot_steps": 8}
        write_spec(run.spec, dataclasses.replace(spec, config=config))
    assert "evaluation.slot_steps = 8 is not accepted" in refusal(home)


def test_a_model_that_learned_before_quantisation_is_refused(home: Home) -> None:
    for run in runs(home):
        spec = read_spec(run.spec)
        config = {**spec.config, "ttt": {**spec.config["ttt"], "before_quantization": True}}
        write_spec(run.spec, dataclasses.replace(spec, config=config))
    assert "ttt.before_quantization = True is not accepted in submissions" in refusal(home)


def test_all_that_speaks_against_a_set_is_said_at_once(home: Home) -> None:
    first, second, _ = runs(home)
    change_result(first, artifact_bytes=17_000_000)
    change_result(second, resumed_from={"1": 4.0})
    told = refusal(home)
    assert "the cap is" in told
    assert "uninterrupted" in told


def test_two_seeds_are_no_record_and_may_be_packaged_for_the_open_track(tmp_path: Path) -> None:
    home = make_study.make_record(tmp_path / "home", seeds=(1, 2))
    [name] = home.study_names()
    with pytest.raises(ConfigError, match="has 2 seeds, 10min_16mb needs 3"):
        package(home, collect(home, name), tmp_path / "out", dataclasses.replace(WHO, track="10min_16mb"))
    assert package(home, collect(home, name), tmp_path / "out", WHO).exit_code == 0


def test_a_folder_that_has_something_in_it_is_not_written_over(home: Home, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        package(home, collect(home, NAME), tmp_path / "out", WHO)


def test_the_command_makes_the_folder_and_shows_its_review(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--home", str(home.root), "package", NAME, "--out", str(out), "--author", "A", "--github-id", "a"]
    assert main(words) == 0
    assert f"{out}: ready" in capsys.readouterr().out
    assert main(["review", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["failed"] == []
    (out / "train_seed42.log").unlink()
    assert main(["review", str(out)]) == 5
    assert "error: seeds.scored" in capsys.readouterr().err


def test_an_arm_that_is_not_there_is_refused_with_those_that_are(home: Home) -> None:
    assert "has no arm 'worst'" in refusal(home, f"{NAME}:worst")


# ── the review ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(home: Home, tmp_path: Path) -> Path:
    package(home, collect(home, NAME), tmp_path / "out", WHO)
    return tmp_path / "out"


def failed(folder: Path, *, evaluated: tuple[Evaluated, ...] = ()) -> set[str]:
    return {check.name for check in review.review(folder, evaluated=evaluated).checks if check.status == FAILED}


def test_a_script_that_does_not_compile_fails_with_its_line(folder: Path) -> None:
    RunDir(folder).bundle.write_text("x = 1\ndef\n")
    found = review.review(folder)
    [check] = [check for check in found.checks if check.name == "script.compiles"]
    assert check.status == FAILED
    assert str(check.found).startswith("line 2:")


def test_another_script_than_the_logs_fails_by_hash_and_by_size(folder: Path) -> None:
    RunDir(folder).bundle.write_text("print('smaller')\n")
    assert {"seeds.source.42", "size.code.42", "size.total.42"} <= failed(folder)


def test_an_edited_headline_or_score_fails(folder: Path) -> None:
    path = folder / "submission.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "val_bpb": described["val_bpb"] - 0.01}))
    assert "score.headline" in failed(folder)
    described["seed_results"]["42"]["val_bpb"] -= 0.01
    path.write_text(json.dumps(described))
    assert "seeds.scored" in failed(folder)


def test_a_missing_log_fails(folder: Path) -> None:
    (folder / "train_seed314.log").unlink()
    assert "seeds.scored" in failed(folder)


def test_too_few_seeds_and_missing_files_fail(folder: Path) -> None:
    (folder / "README.md").unlink()
    found = review.review(folder, seeds=5)
    assert {"files", "seeds.count"} <= {check.name for check in found.failed}


def test_evidence_counts_for_the_very_script_that_is_shipped(folder: Path) -> None:
    shipped = protocol.sha256_of(RunDir(folder).bundle)
    good, other, bad = (
        Evaluated(42, PASSED, shipped, "v"),
        Evaluated(42, PASSED, "0" * 64, "v"),
        Evaluated(42, FAILED, shipped, "v"),
    )
    assert statuses(review.review(folder, evaluated=[good]))["evaluation.ran.42"] == PASSED
    assert statuses(review.review(folder, evaluated=[other]))["evaluation.ran.42"] == UNDECIDED
    assert statuses(review.review(folder, evaluated=[bad]))["evaluation.ran.42"] == FAILED


def test_a_recorded_clean_room_verdict_is_evidence(home: Home, tmp_path: Path) -> None:
    found = collect(home, NAME)
    for seed in found.seeds:
        record = {"verdict": PASSED, "bundle_sha256": seed.spec.bundle_sha256, "result_sha256": "0" * 64}
        protocol.write_json_atomically(seed.run.verify, record)
    seen = package(home, collect(home, NAME), tmp_path / "out", WHO)
    assert {statuses(seen)[f"evaluation.ran.{seed}"] for seed in (42, 314, 999)} == {PASSED}


def test_a_folder_of_others_is_reviewed_too(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "theirs")
    log = tmp_path / "theirs" / "train_seed42.log"
    log.write_text("".join(line for line in log.read_text().splitlines(keepends=True) if "source_sha256" not in line))
    assert statuses(review.review(tmp_path / "theirs"))["seeds.source.42"] == UNDECIDED
