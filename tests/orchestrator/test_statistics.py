import math
import random
import statistics as reference_statistics

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from orchestrator.statistics import (
    adjusted_for,
    bonferroni,
    difference,
    kendall,
    known_spread,
    lower_by,
    mean,
    one_sample,
    paired_difference,
    paired_permutation_p,
    permutation_p,
    pooled_std,
    power,
    ratio_p,
    residual_std,
    sample_std,
    spearman,
    student,
    summarize,
    summary_of,
    two_sided,
    variance_interval,
    welch,
)

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


PUBLISHED = {  # bits per byte by seed as published; see orchestrator/published.toml for the sources
    549: [1.11922988, 1.12002032, 1.11888882],
    1019: [1.11508120, 1.11437394, 1.11475014],
    1493: [1.08079, 1.08103, 1.08118],
    1514: [1.07928, 1.07997, 1.08025],
    1736: [1.06610, 1.06473, 1.06563],
    1769: [1.06356801, 1.06413130, 1.06466993, 1.06509678, 1.06516558],
    1868: [1.06083288, 1.06090748, 1.06248776],
}


@pytest.mark.parametrize(
    ("candidate", "baseline", "p", "digits"),
    [
        (summarize(PUBLISHED[1769]), 1736, 0.0625, 5e-5),
        (summary_of(7, 1.06477, 0.00069), 1736, 0.106, 5e-4),  # all seven runs, as stated
        (summary_of(6, 1.060755, 0.000933), 1868, 0.188, 5e-4),  # PR #1855 pooled with a second party's runs
        # five decimals of the seeds are known, which leave p between 0.0201 and 0.0216
        (summarize(PUBLISHED[1514]), 1493, 0.0203, 8e-4),
    ],
)
def test_published_p_values_come_out_again(candidate, baseline, p, digits):
    assert welch(candidate, summarize(PUBLISHED[baseline])).p_one_sided == pytest.approx(p, abs=digits)


def test_the_published_t_statistic_comes_out_again_and_the_margin_takes_most_of_it():
    """PR #1019 against #549: t = -11.83, df = 3.31; with the margin of 0.005 nats one-sided p = 0.0095."""
    candidate, baseline = summarize(PUBLISHED[1019]), summarize(PUBLISHED[549])
    found = welch(candidate, baseline)
    assert (found.statistic, found.degrees_of_freedom) == (
        pytest.approx(-11.83, abs=0.005),
        pytest.approx(3.31, abs=0.005),
    )
    margin = 0.005 / math.log(2) * 0.4105208  # tokens per byte of that split
    assert welch(candidate, baseline, margin=margin).p_one_sided == pytest.approx(0.0095, abs=0.0001)


@given(st.lists(BPB, min_size=2, max_size=5, unique=True), st.lists(BPB, min_size=2, max_size=5, unique=True))
def test_welch_and_student_agree_with_scipys_tests_of_the_values(candidate, baseline):
    assume(min(sample_std(candidate), sample_std(baseline)) > 1e-6)  # below, SciPy itself loses the digits and says so
    for test, equal_var in ((welch, False), (student, True)):
        reference = stats.ttest_ind(candidate, baseline, equal_var=equal_var, alternative="less")
        found = test(summarize(candidate), summarize(baseline))
        assert found.p_one_sided == pytest.approx(reference.pvalue, rel=1e-6, abs=1e-12)
        assert found.degrees_of_freedom == pytest.approx(reference.df, rel=1e-9)


def test_one_sample_and_paired_tests_agree_with_scipys():
    values, others = [1.0897, 1.0908, 1.0871], [1.0921, 1.0915, 1.0940]
    found = one_sample(summarize(values), 1.0915, margin=0.001)
    assert found.p_one_sided == pytest.approx(stats.ttest_1samp(values, 1.0905, alternative="less").pvalue, rel=1e-9)
    pairs = paired_difference(dict(enumerate(values)), dict(enumerate(others)))
    reference = stats.ttest_rel(values, others, alternative="less")
    assert pairs.difference.p_one_sided == pytest.approx(reference.pvalue, rel=1e-9)


