"""Looking at studies, and asking one to stop or to try again, from beside its controller."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator import agreement, climb, controller_job, ledger, lock, sweep
from orchestrator import ladder_tables as tables
from orchestrator.agreement import Agreement
from orchestrator.cells import as_text as table_text
from orchestrator.climb import Standing
from orchestrator.errors import CaddieError, StudyBusy
from orchestrator.evidence import read_study, study_names
from orchestrator.home import Home
from orchestrator.ledger import Ledger
from orchestrator.lock import Holder
from orchestrator.retries import failed_runs, kinds_asked
from trainer.protocol import write_bytes_atomically


@dataclass(frozen=True, kw_only=True)
class StudyStatus:
    """Where a study stands, as its ledger and its lock say."""

    name: str
    state: str
    """`running` where a controller works on it, `queued` where one waits for the cluster to begin with it, `left` where
    none does and it is not at its end, else why it closed."""

    controller: str | None
    """Who works on it: the process, since when, and a detached one's log; on another host, when it was last heard."""

    trials: dict[str, int] = field(default_factory=dict)
    """Number of trials by state."""

    trials_planned: int = 0
    jobs: int = 0
    """Attempts that the ledger does not know to have ended."""

    arms: dict[str, int] = field(default_factory=dict)
    """Number of runs by arm."""

    best_trial: int | None = None
    best_value: float | None = None
    best_params: dict[str, Any] = field(default_factory=dict)
    gpu_seconds: float = 0.0
    log: str | None = None
    """What its detached controllers say, and those that were jobs; None where there was none."""

    controller_jobs: list[str] = field(default_factory=list)
    """Jobs of the cluster that wait to be its controller, or are."""

    excluded_nodes: list[str] = field(default_factory=list)
    """Nodes that its runs are kept away from: refused before a run began, or failed twice."""

    rung: str | None = None
    """Of a ladder: the study of the rung to which all but the log and the controller's jobs belong; None for every other."""

    rungs: list[Standing] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    """Of the ladder's neighbouring rungs."""


def statuses(home: Home) -> tuple[list[StudyStatus], list[CaddieError]]:
    """Where each study stands, by name, and why some cannot be read."""
    found: list[StudyStatus] = []
    problems: list[CaddieError] = []
    for name in study_names(home):
        try:
            found.append(_status(home, name))
        except CaddieError as error:
            problems.append(error)
    return found, problems


def status(home: Home, name: str) -> StudyStatus:
    """Where one study stands, of a ladder the rung that is worked on; raises ConfigError, ProtocolError."""
    rungs = climb.find(home, name)
    if not rungs:
        return _status(home, name)
    whole, at_work = home.study(name), climb.current(home, rungs).name
    found = _status(home, at_work)
    return replace(
        found, name=name, rung=at_work, log=str(whole.log) if whole.log.exists() else None,
        controller_jobs=controller_job.jobs_of(home, name), rungs=climb.standings(home, rungs),
        agreements=climb.agreements(rungs, climb.states_of(home, rungs)),
    )  # fmt: skip


def _status(home: Home, name: str) -> StudyStatus:
    """Where one study stands by itself."""
    files, jobs = home.study(name), controller_job.jobs_of(home, name)
    log = str(files.log) if files.log.exists() else None
    controller = lock.holder(files)
    words = _in_words(controller) if controller else None
    if (jobs or controller) and not files.ledger.exists():
        begun = "running" if controller else "queued"
        return StudyStatus(name=name, state=begun, controller=words, log=log, controller_jobs=jobs)
    study, state = read_study(home, name)
    best = state.best
    return StudyStatus(
        name=name,
        state="running" if controller else state.closed or "left",
        controller=words,
        log=log,
        controller_jobs=jobs,
        excluded_nodes=state.excluded_nodes,
        trials=dict(Counter(trial.state for trial in state.trials.values())),
        trials_planned=study.search.trials,
        jobs=sum(attempt.status is None for attempt in state.attempts.values()),
        arms={arm.name: len(arm.runs) for arm in state.arms.values()},
        best_trial=best.number if best else None,
        best_value=best.value if best else None,
        best_params=best.params if best else {},
        gpu_seconds=state.gpu_seconds,
    )


def _in_words(controller: Holder) -> str:
    words = [str(controller)]
    if controller.since:
        words.append(time.strftime("since %Y-%m-%d %H:%M:%S", time.localtime(controller.since)))
    if controller.silent_seconds > 2 * lock.BEAT_SECONDS:
        words.append(f"last heard {controller.silent_seconds:.0f} s ago")
    return ", ".join(words)


