"""Early stopping: trials are compared at the same parts of their schedules, as their event files grow, and given up.

Two ways to be behind, the median rule and asynchronous successive halving, and two disasters: a loss that is no number, and
a run far slower than the others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator import ledger
from orchestrator.errors import ProtocolError
from orchestrator.home import Home
from orchestrator.ledger import StudyState, Trial
from orchestrator.measures import TOKENS_PER_SECOND
from orchestrator.ports import Progress, Search
from orchestrator.study import HALVING_RULE, MEDIAN_RULE, Study
from trainer import protocol
from trainer.protocol import ELAPSED_FRAC, TRAIN_LOSS, VAL_LOSS, RunDir

SPEED_FRAC = 0.02
"""Part of its schedule after which a run's speed counts: its first steps wait for disks and caches."""

LOSS_WORDS = {TRAIN_LOSS: "training loss", VAL_LOSS: "validation loss"}


@dataclass(frozen=True, kw_only=True)
class GivenUp:
    """Why a running trial is not worth finishing."""

    reason: str
    """One of orchestrator.ledger.EARLY."""

    text: str
    """The same for people, with the numbers."""


class Curve:
    """The losses of one run at the points where trials are compared, read as its attempts write them.

    A point's loss is the first that is logged from there on and before the next point, by the run's own clock: a fraction
    of its steps or of its seconds. It counts once: an attempt that goes through the same steps again changes nothing.
    """

    def __init__(self, run: RunDir, per_milles: tuple[int, ...], *, metric: str = TRAIN_LOSS) -> None:
        self.run = run
        self.per_milles = per_milles
        self.metric = metric
        self.losses: dict[int, float] = {}
        """Loss by point, in per mille of the schedule."""

        self.tokens_per_second: float | None = None
        """Of its training so far; None before SPEED_FRAC of the schedule."""

        self.has_diverged = False
        """Whether a loss was logged that is not a finite number."""

        self.is_damaged = False
        self._offsets: dict[int, int] = {}
        """Bytes read of each attempt's events."""

    def read(self) -> None:
        """Take up what was written since; raises ProtocolError for a damaged line."""
        if self.is_damaged or len(self.losses) == len(self.per_milles) > 0:
            return
        for attempt in self.run.attempts():
            offset = self._offsets.get(attempt.number, 0)
            for end, event in protocol.read_lines(attempt.events, offset):
                self._offsets[attempt.number] = end
                self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        speed = protocol.values_of(event, ELAPSED_FRAC, protocol.TOKENS_PER_SECOND)
        if speed is not None and speed[0] >= SPEED_FRAC:
            self.tokens_per_second = speed[1]
        for metric in (TRAIN_LOSS, VAL_LOSS):
            found = protocol.values_of(event, metric)
            self.has_diverged |= found is not None and not math.isfinite(found[0])
        values = protocol.values_of(event, ELAPSED_FRAC, self.metric)
        if values is None:
            return
        elapsed_frac, loss = values
        for due, following in zip(self.per_milles, [*self.per_milles[1:], math.inf], strict=True):
            if due <= 1000 * elapsed_frac < following:
                self.losses.setdefault(due, loss)


