"""Replicates: how far two runs of one configuration lie apart by their seeds, over all that a study ran on several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.evidence import Evidence, RunEvidence
from orchestrator.statistics import CONFIDENCE, pooled_std, summarize, t_quantile

WITHIN_NOISE = "within noise"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The spread of one run, pooled."""

    std: float
    """In bits per byte."""

    degrees_of_freedom: int
    configurations: int
    """Those with more than one seed, from which it is pooled."""

    def half_width(self, counts: tuple[int, int]) -> float:
        """How far the means of two configurations with so many seeds may differ by the seeds alone, at CONFIDENCE."""
        error = self.std * math.sqrt(sum(1 / count for count in counts))
        return error * t_quantile((1 + CONFIDENCE) / 2, self.degrees_of_freedom)

    def covers(self, difference: float, counts: tuple[int, int]) -> bool:
        """Whether a difference of means is no larger than the seeds explain."""
        return abs(difference) <= self.half_width(counts)

    def __str__(self) -> str:
        plural = "s" if self.configurations != 1 else ""
        return (
            f"σ {self.std:.5f} of one run (df {self.degrees_of_freedom}, pooled over {self.configurations} "
            f"configuration{plural} with several seeds)"
        )


def spread_of(evidence: Evidence) -> Spread | None:
    """The study's spread in its objective; None where nothing was run on two seeds, or the seeds change nothing."""
    groups: list[Sequence[RunEvidence]] = [arm.runs for arm in evidence.arms]
    groups += [trial.runs for trial in evidence.trials]
    return pooled(_scores(group, evidence.objective) for group in groups)


def _scores(runs: Sequence[RunEvidence], stage: str) -> dict[str, float]:
    return {run.run_id: value for run in runs if (value := run.bpb(stage)) is not None}


def pooled(groups: Iterable[Mapping[str, float]]) -> Spread | None:
    """The same from scores by run of each configuration; one that two owners share counts once."""
    seen: set[frozenset[str]] = set()
    arms = []
    for group in groups:
        if len(group) > 1 and frozenset(group) not in seen:
            seen.add(frozenset(group))
            arms.append(summarize(list(group.values())))
    found = pooled_std(arms)
    if found is None or not found[0]:
        return None
    std, freedom = found
    return Spread(std=std, degrees_of_freedom=freedom, configurations=len(arms))


def differences(evidence: Evidence) -> dict[int, tuple[float, bool | None]]:
    """Each complete trial's score minus the preset's, and whether it is within the noise; None where that is not known.

    By the trial's number; empty where the preset has no score.
    """
    spread = spread_of(evidence)
    scored = {item.trial.number: item for item in evidence.trials if item.trial.value is not None}
    preset = scored.pop(0, None)
    if preset is None or preset.trial.value is None:
        return {}
    found: dict[int, tuple[float, bool | None]] = {}
    for number, item in scored.items():
        gap = (item.trial.value or 0.0) - preset.trial.value
        counts = (max(1, len(item.runs)), max(1, len(preset.runs)))
        found[number] = gap, None if spread is None else spread.covers(gap, counts)
    return found
