"""A cluster on which nothing is computed: jobs of the real controller, search and ledger, under a clock that jumps.

A job's scores come from a landscape of knobs whose sizes are those that public runs show: seeds differ by 0.00067 BPB
(pooled over the records of the challenge), step counts by 0.14 %, files by 10 kB; a loss early in a run says as much of the
last one as public runs' do. Run directories, ledger and decisions are
the real ones; only the trainer is an equation, and an hour passes at once.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from orchestrator import ages, attempts, ledger, sweep
from orchestrator.ports import Ending, OpenJob
from orchestrator.slots import JobResources
from trainer import protocol
from trainer.protocol import AttemptDir, EventLog, Result, RunDir, Score

SEED_STD = 0.00067  # BPB; spec of the challenge's records, pooled
STEPS_STD = 0.0014  # of the number of steps, as a part of it
STEPS, SPARE_SECONDS = 5000, 0.2  # of a whole run; by which training ends before its limit, at most
BYTES_STD = 10_000
BEST_BPB = 1.08
CAP = 16_000_000
EARLY, EARLY_FRAC = (
    0.86,
    0.14,
)  # #1162: BPB at step 1,000 of some 7,000 correlates 0.86 with the last one, over public runs
NATS = 2.4  # per token in a bit per byte, at this challenge's tokenizer of 4,096 pieces
POINTS = 200  # drawn to find a landscape's spread
EVALUATION_SECONDS, START_SECONDS, STOP_SECONDS = 500.0, 60.0, 3.0
LOGGED = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)  # of the schedule
CLOCKED: tuple[ModuleType, ...] = (sweep, attempts, ages, ledger)
"""Modules that read a clock and are given this one; the study's lock keeps the machine's."""


class Clock:
    """Seconds that pass when somebody sleeps, at least as far as the next thing that happens."""

    def __init__(self) -> None:
        self.began = time.time()
        self.now = 0.0
        self.next_event: Callable[[], float] = lambda: 0.0

    def sleep(self, seconds: float) -> None:
        self.now = max(self.now + seconds, min(self.next_event(), self.now + 86_400.0))

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Let the controller's modules read this clock."""
        stand_in = SimpleNamespace(
            **{**vars(time), "time": lambda: self.began + self.now, "monotonic": lambda: self.now, "sleep": self.sleep}
        )
        before = [module.__dict__["time"] for module in CLOCKED]
        for module in CLOCKED:
            module.__dict__["time"] = stand_in
        try:
            yield
        finally:
            for module, real in zip(CLOCKED, before, strict=True):
                module.__dict__["time"] = real


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """Bits per byte by knobs: a bowl in each knob's own measure, a ripple, and a cliff where a rate is too high.

    `bounds` are each knob's range, by its dotted name, and whether it is logarithmic. A smaller budget sees the bowl with its
    lowest point moved: what a proxy finds best is not quite what a record finds best.
    """

    seed: int
    bounds: Mapping[str, tuple[float, float, bool]]
    family: str = "bowl"
    """`bowl`, `valley` (knobs that only matter together) or `ripple` (many shallow minima)."""

    drift: float = 0.12
    """Standard deviation by which a budget of a tenth moves the lowest point, as a part of a knob's range. A guess."""

    early: float = EARLY
    """Correlation between the loss at EARLY_FRAC of the schedule and the last one, over points drawn from the bounds."""

    @functools.cached_property
    def wiggle(self) -> float:
        """Standard deviation of an early loss about its trend, which gives that correlation."""
        draw = np.random.default_rng([self.seed, 4])
        names = list(self.bounds)
        spread = np.std([self.excess({n: _value(draw.random(), self.bounds[n]) for n in names}) for _ in range(POINTS)])
        return float(NATS * spread * EARLY_FRAC * math.sqrt(1 / self.early**2 - 1) / (1 - EARLY_FRAC))

    def _numbers(self, salt: int, count: int) -> np.ndarray:
        return np.random.default_rng([self.seed, salt]).random(count)

    def excess(self, knobs: Mapping[str, float], budget: float = 1.0) -> float:
        """Bits per byte above the best, by a training of so many parts of the whole budget, seeds averaged out."""
        count = len(self.bounds)
        lowest, steep = 0.25 + 0.5 * self._numbers(1, count), 0.004 + 0.012 * self._numbers(2, count)
        if budget < 1:
            moved = np.random.default_rng([self.seed, 3]).normal(size=count)
            lowest = np.clip(lowest + self.drift * -math.log10(budget) * moved, 0, 1)
        place = np.array([_part(knobs[name], bounds) for name, bounds in self.bounds.items()])
        off = place - lowest
        value = float((steep * off * off).sum())
        if self.family == "valley" and count > 1:
            value += 0.02 * float((off[:-1] + off[1:]) @ (off[:-1] + off[1:]))
        if self.family == "ripple":
            value += 0.0004 * float((1 - np.cos(9 * off)).sum())
        cliff = float(np.maximum(off - 0.45, 0).max(initial=0))
        return value + 2.0 * cliff * cliff

    def loss_at(self, knobs: Mapping[str, float], frac: float, budget: float, wiggle: float) -> float:
        """Training loss at a part of the schedule, `wiggle` standard deviations off; early losses say less of the last one."""
        trend = 3.3 * (1 + 40 * frac) ** -0.16
        return trend + NATS * self.excess(knobs, budget) * frac + self.wiggle * (1 - frac) * wiggle


def _value(part: float, bounds: tuple[float, float, bool]) -> float:
    low, high, log = bounds
    return low * (high / low) ** part if log else low + part * (high - low)


def _part(value: float, bounds: tuple[float, float, bool]) -> float:
    low, high, log = bounds
    return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)


