"""Interrupts: Ctrl-C, SIGTERM and a terminal that closes, noted, so that the loop leaves where it may."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """The first signal is noted in `by`; a second one does what it did before, but for SIGHUP, which comes in numbers.

    Who started the process with SIGHUP ignored, as `nohup` and `--detach` do, wants it to outlive the terminal.
    """

    def __init__(self) -> None:
        self.by: signal.Signals | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note signals within the block; outside the main thread Python delivers none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in NUMBERS}
        if before[signal.SIGHUP] is signal.SIG_IGN:
            del before[signal.SIGHUP]

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number: int, _frame: FrameType | None) -> None:
            self.by = signal.Signals(number)
            restore()
            if self.by is signal.SIGHUP:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
                _leave_terminal()

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            restore()


def _leave_terminal() -> None:
    """Let nothing more be written to a terminal that is gone: it would fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            descriptor = stream.fileno()
            is_terminal = stat.S_ISCHR(os.fstat(descriptor).st_mode)  # isatty() denies one that has hung up
        except (AttributeError, OSError, ValueError):  # replaced by something that is no file, or closed
            continue
        if is_terminal:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
