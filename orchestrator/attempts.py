"""The attempts of a study: each is decided, submitted, watched and seen to end, and holds a slot meanwhile."""

from __future__ import annotations

import dataclasses
import time

from orchestrator import ledger, node_check
from orchestrator.ages import Ages
from orchestrator.claims import began_by_now, read_claim
from orchestrator.demands import DemandBook
from orchestrator.errors import ProtocolError
from orchestrator.failures import failure_of_lost, failure_of_overdue
from orchestrator.home import Home
from orchestrator.job_names import JobNames
from orchestrator.ledger import Attempt, OpenLedger
from orchestrator.ports import Launcher, OpenJob, Progress, Unanswered
from orchestrator.slots import JobResources, Slots
from orchestrator.study import SLURM, Study
from trainer import protocol
from trainer.protocol import AttemptDir, Failure, Result, RunDir

DEATH_SECONDS = 2.0  # a job with no process and no result is given up after this: a result may still be on its way
LEAVE_SECONDS = 60.0  # for a job's processes to go after its result, its stop or its timeout; the worker takes far less
ASK_AGAIN_SECONDS = 2.0  # between two questions after a job of which it is not known whether the scheduler has it
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
        self.names = JobNames.of_study(study.name, home.root)
        self._unanswered: set[tuple[str, int]] = set()
        self._ask_again_at = 0.0
        """When the scheduler is next asked after a job of which it is not known whether it has it; monotonic."""

        self.demands = DemandBook(study, home)
        self._files: dict[tuple[str, int], AttemptDir] = {}
        """Of open attempts, by run and number."""

        self._ages = Ages()
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
        key = attempt.run_id, attempt.number
        found = self._files.get(key)
        if found is None:
            found = self.home.run(attempt.run_id).attempt(attempt.number)
            if attempt.status is None:  # it is looked at several times a second
                self._files[key] = found
        return found

    # ------------------------------------------------------------------------------------------------ beginning

    def submit(self, run: RunDir) -> None:
        """Start the run's next attempt on a free slot, of which the caller has seen that there is one."""
        numbers = [attempt.number for attempt in run.attempts()]  # another study's too
        numbers += [attempt.number for attempt in self.ledger.now.attempts_of(run.run_id)]
        number = 1 + max(numbers, default=0)
        slot = self.slots.acquire((run.run_id, number))
        assert slot is not None, "the caller saw a free slot"
        self._decide(run.run_id, number, slot)
        self._start(self.ledger.now.attempts[run.run_id, number])

    def _decide(self, run_id: str, number: int, slot: int) -> None:
        tag, resources = self.names.tag(run_id, number), dataclasses.asdict(self._resources(slot))
        self.ledger.decide(ledger.SUBMITTING, run_id=run_id, attempt=number, tag=tag, resources=resources)

    def _start(self, attempt: Attempt) -> None:
        """Give the scheduler an attempt that is decided. Without an answer it is asked later whether it has it."""
        self.demands.write(attempt.run_id, attempt.number, self.ledger.now)
        try:
            job_id = self.launcher.submit(
                self.home.run(attempt.run_id), attempt.number, tag=attempt.tag,
                resources=JobResources.from_record(attempt.resources),
            )  # fmt: skip
        except Unanswered as error:
            self._ask_again_at = time.monotonic() + ASK_AGAIN_SECONDS
            self._note_silence(attempt, error)
        else:
            self._note_job(attempt, job_id)

    def _note_silence(self, attempt: Attempt, error: Unanswered) -> None:
        """Tell people once of each attempt, however long the scheduler does not answer."""
        key = attempt.run_id, attempt.number
        if key not in self._unanswered:
            self._unanswered.add(key)
            self.progress.note(f"run {attempt.run_id} attempt {attempt.number}: {error}; asked again until it answers")

    def _note_job(self, attempt: Attempt, job_id: str) -> None:
        self.ledger.decide(ledger.SUBMITTED, run_id=attempt.run_id, attempt=attempt.number, job_id=job_id)

    def _resources(self, slot: int) -> JobResources:
        resources, in_slurm = self.study.resources, self.study.resources.launcher == SLURM
        return JobResources(
            slot=slot, gpus=self.slots.groups[slot], processes=resources.processes_per_node,
            timeout_seconds=60 * self.study.timeout_minutes, nodes=resources.nodes,
            gpus_per_node=resources.gpus_of_node if in_slurm else 0,
            exclude=tuple(self.ledger.now.excluded_nodes) if in_slurm else (),
            beside=1 if in_slurm else len(self.slots.groups),
        )  # fmt: skip

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
        self._settle()

    def _settle(self) -> None:
        """Find out about the attempts of which it is not known whether the scheduler has them."""
        for attempt in [attempt for attempt in self.open if attempt.job_id is None]:
            try:
                self._find_or_start(attempt)
            except Unanswered:
                self._ask_again_at = time.monotonic() + ASK_AGAIN_SECONDS

    def _find_or_start(self, attempt: Attempt) -> None:
        """Submit an attempt only if the scheduler never heard of it. Raises Unanswered where that cannot be said."""
        files = self._files_of(attempt)
        if files.claim.exists() or files.result.exists():
            self._note_job(attempt, self._id_in(files))
            return
        job_id = self.launcher.find(files, tag=attempt.tag)
        if job_id is not None:
            self._note_job(attempt, job_id)
        elif files.claim.exists() or files.result.exists():  # it began, and may have ended, while we asked
            self._note_job(attempt, self._id_in(files))
        else:
            self._start_anew(attempt)

    def _id_in(self, files: AttemptDir) -> str:
        claim = read_claim(files)
        return claim.job if claim is not None else ""

    def _start_anew(self, attempt: Attempt) -> None:
        """Start an attempt that no scheduler has, with the resources that the study asks for by now."""
        key, decided = (attempt.run_id, attempt.number), JobResources.from_record(attempt.resources)
        held, stop_reason = self.slots.held.get(key), attempt.stop_reason
        self.slots.release(key)
        slot = self.slots.acquire(key, rather=decided.slot)
        if slot is None:  # the study has fewer places than it had
            if held is not None:
                self.slots.held[key] = held
        elif self._resources(slot) != decided:
            self._decide(attempt.run_id, attempt.number, slot)
            attempt = self.ledger.now.attempts[key]
            if stop_reason is not None:
                self.ledger.decide(ledger.STOP_ASKED, run_id=attempt.run_id, attempt=attempt.number, reason=stop_reason)
        self._start(attempt)

    # ------------------------------------------------------------------------------------------------ stopping

    def stop(self, attempt: Attempt, reason: str) -> None:
        """Ask a running attempt to end its step and leave; the first reason counts."""
        if attempt.stop_reason is None:
            self.ledger.decide(ledger.STOP_ASKED, run_id=attempt.run_id, attempt=attempt.number, reason=reason)
            self._ask_to_leave(attempt)

    def _ask_to_leave(self, attempt: Attempt) -> None:
        stop = self._files_of(attempt).stop
        if not stop.exists():  # its time says when it was asked
            is_given_up = attempt.stop_reason in ledger.EARLY
            protocol.write_bytes_atomically(stop, protocol.GIVEN_UP if is_given_up else b"")

    # ------------------------------------------------------------------------------------------------ ending

    def observe(self) -> list[Attempt]:
        """Take up which attempts ended since, free their slots, and return them."""
        for note in self.launcher.look([self._as_job(attempt) for attempt in self.open]):
            self.progress.note(note)
        if time.monotonic() >= self._ask_again_at:
            self._settle()
        ended = [attempt for attempt in self.open if attempt.job_id is not None and self._has_ended(attempt)]
        for attempt in ended:
            self._end(attempt)
        return ended

    def _as_job(self, attempt: Attempt) -> OpenJob:
        return OpenJob(tag=attempt.tag, job_id=attempt.job_id or "", files=self._files_of(attempt))

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
        """End what its worker should have ended: the worker may have died and left its trainer behind.

        Not before it was seen to be overdue for a while: the clock may have been set since it began.
        """
        files, key = self._files_of(attempt), (attempt.run_id, attempt.number)
        began = self._began_by_now(attempt)
        since = {"began": (began, attempt.resources["timeout_seconds"])} if began is not None else {}
        since |= {"result": (files.result.stat().st_mtime, 0.0)} if has_result else {}
        since |= {"stop": (files.stop.stat().st_mtime, 0.0)} if files.stop.exists() else {}
        ages = {what: self._ages.of((key, what), start) - limit for what, (start, limit) in since.items()}
        if any(age > LEAVE_SECONDS and self._ages.watched((key, what)) >= LEAVE_SECONDS for what, age in ages.items()):
            self.progress.note(f"run {attempt.run_id}: its processes did not leave and are ended")
            self.launcher.cancel(attempt.tag)

    def _began_by_now(self, attempt: Attempt) -> float | None:
        """`_began` by the clock as it is now, where this host can tell that it was set meanwhile."""
        claim = read_claim(self._files_of(attempt))
        return began_by_now(claim) if claim is not None and claim.began else self._began(attempt)

    def _began(self, attempt: Attempt) -> float | None:
        """Unix seconds at which an attempt began; of one that nobody has claimed, of its submission where there is no queue."""
        claim = read_claim(self._files_of(attempt))
        if claim is not None and claim.began:
            return claim.began
        return None if self.launcher.has_queue else attempt.submitted

    def _end(self, attempt: Attempt) -> None:
        files = self._files_of(attempt)
        is_lost = not files.result.exists()
        # Before a result of ours is written: nobody may have looked for long.
        began = self._began(attempt)
        seconds = _seconds_since(began, files)
        if is_lost:
            protocol.write_result(files.result, self._result_of_lost(attempt))
            self.launcher.cancel(attempt.tag)  # what is left of it, on a node that is not heard, say
        result = _read_result(files, attempt.run_id)
        if result.status == protocol.STOPPED and not files.stop.exists():
            result = self._stopped_by_the_machine(result, attempt, files)
            protocol.write_result(files.result, result)
        is_refused = not is_lost and _is_of_node(result) and self._is_refused(attempt, files)
        self.ledger.decide(
            ledger.ENDED,
            run_id=attempt.run_id,
            attempt=attempt.number,
            status=result.status,
            failure=result.failure.kind if result.failure else None,
            began=began,
            seconds=seconds,
            gpus=JobResources.from_record(attempt.resources).gpu_count,
            nodes=self.launcher.nodes_of(files, tag=attempt.tag),
            is_refused=is_refused,
        )
        self.slots.release((attempt.run_id, attempt.number))
        self._ages.forget((attempt.run_id, attempt.number))
        self._files.pop((attempt.run_id, attempt.number), None)
        if result.failure is not None:
            self.progress.note(
                f"run {attempt.run_id} attempt {attempt.number}: {result.failure.kind}: {result.failure.message}"
            )
        if not self.launcher.has_queue:  # a scheduler is told which nodes to leave out
            self._note_slot(JobResources.from_record(attempt.resources), is_refused=is_refused)

    def _stopped_by_the_machine(self, result: Result, attempt: Attempt, files: AttemptDir) -> Result:
        """The result of a trainer that heard a SIGTERM which was no stop of ours.

        Its worker sent it, since the run's time was up, and has yet to say so; or a machine is wanted back; or a person.
        """
        if files.overdue.exists():
            failure = failure_of_overdue(files, attempt.resources["timeout_seconds"])
        else:
            failure = Failure(
                kind=protocol.PREEMPTED if files.notice.exists() else protocol.INFRASTRUCTURE,
                message="the trainer was told to end, and no study asked for it",
                log=str(files.stderr),
            )
        return dataclasses.replace(result, status=protocol.FAILED, failure=failure)

    def _note_slot(self, resources: JobResources, *, is_refused: bool) -> None:
        """Let a slot of this machine rest where a run was refused, and take it for sound where one began."""
        if not is_refused:
            self.slots.has_served(resources.slot)
            return
        gpus = f" (GPU {', '.join(resources.gpus)})" if resources.gpus else ""
        self.progress.note(f"slot {resources.slot}{gpus} gets no run for {self.slots.rest(resources.slot):.0f} s")

    def _is_refused(self, attempt: Attempt, files: AttemptDir) -> bool:
        """Whether the node failed before the run had begun, or was found wanting by its first steps."""
        nodes = JobResources.from_record(attempt.resources).nodes
        return not files.events.exists() or node_check.was_refused(files, nodes)

    def _result_of_lost(self, attempt: Attempt) -> Result:
        """A result for an attempt that nobody is left to write one for."""
        files, run = self._files_of(attempt), self.home.run(attempt.run_id)
        seed = protocol.read_spec(run.spec).seed if run.spec.exists() else 0  # deleted under way: planned again
        if attempt.stop_reason is not None:
            return Result(run_id=attempt.run_id, attempt=attempt.number, status=protocol.STOPPED, seed=seed)
        return Result(
            run_id=attempt.run_id, attempt=attempt.number, status=protocol.FAILED, seed=seed,
            failure=self._failure_of_lost(attempt, files),
        )  # fmt: skip

    def _failure_of_lost(self, attempt: Attempt, files: AttemptDir) -> Failure:
        """Why an attempt left no result: what its log says, its scheduler, or that it had been told to leave."""
        failure, ending = failure_of_lost(files), self.launcher.ending(files, tag=attempt.tag)
        if failure.kind == protocol.DISK:
            return failure
        if files.overdue.exists():
            return failure_of_overdue(files, attempt.resources["timeout_seconds"])
        if ending is not None:
            failure = dataclasses.replace(failure, kind=ending.kind, message=ending.message)
        if files.notice.exists() and failure.kind == protocol.INFRASTRUCTURE:
            failure = dataclasses.replace(failure, kind=protocol.PREEMPTED)
        return failure


def _seconds_since(began: float | None, files: AttemptDir) -> float:
    """How long an attempt had its resources: up to its result, or until it was last heard of."""
    signs = (files.result,) if files.result.exists() else (files.claim, files.events)
    ended = max((path.stat().st_mtime for path in signs if path.exists()), default=0.0)
    return 0.0 if began is None else round(max(0.0, ended - began), 3)


def _is_of_node(result: Result) -> bool:
    return result.failure is not None and result.failure.kind == protocol.NODE


def _read_result(files: AttemptDir, run_id: str) -> Result:
    """An attempt's result; a damaged one is that run's failure, not the study's."""
    try:
        return protocol.read_result(files.result)
    except ProtocolError as error:
        failure = Failure(kind=protocol.CODE, message=str(error), log=str(files.result))
        return Result(run_id=run_id, attempt=files.number, status=protocol.FAILED, seed=0, failure=failure)