@dataclass(order=True)
class Event:
    """Something that a job does at a time."""

    when: float
    number: int
    tag: str = field(compare=False)
    frac: float | None = field(compare=False)
    """Part of the schedule whose loss is logged; None for the job's end."""


@dataclass
class Job:
    """A job that is running."""

    run: RunDir
    files: AttemptDir
    config: Mapping[str, Any]
    seed: int
    gpus: int
    began: float
    train_seconds: float
    noise: np.random.Generator
    is_over: bool = False


class Cluster:
    """A launcher that starts every job at once and ends it when its time has come."""

    has_queue = False

    def __init__(self, clock: Clock, landscape: Landscape, *, gpus: int = 8, budget: float = 1.0) -> None:
        self.clock, self.landscape, self.gpus, self.budget = clock, landscape, gpus, budget
        self.jobs: dict[str, Job] = {}
        self.events: list[Event] = []
        self.gpu_seconds = 0.0
        self.idle_seconds: list[float] = []
        """From the end of a job to the next submission into the place that it left."""

        self._freed: list[float] = []
        self._number = 0
        clock.next_event = lambda: self.events[0].when if self.events else math.inf

    def submit(self, run: RunDir, attempt: int, *, tag: str, resources: JobResources) -> str:
        spec = protocol.read_spec(run.spec)
        noise = np.random.default_rng([self.landscape.seed, int(run.run_id[:12], 16), attempt])
        train_seconds = float(spec.config["limits"]["train_seconds"]) - SPARE_SECONDS * noise.random()
        files = run.attempt(attempt)
        files.root.mkdir(parents=True, exist_ok=True)
        job = Job(run, files, spec.config, spec.seed, self.gpus, self.clock.now, train_seconds, noise)
        self.jobs[tag] = job
        begin = self.clock.now + START_SECONDS
        for frac in LOGGED:
            self._push(begin + frac * train_seconds, tag, frac)
        self._push(begin + train_seconds + EVALUATION_SECONDS, tag, None)
        if self._freed:
            self.idle_seconds.append(max(0.0, self.clock.now - self._freed.pop(0)))
        return tag

    def _push(self, when: float, tag: str, frac: float | None) -> None:
        self._number += 1
        heapq.heappush(self.events, Event(when, self._number, tag, frac))

    def look(self, jobs: Collection[OpenJob]) -> list[str]:
        for job in [job for job in jobs if job.files.stop.exists()]:
            found = self.jobs.get(job.tag)
            if found is not None and not found.is_over:
                self._end(job.tag, found, protocol.STOPPED, self.clock.now + STOP_SECONDS)
        while self.events and self.events[0].when <= self.clock.now:
            event = heapq.heappop(self.events)
            job = self.jobs.get(event.tag)  # type: ignore[assignment]
            if job is None or job.is_over:  # type: ignore[attr-defined]
                continue
            if event.frac is None:
                self._end(event.tag, job, protocol.COMPLETE, event.when)  # type: ignore[arg-type]
            else:
                self._log(job, event.frac)  # type: ignore[arg-type]
        return []

    def _knobs(self, job: Job) -> dict[str, float]:
        return {name: float(job.config[name.split(".")[0]][name.split(".")[1]]) for name in self.landscape.bounds}

    def _log(self, job: Job, frac: float) -> None:
        loss = self.landscape.loss_at(self._knobs(job), frac, self.budget, float(job.noise.normal()))
        EventLog(job.files.events).metrics(
            round(STEPS * self.budget * frac),
            frac * job.train_seconds,
            train_loss=loss,
            elapsed_frac=frac,
            tokens_per_second=7e6,
        )

    def _end(self, tag: str, job: Job, status: str, when: float) -> None:
        """Write the result, with the simulated time, of which the ledger makes seconds."""
        job.is_over = True
        self.gpu_seconds += (when - job.began) * job.gpus
        self._freed.append(when)
        bpb = BEST_BPB + self.landscape.excess(self._knobs(job), self.budget) + SEED_STD * float(job.noise.normal())
        score = Score(nats=bpb, tokens=1, bytes=1, loss=bpb, bpb=bpb, seconds=EVALUATION_SECONDS)
        steps = round(STEPS * self.budget * (1 + STEPS_STD * float(job.noise.normal())))
        size = CAP - 15_000 + round(BYTES_STD * float(job.noise.normal()))
        protocol.write_result(
            job.files.result,
            Result(
                run_id=job.run.run_id, attempt=job.files.number, status=status, seed=job.seed, steps=steps,
                train_seconds=job.train_seconds, scores=dict.fromkeys(protocol.STAGES, score) if status == protocol.COMPLETE else {},
                artifact_bytes=size, model_bytes=size, cap_bytes=CAP, phases={"train": job.train_seconds},
            ),
        )  # fmt: skip
        os.utime(job.files.result, (self.clock.began + when,) * 2)
        del self.jobs[tag]

    def is_alive(self, attempt: AttemptDir, *, tag: str | None) -> bool:
        return tag in self.jobs

    def find(self, attempt: AttemptDir, *, tag: str) -> str | None:
        return tag if tag in self.jobs else None

    def ending(self, attempt: AttemptDir, *, tag: str) -> Ending | None:
        return None

    def nodes_of(self, attempt: AttemptDir, *, tag: str) -> tuple[str, ...]:
        return ()

    def cancel(self, tag: str) -> None:
        self.jobs.pop(tag, None)


class Silence:
    """Progress and mirror that nobody looks at."""

    def show(self, state: ledger.StudyState) -> None: ...

    def note(self, text: str) -> None: ...

    def nudge(self) -> None: ...

    def close(self, timeout: float = 0.0) -> None: ...
