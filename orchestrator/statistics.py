"""Means, spreads, differences and tests of a few seeds, with the conventions that a report must name. Pure functions.

Standard deviations divide by n - 1. A difference is candidate minus baseline, and below zero the candidate is better,
because bits per byte are; every p is one-sided, for the candidate being lower by more than a margin. Where a number is
not defined (the spread of one seed, a test between values that are all equal) it is None, never NaN. The distributions
are SciPy's, which takes a second to load: it is loaded by the first test that is asked for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95
STD_CONVENTION = "sample standard deviation, n - 1"
MOST_PERMUTATIONS = 20_000
"""Up to so many assignments of values to arms are all counted; of more, as many are drawn."""

PERMUTATION_SEED = 0
CERTAIN = 30.0
"""Standard errors by which a true difference is so far off that a test finds it: beyond, the non-central t loses its digits."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the values of one arm say about their mean."""

    count: int
    mean: float | None
    """None without values."""

    std: float | None
    """Divides by n - 1; None below two values."""

    low: float | None
    """Lower end of the t interval of the mean; None below two values."""

    high: float | None
    """Upper end."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Candidate minus baseline; below zero the candidate is better, because bits per byte are."""

    value: float | None
    """Difference of the means; None where one arm has no value."""

    low: float | None
    """Lower end of Welch's interval; None where it is not defined."""

    high: float | None
    """Upper end."""

    degrees_of_freedom: float | None
    """Welch–Satterthwaite."""

    p_one_sided: float | None
    """Probability of a difference this low or lower if the true one were zero."""

    statistic: float | None = None
    """Student's t, or z; None where no test is defined."""

    margin: float = 0.0
    """How far below the baseline the candidate had to be for the p: it is of a difference this low if the true one were
    minus the margin."""

    @property
    def contains_zero(self) -> bool | None:
        """Whether the interval contains zero; None where there is no interval."""
        return None if self.low is None or self.high is None else self.low <= 0.0 <= self.high


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Candidate minus baseline seed by seed, for two arms that ran on the same seeds."""

    difference: Difference
    correlation: float | None
    """Of the two arms' values over the seeds: pairing helps where it is high. None where an arm has no spread."""

    count: int
    """Seeds that both arms have."""


# ── one arm ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None without values. Equal values give exactly that value."""
    if not values:
        return None
    first = values[0]
    return first + math.fsum(value - first for value in values) / len(values)


def sample_std(values: Sequence[float]) -> float | None:
    """Standard deviation that divides by n - 1; None below two values, exactly 0 for equal ones."""
    center = mean(values)
    if center is None or len(values) < 2:
        return None
    return math.sqrt(math.fsum((value - center) ** 2 for value in values) / (len(values) - 1))


def summarize(values: Sequence[float]) -> Summary:
    """Mean, spread and 95 % t interval; raises ValueError for a value that is not finite."""
    _require_finite(values)
    return summary_of(len(values), mean(values), sample_std(values))


def summary_of(count: int, center: float | None, std: float | None) -> Summary:
    """The same from a published mean and standard deviation (n - 1), where the values themselves are not known."""
    if center is None or std is None or count < 2:
        return Summary(count=count, mean=center, std=std if count > 1 else None, low=None, high=None)
    low, high = _interval(count - 1, center, std / math.sqrt(count))
    return Summary(count=count, mean=center, std=std, low=low, high=high)


def _interval(degrees_of_freedom: float, center: float, error: float) -> tuple[float, float]:
    """Student's two-sided interval at CONFIDENCE; without spread the centre itself."""
    if not error:
        return center, center
    low, high = _stats().t.interval(CONFIDENCE, degrees_of_freedom, loc=center, scale=error)
    return float(low), float(high)


def t_quantile(probability: float, degrees_of_freedom: float) -> float:
    """The value that Student's t is below with that probability."""
    return float(_stats().t.ppf(probability, degrees_of_freedom))


