"""The attempts of a study: each is decided, submitted, watched and seen to end, and holds a slot meanwhile."""

from __future__ import annotations

import dataclasses
import hashlib
import time

from orchestrator import ledger
from orchestrator.errors import ProtocolError
from orchestrator.home import Home
from orchestrator.ledger import Attempt, OpenLedger
from orchestrator.ports import Launcher, Progress
from orchestrator.slots import JobResources, Slots
from orchestrator.study import Study
from orchestrator.worker import failure_of_lost
from trainer import protocol
from trainer.protocol import AttemptDir, Failure, Result, RunDir

DEATH_SECONDS = 2.0  # a job with no process and no result is given up after this: a result may still be on its way
LEAVE_SECONDS = 60.0  # for a job's processes to go after its result, its stop or its timeout; the worker takes far less
BEGIN_SECONDS = 60.0  # from another study's submission to its worker's claim, on the busiest machine


class Attempts:
    """Those of one study. What it decides goes to the ledger first; a controller that starts again finds it there."""

    def __init__(
        self, study: Study, home: Home, *, ledger: OpenLedger, launcher: Launcher, slots: Slots, progress: Progress
    ) -> None:
        self.study = study
        self.home = home
        self.ledger = ledger
        self.launcher = launcher
        self.slots = slots
        self.progress = progress
        self._gone_since: dict[tuple[str, int], float] = {}
        """When an attempt was first seen without a process, by run and number; on the monotonic clock."""

    @property
    def open(self) -> list[Attempt]:
        """Those that have not been seen to end."""
        return self.ledger.now.open_attempts

    def result_of(self, attempt: Attempt) -> Result:
        """The result of an attempt that has ended; raises ProtocolError where its file is gone."""
        files = self._files_of(attempt)
        if not files.result.exists():
            raise ProtocolError(
                f"{files.result}: missing, though the ledger says that the attempt ended",
                hint="put the run's directory back, or give the study a new name",
            )
        return _read_result(files, attempt.run_id)

    def _files_of(self, attempt: Attempt) -> AttemptDir:
        return self.home.run(attempt.run_id).attempt(attempt.number)

    # ------------------------------------------------------------------------------------------------ beginning

    def submit(self, run: RunDir) -> None:
        """Start the run's next attempt on a free slot, of which the caller has seen that there is one."""
        numbers = [attempt.number for attempt in run.attempts()]  # another study's too
        numbers += [attempt.number for attempt in self.ledger.now.attempts_of(run.run_id)]
        number = 1 + max(numbers, default=0)
        slot = self.slots.acquire((run.run_id, number))
        assert slot is not None, "the caller saw a free slot"
        tag, resources = self._tag(run.run_id, number), dataclasses.asdict(self._resources(slot))
        self.ledger.decide(ledger.SUBMITTING, run_id=run.run_id, attempt=number, tag=tag, resources=resources)
        self._start(self.ledger.now.attempts[run.run_id, number])

    def _start(self, attempt: Attempt) -> None:
        """Give the scheduler an attempt that is decided."""
        job_id = self.launcher.submit(
            self.home.run(attempt.run_id), attempt.number, tag=attempt.tag,
            resources=JobResources.from_record(attempt.resources),
        )  # fmt: skip
        self._note_job(attempt, job_id)

    def _note_job(self, attempt: Attempt, job_id: str) -> None:
        self.ledger.decide(ledger.SUBMITTED, run_id=attempt.run_id, attempt=attempt.number, job_id=job_id)

    def _tag(self, run_id: str, number: int) -> str:
        """The job's name; another CADDIE_HOME may hold a study of the same name and the same runs."""
        home = hashlib.sha256(str(self.home.root.resolve()).encode()).hexdigest()[:8]
        return f"caddie.{self.study.name}.{run_id}.{number}.{home}"

    def _resources(self, slot: int) -> JobResources:
        resources = self.study.resources
        return JobResources(
            slot=slot,
            gpus=self.slots.groups[slot],
            processes=resources.gpus_per_run or resources.processes_per_run,
            timeout_seconds=60 * resources.timeout_minutes,
        )

    def is_elsewhere(self, run: RunDir) -> bool:
        """Whether another study is at the run: its attempt lives, or was submitted so lately that it may yet begin."""
        return any(self._may_live(files) for files in run.attempts() if not files.result.exists())

    def _may_live(self, files: AttemptDir) -> bool:
        if not files.claim.exists() and time.time() < files.root.stat().st_mtime + BEGIN_SECONDS:
            return True
        return self.launcher.is_alive(files, tag=None)

    # ------------------------------------------------------------------------------------------------ coming back

    def reattach(self) -> None:
        """Take up the attempts that had not ended, and do what a killed controller had decided and not yet done."""
        for attempt in self.open:
            resources = JobResources.from_record(attempt.resources)
            self.slots.occupy((attempt.run_id, attempt.number), slot=resources.slot, gpus=resources.gpus)
            if attempt.stop_reason is not None:
                self._ask_to_leave(attempt)
            if attempt.job_id is None:
                self._find_or_start(attempt)

    def _find_or_start(self, attempt: Attempt) -> None:
        """Submit an attempt only if the scheduler never heard of it."""
        files = self._files_of(attempt)
        job_id = self.launcher.find(files, tag=attempt.tag)
        if job_id is None and not files.claim.exists() and not files.result.exists():
            self._start(attempt)
        else:
            self._note_job(attempt, job_id or "")

    # ------------------------------------------------------------------------------------------------ stopping

    def stop(self, attempt: Attempt, reason: str) -> None:
        """Ask a running attempt to end its step and leave; the first reason counts."""
        if attempt.stop_reason is None:
            self.ledger.decide(ledger.STOP_ASKED, run_id=attempt.run_id, attempt=attempt.number, reason=reason)
            self._ask_to_leave(attempt)

    def _ask_to_leave(self, attempt: Attempt) -> None:
        stop = self._files_of(attempt).stop
        if not stop.exists():  # its time says when it was asked
            protocol.write_bytes_atomically(stop, b"")

    # ------------------------------------------------------------------------------------------------ ending

    def observe(self) -> list[Attempt]:
        """Take up which attempts ended since, free their slots, and return them."""
        ended = [attempt for attempt in self.open if self._has_ended(attempt)]
        for attempt in ended:
            self._end(attempt)
        return ended

    def _has_ended(self, attempt: Attempt) -> bool:
        """Whether an attempt has a result, no worker and no trainer, or for a while neither a result nor any process."""
        key, files = (attempt.run_id, attempt.number), self._files_of(attempt)
        # After the result nothing that the worker started may share the slot with the next attempt; the scheduler's own
        # wrapper may take its time.
        is_alive = self.launcher.is_alive(files, tag=None if files.result.exists() else attempt.tag)
        has_result = files.result.exists()  # asked again: a process may have written it and left since
        if is_alive:
            self._gone_since.pop(key, None)
            self._end_if_overdue(attempt, has_result=has_result)
            return False
        since = self._gone_since.setdefault(key, time.monotonic())
        return has_result or time.monotonic() - since > DEATH_SECONDS

    def _end_if_overdue(self, attempt: Attempt, *, has_result: bool) -> None:
        """End what its worker should have ended: the worker may have died and left its trainer behind."""
        files, now = self._files_of(attempt), time.time()
        due = [attempt.submitted + attempt.resources["timeout_seconds"]]
        due += [files.result.stat().st_mtime] if has_result else []
        due += [files.stop.stat().st_mtime] if files.stop.exists() else []
        if now > min(due) + LEAVE_SECONDS:
            self.progress.note(f"run {attempt.run_id}: its processes did not leave and are ended")
            self.launcher.cancel(attempt.tag)

    def _end(self, attempt: Attempt) -> None:
        files = self._files_of(attempt)
        if not files.result.exists():
            protocol.write_result(files.result, self._result_of_lost(attempt))
        result = _read_result(files, attempt.run_id)
        if result.status == protocol.STOPPED and not files.stop.exists():
            result = _stopped_by_the_machine(result, files)
            protocol.write_result(files.result, result)
        self.ledger.decide(
            ledger.ENDED,
            run_id=attempt.run_id,
            attempt=attempt.number,
            status=result.status,
            failure=result.failure.kind if result.failure else None,
            seconds=round(max(0.0, files.result.stat().st_mtime - attempt.submitted), 3),
            gpus=len(attempt.resources["gpus"]),
        )
        self.slots.release((attempt.run_id, attempt.number))
        if result.failure is not None:
            self.progress.note(
                f"run {attempt.run_id} attempt {attempt.number}: {result.failure.kind}: {result.failure.message}"
            )

    def _result_of_lost(self, attempt: Attempt) -> Result:
        """A result for an attempt that nobody is left to write one for."""
        files, run = self._files_of(attempt), self.home.run(attempt.run_id)
        seed = protocol.read_spec(run.spec).seed if run.spec.exists() else 0  # deleted under way: planned again
        if attempt.stop_reason is not None:
            return Result(run_id=attempt.run_id, attempt=attempt.number, status=protocol.STOPPED, seed=seed)
        failure = failure_of_lost(files)
        return Result(run_id=attempt.run_id, attempt=attempt.number, status=protocol.FAILED, seed=seed, failure=failure)


def _stopped_by_the_machine(result: Result, files: AttemptDir) -> Result:
    """The result of a trainer that heard a SIGTERM which was no stop of ours: a machine that shuts down, or a person."""
    failure = Failure(
        kind=protocol.INFRASTRUCTURE,
        message="the trainer was told to end, and no study asked for it",
        log=str(files.stderr),
    )
    return dataclasses.replace(result, status=protocol.FAILED, failure=failure)


def _read_result(files: AttemptDir, run_id: str) -> Result:
    """An attempt's result; a damaged one is that run's failure, not the study's."""
    try:
        return protocol.read_result(files.result)
    except ProtocolError as error:
        failure = Failure(kind=protocol.CODE, message=str(error), log=str(files.result))
        return Result(run_id=run_id, attempt=files.number, status=protocol.FAILED, seed=0, failure=failure)
