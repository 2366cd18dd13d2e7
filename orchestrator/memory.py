"""The memory: a study's trials as its sampler is shown them, kept up to date trial by trial.

A question to a sampler costs what the sampler itself takes: no trial is turned into Optuna's terms twice, and none is copied.
"""

from __future__ import annotations

import copy
import heapq
import json
from collections.abc import Container, Mapping
from typing import Any

from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from orchestrator import ledger
from orchestrator.ledger import Trial
from orchestrator.points import frozen, is_inside, label, space_of
from orchestrator.study import Study
from orchestrator.verdict import POINT_FAILURES

FAILED_CONSTRAINT = "failed"  # 1 for a trial that failed by its point, 0 for another; for the samplers alone
MODELS_OF_COMPLETE = frozenset({"gp", "cmaes"})  # samplers that leave out pruned trials


class Memory:
    """The trials as a sampler should see them.

    Excesses are shares of their limits, so that bytes do not drown seconds; every trial names the same constraints. A trial
    that failed by its point is infeasible and as bad as the worst; one that was pruned too, for a sampler that would not
    see it else and ask for it again.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.space = space_of(study)
        self._trials: dict[int, Trial] = {}
        self._views: dict[int, FrozenTrial | None] = {}
        """By number, in the order of the numbers; None where it is not in the sampler's terms yet."""

        self._points: set[str] = set()
        self._constraints: set[str] = set()
        self._worst: list[float] = []
        """Highest value of each objective, of the trials that have all."""

        self._has_failed = False
        """Whether any trial failed by its point."""

    @classmethod
    def of(cls, study: Study, trials: Mapping[int, Trial]) -> Memory:
        """The memory of a study that has these trials, by number."""
        memory = cls(study)
        for number in sorted(trials):
            memory.note(trials[number])
        return memory

    def note(self, trial: Trial) -> None:
        """Take up a trial as it is now: a new one, with the highest number yet, or one that has ended."""
        self._trials[trial.number] = trial
        self._views[trial.number] = None
        self._points.add(_key(trial.params))
        if trial.state == ledger.RUNNING:
            return
        names, failed = self._constraints | set(trial.constraints), self._has_failed or is_failed_by_point(trial)
        values = frozen(self.study, trial, self.space).values
        worst = [max(pair) for pair in zip(self._worst or values, values, strict=True)] if values else self._worst
        if (names, failed, worst) != (self._constraints, self._has_failed, self._worst):
            self._forget_ended(is_renamed=(names, failed) != (self._constraints, self._has_failed))
        self._constraints, self._has_failed, self._worst = names, failed, worst

    def _forget_ended(self, *, is_renamed: bool) -> None:
        """Drop the views that name other constraints than there are now, or a worst value that is the worst no more."""
        for number, trial in self._trials.items():
            if is_renamed or trial.state in (ledger.FAILED, ledger.PRUNED):
                self._views[number] = None

    def has(self, params: Mapping[str, Any]) -> bool:
        """Whether a trial is at this point."""
        return _key(params) in self._points

    @property
    def views(self) -> list[FrozenTrial]:
        """One for each trial, by number; shared, so nobody may change them."""
        return [self._views[number] or self._make(number) for number in self._views]

    def most_telling(self, most: int) -> list[FrozenTrial]:
        """Of the views of trials that have ended at most so many, the best tenth and the latest; and all that are running.

        A sampler's time grows with what it is shown, and what it learns does not: the next point follows from the best.
        """
        views = self.views if most else []
        if len(views) <= most:
            return views
        ended = [view for view in views if view.state is not TrialState.RUNNING]
        best = heapq.nsmallest(most // 10, ended, key=_rank)
        kept = {view.number for view in [*best, *ended[len(best) - most :]]}
        return [view for view in views if view.state is TrialState.RUNNING or view.number in kept]

    def _make(self, number: int) -> FrozenTrial:
        view = self._views[number] = self._view(self._trials[number])
        return view

    def _view(self, trial: Trial) -> FrozenTrial:
        view = frozen(self.study, trial, self.space)
        failed = is_failed_by_point(trial) and is_inside(trial.params, self.space)
        is_unseen = view.state is TrialState.PRUNED and self.study.search.sampler in MODELS_OF_COMPLETE
        if failed or is_unseen or view.state is TrialState.COMPLETE:
            limits = self.study.limits
            excesses = {
                name: trial.constraints.get(name, 0.0) / limits.get(name, 1.0) for name in sorted(self._constraints)
            }
            excesses |= {FAILED_CONSTRAINT: float(failed)} if self._has_failed else {}
            view = create_trial(
                state=TrialState.COMPLETE,
                params={knob: label(trial.params[knob]) for knob in self.space},
                distributions=dict(self.space),
                values=view.values
                if view.state is TrialState.COMPLETE
                else self._worst or [0.0] * len(self.study.objectives),
                constraints=excesses,
            )
        view.number = trial.number + 1  # Shown gives 0 to the one that is asked for
        return view


class Shown(InMemoryStorage):
    """A storage that shows a sampler the trials of a memory, beside the one that it is asked for."""

    def __init__(self, views: list[FrozenTrial]) -> None:
        super().__init__()
        self._views = views

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """As Optuna asks: the memory's, then its own."""
        views = [view for view in self._views if states is None or view.state in states]
        return [*(copy.deepcopy(views) if deepcopy else views), *super().get_all_trials(study_id, deepcopy, states)]


def is_failed_by_point(trial: Trial) -> bool:
    """Whether a trial failed because of where it lies: a sampler that learns nothing from it proposes the same again."""
    return trial.state == ledger.FAILED and trial.failure in POINT_FAILURES


def _rank(view: FrozenTrial) -> tuple[float, ...]:
    """Lower is better: what has a value, breaks its limits least, and has the lowest first objective."""
    if view.state is not TrialState.COMPLETE:
        return 1.0, 0.0, 0.0
    return 0.0, sum(max(0.0, excess) for excess in view.constraints.values()), view.values[0]


def _key(params: Mapping[str, Any]) -> str:
    """The same for the same point, also before the ledger has made lists of its tuples."""
    return json.dumps(params, sort_keys=True)
