"""Power: how many seeds a comparison still needs, and the smallest difference that the present seeds can show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.statistics import Difference, Summary, pooled_std, power, summary_of

POWER = 0.8
"""Chance of finding a true difference that a plan asks for, by the usual convention."""

MOST_SEEDS = 100
"""No plan looks further: so many runs of eight GPUs are no plan."""

LARGEST_SPREADS = 1000.0
"""No difference is looked for beyond so many spreads of one run."""

HALVINGS = 60


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What further seeds would do, were the spread of one run what it has been."""

    std: float | None
    """Spread of one run that the plan rests on, in bits per byte: pooled from both arms, or known. None without any."""

    degrees_of_freedom: int | None
    """Of that spread; None where it is taken as known."""

    power_now: float | None
    """Chance that seeds like the present ones find the present difference, beyond the margin, if it is the true one."""

    detectable: float | None
    """Smallest true difference beyond the margin that the present seeds find with POWER, in bits per byte."""

    seeds_needed: int | None
    """Seeds of the candidate that find the present difference with POWER, the baseline as it is; None where none do."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """A one-sided test between a candidate's seeds and a baseline."""

    std: float
    """Spread of one run, in bits per byte."""

    alpha: float
    baseline: int | None
    """Seeds of the baseline; None where it is an exact number."""

    is_known: bool = False
    """Whether the test knows the spread (z), or learns it from the runs (t)."""

    def power(self, effect: float, seeds: int) -> float | None:
        """Chance of finding a true improvement `effect` with so many seeds of the candidate; None where no test is."""
        counts = (seeds, self.baseline)
        return power(effect, std=self.std, counts=counts, alpha=self.alpha, is_known=self.is_known)


def plan(
    candidate: Summary, baseline: Summary | None, *, alpha: float, effect: float | None, std: float | None
) -> Plan:  # fmt: skip
    """Plan a one-sided t test at level `alpha`.

    `effect` is the present improvement beyond the margin, in bits per byte; `baseline` None stands for an exact number;
    `std` is the spread of one run where it is known, else it is pooled from the arms.
    """
    pooled = pooled_std([candidate, *([baseline] if baseline else [])])
    spread, freedom = (std, None) if std is not None else pooled or (None, None)
    if not spread:
        return Plan(std=spread, degrees_of_freedom=freedom, power_now=None, detectable=None, seeds_needed=None)
    test = Design(std=spread, alpha=alpha, baseline=baseline.count if baseline else None, is_known=std is not None)
    return Plan(
        std=spread, degrees_of_freedom=freedom, power_now=None if effect is None else test.power(effect, candidate.count),
        detectable=smallest_detectable(test, candidate.count),
        seeds_needed=None if effect is None else seeds_needed(test, effect),
    )  # fmt: skip


def seeds_needed(test: Design, effect: float, *, wanted: float = POWER) -> int | None:
    """Fewest seeds of the candidate that find a true improvement `effect` with the wanted chance, up to MOST_SEEDS."""
    for count in range(1, MOST_SEEDS + 1):
        if (test.power(effect, count) or 0.0) >= wanted:
            return count
    return None


def smallest_detectable(test: Design, seeds: int, *, wanted: float = POWER) -> float | None:
    """Smallest true improvement that so many seeds find with the wanted chance; None where they are too few for a test."""
    if test.power(0.0, seeds) is None:
        return None
    low, high = 0.0, LARGEST_SPREADS * test.std
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if (test.power(middle, seeds) or 0.0) >= wanted else (middle, high)
    return high


def more_seeds(test: Callable[[Summary], Difference], candidate: Summary, *, alpha: float) -> int | None:
    """Seeds that the candidate still needs for p below `alpha`, were mean and spread to stay; 0 where it has them.

    `test` compares a candidate of given mean and spread with the baseline. None where up to MOST_SEEDS are not enough.
    """
    if candidate.mean is None or candidate.std is None:
        return None
    for count in range(candidate.count, MOST_SEEDS + 1):
        found = test(summary_of(count, candidate.mean, candidate.std)).p_one_sided
        if found is not None and found < alpha:
            return count - candidate.count
    return None
