"""Early stopping: trials are compared by their training losses at the same parts of their schedules, as these come in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import ProtocolError
from orchestrator.home import Home
from orchestrator.ledger import Trial
from orchestrator.ports import Progress, Search
from orchestrator.study import Study
from trainer import protocol
from trainer.protocol import ELAPSED_FRAC, TRAIN_LOSS, RunDir


class Curve:
    """The training losses of one run at the points where trials are compared, read as its attempts write them.

    A point's loss is the first that is logged from there on and before the next point, by the run's own clock: a fraction
    of its steps or of its seconds. It counts once: an attempt that goes through the same steps again changes nothing.
    """

    def __init__(self, run: RunDir, per_milles: tuple[int, ...]) -> None:
        self.run = run
        self.per_milles = per_milles
        self.losses: dict[int, float] = {}
        """Loss by point, in per mille of the schedule."""

        self._offsets: dict[int, int] = {}
        """Bytes read of each attempt's events."""

    def read(self) -> None:
        """Take up what was written since; raises ProtocolError for a damaged line."""
        if len(self.losses) == len(self.per_milles):
            return
        for attempt in self.run.attempts():
            offset = self._offsets.get(attempt.number, 0)
            for end, event in protocol.read_lines(attempt.events, offset):
                self._offsets[attempt.number] = end
                self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        values = protocol.values_of(event, ELAPSED_FRAC, TRAIN_LOSS)
        if values is None:
            return
        elapsed_frac, loss = values
        for due, following in zip(self.per_milles, [*self.per_milles[1:], math.inf], strict=True):
            if due <= 1000 * elapsed_frac < following:
                self.losses.setdefault(due, loss)


class EarlyStopping:
    """The curves of one study's trials, and the comparisons that were made on them."""

    def __init__(self, study: Study, home: Home, *, search: Search, progress: Progress) -> None:
        self.home = home
        self.search = search
        self.progress = progress
        self.per_milles = study.stop_early.per_milles if study.stop_early else ()
        self._curves: dict[str, Curve] = {}
        self._judged: set[tuple[int, int]] = set()
        """(trial, per mille) of the comparisons made by this controller."""

    def losses_of(self, trial: Trial) -> dict[int, float]:
        """Mean training loss over the seeds by per mille of the schedule, where every seed has got there."""
        curves = [self._curve_of(run_id).losses for run_id in trial.runs.values()]
        shared = set(curves[0]).intersection(*curves[1:]) if curves else set()
        return {due: statistics.fmean(losses[due] for losses in curves) for due in sorted(shared)}

    def is_behind(self, trial: Trial) -> bool:
        """Whether a running trial is not worth finishing, by a comparison that has come due since the last question."""
        for due, loss in self.losses_of(trial).items():
            if (trial.number, due) not in self._judged:
                self._judged.add((trial.number, due))
                if self.search.should_stop(trial.number, due, loss):
                    self.progress.note(
                        f"trial {trial.number} is stopped: its training loss {loss:.4f} at {due / 10:g} % of the schedule "
                        "is above the median"
                    )
                    return True
        return False

    def _curve_of(self, run_id: str) -> Curve:
        """A run's losses so far; a damaged event file has none further, and its run goes on."""
        if run_id not in self._curves:
            self._curves[run_id] = Curve(self.home.run(run_id), self.per_milles)
        curve = self._curves[run_id]
        try:
            curve.read()
        except ProtocolError as error:
            self.progress.note(f"run {run_id} is not compared any more: {error}")
            curve.per_milles = tuple(curve.losses)
        return curve
