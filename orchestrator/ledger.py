"""The ledger: the controller's append-only file of decisions, and the state of a study that follows from it.

Every decision is on disk before it is acted on, so a killed controller finds here what it had decided and in the run
directories what came of it. Optuna's storage and MLflow are rebuilt from these two.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import ProtocolError
from trainer.protocol import DATA, DISK, NODE, PREEMPTED, RETRYABLE, STOPPED, append_line, read_lines, storage_error

# Kinds of record. Each record carries `kind` and `time` (unix seconds).
OPENED = "opened"  # source (the study file's text), digest, identity {what: hash}, caddie (version)
TRIAL_ASKED = (
    "trial_asked"  # trial, origin, params {knob: value}, runs {seed: run_id}; queued (id), source where enqueued
)
TRIAL_TOLD = "trial_told"  # trial, state, value, constraints, measures {name: value}, intermediate {per mille: value}, reason, failure
ARM_ASKED = "arm_asked"  # arm, trial, params, runs {seed: run_id}
SUBMITTING = "submitting"  # run_id, attempt, tag, resources: the intention, before the scheduler hears of it
SUBMITTED = "submitted"  # run_id, attempt, job_id
# run_id, attempt, status, failure (kind or null), began (null where it never did), seconds, gpus; where known nodes [name],
# is_refused
ENDED = "ended"
STOP_ASKED = "stop_asked"  # run_id, attempt, reason
RETRIED = "retried"  # runs [id] whose attempts so far count no more, trials [number] that wait for them again
CLOSED = "closed"  # reason

RUNNING, COMPLETE, PRUNED, FAILED = "running", "complete", "pruned", "failed"  # state of a trial
BY_PRESET, BY_SAMPLER, BY_HAND = "preset", "sampler", "enqueued"  # origin of a trial
PRESET_ARM, BEST_ARM = "preset", "best"  # arm; where a candidate is named and nothing searched, that one is the second
MEDIAN, CANCELLED = "median", "cancelled"  # reason for which an attempt is stopped
HALVING, DIVERGED, SLOW = "halving", "not a finite number", "too slow"  # the same, of a trial
EARLY = frozenset({MEDIAN, HALVING, DIVERGED, SLOW})  # reasons that give up a trial: its runs are not wanted again
FINISHED, HALTED, BROKEN = "finished", "stopped", "failed"  # reason for which a study is closed
SPENT = "ended by its budget"  # the same, with trials or seeds left that its caps do not let begin

TO_MEND = frozenset(
    {DISK, DATA}
)  # failures that say nothing of the trial and that no other attempt escapes: people mend them
WANTED, ACTIVE, SETTLED = "wanted", "active", "settled"  # a run needs an attempt, has one, needs no more

NODE_FAILURES = 2  # so many crashes of a node, with nothing completed on it in between, and it gets no more
SAME_CRASH_SECONDS = 120.0  # within which the attempts that a node loses are lost by one crash
MOST_PREEMPTIONS = 50  # of a run, before they count as failures: one that never comes to its end must end


@dataclass(kw_only=True)
class Trial:
    """One point of the space and its runs; number 0 is the preset."""

    number: int
    origin: str
    params: dict[str, Any]
    runs: dict[int, str]
    """Run id by seed."""

    state: str = RUNNING
    value: float | None = None
    """Mean of the objective over the runs, in bits per byte."""

    constraints: dict[str, float] = field(default_factory=dict)
    """Feasible where every value is at most 0."""

    intermediate: dict[int, float] = field(default_factory=dict)
    """Training loss by the per mille of the schedule at which trials are compared."""

    reason: str = ""
    """Why it failed or was stopped."""

    measures: dict[str, float] = field(default_factory=dict)
    """What its runs took, of the seeds the worst; see orchestrator.measures."""

    failure: str | None = None
    """Kind of the failure, where it failed."""

    queued: str | None = None
    """Id of the request by which it was enqueued."""

    @property
    def label(self) -> str:
        return f"trial {self.number}"

    @property
    def is_feasible(self) -> bool:
        return all(value <= 0 for value in self.constraints.values())


@dataclass(kw_only=True)
class Arm:
    """A configuration that is confirmed on several seeds: the unchanged preset, or the best point."""

    name: str
    trial: int
    params: dict[str, Any]
    runs: dict[int, str]

    @property
    def label(self) -> str:
        return f"arm {self.name}"


@dataclass(kw_only=True)
class Attempt:
    """One submission, as the controller knows it."""

    run_id: str
    number: int
    tag: str
    resources: dict[str, Any]
    submitted: float
    job_id: str | None = None
    stop_reason: str | None = None
    status: str | None = None
    """None while it has not been seen to end."""

    failure: str | None = None
    began: float | None = None
    """Unix seconds at which it had its resources; known of one that has ended, and not where it never began."""

    seconds: float = 0.0
    """For which it had them."""

    gpus: int = 0
    nodes: tuple[str, ...] = ()
    """Where it ran, as far as it is known."""

    is_refused: bool = False
    """Whether the check before the trainer's start found its node wanting: the run has not begun."""

    @property
    def ended(self) -> float:
        """Unix seconds at which it gave its resources back: when it ended, not when that was seen."""
        return (self.submitted if self.began is None else self.began) + self.seconds


