"""Processes of this host: when they began, and which belong to one attempt's trainer, by a mark in their environment."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from trainer.protocol import AttemptDir

TRAINER_TAG = "CADDIE_TRAINER_TAG"
"""Environment variable that marks every process of one attempt's trainer, whatever group or session it moves to."""


def started_ticks(pid: int) -> int | None:
    """When a live process started, in clock ticks after boot; None for a dead one, a zombie included."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(fields[18])


def parent_of(pid: int) -> int | None:
    """The parent of a process; None for a dead one."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def boot_id() -> str:
    """Identity of the running system since its last boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def tagged_processes(variable: str, value: str) -> list[int]:
    """Live processes of this user that were started with `variable=value` in their environment, this one left out."""
    entry = f"{variable}={value}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:  # it ended meanwhile, or belongs to somebody else
                continue
            if entry in environment.split(b"\0"):
                found.append(int(folder.name))
    return sorted(found)


def signal_tagged(variable: str, value: str, number: signal.Signals) -> None:
    """Send a signal to every process with the tag."""
    for pid in tagged_processes(variable, value):
        try:
            os.kill(pid, number)
        except ProcessLookupError:  # it ended meanwhile
            continue


def trainer_tag(attempt: AttemptDir) -> str:
    """Value of TRAINER_TAG in every process of an attempt's trainer, the same for all who look."""
    return str(attempt.root.resolve())
