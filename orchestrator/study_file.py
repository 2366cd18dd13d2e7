"""Study files: a question in TOML, read strictly and checked completely before anything is submitted."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from orchestrator import rungs as ladders
from orchestrator import variables
from orchestrator.errors import ConfigError
from orchestrator.factors import NoisePlan, cells_of, parse_factors
from orchestrator.home import SHIPPED_STUDIES
from orchestrator.measures import MEASURES
from orchestrator.presets import load_preset
from orchestrator.script import read_script
from orchestrator.space import parse_range
from orchestrator.study import BudgetPlan, ConfirmPlan, InterleavePlan, Resources, SearchPlan, StopEarlyPlan, Study
from orchestrator.study_rules import check_study
from orchestrator.toml_text import parse_toml, text_of, within
from orchestrator.variables import ScriptPlan
from trainer.config import Config, nearest, with_knobs
from trainer.protocol import SLIDING, TTT

STUDY_FILE = "study.toml"  # of a study that is a folder


def load_study(path: Path) -> Study:
    """Read and check a study file; raises ConfigError with the file's name."""
    if not path.is_file():
        shipped = SHIPPED_STUDIES / path.name
        named = shipped.with_name(f"{path.name}.toml")
        places = (path / STUDY_FILE, named, shipped / STUDY_FILE, SHIPPED_STUDIES / path)
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            known = [p.stem for p in SHIPPED_STUDIES.glob("*.toml")]
            known += [p.parent.name for p in SHIPPED_STUDIES.glob(f"*/{STUDY_FILE}")]
            fault = (
                f"is a folder, not a study file, and holds no {STUDY_FILE}"
                if path.is_dir()
                else "there is no such study file"
            )
            raise ConfigError(f"{path}: {fault}", hint=nearest(path.stem, sorted(known)))
        path = found
    return within(path, lambda: parse_study(text_of(path), path.parent))


def parse_study(text: str, folder: Path = Path()) -> Study:
    """Read and check a study's text; raises ConfigError that names the table, the value and the rule.

    The path of a script is relative to `folder`. Of a ladder it is the rung that the text's first line names, else the last.
    """
    tables = parse_toml(text)
    if "rungs" not in tables:
        return _study(tables, text, folder)
    found = parse_ladder(ladders.whole_text(text))
    names = [rung.name for rung in found[-1].rungs]
    name = tables.get("rung", names[-1])
    if name not in names:
        raise ConfigError(f"there is no rung {name!r}", hint=nearest(str(name), names))
    return found[names.index(name)]


def parse_ladder(text: str) -> tuple[Study, ...]:
    """Every rung's study of a ladder's text, the cheapest first; raises ConfigError."""
    tables = parse_toml(text)
    if "rung" in tables:
        raise ConfigError(
            f"rung = {tables['rung']!r} is for the texts that caddie writes of a ladder's rungs",
            hint="leave it out: `--until RUNG` ends after a rung",
        )
    rungs = ladders.parse_rungs(tables)
    _, stays = ladders.split_space(tables.get("space"))
    last = len(rungs) - 1
    whole = dataclasses.replace(
        _study(ladders.tables_of(tables, rungs, last), text, Path()),
        rungs=rungs,
        rung_number=last,
        not_transferring=stays,
    )
    below = tuple(_below(tables, text, whole, number) for number in range(last))
    ladders.require_points(rungs, below[0].search.trials)
    return (*below, whole)


def _below(tables: Mapping[str, Any], text: str, whole: Study, number: int) -> Study:
    """A rung's study below the last; raises ConfigError with the rung's name."""
    rung = whole.rungs[number]
    try:
        study = _study(ladders.tables_of(tables, whole.rungs, number), ladders.text_of(text, rung.name), Path())
    except ConfigError as error:
        raise ConfigError(f"rung {rung.name!r}: {error}", hint=error.hint) from error
    gpus = study.resources.gpus_of_run
    return dataclasses.replace(
        study, rungs=whole.rungs, rung_number=number, not_transferring=whole.not_transferring,
        gpus_apart=gpus if gpus != whole.resources.gpus_of_run else 0,
    )  # fmt: skip