def pooled_std(arms: Sequence[Summary]) -> tuple[float, int] | None:
    """One standard deviation out of several arms' that are taken to be equal, and its degrees of freedom; None without."""
    known = [(arm.count - 1, arm.std) for arm in arms if arm.std is not None]
    freedom = sum(count for count, _ in known)
    if not freedom:
        return None
    return math.sqrt(math.fsum(count * std**2 for count, std in known) / freedom), freedom


# ── two arms ────────────────────────────────────────────────────────────────────────────────────────────────────────


def difference(candidate: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Candidate minus baseline by Welch's test, as `welch`; raises ValueError for a value that is not finite."""
    return welch(summarize(candidate), summarize(baseline))


def welch(candidate: Summary, baseline: Summary, *, margin: float = 0.0) -> Difference:
    """Candidate minus baseline without assuming equal spreads: 95 % interval, and p for more than the margin.

    With fewer than two values in an arm, or no spread in either, Welch's degrees of freedom are not defined and only
    the difference itself is returned.
    """
    spreads = _spreads(candidate, baseline)
    if spreads is None:
        return _untested(candidate, baseline, margin)
    square_a, square_b = (std**2 / arm.count for std, arm in zip(spreads, (candidate, baseline), strict=True))
    share = square_a / (square_a + square_b)  # shares, because squares of tiny spreads would underflow
    # SciPy's test from means and spreads keeps its degrees of freedom to itself
    freedom = 1.0 / (share**2 / (candidate.count - 1) + (1.0 - share) ** 2 / (baseline.count - 1))
    return _tested(candidate, baseline, margin, freedom, math.sqrt(square_a + square_b), equal_var=False)


def student(candidate: Summary, baseline: Summary, *, margin: float = 0.0) -> Difference:
    """The same with one spread pooled from both arms (Student's two-sample t)."""
    if _spreads(candidate, baseline) is None:
        return _untested(candidate, baseline, margin)
    pooled = pooled_std([candidate, baseline])
    assert pooled is not None, "both arms have a spread"
    std, freedom = pooled
    error = std * math.sqrt(1 / candidate.count + 1 / baseline.count)
    return _tested(candidate, baseline, margin, freedom, error, equal_var=True)


def _spreads(a: Summary, b: Summary) -> tuple[float, float] | None:
    """Both arms' spreads; None where a two-sample test is not defined."""
    return None if a.std is None or b.std is None or a.std == b.std == 0.0 else (a.std, b.std)


def _tested(a: Summary, b: Summary, margin: float, freedom: float, error: float, *, equal_var: bool) -> Difference:
    """The two-sample t test of two arms whose means and spreads are known."""
    value = _gap(a, b)
    assert value is not None, "arms with a spread have a mean"
    # the means are given as their difference: near equal ones would lose the digits that matter
    found = _stats().ttest_ind_from_stats(
        value + margin, a.std, a.count, 0.0, b.std, b.count, equal_var=equal_var, alternative="less"
    )
    low, high = _interval(freedom, value, error)
    return Difference(
        value=value, low=low, high=high, degrees_of_freedom=float(freedom), p_one_sided=float(found.pvalue),
        statistic=float(found.statistic), margin=margin,
    )  # fmt: skip


def one_sample(candidate: Summary, constant: float, *, margin: float = 0.0) -> Difference:
    """Candidate minus a number that is taken as exact, like a quoted leaderboard score; needs two values and a spread."""
    if candidate.mean is None or not candidate.std:
        value = None if candidate.mean is None else candidate.mean - constant
        return _without_interval(value, margin)
    value, error, freedom = candidate.mean - constant, candidate.std / math.sqrt(candidate.count), candidate.count - 1
    statistic = (value + margin) / error
    low, high = _interval(freedom, value, error)
    return Difference(
        value=value, low=low, high=high, degrees_of_freedom=float(freedom), statistic=statistic, margin=margin,
        p_one_sided=float(_stats().t.cdf(statistic, freedom)),
    )  # fmt: skip


def known_spread(candidate: Summary, baseline: Summary | float, *, std: float, margin: float = 0.0) -> Difference:
    """Candidate minus baseline, or minus a number, where the spread of one run is taken as known: a z test.

    One value in an arm is enough; nothing is learnt of the spread from the arms.
    """
    center = baseline if isinstance(baseline, float) else baseline.mean
    if candidate.mean is None or center is None or std <= 0:
        return _without_interval(None if candidate.mean is None or center is None else candidate.mean - center, margin)
    of_baseline = 0.0 if isinstance(baseline, float) else 1 / baseline.count
    value, error = candidate.mean - center, std * math.sqrt(1 / candidate.count + of_baseline)
    low, high = _stats().norm.interval(CONFIDENCE, loc=value, scale=error)
    statistic = (value + margin) / error
    return Difference(
        value=value, low=float(low), high=float(high), degrees_of_freedom=None, statistic=statistic, margin=margin,
        p_one_sided=float(_stats().norm.cdf(statistic)),
    )  # fmt: skip


def paired_difference(
    candidate: Mapping[int, float], baseline: Mapping[int, float], *, margin: float = 0.0
) -> PairedDifference:
    """Candidate minus baseline over the seeds that both have (values by seed), with the t interval of the mean of pairs.

    Only arms that share what a seed decides (initialisation, order of the data) pair up; a published record's do not.
    With fewer than two pairs, or pairs that all differ by the same, only the difference itself is returned.
    """
    seeds = [seed for seed in candidate if seed in baseline]
    pairs = summarize([candidate[seed] - baseline[seed] for seed in seeds])
    correlation = _correlation([candidate[seed] for seed in seeds], [baseline[seed] for seed in seeds])
    return PairedDifference(
        difference=one_sample(pairs, 0.0, margin=margin), correlation=correlation, count=pairs.count
    )


def permutation_p(candidate: Sequence[float], baseline: Sequence[float], *, margin: float = 0.0) -> float | None:
    """One-sided p of the difference of means over all ways to assign the values to the arms.

    It assumes no distribution, and cannot fall below one in the number of assignments: 0.05 for three seeds against
    three. Equal values give 1. None below two values in an arm.
    """
    _require_finite([*candidate, *baseline])
    if min(len(candidate), len(baseline)) < 2:
        return None
    shift = baseline[0]  # differences of what is near equal: its digits are kept
    samples = ([value - shift + margin for value in candidate], [value - shift for value in baseline])
    return _permuted(samples, lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis), "independent")


