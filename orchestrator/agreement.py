"""Agreement: how well one rung of a ladder says what the next one finds, from the points that were run on both."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator import ladder, ledger
from orchestrator.ledger import StudyState, Trial
from orchestrator.rungs import FEWEST_PAIRS
from orchestrator.statistics import CONFIDENCE, RankCorrelation, kendall, residual_std, spearman
from orchestrator.study import Study

RESAMPLES = 2000
SEED = 0  # of the resamples, so that a report says the same twice
CAVEAT = (
    "The points on both rungs are the best of the lower one and the preset: among points that lie close together the order "
    "is harder to keep, so over the whole space the rungs probably agree better than this."
)
INTERVALS = f"{CONFIDENCE:.0%} intervals: Fisher's z with the variances of Fieller, Hartley and Pearson"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A point that two rungs ran."""

    lower_trial: int
    upper_trial: int
    lower: float
    """Bits per byte on the rung below."""

    upper: float


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What two neighbouring rungs say of the same points. Where they are too few nothing but their number is told."""

    lower: str
    """The rung's name, not its study's."""

    upper: str
    pairs: tuple[Pair, ...]
    spearman: RankCorrelation | None = None
    kendall: RankCorrelation | None = None
    residual_std: float | None = None
    """Of the upper rung's scores about their line through the lower one's, in bits per byte."""

    is_best_alike: bool | None = None
    """Whether the lower rung's best is the upper one's."""

    best_alike_share: float | None = None
    """The same over resamples of the points, with replacement."""

    @property
    def is_told(self) -> bool:
        return len(self.pairs) >= FEWEST_PAIRS


def agreement(lower: Study, below: StudyState, upper: Study, above: StudyState) -> Agreement:
    """Compare two neighbouring rungs by the trials that both completed."""
    pairs = pairs_of(upper, below, above)
    few = Agreement(lower=lower.rung_name, upper=upper.rung_name, pairs=pairs)
    if not few.is_told:
        return few
    a, b = [pair.lower for pair in pairs], [pair.upper for pair in pairs]
    return replace(
        few, spearman=spearman(a, b), kendall=kendall(a, b), residual_std=residual_std(a, b),
        is_best_alike=is_best_alike(pairs), best_alike_share=best_alike_share(pairs),
    )  # fmt: skip


def pairs_of(upper: Study, below: StudyState, above: StudyState) -> tuple[Pair, ...]:
    """The points of both states, by the upper one's trials.

    Where knobs do not transfer, a point of the lower rung stands for the one that it went up as; of several the best.
    """
    scored = sorted(_scored(below), key=lambda trial: (trial.value, trial.number))
    known: dict[str, Trial] = {}
    for trial in scored:
        known.setdefault(_key(ladder.raised(upper, trial.params)), trial)
    known |= {_key(trial.params): trial for trial in reversed(scored)}  # the same point itself comes first
    found = [(known.get(_key(trial.params)), trial) for trial in _scored(above)]
    return tuple(
        Pair(lower_trial=low.number, upper_trial=high.number, lower=low.value or 0.0, upper=high.value or 0.0)
        for low, high in found
        if low is not None
    )


def _scored(state: StudyState) -> list[Trial]:
    return [trial for trial in state.trials.values() if trial.state == ledger.COMPLETE and trial.value is not None]


def _key(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def is_best_alike(pairs: Sequence[Pair]) -> bool:
    """Whether the point that is the lower rung's best is the upper one's too."""
    best = min(pair.upper for pair in pairs)
    return min(pairs, key=lambda pair: pair.lower).upper == best


def best_alike_share(pairs: Sequence[Pair]) -> float:
    """How often that is so among points drawn from these, as many, with replacement."""
    dice = random.Random(SEED)
    return sum(is_best_alike(dice.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES)) / RESAMPLES


def in_words(found: Agreement) -> str:
    """One sentence for a terminal."""
    head = f"{found.lower} and {found.upper} share {len(found.pairs)} points"
    if not found.is_told:
        return f"{head}: too few for a correlation, which needs {FEWEST_PAIRS}"
    spread = "unknown" if found.residual_std is None else f"{found.residual_std:.5f} BPB"
    best = "is" if found.is_best_alike else "is not"
    return (
        f"{head}: Spearman {correlation_text(found.spearman)}, Kendall {correlation_text(found.kendall)}, residual σ {spread}; "
        f"the best of {found.lower} {best} the best of {found.upper} (in {found.best_alike_share:.0%} of resamples)"
    )


def correlation_text(found: RankCorrelation | None) -> str:
    if found is None:
        return "unknown, the scores are all equal"
    if found.low is None or found.high is None:
        return f"{found.value:+.2f}"
    return f"{found.value:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
