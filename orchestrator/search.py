"""The search: which point of the space comes next; knows Optuna's samplers.

A proposal follows from the study, the ledger's trials and the trial's number alone, so a controller that starts again
proposes what it would have proposed. What Optuna stores is a view of the ledger, for optuna-dashboard: nothing is decided
from it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
import random
import statistics
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from orchestrator import evolution, ledger, search_view
from orchestrator.errors import ConfigError, MachineError
from orchestrator.evolution import Seen
from orchestrator.ledger import StudyState, Trial
from orchestrator.search_view import View
from orchestrator.space import Choice, NumberRange, Range, grid_values
from orchestrator.study import Study
from trainer.protocol import CONFIG, NOT_FINITE, OUT_OF_MEMORY, OVER_CAP, TIMEOUT

PERTURBATIONS = 8
"""Further proposals that are asked for where a proposal repeats an earlier trial; a small grid may have no other."""

IMPORTANCE_TRIALS = 4
"""Fewest complete trials from which an importance is computed; below, the quantile that it rests on is one trial."""

OPTUNA_STATES = {
    ledger.RUNNING: TrialState.RUNNING,
    ledger.COMPLETE: TrialState.COMPLETE,
    ledger.PRUNED: TrialState.PRUNED,
    ledger.FAILED: TrialState.FAIL,
}
POINT_FAILURES = frozenset({CONFIG, NOT_FINITE, OUT_OF_MEMORY, OVER_CAP, TIMEOUT})
"""Kinds of failure that the point is to blame for: a sampler that learns nothing from them proposes the same again."""

FAILED_CONSTRAINT = "failed"  # 1 for a trial that failed by its point, 0 for another; for the samplers alone
MODELS_OF_COMPLETE = frozenset({"gp", "cmaes"})  # samplers that leave out pruned trials

optuna.logging.set_verbosity(optuna.logging.WARNING)


# ---------------------------------------------------------------------------------------------------- the space


def _label(value: Any) -> str | int | float | bool:
    """A choice as Optuna stores it: it takes no lists."""
    return json.dumps(list(value)) if isinstance(value, (tuple, list)) else value


def distribution_of(knob_range: Range) -> BaseDistribution:
    """A knob's range in Optuna's terms."""
    if isinstance(knob_range, Choice):
        return CategoricalDistribution([_label(value) for value in knob_range.values])
    low, high, step = knob_range.low, knob_range.high, knob_range.step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a grid that ends below `high` is what the study's author wrote
        if knob_range.is_integer:
            return IntDistribution(int(low), int(high), log=knob_range.log, step=int(step or 1))
        return FloatDistribution(float(low), float(high), log=knob_range.log, step=step)


def space_of(study: Study) -> dict[str, BaseDistribution]:
    """The study's space in Optuna's terms, by knob."""
    return {knob: distribution_of(knob_range) for knob, knob_range in study.space.items()}


def _is_inside(params: Mapping[str, Any], space: Mapping[str, BaseDistribution]) -> bool:
    """Whether Optuna can hold the point; the preset may lie outside the ranges that a study explores."""
    labels = {knob: _label(value) for knob, value in params.items()}
    try:
        create_trial(state=TrialState.RUNNING, params=labels, distributions=dict(space))
    except ValueError:
        return False
    return True


def _params_of(proposal: Mapping[str, Any], study: Study) -> dict[str, Any]:
    """A proposal with its choices turned back into the study's values, as JSON keeps them."""
    params = {}
    for knob, value in proposal.items():
        knob_range = study.space[knob]
        if isinstance(knob_range, Choice):
            value = next(choice for choice in knob_range.values if _label(choice) == value)
        params[knob] = list(value) if isinstance(value, tuple) else value
    return params


# ---------------------------------------------------------------------------------------------------- trials


def values_of(study: Study, trial: Trial) -> list[float] | None:
    """A complete trial's objectives, the score first; None where one is not known."""
    measured = [trial.measures.get(name) for name in study.search.also_minimize]
    values = [trial.value, *measured] if trial.state == ledger.COMPLETE else [None]
    return [value for value in values if value is not None] if None not in values else None


