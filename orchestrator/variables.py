"""Environment variables as knobs, `env.MUON_WD`: what a study sets and searches of somebody's own script.

A variable that the script does not look at changes nothing, so it is refused with the nearest name that it looks at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.lookups import BOOL, FLOAT, INT, TEXT, Lookup
from orchestrator.script import Script
from orchestrator.space import Choice, NumberRange, Range, read_range
from trainer.config import Config, nearest, parse_value, with_knobs

PREFIX = "env."
SEED = "SEED"
OWN = {SEED: "the study's seeds give it", "RUN_ID": "it is the run's own id"}
"""Variables that a study cannot set, and why."""

STEP_SECONDS = 0.5  # a script looks at its clock after the step in which it passes the limit
WALLCLOCK, ITERATIONS, BATCH_TOKENS = "MAX_WALLCLOCK_SECONDS", "ITERATIONS", "TRAIN_BATCH_TOKENS"
"""What scripts of the challenge call their limit, their length and their batch."""

TYPES = {INT: int, FLOAT: float, BOOL: bool, TEXT: str}


@dataclass(frozen=True, kw_only=True)
class ScriptPlan:
    """A script, and what a study sets of it."""

    script: Script
    env: Mapping[str, str]
    """Text by variable, of those that the study sets."""

    config: Config
    """What the orchestrator itself must know: the limits, the planned steps and the tokens of one."""

    def pack(self, config: Config | None) -> bytes:
        """What runs execute: the script as it is, whatever their configuration."""
        return self.script.content

    def values_of(self, params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The configuration of one point of the space, as a run's spec keeps it."""
        variables = {name_of(knob): text_of(value) for knob, value in params.items()}
        tokens = self.text(BATCH_TOKENS, variables)
        return {
            "env": dict(sorted({**self.env, **variables}.items())),
            "data": {"tokens_per_step": int(tokens) if tokens.isdecimal() else 0},
            "limits": dataclasses.asdict(self.config.limits),
        }

    def text(self, name: str, changed: Mapping[str, str] | None = None) -> str:
        """What the script will see of a variable; empty where only it knows."""
        lookup = self.script.lookup(name)
        default = lookup.default if lookup and lookup.default is not None else ""
        return {**self.env, **(changed or {})}.get(name, default)

    def preset_value(self, knob: str, knob_range: Range) -> Any:
        """A knob's value in the script as it is. Raises ConfigError where only the running script knows it."""
        name = name_of(knob)
        text = self.text(name)
        if not text:
            raise ConfigError(
                f'[space."{knob}"] what {name} is without the study is not known: the script says '
                + (
                    repr(lookup.default_source)
                    if (lookup := self.script.lookup(name)) and lookup.default_source
                    else "nothing"
                ),
                hint=f'name it: [set] "{knob}" = ...',
            )
        if isinstance(knob_range, Choice):
            return next((value for value in knob_range.values if text_of(value) == text), text)
        return _number(knob, text, is_integer=isinstance(knob_range, NumberRange) and knob_range.is_integer)


def _number(knob: str, text: str, *, is_integer: bool) -> float:
    try:
        return int(text) if is_integer else float(text)
    except ValueError as error:
        raise ConfigError(
            f'[space."{knob}"] low and high are for numbers, {name_of(knob)} is {text!r} without the study',
            hint="give its values as choices = [...]",
        ) from error


def is_variable(knob: str) -> bool:
    return knob.startswith(PREFIX)


def name_of(knob: str) -> str:
    """The variable that a knob is."""
    return knob.removeprefix(PREFIX)


def text_of(value: Any) -> str:
    """A value as scripts read it: they take switches as 0 and 1."""
    return str(int(value)) if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)


def plan(script: Script, settings: Mapping[str, Any]) -> ScriptPlan:
    """A script with a study's `[set]`: variables of its own, and the orchestrator's limits. Raises ConfigError."""
    for knob, value in settings.items():
        if is_variable(knob):
            require(script, knob, value)
        elif not knob.startswith("limits."):
            raise ConfigError(
                f"[set] {knob} is a knob of the shared trainer; a script has its environment variables alone, and limits.*",
                hint=f'write its own variable: "{PREFIX}{nearest_variable(script, knob)}" = ...',
            )
    env = {name_of(knob): text_of(value) for knob, value in settings.items() if is_variable(knob)}
    made = ScriptPlan(script=script, env=env, config=Config())
    limits = {knob: value for knob, value in settings.items() if not is_variable(knob)}
    return dataclasses.replace(made, config=with_knobs(_known(made), limits))


def _known(made: ScriptPlan) -> Config:
    """The configuration as far as the script's variables tell it; what they do not is left to its default."""
    config = Config()
    for name, knob in (
        (WALLCLOCK, "limits.train_seconds"),
        (ITERATIONS, "schedule.steps"),
        (BATCH_TOKENS, "data.tokens_per_step"),
    ):
        try:
            value = parse_value(knob, made.text(name))
            value += STEP_SECONDS if name == WALLCLOCK and value > 0 else 0
            config = with_knobs(config, {knob: value})
        except ConfigError:
            continue
    return config


def require(script: Script, knob: str, value: Any) -> None:
    """Raise ConfigError for a variable that cannot be set, or a value that the script cannot read."""
    name = name_of(knob)
    if name in OWN:
        raise ConfigError(f"{knob} cannot be set: {OWN[name]}", hint="leave it out")
    if name in script.lookups.written:
        raise ConfigError(
            f"{knob} would change nothing: {script.name} sets {name} itself", hint="change the script, or leave it out"
        )
    lookup = script.lookup(name)
    if lookup is None:
        if script.is_opaque:
            return  # its reads are traced when it runs
        raise ConfigError(
            f"{knob} would change nothing: {script.name} never looks at {name}",
            hint=nearest(name, script.lookups.found),
        )
    _require_readable(lookup, knob, value)


def _require_readable(lookup: Lookup, knob: str, value: Any) -> None:
    text = text_of(value)
    try:
        if lookup.kind == INT:
            int(text)
        elif lookup.kind == FLOAT:
            float(text)
    except ValueError as error:
        raise ConfigError(
            f"{knob} must be of type {lookup.kind}, as line {lookup.line} of the script reads it; got {value!r}",
            hint=f"its default is {lookup.default_source or 'not given'}",
        ) from error


def nearest_variable(script: Script, knob: str) -> str:
    """The variable that a knob of the shared trainer may mean."""
    known = list(script.lookups.found)
    wanted = knob.rpartition(".")[2].upper()
    return next((name for name in known if wanted in name or name in wanted), known[0] if known else "NAME")


def range_of(script: Script, knob: str, table: Mapping[str, Any]) -> Range:
    """Read one `[space."env.NAME"]` table. Raises ConfigError."""
    if not is_variable(knob):
        raise ConfigError(
            f'[space."{knob}"] is a knob of the shared trainer; a script has its environment variables alone',
            hint=f'[space."{PREFIX}{nearest_variable(script, knob)}"]',
        )
    lookup = script.lookup(name_of(knob))
    ends = [table.get(end) for end in ("low", "high", "step")] if isinstance(table, Mapping) else []
    is_whole = all(type(end) is int for end in ends if end is not None)
    kind: Any = TYPES[lookup.kind] if lookup else float
    # A text or a switch may be a number to the script all the same: its range says which.
    kind = (int if is_whole else float) if kind in (str, bool) or (lookup is None and is_whole) else kind
    return read_range(knob, table, kind=kind, check=lambda value: require(script, knob, value))
