"""The verdict: what the search is told of a trial, from the results of its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator import ledger
from orchestrator.measures import ARTIFACT_BYTES, EVAL_SECONDS, TRAIN_SECONDS, excess, measures_of
from orchestrator.study import Study
from trainer import protocol
from trainer.protocol import Result

POINT_FAILURES = frozenset(
    {protocol.CONFIG, protocol.NOT_FINITE, protocol.OUT_OF_MEMORY, protocol.OVER_CAP, protocol.TIMEOUT}
)
"""Kinds of failure of a trial that its point is to blame for, and not the machine or the code."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a trial ended."""

    state: str
    value: float | None = None
    """Mean of the objective over the seeds, in bits per byte."""

    constraints: dict[str, float] = field(default_factory=dict)
    """By how much each limit is exceeded, in its own unit; feasible where none is above 0."""

    measures: dict[str, float] = field(default_factory=dict)
    """What its runs took, of the seeds the worst; see orchestrator.measures."""

    reason: str = ""
    failure: str | None = None
    """Kind of the failure, where the trial failed."""


def verdict(study: Study, results: Mapping[int, Result]) -> Verdict:
    """Judge a trial by the results of its seeds: a failure of any is the trial's, then a stop, then the mean score."""
    failed = [(seed, result) for seed, result in results.items() if is_failure(study, result)]
    if failed:
        return _failed(*failed[0])
    if any(result.status == protocol.STOPPED for result in results.values()):
        return Verdict(state=ledger.PRUNED, reason="stopped early")
    scored, objective = list(results.values()), study.search.objective
    value = sum(result.scores[objective].bpb for result in scored) / len(scored)
    measures = measures_of(scored, objective)
    return Verdict(
        state=ledger.COMPLETE, value=value, constraints=_constraints(study, measures), measures=measures
    )  # fmt: skip


def is_failure(study: Study, result: Result) -> bool:
    """Whether the result leaves nothing to compare; an artifact over the cap has a score, and is told as infeasible."""
    if result.status == protocol.STOPPED:
        return False
    if result.status == protocol.FAILED and (result.failure is None or result.failure.kind != protocol.OVER_CAP):
        return True
    score = result.scores.get(study.search.objective)
    return score is None or not math.isfinite(score.bpb)


def _failed(seed: int, result: Result) -> Verdict:
    if result.failure is not None:
        kind, message = result.failure.kind, result.failure.message
    elif result.scores:
        found = ", ".join(result.scores)
        kind, message = protocol.NOT_FINITE, f"the objective's score is missing or not a finite number; it has {found}"
    else:
        kind, message = protocol.CODE, "the result holds no score"
    log = f"; log: {result.failure.log.splitlines()[0].rstrip(':')}" if result.failure and result.failure.log else ""
    return Verdict(state=ledger.FAILED, reason=f"{kind}: {message} (seed {seed}{log})", failure=kind)


def _constraints(study: Study, measures: Mapping[str, float]) -> dict[str, float]:
    """The excess over each limit; a run that made no file keeps the cap."""
    known = {ARTIFACT_BYTES: 0.0, TRAIN_SECONDS: 0.0, EVAL_SECONDS: 0.0, **measures}
    return {name: excess(name, known[name], limit) for name, limit in study.limits.items() if name in known}