def frozen(study: Study, trial: Trial, space: Mapping[str, BaseDistribution]) -> FrozenTrial:
    """A ledger's trial in Optuna's terms.

    A point outside the space becomes a failed trial without parameters: it keeps its number and its value, as an
    attribute, and the sampler's model, which could not hold it, is not bent.
    """
    attributes = {search_view.NUMBER: trial.number, search_view.REASON: trial.reason}
    values = values_of(study, trial)
    if not _is_inside(trial.params, space) or (trial.state == ledger.COMPLETE and values is None):
        attributes |= {"caddie_params": json.dumps(trial.params), "caddie_value": trial.value}
        return create_trial(state=TrialState.FAIL, user_attrs=attributes)
    return create_trial(
        state=OPTUNA_STATES[trial.state],
        params={knob: _label(trial.params[knob]) for knob in space},
        distributions=dict(space),
        values=values,
        constraints=trial.constraints if values is not None else {},
        intermediate_values=trial.intermediate if not study.search.also_minimize else {},  # Optuna has none of several
        user_attrs=attributes,
    )


def learned(study: Study, trials: Mapping[int, Trial], space: Mapping[str, BaseDistribution]) -> list[FrozenTrial]:
    """The trials as a sampler should see them, by number.

    Excesses are shares of their limits, so that bytes do not drown seconds; every trial names the same constraints. A trial
    that failed by its point is infeasible and as bad as the worst; one that was pruned too, for a sampler that would not
    see it else and ask for it again.
    """
    found = [frozen(study, trials[n], space) for n in sorted(trials)]
    scored = [trial.values for trial in found if trial.state is TrialState.COMPLETE]
    worst = [max(column) for column in zip(*scored, strict=True)] or [0.0] * len(study.objectives)
    limits = study.limits
    names = sorted({name for trial in trials.values() for name in trial.constraints})
    has_failed = any(is_failed_by_point(trial) for trial in trials.values())
    seen = []
    for trial, view in zip([trials[n] for n in sorted(trials)], found, strict=True):
        failed = is_failed_by_point(trial) and _is_inside(trial.params, space)
        is_unseen = view.state is TrialState.PRUNED and study.search.sampler in MODELS_OF_COMPLETE
        excesses = {name: trial.constraints.get(name, 0.0) / limits.get(name, 1.0) for name in names}
        excesses |= {FAILED_CONSTRAINT: float(failed)} if has_failed else {}
        if failed or is_unseen or view.state is TrialState.COMPLETE:
            view = create_trial(
                state=TrialState.COMPLETE,
                params={knob: _label(trial.params[knob]) for knob in space},
                distributions=dict(space),
                values=view.values if view.state is TrialState.COMPLETE else worst,
                constraints=excesses,
            )
        seen.append(view)
    return seen


def is_failed_by_point(trial: Trial) -> bool:
    """Whether a trial failed because of where it lies, and not by the machine or the code."""
    return trial.state == ledger.FAILED and trial.failure in POINT_FAILURES


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


def propose(study: Study, trials: Mapping[int, Trial], number: int, *, salt: int = 0) -> dict[str, Any]:
    """The point of trial `number`, given the trials before it."""
    space, seed = space_of(study), seed_of(study.name, number, salt)
    if study.search.sampler == "qmc":
        return _propose_of_sequence(study, space, number + salt)
    if study.search.sampler == "grid":
        return _propose_of_grid(study, trials)
    seen = learned(study, trials, space) if study.search.sampler != "random" else []  # it learns nothing
    if study.search.sampler == "cmaes":
        complete = [trial for trial in seen if trial.state is TrialState.COMPLETE]
        if len(complete) >= study.search.startup_trials:
            return _params_of(evolution.propose(_numbers(study), [_as_seen(trial) for trial in complete], seed), study)
    scratch = optuna.create_study(directions=_directions(study), sampler=sampler_of(study, seed))
    scratch.add_trials(seen)
    return _params_of(scratch.ask(fixed_distributions=space).params, study)


