"""The purse: GPU-seconds that are promised to attempts and those that they took, over all studies of a home.

An attempt's longest possible time is set aside before it is submitted, under a lock that every controller takes, and what
it did not take is given back when it has ended. So no cap is exceeded, whatever ends how and however many ask at once.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.home import Home
from orchestrator.ledger import Attempt, StudyState
from orchestrator.study import BudgetPlan, Study
from trainer.protocol import append_line, read_lines, storage_error

RESERVED, SETTLED = "reserved", "settled"  # kinds of record; each has study, run_id, gpu_seconds, time
# RESERVED: what an attempt may take at most. SETTLED: what it took, with attempt, and seconds up to `time`; attempt 0 is a
# reservation that was given back unused.

OVERRUN_SECONDS = 180.0
"""Beyond its timeout an attempt may have its GPUs for so long: grace, the end of its processes, and their being seen to end."""

DAY_SECONDS = 86_400.0
BY_STUDY, BY_DAY = "study", "day"
"""Which cap refuses."""


def run_cost(study: Study) -> float:
    """GPU-seconds that one attempt may take at most; 0 on the CPU."""
    return study.resources.gpus_of_run * (60 * study.timeout_minutes + OVERRUN_SECONDS)


def confirmation_cost(study: Study) -> float:
    """GPU-seconds that are kept back for the confirmation while the search goes on: of a race its first look."""
    plan = study.confirm
    if plan is None:
        return 0.0
    arms = len(study.cells) or (1 if plan.against or not study.search.trials else 2)
    return arms * (plan.first if plan.sequential else len(plan.seeds)) * run_cost(study)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What has gone and what is promised, in GPU-seconds."""

    study_taken: float
    """By the study and those that share its cap."""

    study_reserved: float
    day_taken: float
    """On this day, by UTC, by every study."""

    day_reserved: float
    """By every attempt that has not ended, whenever it began: it may run into the next day."""


