"""Footing: two arms compared where they had the same number of steps, or the same seconds, whatever machine they had.

A slow machine takes fewer steps in its time, and a better score may be no more than a faster one. What the runs logged on
the way, the training loss, is compared at the last point that every complete run of both arms reached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.evidence import ArmEvidence, Curve, RunEvidence
from orchestrator.statistics import Adjusted, Difference, adjusted_for, difference, mean
from trainer.protocol import COMPLETE

STEPS, SECONDS = WAYS = ("steps", "seconds")
WINDOW = 0.05
"""Share of the way up to the common point over which losses are averaged: a single step's is mostly its batch's."""


@dataclass(frozen=True, kw_only=True)
class Footing:
    """Both arms' training loss, in nats per token, around one point of training."""

    way: str
    """What is equal: one of WAYS."""

    point: float
    """The last step, or second, that every run reached."""

    candidate: Mapping[int, float]
    """Loss by seed."""

    baseline: Mapping[int, float]

    @property
    def difference(self) -> Difference:
        """Candidate minus baseline, in nats per token."""
        return difference(list(self.candidate.values()), list(self.baseline.values()))


def footing(curves: Sequence[Curve], candidate: str, baseline: str, *, way: str) -> Footing | None:
    """Compare two arms by name at an equal point of their complete runs; None where an arm has none."""
    complete = [curve for curve in curves if curve.run.state == COMPLETE]
    arms = {name: [curve for curve in complete if curve.run.owner == name] for name in (candidate, baseline)}
    if not all(arms.values()):
        return None
    point = min(_xs(curve, way)[-1] for found in arms.values() for curve in found)
    losses = {
        name: {c.run.seed: loss for c in found if (loss := _loss(c, way, point)) is not None}
        for name, found in arms.items()
    }
    if not all(losses.values()):
        return None
    return Footing(way=way, point=point, candidate=losses[candidate], baseline=losses[baseline])


def _xs(curve: Curve, way: str) -> Sequence[float]:
    return curve.steps if way == STEPS else curve.train_seconds


def _loss(curve: Curve, way: str, point: float) -> float | None:
    """Mean loss in the window up to the point; None where nothing finite was logged there."""
    pairs = zip(_xs(curve, way), curve.losses, strict=True)
    return mean([loss for x, loss in pairs if (1 - WINDOW) * point < x <= point and math.isfinite(loss)])


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """How fast one run trained."""

    run: RunEvidence
    steps: int
    seconds: float
    """In the training loop, without calibration."""

    tokens: int

    @property
    def ms_per_step(self) -> float:
        return 1000 * self.seconds / self.steps

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def throughput(run: RunEvidence) -> Throughput | None:
    """None for a run without training steps: unfinished, or one that only scored a stored model."""
    result = run.result
    if result is None or not result.steps:
        return None
    seconds = result.train_seconds - result.phases.get("calibrate", 0.0)
    if seconds <= 0:
        return None
    return Throughput(run=run, steps=result.steps, seconds=seconds, tokens=result.tokens)


def adjusted_for_steps(candidate: ArmEvidence, baseline: ArmEvidence, stage: str) -> Adjusted | None:
    """The arms' difference in bits per byte with what their numbers of steps explain taken off; None where none can tell."""

    def of(arm: ArmEvidence) -> tuple[list[float], list[float]]:
        runs = [run for run in arm.runs if run.result and run.result.status == COMPLETE and run.result.steps]
        scored = [(bpb, float(run.result.steps)) for run in runs if run.result and (bpb := run.bpb(stage)) is not None]
        return [bpb for bpb, _ in scored], [steps for _, steps in scored]

    return adjusted_for(of(candidate), of(baseline))
