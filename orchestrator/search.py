"""The search: which point of the space comes next; knows Optuna's samplers.

A proposal follows from the study, the ledger's trials and the trial's number alone, so a controller that starts again
proposes what it would have proposed. What Optuna stores is a view of the ledger, for optuna-dashboard: nothing is decided
from it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import math
import random
import statistics
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from orchestrator import evolution, ledger, search_view
from orchestrator.errors import ConfigError, MachineError
from orchestrator.evolution import Seen
from orchestrator.ledger import StudyState, Trial
from orchestrator.memory import Memory, Shown
from orchestrator.points import as_json, frozen, is_inside, label, params_of, space_of
from orchestrator.search_view import View
from orchestrator.space import NumberRange, grid_values
from orchestrator.study import Study

PERTURBATIONS = 8
"""Further proposals that are asked for where a proposal repeats an earlier trial; a small grid may have no other."""

MOST_SHOWN = {"random": 0, "tpe": 1000, "gp": 300}
"""Trials that have ended which a sampler is shown, where that is limited: one learns nothing, one's time grows with them, the
third's with their cube. Evolution needs all."""

IMPORTANCE_TRIALS = 4
"""Fewest complete trials from which an importance is computed; below, the quantile that it rests on is one trial."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


def seed_of(study_name: str, number: int, salt: int = 0) -> int:
    """A sampler's seed; Optuna does not store a sampler's state, and a fixed seed would repeat the first trial."""
    digest = hashlib.sha256(f"{study_name}\0{number}\0{salt}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def sampler_of(study: Study, seed: int) -> BaseSampler:
    """The study's sampler. Raises ConfigError for an unknown one, MachineError where it lacks a library."""
    startup = study.search.startup_trials
    name = study.search.sampler
    if name == "tpe":
        return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
    if name in ("random", "cmaes"):  # evolution begins with random points
        return RandomSampler(seed=seed)
    if name == "gp":
        if importlib.util.find_spec("torch") is None:  # Optuna itself would say so only after the startup trials
            raise MachineError(
                'the sampler "gp" needs PyTorch beside the orchestrator, and it is not installed',
                hint='pip install torch, or take sampler = "tpe"',
            )
        return GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
    raise ConfigError(f"[search] sampler {name!r} is not known to the search", hint='take sampler = "tpe"')


def propose(memory: Memory, number: int, *, salt: int = 0) -> dict[str, Any]:
    """The point of trial `number`, given the trials before it."""
    study, seed = memory.study, seed_of(memory.study.name, number, salt)
    if study.search.sampler == "qmc":
        return _propose_of_sequence(study, memory.space, number + salt)
    if study.search.sampler == "grid":
        return _propose_of_grid(study, memory)
    seen = memory.most_telling(MOST_SHOWN.get(study.search.sampler, sys.maxsize))
    if study.search.sampler == "cmaes":
        complete = [trial for trial in seen if trial.state is TrialState.COMPLETE]
        if len(complete) >= study.search.startup_trials:
            return params_of(evolution.propose(_numbers(study), [_as_seen(trial) for trial in complete], seed), study)
    scratch = optuna.create_study(directions=_directions(study), sampler=sampler_of(study, seed), storage=Shown(seen))
    return params_of(scratch.ask(fixed_distributions=memory.space).params, study)


def _directions(study: Study) -> list[StudyDirection]:
    return [StudyDirection.MINIMIZE] * len(study.objectives)


def _numbers(study: Study) -> dict[str, NumberRange]:
    """The space of a study that has numbers alone."""
    return {knob: found for knob, found in study.space.items() if isinstance(found, NumberRange)}


def _as_seen(trial: FrozenTrial) -> Seen:
    excess = sum(max(0.0, value) for value in trial.constraints.values())
    return Seen(params=trial.params, value=trial.values[0], excess=excess)


def _propose_of_grid(study: Study, memory: Memory) -> dict[str, Any]:
    """The first point, in an order of the study's own, that no trial has; the order's first where all are taken.

    Shuffled, because a grid that is cut off should have been everywhere.
    """
    columns = [[_as_json_value(value) for value in grid_values(found) or ()] for found in study.space.values()]
    points = [dict(zip(study.space, values, strict=True)) for values in itertools.product(*columns)]
    random.Random(seed_of(study.name, 0)).shuffle(points)
    return next((point for point in points if not memory.has(point)), points[0])