@dataclass(kw_only=True)
class StudyState:
    """What the ledger says, replayed."""

    source: str = ""
    identity: dict[str, str] = field(default_factory=dict)
    """Hashes of what must not change while trials are compared."""

    trials: dict[int, Trial] = field(default_factory=dict)
    arms: dict[str, Arm] = field(default_factory=dict)
    attempts: dict[tuple[str, int], Attempt] = field(default_factory=dict)
    closed: str | None = None
    opened_at: float = 0.0
    _attempts_by_run: dict[str, list[Attempt]] = field(default_factory=dict, repr=False, compare=False)
    _node_failures: dict[str, list[float]] = field(default_factory=dict, repr=False, compare=False)
    _forgiven: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    """Number of a run's last attempt that counts no more, by run."""

    def __post_init__(self) -> None:
        for attempt in self.attempts.values():
            self._attempts_by_run.setdefault(attempt.run_id, []).append(attempt)

    def add(self, attempt: Attempt) -> None:
        """Note an attempt; one that was noted before under its number is replaced."""
        others = [known for known in self.attempts_of(attempt.run_id) if known.number != attempt.number]
        self._attempts_by_run[attempt.run_id] = [*others, attempt]
        self.attempts[attempt.run_id, attempt.number] = attempt

    @property
    def best(self) -> Trial | None:
        """The complete, feasible trial with the lowest value; the earliest of equals."""
        done = [t for t in self.trials.values() if t.state == COMPLETE and t.is_feasible and t.value is not None]
        return min(done, key=lambda t: (t.value, t.number), default=None)

    @property
    def run_ids(self) -> list[str]:
        """Every run that the study asked for, once, in order."""
        asked: list[Trial | Arm] = [*self.trials.values(), *self.arms.values()]
        return list(dict.fromkeys(run_id for owner in asked for run_id in owner.runs.values()))

    def attempts_of(self, run_id: str) -> list[Attempt]:
        return self._attempts_by_run.get(run_id, [])

    @property
    def open_attempts(self) -> list[Attempt]:
        """Those that have not been seen to end."""
        return [attempt for attempt in self.attempts.values() if attempt.status is None]

    def standing(self, run_id: str, *, max_attempts: int) -> str:
        """WANTED, ACTIVE or SETTLED.

        What was cancelled, or found the disk full or the data damaged, is wanted again however often; what the machine
        failed, `max_attempts` times. A node that was refused before the run began counts from its second refusal on, and
        pre-emption, which may come however often, from MOST_PREEMPTIONS on. Nothing counts that came before a retry.
        """
        attempts = [a for a in self.attempts_of(run_id) if a.number > self._forgiven.get(run_id, 0)]
        if not attempts:
            return WANTED
        last = attempts[-1]
        if last.status is None:
            return ACTIVE
        if last.failure in TO_MEND or (last.status == STOPPED and last.stop_reason == CANCELLED):
            return WANTED
        preempted = sum(attempt.failure == PREEMPTED for attempt in attempts)
        lost = sum(attempt.failure in RETRYABLE for attempt in attempts) - min(preempted, MOST_PREEMPTIONS)
        lost -= len({attempt.nodes for attempt in attempts if attempt.is_refused})
        return WANTED if last.failure in RETRYABLE and lost < max_attempts else SETTLED

    def retry(self, runs: Iterable[str], trials: Iterable[int]) -> None:
        """Want runs again whatever came of them, and wait for these trials again; what was held against nodes is forgotten."""
        for run_id in runs:
            self._forgiven[run_id] = max((attempt.number for attempt in self.attempts_of(run_id)), default=0)
        for number in trials:
            old = self.trials[number]
            self.trials[number] = Trial(
                number=number, origin=old.origin, params=old.params, runs=old.runs, queued=old.queued
            )
        self._node_failures.clear()

    @property
    def excluded_nodes(self) -> list[str]:
        """Nodes that were refused, or failed often enough with nothing completed in between: they get no more, by name."""
        return sorted(node for node, times in self._node_failures.items() if len(times) >= NODE_FAILURES)

    def note_nodes(self, attempt: Attempt, seconds: float) -> None:
        """Note what an attempt that ended at that time says of its nodes; one crash that ends several runs counts once."""
        for node in attempt.nodes:
            times = self._node_failures.setdefault(node, [])
            if attempt.is_refused:
                times += [seconds] * NODE_FAILURES
            elif attempt.failure == NODE:
                times += [seconds] if not times or abs(seconds - times[-1]) > SAME_CRASH_SECONDS else []
            elif attempt.status == COMPLETE and len(times) < NODE_FAILURES:
                times.clear()

    @property
    def gpu_seconds(self) -> float:
        return sum(attempt.seconds * attempt.gpus for attempt in self.attempts.values())