def is_cut_by_halving(value: float, others: Sequence[float], *, reduction: int, startup_trials: int) -> bool:
    """Asynchronous successive halving at one point: stop what is not among the best 1 / `reduction` of all that got there.

    `others` are the losses of the trials that got there before, stopped and running ones too. The first ones go on, as
    nobody waits for anybody (Li et al., A system for massively parallel hyperparameter tuning, 2020; the stopping form).
    """
    if not math.isfinite(value):
        return True
    if len(others) < startup_trials:
        return False
    places = max(1, (len(others) + 1) // reduction)
    return sum(other < value for other in others) >= places


class EarlyStopping:
    """The curves of one study's trials, and the comparisons that were made on them."""

    def __init__(self, study: Study, home: Home, *, search: Search, progress: Progress) -> None:
        self.home = home
        self.search = search
        self.progress = progress
        self.plan = study.stop_early
        self.per_milles = study.stop_early.per_milles if study.stop_early else ()
        self._curves: dict[str, Curve] = {}
        self._judged: set[tuple[int, int]] = set()
        """(trial, per mille) of the comparisons made by this controller."""

        self._given_up: dict[int, GivenUp] = {}

    def losses_of(self, trial: Trial) -> dict[int, float]:
        """Mean loss over the seeds by per mille of the schedule, where every seed has got there."""
        curves = [self._curve_of(run_id).losses for run_id in trial.runs.values()] if self.plan else []
        shared = set(curves[0]).intersection(*curves[1:]) if curves else set()
        return {due: statistics.fmean(losses[due] for losses in curves) for due in sorted(shared)}

    def given_up(self, trial: Trial, state: StudyState) -> GivenUp | None:
        """Why a running trial is not worth finishing, by what has come due since the last question; None where it is."""
        if self.plan is None or trial.number in self._given_up:
            return self._given_up.get(trial.number)
        losses = self.losses_of(trial)
        found = self._disaster(trial, state)
        for due, loss in losses.items():
            if found is None and (trial.number, due) not in self._judged:
                self._judged.add((trial.number, due))
                found = self._behind(trial, due, loss, state)
        if found is not None:
            self._given_up[trial.number] = found
            self.progress.note(f"trial {trial.number} is stopped: {found.text}")
        return found

    def _behind(self, trial: Trial, due: int, loss: float, state: StudyState) -> GivenUp | None:
        """Whether the trial is behind the others at one point of its schedule."""
        assert self.plan is not None, "asked where there is a plan"
        words = f"its {LOSS_WORDS[self.plan.metric]} {loss:.4f} at {due / 10:g} % of the schedule"
        if self.plan.rule == MEDIAN_RULE and self.search.should_stop(trial.number, due, loss):
            return GivenUp(reason=ledger.MEDIAN, text=f"{words} is above the median")
        if self.plan.rule == HALVING_RULE:
            others = self._losses_at(due, trial, state)
            if is_cut_by_halving(loss, others, reduction=self.plan.reduction, startup_trials=self.plan.startup_trials):
                ahead = sum(other < loss for other in others)
                text = f"{words} has {ahead} of {len(others)} before it, 1 in {self.plan.reduction} goes on"
                return GivenUp(reason=ledger.HALVING, text=text)
        return None

    def _losses_at(self, due: int, trial: Trial, state: StudyState) -> list[float]:
        """The other trials' losses at a point: from the ledger where they have ended, else from their events."""
        others = [other for other in state.trials.values() if other.number != trial.number]
        losses = [self.losses_of(other) if other.state == ledger.RUNNING else other.intermediate for other in others]
        return [found[due] for found in losses if due in found]

    def _disaster(self, trial: Trial, state: StudyState) -> GivenUp | None:
        """What no trial recovers from."""
        assert self.plan is not None, "asked where there is a plan"
        curves = [self._curve_of(run_id) for run_id in trial.runs.values()]
        if any(curve.has_diverged for curve in curves):
            return GivenUp(reason=ledger.DIVERGED, text="its loss is not a finite number")
        speeds = [curve.tokens_per_second for curve in curves if curve.tokens_per_second is not None]
        done = [other for other in state.trials.values() if other.state == ledger.COMPLETE]
        usual = [other.measures[TOKENS_PER_SECOND] for other in done if TOKENS_PER_SECOND in other.measures]
        if not speeds or not self.plan.min_throughput or len(usual) < self.plan.startup_trials:
            return None
        median = statistics.median(usual)
        if min(speeds) >= self.plan.min_throughput * median:
            return None
        return GivenUp(
            reason=ledger.SLOW,
            text=f"{min(speeds):,.0f} tokens per second are under {self.plan.min_throughput:.0%} of the median {median:,.0f}",
        )

    def _curve_of(self, run_id: str) -> Curve:
        """A run's losses so far; a damaged event file has none further, and its run goes on."""
        if run_id not in self._curves:
            metric = self.plan.metric if self.plan else TRAIN_LOSS
            self._curves[run_id] = Curve(self.home.run(run_id), self.per_milles, metric=metric)
        curve = self._curves[run_id]
        try:
            curve.read()
        except ProtocolError as error:
            self.progress.note(f"run {run_id} is not compared any more: {error}")
            curve.is_damaged = True
        return curve
