"""The Pareto front: trials that no other beats in every objective at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.cells import Cell, Table, bpb, knob_text, seconds, whole
from orchestrator.evidence import Evidence
from orchestrator.ledger import COMPLETE, Trial
from orchestrator.measures import EVAL_SECONDS, MINIMIZABLE, TRAIN_SECONDS

SCORE = "score"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A trial on the front."""

    trial: int
    params: dict[str, Any]
    score: float
    """Bits per byte of the study's objective."""

    measures: dict[str, float]
    """The other objectives, by name."""


def front(trials: Sequence[Trial], names: Sequence[str]) -> list[Point]:
    """The feasible complete trials that no other is at or below in score and in every named measure, the best score first.

    Of trials that are equal in all of them the earliest stands for all.
    """
    known = [
        trial
        for trial in trials
        if trial.state == COMPLETE
        and trial.is_feasible
        and trial.value is not None
        and set(names) <= set(trial.measures)
    ]
    values = {trial.number: (trial.value or 0.0, *(trial.measures[name] for name in names)) for trial in known}
    kept = [
        trial
        for trial in known
        if not any(_beats(values[other.number], values[trial.number], other, trial) for other in known)
    ]
    kept.sort(key=lambda trial: values[trial.number])
    return [
        Point(
            trial=trial.number, params=trial.params, score=values[trial.number][0],
            measures={name: trial.measures[name] for name in names},
        )
        for trial in kept
    ]  # fmt: skip


def _beats(a: tuple[float, ...], b: tuple[float, ...], other: Trial, trial: Trial) -> bool:
    """Whether a is nowhere above b, and somewhere below; of equals, whether it is the earlier."""
    if other is trial or any(x > y for x, y in zip(a, b, strict=True)):
        return False
    return a != b or other.number < trial.number


def measured(evidence: Evidence) -> tuple[str, ...]:
    """The further objectives of a study; where it names none, all that differ from trial to trial."""
    if evidence.study.search.also_minimize:
        return evidence.study.search.also_minimize
    done = [item.trial for item in evidence.trials if item.trial.state == COMPLETE]
    return tuple(name for name in MINIMIZABLE if len({trial.measures.get(name) for trial in done} - {None}) > 1)


def front_table(evidence: Evidence) -> Table:
    """The front of a study that searches several objectives; without rows for any other."""
    names = evidence.study.search.also_minimize
    points = front([item.trial for item in evidence.trials], names) if names else []
    rows: list[tuple[Cell, ...]] = [
        (
            str(point.trial), bpb(point.score), *(_text(name, point.measures[name]) for name in names),
            *(knob_text(point.params.get(knob)) for knob in evidence.study.space),
        )
        for point in points
    ]  # fmt: skip
    return Table(
        title="Pareto front", columns=("Trial", "BPB", *names, *evidence.study.space), rows=tuple(rows),
        note="Trials within the limits that no other is as good as in every objective. Single runs: see the noise of one.",
    )  # fmt: skip


def _text(name: str, value: float) -> str:
    return seconds(value) if name in (TRAIN_SECONDS, EVAL_SECONDS) else whole(value)