def _study(tables: dict[str, Any], text: str, folder: Path) -> Study:
    """One study of its tables; raises ConfigError."""
    known = (
        "name", "question", "preset", "data", "from", "set", "space", "search", "constraints", "stop_early", "confirm",
        "interleave", "budget", "resources", "script", "stage", "factors", "noise", "rungs",
    )  # fmt: skip
    for key in tables:
        if key not in known:
            raise ConfigError(f"a study has no key {key!r}", hint=nearest(key, known))
    _require_no_marks(tables.get("space"))
    script = _script(tables, folder) if "script" in tables else None
    if script:
        tables |= {"preset": script.script.name}
    for key in ("name", "question", "preset", "data"):
        if not isinstance(tables.get(key), str) or not tables[key]:
            got = f", got {tables[key]!r}" if key in tables else ""
            raise ConfigError(f'a study needs {key} = "..."{got}')
    sources, design = _sources(tables), _design(tables)
    tables |= {"confirm": tables.get("confirm", {})} if design else {}
    is_record = "confirm" in tables and not {"space", "search", "stop_early"} & set(tables)
    for key in () if is_record else ("space", "search"):
        if not isinstance(tables.get(key), Mapping) or not tables[key]:
            raise ConfigError(
                f"a study needs a table [{key}] with entries",
                hint="[space] and [search] together, or [confirm] alone for a record attempt",
            )
    config = script.config if script else with_knobs(load_preset(tables["preset"]), tables.get("set", {}))
    plan = _table(InterleavePlan, tables["interleave"], "[interleave]") if "interleave" in tables else None
    candidate = _candidate(plan, tables) if plan else None
    factors = parse_factors(tables["factors"], config) if "factors" in tables else ()
    if is_record:
        learns = all(found.ttt.is_scored for found in (config, candidate) if found is not None)
        learns = any(with_knobs(config, c.params).ttt.is_scored for c in cells_of(factors)) if factors else learns
        stage = script.script.last_stage if script else TTT if learns else SLIDING
        tables |= {"space": {}, "search": {"trials": 0, "objective": tables.get("stage", stage)}}
    elif "stage" in tables:
        raise ConfigError("stage is for a record attempt, this is a search", hint='write [search] objective = "..."')
    study = Study(
        name=tables["name"], question=tables["question"], preset=tables["preset"], config=config, data=tables["data"],
        space={
            knob: variables.range_of(script.script, knob, table) if script else parse_range(knob, table, config)
            for knob, table in tables["space"].items()
        },
        search=_table(SearchPlan, tables["search"], "[search]"),
        stop_early=_table(StopEarlyPlan, tables["stop_early"], "[stop_early]") if "stop_early" in tables else None,
        confirm=_table(ConfirmPlan, tables["confirm"], "[confirm]") if "confirm" in tables else None,
        resources=_table(Resources, tables.get("resources", {}), "[resources]"), source=text,
        from_runs=sources, interleave=plan, candidate=candidate, factors=factors,
        noise=_table(NoisePlan, tables["noise"], "[noise]") if "noise" in tables else None,
        constraints=_constraints(tables.get("constraints", {})),
        budget=_table(BudgetPlan, tables.get("budget", {}), "[budget]"), script=script,
    )  # fmt: skip
    study = _without_own_seeds(study, tables) if sources else study
    check_study(study)
    return study


def _table(cls: type[Any], values: Any, place: str) -> Any:
    """Build one table's dataclass, refusing unknown keys and wrong types."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place} must be a table, got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(f"{place} has no key {key!r}", hint=nearest(key, hints))
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values:
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
    if typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping) or not all(isinstance(item, (str, int, float)) for item in value.values()):
            raise ConfigError(f"{place} must be a table of texts and numbers, got {value!r}")
        return dict(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{place} must be of type {hint.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place} must be finite, got {value!r}")
    return value


def _constraints(table: Any) -> dict[str, float]:
    """The table [constraints]; raises ConfigError."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"[constraints] must be a table of limits, got {table!r}")
    for name, limit in table.items():
        if name not in MEASURES:
            raise ConfigError(f"[constraints] has no key {name!r}", hint=nearest(name, MEASURES))
        if type(limit) not in (int, float) or not math.isfinite(limit) or limit <= 0:
            raise ConfigError(f"[constraints] {name} must be a number above 0, got {limit!r}")
    return {name: float(limit) for name, limit in table.items()}


def _require_no_marks(space: Any) -> None:
    """Raise ConfigError where a knob is marked for a ladder and there is none."""
    for knob, entries in space.items() if isinstance(space, Mapping) else ():
        if isinstance(entries, Mapping) and ladders.TRANSFERS in entries:
            raise ConfigError(
                f'[space."{knob}"] {ladders.TRANSFERS} goes with [[rungs]], and there are none', hint="leave it out"
            )


def _sources(tables: Mapping[str, Any]) -> tuple[str, ...]:
    """The runs and studies that `from` names; raises ConfigError."""
    named = tables.get("from", [])
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"from must be the id of a run or the name of a study in quotes, or a list of these, got {named!r}"
        )
    if len(set(names)) < len(names):
        raise ConfigError(f"from names a run twice: {names}")
    return tuple(names)


def _design(tables: Mapping[str, Any]) -> str:
    """The table that makes a study a design, if one does; raises ConfigError where another excludes it."""
    designs = [key for key in ("factors", "noise") if key in tables]
    for key in (*designs[1:], "space", "search", "stop_early", "interleave"):
        if designs and key in tables:
            raise ConfigError(
                f"[{designs[0]}] and [{key}] exclude one another", hint="[confirm] seeds are those of every cell"
            )
    return designs[0] if designs else ""


def _without_own_seeds(study: Study, tables: Mapping[str, Any]) -> Study:
    """The study without the seeds that it does not name: they are those of the runs that it takes."""
    search, confirm = study.search, study.confirm
    if "seeds" not in tables["search"]:
        search = dataclasses.replace(search, seeds=())
    if confirm and "seeds" not in tables["confirm"]:
        confirm = dataclasses.replace(confirm, seeds=())
    return dataclasses.replace(study, search=search, confirm=confirm)


def _script(tables: Mapping[str, Any], folder: Path) -> ScriptPlan:
    """The script that a study runs in place of our trainer, with what it sets. Raises ConfigError."""
    for key in ("preset", "from", "interleave", "factors", "noise"):
        if key in tables:
            raise ConfigError(f"script and {key} exclude one another, got both", hint=f"leave {key} out")
    if not isinstance(tables["script"], str) or not tables["script"]:
        raise ConfigError(f"script must be the path of a script in quotes, got {tables['script']!r}")
    return variables.plan(read_script(folder / Path(tables["script"]).expanduser()), tables.get("set", {}))


def _candidate(plan: InterleavePlan, tables: Mapping[str, Any]) -> Config:
    """The candidate's configuration; raises ConfigError."""
    config = load_preset(plan.against or tables["preset"])
    return with_knobs(with_knobs(config, tables.get("set", {})), plan.set)
