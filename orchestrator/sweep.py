"""The sweep: the loop that asks trials, keeps the slots full, and tells what came of them. Imports no outside library.

Every decision is in the ledger before it is acted on, and nothing is kept in memory that the ledger and the run
directories do not say; so the controller may be killed at any moment, and the same command goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from orchestrator import __version__, ledger, lock
from orchestrator.errors import ConfigError, Interrupted, ProtocolError, StudyFailed
from orchestrator.home import Home
from orchestrator.ledger import Arm, Attempt, Ledger, StudyState, Trial
from orchestrator.runs import RunRequest, RunStore, run_id_of
from orchestrator.slots import JobResources, Slots, machine_slots
from orchestrator.study import Study
from orchestrator.verdict import Verdict, is_failure, verdict
from orchestrator.worker import failure_of_lost
from trainer import protocol
from trainer.config import to_mapping
from trainer.protocol import TRAIN_LOSS, AttemptDir, Failure, Result, RunDir

POLL_SECONDS = 0.2
SHOW_SECONDS = 1.0  # between two refreshes of progress and mirror while no decision is made
DEATH_SECONDS = 2.0  # a job with no process and no result is given up after this: a result may still be on its way
LEAVE_SECONDS = 60.0  # for a job's processes to go after its result, its stop or its timeout; the worker takes far less
SAME_FAILURES = 3  # so many first trials that all fail in the same way are the study's failure, not the trials'

PRESET_ARM, BEST_ARM = "preset", "best"
BY_PRESET, BY_SAMPLER = "preset", "sampler"  # origin of a trial
FINISHED, HALTED, BROKEN = "finished", "stopped", "failed"  # reason for which a study is closed
MEDIAN, CANCELLED = "median", "cancelled"  # reason for which an attempt is stopped
DRAIN, CANCEL = "drain", "cancel"  # what a study's stop file may ask

WANTED, ACTIVE, SETTLED = "wanted", "active", "settled"  # a run needs an attempt, has one, needs no more


class Launcher(Protocol):
    """Puts attempts on a scheduler."""

    def submit(self, run: RunDir, attempt: int, *, tag: str, resources: JobResources) -> str: ...

    def is_alive(self, attempt: AttemptDir, *, tag: str | None) -> bool: ...

    def find(self, tag: str) -> str | None: ...

    def cancel(self, tag: str) -> None: ...


class Search(Protocol):
    """Says which point comes next and which trial is not worth finishing."""

    def rebuild(self, state: StudyState) -> None: ...

    def ask(self, number: int) -> dict[str, Any]: ...

    def begin(self, trial: Trial) -> None: ...

    def should_stop(self, number: int, step: int, value: float) -> bool: ...

    def tell(self, trial: Trial) -> None: ...


class Progress(Protocol):
    """Shows people how a study stands."""

    def show(self, state: StudyState) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Mirror(Protocol):
    """Copies a study to where it is looked at; must not hold the loop up."""

    def nudge(self) -> None: ...

    def close(self) -> None: ...


def identity_of(study: Study, *, manifest_sha256: str, bundle_sha256: str) -> dict[str, str]:
    """Hashes of what must stay the same for trials to be comparable, each by the word that an error would use."""
    space = {knob: [type(r).__name__, dataclasses.asdict(r)] for knob, r in sorted(study.space.items())}
    search = study.search
    questions = {
        "configuration": to_mapping(study.config),
        "space": space,
        "objective": search.objective,
        "seeds": search.seeds,
    }
    hashes = {what: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] for what, value in questions.items()}
    return {**hashes, "data": manifest_sha256[:16], "trainer": bundle_sha256[:16]}


class Checkpoints:
    """The training losses of one run at the steps where trials are compared, read as its attempts write them.

    The first value counts: an attempt that goes through the same steps again changes nothing.
    """

    def __init__(self, run: RunDir, steps: list[int]) -> None:
        self.run = run
        self.steps = steps
        self.losses: dict[int, tuple[int, float]] = {}
        """(step of the event, loss) by the step from which the comparison is due."""

        self.offsets: dict[int, int] = {}
        """Bytes read of each attempt's events."""

    def read(self) -> None:
        """Take up what was written since; raises ProtocolError for a damaged line."""
        if len(self.losses) == len(self.steps):
            return
        for attempt in self.run.attempts():
            offset = self.offsets.get(attempt.number, 0)
            if not attempt.events.exists() or attempt.events.stat().st_size <= offset:
                continue
            for end, event in protocol.read_lines(attempt.events, offset):
                self.offsets[attempt.number] = end
                self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        metric = protocol.metric_of(event, TRAIN_LOSS)
        if metric is None:
            return
        step, _ = metric
        for due, following in zip(self.steps, [*self.steps[1:], math.inf], strict=True):
            if due <= step < following:
                self.losses.setdefault(due, metric)


