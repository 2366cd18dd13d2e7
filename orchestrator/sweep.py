"""The sweep: the loop that asks trials, keeps the slots full, and tells what came of them. Imports no outside library.

Every decision is in the ledger before it is acted on, and nothing is kept in memory that the ledger and the run
directories do not say; so the controller may be killed at any moment, and the same command goes on.
"""

from __future__ import annotations

import errno
import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrator import __version__, enqueued, ledger, lock
from orchestrator.attempts import Attempts
from orchestrator.backlog import Backlog, Wanted
from orchestrator.confirmation import Confirmation
from orchestrator.contest import Fixed
from orchestrator.early_stopping import EarlyStopping
from orchestrator.errors import ConfigError, DataError, Interrupted, StorageError, StudyFailed
from orchestrator.home import Home
from orchestrator.identity import identity_of, require_same
from orchestrator.interrupts import Interrupts
from orchestrator.ledger import Arm, Attempt, OpenLedger, StudyState, Trial
from orchestrator.ports import Launcher, Mirror, Packer, Progress, Search
from orchestrator.purse import BY_DAY, BY_STUDY, Purse, confirmation_cost, next_day, run_cost
from orchestrator.retries import FailedRun, failed_runs, kinds_asked, remedy
from orchestrator.runs import RESUMABLE, VALIDATIONS, RunRequest, RunStore, run_id_of
from orchestrator.slots import Slots, machine_slots
from orchestrator.source_run import Sources
from orchestrator.study import Study
from orchestrator.verdict import Verdict
from trainer import protocol
from trainer.config import Config, with_knobs
from trainer.protocol import RunDir

POLL_SECONDS = 0.2
LEAVE_SECONDS = 5.0  # for the mirror, where a signal says that time is short: a scheduler kills half a minute after it
PASSING = frozenset(
    {errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN, errno.EAGAIN}
)
"""What a file server says that is being restarted or moved: the same file can be reached again in a while."""

PAUSES_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0)  # before each further try; then the controller leaves
SHOW_SECONDS = 1.0  # between two refreshes of progress and mirror while no decision is made
SAME_FAILURES = 3  # so many first trials that all fail in the same way are the study's failure, not the trials'

DRAIN, CANCEL = "drain", "cancel"  # what a study's stop file may ask


