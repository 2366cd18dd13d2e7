"""A ladder of three rungs on the fakes: its text, and a climb that runs each rung with a controller on fakes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fakes import FakeLauncher, FakeSearch, scored
from make_controller import controller

from orchestrator import climb, ladder, ledger
from orchestrator.climb import End
from orchestrator.home import Home
from orchestrator.ledger import COMPLETE, StudyState, Trial
from orchestrator.study import Study
from orchestrator.study_file import parse_study
from orchestrator.sweep import Controller
from trainer.protocol import Result

DECAY, EMA = "optim.muon_weight_decay", "optim.ema_decay"
RUNGS = """
[[rungs]]
name = "proxy"
[rungs.set]
"limits.train_seconds" = 12

[[rungs]]
name = "mid"
promote = 3
[rungs.set]
"limits.train_seconds" = 60

[[rungs]]
name = "full"
promote = 2
"""


def ladder_text(
    *, rungs: str = RUNGS, trials: int = 6, ema: str = "transfers = false", extra: str = "", confirm: str = "[42, 314]",
    settings: str = "", resources: str = "",
) -> str:  # fmt: skip
    return f"""
name = "tiny"
question = "Which?"
preset = "smoke"
data = "nothing"

[set]
"schedule.steps" = 120
"{DECAY}" = 0.09
"{EMA}" = 0.9
{settings}

[space."{DECAY}"]
low = 0.01
high = 0.3

[space."{EMA}"]
low = 0.8
high = 0.999
{ema}

[search]
trials = {trials}

[stop_early]

[confirm]
seeds = {confirm}

[resources]
slots = 2
preflight = false
{resources}
{extra}
{rungs}
"""


def rungs_of_text(**changes: Any) -> tuple[Study, ...]:
    return ladder.rungs_of(parse_study(ladder_text(**changes)))


def point(number: int) -> dict[str, Any]:
    """Weight decay goes down from the preset's 0.09, by steps; the other knob moves as well."""
    return {DECAY: round(0.09 - 0.01 * number, 4), EMA: 0.9 if number == 0 else 0.9 + 0.01 * number}


def climb_with_fakes(
    home: Home, rungs: Sequence[Study], *, until: str = "", launcher: Callable[[Study], Any] = lambda _: FakeLauncher(),
    prepared: Callable[[Controller], Controller] = lambda found: found, notes: dict[str, list[str]] | None = None,
) -> End:  # fmt: skip
    """Climb, with what was told before each rung in `notes`, by the rung's name."""

    def run(study: Study, told: Sequence[str]) -> StudyState:
        if notes is not None:
            notes[study.rung_name] = list(told)
        search = FakeSearch(point=point)
        return prepared(controller(study, home, launcher=launcher(study), search=search)).run()

    return climb.climb(home, rungs, last=climb.number_of(rungs, until), run=run)


def scored_by(value: Callable[[float], float]) -> FakeLauncher:
    """A launcher whose runs score so by their weight decay."""

    def behave(run: Any, attempt: Any, spec: Any) -> Result:
        return scored(run, attempt, spec, bpb=value(spec.config["optim"]["muon_weight_decay"]))

    return FakeLauncher(behaviours={"*": behave})


def trials_of(
    *values: float | None, params: Callable[[int], dict[str, Any]] | None = None, **changes: dict[str, Any]
) -> StudyState:
    """A finished study's complete trials with these values, the preset first; `t2={...}` changes fields of the third."""
    found = [
        Trial(
            number=n, origin="sampler", params=(params or point)(n), runs={1: f"run-{n}"}, state=COMPLETE, value=value
        )
        for n, value in enumerate(values)
    ]
    for number, fields in changes.items():
        for name, value in fields.items():
            setattr(found[int(number.removeprefix("t"))], name, value)
    return StudyState(trials={trial.number: trial for trial in found}, closed=ledger.FINISHED)
