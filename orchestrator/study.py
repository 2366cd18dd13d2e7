"""Study files: a question in TOML, read strictly and checked completely before anything is submitted."""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import ConfigError
from orchestrator.home import SHIPPED_STUDIES
from orchestrator.space import Range, parse_range
from trainer.config import Config, from_mapping, knob_value, nearest, with_knobs
from trainer.protocol import POST_EMA, SLIDING, STAGES, TTT

T = TypeVar("T")

# Without "cmaes": its state lies in Optuna's storage alone, and would not survive the controller.
SAMPLERS = ("tpe", "random", "qmc", "gp")
LAUNCHERS = ("local",)
MAX_SEED = 2**63 - 1  # what torch and numpy both take
SCORING = ("ttt.", "evaluation.")  # knobs that matter where a stored model is only scored


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """How the space is searched."""

    trials: int
    """Total number of trials, the preset's included; running the study again continues to this total.

    0 in a record attempt, which has no [search], no [space] and only the confirmation of its preset.
    """

    seeds: tuple[int, ...] = (1,)
    """Seeds of every trial; kept apart from the confirmation's, or its result would be selected on them."""

    sampler: str = "tpe"
    """One of SAMPLERS."""

    startup_trials: int = 4
    """Random trials before the sampler's model is used."""

    objective: str = TTT
    """Stage whose bits per byte is minimised; see trainer.protocol.STAGES."""


@dataclass(frozen=True, kw_only=True)
class StopEarlyPlan:
    """When a running trial is given up: its training loss at a part of its schedule is above the median of the others'."""

    at_fracs: tuple[float, ...] = (0.5,)
    """Fractions of the schedule at which the trial is compared: of its steps, or of its seconds, by schedule.clock."""

    startup_trials: int = 4
    """Finished trials before any is stopped."""

    @property
    def per_milles(self) -> tuple[int, ...]:
        """The same, rising and in thousandths: whole numbers name the points in the ledger and in Optuna."""
        return tuple(sorted({round(1000 * frac) for frac in self.at_fracs}))


@dataclass(frozen=True, kw_only=True)
class ConfirmPlan:
    """Seeds on which the best point and the unchanged preset are run at the end."""

    seeds: tuple[int, ...] = (42, 314, 999)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a run takes and where it runs."""

    launcher: str = "local"
    """`local`: this machine, through submitit's local executor."""

    slots: int = 2
    """Runs at a time on a machine without GPUs; with GPUs it is the number of GPUs over `gpus_per_run`."""

    gpus_per_run: int = 0
    """GPUs of one run, each with one process under torchrun; 0 runs on the CPU."""

    processes_per_run: int = 1
    """Processes of one run on the CPU, under torchrun where more than one."""

    timeout_minutes: float = 60.0
    """Wall-clock after which an attempt is ended from outside."""

    max_attempts: int = 3
    """Attempts of a run whose failures were the machine's."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """One question, its space and its budget."""

    name: str
    question: str
    preset: str
    config: Config
    """The preset with the study's own [set]."""

    data: str
    """Data set by name under CADDIE_HOME/data, or a path."""

    space: dict[str, Range]
    search: SearchPlan
    stop_early: StopEarlyPlan | None
    confirm: ConfirmPlan | None
    resources: Resources
    source: str
    """The file's text."""

    from_run: str = ""
    """Run whose stored model every run of the study scores again; empty where they train."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    def config_of(self, params: Mapping[str, Any]) -> Config:
        """The configuration of one point of the space; raises ConfigError."""
        return with_knobs(self.config, params)

    def preset_params(self) -> dict[str, Any]:
        """The point that is the unchanged preset."""
        return {knob: knob_value(self.config, knob) for knob in self.space}

    def warnings(self) -> list[str]:
        """What can be run but weakens the result."""
        found = []
        shared = sorted(set(self.search.seeds) & set(self.confirm.seeds)) if self.confirm else []
        if shared and self.space:
            found.append(
                f"seeds {shared} are searched and confirmed: the best point was selected on them, its mean is biased"
            )
        if self.confirm and len(self.confirm.seeds) < 3:
            found.append(f"confirmation on {len(self.confirm.seeds)} of the three seeds that a record needs")
        return found


def _table(cls: type[Any], values: Any, place: str) -> Any:
    """Build one table's dataclass, refusing unknown keys and wrong types."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place} must be a table, got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(f"{place} has no key {key!r}", hint=nearest(key, hints))
    for f in fields(cls):
        if f.default is MISSING and f.name not in values:
            raise ConfigError(f"{place} needs {f.name}")
    return cls(**{key: _typed(value, hints[key], f"{place} {key}") for key, value in values.items()})