class Controller:
    """Runs one study to its total number of trials and its confirmation."""

    def __init__(
        self,
        study: Study,
        home: Home,
        *,
        launcher: Launcher,
        search: Search,
        pack: Packer,
        code: dict[str, str],
        data_dir: Path,
        manifest_sha256: str,
        progress: Progress,
        mirror: Mirror,
        slots: Slots | None = None,
        sources: Sources | None = None,
        baseline: Fixed | None = None,
        pack_ahead: Callable[[list[Config]], None] | None = None,
        poll_seconds: float = POLL_SECONDS,
        patience_seconds: float = 0.0,
    ) -> None:
        self.study = study
        self.home = home
        self.search = search
        self.pack = pack
        self.pack_ahead = pack_ahead
        self.code = code
        self.sources = sources
        self._replicates = {cell.name: cell.replicate for cell in study.cells}
        self.baseline = baseline
        """What the confirmation races against, where that is not the preset."""

        self.data_dir = data_dir.resolve()
        self.manifest_sha256 = manifest_sha256
        self.progress = progress
        self.mirror = mirror
        self.poll_seconds = poll_seconds
        self.patience_seconds = patience_seconds
        """How long another controller of the study is waited for."""

        resources = study.resources
        self.slots = slots or machine_slots(slots=resources.slots, gpus_per_run=resources.gpus_per_run)
        self.launcher = launcher
        self.store = RunStore(home)
        self.files = home.study(study.name)
        self.ledger = OpenLedger(self.files.ledger)
        self.attempts = self._fresh_attempts()
        self.backlog = Backlog(study, ledger=self.ledger, attempts=self.attempts)
        self.early_stopping = EarlyStopping(study, home, search=search, progress=progress)
        self.purse = Purse(home, study.name, study.budget, beside=study.other_rungs)
        self.interrupts = Interrupts()
        self.told: list[Verdict] = []
        """Verdicts of this controller's life, in their order."""

        self._inherited: set[tuple[str, int]] = set()
        """Attempts that were open when this controller began."""

        self._is_search_spent = False
        """Whether the study's cap let no further trial begin; what the confirmation gives back is not searched with."""

        self._waits_for: str | None = None
        """The cap that has last been told of."""

        self._shown = (-1, -math.inf)
        """Number of decisions, and monotonic seconds, when progress and mirror last heard of the study."""

    @property
    def state(self) -> StudyState:
        """What the ledger says."""
        return self.ledger.now

    # ------------------------------------------------------------------------------------------------ the loop

    def run(self) -> StudyState:
        """Bring the study to its end and return its state.

        Raises StudyBusy, ConfigError where the question was changed, StudyFailed where nothing can come of it,
        Interrupted on a first SIGINT, SIGTERM or SIGHUP (jobs go on), StorageError (jobs go on, and the same command
        goes on once there is room), DataError (likewise), ProtocolError, MachineError.
        """
        self.home.require_writable()
        try:
            with lock.held(self.files, patience=self.patience_seconds) as lease, self.interrupts.noted():
                self.ledger.guard = lease.require
                self._forget_stop()
                self._work()
        finally:
            self.progress.close()
            if self.interrupts.by is None:
                self.mirror.close()
            else:
                self.mirror.close(LEAVE_SECONDS)
        return self.state

    def _forget_stop(self) -> None:
        """Remove a stop that was meant for an earlier controller: before anything that takes time. Raises StorageError."""
        try:
            self.files.stop.unlink(missing_ok=True)
        except OSError as error:
            raise protocol.storage_error(error, self.files.stop) from error

    def _work(self) -> None:
        """Open the study and work on it; begin again, as after a restart, where files could not be reached for a while."""
        tries, decisions = 0, 0
        while True:
            try:
                self._open()
                return self._loop()
            except (OSError, StorageError) as error:
                cause = error if isinstance(error, OSError) else error.__cause__
                if not isinstance(cause, OSError) or isinstance(cause, BrokenPipeError):
                    raise
                tries = 0 if self.ledger.decisions > decisions else tries
                if cause.errno not in PASSING or tries == len(PAUSES_SECONDS):
                    raise _as_storage_error(error, self.files.root) from cause
                self.progress.note(f"files cannot be reached ({error}); tried again in {PAUSES_SECONDS[tries]:g} s")
                self._pause(PAUSES_SECONDS[tries])
                tries, decisions = tries + 1, self.ledger.decisions
                self._forget()

    def _pause(self, seconds: float) -> None:
        """Wait, but not on against a signal."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.interrupts.by is None:
            time.sleep(min(POLL_SECONDS, seconds))
        self._leave_if_interrupted()

    def _forget(self) -> None:
        """Drop all that follows from ledger and run directories: it may be half of what was meant."""
        self.slots.held.clear()
        self.attempts = self._fresh_attempts()
        self.backlog = Backlog(self.study, ledger=self.ledger, attempts=self.attempts)
        self.early_stopping = EarlyStopping(self.study, self.home, search=self.search, progress=self.progress)

    def _fresh_attempts(self) -> Attempts:
        return Attempts(
            self.study, self.home, ledger=self.ledger, launcher=self.launcher, slots=self.slots, progress=self.progress
        )

    def _loop(self) -> None:
        while True:
            self.ledger.guard()
            if self.files.retry.exists():
                self._forget()
                self._open()
            self._leave_to_mend(self._observe())
            self._stop_early()
            self._tell()
            self._leave_if_interrupted()
            request = self._stop_request()
            if request == CANCEL:
                self._cancel_all()
            if request is None:
                self._refill()
            self._show()
            if not self.attempts.open:
                if request is not None:
                    return self._close(ledger.HALTED)
                if self._is_done():
                    return self._finish()
            time.sleep(self.poll_seconds)

    def _observe(self) -> list[Attempt]:
        """Take up which attempts ended since, and what they cost."""
        ended = self.attempts.observe()
        for attempt in ended:
            self.purse.settle(attempt)
        return ended

    def _show(self) -> None:
        """Let people see every decision, and what the jobs do in between."""
        decisions, seconds = self._shown
        if self.ledger.decisions != decisions or time.monotonic() - seconds >= SHOW_SECONDS:
            self._shown = self.ledger.decisions, time.monotonic()
            self.progress.show(self.state)
            self.mirror.nudge()

    def _close(self, reason: str) -> None:
        self.ledger.decide(ledger.CLOSED, reason=reason)
        self.files.stop.unlink(missing_ok=True)
        self.progress.show(self.state)

    # ------------------------------------------------------------------------------------------------ opening, leaving

    def _open(self) -> None:
        """Take up the ledger where it ends."""
        self.ledger.open()
        for_any_run = hashlib.sha256(self.pack(None)).hexdigest()
        identity = identity_of(self.study, manifest_sha256=self.manifest_sha256, bundle_sha256=for_any_run)
        if self.sources:
            identity |= self.sources.identity
        require_same(self.study.name, self.state, identity)
        is_same = (self.state.source, self.state.identity) == (self.study.source, identity)
        failed = self._asked_to_retry()
        if not is_same or failed or self.state.closed not in (None, ledger.FINISHED):
            self.ledger.decide(
                ledger.OPENED, source=self.study.source, digest=self.study.digest, identity=identity, caddie=__version__
            )
        self._retry(failed)
        self.search.rebuild(self.state)
        self.attempts.reattach()
        self.purse.reconcile(self.state, run_cost(self.study))
        self._inherited = {(attempt.run_id, attempt.number) for attempt in self.attempts.open}

    def _asked_to_retry(self) -> list[FailedRun]:
        """The failed runs that somebody asks for again."""
        kinds = kinds_asked(self.files.retry)
        most = self.study.resources.max_attempts
        return [] if kinds is None else failed_runs(self.state, max_attempts=most, kinds=kinds)

    def _retry(self, failed: list[FailedRun]) -> None:
        """Want these runs again. Raises StorageError."""
        if failed:
            trials = {run.owner.number for run in failed if isinstance(run.owner, Trial)}
            runs = list(dict.fromkeys(run.run_id for run in failed))
            self.ledger.decide(ledger.RETRIED, runs=runs, trials=sorted(trials))
            for run in failed:
                self.progress.note(f"attempted again: {run.text}")
        try:
            self.files.retry.unlink(missing_ok=True)
        except OSError as error:
            raise protocol.storage_error(error, self.files.retry) from error

    def _leave_to_mend(self, ended: list[Attempt]) -> None:
        """Leave where a run found the disk full or the data damaged: the next would too, and it says nothing of the trial.

        An earlier controller's run may have found what is mended by now, and is only run again.
        """
        for attempt in ended:
            is_inherited = (attempt.run_id, attempt.number) in self._inherited
            if attempt.failure in ledger.TO_MEND and not is_inherited:
                failure = self.attempts.result_of(attempt).failure
                error, remedy = (
                    (StorageError, "make room there")
                    if attempt.failure == protocol.DISK
                    else (DataError, "mend the data set")
                )
                raise error(
                    f"run {attempt.run_id} attempt {attempt.number}: {failure.message if failure else attempt.failure}",
                    hint=f"{remedy}; nothing was lost: the same command runs it again and goes on",
                )

    def _leave_if_interrupted(self) -> None:
        if self.interrupts.by is None:
            return
        running = len(self.attempts.open)
        raise Interrupted(
            f"{self.study.name}: left by {self.interrupts.by.name}: {running} running jobs go on; "
            "the same command continues the study",
            hint=f"to end it: caddie study stop {self.study.name}",
        )

    def _stop_request(self) -> str | None:
        """What the study's stop file asks, if there is one."""
        try:
            return CANCEL if self.files.stop.read_text(encoding="utf-8").strip() == CANCEL else DRAIN
        except FileNotFoundError:
            return None

    def _cancel_all(self) -> None:
        for attempt in self.attempts.open:
            self.attempts.stop(attempt, ledger.CANCELLED)

    # ------------------------------------------------------------------------------------------------ runs

    def _config(self, params: Mapping[str, Any], *, is_searched: bool) -> Config:
        """Of a trial's runs or of an arm's: a trial may go on from a checkpoint, a record is made in one go."""
        config = self.study.config_of(params)
        own = {} if is_searched else {VALIDATIONS: 0}
        return with_knobs(config, {RESUMABLE: is_searched and self.sources is None, **own})

    def _request(self, params: Mapping[str, Any], seed: int, *, trial: int | None, arm: str | None) -> RunRequest:
        """What a run of an arm, or of a trial, is asked for."""
        config = self._config(params, is_searched=arm is None)
        return RunRequest(
            preset=self.study.preset, config=config, seed=seed, replicate=self._replicates.get(arm or "", 0),
            data_dir=str(self.data_dir), manifest_sha256=self.manifest_sha256, study=self.study.name, trial=trial,
            script=self.study.preset if self.study.script else "", script_values=self.study.script_values(params),
            gpus=self.study.gpus_apart,
            **(self.sources.taken(config, seed) if self.sources else {}),
        )  # fmt: skip

    def _runs_of(self, params: Mapping[str, Any], seeds: tuple[int, ...], *, arm: str | None) -> dict[int, str]:
        """Run id by seed, of an arm or of a trial."""
        bundle_sha256 = hashlib.sha256(self.pack(self._config(params, is_searched=arm is None))).hexdigest()
        requests = {seed: self._request(params, seed, trial=None, arm=arm) for seed in seeds}
        return {seed: run_id_of(request, bundle_sha256) for seed, request in requests.items()}

    def _plan(self, owner: Trial | Arm, seed: int) -> RunDir:
        trial, arm = (owner.number, None) if isinstance(owner, Trial) else (owner.trial, owner.name)
        request = self._request(owner.params, seed, trial=trial, arm=arm)
        return self.store.plan(request, bundle=self.pack(request.config), code=self.code)

    def _refill(self) -> None:
        """Fill the free slots with runs that are wanted; ask for more only when none is."""
        wanted = deque(self.backlog.wanted())
        while self.slots.free:
            if wanted:
                self._submit(wanted.popleft())
                continue
            asked = len(self.state.trials)
            if not self._ask():
                return
            new = [self.state.trials[number] for number in range(asked, len(self.state.trials))]
            wanted.extend(self.backlog.wanted(new or None))

    def _submit(self, wanted: Wanted) -> None:
        """Start a run, or take the result that another study left; nothing where another study is at it, or a cap forbids."""
        owner = wanted.owner
        if isinstance(owner, Trial) and (owner.state != ledger.RUNNING or self.backlog.is_given_up(owner)):
            return  # by what was found since it was put in line
        run = self._plan(wanted.owner, wanted.seed)
        if self.attempts.is_elsewhere(run):
            return
        stored = self.store.result(wanted.run_id)  # asked second: the other study may have ended it just now
        if stored is not None and stored.status == protocol.COMPLETE:
            self.backlog.results[wanted.run_id] = stored
            self._tell()
        elif self._affords(wanted):
            self.attempts.submit(run)

    # ------------------------------------------------------------------------------------------------ the budget

    def _affords(self, wanted: Wanted) -> bool:
        """Set a run's longest cost aside; False where a cap does not let it."""
        keep = self._kept_back() if isinstance(wanted.owner, Trial) else 0.0
        refused = self.purse.reserve(wanted.run_id, run_cost(self.study), keep=keep)
        self._tell_of_cap(refused)
        if refused == BY_STUDY and not self.attempts.open and isinstance(wanted.owner, Trial):
            self._give_up(wanted.owner)
        return refused is None

    def _kept_back(self) -> float:
        """GPU-seconds that the search leaves to the confirmation."""
        return confirmation_cost(self.study)

    def _give_up(self, trial: Trial) -> None:
        """Tell a trial whose runs no cap lets begin any more, so that the confirmation need not wait for it."""
        self._is_search_spent = True
        self._tell_trial(trial, Verdict(state=ledger.PRUNED, reason="its runs could not begin: the budget is spent"))

    def _has_search_money(self) -> bool:
        """Whether one more trial may begin now. Once the cap has ended the search it stays ended."""
        if self._is_search_spent:
            return False
        runs = len(self.study.search.seeds)
        refused = self.purse.refusal(runs * run_cost(self.study), keep=self._kept_back())
        self._tell_of_cap(refused)
        self._is_search_spent = refused == BY_STUDY and not self.attempts.open and not self.backlog.running_trials()
        return refused is None

    def _tell_of_cap(self, refused: str | None) -> None:
        """Say once which cap holds the study up."""
        if refused == self._waits_for:
            return
        self._waits_for = refused
        if refused == BY_DAY:
            self.progress.note(
                f"the day's budget is used up; {self.study.name} goes on at {next_day(time.time()):%H:%M} UTC"
            )
        if refused == BY_STUDY:
            self.progress.note(
                f"the budget of {self.study.name} leaves no room for another run beside those that run and those that are "
                "kept for the confirmation"
            )

    # ------------------------------------------------------------------------------------------------ asking

    def _ask(self) -> bool:
        """Ask for one more trial, or for the confirmation; False where nothing is left to ask."""
        if len(self.state.trials) < self.study.search.trials:
            if self._has_search_money():
                self._ask_trial(len(self.state.trials))
                return True
            if not self._is_search_spent:
                return False
        return self._ask_arms()

    def _ask_trial(self, number: int) -> None:
        request = next(iter(enqueued.waiting(self.files.queue, self.state)), None) if number else None
        params = request.params if request else self.search.ask(number)
        runs = {} if self._refusal(params) else self._runs_of(params, self.study.search.seeds, arm=None)
        origin = ledger.BY_HAND if request else ledger.BY_SAMPLER if number else ledger.BY_PRESET
        queued = {"queued": request.id, "source": request.source} if request else {}
        self.ledger.decide(ledger.TRIAL_ASKED, trial=number, origin=origin, params=params, runs=runs, **queued)
        trial = self.state.trials[number]
        self.search.begin(trial)
        for seed in runs:
            self._plan(trial, seed)
        if not runs:
            self._tell_trial(trial, self._refused(trial))

    def _refusal(self, params: Mapping[str, Any]) -> str:
        """Why the knobs, each in its range, make no configuration together; empty where they do."""
        try:
            self.study.config_of(params)
        except ConfigError as error:
            return str(error)
        return ""

    def _ask_arms(self) -> bool:
        """Ask for the arms that follow from the trials; False where they are asked, or it is too early."""
        if self.study.confirm is None or self.backlog.running_trials():
            return False
        asked, arms = False, self._arms()
        seeds = self._confirmation.seeds(arms) if arms else ()
        if self.study.cells and len(self.state.arms) < len(arms):
            self.progress.note(f"packing the trainer for {len(arms)} cells")  # some seconds each, the first time
            if self.pack_ahead is not None:
                self.pack_ahead([self._config(params, is_searched=False) for _, params in arms.values()])
                self._leave_if_interrupted()  # it may have taken a while
        for name, (trial, params) in arms.items():
            runs = self._runs_of(params, seeds, arm=name)
            known = self.state.arms.get(name)
            if known is None or known.runs != runs:
                self.ledger.decide(ledger.ARM_ASKED, arm=name, trial=trial, params=params, runs=runs)
                for seed in runs:
                    self._plan(self.state.arms[name], seed)
                asked = True
        return asked

    @property
    def _confirmation(self) -> Confirmation:
        return Confirmation(self.study, ledger=self.ledger, backlog=self.backlog, baseline=self.baseline)

    def _arms(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """(trial, params) by arm: a design's cells; or the unchanged preset, and the best point where it is another, or the
        candidate.
        """
        if self.study.cells:
            return {cell.name: (0, cell.params) for cell in self.study.cells}
        if self.study.candidate is not None:
            return {ledger.PRESET_ARM: (0, {}), ledger.BEST_ARM: (0, self.study.candidate_params)}
        if self.study.search.trials and not self._has_complete_trial():
            return {}
        arms = {ledger.PRESET_ARM: (0, self.state.trials[0].params if 0 in self.state.trials else {})}
        best = self.state.best
        if best is not None and best.number != 0:
            arms[ledger.BEST_ARM] = (best.number, best.params)
            if self.study.confirm is not None and self.study.confirm.against:  # the preset is not what must be beaten
                del arms[ledger.PRESET_ARM]
        return arms

    def _has_complete_trial(self) -> bool:
        return any(trial.state == ledger.COMPLETE for trial in self.state.trials.values())

    # ------------------------------------------------------------------------------------------------ telling

    def _stop_early(self) -> None:
        """Stop the trials that are behind; never the preset, and never a run that somebody else waits for too."""
        if self.study.stop_early is None:
            return
        shared = self.backlog.shared_runs()
        for trial in self.backlog.running_trials():
            if trial.number == 0 or not shared.isdisjoint(trial.runs.values()):
                continue
            found = self.early_stopping.given_up(trial, self.state)
            for attempt in self.attempts.open if found else ():
                if found and attempt.run_id in trial.runs.values():
                    self.attempts.stop(attempt, found.reason)

    def _tell(self) -> None:
        """Tell the trials that have ended."""
        for trial in self.backlog.running_trials():
            found = self._refused(trial) if not trial.runs else self.backlog.verdict_of(trial)
            if found is not None:
                self._tell_trial(trial, found)

    def _refused(self, trial: Trial) -> Verdict:
        reason = f"{protocol.CONFIG}: {self._refusal(trial.params)}"
        return Verdict(state=ledger.FAILED, reason=reason, failure=protocol.CONFIG)

    def _tell_trial(self, trial: Trial, found: Verdict) -> None:
        losses = self.early_stopping.losses_of(trial)
        self.ledger.decide(
            ledger.TRIAL_TOLD,
            trial=trial.number,
            state=found.state,
            value=found.value,
            constraints=found.constraints,
            measures=found.measures,
            failure=found.failure,
            intermediate={due: loss for due, loss in losses.items() if math.isfinite(loss)},
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

    # ------------------------------------------------------------------------------------------------ the end

    def _is_done(self) -> bool:
        has_all_trials = self._is_search_spent or len(self.state.trials) >= self.study.search.trials
        is_spent = self._waits_for == BY_STUDY  # with nothing running, nothing is given back any more
        return has_all_trials and not self.backlog.running_trials() and (is_spent or not self.backlog.wanted())

    def _finish(self) -> None:
        """Close the study; one that holds no number is a failure."""
        if self.study.search.trials and not self._has_complete_trial():
            self._fail(f"none of its {len(self.state.trials)} trials completed: {self._last_reason()}")
        is_spent = len(self.state.trials) < self.study.search.trials or bool(self.backlog.wanted())
        asked = [run_id for arm in self.state.arms.values() for run_id in arm.runs.values()]
        results = [self.backlog.results[run_id] for run_id in asked if run_id in self.backlog.results]
        if results and all(result.status != protocol.COMPLETE for result in results):
            failure = results[-1].failure
            self._fail(
                f"none of its {len(results)} confirmation runs completed: {failure.message if failure else 'stopped'}"
            )
        if self.state.closed is None:
            self._close(ledger.SPENT if is_spent else ledger.FINISHED)

    def _last_reason(self) -> str:
        trials: list[Trial] = list(self.state.trials.values())
        return next((trial.reason for trial in reversed(trials) if trial.reason), "no reason was given")

    def _fail(self, what: str) -> None:
        self._close(ledger.BROKEN)
        failures = [result.failure for result in self.backlog.results.values() if result.failure is not None]
        logs = [failure.log for failure in failures if failure.log]
        log = f"\n{logs[-1]}" if logs else ""
        raise StudyFailed(
            f"{self.study.name}: {what}{log}",
            hint=remedy(self.study.name, self.state, max_attempts=self.study.resources.max_attempts),
        )


def _as_storage_error(error: OSError | StorageError, place: Path) -> StorageError:
    """What the file system said, with what to do about it."""
    found = error if isinstance(error, StorageError) else protocol.storage_error(error, Path(error.filename or place))
    again = "the running jobs go on and nothing was lost: give the same command again once the files can be reached"
    return found if found.hint else StorageError(str(found), hint=again)