def test_a_margin_moves_the_test_and_not_the_interval():
    a, b = summarize([1.0, 1.1, 1.2]), summarize([2.0, 2.2, 2.1])
    plain, with_margin = welch(a, b), welch(a, b, margin=0.9)
    assert (plain.low, plain.high) == (with_margin.low, with_margin.high)
    assert plain.p_one_sided < with_margin.p_one_sided < 0.5
    assert welch(a, b, margin=1.1).p_one_sided > 0.5


def test_a_known_spread_needs_one_value_and_is_the_speedruns_rule():
    """Track 3 asks for (3.28 - mean) · √n >= 0.004 at a spread of 0.0013."""
    alpha = stats.norm.sf(0.004 / 0.0013)
    just = summarize([3.28 - 0.0040001 / math.sqrt(4)] * 4)
    assert known_spread(just, 3.28, std=0.0013).p_one_sided < alpha
    short = summarize([3.28 - 0.0039999 / math.sqrt(4)] * 4)
    assert known_spread(short, 3.28, std=0.0013).p_one_sided > alpha
    assert known_spread(summarize([3.2]), summarize([3.3]), std=0.0013).p_one_sided < 1e-9
    assert known_spread(summarize([]), 3.28, std=0.0013).p_one_sided is None


def test_permutation_p_counts_every_assignment():
    assert permutation_p([1.0, 1.1, 1.2], [2.0, 2.1, 2.2]) == pytest.approx(1 / 20)  # one of 6 over 3
    assert permutation_p([2.0, 2.1, 2.2], [1.0, 1.1, 1.2]) == 1.0
    assert permutation_p([1.0, 1.0], [1.0, 1.0]) == 1.0
    assert permutation_p([1.0], [2.0, 3.0]) is None
    apart = {1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3}
    assert paired_permutation_p(apart, {seed: value + 0.5 for seed, value in apart.items()}) == pytest.approx(1 / 16)
    assert paired_permutation_p(apart, {9: 1.0}) is None


def test_spreads_pool_by_their_degrees_of_freedom():
    std, freedom = pooled_std([summarize([1.0, 2.0, 3.0]), summarize([5.0, 5.0]), summarize([7.0])])
    assert (std, freedom) == (pytest.approx(math.sqrt(2 / 3)), 3)
    assert pooled_std([summarize([7.0])]) is None


def test_a_claim_with_several_equal_chances_is_adjusted_for_them():
    assert (bonferroni(0.2, 7), bonferroni(0.2, 2), bonferroni(0.2, 0), bonferroni(None, 2)) == (1.0, 0.4, 0.2, None)


@given(st.floats(0.001, 0.4), st.lists(BPB, min_size=2, max_size=5, unique=True))
def test_a_mean_lower_by_the_shortfall_is_just_at_the_level(alpha, values):
    assume(sample_std(values) > 1e-3)
    found = one_sample(summarize(values), 1.7)
    lower = lower_by(found, alpha)
    moved = one_sample(summarize([value - lower for value in values]), 1.7)
    assert moved.p_one_sided == pytest.approx(alpha, rel=1e-6)
    assert (lower > 0) == (found.p_one_sided > alpha)


def test_power_is_the_level_without_an_effect_and_what_simulation_finds_with_one():
    assert power(0.0, std=1.0, counts=(5, 5), alpha=0.05) == pytest.approx(0.05, abs=1e-6)
    generator = np.random.default_rng(0)
    draws = generator.normal(0.0, 1.0, (20_000, 4)) - 1.2, generator.normal(0.0, 1.0, (20_000, 3))
    hits = stats.ttest_ind(*draws, axis=1, alternative="less").pvalue < 0.05
    # four standard errors of a share of 20,000
    assert power(1.2, std=1.0, counts=(4, 3), alpha=0.05) == pytest.approx(hits.mean(), abs=0.014)
    ones = draws[0].mean(axis=1) / (1 / math.sqrt(4)) < -stats.norm.isf(0.05)
    known = power(1.2, std=1.0, counts=(4, None), alpha=0.05, is_known=True)
    assert known == pytest.approx(ones.mean(), abs=0.014)


