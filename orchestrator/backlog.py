"""The backlog: the runs that a study's trials and arms ask for, and which of them still need an attempt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator import ledger
from orchestrator.attempts import Attempts
from orchestrator.ledger import ACTIVE, PRESET_ARM, SETTLED, WANTED, Arm, OpenLedger, StudyState, Trial
from orchestrator.study import Study
from orchestrator.verdict import Verdict, is_failure, verdict
from trainer import protocol
from trainer.protocol import Result


@dataclass(frozen=True)
class Wanted:
    """A run that needs an attempt, and who asks for it."""

    run_id: str
    owner: Trial | Arm
    seed: int


class Backlog:
    """What the ledger and the run directories say of every run of one study."""

    def __init__(self, study: Study, *, ledger: OpenLedger, attempts: Attempts) -> None:
        self.study = study
        self.ledger = ledger
        self.attempts = attempts
        self.results: dict[str, Result] = {}
        """Results of settled runs, by run: read once, and those that another study left."""

    @property
    def _state(self) -> StudyState:
        return self.ledger.now

    def standing(self, run_id: str) -> str:
        """WANTED, ACTIVE or SETTLED; a settled run's result is in `results`."""
        if run_id in self.results:
            return SETTLED
        standing = self._state.standing(run_id, max_attempts=self.study.resources.max_attempts)
        if standing == SETTLED:
            self.results[run_id] = self.attempts.result_of(self._state.attempts_of(run_id)[-1])
        return standing

    def running_trials(self) -> list[Trial]:
        return [trial for trial in self._state.trials.values() if trial.state == ledger.RUNNING]

    def owners(self) -> list[Trial | Arm]:
        """Those whose runs are still of interest."""
        return [*self.running_trials(), *self._state.arms.values()]

    def shared_runs(self) -> set[str]:
        """Runs for which more than one trial or arm waits."""
        asked = Counter(run_id for owner in self.owners() for run_id in set(owner.runs.values()))
        return {run_id for run_id, owners in asked.items() if owners > 1}

    def is_given_up(self, owner: Trial | Arm) -> bool:
        """Whether no further run of it is needed: a trial that is being stopped, or of which one seed failed."""
        if isinstance(owner, Arm):
            return False
        settled = [self.results[run_id] for run_id in owner.runs.values() if self.standing(run_id) == SETTLED]
        attempts = [attempt for run_id in owner.runs.values() for attempt in self._state.attempts_of(run_id)]
        is_stopped = any(attempt.stop_reason in ledger.EARLY for attempt in attempts)
        return is_stopped or any(r.status == protocol.STOPPED or is_failure(self.study, r) for r in settled)

    def wanted(self, owners: Iterable[Trial | Arm] | None = None) -> list[Wanted]:
        """Every run of these owners, or of all, that needs an attempt, once: trials in their order, then arms seed by seed.

        Seed by seed puts the arms that are compared side by side in time, on the machine as it is then; in an interleaved
        comparison the order within a seed changes from seed to seed, ABBA, so that what drifts favours neither.
        """
        found = [
            Wanted(run_id, owner, seed)
            for owner in (self.owners() if owners is None else owners)
            if not self.is_given_up(owner)
            for seed, run_id in owner.runs.items()
            if self.standing(run_id) == WANTED
        ]
        seeds = self.study.confirm.seeds if self.study.confirm else ()
        turn = {seed: n for n, seed in enumerate(seeds)}
        found.sort(key=lambda wanted: self._place(wanted, turn))
        return list({wanted.run_id: wanted for wanted in found}.values())

    def _place(self, wanted: Wanted, turn: Mapping[int, int]) -> tuple[int, bool]:
        """A run's place in the order: trials as they are, an arm's run by the turn of its seed and its place in it."""
        if not isinstance(wanted.owner, Arm):
            return -1, False
        number = turn.get(wanted.seed, -1)
        is_reversed = self.study.interleave is not None and number % 2 == 1
        return number, is_reversed and wanted.owner.name == PRESET_ARM

    def verdict_of(self, trial: Trial) -> Verdict | None:
        """How a trial ended; None while its runs are not all settled, and more of them are needed."""
        standings = {self.standing(run_id) for run_id in trial.runs.values()}
        if ACTIVE in standings or (WANTED in standings and not self.is_given_up(trial)):
            return None
        results = {seed: self.results[run_id] for seed, run_id in trial.runs.items() if run_id in self.results}
        return verdict(self.study, results)