def _by_int(mapping: Mapping[str, Any]) -> dict[int, Any]:
    return {int(key): value for key, value in mapping.items()}


def apply(state: StudyState, record: Mapping[str, Any]) -> None:
    """Carry the state over one record; raises ProtocolError for an unknown kind, KeyError for a missing key."""
    kind = record["kind"]
    if kind == OPENED:
        state.source, state.closed = record["source"], None
        state.identity = record.get("identity", {})
        state.opened_at = state.opened_at or record["time"]
    elif kind == TRIAL_ASKED:
        number = record["trial"]
        state.trials[number] = Trial(
            number=number, origin=record["origin"], params=record["params"], runs=_by_int(record["runs"]),
            queued=record.get("queued"),
        )  # fmt: skip
    elif kind == TRIAL_TOLD:
        trial = state.trials[record["trial"]]
        trial.state, trial.value, trial.reason = record["state"], record["value"], record.get("reason", "")
        trial.constraints, trial.intermediate = record["constraints"], _by_int(record["intermediate"])
        trial.measures, trial.failure = record.get("measures", {}), record.get("failure")
    elif kind == ARM_ASKED:
        state.arms[record["arm"]] = Arm(
            name=record["arm"], trial=record["trial"], params=record["params"], runs=_by_int(record["runs"])
        )
    elif kind == SUBMITTING:
        attempt = Attempt(
            run_id=record["run_id"], number=record["attempt"], tag=record["tag"],
            resources=record["resources"], submitted=record["time"],
        )  # fmt: skip
        state.add(attempt)
    elif kind == SUBMITTED:
        state.attempts[record["run_id"], record["attempt"]].job_id = record["job_id"]
    elif kind == STOP_ASKED:
        attempt = state.attempts[record["run_id"], record["attempt"]]
        attempt.stop_reason = attempt.stop_reason or record["reason"]  # what is given up does not become wanted again
    elif kind == ENDED:
        attempt = state.attempts[record["run_id"], record["attempt"]]
        attempt.status, attempt.failure = record["status"], record["failure"]
        attempt.began, attempt.seconds, attempt.gpus = record.get("began"), record["seconds"], record["gpus"]
        attempt.nodes, attempt.is_refused = tuple(record.get("nodes", ())), record.get("is_refused", False)
        state.note_nodes(attempt, record["time"])
    elif kind == RETRIED:
        state.retry(record["runs"], record["trials"])
    elif kind == CLOSED:
        state.closed = record["reason"]
    else:
        raise ProtocolError(f"ledger: unknown kind of record {kind!r}", hint="it was written by a newer caddie")


def replay(records: Iterable[Mapping[str, Any]]) -> StudyState:
    """The state that follows from the records, in their order."""
    state = StudyState()
    for record in records:
        apply(state, record)
    return state


class Ledger:
    """One study's ledger file. Its only writer is the controller that holds the study's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Put one decision on disk and return its record, as a replay will read it. Raises StorageError.

        It is durable when this returns.
        """
        record: dict[str, Any] = json.loads(json.dumps({"kind": kind, "time": time.time(), **fields}))
        append_line(self.path, record, durable=True)
        return record

    def state(self) -> StudyState:
        """Replay the file; raises ProtocolError with the place of a damaged line."""
        try:
            return replay(self._records())
        except KeyError as error:
            raise ProtocolError(
                f"{self.path}: a record lacks or refers to the unknown {error}", hint=self._remedy()
            ) from error

    def _records(self) -> Iterator[dict[str, Any]]:
        try:
            for _, record in read_lines(self.path):
                yield record
        except ProtocolError as error:
            raise ProtocolError(str(error), hint=self._remedy()) from error

    def _remedy(self) -> str:
        return (
            f"put the file back from a copy; without one, move {self.path.parent} away and give the study's command again: "
            "what its runs have completed is taken over"
        )

    def drop_torn_line(self) -> None:
        """Cut off a last line that a killed controller left without its end; only the lock's holder may call it."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            try:
                os.truncate(self.path, whole)
            except OSError as error:
                raise storage_error(error, self.path) from error


class OpenLedger(Ledger):
    """A ledger in the hands of the controller that holds the study's lock, with the state that it has come to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.now = StudyState()
        """The state after the last decision."""

        self.decisions = 0
        """Number of those made since it was opened."""

        self.guard: Callable[[], None] = lambda: None
        """Raises where this controller may decide no longer."""

    def open(self) -> None:
        """Take up where the file ends; raises ProtocolError, StorageError."""
        self.drop_torn_line()
        self.now = self.state()

    def decide(self, kind: str, **fields: Any) -> None:
        """Decide: first on disk, then in the state. Raises StorageError; what is not on disk has not been decided."""
        self.guard()
        apply(self.now, self.append(kind, **fields))
        self.decisions += 1
