"""Means, spreads and differences of a few seeds, with the conventions that a report must name. Pure functions.

Standard deviations divide by n - 1. Intervals are Student's t; a difference of two arms is Welch's, which does not
assume equal spreads. Where a number is not defined (the spread of one seed) it is None, never NaN.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import special

CONFIDENCE = 0.95
STD_CONVENTION = "sample standard deviation, n - 1"


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
    center, std = mean(values), sample_std(values)
    if center is None or std is None:
        return Summary(count=len(values), mean=center, std=None, low=None, high=None)
    half = _quantile(len(values) - 1) * std / math.sqrt(len(values))
    return Summary(count=len(values), mean=center, std=std, low=center - half, high=center + half)


def difference(candidate: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Candidate minus baseline with Welch's 95 % interval and one-sided p; raises ValueError for a value not finite.

    With fewer than two values in an arm, or no spread in either, Welch's degrees of freedom are not defined and only
    the difference itself is returned.
    """
    a, b = summarize(candidate), summarize(baseline)
    if a.mean is None or b.mean is None:
        return _without_interval(None)
    value = a.mean - b.mean
    if a.std is None or b.std is None or a.std == b.std == 0.0:
        return _without_interval(value)
    return _welch(value, (a.std**2 / a.count, a.count), (b.std**2 / b.count, b.count))


def _welch(value: float, a: tuple[float, int], b: tuple[float, int]) -> Difference:
    """Welch's interval from each arm's squared standard error and number of values."""
    (square_a, count_a), (square_b, count_b) = a, b
    share_a = square_a / (square_a + square_b)  # shares, because squares of tiny spreads would underflow
    freedom = 1.0 / (share_a**2 / (count_a - 1) + (1.0 - share_a) ** 2 / (count_b - 1))
    error = math.sqrt(square_a + square_b)
    half = _quantile(freedom) * error
    return Difference(
        value=value,
        low=value - half,
        high=value + half,
        degrees_of_freedom=freedom,
        p_one_sided=float(special.stdtr(freedom, value / error)),
    )


def paired_difference(candidate: Mapping[int, float], baseline: Mapping[int, float]) -> PairedDifference:
    """Candidate minus baseline over the seeds that both have (values by seed), with the t interval of the mean of pairs.

    Only arms that share what a seed decides (initialisation, order of the data) pair up; a published record's do not.
    With fewer than two pairs, or pairs that all differ by the same, only the difference itself is returned.
    """
    seeds = [seed for seed in candidate if seed in baseline]
    pairs = summarize([candidate[seed] - baseline[seed] for seed in seeds])
    correlation = _correlation([candidate[seed] for seed in seeds], [baseline[seed] for seed in seeds])
    if pairs.mean is None or not pairs.std:
        return PairedDifference(difference=_without_interval(pairs.mean), correlation=correlation, count=pairs.count)
    freedom, error = pairs.count - 1, pairs.std / math.sqrt(pairs.count)
    found = Difference(
        value=pairs.mean, low=pairs.low, high=pairs.high, degrees_of_freedom=float(freedom),
        p_one_sided=float(special.stdtr(freedom, pairs.mean / error)),
    )  # fmt: skip
    return PairedDifference(difference=found, correlation=correlation, count=pairs.count)


def _correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's correlation; None below two values or without spread."""
    return statistics.correlation(a, b) if len(a) > 1 and sample_std(a) and sample_std(b) else None


def _without_interval(value: float | None) -> Difference:
    return Difference(value=value, low=None, high=None, degrees_of_freedom=None, p_one_sided=None)


def _quantile(degrees_of_freedom: float) -> float:
    """Two-sided quantile of Student's t at CONFIDENCE."""
    return float(special.stdtrit(degrees_of_freedom, (1.0 + CONFIDENCE) / 2.0))


def _require_finite(values: Sequence[float]) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"statistics need finite values, got {value!r} in {list(values)!r}")
