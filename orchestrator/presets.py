"""Presets: complete trainer configurations by name, or in a file of somebody's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.home import SHIPPED_STUDIES
from orchestrator.toml_text import parse_toml, text_of, within
from trainer.config import Config, from_mapping, nearest

NOT_ACCEPTED = "not_accepted"  # key of a preset's file: why its technique is not accepted in submissions


def load_preset(name: str) -> Config:
    """The configuration of a preset: a shipped name, or the path of a TOML file. Raises ConfigError with its place."""
    path, tables = _preset(name)
    return within(path, lambda: from_mapping({key: table for key, table in tables.items() if key != NOT_ACCEPTED}))


def not_accepted(preset: str) -> str:
    """Why a preset's technique is not accepted in submissions, as its file says; empty where it says nothing of it.

    Raises ConfigError where there is no such preset.
    """
    return str(_preset(preset)[1].get(NOT_ACCEPTED, ""))


def is_preset(name: str) -> bool:
    """Whether a text names a preset: a shipped one, or a TOML file."""
    return _preset_path(name).is_file() or name.endswith(".toml")


def _preset_path(name: str) -> Path:
    return Path(name) if name.endswith(".toml") else SHIPPED_STUDIES / "presets" / f"{name}.toml"


def _preset(name: str) -> tuple[Path, dict[str, Any]]:
    """A preset's file and its tables."""
    path = _preset_path(name)
    if not path.is_file():
        known = sorted(p.stem for p in (SHIPPED_STUDIES / "presets").glob("*.toml"))
        raise ConfigError(f"there is no preset {name!r}", hint=nearest(Path(name).stem, known))
    return path, within(path, lambda: parse_toml(text_of(path)))