def test_power_without_enough_seeds_is_not_defined_and_of_the_obvious_is_certain():
    assert power(1.0, std=1.0, counts=(1, None), alpha=0.05) is None
    assert power(1.0, std=1.0, counts=(2, 0), alpha=0.05) is None
    assert power(1000.0, std=1.0, counts=(3, 3), alpha=0.05) == 1.0
    assert power(-1000.0, std=1.0, counts=(3, 3), alpha=0.05) == 0.0


def test_a_regression_on_a_covariate_takes_its_share_of_a_difference():
    """Both arms lie on one line in the steps: what is left of the difference is nothing."""
    steps_a, steps_b = [100.0, 110.0, 120.0], [90.0, 95.0, 105.0]
    found = adjusted_for(([2.0 - 0.01 * s for s in steps_a], steps_a), ([2.0 - 0.01 * s for s in steps_b], steps_b))
    assert found.slope == pytest.approx(-0.01)
    assert found.value == pytest.approx(0.0, abs=1e-9)
    assert adjusted_for(([1.0, 1.1, 1.2], [5.0] * 3), ([1.0, 1.1, 1.2], [5.0] * 3)) is None
    assert adjusted_for(([1.0], [5.0]), ([1.0], [6.0])) is None


def test_both_directions_count_twice_the_smaller_tail():
    lower, higher = one_sample(summarize([-3.0, -2.0, -1.0]), 0.0), one_sample(summarize([3.0, 2.0, 1.0]), 0.0)
    assert two_sided(lower) == pytest.approx(2 * lower.p_one_sided)
    assert two_sided(higher) == pytest.approx(two_sided(lower))
    assert two_sided(one_sample(summarize([1.0]), 0.0)) is None
    assert two_sided(one_sample(summarize([1.0, 2.0]), 0.0, margin=0.1)) is None  # there is no other side of a margin


def test_a_variance_and_a_ratio_of_two_agree_with_tables():
    low, high = variance_interval(1.0, 4)  # chi-squared points of four degrees of freedom: 0.4844 and 11.143
    assert (low, high) == (pytest.approx(4 / 11.143, rel=1e-3), pytest.approx(4 / 0.4844, rel=1e-3))
    assert variance_interval(0.0, 4) == (0.0, 0.0)
    assert ratio_p(6.944, (2, 4)) == pytest.approx(0.05, abs=1e-4)  # the 5 % point of F with 2 and 4 degrees


@pytest.mark.parametrize("correlate", [spearman, kendall])
def test_an_interval_contains_its_value_and_narrows_with_the_points(correlate):
    few, many = (correlate(range(n), [k + 3 * (-1) ** k for k in range(n)]) for n in (8, 80))
    for found in (few, many):
        assert -1 <= found.low <= found.value <= found.high <= 1
    assert many.high - many.low < few.high - few.low


def test_four_points_in_the_same_order_prove_nothing():
    found = spearman([1, 2, 3, 4], [5, 6, 7, 8])
    assert found.value == 1 and found.low < 0 and found.high == 1
    assert kendall([1, 2, 3, 4], [5, 6, 7, 8]).low is None
    assert spearman([1, 2, 3, 4], [8, 7, 6, 5]).low == -1


def test_intervals_cover_the_true_correlation_about_as_often_as_they_say():
    dice, rho, hits, drawn = random.Random(7), 0.6, 0, 400
    for _ in range(drawn):
        xs = [dice.gauss(0, 1) for _ in range(12)]
        ys = [rho * x + math.sqrt(1 - rho**2) * dice.gauss(0, 1) for x in xs]
        found = spearman(xs, ys)
        hits += found.low <= 6 / math.pi * math.asin(rho / 2) <= found.high
    assert 0.9 < hits / drawn < 0.99  # 95 % by its name; 400 draws have a standard error of 1 %


def test_too_few_or_equal_values_have_no_line():
    assert spearman([1, 2], [1, 2]) is None and residual_std([1, 2], [1, 2]) is None
    assert residual_std([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="finite"):
        spearman([1, 2, math.nan], [1, 2, 3])
