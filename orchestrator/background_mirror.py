"""The background mirror: keeps MLflow up with a running study from a thread of its own, and never holds the study up.

That thread loads MLflow, too, which takes longer than all else a controller loads, and may be broken where nothing else is.
Where it is not installed at all, that is said before a study begins.
"""

from __future__ import annotations

import importlib.util
import threading
from typing import TYPE_CHECKING

from orchestrator.home import Home

if TYPE_CHECKING:
    from orchestrator.mirror import Mirror


class BackgroundMirror:
    """Mirrors one study from a thread of its own. A failure of MLflow never reaches the controller: it is kept in
    `problem` and tried again with growing pauses."""

    PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 120.0
    LEAST_PAUSE_SECONDS = 2.0
    """Between two passes, however often the controller nudges: they share its cores."""

    def __init__(self, home: Home, study_name: str, *, mirror: Mirror | None = None) -> None:
        self.home, self.study_name = home, study_name
        self.problem: str | None = None
        """What went wrong last; None while all is well."""

        if mirror is None and importlib.util.find_spec("mlflow") is None:
            raise ModuleNotFoundError("No module named 'mlflow'", name="mlflow")
        self._mirror = mirror
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def nudge(self) -> None:
        """Something has changed: mirror it soon. Returns at once."""
        if self.problem is None:
            self._wake.set()

    def close(self, timeout: float = 60.0) -> None:
        """Mirror a last time and end; waits at most `timeout` seconds, what is then missing comes with the next sync."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.problem = f"the last mirroring did not end within {timeout:g} s; `caddie track` completes it"

    def _run(self) -> None:
        pause = self.PAUSE_SECONDS
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            is_last = self._closing.is_set()  # read before the pass, so that a close during it gets one more
            pause = self.PAUSE_SECONDS if self._sync() else min(2 * pause, self.LONGEST_PAUSE_SECONDS)
            if is_last:
                return
            self._closing.wait(self.LEAST_PAUSE_SECONDS)

    def _sync(self) -> bool:
        """One pass; returns whether MLflow took it."""
        if not self.home.study(self.study_name).ledger.exists():
            return True  # the controller has not opened the study yet
        try:
            if self._mirror is None:
                from orchestrator.mirror import Mirror

                self._mirror = Mirror(self.home)
            problems = self._mirror.sync(self.study_name)
        except Exception as error:  # whatever a view raises, the study goes on
            self.problem = (str(error).splitlines() or [type(error).__name__])[0]
            self._mirror = None  # a rebuild may have replaced the database: look everything up again
            return False
        self.problem = problems[0] if problems else None
        return True
