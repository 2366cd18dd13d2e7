"""Points of a study's space, and trials at them, in Optuna's terms."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from orchestrator import ledger, search_view
from orchestrator.ledger import Trial
from orchestrator.space import Choice, Range
from orchestrator.study import Study

OPTUNA_STATES = {
    ledger.RUNNING: TrialState.RUNNING,
    ledger.COMPLETE: TrialState.COMPLETE,
    ledger.PRUNED: TrialState.PRUNED,
    ledger.FAILED: TrialState.FAIL,
}


def label(value: Any) -> str | int | float | bool:
    """A choice as Optuna stores it: it takes no lists."""
    return json.dumps(list(value)) if isinstance(value, (tuple, list)) else value


def distribution_of(knob_range: Range) -> BaseDistribution:
    """A knob's range in Optuna's terms."""
    if isinstance(knob_range, Choice):
        return CategoricalDistribution([label(value) for value in knob_range.values])
    low, high, step = knob_range.low, knob_range.high, knob_range.step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a grid that ends below `high` is what the study's author wrote
        if knob_range.is_integer:
            return IntDistribution(int(low), int(high), log=knob_range.log, step=int(step or 1))
        return FloatDistribution(float(low), float(high), log=knob_range.log, step=step)


def space_of(study: Study) -> dict[str, BaseDistribution]:
    """The study's space in Optuna's terms, by knob."""
    return {knob: distribution_of(knob_range) for knob, knob_range in study.space.items()}


def is_inside(params: Mapping[str, Any], space: Mapping[str, BaseDistribution]) -> bool:
    """Whether Optuna can hold the point; the preset may lie outside the ranges that a study explores."""
    labels = {knob: label(value) for knob, value in params.items()}
    try:
        create_trial(state=TrialState.RUNNING, params=labels, distributions=dict(space))
    except ValueError:
        return False
    return True


def params_of(proposal: Mapping[str, Any], study: Study) -> dict[str, Any]:
    """A proposal with its choices turned back into the study's values, as JSON keeps them."""
    params = {}
    for knob, value in proposal.items():
        knob_range = study.space[knob]
        if isinstance(knob_range, Choice):
            value = next(choice for choice in knob_range.values if label(choice) == value)
        params[knob] = list(value) if isinstance(value, tuple) else value
    return params


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
    if not is_inside(trial.params, space) or (trial.state == ledger.COMPLETE and values is None):
        attributes |= {"caddie_params": json.dumps(trial.params), "caddie_value": trial.value}
        return create_trial(state=TrialState.FAIL, user_attrs=attributes)
    return create_trial(
        state=OPTUNA_STATES[trial.state],
        params={knob: label(trial.params[knob]) for knob in space},
        distributions=dict(space),
        values=values,
        constraints=trial.constraints if values is not None else {},
        intermediate_values=trial.intermediate if not study.search.also_minimize else {},  # Optuna has none of several
        user_attrs=attributes,
    )


def as_json(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same point as the ledger will give it back."""
    loaded: dict[str, Any] = json.loads(json.dumps(params))
    return loaded
