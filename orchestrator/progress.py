"""What a person sees while a study runs: a live table on a terminal, one line a change anywhere else."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.claims import read_claim
from orchestrator.errors import CaddieError
from orchestrator.ledger import Arm, Attempt, StudyState, Trial
from orchestrator.runs import RunStore
from orchestrator.study import Study
from trainer import protocol
from trainer.protocol import METRIC, PHASE, TRAIN_LOSS, AttemptDir

TAIL_BYTES = 8192
"""Read from the end of an event file: room for dozens of events."""

HEARTBEAT_SECONDS = 30.0
"""Longest silence of the plain form."""

MOST_TOLD = 3
"""Running runs that a heartbeat tells of."""

QUEUED, START = "queued", "start"
"""Phases that no trainer tells."""


@dataclass(frozen=True, kw_only=True)
class RunningRun:
    """One attempt under way."""

    owner: str
    seed: int | None
    run_id: str
    phase: str
    """The trainer's last phase; `queued` before its worker has begun, `start` before the first phase."""

    step: int
    steps: int
    """Planned; 0 where only the log of somebody else's script could say."""

    loss: float | None
    seconds: float
    """Since it began; of a queued one since its submission."""

    @property
    def is_queued(self) -> bool:
        return self.phase == QUEUED


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """How a study stands at one moment."""

    running: tuple[RunningRun, ...]
    runs_asked: int
    """Runs of the whole budget; the confirmation of a best point that is not the preset included."""

    complete: int
    failed: int
    stopped: int
    trials_told: int
    best: Trial | None
    seconds_left: float | None
    """None before any run has ended."""

    closed: str | None

    @property
    def ended(self) -> int:
        return self.complete + self.failed + self.stopped


def snapshot(study: Study, store: RunStore, state: StudyState, *, now: float | None = None) -> Snapshot:
    """Read how a study stands; of the event files, only the ends of those being written."""
    now = time.time() if now is None else now
    running = tuple(
        _running(study, store, state, attempt, now) for attempt in state.attempts.values() if attempt.status is None
    )
    ends = Counter(_last_status(store, state, run_id) for run_id in state.run_ids)
    asked = runs_asked(study, state)
    to_go = max(0, asked - ends[protocol.COMPLETE] - ends[protocol.FAILED] - ends[protocol.STOPPED])
    return Snapshot(
        running=running,
        runs_asked=asked,
        complete=ends[protocol.COMPLETE],
        failed=ends[protocol.FAILED],
        stopped=ends[protocol.STOPPED],
        trials_told=sum(trial.state != "running" for trial in state.trials.values()),
        best=state.best,
        seconds_left=None if state.closed else _seconds_left(study, state, running, to_go),
        closed=state.closed,
    )


def runs_asked(study: Study, state: StudyState) -> int:
    """Runs that the whole budget holds, as far as it is known: a best point that is the preset is confirmed once."""
    searched = max(study.search.trials, len(state.trials)) * len(study.search.seeds)
    if study.confirm is None:
        return searched
    is_known = len(state.arms) > 0 or study.search.trials == 0
    arms = len(study.cells) or (max(1, len(state.arms)) if is_known else 2)
    return searched + arms * len(study.confirm.seeds)


def _last_status(store: RunStore, state: StudyState, run_id: str) -> str | None:
    """Status of a run's latest attempt; a run that another study has completed needs none."""
    attempts = state.attempts_of(run_id)
    if attempts:
        return attempts[-1].status
    return protocol.COMPLETE if store.is_complete(run_id) else None


def _seconds_left(study: Study, state: StudyState, running: tuple[RunningRun, ...], to_go: int) -> float | None:
    """Median duration of complete runs × runs to go ÷ runs at a time, less what the running ones have done.

    What waits in a queue has done nothing. As many run at a time as have begun or, where none has, as wait.
    """
    durations = [attempt.seconds for attempt in state.attempts.values() if attempt.status == protocol.COMPLETE]
    if not durations:
        return None
    median = statistics.median(durations)
    begun = [run for run in running if not run.is_queued]
    done = sum(min(run.seconds, median) for run in begun)
    at_once = max(1, len(begun or running), 1 if study.resources.gpus_per_run else study.resources.slots)
    return max(0.0, median * to_go - done) / at_once


