from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from make_audited import CHUNK, edit_result, make_audited, moved, sound

from orchestrator.checks import FAILED, NOTED, PASSED, UNDECIDED, Check, read_claims
from orchestrator.conditions import check_conditions
from trainer import protocol
from trainer.protocol import RunDir

Measured = dict[str, Any]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_audited(tmp_path)


def checked(run: RunDir, measured: Measured | None = None) -> dict[str, Check]:
    return {check.name: check for check in check_conditions(read_claims(run), measured or sound(run))}


def failures(checks: dict[str, Check]) -> list[str]:
    for check in checks.values():
        assert check.status != FAILED or (check.rule and check.place and check.remedy)
    return [name for name, check in checks.items() if check.status == FAILED]


def test_a_sound_run_passes_and_each_check_tells_its_numbers(run: RunDir) -> None:
    checks = checked(run)
    assert {name: check.status for name, check in checks.items() if check.status != PASSED} == {
        "c1.boundary.sliding": NOTED,
        "c1.boundary.ttt": NOTED,
    }
    assert "future: 0 of 1,000 moved" in checks["c1.scorer.ttt"].note
    assert "at 8 positions with 32 tokens of context" in checks["c2.sum.sliding"].note
    assert "of 300 positions 0 never, 0 again" in checks["c4.once.ttt"].note
    assert checks["c3.log"].note == "chunks: roundtrip 3, sliding 3, ttt 3"


@pytest.mark.parametrize("way", ["future", "target", "targets", "inputs", "other rows"])
@pytest.mark.parametrize(("prefix", "stage"), [("", "sliding"), ("ttt_", "ttt")])
def test_a_scorer_that_moves_in_any_way_is_told_with_the_way(run: RunDir, way: str, prefix: str, stage: str) -> None:
    measured = sound(run)
    measured["probes"][f"{prefix}future"][way] = moved(moved=7, largest=0.02)
    checks = checked(run, measured)
    assert failures(checks) == [f"c1.scorer.{stage}"]
    check = checks[f"c1.scorer.{stage}"]
    assert (check.expected, check.found, check.tolerance) == (0.0, 0.02, 1e-5)
    assert f"{way}: 7 of 1,000 moved" in check.note


def test_a_rounding_of_the_last_bits_is_no_leak(run: RunDir) -> None:
    measured = sound(run)
    measured["probes"]["reach_back"] = moved(moved=3, largest=9e-6)
    assert failures(checked(run, measured)) == []


@pytest.mark.parametrize(
    ("probe", "name"), [("reach_back", "c1.evaluation.sliding"), ("ttt_reach_back", "c3.evaluation.ttt")]
)
def test_an_evaluation_that_is_reached_from_behind_is_told(run: RunDir, probe: str, name: str) -> None:
    measured = sound(run)
    measured["probes"][probe] = moved(moved=40, largest=0.01, noise=1e-4)
    checks = checked(run, measured)
    assert failures(checks) == [name]
    assert checks[name].note == "40 of 1,000 scores moved, at most 0.01 nats, by itself 0.0001; 900 others did"


def test_what_moves_by_itself_as_much_is_no_leak(run: RunDir) -> None:
    measured = sound(run)
    measured["device"] = "NVIDIA H100"
    measured["probes"]["ttt_reach_back"] = moved(moved=40, largest=0.01, noise=0.008)
    check = checked(run, measured)["c3.evaluation.ttt"]
    assert (check.status, check.tolerance) == (PASSED, 0.016)


@pytest.mark.parametrize("nothing", [{"compared": 0}, {"control": 0}])
def test_a_probe_that_showed_nothing_decides_nothing(run: RunDir, nothing: dict[str, int]) -> None:
    measured = sound(run)
    measured["probes"]["reach_back"] = moved(**nothing)
    measured["probes"]["future"] = {"future": moved(**nothing)}
    checks = checked(run, measured)
    assert checks["c1.evaluation.sliding"].status == checks["c1.scorer.sliding"].status == UNDECIDED
    assert checks["c1.scorer.sliding"].note == "nothing was measured"


def test_a_score_that_is_no_number_is_told(run: RunDir) -> None:
    measured = sound(run)
    measured["probes"]["distribution"]["largest_log_sum"] = math.inf
    assert failures(checked(run, measured)) == ["c2.sum.sliding"]


@pytest.mark.parametrize(("field", "name"), [("largest_log_sum", "c2.sum.ttt"), ("largest_entry_gap", "c2.entry.ttt")])
def test_probabilities_that_are_no_distribution_are_told(run: RunDir, field: str, name: str) -> None:
    measured = sound(run)
    measured["probes"]["ttt_distribution"][field] = 0.05
    assert failures(checked(run, measured)) == [name]


@pytest.mark.parametrize(
    ("knobs", "failed"),
    [
        ({}, []),
        ({"evaluation.protocol": "documents"}, ["c1.boundary.sliding"]),
        ({"ttt.method": "lora", "ttt.lora_unit": "document"}, ["c1.boundary.ttt"]),
    ],
)
def test_a_document_that_reaches_into_the_next_fails_where_documents_are_apart(
    tmp_path: Path, knobs: dict[str, str], failed: list[str]
) -> None:
    run = make_audited(tmp_path, knobs=knobs)
    checks = checked(run)
    assert failures(checks) == failed
    if not failed:
        assert checks["c1.boundary.sliding"].note.endswith("0.01 nats in the mean; the protocol reads across documents")


@pytest.mark.parametrize("change", [{"never": 4}, {"again": 1}, {"tokens": 299}, {"bytes": 1799}])
def test_positions_and_bytes_that_are_not_counted_once_are_told(run: RunDir, change: dict[str, int]) -> None:
    measured = sound(run)
    measured["probes"]["coverage"].update(change)
    assert failures(checked(run, measured)) == ["c4.once.sliding"]


