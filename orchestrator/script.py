"""Scripts: somebody's own training program, a `train_gpt.py` that takes its settings from the environment.

What is known of one is read from its text, also where it is packed; nothing of it is run here. Standard library only.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from orchestrator import grammar
from orchestrator.errors import ConfigError
from orchestrator.home import Home
from orchestrator.lookups import Lookup, Lookups, find_lookups
from orchestrator.packed_source import parse, unpack
from trainer.protocol import ROUNDTRIP, STAGES, RunDir, write_bytes_atomically

USUAL_NAME = RunDir(Path()).bundle.name
"""What the challenge calls the script of a submission."""

MOST_BYTES = 2_000_000
"""No script of one file is larger."""

HASH_DIGITS = 8  # of a script's hash, in the name of its copy


@dataclass(frozen=True, kw_only=True)
class Script:
    """One program, whole."""

    path: Path
    content: bytes

    @property
    def name(self) -> str:
        """For people: the file's name, or the folder's where every script has the same."""
        folder = self.path.resolve().parent.name
        return folder if self.path.name == USUAL_NAME and folder else self.path.name

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def _unpacked(self) -> tuple[str, bool]:
        return unpack(self.content.decode("utf-8"))

    @property
    def source(self) -> str:
        """The text that is executed in the end, where that can be known without running anything."""
        return self._unpacked[0]

    @cached_property
    def lookups(self) -> Lookups:
        """The environment variables that it looks at."""
        return find_lookups(self.source)

    @property
    def is_opaque(self) -> bool:
        """Whether it may look at variables that are not found in its text."""
        return not self._unpacked[1] or self.lookups.is_partial

    def lookup(self, name: str) -> Lookup | None:
        return self.lookups.found.get(name)

    @cached_property
    def stages(self) -> tuple[str, ...]:
        """The evaluations that it can print, by the labels in its text, in the order of stages."""
        found = {stage for text in self._texts() for stage in _stages_named(text)}
        return tuple(stage for stage in STAGES if stage in found)

    @property
    def last_stage(self) -> str:
        """The stage that its score is probably of; the round trip where its text names none."""
        return self.stages[-1] if self.stages else ROUNDTRIP

    def _texts(self) -> Iterator[str]:
        for node in ast.walk(parse(self.source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value

    @cached_property
    def imports(self) -> frozenset[str]:
        """Top-level names of the modules that it imports, wherever in it."""
        found: set[str] = set()
        for node in ast.walk(parse(self.source)):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
        return frozenset(found)

    @property
    def companions(self) -> tuple[str, ...]:
        """Modules that it imports from its own folder, which do not go with it."""
        return tuple(sorted(name for name in self.imports if (self.path.parent / f"{name}.py").is_file()))


def _stages_named(text: str) -> Iterator[str]:
    """The stages of labels that a constant of a script is or begins with; most constants are none."""
    label = re.split(r" (?:sliding )?val_loss[:=]| stride:", text.lstrip("\n"))[0].rstrip()
    if 4 < len(label) < 60:
        yield from (known.stage for known in grammar.LABELS if known.rank and re.fullmatch(known.pattern, label))


def read_script(path: Path) -> Script:
    """A script by its file, or by the folder that it lies in. Raises ConfigError with the place and the fault."""
    path = path.expanduser()
    file = path / USUAL_NAME if path.is_dir() else path
    if not file.is_file():
        known = sorted(other.name for other in path.glob("*.py")) if path.is_dir() else []
        raise ConfigError(
            f"{file}: there is no such script",
            hint=f"name one of its scripts: {', '.join(known)}"
            if known
            else "name a script, or a folder with a " + USUAL_NAME,
        )
    content = file.read_bytes()
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{file}: a script must have at most {MOST_BYTES:,} bytes, got {len(content):,}")
    return checked(Script(path=file.resolve(), content=content))


def checked(script: Script) -> Script:
    """The same script, seen to be Python. Raises ConfigError."""
    try:
        script.lookups  # noqa: B018  # reads and parses the text
    except (SyntaxError, ValueError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{script.path}: this is no program of Python {platform.python_version()}: {error}",
            hint="name the script itself; a notebook or a shell script cannot be replayed",
        ) from error
    return script


def kept(home: Home, script: Script) -> Path:
    """The script's copy in the home, where no later change of the file reaches it; made where it is missing.

    Raises StorageError.
    """
    if script.path.is_relative_to(home.scripts):
        return script.path
    label = re.sub(r"[^\w.+-]+", "-", script.name.removesuffix(".py")).strip("-.") or "script"
    path = home.script(f"{label}-{script.sha256[:HASH_DIGITS]}") / USUAL_NAME
    if not path.exists():
        write_bytes_atomically(path, script.content)
    return path
