import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.power import MOST_SEEDS, POWER, Design, more_seeds, plan, seeds_needed, smallest_detectable
from orchestrator.statistics import one_sample, summarize, summary_of


@given(st.floats(1e-4, 1.0), st.integers(2, 8), st.one_of(st.none(), st.integers(2, 8)))
def test_the_smallest_detectable_difference_is_found_with_the_wanted_power(std, seeds, baseline):
    test = Design(std=std, alpha=0.05, baseline=baseline)
    effect = smallest_detectable(test, seeds)
    # the search halves its interval sixty times; the power is smooth
    assert test.power(effect, seeds) == pytest.approx(POWER, abs=1e-6)


def test_seeds_needed_are_the_fewest():
    test = Design(std=1.0, alpha=0.01, baseline=3)
    count = seeds_needed(test, 3.0)
    assert test.power(3.0, count) >= POWER > test.power(3.0, count - 1)


def test_a_baseline_of_few_seeds_bounds_what_more_of_ours_can_show():
    test = Design(std=1.0, alpha=0.01, baseline=3)
    assert seeds_needed(test, 1.0) is None
    assert seeds_needed(Design(std=1.0, alpha=0.01, baseline=None), 1.0) < MOST_SEEDS


def test_an_arm_without_spread_has_no_plan():
    for arms in ((summarize([1.0]), None), (summarize([1.0, 1.0]), summarize([2.0, 2.0]))):
        found = plan(*arms, alpha=0.05, effect=0.1, std=None)
        assert (found.power_now, found.detectable, found.seeds_needed) == (None, None, None)


def test_a_known_spread_plans_without_any_of_ones_own():
    found = plan(summarize([1.0]), None, alpha=0.05, effect=0.1, std=0.05)
    assert (found.std, found.degrees_of_freedom) == (0.05, None)
    assert found.detectable == pytest.approx(0.05 * (1.6449 + 0.8416), abs=1e-4)  # normal quantiles of 0.95 and 0.8


def test_more_seeds_count_from_those_that_are_there():
    arm = summary_of(3, 1.0, 0.1)

    def against(candidate):
        return one_sample(candidate, 1.05)

    more = more_seeds(against, arm, alpha=0.05)
    assert against(summary_of(3 + more, 1.0, 0.1)).p_one_sided < 0.05
    assert against(summary_of(2 + more, 1.0, 0.1)).p_one_sided >= 0.05
    assert more_seeds(against, summary_of(3, 1.0, 0.001), alpha=0.05) == 0
    assert more_seeds(against, summary_of(3, 1.1, 0.1), alpha=0.05) is None
    assert more_seeds(against, summarize([1.0]), alpha=0.05) is None
