import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes import subprocess_environment, tiny_study

from orchestrator import purse as purses
from orchestrator.errors import StorageError
from orchestrator.ledger import Attempt, StudyState
from orchestrator.purse import BY_DAY, BY_STUDY, OVERRUN_SECONDS, Purse, confirmation_cost, next_day, run_cost
from orchestrator.study import BudgetPlan

HOUR = 3600.0
DAY = 86_400.0


def attempt(run_id="r", number=1, *, seconds=0.0, gpus=8, status="complete", ended=None):
    """One that has just ended, if nothing else is said."""
    began = (purses.time.time() if ended is None else ended) - seconds
    return Attempt(
        run_id=run_id, number=number, tag=run_id, resources={}, submitted=0.0, status=status, began=began, seconds=seconds,
        gpus=gpus,
    )  # fmt: skip


def state_of(*attempts):
    return StudyState(attempts={(a.run_id, a.number): a for a in attempts})


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100 * DAY + 10 * HOUR

    monkeypatch.setattr(purses.time, "time", lambda: Clock.now)
    return Clock


def test_what_is_set_aside_counts_against_the_studys_cap_and_is_given_back_at_the_end(home):
    purse = Purse(home, "s", BudgetPlan(gpu_hours=10))
    assert purse.reserve("a", 6 * HOUR) is None
    assert purse.reserve("b", 6 * HOUR) == BY_STUDY
    purse.settle(attempt("a", seconds=HOUR / 2))  # 4 GPU-hours of 8 GPUs
    assert purse.reserve("b", 6 * HOUR) is None
    assert purse.standing().study_taken == 4 * HOUR and purse.standing().study_reserved == 6 * HOUR


def test_the_search_leaves_what_is_kept_back(home):
    purse = Purse(home, "s", BudgetPlan(gpu_hours=10))
    assert purse.reserve("a", 4 * HOUR, keep=7 * HOUR) == BY_STUDY
    assert purse.reserve("a", 4 * HOUR, keep=6 * HOUR) is None


def test_a_day_counts_every_study_and_ends_at_midnight(home, clock):
    plan = BudgetPlan(gpu_hours_per_day=10)
    purse, other = Purse(home, "s", plan), Purse(home, "t", BudgetPlan())
    home.study("t").root.mkdir(parents=True)
    home.study("t").ledger.write_text("\n")
    assert other.reserve("x", 6 * HOUR) is None
    assert purse.reserve("a", 6 * HOUR) == BY_DAY
    other.settle(attempt("x", seconds=0.9 * HOUR))
    assert purse.reserve("a", 6 * HOUR) == BY_DAY
    clock.now += 14 * HOUR
    assert purse.reserve("a", 6 * HOUR) is None
    assert next_day(clock.now).isoformat() == "1970-04-13T00:00:00+00:00"


def test_what_runs_over_midnight_counts_on_both_days_by_its_hours(home, clock):
    purse = Purse(home, "s", BudgetPlan(gpu_hours_per_day=10))
    clock.now = 100 * DAY + 23 * HOUR
    assert purse.reserve("a", 8 * HOUR) is None
    clock.now = 101 * DAY + HOUR / 2
    assert purse.reserve("b", 6 * HOUR) == BY_DAY  # it may yet take all of it today
    purse.settle(attempt("a", seconds=HOUR))
    assert purse.standing().day_taken == pytest.approx(4 * HOUR)
    assert purse.reserve("b", 6 * HOUR) is None


def test_what_ended_while_nobody_looked_counts_on_the_day_on_which_it_ran(home, clock):
    purse = Purse(home, "s", BudgetPlan(gpu_hours_per_day=10))
    assert purse.reserve("a", 9 * HOUR) is None
    evening, clock.now = clock.now + 12 * HOUR, 101 * DAY + 9 * HOUR
    purse.settle(attempt("a", seconds=HOUR, ended=evening))
    assert purse.standing().day_taken == 0 and purse.standing().study_taken == 8 * HOUR
    assert purse.reserve("b", 9 * HOUR) is None


def test_a_study_that_was_deleted_holds_no_day_up(home, clock):
    Purse(home, "gone", BudgetPlan()).reserve("x", 9 * HOUR)
    assert Purse(home, "s", BudgetPlan(gpu_hours_per_day=10)).reserve("a", 6 * HOUR) is None


def test_caps_in_money_are_caps_in_hours_at_their_price():
    plan = BudgetPlan(gpu_hours=100, cost=50, cost_per_day=20, price_per_gpu_hour=2.5)
    assert plan.study_cap_seconds == 20 * HOUR and plan.day_cap_seconds == 8 * HOUR