class Controller:
    """Runs one study to its total number of trials and its confirmation."""

    def __init__(
        self,
        study: Study,
        home: Home,
        *,
        launcher: Launcher,
        search: Search,
        bundle: bytes,
        code: dict[str, str],
        data_dir: Path,
        manifest_sha256: str,
        progress: Progress,
        mirror: Mirror,
        slots: Slots | None = None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.study = study
        self.home = home
        self.launcher = launcher
        self.search = search
        self.bundle = bundle
        self.code = code
        self.data_dir = data_dir.resolve()
        self.manifest_sha256 = manifest_sha256
        self.progress = progress
        self.mirror = mirror
        self.poll_seconds = poll_seconds
        resources = study.resources
        self.slots = slots or machine_slots(slots=resources.slots, gpus_per_run=resources.gpus_per_run)
        self.store = RunStore(home)
        self.files = home.study(study.name)
        self.ledger = Ledger(self.files.ledger)
        self.bundle_sha256 = hashlib.sha256(bundle).hexdigest()
        self.state = StudyState()
        self.results: dict[str, Result] = {}
        """Results of settled runs, as read from their directories."""

        self.checkpoints: dict[str, Checkpoints] = {}
        self.judged: set[tuple[int, int]] = set()
        """(trial, step) of the comparisons made."""

        self.told: list[Verdict] = []
        """Verdicts of this controller's life, in their order."""

        self.gone_since: dict[tuple[str, int], float] = {}
        self.interrupted_by: signal.Signals | None = None
        self._shown = -math.inf

    # ------------------------------------------------------------------------------------------------ the loop

    def run(self) -> StudyState:
        """Bring the study to its end and return its state.

        Raises StudyBusy, ConfigError where the question was changed, StudyFailed where nothing can come of it,
        Interrupted on a first SIGINT or SIGTERM (jobs go on), StorageError, ProtocolError, MachineError.
        """
        self.home.require_writable()
        try:
            with lock.held(self.files.lock), self._signals():
                self._open()
                self._loop()
        finally:
            self.progress.close()
            self.mirror.close()
        return self.state

    def _loop(self) -> None:
        while True:
            self._observe()
            self._compare()
            self._tell()
            self._leave_if_interrupted()
            request = self._stop_request()
            if request == CANCEL:
                self._cancel_all()
            if request is None:
                self._refill()
            self._show()
            if not self._open_attempts():
                if request is not None:
                    return self._close(HALTED)
                if self._is_done():
                    return self._finish()
            time.sleep(self.poll_seconds)

    def _record(self, kind: str, **fields: Any) -> None:
        """Decide: first on disk, then in memory."""
        ledger.apply(self.state, self.ledger.append(kind, **fields))
        self._shown = -math.inf
        self.mirror.nudge()

    def _show(self) -> None:
        if time.monotonic() - self._shown >= SHOW_SECONDS:
            self._shown = time.monotonic()
            self.progress.show(self.state)
            self.mirror.nudge()

    def _close(self, reason: str) -> None:
        self._record(ledger.CLOSED, reason=reason)
        self.files.stop.unlink(missing_ok=True)
        self.progress.show(self.state)

    # ------------------------------------------------------------------------------------------------ opening

    def _open(self) -> None:
        """Take up the ledger where it ends."""
        self.ledger.drop_torn_line()
        self.state = self.ledger.state()
        identity = identity_of(self.study, manifest_sha256=self.manifest_sha256, bundle_sha256=self.bundle_sha256)
        self._require_same_question(identity)
        self.files.stop.unlink(missing_ok=True)  # it was meant for an earlier controller
        is_same = (self.state.source, self.state.identity) == (self.study.source, identity)
        if not is_same or self.state.closed not in (None, FINISHED):
            self._record(
                ledger.OPENED, source=self.study.source, digest=self.study.digest, identity=identity, caddie=__version__
            )
        self.search.rebuild(self.state)
        for attempt in self._open_attempts():
            self._reattach(attempt)

    def _require_same_question(self, identity: Mapping[str, str]) -> None:
        """Refuse to go on with what could not be compared; where everything failed, there is nothing to compare."""
        has_value = any(trial.state != ledger.FAILED for trial in self.state.trials.values())
        if not has_value and all(attempt.status == protocol.FAILED for attempt in self.state.attempts.values()):
            return
        changed = [what for what, digest in self.state.identity.items() if identity.get(what) != digest]
        if changed:
            raise ConfigError(
                f"{self.study.name}: the {' and the '.join(changed)} changed since the study was opened; "
                f"new runs could not be compared with the {len(self.state.run_ids)} that it asked for",
                hint="give the study a new name, or undo the change; trials, slots, timeouts and [confirm] may change",
            )

    def _reattach(self, attempt: Attempt) -> None:
        """Hold the slot of an attempt that had not ended; submit it only if the scheduler never heard of it."""
        resources = JobResources.from_record(attempt.resources)
        self.slots.occupy((attempt.run_id, attempt.number), slot=resources.slot, gpus=resources.gpus)
        if attempt.job_id is not None:
            return
        files = self.home.run(attempt.run_id).attempt(attempt.number)
        job_id = self.launcher.find(attempt.tag)
        if job_id is None and not files.claim.exists() and not files.result.exists():
            job_id = self.launcher.submit(
                self.home.run(attempt.run_id), attempt.number, tag=attempt.tag, resources=resources
            )
        self._record(ledger.SUBMITTED, run_id=attempt.run_id, attempt=attempt.number, job_id=job_id or "")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Leave in order on the first Ctrl-C or SIGTERM, at once on the second."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, _frame: FrameType | None) -> None:
            self.interrupted_by = signal.Signals(number)
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _leave_if_interrupted(self) -> None:
        if self.interrupted_by is None:
            return
        running = len(self._open_attempts())
        text = f"left by {self.interrupted_by.name}: {running} running jobs go on; the same command continues the study"
        self.progress.note(text)
        raise Interrupted(f"{self.study.name}: {text}", hint=f"to end it: caddie study stop {self.study.name}")

    def _stop_request(self) -> str | None:
        """What the study's stop file asks, if there is one."""
        try:
            return CANCEL if self.files.stop.read_text(encoding="utf-8").strip() == CANCEL else DRAIN
        except FileNotFoundError:
            return None

    def _cancel_all(self) -> None:
        for attempt in self._open_attempts():
            if attempt.stop_reason is None:
                self._stop(attempt, CANCELLED)

    def _stop(self, attempt: Attempt, reason: str) -> None:
        """Ask a running attempt to end its step and leave."""
        self._record(ledger.STOP_ASKED, run_id=attempt.run_id, attempt=attempt.number, reason=reason)
        protocol.write_bytes_atomically(self._files_of(attempt).stop, b"")

    # ------------------------------------------------------------------------------------------------ attempts

    def _files_of(self, attempt: Attempt) -> AttemptDir:
        return self.home.run(attempt.run_id).attempt(attempt.number)

    def _open_attempts(self) -> list[Attempt]:
        return [attempt for attempt in self.state.attempts.values() if attempt.status is None]

    def _observe(self) -> None:
        """See which attempts ended, and free their slots."""
        for attempt in self._open_attempts():
            if self._has_ended(attempt):
                self._end(attempt)

    def _has_ended(self, attempt: Attempt) -> bool:
        """Whether an attempt has a result and no worker, or has had neither a result nor any process for a while."""
        key, files = (attempt.run_id, attempt.number), self._files_of(attempt)
        # The worker leaves nothing running, and the scheduler's own wrapper may take its time without a GPU.
        is_alive = self.launcher.is_alive(files, tag=None if files.result.exists() else attempt.tag)
        has_result = files.result.exists()  # asked again: a process may have written it and left since
        if is_alive:
            self.gone_since.pop(key, None)
            self._end_if_overdue(attempt, has_result=has_result)
            return False
        since = self.gone_since.setdefault(key, time.monotonic())
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
        result = self._read_result(files)
        self._record(
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
        seed = protocol.read_spec(run.spec).seed
        if attempt.stop_reason is not None:
            return Result(run_id=attempt.run_id, attempt=attempt.number, status=protocol.STOPPED, seed=seed)
        failure = failure_of_lost(files)
        return Result(run_id=attempt.run_id, attempt=attempt.number, status=protocol.FAILED, seed=seed, failure=failure)

    def _read_result(self, files: AttemptDir) -> Result:
        """An attempt's result; a damaged one is that run's failure, not the study's."""
        try:
            return protocol.read_result(files.result)
        except ProtocolError as error:
            failure = Failure(kind=protocol.CODE, message=str(error), log=str(files.result))
            run_id = files.root.parent.parent.name
            return Result(run_id=run_id, attempt=files.number, status=protocol.FAILED, seed=0, failure=failure)

    # ------------------------------------------------------------------------------------------------ runs

    def _standing(self, run_id: str) -> str:
        """WANTED, ACTIVE or SETTLED; a settled run's result is in `results`."""
        if run_id in self.results:
            return SETTLED
        attempts = self.state.attempts_of(run_id)
        if not attempts:
            return WANTED
        last = attempts[-1]
        if last.status is None:
            return ACTIVE
        if last.status == protocol.STOPPED and last.stop_reason == CANCELLED:
            return WANTED
        lost = sum(attempt.failure in protocol.RETRYABLE for attempt in attempts)
        if last.failure in protocol.RETRYABLE and lost < self.study.resources.max_attempts:
            return WANTED
        self.results[run_id] = self._settled_result(last)
        return SETTLED

    def _settled_result(self, attempt: Attempt) -> Result:
        files = self._files_of(attempt)
        if not files.result.exists():
            raise ProtocolError(
                f"{files.result}: missing, though the ledger says that the attempt ended",
                hint="put the run's directory back, or give the study a new name",
            )
        return self._read_result(files)

    def _owners(self) -> list[Trial | Arm]:
        """Those whose runs are still of interest."""
        return [*self._running_trials(), *self.state.arms.values()]

    def _is_given_up(self, owner: Trial | Arm) -> bool:
        """Whether no further run of it is needed: a trial that is being stopped, or of which one seed failed."""
        if isinstance(owner, Arm):
            return False
        settled = [self.results[run_id] for run_id in owner.runs.values() if self._standing(run_id) == SETTLED]
        attempts = [attempt for run_id in owner.runs.values() for attempt in self.state.attempts_of(run_id)]
        is_stopped = any(attempt.stop_reason == MEDIAN for attempt in attempts)
        return is_stopped or any(r.status == protocol.STOPPED or is_failure(self.study, r) for r in settled)

    def _wanted(self) -> list[tuple[str, Trial | Arm, int]]:
        """(run, owner, seed) of every run that needs an attempt: trials in their order, then arms seed by seed.

        Seed by seed puts the arms that are compared side by side in time, on the machine as it is then.
        """
        pairs = [
            (run_id, owner, seed)
            for owner in self._owners()
            if not self._is_given_up(owner)
            for seed, run_id in owner.runs.items()
            if self._standing(run_id) == WANTED
        ]
        seeds = self.study.confirm.seeds if self.study.confirm else ()
        turn = {seed: n for n, seed in enumerate(seeds)}
        pairs.sort(key=lambda pair: turn[pair[2]] if isinstance(pair[1], Arm) and pair[2] in turn else -1)
        return list({run_id: (run_id, owner, seed) for run_id, owner, seed in pairs}.values())

    def _request(self, params: Mapping[str, Any], seed: int, *, trial: int | None) -> RunRequest:
        return RunRequest(
            preset=self.study.preset, config=self.study.config_of(params), seed=seed, data_dir=str(self.data_dir),
            manifest_sha256=self.manifest_sha256, study=self.study.name, trial=trial,
        )  # fmt: skip

    def _runs_of(self, params: Mapping[str, Any], seeds: tuple[int, ...]) -> dict[int, str]:
        """Run id by seed."""
        return {seed: run_id_of(self._request(params, seed, trial=None), self.bundle_sha256) for seed in seeds}

    def _plan(self, owner: Trial | Arm, seed: int) -> RunDir:
        trial = owner.number if isinstance(owner, Trial) else owner.trial
        return self.store.plan(self._request(owner.params, seed, trial=trial), bundle=self.bundle, code=self.code)

    # ------------------------------------------------------------------------------------------------ refilling

    def _refill(self) -> None:
        """Fill the free slots with runs that are wanted; ask for more only when none is."""
        waiting: set[str] = set()
        while self.slots.free:
            wanted = [entry for entry in self._wanted() if entry[0] not in waiting]
            if wanted:
                if not self._submit(*wanted[0]):
                    waiting.add(wanted[0][0])
            elif not self._ask():
                return
            self._tell()

    def _submit(self, run_id: str, owner: Trial | Arm, seed: int) -> bool:
        """Start a run, or take the result that another study left; False where another study is at it now."""
        run = self._plan(owner, seed)
        earlier = run.attempts()
        if any(not attempt.result.exists() and self.launcher.is_alive(attempt, tag=None) for attempt in earlier):
            return False
        stored = self.store.result(run_id)  # asked second: the other study may have ended it just now
        if stored is not None and stored.status == protocol.COMPLETE:
            self.results[run_id] = stored
            return True
        numbers = [a.number for a in earlier] + [a.number for a in self.state.attempts_of(run_id)]
        number = 1 + max(numbers, default=0)
        slot = self.slots.acquire((run_id, number))
        assert slot is not None, "the caller saw a free slot"
        resources = self._resources(slot)
        tag = self._tag(run_id, number)
        self._record(ledger.SUBMITTING, run_id=run_id, attempt=number, tag=tag, resources=dataclasses.asdict(resources))
        job_id = self.launcher.submit(run, number, tag=tag, resources=resources)
        self._record(ledger.SUBMITTED, run_id=run_id, attempt=number, job_id=job_id)
        return True

    def _tag(self, run_id: str, attempt: int) -> str:
        """The job's name; another CADDIE_HOME may hold a study of the same name and the same runs."""
        home = hashlib.sha256(str(self.home.root.resolve()).encode()).hexdigest()[:8]
        return f"caddie.{self.study.name}.{run_id}.{attempt}.{home}"

    def _resources(self, slot: int) -> JobResources:
        resources = self.study.resources
        return JobResources(
            slot=slot,
            gpus=self.slots.groups[slot],
            processes=resources.gpus_per_run or resources.processes_per_run,
            timeout_seconds=60 * resources.timeout_minutes,
        )

    def _ask(self) -> bool:
        """Ask for one more trial, or for the confirmation; False where nothing is left to ask."""
        if len(self.state.trials) < self.study.search.trials:
            self._ask_trial(len(self.state.trials))
            return True
        return self._ask_arms()

    def _ask_trial(self, number: int) -> None:
        params = self.search.ask(number)
        try:
            runs, reason = self._runs_of(params, self.study.search.seeds), ""
        except ConfigError as error:  # each knob is in its range, and together they make no configuration
            runs, reason = {}, str(error)
        self._record(
            ledger.TRIAL_ASKED, trial=number, origin=BY_SAMPLER if number else BY_PRESET, params=params, runs=runs
        )
        trial = self.state.trials[number]
        self.search.begin(trial)
        if reason:
            failed = Verdict(state=ledger.FAILED, reason=f"{protocol.CONFIG}: {reason}", failure=protocol.CONFIG)
            self._tell_trial(trial, failed)
        for seed in runs:
            self._plan(trial, seed)

    def _ask_arms(self) -> bool:
        """Ask for the arms that follow from the trials; False where they are asked, or it is too early."""
        if self.study.confirm is None or any(trial.state == ledger.RUNNING for trial in self.state.trials.values()):
            return False
        asked = False
        for name, (trial, params) in self._arms().items():
            runs = self._runs_of(params, self.study.confirm.seeds)
            known = self.state.arms.get(name)
            if known is None or known.runs != runs:
                self._record(ledger.ARM_ASKED, arm=name, trial=trial, params=params, runs=runs)
                for seed in runs:
                    self._plan(self.state.arms[name], seed)
                asked = True
        return asked

    def _arms(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """(trial, params) by arm: the unchanged preset, and the best point where it is another."""
        if self.study.search.trials and not self._has_complete_trial():
            return {}
        arms = {PRESET_ARM: (0, self.state.trials[0].params if 0 in self.state.trials else {})}
        best = self.state.best
        if best is not None and best.number != 0:
            arms[BEST_ARM] = (best.number, best.params)
        return arms

    def _has_complete_trial(self) -> bool:
        return any(trial.state == ledger.COMPLETE for trial in self.state.trials.values())

    # ------------------------------------------------------------------------------------------------ stopping early

    def _compare(self) -> None:
        """Stop the running trials that are worse than the median at a step where trials are compared."""
        if self.study.stop_early is None:
            return
        for trial in self._running_trials():
            for step, loss in self._losses(trial).items():
                if (trial.number, step) not in self.judged:
                    self.judged.add((trial.number, step))
                    if self._may_stop(trial) and self.search.should_stop(trial.number, step, loss):
                        self._stop_trial(trial, step, loss)

    def _running_trials(self) -> list[Trial]:
        return [trial for trial in self.state.trials.values() if trial.state == ledger.RUNNING]

    def _losses(self, trial: Trial) -> dict[int, float]:
        """Mean training loss over the seeds by step, where every seed has reached the comparison."""
        curves = [self._checkpoints_of(run_id).losses for run_id in trial.runs.values()]
        due = set(curves[0]).intersection(*curves[1:]) if curves else set()
        return {
            max(curve[step][0] for curve in curves): statistics.fmean(curve[step][1] for curve in curves)
            for step in sorted(due)
        }

    def _checkpoints_of(self, run_id: str) -> Checkpoints:
        """A run's losses so far; a damaged event file has none further, and its run goes on."""
        if run_id not in self.checkpoints:
            self.checkpoints[run_id] = Checkpoints(self.home.run(run_id), self._due_steps())
        checkpoints = self.checkpoints[run_id]
        try:
            checkpoints.read()
        except ProtocolError as error:
            self.progress.note(f"run {run_id} is not compared any more: {error}")
            checkpoints.steps = sorted(checkpoints.losses)
        return checkpoints

    def _due_steps(self) -> list[int]:
        """Steps from which on trials are compared."""
        return self.study.stop_early.steps(self.study.config.schedule.steps) if self.study.stop_early else []

    def _may_stop(self, trial: Trial) -> bool:
        """Never the preset, and never a run that somebody else waits for too."""
        others = {run_id for owner in self._owners() if owner is not trial for run_id in owner.runs.values()}
        return trial.number != 0 and others.isdisjoint(trial.runs.values())

    def _stop_trial(self, trial: Trial, step: int, loss: float) -> None:
        self.progress.note(
            f"trial {trial.number} is stopped: training loss {loss:.4f} at step {step} is above the median"
        )
        for attempt in self._open_attempts():
            if attempt.run_id in trial.runs.values() and attempt.stop_reason is None:
                self._stop(attempt, MEDIAN)

    # ------------------------------------------------------------------------------------------------ telling

    def _tell(self) -> None:
        """Tell the trials whose runs are all settled, or need no more runs."""
        for trial in self._running_trials():
            standings = {self._standing(run_id) for run_id in trial.runs.values()}
            if ACTIVE in standings or (WANTED in standings and not self._is_given_up(trial)):
                continue
            results = {seed: self.results[run_id] for seed, run_id in trial.runs.items() if run_id in self.results}
            self._tell_trial(trial, verdict(self.study, results))

    def _tell_trial(self, trial: Trial, found: Verdict) -> None:
        losses = self._losses(trial) if self.study.stop_early else {}
        self._record(
            ledger.TRIAL_TOLD,
            trial=trial.number,
            state=found.state,
            value=found.value,
            constraints=found.constraints,
            intermediate={step: loss for step, loss in losses.items() if math.isfinite(loss)},
            reason=found.reason,
        )
        self.search.tell(trial)
        self.told.append(found)
        self._require_hope()

    def _require_hope(self) -> None:
        """Give the study up where its first trials all failed in the same way."""
        kinds = {found.failure for found in self.told}
        if len(self.told) == SAME_FAILURES and len(kinds) == 1 and None not in kinds:
            self._cancel_all()
            self._fail(f"the first {SAME_FAILURES} trials all failed: {self.told[-1].reason}")

    def _fail(self, what: str) -> None:
        self._close(BROKEN)
        logs = [r.failure.log for r in self.results.values() if r.failure is not None and r.failure.log]
        log = f"\n{logs[-1]}" if logs else ""
        raise StudyFailed(
            f"{self.study.name}: {what}{log}",
            hint="mend the cause, then give the same command again: it goes on to the total number of trials",
        )

    # ------------------------------------------------------------------------------------------------ the end

    def _is_done(self) -> bool:
        return not self._wanted() and not self._running_trials() and len(self.state.trials) >= self.study.search.trials

    def _finish(self) -> None:
        """Close the study; one that holds no number is a failure."""
        if self.study.search.trials and not self._has_complete_trial():
            self._fail(f"none of its {len(self.state.trials)} trials completed: {self._last_reason()}")
        runs = [run_id for arm in self.state.arms.values() for run_id in arm.runs.values()]
        if runs and all(self.results[run_id].status != protocol.COMPLETE for run_id in runs):
            failure = self.results[runs[-1]].failure
            self._fail(
                f"none of its {len(runs)} confirmation runs completed: {failure.message if failure else 'stopped'}"
            )
        if self.state.closed is None:
            self._close(FINISHED)

    def _last_reason(self) -> str:
        trials: list[Trial] = list(self.state.trials.values())
        return next((trial.reason for trial in reversed(trials) if trial.reason), "no reason was given")
