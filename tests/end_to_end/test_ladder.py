"""A ladder as a user climbs it: planned, climbed to a rung, detached, stopped and continued by the same command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import enqueued, ledger, lock
from orchestrator.home import Home
from orchestrator.ledger import Ledger
from tests.end_to_end.micro import KNOB, NAME, ONE_AT_A_TIME, caddie, until, write_study

pytestmark = pytest.mark.slow

LADDER = (
    ONE_AT_A_TIME.replace("[confirm]\nseeds = [42]\n", "")
    + """
[[rungs]]
name = "proxy"
[rungs.set]
"schedule.steps" = 4

[[rungs]]
name = "full"
promote = 1
"""
)
PROXY = f"{NAME}-proxy"


def ladder_state(home: Home, name: str) -> ledger.StudyState:
    return Ledger(home.study(name).ledger).state()


def test_a_ladder_is_planned_begun_stopped_and_climbed_to_its_end(
    tmp_path: Path, make_home: Callable[[str], Home]
) -> None:
    home, study = make_home("home"), write_study(tmp_path, LADDER)
    at_home = ("--home", str(home.root), "study")
    planned = caddie(*at_home, "run", study, "--dry-run", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "a ladder of 2 rungs" in planned.stdout and PROXY in planned.stdout and not home.studies.exists()
    checked = json.loads(caddie(*at_home, "check", study, "--json", cwd=tmp_path).stdout)
    assert [rung["trials_planned"] for rung in checked["ladder"]["rungs"]] == [3, 2]

    started = caddie(*at_home, "run", study, "--detach", cwd=tmp_path)
    assert started.returncode == 0 and "whatever becomes of this terminal" in started.stdout, started.stderr
    holder = lock.holder(home.study(PROXY))
    assert holder is not None and holder.claim is not None and f"process {holder.claim.pid}" in started.stdout
    assert caddie(*at_home, "run", study, "--detach", cwd=tmp_path).returncode == 9, "one climb at a time"
    until(lambda: home.study(PROXY).ledger.exists() and ladder_state(home, PROXY).open_attempts, what="a first job")
    asked = caddie(*at_home, "stop", NAME, cwd=tmp_path)
    assert f"{PROXY}: asked its controller to end after the running jobs" in asked.stdout, asked.stderr
    until(lambda: "report" in home.study(NAME).log.read_text(), what="its end")
    assert ladder_state(home, PROXY).closed == ledger.HALTED and not home.study(NAME).ledger.exists()

    first = caddie(*at_home, "run", study, "--until", "proxy", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "rung full comes next" in first.stdout and "goes up    trial" in first.stdout
    below = ladder_state(home, PROXY)
    assert below.closed == ledger.FINISHED and len(below.trials) == 3 and not home.study(NAME).ledger.exists()
    assert f"{PROXY}: finished" in caddie(*at_home, "status", NAME, cwd=tmp_path).stdout

    last = caddie(*at_home, "run", study, cwd=tmp_path)
    assert last.returncode == 0 and "rung full comes next" in last.stderr, last.stderr
    above = ladder_state(home, NAME)
    assert above.closed == ledger.FINISHED and len(above.trials) == 2
    best = min((trial for trial in below.trials.values() if trial.number), key=lambda trial: trial.value or math.inf)
    assert [trial.params[KNOB] for trial in above.trials.values() if trial.queued] == [best.params[KNOB]]
    assert len(enqueued.requests(home.study(NAME).queue)) == 1

    told = json.loads(caddie(*at_home, "status", NAME, "--json", cwd=tmp_path).stdout)
    assert [(rung["rung"], rung["state"]) for rung in told["rungs"]] == [("proxy", "finished"), ("full", "finished")]
    report = home.study(NAME).report_text.read_text()
    assert "## Ladder" in report and "## Points that went up" in report and "too few" in report