def test_a_hundred_that_ask_at_once_do_not_exceed_the_cap(home):
    """Each with eyes of its own, as so many controllers have."""

    def ask(number):
        return Purse(home, "s", BudgetPlan(gpu_hours=10)).reserve(f"r{number}", HOUR)

    with ThreadPoolExecutor(25) as pool:
        answers = list(pool.map(ask, range(100)))
    assert answers.count(None) == 10 and answers.count(BY_STUDY) == 90
    assert Purse(home, "s", BudgetPlan()).standing().study_reserved == 10 * HOUR


PROCESS = """
import sys
from pathlib import Path
from orchestrator.home import Home
from orchestrator.purse import Purse
from orchestrator.study import BudgetPlan
name, plan = sys.argv[2], BudgetPlan(gpu_hours_per_day=10)
for number in range(25):
    print(Purse(Home(Path(sys.argv[1])), name, plan).reserve(f"r{number}", 3600.0))
"""


def test_controllers_of_four_studies_do_not_exceed_the_day_together(home):
    for name in "abcd":
        home.study(name).root.mkdir(parents=True)
        home.study(name).ledger.write_text("\n")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(home.root), name], stdout=subprocess.PIPE, text=True, env=subprocess_environment()
        )
        for name in "abcd"
    ]  # fmt: skip
    answers = [word for process in processes for word in process.communicate(timeout=60)[0].split()]
    if time.time() % DAY > 60:  # none of them saw the next day
        assert len(answers) == 100 and answers.count("None") == 10


def test_a_run_that_has_its_seconds_aside_keeps_them(home):
    purse = Purse(home, "s", BudgetPlan(gpu_hours=10))
    assert purse.reserve("a", 9 * HOUR) is None
    assert Purse(home, "s", BudgetPlan(gpu_hours=10)).reserve("a", 9 * HOUR) is None
    assert purse.standing().study_reserved == 9 * HOUR


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_controller_killed_between_the_purse_and_the_ledger_is_made_up_for(home, has_begun):
    purse = Purse(home, "s", BudgetPlan(gpu_hours=10))
    purse.reserve("a", 6 * HOUR)
    running = [attempt("a", status=None, gpus=0)] if has_begun else []
    again = Purse(home, "s", BudgetPlan(gpu_hours=10))
    again.reconcile(state_of(*running), 6 * HOUR)
    assert again.standing().study_reserved == (6 * HOUR if has_begun else 0)


def test_attempts_that_the_purse_has_not_heard_of_are_counted_once(home):
    ended, running = attempt("a", seconds=HOUR), attempt("b", status=None, gpus=0)
    for _ in range(2):
        purse = Purse(home, "s", BudgetPlan(gpu_hours=10))
        purse.reconcile(state_of(ended, running), 5 * HOUR)
        purse.settle(ended)
    standing = purse.standing()
    assert (standing.study_taken, standing.study_reserved) == (8 * HOUR, 5 * HOUR)


def test_a_line_that_was_being_written_is_dropped(home):
    Purse(home, "s", BudgetPlan()).reserve("a", HOUR)
    with home.purse.open("a") as file:
        file.write('{"kind":"reser')
    purse = Purse(home, "s", BudgetPlan())
    assert purse.reserve("b", HOUR) is None
    assert purse.standing().study_reserved == 2 * HOUR


def test_runs_without_a_gpu_cost_nothing_and_leave_no_file(home):
    purse = Purse(home, "s", BudgetPlan(gpu_hours=1))
    assert purse.reserve("a", 0.0) is purse.refusal(0.0) is None
    purse.settle(attempt(gpus=0))
    purse.reconcile(StudyState(), 0.0)
    assert not home.purse.exists()


def test_without_a_cap_what_is_taken_is_noted_all_the_same(home):
    purse = Purse(home, "s", BudgetPlan())
    assert purse.refusal(1e9) is None and purse.reserve("a", 1e9) is None
    assert purse.standing().study_reserved == 1e9


def test_a_file_that_cannot_be_locked_is_a_storage_error(home, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(purses.fcntl, "flock", refuse)
    with pytest.raises(StorageError, match="cannot be locked: Operation not supported; no cap could be kept"):
        Purse(home, "s", BudgetPlan()).reserve("a", 1.0)


def test_a_run_costs_its_longest_time_and_a_race_keeps_its_first_look():
    study = tiny_study(resources="gpus_per_run = 8\ntimeout_minutes = 30", confirm="[1, 2, 3]")
    assert run_cost(study) == 8 * (1800 + OVERRUN_SECONDS)
    assert confirmation_cost(study) == 6 * run_cost(study)
    racing = tiny_study(resources="gpus_per_run = 8", confirm="[1, 2, 3]\nsequential = true")
    assert confirmation_cost(racing) == 4 * run_cost(racing)
    assert confirmation_cost(tiny_study(confirm=None)) == 0
