"""The study's lock: one controller at a time. The system frees it when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from orchestrator.errors import StudyBusy
from trainer.protocol import storage_error


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock; raises StudyBusy with the holder's name where another process has it, StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise storage_error(error, path) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudyBusy(
                f"{path.parent.name}: {_name_of_holder(file)} works on this study",
                hint="wait for it, or stop it with: caddie study stop " + path.parent.name,
            ) from error
        _write_name(file, path)
        yield


def holder(path: Path) -> str | None:
    """Who holds the lock, in words, or None where nobody does."""
    try:
        with path.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _name_of_holder(file)
    except FileNotFoundError:
        return None
    return None


def _write_name(file: TextIO, path: Path) -> None:
    """Say who holds the lock; by one write past the file's buffer, which would try again on a full disk when it closes."""
    try:
        file.truncate(0)
        os.write(file.fileno(), json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())
    except OSError as error:
        raise storage_error(error, path) from error


def _name_of_holder(file: TextIO) -> str:
    file.seek(0)
    try:
        who = json.loads(file.read())
        return f"process {who['pid']} on {who['host']}"
    except (ValueError, KeyError, TypeError):  # it has the lock and has not yet written its name
        return "another controller"
