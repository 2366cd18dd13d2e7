"""The notice: a job is told that its nodes are wanted back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from orchestrator.failures import failure_of
from trainer import protocol
from trainer.protocol import AttemptDir, Failure


class Notice:
    """What tells a job that its nodes are wanted back: SIGUSR2 or SIGTERM, on whichever comes first."""

    def __init__(self, attempt: AttemptDir) -> None:
        self.attempt = attempt
        self.by: signal.Signals | None = None
        self._was_early = False
        self._is_passed_on = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Note the signals within the block; outside the main thread Python delivers none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGUSR2)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self.by is None:
            self.by, self._was_early = signal.Signals(number), not self.attempt.events.exists()
            with suppress(OSError):  # on a full disk the signal alone has to do
                self.attempt.notice.touch()

    def is_due(self) -> bool:
        """Whether to pass a SIGTERM on to the trainer, once, as soon as it can understand one.

        The scheduler's own SIGTERM reaches every process of a job. The trainer has heard it, if it had begun.
        """
        due = self.by is signal.SIGUSR2 or (self.by is not None and self._was_early)
        if not due or self._is_passed_on or not self.attempt.events.exists():
            return False
        self._is_passed_on = True
        return True

    def failure(self, log: Path) -> Failure:
        """Why the attempt came to nothing."""
        name = self.by.name if self.by is not None else ""
        message = f"the job was told to leave ({name}): pre-empted, cancelled, or at its time limit"
        return failure_of(protocol.PREEMPTED, message, log)