def _directions(study: Study) -> list[StudyDirection]:
    return [StudyDirection.MINIMIZE] * len(study.objectives)


def _numbers(study: Study) -> dict[str, NumberRange]:
    """The space of a study that has numbers alone."""
    return {knob: found for knob, found in study.space.items() if isinstance(found, NumberRange)}


def _as_seen(trial: FrozenTrial) -> Seen:
    excess = sum(max(0.0, value) for value in trial.constraints.values())
    return Seen(params=trial.params, value=trial.values[0], excess=excess)


def _propose_of_grid(study: Study, trials: Mapping[int, Trial]) -> dict[str, Any]:
    """The first point, in an order of the study's own, that no trial has; the order's first where all are taken.

    Shuffled, because a grid that is cut off should have been everywhere.
    """
    columns = [[_as_json_value(value) for value in grid_values(found) or ()] for found in study.space.values()]
    points = [dict(zip(study.space, values, strict=True)) for values in itertools.product(*columns)]
    random.Random(seed_of(study.name, 0)).shuffle(points)
    taken = [trial.params for trial in trials.values()]
    return next((point for point in points if point not in taken), points[0])


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
    return _params_of(scratch.ask(fixed_distributions=space).params, study)


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
    done = [t for t in state.trials.values() if t.state == ledger.COMPLETE and _is_inside(t.params, space)]
    if len(done) < IMPORTANCE_TRIALS or len({t.value for t in done}) < 2 or not space:
        return {}
    scratch = optuna.create_study(direction="minimize", sampler=RandomSampler(seed=0))
    scratch.add_trials([_of_score(trial, space) for trial in done])
    return {knob: float(share) for knob, share in optuna.importance.get_param_importances(scratch).items()}


def _of_score(trial: Trial, space: Mapping[str, BaseDistribution]) -> FrozenTrial:
    """A complete trial with its score alone."""
    params = {knob: _label(trial.params[knob]) for knob in space}
    return create_trial(state=TrialState.COMPLETE, params=params, distributions=dict(space), value=trial.value)


# ---------------------------------------------------------------------------------------------------- the port


class Search:
    """Asks and tells in the order of the ledger, and keeps Optuna's view in step with it."""

    def __init__(self, study: Study, journal: Path, *, url: str = "") -> None:
        self.study = study
        self.space = space_of(study)
        self.trials: dict[int, Trial] = {}
        """As the ledger has them."""

        self.view = View(journal, name=study.name, directions=_directions(study), url=url)

    @property
    def problem(self) -> str | None:
        """Why the view does not show all of it; None where it does."""
        return self.view.problem

    def rebuild(self, state: StudyState) -> None:
        """Learn what the ledger says, and show it. Raises StorageError."""
        self.trials = dict(state.trials)
        self.view.rebuild(self._shown)

    def _shown(self) -> list[FrozenTrial]:
        return [frozen(self.study, self.trials[n], self.space) for n in sorted(self.trials)]

    def ask(self, number: int) -> dict[str, Any]:
        """The point of a new trial: the preset for number 0, else a proposal that repeats no trial, if there is one."""
        if number == 0:
            return _as_json(self.study.preset_params())
        known = [_as_json(trial.params) for trial in self.trials.values()]
        for salt in range(PERTURBATIONS):
            params = propose(self.study, self.trials, number, salt=salt)
            if params not in known:
                break
        return params

    def begin(self, trial: Trial) -> None:
        """Note a trial that the ledger holds by now."""
        self.trials[trial.number] = trial
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
        if _is_inside(trial.params, self.space):
            ended = frozen(self.study, trial, self.space)
            self.view.show(lambda view: search_view.end(view, trial.number, ended), self._shown)

    def importance(self) -> dict[str, float]:
        """See `knob_importance`."""
        return knob_importance(self.study, StudyState(trials=self.trials))


def _as_json(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same point as the ledger will give it back."""
    loaded: dict[str, Any] = json.loads(json.dumps(params))
    return loaded
