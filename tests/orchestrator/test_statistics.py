import math
import statistics as reference_statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from orchestrator.statistics import difference, mean, paired_difference, sample_std, summarize

BPB = st.floats(0.5, 4.0)


def test_a_summary_of_three_seeds_matches_hand_computed_values():
    summary = summarize([1.0, 2.0, 3.0])
    assert (summary.count, summary.mean, summary.std) == (3, 2.0, 1.0)
    # t quantile 0.975 with two degrees of freedom is 4.302653 (tables); the standard error is 1 / sqrt(3)
    assert summary.high == pytest.approx(2.0 + 4.302653 / math.sqrt(3), abs=1e-6)
    assert summary.low == pytest.approx(2.0 - 4.302653 / math.sqrt(3), abs=1e-6)


def test_one_seed_has_a_mean_and_no_spread():
    summary = summarize([1.25])
    assert (summary.mean, summary.std, summary.low, summary.high) == (1.25, None, None, None)


def test_no_seed_has_nothing_and_is_not_an_error():
    summary = summarize([])
    assert (summary.count, summary.mean, summary.std) == (0, None, None)


@given(BPB, st.integers(2, 9))
def test_equal_values_give_exactly_that_mean_and_no_spread(value, count):
    summary = summarize([value] * count)
    assert (summary.mean, summary.std, summary.low, summary.high) == (value, 0.0, value, value)


@given(st.lists(BPB, min_size=2, max_size=8))
def test_the_spread_divides_by_n_minus_one(values):
    # 1e-9: two orders of summation of at most eight values of order one differ by far less
    assert sample_std(values) == pytest.approx(reference_statistics.stdev(values), abs=1e-9)
    assert mean(values) == pytest.approx(sum(values) / len(values), abs=1e-12)


def test_a_difference_agrees_with_scipys_welch_test():
    candidate, baseline = [1.0897, 1.0908, 1.0871, 1.0899], [1.0921, 1.0915, 1.0940]
    reference = stats.ttest_ind(candidate, baseline, equal_var=False, alternative="less")
    interval = stats.ttest_ind(candidate, baseline, equal_var=False).confidence_interval(0.95)
    found = difference(candidate, baseline)
    assert found.p_one_sided == pytest.approx(reference.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.degrees_of_freedom == pytest.approx(reference.df, rel=1e-9)
    assert found.contains_zero is False


def test_a_difference_inside_the_noise_contains_zero():
    assert difference([1.00, 1.02, 0.98], [1.01, 0.99, 1.00]).contains_zero is True


@pytest.mark.parametrize(
    ("candidate", "baseline", "value"),
    [([1.0], [2.0, 2.1], -1.05), ([1.0, 1.1], [2.0], -0.95), ([1.0, 1.0], [2.0, 2.0], -1.0), ([], [2.0], None)],
)
def test_a_difference_without_spread_has_no_interval(candidate, baseline, value):
    found = difference(candidate, baseline)
    assert found.value == (None if value is None else pytest.approx(value))
    assert (found.low, found.high, found.p_one_sided, found.contains_zero) == (None, None, None, None)


@given(st.lists(BPB, min_size=2, max_size=5), st.lists(BPB, min_size=2, max_size=5))
def test_no_difference_is_ever_nan(candidate, baseline):
    found = difference(candidate, baseline)
    numbers = [found.value, found.low, found.high, found.degrees_of_freedom, found.p_one_sided]
    assert not any(number is not None and math.isnan(number) for number in numbers)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused_with_the_values(bad):
    with pytest.raises(ValueError, match="finite values"):
        summarize([1.0, bad])


def test_pairs_by_seed_are_the_published_paired_t_test():
    """PR #1326: sliding against TTT on three rounded seeds, t = -11.5, one-sided p = 0.004; unpaired 0.19."""
    sliding = {42: 1.0896, 314: 1.0915, 999: 1.0901}
    ttt = {42: 1.0889, 314: 1.0906, 999: 1.0894}
    paired = paired_difference(ttt, sliding)
    assert paired.count == 3
    assert paired.difference.p_one_sided == pytest.approx(0.004, abs=0.0005)
    assert paired.difference.value == pytest.approx(-0.000767, abs=1e-6)
    assert paired.correlation is not None
    assert paired.correlation > 0.99
    assert difference(list(ttt.values()), list(sliding.values())).p_one_sided == pytest.approx(0.19, abs=0.005)


def test_pairs_need_seeds_that_both_arms_have_and_some_spread():
    assert paired_difference({1: 1.0}, {2: 1.0}).difference.value is None
    alone = paired_difference({1: 1.0, 2: 5.0}, {1: 1.5, 3: 9.0})
    assert (alone.count, alone.difference.value, alone.difference.low, alone.correlation) == (1, -0.5, None, None)
    parallel = paired_difference({1: 1.0, 2: 2.0}, {1: 1.5, 2: 2.5})
    assert (parallel.difference.value, parallel.difference.low, parallel.correlation) == (
        -0.5,
        None,
        pytest.approx(1.0),
    )
