"""The search space of a study: a range for each knob, checked against the trainer's configuration."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ConfigError
from trainer.config import Config, knob_value, knobs, nearest, with_knobs

GRID_TOLERANCE = 1e-9
"""Share of a step by which a sum of steps may miss the upper bound, as 0.1 + 0.2 misses 0.3."""

GRID_DIGITS = 12
"""Decimals of a grid's values: 0.3, not 0.30000000000000004."""


@dataclass(frozen=True, kw_only=True)
class NumberRange:
    """A knob between two bounds, both included; `log` searches its logarithm, `step` a grid."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    is_integer: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A knob among named values."""

    values: tuple[Any, ...]


Range = NumberRange | Choice


def grid_values(knob_range: Range) -> tuple[Any, ...] | None:
    """Every value of a knob that a grid has; None for one between whose bounds there are endlessly many."""
    if isinstance(knob_range, Choice):
        return knob_range.values
    low, high, step = knob_range.low, knob_range.high, knob_range.step
    if step is None and not knob_range.is_integer:
        return None
    step = 1 if step is None else step
    count = math.floor((high - low) / step + GRID_TOLERANCE) + 1
    values = [low + n * step for n in range(count)]
    return tuple(map(int, values)) if knob_range.is_integer else tuple(round(value, GRID_DIGITS) for value in values)


Check = Callable[[Any], object]
"""Raises ConfigError for a value that cannot be run."""


def parse_range(knob: str, table: Mapping[str, Any], config: Config) -> Range:
    """Read one `[space."section.name"]` table; both ends must make a valid configuration. Raises ConfigError."""
    knob_value(config, knob)  # refuses an unknown knob with the nearest name
    return read_range(knob, table, kind=knobs()[knob], check=lambda value: with_knobs(config, {knob: value}))


def read_range(knob: str, table: Mapping[str, Any], *, kind: Any, check: Check) -> Range:
    """The same for a knob of any type whose values `check` knows."""
    place = f'[space."{knob}"]'
    if not isinstance(table, Mapping):
        raise ConfigError(f"{place} must be a table with low and high, or with choices; got {table!r}")
    known = ("choices",) if "choices" in table else ("low", "high", "log", "step")
    for key in table:
        if key not in known:
            raise ConfigError(f"{place} has no key {key!r}", hint=nearest(key, known))
    if "choices" in table:
        return _parse_choice(place, table["choices"], check)
    return _parse_numbers(knob, place, table, kind, check)


def _parse_choice(place: str, values: Any, check: Check) -> Choice:
    if not isinstance(values, list) or len(values) < 2:
        raise ConfigError(f"{place} choices must be a list of at least two values, got {values!r}")
    for value in values:
        _must_be_valid(place, value, check)
    if any(value in values[:n] for n, value in enumerate(values)):
        raise ConfigError(f"{place} choices names a value twice: {values!r}")
    return Choice(values=tuple(tuple(value) if isinstance(value, list) else value for value in values))


def _parse_numbers(knob: str, place: str, table: Mapping[str, Any], hint: Any, check: Check) -> NumberRange:
    if hint not in (int, float):
        name = getattr(hint, "__name__", str(typing.get_origin(hint) or hint))
        raise ConfigError(f"{place} {knob} is of type {name}", hint="give its values as choices = [...]")
    for key in ("low", "high"):
        if type(table.get(key)) not in (int, float):
            raise ConfigError(f"{place} needs a number {key}, got {table.get(key)!r}")
    low, high, log, step = table["low"], table["high"], table.get("log", False), table.get("step")
    if low >= high:
        raise ConfigError(f"{place} low {low} must be below high {high}")
    if not isinstance(log, bool):
        raise ConfigError(f"{place} log must be true or false, got {log!r}")
    if log and low <= 0:
        raise ConfigError(f"{place} log needs low above 0, got {low}")
    if step is not None and (type(step) not in (int, float) or not 0 < step <= high - low):
        raise ConfigError(f"{place} step must be a number above 0 and at most high - low, got {step!r}")
    if step is not None and hint is int and type(step) is not int:
        raise ConfigError(f"{place} {knob} takes whole numbers, and so must step; got {step!r}")
    if log and step is not None:
        raise ConfigError(f"{place} log and step cannot be combined; got step {step}")
    _must_be_valid(place, low, check)
    _must_be_valid(place, high, check)
    return NumberRange(low=low, high=high, log=log, step=step, is_integer=hint is int)


def _must_be_valid(place: str, value: Any, check: Check) -> None:
    try:
        check(value)
    except ConfigError as error:
        raise ConfigError(f"{place} reaches a value that cannot be run: {error}", hint=error.hint) from error
