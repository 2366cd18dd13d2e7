"""Record attempts: one configuration on given seeds, written as a study without a search."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.study import Study
from orchestrator.study_file import parse_study
from orchestrator.toml_text import as_toml


def record_study(
    preset: str,
    *,
    data: str,
    seeds: tuple[int, ...],
    knobs: Mapping[str, Any],
    resources: Mapping[str, Any] | None = None,
    name: str | None = None,
    from_runs: Sequence[str] = (),
    interleave: Mapping[str, Any] | None = None,
) -> Study:
    """A record attempt: one configuration on the given seeds, as a study without a search. Raises ConfigError.

    `interleave` holds the entries of that table: a candidate is then run beside it.

    With `from_runs` their stored models are scored again, and nothing is trained. The study's name, where none is given,
    follows from what is asked, so that the same command continues the same attempt.
    """
    asked = [preset, data, sorted(seeds), {knob: repr(value) for knob, value in sorted(knobs.items())}]
    sources = from_runs[0] if len(from_runs) == 1 else list(from_runs)
    asked += [extra for extra in (sources, interleave) if extra]
    digest = hashlib.sha256(json.dumps(asked, default=repr).encode()).hexdigest()[:8]
    stem = re.sub(r"[^a-z0-9._-]", "-", Path(preset).stem.lower()).lstrip("._-") or "record"
    tables: dict[str, Any] = {
        "name": name or f"record-{stem}-{digest}",
        "question": _record_question(preset, seeds, from_runs, interleave or {}),
        "preset": preset,
        "data": data,
        **({"from": sources} if sources else {}),
    }
    parts = {"set": knobs, "confirm": {"seeds": seeds}, "interleave": interleave or {}, "resources": resources or {}}
    return parse_study(study_text(tables, parts))


def _record_question(preset: str, seeds: tuple[int, ...], sources: Sequence[str], interleave: Mapping[str, Any]) -> str:
    on = f"on seeds {', '.join(map(str, seeds))}"
    if not interleave:
        what = f"run{'s' if len(sources) > 1 else ''} {', '.join(sources)}" if sources else preset
        return f"What does {what} score {on}?"
    candidate = interleave.get("against") or f"{preset} with {', '.join(interleave.get('set', {}))} changed"
    return f"Does {candidate} score better than {preset} {on}, by turns on one node?"


def study_text(keys: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> str:
    """A study's text: its keys, and then those of its tables that have entries."""
    lines = [f"{key} = {as_toml(value)}" for key, value in keys.items()]
    for table, entries in tables.items():
        if entries:
            lines += ["", f"[{table}]", *(f"{as_toml(key)} = {as_toml(value)}" for key, value in entries.items())]
    return "\n".join(lines) + "\n"