def paired_permutation_p(
    candidate: Mapping[int, float], baseline: Mapping[int, float], *, margin: float = 0.0
) -> float | None:
    """The same over all ways to swap the arms within a seed; None below two seeds that both have."""
    pairs = [candidate[seed] - baseline[seed] + margin for seed in candidate if seed in baseline]
    _require_finite(pairs)
    if len(pairs) < 2:
        return None
    return _permuted((pairs,), lambda a, axis: a.mean(axis=axis), "samples")


def _permuted(samples: tuple[list[float], ...], statistic: Any, kind: str) -> float:
    found = _stats().permutation_test(
        samples, statistic, permutation_type=kind, alternative="less", vectorized=True, n_resamples=MOST_PERMUTATIONS,
        rng=PERMUTATION_SEED,
    )  # fmt: skip
    return float(found.pvalue)


def _correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's correlation; None below two values or without spread."""
    return statistics.correlation(a, b) if len(a) > 1 and sample_std(a) and sample_std(b) else None


def _untested(a: Summary, b: Summary, margin: float) -> Difference:
    return _without_interval(_gap(a, b), margin)


def _gap(a: Summary, b: Summary) -> float | None:
    return None if a.mean is None or b.mean is None else a.mean - b.mean


def _without_interval(value: float | None, margin: float = 0.0) -> Difference:
    return Difference(value=value, low=None, high=None, degrees_of_freedom=None, p_one_sided=None, margin=margin)