def _running(study: Study, store: RunStore, state: StudyState, attempt: Attempt, now: float) -> RunningRun:
    owner, seed = _owner(state, attempt.run_id)
    files = store.home.run(attempt.run_id).attempt(attempt.number)
    claim = read_claim(files)
    phase, step, loss = START if claim else QUEUED, 0, None
    for event in tail_events(files):
        if event.get("kind") == PHASE:
            name = str(event.get("name", phase))
            phase = f"after {name}" if event.get("state") == "end" else name
        elif event.get("kind") == METRIC:
            values = event.get("values", {})
            if TRAIN_LOSS in values:  # the steps of other metrics are not the optimiser's
                step, loss = int(event.get("step", step)), values[TRAIN_LOSS]
                phase = "train" if phase in (QUEUED, START) else phase
        else:
            phase = START if phase == QUEUED else phase
    return RunningRun(
        owner=owner, seed=seed, run_id=attempt.run_id, phase=phase, step=step,
        steps=0 if study.script else study.config.schedule.steps, loss=loss,
        seconds=max(0.0, now - (claim.began if claim and claim.began else attempt.submitted)),
    )  # fmt: skip


def _owner(state: StudyState, run_id: str) -> tuple[str, int | None]:
    """Who asked for a run, and its seed."""
    owners: list[Trial | Arm] = [*state.trials.values(), *state.arms.values()]
    for owner in reversed(owners):
        for seed, found in owner.runs.items():
            if found == run_id:
                return owner.label, seed
    return run_id, None


def tail_events(attempt: AttemptDir) -> Iterator[dict[str, Any]]:
    """The whole events within the last bytes of an event file; a display forgives a damaged one."""
    try:
        with attempt.events.open("rb") as file:
            size = file.seek(0, 2)
            start = max(0, size - TAIL_BYTES)
            file.seek(start)
            lines = file.read().split(b"\n")
    except OSError:  # not begun, or a network file system between two states
        return
    for line in lines[1 if start else 0 : -1]:  # the first may be cut, the last is still being written
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def duration_text(seconds: float) -> str:
    """`45 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def summary_text(study: Study, now: Snapshot) -> str:
    """One line: what is done, running and left."""
    parts = [f"{now.complete} of {now.runs_asked} runs done"]
    queued = sum(run.is_queued for run in now.running)
    counts = {"failed": now.failed, "stopped": now.stopped, "running": len(now.running) - queued, "queued": queued}
    parts += [f"{count} {word}" for word, count in counts.items() if count]
    if now.best is not None and now.best.value is not None:
        parts.append(f"best {now.best.value:.5f} (trial {now.best.number})")
    if now.seconds_left is not None:
        parts.append(f"about {duration_text(now.seconds_left)} left")
    return f"{study.name}: " + ", ".join(parts)


def running_text(run: RunningRun) -> str:
    """What one run does: `arm preset, seed 42: train, step 40 of 80, loss 4.7632, 3 min 05 s`."""
    seed = "" if run.seed is None else f", seed {run.seed}"
    step = [f"step {steps_text(run)}"] if run.step else []
    loss = [] if run.loss is None else [f"loss {run.loss:.4f}"]
    return f"{run.owner}{seed}: " + ", ".join([run.phase, *step, *loss, duration_text(run.seconds)])


def steps_text(run: RunningRun) -> str:
    """The step, of how many where that is known."""
    return f"{run.step} of {run.steps}" if run.steps else str(run.step)


class Progress:
    """Shows a study on a stream until `close`."""

    def __init__(self, study: Study, store: RunStore, stream: TextIO | None = None) -> None:
        stream = sys.stderr if stream is None else stream
        self._study, self._store = study, store
        self._display: _LiveTable | _PlainLines = _LiveTable(stream) if stream.isatty() else _PlainLines(stream)

    def show(self, state: StudyState) -> None:
        """Bring the display up to the study's state."""
        try:
            now = snapshot(self._study, self._store, state)
        except CaddieError:
            return  # the controller meets the damaged file too, and says it better
        self._display.show(self._study, state, now)

    def note(self, text: str) -> None:
        """Say something that the table has no place for."""
        self._display.note(text)

    def close(self) -> None:
        """Leave the last state standing."""
        self._display.close()


