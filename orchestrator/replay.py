"""Replays: somebody's own script as a record attempt of ours, or in a study of its own.

What is run is a copy in the home, so that no later change of the file reaches a run, a restart or a report.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator import data_view
from orchestrator.errors import ConfigError
from orchestrator.home import Home
from orchestrator.public_record import PublicRecord
from orchestrator.record_attempt import study_text
from orchestrator.script import Script, kept, read_script
from orchestrator.script_run import INFRASTRUCTURE, SWITCHES, is_same
from orchestrator.study import Study
from orchestrator.study_file import parse_study
from orchestrator.variables import OWN, PREFIX, is_variable

NOT_CHOSEN = frozenset({*OWN, *data_view.VARIABLES})
"""Variables that follow from the run and its data."""

SCRIPT_LINE = re.compile(r"^script[ \t]*=.*$", re.MULTILINE)


def keep(study: Study, home: Home) -> Study:
    """The same study of the script's copy in the home; a study of our own trainer as it is. Raises StorageError."""
    if study.script is None:
        return study
    path = kept(home, study.script.script)
    return parse_study(SCRIPT_LINE.sub(lambda _: f"script = {json.dumps(str(path))}", study.source, count=1))


def replay_study(
    script: Path, *, data: str, seeds: tuple[int, ...], settings: Mapping[str, Any], resources: Mapping[str, Any],
    name: str | None, stage: str, home: Home,
) -> Study:  # fmt: skip
    """A record attempt of a script; its name, where none is given, follows from what is asked. Raises ConfigError."""
    found = read_script(script)
    path, stage = kept(home, found), stage or found.last_stage
    asked = [found.sha256, data, stage, sorted(seeds), sorted((knob, repr(value)) for knob, value in settings.items())]
    stem = re.sub(r"[^a-z0-9._-]", "-", found.name.removesuffix(".py").lower()).lstrip("._-") or "script"
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    keys = {
        "name": name or f"replay-{stem}-{digest}",
        "question": f"What does {found.name} score on seeds {', '.join(map(str, seeds))}?",
        "script": str(path), "data": data, "stage": stage,
    }  # fmt: skip
    return parse_study(study_text(keys, {"set": settings, "confirm": {"seeds": seeds}, "resources": resources}))


def variables(assignments: Mapping[str, str]) -> dict[str, Any]:
    """Settings from a command line: a name without a dot is a variable's. Raises ConfigError."""
    settings: dict[str, Any] = {}
    for name, text in assignments.items():
        knob = name if "." in name else f"{PREFIX}{name}"
        settings[knob] = text if is_variable(knob) else number(knob, text)
    return settings


def number(knob: str, text: str) -> float:
    """A limit's value; raises ConfigError."""
    try:
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError as error:
        raise ConfigError(f"{knob} must be a number, got {text!r}") from error


def as_logged(script: Script, record: PublicRecord) -> dict[str, str]:
    """Settings that every log of a record has otherwise than the script's defaults, as text by variable.

    Authors start their scripts with variables of their own, which the folder tells in its logs alone.
    """
    logs = [seed.run.chosen for seed in record.seeds if seed.run]
    found: dict[str, str] = {}
    for lookup in script.lookups.found.values():
        texts = {log.get(lookup.setting) for log in logs}
        text = texts.pop() if len(texts) == 1 else None
        if (
            lookup.name in NOT_CHOSEN
            or INFRASTRUCTURE.fullmatch(lookup.name)
            or lookup.default is None
            or text is None
            or is_same(lookup.default, text)
        ):
            continue
        found[lookup.name] = SWITCHES.get(text, text)
    return found


def describe(script: Script) -> list[tuple[str, str, str, str]]:
    """(variable, kind, default, setting) of all that a script looks at."""
    return [
        (found.name, found.kind, found.default_source or ("required" if found.is_required else ""), found.setting)
        for found in script.lookups.found.values()
    ]
