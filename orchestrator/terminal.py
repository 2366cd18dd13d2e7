"""What every command tells: results to stdout, warnings and errors to stderr, each error with its remedy."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from orchestrator.errors import CaddieError, ProtocolError


def command_name() -> str:
    """How this program can be called again: by its name where the shell would find it, else by its path."""
    program = Path(sys.argv[0])
    found = shutil.which("caddie")
    is_found = found is not None and program.exists() and Path(found).samefile(program)
    return shlex.quote(str(program.absolute())) if program.name == "caddie" and not is_found else "caddie"


def warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def show_json(content: object) -> None:
    print(json.dumps(content, indent=1))


def tell_damage(damage: Sequence[str]) -> int:
    """Name the files that could not be read, after all else was shown; the exit code says that something is missing."""
    for place in damage:
        print(f"error: {place}", file=sys.stderr)
    if damage:
        print("hint: what these files hold is missing above; the rest stands", file=sys.stderr)
    return ProtocolError.exit_code if damage else 0


def fail(error: CaddieError) -> int:
    """Tell an error and its remedy; its exit code, which stands also where nothing can be told."""
    try:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
    except OSError:
        silence(sys.stderr)
    return error.exit_code


def silence(stream: TextIO) -> None:
    """Send nowhere what a stream cannot write, which would be tried again at the process's end and decide its exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