def _typed(value: Any, hint: Any, place: str) -> Any:
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list) or not value:
            raise ConfigError(f"{place} must be a list with at least one value, got {value!r}")
        items = tuple(_typed(item, typing.get_args(hint)[0], place) for item in value)
        if len(set(items)) < len(items):
            raise ConfigError(f"{place} names a value twice: {value}")
        return items
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{place} must be of type {hint.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place} must be finite, got {value!r}")
    return value


def _require(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"{rule}, got {got!r}")


def _check(study: Study) -> None:
    """The rules that single tables cannot know."""
    search, resources = study.search, study.resources
    _require(
        bool(re.fullmatch(r"[a-z0-9][a-z0-9._-]*", study.name)),
        "name must be lower-case letters, digits, '.', '_', '-'",
        study.name,
    )
    if study.space:
        _require(search.trials >= 1, "[search] trials must be at least 1", search.trials)
        _require(search.startup_trials >= 1, "[search] startup_trials must be at least 1", search.startup_trials)
    for place, value, known in (
        ("[search] sampler", search.sampler, SAMPLERS),
        ("[search] objective", search.objective, STAGES),
        ("[resources] launcher", resources.launcher, LAUNCHERS),
    ):
        if value not in known:
            raise ConfigError(f"{place} must be one of {', '.join(known)}, got {value!r}", hint=nearest(value, known))
    if search.objective == TTT and study.config.ttt.method == "off":
        raise ConfigError('[search] objective is "ttt", but ttt.method is "off"', hint='take objective = "sliding"')
    for place, seeds in (("[search]", search.seeds), ("[confirm]", study.confirm.seeds if study.confirm else ())):
        for seed in seeds:
            _require(0 <= seed <= MAX_SEED, f"{place} seeds must lie between 0 and {MAX_SEED}", seed)
    if study.from_run:
        _check_scoring(study)
    if study.stop_early:
        _require(
            study.stop_early.startup_trials >= 1,
            "[stop_early] startup_trials must be at least 1",
            study.stop_early.startup_trials,
        )
        for frac in study.stop_early.at_fracs:
            _require(0.001 <= frac <= 0.999, "[stop_early] at_fracs must lie between 0.001 and 0.999", frac)
    for name, low in (("slots", 1), ("gpus_per_run", 0), ("processes_per_run", 1), ("max_attempts", 1)):
        _require(
            getattr(resources, name) >= low, f"[resources] {name} must be at least {low}", getattr(resources, name)
        )
    _require(resources.timeout_minutes > 0, "[resources] timeout_minutes must be above 0", resources.timeout_minutes)


def _check_scoring(study: Study) -> None:
    """The rules of a study that trains nothing."""
    for knob in study.space:
        if not knob.startswith(SCORING):
            raise ConfigError(
                f"[space] {knob} cannot matter where a stored model is only scored (from = {study.from_run!r}); "
                f"only {' and '.join(SCORING)}* can",
                hint="leave it out, or leave out `from`",
            )
    _require(study.stop_early is None, "[stop_early] needs training, `from` leaves none", study.stop_early)
    _require(study.search.objective != POST_EMA, "[search] objective must be one of the stored model's", POST_EMA)


def load_preset(name: str) -> Config:
    """The configuration of a preset: a shipped name, or the path of a TOML file. Raises ConfigError with its place."""
    presets = SHIPPED_STUDIES / "presets"
    path = Path(name) if name.endswith(".toml") else presets / f"{name}.toml"
    if not path.is_file():
        known = sorted(p.stem for p in presets.glob("*.toml"))
        raise ConfigError(f"there is no preset {name!r}", hint=nearest(Path(name).stem, known))
    return _at(path, lambda: from_mapping(_parse_toml(_text_of(path))))


