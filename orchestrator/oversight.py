"""Looking at studies, and asking one to stop, from beside its controller."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from orchestrator import ledger, lock, sweep
from orchestrator.errors import CaddieError, StudyBusy
from orchestrator.evidence import read_study, study_names
from orchestrator.home import Home
from orchestrator.ledger import Ledger
from trainer.protocol import write_bytes_atomically


@dataclass(frozen=True, kw_only=True)
class StudyStatus:
    """Where a study stands, as its ledger and its lock say."""

    name: str
    state: str
    """`running` where a controller works on it, `left` where none does and it is not at its end, else why it closed."""

    controller: str | None
    trials: dict[str, int]
    """Number of trials by state."""

    trials_planned: int
    jobs: int
    """Attempts that the ledger does not know to have ended."""

    arms: dict[str, int]
    """Number of runs by arm."""

    best_trial: int | None
    best_value: float | None
    best_params: dict[str, Any]
    gpu_seconds: float


def statuses(home: Home) -> tuple[list[StudyStatus], list[CaddieError]]:
    """Where each study stands, by name, and why some cannot be read."""
    found: list[StudyStatus] = []
    problems: list[CaddieError] = []
    for name in study_names(home):
        try:
            found.append(status(home, name))
        except CaddieError as error:
            problems.append(error)
    return found, problems


def status(home: Home, name: str) -> StudyStatus:
    """Where one study stands; raises ConfigError, ProtocolError."""
    study, state = read_study(home, name)
    controller = lock.holder(home.study(name).lock)
    best = state.best
    return StudyStatus(
        name=name,
        state="running" if controller else state.closed or "left",
        controller=controller,
        trials=dict(Counter(trial.state for trial in state.trials.values())),
        trials_planned=study.search.trials,
        jobs=sum(attempt.status is None for attempt in state.attempts.values()),
        arms={arm.name: len(arm.runs) for arm in state.arms.values()},
        best_trial=best.number if best else None,
        best_value=best.value if best else None,
        best_params=best.params if best else {},
        gpu_seconds=state.gpu_seconds,
    )


def as_text(found: StudyStatus) -> str:
    """A study's status in one paragraph for people."""
    states = ", ".join(f"{count} {state}" for state, count in sorted(found.trials.items())) or "none yet"
    arms = ", ".join(f"{name}: {runs} runs" for name, runs in found.arms.items()) or "not yet"
    lines = [
        f"{found.name}: {found.state}" + (f" ({found.controller})" if found.controller else ""),
        *([f"  trials     {states}; {found.trials_planned} planned"] if found.trials_planned else []),
        f"  jobs       {found.jobs}",
        f"  confirmed  {arms}",
    ]
    if found.best_value is not None:
        params = ", ".join(
            f"{knob} = {value:.6g}" if isinstance(value, float) else f"{knob} = {value}"
            for knob, value in found.best_params.items()
        )
        lines.append(f"  best       trial {found.best_trial}, {found.best_value:.5f} bits per byte: {params}")
    return "\n".join(lines)


def as_line(found: StudyStatus) -> str:
    """A study's status in one line of a list."""
    asked = (
        f"{sum(found.trials.values())} of {found.trials_planned} trials"
        if found.trials_planned
        else f"{sum(found.arms.values())} runs"
    )
    best = "" if found.best_value is None else f"best {found.best_value:.5f}"
    return f"{found.name:<32} {found.state:<10} {asked:<16} {best}".rstrip()


def ask_to_stop(home: Home, name: str, *, cancel: bool) -> str:
    """Ask a study's controller to submit nothing more, with `cancel` also to stop its jobs; what was done, in words.

    Where no controller works on it, its jobs are asked directly. Raises ConfigError, StorageError.
    """
    read_study(home, name)
    files = home.study(name)
    try:
        with lock.held(files.lock):
            return _stop_left_jobs(home, name, cancel=cancel)
    except StudyBusy:
        write_bytes_atomically(files.stop, (sweep.CANCEL if cancel else sweep.DRAIN).encode())
    if cancel:
        return f"{name}: asked its controller to stop the jobs and end"
    return f"{name}: asked its controller to end after the running jobs"


def _stop_left_jobs(home: Home, name: str, *, cancel: bool) -> str:
    journal = Ledger(home.study(name).ledger)
    journal.drop_torn_line()
    running = [attempt for attempt in journal.state().attempts.values() if attempt.status is None]
    if not running:
        return f"{name}: no controller works on it and no job runs; there is nothing to stop"
    if not cancel:
        return f"{name}: no controller works on it; {len(running)} jobs end by themselves, --cancel stops them now"
    for attempt in running:
        journal.append(ledger.STOP_ASKED, run_id=attempt.run_id, attempt=attempt.number, reason=ledger.CANCELLED)
        write_bytes_atomically(home.run(attempt.run_id).attempt(attempt.number).stop, b"")
    return f"{name}: no controller works on it; asked {len(running)} jobs to stop"
