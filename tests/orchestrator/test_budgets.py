"""A controller that has a budget to keep."""

import os

import pytest
from fakes import FakeLauncher, Listener, scored, tiny_study
from make_controller import Killed, controller, die_at

from orchestrator import ledger
from orchestrator.purse import Purse, run_cost
from orchestrator.slots import Slots
from orchestrator.study import BudgetPlan
from trainer import protocol

HOUR = 3600.0
RESOURCES = "gpus_per_run = 1\ntimeout_minutes = 57"  # with the overrun, a GPU-hour at most


class Timed(FakeLauncher):
    """Runs that have had their GPU for so many seconds when they end."""

    def __init__(self, seconds, **fields):
        super().__init__(**fields)
        self.seconds = seconds

    def _end(self, run, attempt):
        super()._end(run, attempt)
        if attempt.result.exists():
            at = attempt.result.stat().st_mtime + self.seconds
            os.utime(attempt.result, (at, at))


def study_of(budget, **changes):
    extra = f"[budget]\n{budget}"
    return tiny_study(extra=extra, resources=RESOURCES, **{"trials": 20, "confirm": "[42]", **changes})


@pytest.fixture(autouse=True)
def gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")


def run(study, home, launcher, **parts):
    return controller(study, home, launcher=launcher, slots=Slots((("0",), ("1",), ("2",), ("3",))), **parts).run()


def taken(state):
    return state.gpu_seconds


def test_a_search_ends_when_its_cap_leaves_no_room_and_the_confirmation_is_made_all_the_same(home):
    study, listener = study_of("gpu_hours = 5"), Listener()
    assert run_cost(study) == HOUR
    state = run(study, home, Timed(1800.0), listener=listener)
    assert state.closed == ledger.SPENT and 4 <= len(state.trials) < 20
    assert all(trial.state == ledger.COMPLETE for trial in state.trials.values())
    assert set(state.arms) == {"preset", "best"} and taken(state) <= 5 * HOUR
    assert any("the budget of tiny leaves no room" in note for note in listener.notes)


@pytest.mark.parametrize("cap", [3, 4, 7])
def test_no_cap_is_ever_exceeded_not_even_by_what_is_promised(home, cap):
    study = study_of(f"gpu_hours = {cap}")

    class Looking(Timed):
        def submit(self, run, attempt, *, tag, resources):
            standing = Purse(home, "tiny", BudgetPlan()).standing()
            assert standing.study_taken + standing.study_reserved <= cap * HOUR
            return super().submit(run, attempt, tag=tag, resources=resources)

    state = run(study, home, Looking(3500.0))
    assert taken(state) <= cap * HOUR and state.arms


def test_a_larger_cap_goes_on_with_the_search(home):
    first = run(study_of("gpu_hours = 4"), home, Timed(3000.0))
    state = run(study_of("gpu_hours = 40", trials=6), home, Timed(3000.0))
    assert first.closed == ledger.SPENT and len(first.trials) < 6
    assert (len(state.trials), state.closed) == (6, ledger.FINISHED)


def test_without_a_cap_a_study_is_finished_and_its_costs_are_noted(home):
    state = run(study_of("price_per_gpu_hour = 2.0", trials=2), home, Timed(1800.0))
    assert state.closed == ledger.FINISHED
    assert Purse(home, "tiny", BudgetPlan()).standing().study_taken == pytest.approx(taken(state))


@pytest.mark.parametrize("kind", [ledger.TRIAL_ASKED, ledger.SUBMITTING, ledger.SUBMITTED, ledger.ENDED])
def test_a_controller_killed_anywhere_keeps_the_cap_and_loses_no_room(home, kind):
    study, launcher = study_of("gpu_hours = 5"), Timed(1800.0)
    victim = controller(study, home, launcher=launcher, slots=Slots((("0",), ("1",), ("2",), ("3",))))
    with pytest.raises(Killed):
        die_at(victim, kind, 2).run()
    state = run(study, home, launcher)
    standing = Purse(home, "tiny", BudgetPlan()).standing()
    assert standing.study_reserved == 0 and standing.study_taken == pytest.approx(taken(state))
    assert taken(state) <= 5 * HOUR and state.closed == ledger.SPENT and state.arms


def test_a_days_cap_makes_a_study_wait_and_says_until_when(home):
    study, listener = study_of("gpu_hours_per_day = 2", trials=4), Listener()

    class UntilItWaits(Listener):
        def note(self, text):
            listener.note(text)
            if "the day's budget is used up" in text:
                home.study("tiny").stop.write_text("drain")

    state = run(study, home, Timed(3590.0), listener=UntilItWaits())
    assert state.closed == ledger.HALTED and len(state.trials) <= 3
    assert any("goes on at 00:00 UTC" in note for note in listener.notes)


def test_a_run_that_is_attempted_again_has_no_more_room_than_the_others(home):
    """The machine fails every run's first attempt: their hours are taken all the same."""

    def lost(run, attempt, spec):
        failure = protocol.Failure(kind=protocol.INFRASTRUCTURE, message="gone")
        return scored(run, attempt, spec, status=protocol.FAILED, failure=failure, scores={})

    launcher = Timed(3000.0, behaviours={(1, 1): lost})
    state = run(study_of("gpu_hours = 8"), home, launcher)
    assert taken(state) <= 8 * HOUR and state.closed == ledger.SPENT
    assert {trial.state for trial in state.trials.values()} <= {ledger.COMPLETE, ledger.PRUNED}
