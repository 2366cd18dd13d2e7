"""Racing: a sequential test of two arms of seeds that says after which seed the answer is known. Pure functions.

After each look a t statistic of the difference, with the spread pooled from the seeds themselves, is held against a
boundary. The boundaries share out the error: by the look with a share t of all information, alpha ln(1 + (e - 1) t) of it
may have been spent (Lan and DeMets, Discrete sequential boundaries for clinical trials, 1983; the spending function that
resembles Pocock's). Where both arms' seeds are normal with one spread, the statistics' joint distribution depends on no
unknown, so the boundaries are found by simulating it: a z table would promise too much for spreads that three seeds tell.
The other claim, that the candidate is not better, has the same boundaries mirrored, and the same error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from orchestrator.statistics import Summary

BETTER, NOT_BETTER, HOPELESS, OPEN = "better", "not better", "no verdict in reach", "open"

PATHS = 100_000
"""Simulated races from which the boundaries are taken."""

SAFETY = 3.0
"""Standard errors of the simulation by which the error spent stays below what may be."""

SEED = 20260409
FUTILITY = 0.05
"""Chance of ever being found better, by what has been seen, below which further seeds are not worth their hours."""

FORESEEN = 4_000
"""Simulated continuations for that chance."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a race is run by."""

    alpha: float
    """Most that the chance of a wrong `better` may be over all looks, and that of a wrong `not better`."""

    margin: float = 0.0
    """Bits per byte by more than which the candidate must be better."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """The state of a race after some seeds."""

    seeds: int
    """Seeds of the plan that have ended."""

    counts: tuple[int, int]
    """Scores of candidate and baseline; 0 for a baseline that is an exact number."""

    difference: float | None
    """Candidate minus baseline, in bits per byte."""

    std: float | None
    """Spread of one run, pooled from the arms."""

    statistic: float | None
    """Student's t of the difference beyond the margin; None where there are too few scores."""

    boundary: float | None
    """What it is held against: better below minus this, not better above it."""

    chance: float | None
    """Of ever being found better, by what has been seen; None at the last look, and once it is decided."""

    verdict: str


@dataclass(frozen=True, kw_only=True)
class Race:
    """Every look so far."""

    rules: Rules
    planned: int
    """Seeds of the longest race."""

    looks: tuple[Look, ...]

    @property
    def verdict(self) -> str:
        return self.looks[-1].verdict if self.looks else OPEN

    @property
    def is_over(self) -> bool:
        """Whether further seeds are not wanted, or there are none."""
        return self.verdict != OPEN or (bool(self.looks) and self.looks[-1].seeds >= self.planned)


# ── the boundaries ──────────────────────────────────────────────────────────────────────────────────────────────────


def spent(share: float, alpha: float) -> float:
    """Error that may have been spent by a share of the information, from 0 to `alpha`."""
    return alpha * math.log(1.0 + (math.e - 1.0) * share)


def information(counts: tuple[int, int]) -> float:
    """What a difference is known by, in units of one run's."""
    ours, theirs = counts
    return 0.0 if not ours else 1.0 / (1.0 / ours + (1.0 / theirs if theirs else 0.0))


def freedom_of(counts: tuple[int, int]) -> int:
    """Degrees of freedom of the pooled spread."""
    return sum(max(0, count - 1) for count in counts)


@lru_cache(maxsize=64)
def boundaries(counts: tuple[tuple[int, int], ...], alpha: float) -> tuple[float, ...]:
    """The boundary of each look with these counts; infinite for a look that has no spread, or may spend nothing.

    Found one look after the other: of the simulated races that are still going, as many cross as may be spent.
    """
    statistics_LP = _simulated(counts, PATHS)
    allowance = alpha - SAFETY * math.sqrt(alpha * (1 - alpha) / PATHS)
    whole, crossed, found = information(counts[-1]), 0, []
    going = None
    for look, statistic_P in zip(counts, statistics_LP, strict=True):
        alive_P = statistic_P if going is None else statistic_P[going]
        may_cross = math.floor(PATHS * spent(min(1.0, information(look) / whole), allowance)) - crossed
        if freedom_of(look) < 1 or may_cross < 1:
            found.append(math.inf)
            continue
        boundary = -float(_smallest(alive_P, may_cross))
        found.append(boundary)
        is_over_P = statistic_P <= -boundary
        crossed += int((is_over_P if going is None else is_over_P & going).sum())
        going = ~is_over_P if going is None else going & ~is_over_P
    return tuple(found)


