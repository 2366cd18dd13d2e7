"""kill -9 of each process of a study, then the same command: the same total, nothing twice, the same trials."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import ledger
from orchestrator.claims import read_claim
from orchestrator.home import Home
from orchestrator.launcher import JOB_TAG
from orchestrator.ledger import Attempt
from orchestrator.processes import TRAINER_TAG, tagged_processes, trainer_tag
from tests.end_to_end.micro import (
    NAME,
    ONE_AT_A_TIME,
    TRIALS,
    caddie,
    end,
    records,
    require_decided_once,
    start,
    starts,
    state,
    until,
    write_study,
)
from trainer import protocol
from trainer.protocol import read_result

pytestmark = pytest.mark.slow

MOMENTS = (
    ledger.OPENED,
    ledger.TRIAL_ASKED,
    ledger.SUBMITTING,
    ledger.SUBMITTED,
    ledger.ENDED,
    ledger.TRIAL_TOLD,
    ledger.ARM_ASKED,
)
"""After a record of each kind the controller is killed once."""


def run_and_kill(home: Home, study: Path, kind: str, *, pause: float) -> int | None:
    """Start the study's command, and kill it `pause` seconds after its next record of a kind; its exit code where it
    came to its end before."""
    before = len(records(home, kind))
    process = start("--home", home.root, "study", "run", study, cwd=study.parent, log=home.root / "log.txt")
    try:
        until(lambda: process.poll() is not None or len(records(home, kind)) > before, what=f"a record {kind}")
        deadline = time.monotonic() + pause
        until(lambda: process.poll() is not None or time.monotonic() >= deadline)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            return None
        return process.returncode
    finally:
        end(process)


def finish(home: Home, study: Path) -> subprocess.CompletedProcess[str]:
    done = caddie("--home", home.root, "study", "run", study, cwd=study.parent)
    assert done.returncode == 0, done.stderr
    return done


def params_of(home: Home) -> dict[str, dict[str, object]]:
    found = state(home)
    return {
        **{f"trial {trial.number}": trial.params for trial in found.trials.values()},
        **{f"arm {arm.name}": arm.params for arm in found.arms.values()},
    }


def seed_runs_in_mlflow(home: Home) -> list[str]:
    """The run id of each of MLflow's runs that stands for a run."""
    with sqlite3.connect(f"file:{home.mlflow_database}?mode=ro", uri=True) as database:
        rows = database.execute(
            "SELECT tags.value FROM tags JOIN runs USING (run_uuid) WHERE key = 'caddie.run_id' AND lifecycle_stage = 'active'"
        ).fetchall()
    return sorted(run_id for (run_id,) in rows)


def test_a_controller_killed_at_every_kind_of_moment_ends_as_one_that_never_was(
    tmp_path: Path, make_home: Callable[[str], Home]
) -> None:
    study = write_study(tmp_path, ONE_AT_A_TIME)
    broken, whole = make_home("broken"), make_home("whole")
    unbroken = start("--home", whole.root, "study", "run", study, cwd=tmp_path, log=tmp_path / "whole.txt")
    try:
        pauses = random.Random(6)
        kills = [run_and_kill(broken, study, kind, pause=pauses.uniform(0.0, 0.3)) for kind in MOMENTS]
        assert kills.count(None) >= 5
        table = finish(broken, study).stdout
        until(lambda: unbroken.poll() is not None, what="the end of the unbroken study")
    finally:
        end(unbroken)
    require_decided_once(broken)
    assert state(broken).closed == ledger.FINISHED
    assert sorted(state(broken).run_ids) == sorted(state(whole).run_ids)
    assert set(starts(broken).values()) == {1}, "no run was begun twice"
    assert sorted(seed_runs_in_mlflow(broken)) == sorted(seed_runs_in_mlflow(whole))
    assert params_of(broken) == params_of(whole)
    assert scores_of(broken) == scores_of(whole)
    decided = broken.study(NAME).ledger.read_bytes()
    assert finish(broken, study).stdout == table
    assert broken.study(NAME).ledger.read_bytes() == decided, "a finished study decides nothing more"


def scores_of(home: Home) -> dict[str, float]:
    return {
        run_id: read_result(home.run(run_id).attempt(1).result).scores[protocol.TTT].bpb
        for run_id in state(home).run_ids
    }


def test_killed_trainers_and_workers_cost_no_trial(tmp_path: Path, make_home: Callable[[str], Home]) -> None:
    home, study = make_home("home"), write_study(tmp_path)
    controller = start("--home", home.root, "study", "run", study, cwd=tmp_path, log=tmp_path / "log.txt")
    try:
        first = until(lambda: running_attempt(home), what="a trainer at work")
        os.kill(pid_of(home, first, "trainer"), signal.SIGKILL)
        second = until(lambda: running_attempt(home, other_than=first), what="another trainer at work")
        os.kill(pid_of(home, second, "worker"), signal.SIGKILL)
        until(lambda: controller.poll() is not None)
        assert controller.returncode == 0, (tmp_path / "log.txt").read_text()
    finally:
        end(controller)
    require_decided_once(home)
    killed, again = home.run(first.run_id).attempts()
    failure = read_result(killed.result).failure
    assert failure is not None and failure.kind == protocol.INFRASTRUCTURE
    assert read_result(again.result).status == protocol.COMPLETE
    last = home.run(second.run_id).attempts()[-1]  # a trainer whose worker died may end what it began
    assert read_result(last.result).status == protocol.COMPLETE
    assert [trial.state for trial in state(home).trials.values()] == [ledger.COMPLETE] * TRIALS


def running_attempt(home: Home, *, other_than: Attempt | None = None) -> Attempt | None:
    """An attempt, of another run, whose trainer has begun to write."""
    if not home.study(NAME).ledger.exists():
        return None
    for attempt in state(home).attempts.values():
        files = home.run(attempt.run_id).attempt(attempt.number)
        if other_than is not None and attempt.run_id == other_than.run_id:
            continue
        if attempt.status is None and files.events.exists() and not files.result.exists():
            return attempt
    return None


def pid_of(home: Home, attempt: Attempt, victim: str) -> int:
    files = home.run(attempt.run_id).attempt(attempt.number)
    if victim == "trainer":
        [pid] = tagged_processes(TRAINER_TAG, trainer_tag(files))
        return pid
    claim = read_claim(files)
    assert claim is not None and claim.pid in tagged_processes(JOB_TAG, attempt.tag)
    return claim.pid
