"""The ladder: a study's rungs as a chain of ordinary studies, and the points that go up from one to the next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator import enqueued, ledger
from orchestrator.errors import ConfigError
from orchestrator.home import Home
from orchestrator.ledger import Ledger, StudyState, Trial
from orchestrator.rungs import whole_text
from orchestrator.study import Study
from orchestrator.study_file import parse_ladder

ENDED = (ledger.FINISHED, ledger.SPENT)


@dataclass(frozen=True, kw_only=True)
class Promoted:
    """A point that goes up."""

    trial: int
    """Its number on the rung below."""

    value: float
    """Its value there, in bits per byte."""

    params: dict[str, Any]
    """As it is run on the rung above."""


def rungs_of(study: Study) -> tuple[Study, ...]:
    """The studies of the ladder, the cheapest first and the study itself last; an ordinary study alone."""
    return parse_ladder(whole_text(study.source)) if study.rungs else (study,)


def is_finished(study: Study, state: StudyState) -> bool:
    """Whether a rung has run all its trials."""
    return state.closed == ledger.FINISHED and len(state.trials) >= study.search.trials


def promote(home: Home, lower: Study, upper: Study) -> list[Promoted]:
    """Ask the rung above for the best points of the one below that has ended, and return them, the best first.

    What was promoted before is not asked for again. Raises ConfigError where the rung below has not ended, StorageError.
    """
    state = Ledger(home.study(lower.name).ledger).state()
    if state.closed not in ENDED:
        raise ConfigError(
            f"{lower.name} has not ended ({state.closed or 'left'}), no point of it goes up to {upper.name}",
            hint="give the study's command again: it goes on with that rung",
        )
    found = chosen(upper, state)
    points = [(point.params, f"trial {point.trial} of {lower.name}, {point.value:.5f} there") for point in found]
    enqueued.enqueue(home, upper, points)
    return found


def chosen(upper: Study, below: StudyState) -> list[Promoted]:
    """The points of the state below that go up: its best feasible ones, without the preset, which every rung runs anyway.

    A point takes the preset's value of what does not transfer. Of those that become the same the best goes up, once.
    """
    found: list[Promoted] = []
    seen = [as_stored(upper.preset_params())]
    for trial in filter(lambda trial: trial.number, ranked(below)):
        params = raised(upper, trial.params)
        if len(found) < (upper.rung.promote if upper.rung else 0) and params not in seen and _can_run(upper, params):
            seen.append(params)
            found.append(Promoted(trial=trial.number, value=trial.value or 0.0, params=params))
    return found


def raised(upper: Study, params: Mapping[str, Any]) -> dict[str, Any]:
    """A point of the rung below as the rung above runs it."""
    preset = upper.preset_params()
    return as_stored({**params, **{knob: preset[knob] for knob in upper.not_transferring}})


def as_stored(params: Mapping[str, Any]) -> dict[str, Any]:
    """A point as the ledger gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(params))
    return found


def ranked(state: StudyState) -> list[Trial]:
    """Complete, feasible trials, the best first and the earlier of equals."""
    done = [t for t in state.trials.values() if t.state == ledger.COMPLETE and t.is_feasible and t.value is not None]
    return sorted(done, key=lambda trial: (trial.value, trial.number))


def _can_run(study: Study, params: Mapping[str, Any]) -> bool:
    """Whether the knobs make a configuration with the rung's own."""
    try:
        study.config_of(params)
    except ConfigError:
        return False
    return True