def _as_json_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _propose_of_sequence(study: Study, space: dict[str, BaseDistribution], position: int) -> dict[str, Any]:
    """The point at a place of the quasi-random sequence, which knows no values: the sequence is gone through again."""
    with warnings.catch_warnings():
        # Experimental since 3.0.0; a test would show a change.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = QMCSampler(seed=seed_of(study.name, 0), scramble=True, warn_independent_sampling=False)
    scratch = optuna.create_study(direction="minimize", sampler=sampler)
    origin = optuna.create_study(direction="minimize", sampler=RandomSampler(seed=0))
    origin.tell(origin.ask(fixed_distributions=space), 0.0)  # from whose space the sequence learns its dimensions
    scratch.add_trials(origin.trials)
    for _ in range(position - 1):
        scratch.ask(fixed_distributions=space)
    return params_of(scratch.ask(fixed_distributions=space).params, study)


# ---------------------------------------------------------------------------------------------------- stopping


def is_worse_than_median(value: float, others: list[float], *, startup_trials: int) -> bool:
    """The median rule: stop what is above the median of the finished others, once there are enough of them."""
    if not math.isfinite(value):
        return True
    return len(others) >= startup_trials and value > statistics.median(others)


# ---------------------------------------------------------------------------------------------------- importance


def knob_importance(study: Study, state: StudyState) -> dict[str, float]:
    """How much of the difference between good and other trials goes with each knob (PED-ANOVA), summing to 1.

    Empty with too few complete trials or where every trial scored the same.
    """
    space = space_of(study)
    done = [t for t in state.trials.values() if t.state == ledger.COMPLETE and is_inside(t.params, space)]
    if len(done) < IMPORTANCE_TRIALS or len({t.value for t in done}) < 2 or not space:
        return {}
    scratch = optuna.create_study(direction="minimize", sampler=RandomSampler(seed=0))
    scratch.add_trials([_of_score(trial, space) for trial in done])
    return {knob: float(share) for knob, share in optuna.importance.get_param_importances(scratch).items()}


def _of_score(trial: Trial, space: Mapping[str, BaseDistribution]) -> FrozenTrial:
    """A complete trial with its score alone."""
    params = {knob: label(trial.params[knob]) for knob in space}
    return create_trial(state=TrialState.COMPLETE, params=params, distributions=dict(space), value=trial.value)


# ---------------------------------------------------------------------------------------------------- the port


class Search:
    """Asks and tells in the order of the ledger, and keeps Optuna's view in step with it."""

    def __init__(self, study: Study, journal: Path, *, url: str = "") -> None:
        self.study = study
        self.space = space_of(study)
        self.trials: dict[int, Trial] = {}
        """As the ledger has them."""

        self.memory = Memory(study)
        self.view = View(journal, name=study.name, directions=_directions(study), url=url)

    @property
    def problem(self) -> str | None:
        """Why the view does not show all of it; None where it does."""
        return self.view.problem

    def rebuild(self, state: StudyState) -> None:
        """Learn what the ledger says, and show it. Raises StorageError."""
        self.trials = dict(state.trials)
        self.memory = Memory.of(self.study, self.trials)
        self.view.rebuild(self._shown)

    def _shown(self) -> list[FrozenTrial]:
        return [frozen(self.study, self.trials[n], self.space) for n in sorted(self.trials)]

    def ask(self, number: int) -> dict[str, Any]:
        """The point of a new trial: the preset for number 0, else a proposal that repeats no trial, if there is one."""
        if number == 0:
            return as_json(self.study.preset_params())
        for salt in range(PERTURBATIONS):
            params = propose(self.memory, number, salt=salt)
            if not self.memory.has(params):
                break
        return params

    def begin(self, trial: Trial) -> None:
        """Note a trial that the ledger holds by now."""
        self.trials[trial.number] = trial
        self.memory.note(trial)
        self.view.show(lambda view: view.add_trial(frozen(self.study, trial, self.space)), self._shown)

    def should_stop(self, number: int, per_mille: int, loss: float) -> bool:
        """Whether the running trial's loss is worse than the median of the complete trials' at the same point."""
        plan = self.study.stop_early
        if plan is None or number == 0:
            return False
        done = [trial for trial in self.trials.values() if trial.state == ledger.COMPLETE]
        others = [trial.intermediate[per_mille] for trial in done if per_mille in trial.intermediate]
        return is_worse_than_median(loss, others, startup_trials=plan.startup_trials)

    def tell(self, trial: Trial) -> None:
        """Note how a trial ended, as the ledger has it."""
        self.trials[trial.number] = trial
        self.memory.note(trial)
        if is_inside(trial.params, self.space):
            ended = frozen(self.study, trial, self.space)
            self.view.show(lambda view: search_view.end(view, trial.number, ended), self._shown)
