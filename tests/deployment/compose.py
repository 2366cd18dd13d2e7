"""docker/compose.yaml as its engine would understand it: files merged by YAML, variables put in from an environment."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

DOCKER = Path(__file__).resolve().parents[2] / "docker"
COMPOSE, GPU = DOCKER / "compose.yaml", DOCKER / "compose.gpu.yaml"
EXAMPLE = DOCKER / ".env.example"

_VARIABLE = re.compile(r"\$\{(\w+)(:\?([^}]*))?\}")


class UnsetVariable(Exception):
    """A variable that compose.yaml cannot do without has no value."""


def settings_of(text: str) -> dict[str, str]:
    """The assignments of an .env file."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def made_settings(folder: Path) -> dict[str, str]:
    """What docker/make-env makes of the example, in a folder of its own."""
    for name in ("make-env", EXAMPLE.name):
        (folder / name).write_bytes((DOCKER / name).read_bytes())
    subprocess.run(["sh", str(folder / "make-env")], check=True, capture_output=True)
    return settings_of((folder / ".env").read_text())


def read(path: Path = COMPOSE) -> dict[str, Any]:
    """A compose file as it stands, its anchors resolved."""
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def variables_of(content: object) -> set[str]:
    """Every variable that is put in somewhere."""
    return {match[1] for match in _VARIABLE.finditer(str(content))}


def interpolated(content: Any, settings: Mapping[str, str]) -> Any:
    """The content with its variables put in. Raises UnsetVariable for one that is required and empty."""
    if isinstance(content, dict):
        return {key: interpolated(value, settings) for key, value in content.items()}
    if isinstance(content, list):
        return [interpolated(value, settings) for value in content]
    if not isinstance(content, str):
        return content

    def value_of(match: re.Match[str]) -> str:
        value = settings.get(match[1], "")
        if not value and match[2]:
            raise UnsetVariable(f"{match[1]}: {match[3]}")
        return value

    return _VARIABLE.sub(value_of, content)
