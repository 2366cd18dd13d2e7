from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from make_audited import edit_result, make_audited
from make_verified import edit_score

from orchestrator.budget import check_reach, check_seconds
from orchestrator.checks import FAILED, NOTED, PASSED, UNDECIDED, Check, read_claims
from orchestrator.clean_room import Evaluation, Reached
from trainer.protocol import Failure, RunDir

EVALUATION = Evaluation(result=None, failure=None, is_offline=True, wall_seconds=733.0, environment={})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_audited(tmp_path)


def seconds(run: RunDir, evaluation: Evaluation | None = None) -> dict[str, Check]:
    return {check.name: check for check in check_seconds(read_claims(run), evaluation)}


def reach(run: RunDir, *, is_offline: bool = True, **reached: Any) -> dict[str, Check]:
    found = Reached(**{"files": [], "hosts": [], "programs": ["ld"], "count": 1234, **reached})
    evaluation = dataclasses.replace(EVALUATION, is_offline=is_offline, reached=found)
    return {check.name: check for check in check_reach(read_claims(run), evaluation, "")}


def test_a_run_within_its_limits_passes(run: RunDir) -> None:
    edit_result(run, phases={"train": 240.0, "calibrate": 10.0, "reload": 1.0, "sliding": 0.25})
    checks = seconds(run)
    assert [check.status for check in checks.values()] == [PASSED, PASSED, NOTED]
    assert checks["limit.train"].note == "train 240.0 s, calibrate 10.0 s"
    assert checks["limit.evaluation.whole"].found == 1.25


def test_training_over_its_limit_is_told(run: RunDir) -> None:
    edit_result(run, train_seconds=300.01)
    check = seconds(run)["limit.train"]
    assert (check.status, check.expected, check.found) == (FAILED, 300.0, 300.01)


def test_a_last_stage_over_the_limit_is_told(run: RunDir) -> None:
    edit_score(run, "ttt", seconds=300.5)
    assert seconds(run)["limit.evaluation.last"].status == FAILED


def test_the_whole_evaluation_is_told_beside_the_limit_without_a_verdict(run: RunDir) -> None:
    check = seconds(run, EVALUATION)["limit.evaluation.whole"]
    assert (check.status, check.expected, check.found) == (NOTED, 300.0, 733.0)
    assert check.note.startswith("in the clean room; no ruling found") and "#2121" in check.note
    crashed = dataclasses.replace(EVALUATION, failure=Failure(kind="code", message="x"))
    assert seconds(run, crashed)["limit.evaluation.whole"].found == 0.0


def test_a_run_without_a_result_has_no_seconds(run: RunDir) -> None:
    run.attempt(1).result.unlink()
    assert seconds(run) == {}


def test_an_evaluation_that_keeps_to_itself_passes(run: RunDir) -> None:
    checks = reach(run)
    assert [check.status for check in checks.values()] == [PASSED, PASSED, NOTED]
    assert checks["reach.files"].note.startswith("1,234 different files")
    assert (checks["reach.programs"].found, checks["reach.network"].note) == (["ld"], "there was none to reach")


def test_files_and_hosts_that_are_reached_for_are_told(run: RunDir) -> None:
    checks = reach(run, files=["/data/train_000000.bin"], hosts=["example.org"], is_offline=False)
    assert [name for name, check in checks.items() if check.status == FAILED] == ["reach.files", "reach.network"]
    assert checks["reach.network"].note == "this machine lets us make no network namespace"


def test_without_an_evaluation_nothing_is_decided(run: RunDir) -> None:
    checks = check_reach(read_claims(run), None, "left out")
    assert [(check.status, check.note) for check in checks] == [(UNDECIDED, "left out")] * 2
