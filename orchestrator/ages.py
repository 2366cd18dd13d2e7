"""Ages: how long things have lasted, by a clock that nobody sets."""

from __future__ import annotations

import time
from collections.abc import Hashable


class Ages:
    """Counts on from what the wall clock said when an age was first asked for; if it is set afterwards, nothing jumps."""

    def __init__(self) -> None:
        self._first: dict[Hashable, tuple[float, float]] = {}
        """Monotonic seconds, and age, when it was first asked for."""

    def of(self, what: Hashable, since: float) -> float:
        """Seconds since that unix time."""
        now = time.monotonic()
        first, age = self._first.setdefault(what, (now, max(0.0, time.time() - since)))
        return age + now - first

    def watched(self, what: Hashable) -> float:
        """Seconds for which an age has been asked for; 0 where it never was."""
        return time.monotonic() - self._first[what][0] if what in self._first else 0.0

    def forget(self, key: Hashable) -> None:
        """Forget whatever belongs to a key, by which tuples begin."""
        self._first = {
            what: seen for what, seen in self._first.items() if not (isinstance(what, tuple) and what[0] == key)
        }
