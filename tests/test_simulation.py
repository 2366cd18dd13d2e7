"""The simulated cluster of benchmarks/, under the real controller."""

import time

import pytest

from benchmarks.search import BOUNDS, HALVING, RACE, RUNGS, simulate, study_of
from benchmarks.simulation import BEST_BPB, CLOCKED, SEED_STD, Landscape
from orchestrator.racing import BETTER, HOPELESS, NOT_BETTER

HOURS = (60 + 600 + 500) * 8 / 3600  # GPU-hours of a whole run: start, training, evaluation
WHERE = Landscape(seed=5, bounds=BOUNDS)


def study(name="simulated", *, trials=12, sampler="random", extra=""):
    return study_of(name, sampler=sampler, trials=trials, slots=4, extra=extra)


def test_hours_pass_at_once_and_cost_what_they_would(tmp_path):
    clocks = [module.__dict__["time"] for module in CLOCKED]
    began = time.monotonic()
    trace = simulate(study(), WHERE, folder=str(tmp_path))
    assert time.monotonic() - began < 60 < 3600 * trace.spent
    assert trace.spent / 3600 == pytest.approx(12 * HOURS, rel=0.01)
    assert [module.__dict__["time"] for module in CLOCKED] == clocks
    assert not list(tmp_path.iterdir())


def test_the_same_question_has_the_same_answer(tmp_path):
    first, again = (simulate(study(), WHERE, folder=str(tmp_path)) for _ in range(2))
    assert first.excess == again.excess and first.gpu_hours == again.gpu_hours
    assert 9 <= len(first.excess) <= 12  # those whose files are over the cap are no candidates
    assert first.excess != simulate(study(), Landscape(seed=6, bounds=BOUNDS), folder=str(tmp_path)).excess


def test_trials_that_are_stopped_early_cost_less(tmp_path):
    whole, stopped = (simulate(study(trials=24, extra=e), WHERE, folder=str(tmp_path)) for e in ("", HALVING))
    assert len(stopped.excess) < len(whole.excess)
    assert stopped.spent < 0.8 * whole.spent


def test_a_ladder_begins_with_what_costs_little(tmp_path):
    trace = simulate(study(trials=20, extra=RUNGS.format(full=6)), WHERE, folder=str(tmp_path))
    proxies = (60 + 120 + 500) / 3600
    assert sum(hours <= 20.1 * proxies for hours in trace.gpu_hours) in range(16, 21)
    assert trace.spent / 3600 == pytest.approx(20 * proxies + 13 * HOURS / 8 + 6 * HOURS, rel=0.05)


def test_a_race_ends_with_a_verdict_unless_a_file_is_over_the_cap(tmp_path):
    question = study(trials=24, extra=RACE)
    traces = [simulate(question, Landscape(seed=n, bounds=BOUNDS), folder=str(tmp_path)) for n in range(1, 11)]
    decided = [trace for trace in traces if trace.verdict in (BETTER, NOT_BETTER, HOPELESS)]
    assert len(decided) >= 4  # of a race's first four files one is over the cap in a quarter of the cases
    assert all(trace.confirmation_hours >= 4 * 0.99 * HOURS for trace in decided)
    others = [trace for trace in traces if trace not in decided]
    assert {trace.verdict for trace in others} <= {"not confirmed"}
    # There an arm fell out before it had its seeds.
    assert all(trace.confirmation_hours < 4 * 0.99 * HOURS for trace in others)
    assert all(trace.is_accepted == (trace.verdict == BETTER) for trace in traces)


@pytest.mark.parametrize("family", ["bowl", "valley", "ripple"])
def test_a_landscape_has_its_sizes(family):
    place = Landscape(seed=1, bounds=BOUNDS, family=family)
    middle = {name: (low * high) ** 0.5 if log else (low + high) / 2 for name, (low, high, log) in BOUNDS.items()}
    edge = {name: high for name, (_, high, _) in BOUNDS.items()}
    assert 0 <= place.excess(middle) < 0.02 and place.excess(edge) > place.excess(middle)
    assert place.excess(middle, budget=0.1) != place.excess(middle, budget=1.0)
    assert SEED_STD < place.excess(edge) < BEST_BPB