def parse_study(text: str) -> Study:
    """Read and check a study's text; raises ConfigError that names the table, the value and the rule."""
    tables = _parse_toml(text)
    known = (
        "name", "question", "preset", "data", "from", "set", "space", "search", "stop_early", "confirm", "resources",
    )  # fmt: skip
    for key in tables:
        if key not in known:
            raise ConfigError(f"a study has no key {key!r}", hint=nearest(key, known))
    for key in ("name", "question", "preset", "data"):
        if not isinstance(tables.get(key), str) or not tables[key]:
            got = f", got {tables[key]!r}" if key in tables else ""
            raise ConfigError(f'a study needs {key} = "..."{got}')
    if not isinstance(tables.get("from", ""), str):
        raise ConfigError(f"from must be the id of a run in quotes, got {tables['from']!r}")
    is_record = "confirm" in tables and not {"space", "search", "stop_early"} & set(tables)
    for key in () if is_record else ("space", "search"):
        if not isinstance(tables.get(key), Mapping) or not tables[key]:
            raise ConfigError(
                f"a study needs a table [{key}] with entries",
                hint="[space] and [search] together, or [confirm] alone for a record attempt",
            )
    config = with_knobs(load_preset(tables["preset"]), tables.get("set", {}))
    if is_record:
        tables |= {"space": {}, "search": {"trials": 0, "objective": SLIDING if config.ttt.method == "off" else TTT}}
    study = Study(
        name=tables["name"], question=tables["question"], preset=tables["preset"], config=config, data=tables["data"],
        space={knob: parse_range(knob, table, config) for knob, table in tables["space"].items()},
        search=_table(SearchPlan, tables["search"], "[search]"),
        stop_early=_table(StopEarlyPlan, tables["stop_early"], "[stop_early]") if "stop_early" in tables else None,
        confirm=_table(ConfirmPlan, tables["confirm"], "[confirm]") if "confirm" in tables else None,
        resources=_table(Resources, tables.get("resources", {}), "[resources]"), source=text,
        from_run=tables.get("from", ""),
    )  # fmt: skip
    _check(study)
    return study


def record_study(
    preset: str,
    *,
    data: str,
    seeds: tuple[int, ...],
    knobs: Mapping[str, Any],
    resources: Mapping[str, Any] | None = None,
    name: str | None = None,
    from_run: str = "",
) -> Study:
    """A record attempt: one configuration on the given seeds, as a study without a search. Raises ConfigError.

    With `from_run` its stored model is scored again, and nothing is trained. The study's name, where none is given, follows from what is asked, so that the same command continues the same attempt.
    """
    asked = [preset, data, sorted(seeds), {knob: repr(value) for knob, value in sorted(knobs.items())}]
    digest = hashlib.sha256(json.dumps([*asked, *([from_run] if from_run else [])]).encode()).hexdigest()[:8]
    stem = re.sub(r"[^a-z0-9._-]", "-", Path(preset).stem.lower()).lstrip("._-") or "record"
    tables: dict[str, Any] = {
        "name": name or f"record-{stem}-{digest}",
        "question": f"What does {f'run {from_run}' if from_run else preset} score on seeds {', '.join(map(str, seeds))}?",
        "preset": preset,
        "data": data,
        **({"from": from_run} if from_run else {}),
    }
    lines = [f"{key} = {_as_toml(value)}" for key, value in tables.items()]
    for table, entries in (("set", knobs), ("confirm", {"seeds": seeds}), ("resources", resources or {})):
        if entries:
            lines += ["", f"[{table}]", *(f"{_as_toml(key)} = {_as_toml(value)}" for key, value in entries.items())]
    return parse_study("\n".join(lines) + "\n")


def _as_toml(value: Any) -> str:
    """A value as TOML writes it; the escapes of its strings are JSON's."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_as_toml(item) for item in value) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def load_study(path: Path) -> Study:
    """Read and check a study file; raises ConfigError with the file's name."""
    if not path.is_file():
        known = sorted(p.stem for p in SHIPPED_STUDIES.glob("*.toml"))
        shipped = SHIPPED_STUDIES / f"{path.name}.toml"
        if shipped.is_file():
            path = shipped
        else:
            fault = "is a folder, not a study file" if path.is_dir() else "there is no such study file"
            raise ConfigError(f"{path}: {fault}", hint=nearest(path.stem, known))
    return _at(path, lambda: parse_study(_text_of(path)))


def _text_of(path: Path) -> str:
    """A file's text; raises ConfigError where it has none. Some editors put a byte-order mark before it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}", hint="save the file as UTF-8"
        ) from error


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}") from error


def _at(path: Path, read: Callable[[], T]) -> T:
    """Put the file's name before an error's message."""
    try:
        return read()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", hint=error.hint) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
