"""A machine on which a chosen operation fails: the process is killed there, or the file system gives an error.

Every operation on files below a folder counts, in the order in which the main thread asks for them; so a run that is
repeated with the failure at each number in turn fails everywhere once.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from fakes import REPOSITORY, FakeLauncher
from make_controller import Killed

from orchestrator.slots import JobResources
from trainer.protocol import AttemptDir, RunDir

BY_PATH = ("open", "replace", "rename", "link", "unlink", "mkdir", "utime", "truncate", "stat", "listdir", "scandir")
BY_DESCRIPTOR = ("write", "fsync", "ftruncate")
WRITES = frozenset({"replace", "rename", "link", "mkdir", "write", "fsync", "open for writing"})
"""What a full or a read-only disk refuses."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})

TRACED = (str(REPOSITORY / "orchestrator"), str(REPOSITORY / "trainer"))


class Machine:
    """Counts operations below `root`; at number `at` it raises `error`, and is down from then on if that is a kill."""

    def __init__(self, root: Path, *, at: int = 0, error: BaseException | None = None, lasts: bool = False) -> None:
        self.root = str(root)
        self.at, self.error, self.lasts = at, error, lasts
        self.count = 0
        self.lines = 0
        self.is_down = False
        self.is_paused = False
        self.names: list[str] = []
        """Operations, in their order."""

        self.failed: list[str] = []
        """Those that failed."""

        self._descriptors: set[int] = set()

    def point(self, name: str) -> None:
        """An operation is about to happen."""
        if self.is_down:
            raise Killed
        if self.is_paused or threading.current_thread() is not threading.main_thread():
            return
        if isinstance(self.error, OSError) and self.error.errno in FULL and name not in WRITES:
            return
        self.count += 1
        self.names.append(name)
        if self.error is not None and (self.count == self.at or (self.lasts and self.count > self.at > 0)):
            self.failed.append(name)
            self.is_down = isinstance(self.error, Killed)
            raise type(self.error)(*self.error.args)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within the block is not this controller's doing."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def install(self, patch: Any) -> None:
        """Put the machine under the process, by a monkeypatch."""
        for name in BY_PATH:
            patch.setattr(os, name, self._by_path(name, getattr(os, name)))
        for name in BY_DESCRIPTOR:
            patch.setattr(os, name, self._by_descriptor(name, getattr(os, name)))
        patch.setattr(io, "open", self._opened(io.open))

    def _by_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **named: Any) -> Any:
            is_ours = isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.root)
            if is_ours:
                is_write = name == "open" and arguments and arguments[0] & (os.O_WRONLY | os.O_RDWR)
                self.point("open for writing" if is_write else name)
            found = real(path, *arguments, **named)
            if is_ours and name == "open":
                self._descriptors.add(found)
            return found

        return call

    def _by_descriptor(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *arguments: Any) -> Any:
            if descriptor in self._descriptors:
                try:
                    self.point(name)
                except Killed:
                    if name == "write" and self.failed:  # the first half is on the disk
                        real(descriptor, arguments[0][: len(arguments[0]) // 2])
                        self._descriptors.clear()
                    raise
            return real(descriptor, *arguments)

        return call

    def _opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.root):
                self.point("open" if mode.startswith("r") else "open for writing")
            return real(path, mode, *arguments, **named)

        return call

    def kill_at_line(self, number: int) -> Callable[..., Any]:
        """A trace function that kills at the n-th line of our code."""

        def trace(frame: FrameType, event: str, _argument: Any) -> Any:
            if not frame.f_code.co_filename.startswith(TRACED):
                return None
            if event == "line" and not self.is_paused and not self.is_down:
                self.lines += 1
                if self.lines == number:
                    self.is_down = True
                    self.failed.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                    raise Killed
            return trace

        return trace


@contextmanager
def traced(trace: Callable[..., Any] | None) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class Cluster(FakeLauncher):
    """A scheduler that is no part of the machine: it works while the controller is dead, and its answer may be lost."""

    machine: Machine | None = None

    def _apart(self, name: str, act: Callable[[], Any]) -> Any:
        if self.machine is None:
            return act()
        self.machine.point(name)
        with self.machine.paused():
            found = act()
        self.machine.point(f"answer to {name}")
        return found

    def submit(self, run: RunDir, attempt: int, *, tag: str, resources: JobResources) -> str:
        known = super().submit
        return self._apart("submit", lambda: known(run, attempt, tag=tag, resources=resources))

    def is_alive(self, attempt: AttemptDir, *, tag: str | None) -> bool:
        known = super().is_alive
        return self._apart("is_alive", lambda: known(attempt, tag=tag))

    def find(self, attempt: AttemptDir, *, tag: str) -> str | None:
        known = super().find
        return self._apart("find", lambda: known(attempt, tag=tag))
