"""Rungs: the tables [[rungs]] of a study's file, each the same search at a cost of its own, and the tables of one of them.

The study itself is the last rung. A rung's own text is the file's with a first line that names the rung.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import ConfigError
from trainer.config import nearest

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
OWN_LINE = re.compile(r'\Arung = "[^"\n]*"\n')
GPU_COUNTS = ("gpus_per_run", "gpus_per_node")
"""Keys of [resources] that say the same: a rung that names one does not take over the other."""

RESOURCES = (*GPU_COUNTS, "nodes", "slots", "processes_per_run", "timeout_minutes")
"""Keys of [resources] that a rung may have of its own."""

CLIMBING = ("promote", "trials", "least_rank_correlation")
"""Keys that say how points come up to a rung; the first has none."""

EXCLUDED = ("script", "from", "interleave", "factors", "noise", "stage")
TRANSFERS = "transfers"
"""Key of a knob's table in [space]: whether its best value at one cost says anything of another."""

FEWEST_PAIRS = 4
"""Points that two rungs must share before a correlation between them is told."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One table of [[rungs]]."""

    name: str
    set: dict[str, Any] = field(default_factory=dict)
    """Knobs of this rung, laid over the preset and the study's own [set]."""

    resources: dict[str, Any] = field(default_factory=dict)
    """What of [resources] is this rung's own."""

    promote: int = 0
    """Best points of the rung below that go up, beside the preset; 0 on the first rung."""

    trials: int = 0
    """Total number of trials; those beyond the preset and the promoted are asked by the sampler. 0 on the first rung, whose
    number is that of [search].
    """

    least_rank_correlation: float | None = None
    """Spearman's between the rung below and the one below that, under which this rung is not begun; None to begin always."""


def text_of(text: str, name: str) -> str:
    """The text from which one rung's study is read: what its ledger holds."""
    return f'rung = "{name}"\n{text}'


def whole_text(text: str) -> str:
    """The file's text of a rung's."""
    return OWN_LINE.sub("", text)


def study_name(ladder: str, rungs: Sequence[Rung], number: int) -> str:
    """Name of a rung's study: the last one has the ladder's."""
    return ladder if number == len(rungs) - 1 else f"{ladder}-{rungs[number].name}"


def parse_rungs(tables: Mapping[str, Any]) -> tuple[Rung, ...]:
    """The rungs that a study's tables name, the cheapest first; raises ConfigError."""
    for key in EXCLUDED:
        if key in tables:
            raise ConfigError(
                f"[[rungs]] and {key} exclude one another", hint="a ladder is a search: [space] and [search]"
            )
    if not isinstance(tables.get("set", {}), Mapping):
        raise ConfigError(f"[set] must be a table of knobs, got {tables['set']!r}")
    found = tables["rungs"]
    if not isinstance(found, list) or not all(isinstance(entries, Mapping) for entries in found):
        raise ConfigError(f"rungs must be tables [[rungs]], got {found!r}", hint='[[rungs]]\nname = "proxy"')
    if len(found) < 2:
        raise ConfigError(f"a ladder needs two rungs, got {len(found)}", hint="leave [[rungs]] out, or add another")
    rungs = tuple(_rung(entries, number) for number, entries in enumerate(found))
    names = [rung.name for rung in rungs]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ConfigError(f"[[rungs]] names {name!r} twice", hint="each rung's study is called by the rung's name")
    for number, rung in enumerate(rungs):
        _check_threshold(rungs, number, rung)
        _check_set(rung, tables.get("space", {}))
    return rungs


def _rung(entries: Mapping[str, Any], number: int) -> Rung:
    known = ("name", "set", *RESOURCES, *CLIMBING)
    name = entries.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        got = f"got {name!r}" if "name" in entries else f"the {number + 1}. has none"
        raise ConfigError(f"[[rungs]] name must be lower-case letters, digits, '.', '_', '-', {got}")
    for key in entries:
        if key not in known:
            raise ConfigError(f"rung {name!r} has no key {key!r}", hint=nearest(key, known))
        if key in CLIMBING and not number:
            hint = "trials of the first rung are those of [search]" if key == "trials" else "leave it out"
            raise ConfigError(
                f"rung {name!r} is the first, nothing comes up to it: {key} = {entries[key]!r}", hint=hint
            )
    if not isinstance(entries.get("set", {}), Mapping):
        raise ConfigError(f"rung {name!r}: set must be a table of knobs, got {entries['set']!r}")
    resources = {key: entries[key] for key in RESOURCES if key in entries}
    own = Rung(name=name, set=dict(entries.get("set", {})), resources=resources)
    if not number:
        return own
    promote = _count(name, "promote", entries.get("promote"), least=1)
    trials = _count(name, "trials", entries.get("trials", promote + 1), least=promote + 1)
    return dataclasses.replace(own, promote=promote, trials=trials, least_rank_correlation=_least(name, entries))


