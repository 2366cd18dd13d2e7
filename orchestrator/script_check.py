"""What is checked of a study of somebody else's script before anything is submitted: its data, its seed, its knobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from orchestrator import data_view, datasets, probe
from orchestrator.datasets import PreparedData
from orchestrator.errors import ConfigError
from orchestrator.home import Home
from orchestrator.probe import Liveness
from orchestrator.space import Choice
from orchestrator.study import Study
from orchestrator.variables import SEED, ScriptPlan, name_of, text_of
from trainer.protocol import Manifest, write_json_atomically


def find_data(study: Study, home: Home) -> PreparedData:
    """The study's data: a data set of caddie's, or a folder laid out as scripts expect it. Raises DataError, ProtocolError."""
    folder = home.dataset(study.data)
    if data_view.is_laid_out(folder):
        nothing = Manifest(source=str(folder), recipe={}, tokenizer="", tokenizer_sha256="", vocab_size=0, splits={})
        return PreparedData(root=folder, manifest=nothing, manifest_sha256=data_view.outline_sha256(folder))
    data = datasets.find(home, study.data)
    datasets.require_sound(data)
    return data


def check(study: Study, home: Home) -> PreparedData:
    """All that can be known without starting the script; returns the data. Raises ConfigError, DataError, ProtocolError."""
    plan = _plan(study)
    data = find_data(study, home)
    _require_vocabulary(plan, data)
    _require_seed(study, plan)
    return data


def _plan(study: Study) -> ScriptPlan:
    if study.script is None:
        raise ConfigError(f"{study.name} runs no script", hint='write script = "train_gpt.py" in place of preset')
    return study.script


def _require_vocabulary(plan: ScriptPlan, data: PreparedData) -> None:
    """A script that the study tells of a vocabulary must be told of the data's."""
    asked = plan.env.get(data_view.VOCAB_SIZE)
    if data.vocab_size and asked is not None and asked != str(data.vocab_size):
        raise ConfigError(
            f"env.{data_view.VOCAB_SIZE} is {asked}, the data set {data.root} has {data.vocab_size} pieces",
            hint="leave it out: the script is told what the data set has",
        )


def _require_seed(study: Study, plan: ScriptPlan) -> None:
    """Several seeds need a script that takes one."""
    seeds = set(study.search.seeds if study.space else ()) | set(study.confirm.seeds if study.confirm else ())
    if len(seeds) > 1 and not plan.script.is_opaque and plan.script.lookup(SEED) is None:
        raise ConfigError(
            f"{plan.script.path}: the script never looks at {SEED}, so that runs of {len(seeds)} seeds would be one and the same",
            hint=f"give one seed, or let it read {SEED}",
        )


def warnings(study: Study) -> list[str]:
    """What of a script can go wrong and cannot be decided from its text."""
    script = _plan(study).script
    found = []
    if script.is_opaque:
        found.append(f"{script.name}: its text does not show all that it looks at; its reads are traced as it runs")
    if not script.is_opaque and not any(map(script.lookup, (data_view.DATA_PATH, data_view.DATA_DIR))):
        found.append(
            f"{script.name} looks at neither {data_view.DATA_PATH} nor {data_view.DATA_DIR}: it must find its data in ./data, where "
            "they lie as the challenge lays them out"
        )
    if script.companions:
        found.append(f"{script.name} imports {', '.join(script.companions)} from its folder, which is not taken along")
    if script.stages and study.search.objective not in script.stages:
        found.append(
            f"the score is taken at {study.search.objective}, and the script's text names {', '.join(script.stages)} only"
        )
    return found


def prove(study: Study, home: Home) -> list[Liveness]:
    """Start the script twice and see that every variable that the study sets or searches does something; kept with the study.

    Raises ConfigError for one that does not, StorageError.
    """
    plan = _plan(study)
    pairs = {name_of(knob): _two_texts(plan, knob, knob_range) for knob, knob_range in study.space.items()}
    pairs |= {
        name: (text, probe.other_text(plan.script, name, text)) for name, text in plan.env.items() if name not in pairs
    }
    data_dir = home.dataset(study.data)
    found = probe.prove(plan.script, pairs, data_dir=data_dir, python=study.resources.python) if pairs else []
    write_json_atomically(
        home.study(study.name).liveness,
        {"script": str(plan.script.path), "variables": [dataclasses.asdict(one) for one in found]},
    )
    probe.require_alive(found, plan.script)
    return found


def _two_texts(plan: ScriptPlan, knob: str, knob_range: Any) -> tuple[str, str]:
    """Two values of a knob that a search may take."""
    if isinstance(knob_range, Choice):
        return text_of(knob_range.values[0]), text_of(knob_range.values[1])
    ends = (knob_range.low, knob_range.high)
    low, high = ((int(end) if knob_range.is_integer else float(end)) for end in ends)
    return text_of(low), text_of(high)


def as_lines(found: Sequence[Liveness]) -> list[str]:
    """For people: what was seen of each variable."""
    return [f"env.{one.name}: {one.status}, {one.found}" for one in found]