class _PlainLines:
    """A line for each change; a heartbeat without any says what the first runs do."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._asked: set[str] = set()
        self._ended: set[tuple[str, int]] = set()
        self._best: int | None = None
        self._closed: str | None = None
        self._spoken = -HEARTBEAT_SECONDS

    def show(self, study: Study, state: StudyState, now: Snapshot) -> None:
        lines = [*self._news(state)]
        if lines or time.monotonic() - self._spoken >= HEARTBEAT_SECONDS:
            silent = [] if lines else [running_text(run) for run in now.running[:MOST_TOLD]]
            for line in [*lines, *silent, summary_text(study, now)]:
                self.note(line)

    def _news(self, state: StudyState) -> Iterator[str]:
        for name, params in _asked(state):
            if name not in self._asked:
                self._asked.add(name)
                yield f"{name}: {_params(params)}"
        for key, attempt in state.attempts.items():
            if attempt.status is not None and key not in self._ended:
                self._ended.add(key)
                yield _end_line(state, attempt)
        best = state.best
        if best is not None and best.number != self._best and best.value is not None:
            self._best = best.number
            yield f"new best: trial {best.number}, {best.value:.5f}"
        if state.closed != self._closed:
            self._closed = state.closed
            if state.closed:
                yield f"study {state.closed}"

    def note(self, text: str) -> None:
        self._spoken = time.monotonic()
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        self._stream.flush()


class _LiveTable:
    """A table that is drawn over itself."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._live = Live(console=self._console, refresh_per_second=4, transient=False)
        self._live.start()

    def show(self, study: Study, state: StudyState, now: Snapshot) -> None:
        self._live.update(render(study, now))

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def close(self) -> None:
        self._live.stop()


def render(study: Study, now: Snapshot) -> Group:
    """The live table: running runs, the best point so far, one line of counts."""
    table = Table(
        title=study.question, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim"
    )
    for column, justify in (
        ("run of", "left"),
        ("seed", "right"),
        ("phase", "left"),
        ("step", "right"),
        ("loss", "right"),
        ("time", "right"),
    ):
        table.add_column(column, justify="right" if justify == "right" else "left", no_wrap=True)
    for run in now.running:
        loss = "–" if run.loss is None else f"{run.loss:.4f}"
        seed = "–" if run.seed is None else str(run.seed)
        table.add_row(run.owner, seed, run.phase, steps_text(run), loss, duration_text(run.seconds))
    best = now.best
    lines = (
        [Text(f"best so far: trial {best.number}, {best.value:.5f}  ({_params(best.params)})", style="green")]
        if best
        else []
    )
    return Group(table, *lines, Text(summary_text(study, now), style="bold"))


def _asked(state: StudyState) -> Iterator[tuple[str, dict[str, Any]]]:
    for trial in state.trials.values():
        yield f"trial {trial.number}" + (" (preset)" if trial.number == 0 else ""), trial.params
    for arm in state.arms.values():
        yield f"arm {arm.name}, seeds {', '.join(map(str, arm.runs))}", arm.params


def _params(params: dict[str, Any]) -> str:
    return (
        ", ".join(
            f"{knob} = {value:.4g}" if isinstance(value, float) else f"{knob} = {value}"
            for knob, value in params.items()
        )
        or "unchanged"
    )


def _end_line(state: StudyState, attempt: Attempt) -> str:
    owner, seed = _owner(state, attempt.run_id)
    reason = attempt.failure or attempt.stop_reason
    why = f" ({reason})" if reason and attempt.status != protocol.COMPLETE else ""
    return f"{owner}, seed {seed}: {attempt.status}{why} after {duration_text(attempt.seconds)}"
