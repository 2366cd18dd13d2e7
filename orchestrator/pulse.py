"""The pulse of attempts: how long their worker and their trainer have not been heard, whatever a scheduler says.

The worker touches its claim, the trainer appends events. Only changes count, on the observer's own clock: hosts' clocks
differ, and a clock may jump. An observer who was not looking hears no silence.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from trainer.protocol import AttemptDir

BEAT_SECONDS = 2.0  # between two touches of a claim
SILENCE_SECONDS = 24.0  # after which an attempt that had begun counts as dead
LOOK_SECONDS = (
    1.0  # between two looks at an attempt; each opens two files, so that a network file system asks its server
)
LONGEST_GAP_SECONDS = 3.0  # that counts as silence between two looks: a controller that was suspended heard nothing


@dataclass
class _Heard:
    sign: tuple[int, int]
    looked: float
    silent_seconds: float = 0.0


class Pulse:
    """What one observer has heard."""

    def __init__(self) -> None:
        self._heard: dict[Path, _Heard] = {}

    def silent_seconds(self, attempt: AttemptDir) -> float | None:
        """Seconds since an attempt was last heard; None where none of its files is there, so that nobody began."""
        now, heard = time.monotonic(), self._heard.get(attempt.root)
        if heard is not None and now - heard.looked < LOOK_SECONDS:
            return heard.silent_seconds
        sign = _changed_ns(attempt.claim), _changed_ns(attempt.events)
        if sign == (0, 0):
            return None
        if heard is None or heard.sign != sign:
            self._heard[attempt.root] = _Heard(sign, now)
        else:
            heard.silent_seconds += min(now - heard.looked, LONGEST_GAP_SECONDS)
            heard.looked = now
        return self._heard[attempt.root].silent_seconds

    def forget(self, attempt: AttemptDir) -> None:
        """Drop what was heard of an attempt that has ended."""
        self._heard.pop(attempt.root, None)


def _changed_ns(path: Path) -> int:
    """When a file was last changed, by the file system's clock; 0 where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return 0
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)