def _smallest(values: Any, count: int) -> Any:
    """The `count`-th smallest of an array."""
    import numpy as np

    return np.partition(values, count - 1)[count - 1]


def _simulated(counts: Sequence[tuple[int, int]], paths: int) -> Any:
    """The t statistic at each look of races between equals: an array of looks by paths."""
    import numpy as np

    draw = np.random.default_rng(SEED)
    arms = [draw.standard_normal((paths, max(1, *(look[arm] for look in counts)))) for arm in (0, 1)]
    sums = [(values.cumsum(axis=1), (values**2).cumsum(axis=1)) for values in arms]
    return [
        _statistic([(totals[:, n - 1], squares[:, n - 1], n) if n else None for (totals, squares), n in zip(sums, look, strict=True)])
        for look in counts
    ]  # fmt: skip


def _statistic(arms: Sequence[tuple[Any, Any, int] | None]) -> Any:
    """Student's t of arms given as sums, sums of squares and counts; the second may be absent, an exact 0."""
    import numpy as np

    known = [arm for arm in arms if arm is not None]
    means = [total / count for total, _, count in known]
    difference = means[0] - (means[1] if len(means) > 1 else 0.0)
    freedom = sum(count - 1 for _, _, count in known)
    if freedom < 1:
        return np.zeros_like(difference)
    within = sum(squares - total**2 / count for total, squares, count in known)
    error = np.sqrt(np.maximum(within, 0.0) / freedom * sum(1.0 / count for _, _, count in known))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(difference / error, nan=0.0, posinf=np.inf, neginf=-np.inf)


# ── a race ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def race(
    candidate: Sequence[Sequence[float]],
    baseline: Sequence[Sequence[float]] | Summary | float,
    *,
    planned: Sequence[tuple[int, int]],
    rules: Rules,
) -> Race:
    """The race as far as it has come.

    `candidate` holds its scores at each look so far, and `baseline` the same, or a published arm's mean and spread, or an
    exact number. `planned` are the seeds of each look of the longest race and the scores that the baseline then has.
    """
    looks: list[Look] = []
    for number, ours in enumerate(candidate):
        theirs = baseline[number] if isinstance(baseline, Sequence) else baseline
        # what is still to come is counted as planned; a seed that failed takes its information with it
        history = [look.counts for look in looks]
        looks.append(_look(ours, theirs, history, planned=planned[number:], rules=rules))
        if looks[-1].verdict != OPEN:
            break
    return Race(rules=rules, planned=planned[-1][0], looks=tuple(looks))