def _count(name: str, key: str, value: Any, *, least: int) -> int:
    if type(value) is not int or value < least:
        rule = "promote + 1, the preset's included" if key == "trials" else str(least)
        got = "nothing" if value is None else repr(value)
        raise ConfigError(
            f"rung {name!r}: {key} must be a whole number of at least {rule}, got {got}",
            hint=f"{key} = {max(3, least)}",
        )
    return value


def _least(name: str, entries: Mapping[str, Any]) -> float | None:
    value = entries.get("least_rank_correlation")
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or not -1 <= value <= 1:
        raise ConfigError(f"rung {name!r}: least_rank_correlation must lie between -1 and 1, got {value!r}")
    return float(value)


def _check_threshold(rungs: Sequence[Rung], number: int, rung: Rung) -> None:
    """A threshold needs two rungs below that share enough points."""
    if rung.least_rank_correlation is None:
        return
    if number < 2:
        raise ConfigError(
            f"rung {rung.name!r}: least_rank_correlation needs two rungs below, whose agreement is measured",
            hint="leave it out, or put a rung between",
        )
    below = rungs[number - 1]
    if below.promote + 1 < FEWEST_PAIRS:
        raise ConfigError(
            f"rung {rung.name!r}: least_rank_correlation needs {FEWEST_PAIRS} points on both rungs below, {below.name!r} "
            f"shares {below.promote + 1} with the one below it, the preset included",
            hint=f"promote = {FEWEST_PAIRS - 1} or more on {below.name!r}",
        )


def _check_set(rung: Rung, space: Any) -> None:
    for knob in rung.set:
        if isinstance(space, Mapping) and knob in space:
            raise ConfigError(
                f"rung {rung.name!r} sets {knob}, which [space] searches",
                hint="leave it out of one of the two: every rung searches the same space",
            )


def require_points(rungs: Sequence[Rung], trials: int) -> None:
    """Raise ConfigError where a rung promotes more points than the one below, the first with `trials`, can have."""
    for below, rung in itertools.pairwise(rungs):
        points = (below.trials or trials) - 1
        if rung.promote > points:
            raise ConfigError(
                f"rung {rung.name!r}: promote is {rung.promote}, and {below.name!r} has {points} points beside the preset",
                hint=f"promote = {points}" if points else f"give {below.name!r} more trials",
            )


def split_space(space: Any) -> tuple[Any, tuple[str, ...]]:
    """[space] without its marks of transfer, and the knobs that do not transfer; raises ConfigError."""
    if not isinstance(space, Mapping):
        return space, ()
    stays = []
    for knob, entries in space.items():
        mark = entries.get(TRANSFERS, True) if isinstance(entries, Mapping) else True
        if not isinstance(mark, bool):
            raise ConfigError(f'[space."{knob}"] {TRANSFERS} must be true or false, got {mark!r}')
        stays += [] if mark else [knob]
    if space and len(stays) == len(space):
        raise ConfigError(
            "[[rungs]] no knob of [space] transfers, so that no point could go up",
            hint=f"leave {TRANSFERS} = false out of one, or leave [[rungs]] out",
        )
    plain = {
        knob: {key: value for key, value in entries.items() if key != TRANSFERS}
        if isinstance(entries, Mapping)
        else entries
        for knob, entries in space.items()
    }
    return plain, tuple(stays)


def tables_of(tables: Mapping[str, Any], rungs: Sequence[Rung], number: int) -> dict[str, Any]:
    """The tables of one rung as those of an ordinary study.

    Trials are stopped early on the first rung alone, since points of the others are compared as wholes, and confirmed on
    the last.
    """
    rung = rungs[number]
    own = {key: value for key, value in tables.items() if key not in ("rungs", "rung")}
    if isinstance(own.get("name"), str):
        own["name"] = study_name(own["name"], rungs, number)
    own["set"] = {**tables.get("set", {}), **rung.set}
    own["space"] = split_space(tables.get("space"))[0]
    own["resources"] = _resources(tables.get("resources", {}), rung)
    if number:
        own.pop("stop_early", None)
        own["search"] = (
            {**tables["search"], "trials": rung.trials} if isinstance(tables.get("search"), Mapping) else None
        )
    if number < len(rungs) - 1:
        own.pop("confirm", None)
    return own


def _resources(common: Any, rung: Rung) -> Any:
    if not isinstance(common, Mapping):
        return common
    is_counted = any(key in rung.resources for key in GPU_COUNTS)
    kept = {key: value for key, value in common.items() if not (is_counted and key in GPU_COUNTS)}
    return {**kept, **rung.resources}


def in_words(rung: Rung) -> str:
    """A rung's own settings, for people."""
    entries = {**rung.resources, **rung.set}
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in entries.items()) or "as the study has it"
