"""Detached controllers: the same command again, in a session of its own, so that no terminal holds the study."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trainer
from orchestrator import lock
from orchestrator.errors import StudyBusy
from orchestrator.home import StudyDir
from trainer.protocol import storage_error

ROLE = "CADDIE_CONTROLLER"
"""Environment variable that tells a controller it was started by another command, and how."""

DETACHED, JOB = "detached", "job"

START_SECONDS = 20.0  # for a command's checks; where they take longer, its log tells how they end
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Started:
    """A detached controller, or what became of it."""

    pid: int
    exit_code: int | None
    """None while it works."""

    said: str
    """What it wrote into its log, where it has ended."""


def take_role() -> str:
    """How this process was started: empty by hand, else DETACHED or JOB; what it starts itself is not told."""
    return os.environ.pop(ROLE, "")


def command_of(arguments: Sequence[str]) -> list[str]:
    """The command line that gives these arguments to this program again."""
    return [sys.executable, "-m", "orchestrator.cli", *arguments]


def environment(role: str) -> dict[str, str]:
    """This process's environment for a controller of that role; the code need not be installed."""
    checkout = str(Path(trainer.__file__).resolve().parent.parent)
    known = os.environ.get("PYTHONPATH", "")
    return {**os.environ, ROLE: role, "PYTHONPATH": os.pathsep.join(filter(None, (checkout, known)))}


def start(study: StudyDir, arguments: Sequence[str], *, rungs: Sequence[StudyDir] = ()) -> Started:
    """Start the command detached, and wait until it works on the study or has ended. Raises StudyBusy, StorageError.

    `rungs`: the other studies of its ladder, any of which it may work on first.
    """
    works = (study, *rungs)
    holder = next((holder for files in works if (holder := lock.holder(files)) is not None), None)
    if holder is not None:
        name = study.root.name
        raise StudyBusy(
            f"{name}: {holder} works on this study",
            hint=f"follow it with: caddie study status {name}; stop it with: caddie study stop {name}",
        )
    try:
        study.root.mkdir(parents=True, exist_ok=True)
        with study.log.open("ab") as log:
            began = log.tell()
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(['caddie', *arguments])}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command_of(arguments), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(DETACHED),
                start_new_session=True, preexec_fn=_ignore_hangup,
            )  # fmt: skip
    except OSError as error:
        raise storage_error(error, study.log) from error
    _wait_for_begin(process, works)
    said = "" if process.returncode is None else _text_from(study.log, began)
    return Started(process.pid, process.returncode, said)


def _ignore_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _wait_for_begin(process: subprocess.Popen[bytes], works: Sequence[StudyDir]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        holders = [holder for files in works if (holder := lock.holder(files)) is not None]
        if any(holder.claim is not None and holder.claim.pid == process.pid for holder in holders):
            return
        time.sleep(POLL_SECONDS)


def _text_from(path: Path, offset: int) -> str:
    """What a log holds behind an offset and the line that is there."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace").partition("\n")[2]