@dataclass(frozen=True, kw_only=True)
class Adjusted:
    """Candidate minus baseline at one value of a covariate that the runs differ in, their number of steps say."""

    value: float
    """The difference that is left."""

    slope: float
    """Change of the score for each unit of the covariate, the same in both arms."""

    correlation: float
    """Of score and covariate within the arms."""


def adjusted_for(
    candidate: tuple[Sequence[float], Sequence[float]], baseline: tuple[Sequence[float], Sequence[float]]
) -> Adjusted | None:
    """The difference of two arms, each given as its scores and its covariates, with the covariate's share taken off.

    One line is fitted through both arms' deviations from their means. None below four runs, or where an arm's mean, the
    scores or the covariate have no spread to fit.
    """
    scores = [list(arm[0]) for arm in (candidate, baseline)]
    values = [list(arm[1]) for arm in (candidate, baseline)]
    deviations = [[x for arm in arms for x in _centred(arm)] for arms in (scores, values)]
    gaps = [_gap(*map(summarize, arms)) for arms in (scores, values)]
    if len(deviations[0]) < 4 or gaps[0] is None or gaps[1] is None or not all(map(sample_std, deviations)):
        return None
    line = _stats().linregress(deviations[1], deviations[0])
    slope = float(line.slope)
    return Adjusted(value=gaps[0] - slope * gaps[1], slope=slope, correlation=float(line.rvalue))


def _centred(values: Sequence[float]) -> list[float]:
    """Deviations from the mean."""
    center = mean(values)
    return [] if center is None else [value - center for value in values]


# ── two rankings ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """How far two lists of values order the same things alike, from -1 to 1."""

    value: float
    low: float | None
    """Lower end of the interval at CONFIDENCE; None where there are too few things for one."""

    high: float | None
    """Upper end."""


SPEARMAN_VARIANCE, SPEARMAN_LOST = 1.06, 3
KENDALL_VARIANCE, KENDALL_LOST = 0.437, 4
"""Variance of the correlation's inverse hyperbolic tangent, times the number of pairs less those lost (Fieller, Hartley and
Pearson, 1957)."""


def spearman(a: Sequence[float], b: Sequence[float]) -> RankCorrelation | None:
    """Spearman's rank correlation; None where the values of a list are all equal, or there are fewer than three."""
    if not _can_be_ranked(a, b):
        return None
    count = len(a)
    step = 12 / (count * (count**2 - 1))  # between the highest possible values
    return _with_fisher(float(_stats().spearmanr(a, b).statistic), SPEARMAN_VARIANCE, count - SPEARMAN_LOST, step)


def kendall(a: Sequence[float], b: Sequence[float]) -> RankCorrelation | None:
    """Kendall's tau, with ties (b); None as for `spearman`."""
    if not _can_be_ranked(a, b):
        return None
    count = len(a)
    step = 4 / (count * (count - 1))
    return _with_fisher(float(_stats().kendalltau(a, b).statistic), KENDALL_VARIANCE, count - KENDALL_LOST, step)


def _can_be_ranked(a: Sequence[float], b: Sequence[float]) -> bool:
    _require_finite([*a, *b])
    return len(a) > 2 and len(set(a)) > 1 and len(set(b)) > 1


def _with_fisher(value: float, variance: float, count: int, step: float) -> RankCorrelation:
    """A correlation, with an interval by the normal distribution of its inverse hyperbolic tangent.

    Few things can be ordered wholly alike by chance, where the transform knows no doubt: it is taken half a step inside.
    """
    value = max(-1.0, min(1.0, value))
    if count < 1:
        return RankCorrelation(value=value, low=None, high=None)
    inside = max(step / 2 - 1, min(1 - step / 2, value))
    low, high = _stats().norm.interval(CONFIDENCE, loc=math.atanh(inside), scale=math.sqrt(variance / count))
    return RankCorrelation(value=value, low=min(math.tanh(low), value), high=max(math.tanh(high), value))


