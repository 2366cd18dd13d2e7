"""Retries: runs that failed are attempted again when somebody asks for it, having mended the cause.

What a run came to is not asked again: a loss that is no number and a file over the cap are outcomes, and to draw again
until another comes would be to choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator import ledger
from orchestrator.ledger import Arm, StudyState, Trial
from trainer.protocol import FAILED, NOT_FINITE, OVER_CAP

OUTCOMES = frozenset({NOT_FINITE, OVER_CAP})


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
        owner = f"trial {self.owner.number}" if isinstance(self.owner, Trial) else f"arm {self.owner.name}"
        return f"{owner}, seed {self.seed} ({self.failure})"


def failed_runs(state: StudyState, *, max_attempts: int) -> list[FailedRun]:
    """The runs of failed trials and of arms that another attempt may bring to a score, in the order in which they were asked."""
    owners: list[Trial | Arm] = [
        trial for trial in state.trials.values() if trial.state == ledger.FAILED and trial.failure not in OUTCOMES
    ]
    return [found for owner in [*owners, *state.arms.values()] for found in _failed_of(owner, state, max_attempts)]


def _failed_of(owner: Trial | Arm, state: StudyState, max_attempts: int) -> Iterator[FailedRun]:
    for seed, run_id in owner.runs.items():
        if state.standing(run_id, max_attempts=max_attempts) != ledger.SETTLED:
            continue
        last = state.attempts_of(run_id)[-1]
        if last.status == FAILED and last.failure is not None and last.failure not in OUTCOMES:
            yield FailedRun(run_id=run_id, owner=owner, seed=seed, failure=last.failure)