def _look(
    ours: Sequence[float],
    theirs: Sequence[float] | Summary | float,
    history: Sequence[tuple[int, int]],
    *,
    planned: Sequence[tuple[int, int]],
    rules: Rules,
) -> Look:
    """One look, given the counts of the looks before it and the plan from it on."""
    arms = [_moments(ours), _moments(theirs)]
    counts = (arms[0].count, arms[1].count)
    to_come = [(counts[0] + ahead[0] - planned[0][0], counts[1] + ahead[1] - planned[0][1]) for ahead in planned[1:]]
    every = (*history, counts, *to_come)
    boundary = boundaries(every, rules.alpha)[len(history)]
    difference = arms[0].mean - arms[1].mean if counts[0] and arms[1].mean is not None else None
    freedom = freedom_of(counts)
    plain = Look(
        seeds=planned[0][0], counts=counts, difference=difference, std=None, statistic=None, boundary=None, chance=None,
        verdict=OPEN,
    )  # fmt: skip
    if difference is None or freedom < 1:
        return plain
    std = math.sqrt((arms[0].squares + arms[1].squares) / freedom)
    statistic = _ratio(difference + rules.margin, std / math.sqrt(information(counts)))
    verdict, chance = OPEN, None
    if statistic <= -boundary or statistic >= boundary:
        verdict = BETTER if statistic < 0 else NOT_BETTER
    elif to_come:
        chance = _chance(
            difference + rules.margin, std, counts, to_come, boundaries(every, rules.alpha)[len(history) + 1 :]
        )
        verdict = HOPELESS if chance < FUTILITY else OPEN
    return Look(
        seeds=planned[0][0], counts=counts, difference=difference, std=std, statistic=statistic,
        boundary=boundary if math.isfinite(boundary) else None, chance=chance, verdict=verdict,
    )  # fmt: skip


def _ratio(value: float, error: float) -> float:
    """value / error, infinite where there is no spread at all."""
    if error:
        return value / error
    return math.copysign(math.inf, value) if value else 0.0


@dataclass(frozen=True)
class _Moments:
    count: int
    mean: Any  # a float, None without values
    squares: float
    """Sum of squares about the mean."""


def _moments(arm: Sequence[float] | Summary | float) -> _Moments:
    if isinstance(arm, (int, float)):
        return _Moments(0, float(arm), 0.0)
    if isinstance(arm, Summary):
        return _Moments(arm.count, arm.mean, (arm.count - 1) * arm.std**2 if arm.std is not None else 0.0)
    if not arm:
        return _Moments(0, None, 0.0)
    mean = math.fsum(arm) / len(arm)
    return _Moments(len(arm), mean, math.fsum((value - mean) ** 2 for value in arm))


def _chance(
    difference: float,
    std: float,
    counts: tuple[int, int],
    to_come: Sequence[tuple[int, int]],
    ahead: Sequence[float],
) -> float:
    """Chance that a later look finds the candidate better, by what the seeds so far say of difference and spread.

    Both are drawn from what is plausible after them (normal scores, flat priors), and the seeds to come from those.
    """
    import numpy as np

    draw = np.random.default_rng(SEED)
    freedom = freedom_of(counts)
    sigma_P = std * np.sqrt(freedom / draw.chisquare(freedom, FORESEEN))
    truth_P = difference + sigma_P / math.sqrt(information(counts)) * draw.standard_normal(FORESEEN)
    total_P, within_P = difference * np.ones(FORESEEN), freedom * std**2 * np.ones(FORESEEN)
    crossed_P = np.zeros(FORESEEN, dtype=bool)
    last = counts
    for look, boundary in zip(to_come, ahead, strict=True):
        # the running difference moves like a random walk in information; the spread gains the new seeds' own
        before, after = information(last), information(look)
        if after > before:
            step_P = truth_P + sigma_P / math.sqrt(after - before) * draw.standard_normal(FORESEEN)
            total_P = (before * total_P + (after - before) * step_P) / after
        gained = freedom_of(look) - freedom_of(last)
        if gained:
            within_P = within_P + sigma_P**2 * draw.chisquare(gained, FORESEEN)
        error_P = np.sqrt(within_P / freedom_of(look)) / math.sqrt(after)
        crossed_P |= total_P <= -boundary * error_P
        last = look
    return float(crossed_P.mean())


# ── seeds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def seeds_of_looks(*, first: int, step: int, most: int) -> list[int]:
    """Seeds that have been run at each look."""
    return [*range(first, most, step), most]


def scores_at(scores: Mapping[int, float], seeds: Sequence[int], count: int) -> list[float]:
    """The scores of the first so many seeds that have one."""
    return [scores[seed] for seed in seeds[:count] if seed in scores]