class Purse:
    """The purse as one study's controller uses it."""

    def __init__(self, home: Home, study: str, plan: BudgetPlan, *, beside: tuple[str, ...] = ()) -> None:
        self.home = home
        self.study = study
        self.plan = plan
        self.beside = beside
        """Studies that share the study's cap: the other rungs of its ladder."""

        self._offset = 0
        self._open: dict[tuple[str, str], float] = {}
        """GPU-seconds reserved by study and run."""

        self._settled: set[tuple[str, str, int]] = set()
        self._by_study: dict[str, float] = {}
        self._by_day: dict[int, float] = {}

    # ------------------------------------------------------------------------------------------------ asking

    def refusal(self, gpu_seconds: float, *, keep: float = 0.0) -> str | None:
        """Which cap does not let so much begin now, with `keep` of the study's left over; None where none does."""
        if not gpu_seconds or min(self.plan.study_cap_seconds, self.plan.day_cap_seconds) == math.inf:
            return None
        with self._held():
            return self._refusal(gpu_seconds, keep, time.time())

    def reserve(self, run_id: str, gpu_seconds: float, *, keep: float = 0.0) -> str | None:
        """Set GPU-seconds aside for a run's next attempt, or say which cap does not let it. Raises StorageError.

        A run that has some aside keeps them: a killed controller may not have come to the submission.
        """
        if not gpu_seconds:
            return None
        with self._held():
            if (self.study, run_id) in self._open:
                return None
            refused = self._refusal(gpu_seconds, keep, time.time())
            if refused is None:
                self._append(RESERVED, run_id, gpu_seconds)
            return refused

    def _refusal(self, gpu_seconds: float, keep: float, now: float) -> str | None:
        found = self._standing(now)
        if found.study_taken + found.study_reserved + gpu_seconds + keep > self.plan.study_cap_seconds:
            return BY_STUDY
        if found.day_taken + found.day_reserved + gpu_seconds > self.plan.day_cap_seconds:
            return BY_DAY
        return None

    def standing(self) -> Standing:
        """What has gone and what is promised by now."""
        with self._held():
            return self._standing(time.time())

    def _standing(self, now: float) -> Standing:
        live = {name for name, _ in self._open if name == self.study or self.home.study(name).ledger.exists()}
        capped = (self.study, *self.beside)
        return Standing(
            study_taken=sum(self._by_study.get(name, 0.0) for name in capped),
            study_reserved=sum(seconds for (name, _), seconds in self._open.items() if name in capped),
            day_taken=self._by_day.get(_day(now), 0.0),
            day_reserved=sum(seconds for (name, _), seconds in self._open.items() if name in live),
        )

    # ------------------------------------------------------------------------------------------------ settling

    def settle(self, attempt: Attempt) -> None:
        """Note what an attempt took that has ended, and give back the rest. Raises StorageError."""
        if attempt.gpus:
            with self._held():
                self._settle(attempt)

    def _settle(self, attempt: Attempt) -> None:
        if (self.study, attempt.run_id, attempt.number) not in self._settled:
            self._append(
                SETTLED, attempt.run_id, attempt.seconds * attempt.gpus, attempt=attempt.number, seconds=attempt.seconds,
                time=attempt.ended,
            )  # fmt: skip

    def reconcile(self, state: StudyState, gpu_seconds: float) -> None:
        """Bring the purse into line with the study's ledger, which a killed controller left ahead of it or behind.

        Open attempts have their GPU-seconds aside, whatever the caps say by now: they run. Raises StorageError.
        """
        attempts = [attempt for attempt in state.attempts.values() if attempt.gpus or attempt.status is None]
        if not gpu_seconds and not any(attempt.gpus for attempt in attempts):
            return
        with self._held():
            for attempt in attempts:
                if attempt.status is not None:
                    self._settle(attempt)
            running = {attempt.run_id for attempt in attempts if attempt.status is None}
            for run_id in sorted(running if gpu_seconds else ()):
                if (self.study, run_id) not in self._open:
                    self._append(RESERVED, run_id, gpu_seconds)
            for name, run_id in sorted(self._open):
                if name == self.study and run_id not in running:
                    self._append(SETTLED, run_id, 0.0, attempt=0, seconds=0.0)

    # ------------------------------------------------------------------------------------------------ the file

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the purse alone, and know all that is in it. Raises StorageError."""
        try:
            self.home.purse.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.home.purse_lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise storage_error(error, self.home.purse_lock) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                raise StorageError(
                    f"{self.home.purse_lock}: cannot be locked: {error.strerror}; no cap could be kept",
                    hint="set CADDIE_HOME to a file system that has locks",
                ) from error
            self._catch_up()
            yield
        finally:
            os.close(descriptor)

    def _catch_up(self) -> None:
        self._drop_torn_line()
        for offset, record in read_lines(self.home.purse, self._offset):
            self._offset = offset
            self._take(record)

    def _drop_torn_line(self) -> None:
        """Cut off what a killed controller was writing: it has not acted on it."""
        path = self.home.purse
        if not path.exists():
            return
        with path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(self._offset)
            tail = file.read(size - self._offset)
            whole = self._offset + tail.rfind(b"\n") + 1
            if whole < size:
                file.truncate(whole)

    def _append(self, kind: str, run_id: str, gpu_seconds: float, **fields: Any) -> None:
        record = {
            "kind": kind, "study": self.study, "run_id": run_id, "gpu_seconds": gpu_seconds, "time": time.time(), **fields,
        }  # fmt: skip
        append_line(self.home.purse, record, durable=True)
        self._catch_up()

    def _take(self, record: dict[str, Any]) -> None:
        """Carry the state over one record."""
        study, run_id, gpu_seconds = record["study"], record["run_id"], record["gpu_seconds"]
        if record["kind"] == RESERVED:
            self._open[study, run_id] = gpu_seconds
            return
        self._open.pop((study, run_id), None)
        self._settled.add((study, run_id, record["attempt"]))
        self._by_study[study] = self._by_study.get(study, 0.0) + gpu_seconds
        for day, share in _shares(record["time"] - record["seconds"], record["time"]):
            self._by_day[day] = self._by_day.get(day, 0.0) + share * gpu_seconds


def _day(seconds: float) -> int:
    """Day by UTC, counted from 1970."""
    return int(seconds // DAY_SECONDS)


def _shares(began: float, ended: float) -> Iterator[tuple[int, float]]:
    """Parts of a span of time that fall to each day."""
    if ended <= began:
        yield _day(ended), 1.0
        return
    for day in range(_day(began), _day(ended) + 1):
        first, last = max(began, day * DAY_SECONDS), min(ended, (day + 1) * DAY_SECONDS)
        yield day, (last - first) / (ended - began)


def next_day(now: float) -> datetime:
    """When the next day begins, by UTC."""
    return datetime.fromtimestamp((_day(now) + 1) * DAY_SECONDS, tz=UTC)
