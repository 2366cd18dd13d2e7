"""Retries: runs that failed are attempted again when somebody asks for it, having mended the cause.

What a run came to is not asked again: a loss that is no number and a file over the cap are outcomes, and to draw again
until another comes would be to choose. A trial that failed because of where it lies is left to the search that learned from
it, unless that kind of failure is named.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from orchestrator import ledger
from orchestrator.ledger import Arm, StudyState, Trial
from orchestrator.verdict import POINT_FAILURES
from trainer.protocol import FAILED, NOT_FINITE, OVER_CAP

OUTCOMES = frozenset({NOT_FINITE, OVER_CAP})
NAMEABLE = POINT_FAILURES - OUTCOMES
"""Kinds of failure of trials that are attempted again where they are named."""


def kinds_asked(retry: Path) -> list[str] | None:
    """The kinds of failure that a study's retry file names; None where nobody asks for a retry."""
    try:
        return retry.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return None


@dataclass(frozen=True, kw_only=True)
class FailedRun:
    """A run that is settled and has nothing to show for it."""

    run_id: str
    owner: Trial | Arm
    seed: int
    failure: str

    @property
    def text(self) -> str:
        """`trial 3, seed 1 (timeout)`."""
        return f"{self.owner.label}, seed {self.seed} ({self.failure})"

    @property
    def is_by_point(self) -> bool:
        """Whether a trial failed because of where it lies; of an arm a score is wanted by all means."""
        return isinstance(self.owner, Trial) and self.failure in POINT_FAILURES


def failed_runs(state: StudyState, *, max_attempts: int, kinds: Collection[str] = NAMEABLE) -> list[FailedRun]:
    """The runs of failed trials, and of arms, that another attempt may bring to a score, in the order in which they were asked.

    `kinds`: those of NAMEABLE that are meant too.
    """
    owners: list[Trial | Arm] = [
        *(trial for trial in state.trials.values() if trial.state == ledger.FAILED),
        *state.arms.values(),
    ]
    found = [
        FailedRun(run_id=run_id, owner=owner, seed=seed, failure=kind)
        for owner in owners
        for seed, run_id in owner.runs.items()
        if (kind := _failure_of(run_id, state, max_attempts)) and kind not in OUTCOMES
    ]
    return [run for run in found if not run.is_by_point or run.failure in kinds]


def _failure_of(run_id: str, state: StudyState, max_attempts: int) -> str | None:
    """The kind of failure with which a run is settled; None for one that is not, or that has not failed."""
    if state.standing(run_id, max_attempts=max_attempts) != ledger.SETTLED:
        return None
    last = state.attempts_of(run_id)[-1]
    return last.failure if last.status == FAILED else None


def remedy(name: str, state: StudyState, *, max_attempts: int) -> str:
    """What to do about a study of which nothing came."""
    failed = failed_runs(state, max_attempts=max_attempts)
    if not failed:
        return "the same command goes on, where more trials are asked for"
    named = "".join(f" --failure {kind}" for kind in sorted({run.failure for run in failed if run.is_by_point}))
    return f"mend the cause, then `caddie study retry {name}{named}`, and the same command again"