def as_text(found: StudyStatus) -> str:
    """A study's status in one paragraph for people."""
    states = ", ".join(f"{count} {state}" for state, count in sorted(found.trials.items())) or "none yet"
    arms = ", ".join(f"{name}: {runs} runs" for name, runs in found.arms.items()) or "not yet"
    lines = [
        f"{found.rung or found.name}: {found.state}" + (f" ({found.controller})" if found.controller else ""),
        *([f"  trials     {states}; {found.trials_planned} planned"] if found.trials_planned else []),
        f"  jobs       {found.jobs}",
        *([f"  controller job {', '.join(found.controller_jobs)}"] if found.controller_jobs else []),
        *([f"  log        {found.log}"] if found.log else []),
        *([f"  excluded   node {', '.join(found.excluded_nodes)}"] if found.excluded_nodes else []),
        f"  confirmed  {arms}",
    ]
    if found.best_value is not None:
        params = ", ".join(
            f"{knob} = {value:.6g}" if isinstance(value, float) else f"{knob} = {value}"
            for knob, value in found.best_params.items()
        )
        lines.append(f"  best       trial {found.best_trial}, {found.best_value:.5f} bits per byte: {params}")
    if found.rungs:
        lines += ["", table_text(tables.state_table(found.rungs)), "", *map(agreement.in_words, found.agreements)]
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

    Where no controller works on it, its jobs are asked directly; controllers that wait in the cluster's queue, or are only
    starting, are taken out of it. Of a ladder it is the rung that is worked on. Raises ConfigError, StorageError.
    """
    rungs = climb.find(home, name)
    if rungs:
        taken = controller_job.cancel_idle(home, name, is_worked_on=_is_worked_on(home, [rung.name for rung in rungs]))
        # Between two rungs no controller would hear it; the climb looks for it before it begins the next.
        write_bytes_atomically(home.study(name).stop, _word(cancel=cancel))
        told = _ask_to_stop(home, climb.current(home, rungs).name, cancel=cancel)
        return told + (f"; took its controller, job {', '.join(taken)}, out of the queue" if taken else "")
    return _ask_to_stop(home, name, cancel=cancel)


def _ask_to_stop(home: Home, name: str, *, cancel: bool) -> str:
    """The same of one study."""
    files = home.study(name)
    idle = controller_job.cancel_idle(home, name, is_worked_on=_is_worked_on(home, [name]))
    if idle and not files.ledger.exists():
        return f"{name}: took its controller, job {', '.join(idle)}, out of the queue; nothing had begun"
    if lock.holder(files) is None:
        read_study(home, name)
    try:
        with lock.held(files):
            return _stop_left_jobs(home, name, cancel=cancel)
    except StudyBusy:
        write_bytes_atomically(files.stop, _word(cancel=cancel))
    if cancel:
        return f"{name}: asked its controller to stop the jobs and end"
    return f"{name}: asked its controller to end after the running jobs"


def _is_worked_on(home: Home, names: Sequence[str]) -> bool:
    """Whether a controller works on any of a ladder's studies, or has brought the last to its end and may be reporting."""
    if any(lock.holder(home.study(name)) for name in names):
        return True
    last = home.study(names[-1]).ledger
    return last.exists() and Ledger(last).state().closed == ledger.FINISHED


def ask_to_retry(home: Home, name: str, *, kinds: Collection[str] = ()) -> str:
    """Ask that a study's failed runs are attempted again; what will be done, in words. Of a ladder it is the rung that was
    begun last.

    `kinds`: failures of trials' own points that are meant too, of retries.NAMEABLE. The controller alone decides: the one
    that works on the study, or the next. Raises ConfigError, ProtocolError, StorageError.
    """
    rungs = climb.find(home, name)
    name = climb.current(home, rungs).name if rungs else name
    study, state = read_study(home, name)
    files, most = home.study(name), study.resources.max_attempts
    meant = sorted({*(kinds_asked(files.retry) or ()), *kinds})
    failed = failed_runs(state, max_attempts=most, kinds=meant)
    left = Counter(run.failure for run in failed_runs(state, max_attempts=most) if run not in failed)
    told = [f"  left to the search: {count} by {kind}; --failure {kind} takes them too" for kind, count in left.items()]
    if not failed:
        why = "nothing is attempted again" if told else "no run failed that another attempt could bring to a score"
        return "\n".join([f"{name}: {why}", *told])
    write_bytes_atomically(files.retry, "\n".join(meant).encode())
    when = "its controller takes it up" if lock.holder(files) else "give the study's command again, it begins with them"
    return "\n".join([f"{name}: to be attempted again; {when}", *(f"  {run.text}" for run in failed), *told])


def _word(*, cancel: bool) -> bytes:
    """What a stop file holds."""
    return (sweep.CANCEL if cancel else sweep.DRAIN).encode()


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
