"""TOML as people write it: files read with their faults named, and values written."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import ConfigError

T = TypeVar("T")


def text_of(path: Path) -> str:
    """A file's text; raises ConfigError where it has none. Some editors put a byte-order mark before it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}", hint="save the file as UTF-8"
        ) from error


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a text; raises ConfigError with the line at fault."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}") from error


def within(path: Path, read: Callable[[], T]) -> T:
    """Put the file's name before an error's message."""
    try:
        return read()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", hint=error.hint) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def as_toml(value: Any) -> str:
    """A value as TOML writes it; the escapes of its strings are JSON's."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{as_toml(key)} = {as_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(as_toml(item) for item in value) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