def test_an_account_that_takes_what_it_must_refuse_is_told(run: RunDir) -> None:
    measured = sound(run)
    measured["probes"]["account"] = ["a position scored twice"]
    assert failures(checked(run, measured)) == ["c4.account"]


@pytest.mark.parametrize(
    "change", [{"counted": 2100, "wrong": 9}, {"wrong": 2}], ids=["more bytes", "faults that cancel out"]
)
def test_bytes_that_are_not_the_texts_are_told(run: RunDir, change: dict[str, int]) -> None:
    measured = sound(run)
    measured["probes"]["bytes"].update(change)
    checks = checked(run, measured)
    assert failures(checks) == ["c4.spelled"]
    assert checks["c4.spelled"].note == f"9 documents, {change['wrong']} of them counted otherwise than they read"


def test_a_sample_without_a_whole_document_decides_nothing_about_its_bytes(run: RunDir) -> None:
    measured = sound(run)
    measured["probes"]["bytes"] = {"documents": 0, "counted": 0, "spelled": 0, "wrong": 0}
    check = checked(run, measured)["c4.spelled"]
    assert (check.status, check.note) == (UNDECIDED, "no whole document in the sample")


def test_scores_over_a_part_of_the_split_are_told(run: RunDir) -> None:
    measured = sound(run)
    measured["data"].update(targets=301, counted_bytes=1803)
    assert failures(checked(run, measured)) == [
        f"c4.{what}.{stage}" for stage in ("roundtrip", "sliding", "ttt") for what in ("tokens", "bytes")
    ]


# ── the log ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def edit_events(run: RunDir, old: str, new: str) -> None:
    log = run.attempt(1).events
    text = log.read_text()
    assert old in text
    log.write_text(text.replace(old, new, 1))


def test_a_log_whose_chain_is_broken_is_told_with_the_place(run: RunDir) -> None:
    edit_events(run, '"stage":"ttt","chunk":1,"first":100', '"stage":"ttt","chunk":1,"first":99')
    check = checked(run)["c3.log"]
    assert check.status == FAILED and isinstance(check.found, list)
    assert check.found[0].startswith("ttt, chunk 1: the chain is broken")
    assert "ttt, chunk 1: it scores again positions 99 to 99" in check.found


def test_a_log_that_is_damaged_or_missing_is_told(run: RunDir) -> None:
    log = run.attempt(1).events
    log.write_text("nonsense\n" + log.read_text())
    assert "not a JSON object" in str(checked(run)["c3.log"].found)
    log.unlink()
    assert "ttt: no chunk of it was logged as scored" in (checked(run)["c3.log"].found or [])


def test_a_logged_first_chunk_that_does_not_come_out_again_is_told(run: RunDir) -> None:
    measured = sound(run)
    measured["probes"]["first_chunk"]["nats"] += 0.02 * CHUNK
    checks = checked(run, measured)
    assert failures(checks) == ["c3.first_chunk.sliding", "c3.first_chunk.ttt"]
    check = checks["c3.first_chunk.sliding"]
    assert isinstance(check.found, float) and check.found - check.expected == pytest.approx(0.02)


def test_a_first_chunk_outside_the_sample_or_on_another_device_decides_nothing(run: RunDir) -> None:
    measured = sound(run)
    measured["probes"]["first_chunk"]["nats"] += CHUNK
    measured["device"] = "NVIDIA H100"
    assert checked(run, measured)["c3.first_chunk.sliding"].note == "the probes ran on another device than the run"
    measured["probes"]["first_chunk"] = None
    check = checked(run, measured)["c3.first_chunk.ttt"]
    assert (check.status, check.note) == (
        UNDECIDED, "the first chunk is no part of the sample: a larger --sample takes it in",
    )  # fmt: skip


def test_two_paths_that_differ_before_anything_is_learned_are_told(run: RunDir) -> None:
    measured = sound(run)
    measured["probes"]["parity"] = 0.6  # as #1334 met
    edit_result(run, parity_nats=-2e-4)
    assert failures(checked(run, measured)) == ["c3.parity", "c3.parity.run"]
    edit_result(run, parity_nats=None)
    assert checked(run)["c3.parity.run"].status == UNDECIDED


def test_a_run_without_test_time_training_is_judged_without(tmp_path: Path) -> None:
    run = make_audited(tmp_path, knobs={"ttt.method": "off"})
    measured = sound(run)
    measured["probes"] = {name: value for name, value in measured["probes"].items() if "ttt" not in name}
    del measured["probes"]["parity"]
    checks = checked(run, measured)
    assert not [name for name in checks if name.startswith(("c1", "c2", "c3.parity")) and name.endswith("ttt")]


def test_a_run_without_a_result_has_no_log_to_judge(run: RunDir) -> None:
    run.attempt(1).result.unlink()
    checks = checked(run)
    assert checks["c3.log"].status == UNDECIDED
    assert protocol.TTT not in {name.rpartition(".")[2] for name in checks if name.startswith("c4.tokens")}


def test_a_model_that_learned_before_quantisation_fails_condition_three(tmp_path: Path) -> None:
    run = make_audited(tmp_path / "before", knobs={"ttt.before_quantization": True})
    measured = sound(run)
    for name in [name for name in measured["probes"] if name.startswith("ttt_")]:
        del measured["probes"][name]
    assert "c3.before_quantization" in failures(checked(run, measured))
    assert "c3.before_quantization" not in checked(make_audited(tmp_path / "after"))
