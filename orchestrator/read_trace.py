"""Read traces: which environment variables a script was seen to look at, and the settings that it made of them.

The trace is written by `shims/read_trace`, in the script's own process. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainer
from trainer.protocol import read_lines

SHIMS = Path(trainer.__file__).resolve().parent.parent / "shims"
FOLDER = SHIMS / "read_trace"
FILE, PROBE = "CADDIE_READS", "CADDIE_READS_PROBE"
"""Variables that the tracer itself is told by."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one process of a script looked at."""

    names: frozenset[str]
    settings: Mapping[str, Any]
    """Plain values of its main module at its end, by name; empty where it was killed."""

    @property
    def is_empty(self) -> bool:
        return not self.names and not self.settings


def variables(file: Path, *, is_probe: bool = False) -> dict[str, str]:
    """What the environment of a traced process needs beside its PYTHONPATH."""
    return {FILE: str(file)} | ({PROBE: "1"} if is_probe else {})


def read_trace(file: Path) -> Trace:
    """A trace as far as it is written. Raises ProtocolError for a damaged line."""
    names: set[str] = set()
    settings: dict[str, Any] = {}
    for _, line in read_lines(file):
        if "name" in line:
            names.add(str(line["name"]))
        settings |= line.get("settings", {})
    return Trace(names=frozenset(names), settings=settings)
