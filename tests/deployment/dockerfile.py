"""Dockerfiles read into their instructions: as much of the format as this project's own use, and nothing is skipped."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KNOWN = frozenset(
    {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "HEALTHCHECK", "RUN", "SHELL", "USER", "WORKDIR"}
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined."""

    word: str
    text: str
    line: int


@dataclass(frozen=True)
class Stage:
    """What stands between one FROM and the next."""

    name: str
    base: str
    """An image, or the name of an earlier stage; variables are not yet put in."""

    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class Dockerfile:
    """A whole file."""

    path: Path
    arguments: dict[str, str]
    """Defaults of the ARGs before the first FROM."""

    stages: tuple[Stage, ...]

    def stage(self, name: str = "") -> Stage:
        """A stage by its name; the last without one, as docker builds it."""
        return next(stage for stage in self.stages if stage.name == name) if name else self.stages[-1]


def read(path: Path) -> Dockerfile:
    """Read a Dockerfile; raises ValueError for an instruction that is not known here."""
    found = list(_instructions(path.read_text(encoding="utf-8")))
    for instruction in found:
        if instruction.word not in KNOWN:
            raise ValueError(f"{path}:{instruction.line}: {instruction.word} is not known to the tests")
    first = next(number for number, instruction in enumerate(found) if instruction.word == "FROM")
    arguments = dict(pair_of(instruction.text) for instruction in found[:first])
    starts = [number for number, instruction in enumerate(found) if instruction.word == "FROM"]
    stages = []
    for start, end in zip(starts, [*starts[1:], len(found)], strict=True):
        base, _, name = found[start].text.partition(" AS ")
        stages.append(Stage(name=name, base=base, instructions=tuple(found[start + 1 : end])))
    return Dockerfile(path, arguments, tuple(stages))


def _instructions(text: str) -> list[Instruction]:
    found, parts, begun = [], [], 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        begun = begun if parts else number
        parts.append(line.rstrip().removesuffix("\\").strip())
        if not line.rstrip().endswith("\\"):
            word, _, rest = " ".join(parts).partition(" ")
            found.append(Instruction(word.upper(), rest.strip(), begun))
            parts = []
    return found


def pair_of(text: str) -> tuple[str, str]:
    """`NAME=value` or, with an empty value, `NAME`."""
    name, _, value = text.partition("=")
    return name, value


def substituted(text: str, variables: Mapping[str, str]) -> str:
    """The text with `$NAME` and `${NAME}` put in; unknown ones are empty, as docker has it."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], ""), text)


def pairs_of(text: str) -> dict[str, str]:
    """The assignments of an ENV."""
    return dict(pair_of(word) for word in shlex.split(text))


def command_of(text: str, shell: list[str]) -> list[str]:
    """A command in either of its forms."""
    if text.startswith("["):
        words: list[Any] = json.loads(text)
        return [str(word) for word in words]
    return [*shell, text]