def residual_std(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Standard deviation of `b` about its line through `a`, n - 2 degrees of freedom; None without a line or fewer than 3."""
    if len(a) < 3 or len(set(a)) < 2:
        return None
    line = _stats().linregress(a, b)
    left = [y - line.intercept - line.slope * x for x, y in zip(a, b, strict=True)]
    return math.sqrt(math.fsum(value**2 for value in left) / (len(a) - 2))


def two_sided(found: Difference) -> float | None:
    """Probability of a difference this large, either way, if there were none; None where there is no test."""
    p = found.p_one_sided
    return None if p is None or found.margin else min(1.0, 2 * min(p, 1 - p))


# ── variances ───────────────────────────────────────────────────────────────────────────────────────────────────────


def variance_interval(variance: float, degrees_of_freedom: float) -> tuple[float, float | None]:
    """Interval at CONFIDENCE of a variance that is estimated as a chi-squared with so many degrees of freedom.

    Its upper end is None, and its lower one 0, where so few degrees (a difference of two, by Satterthwaite) say nothing of it.
    """
    if not variance:
        return 0.0, 0.0
    tail = (1.0 - CONFIDENCE) / 2
    least, most = (float(point) for point in _stats().chi2.ppf([tail, 1.0 - tail], degrees_of_freedom))
    low, high = (degrees_of_freedom * variance / point if point else math.inf for point in (most, least))
    return low if math.isfinite(low) else 0.0, high if math.isfinite(high) else None


def ratio_p(ratio: float, degrees_of_freedom: tuple[int, int]) -> float:
    """Probability of a ratio of two mean squares this large or larger if both estimated one variance (F test)."""
    return float(_stats().f.sf(ratio, *degrees_of_freedom))


# ── several tests, and tests to come ────────────────────────────────────────────────────────────────────────────────


def bonferroni(p: float | None, looks: int) -> float | None:
    """The p of a claim that could have been made of any of `looks` equal chances, of which the best was shown."""
    return None if p is None else min(1.0, p * max(1, looks))


def lower_by(found: Difference, alpha: float) -> float | None:
    """By how much the candidate's mean would have to be lower for p to be `alpha`, its spread and seeds as they are.

    At most 0 where p is that low already; None where there is no test.
    """
    if found.value is None or found.low is None or found.high is None or found.statistic is None:
        return None
    stats, freedom = _stats(), found.degrees_of_freedom
    two_sided, level = (1.0 - CONFIDENCE) / 2, alpha
    widths = (
        stats.norm.isf([two_sided, level]) if freedom is None else stats.t.isf([two_sided, level], freedom)
    ).tolist()
    error = (found.high - found.low) / 2 / widths[0]
    return float(found.value + found.margin + widths[1] * error)


def power(
    effect: float, *, std: float, counts: tuple[int, int | None], alpha: float, is_known: bool = False
) -> float | None:  # fmt: skip
    """Chance that the one-sided test at level `alpha` finds a true improvement of `effect` above its margin.

    `counts` are the seeds of the candidate and of the baseline, None for a baseline that is one exact number. The
    spread of a single run is taken as `std` in both arms: as the test's own knowledge (a z test), else as what its runs
    will show (a t test). None where there are too few seeds for a test.
    """
    ours, theirs = counts
    freedom = ours - 1 if theirs is None else ours + theirs - 2
    if (freedom < 1 and not is_known) or ours < 1 or theirs == 0:
        return None
    error = std * math.sqrt(1 / ours + (0.0 if theirs is None else 1 / theirs))
    stats = _stats()
    shift = effect / error if error else math.copysign(math.inf, effect)
    if abs(shift) > CERTAIN:
        return float(shift > 0)
    if is_known:
        return float(stats.norm.sf(stats.norm.isf(alpha) - shift))
    return float(stats.nct.sf(stats.t.isf(alpha, freedom), freedom, shift))


def _stats() -> Any:
    """SciPy's statistics, loaded when first needed."""
    from scipy import stats

    return stats


def _require_finite(values: Sequence[float]) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"statistics need finite values, got {value!r} in {list(values)!r}")
