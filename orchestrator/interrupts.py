"""Interrupts: Ctrl-C and SIGTERM, noted, so that the loop leaves where it may."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """The first signal is noted in `by`; a second one does what it did before."""

    def __init__(self) -> None:
        self.by: signal.Signals | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note signals within the block; outside the main thread Python delivers none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number: int, _frame: FrameType | None) -> None:
            self.by = signal.Signals(number)
            restore()

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            restore()
