"""The launcher of a cluster: gives attempts to Slurm through submitit, and tells whether they live without its watcher.

One job for each attempt. An array of jobs would share one name, which is the key by which a job whose submission got no
answer is found before it is submitted again; it would share a folder and a list of excluded nodes too, and was no faster.
Jobs are never requeued by Slurm: what a pre-emption or a node ends is the study's to attempt again.

Whether an attempt lives is read in this order: its result, its pulse, squeue, sacct.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import re
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from orchestrator import slurm, worker
from orchestrator.allocation import expand_nodes
from orchestrator.claims import read_claim
from orchestrator.errors import ConfigError, MachineError, ProtocolError
from orchestrator.job_names import JobNames
from orchestrator.launcher import STORAGE_ERRORS, JobRecord, exports
from orchestrator.ports import Ending, OpenJob, Unanswered
from orchestrator.pulse import SILENCE_SECONDS, Pulse
from orchestrator.slots import JobResources
from orchestrator.slurm import Ask, Job, Question
from orchestrator.slurm_jobs import JobTable
from orchestrator.slurm_states import ENDED, NEVER_STARTED, QUEUED
from orchestrator.study import SLURM, Resources
from trainer import protocol
from trainer.protocol import INFRASTRUCTURE, NODE, PREEMPTED, AttemptDir, RunDir

OUTER_MARGIN_MINUTES = 5.0  # Slurm's limit lies so much beyond the worker's, which ends the trainer in order
NOTICE_SECONDS = 60  # before its time limit, or at a pre-emption, a job gets SIGUSR2
SETTLE_SECONDS = 5.0  # for which a job must be gone, and not heard, before it is believed
DOUBT_SECONDS = 10.0  # for which a submission without an answer may still arrive
LEAVE_SECONDS = 60.0  # for a job to end by itself after its attempt has
CANCEL_SECONDS = 10.0  # between two cancellations of the same job
NOTE_SECONDS = 300.0  # between two notes on the same trouble

_TRANSIENT = re.compile(
    r"Unable to contact slurm controller|Socket timed out|timed out|temporarily|Connection (?:refused|reset)|connect failure|"
    r"Zero Bytes were transmitted|endpoint is not connected|standby mode|Unexpected message|[Mm]unge|authentication|"
    r"Communication|Transport|I/O error|Unable to (?:establish|send)|Slurm backup|Broken pipe|Input/output error",
)

# Variables of the controller's that a job must not inherit: of the job that the controller itself may run in, and of a
# distributed program's process.
_DISTRIBUTED = frozenset(
    {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK",
     "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES"}
)  # fmt: skip
# What lets the controller into servers that no job asks; Slurm would keep them with each job.
_SECRET = frozenset(
    {"HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "PGPASSWORD"}
)
# sbatch reads its options from the environment too, and believes it before the job's script.
_DEFAULTS = {
    "SBATCH_PARTITION": "partition", "SBATCH_ACCOUNT": "account", "SBATCH_QOS": "qos", "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_RESERVATION": "", "SBATCH_CLUSTERS": "",
}  # fmt: skip


class SlurmLauncher:
    """Runs attempts as jobs of the cluster whose commands this machine has."""

    has_queue = True

    def __init__(self, resources: Resources, names: JobNames, ask: Ask = Question) -> None:
        self.resources = resources
        self.names = names
        self.ask = ask
        self.table = JobTable(ask)
        self.pulse = Pulse()
        self._begun = time.monotonic()
        self._doubtful: dict[str, float] = {}
        """By name, when a submission without an answer was made."""

        self._cancelled: dict[str, float] = {}
        """By name or id, when it was last cancelled."""

        self._astray: dict[str, float] = {}
        """By id, since when a job lives that no open attempt has."""

        self._noted: dict[str, float] = {}
        self._commands: list[Question] = []
        self._ids: dict[str, str] = {}
        """Of the open attempts' jobs, by name."""

    # ------------------------------------------------------------------------------------------------ submission

    def submit(self, run: RunDir, attempt: int, *, tag: str, resources: JobResources) -> str:
        """Give an attempt to Slurm and return the job's id.

        Raises Unanswered where Slurm may or may not have it, ConfigError with sbatch's own words where it refuses what is
        asked for, StorageError.
        """
        if self.table.silent_since is not None:
            raise Unanswered(f"Slurm does not answer: {self.table.problem}")
        files = run.attempt(attempt)
        _clear(files.scheduler)
        try:
            job_id = self._submit(run, attempt, files, tag, resources)
        except OSError as error:
            if error.errno in STORAGE_ERRORS:
                raise protocol.storage_error(error, files.scheduler) from error
            raise MachineError(
                f"{files.root}: the job could not be submitted: {error.strerror or error}",
                hint="free memory or processes on this machine, then give the same command again",
            ) from error
        self._doubtful.pop(tag, None)
        record = JobRecord(job_id=job_id, tag=tag, submitted=time.time(), resources=resources, scheduler=SLURM)
        protocol.write_json_atomically(files.job, dataclasses.asdict(record))
        return job_id

    def _submit(self, run: RunDir, attempt: int, files: AttemptDir, tag: str, resources: JobResources) -> str:
        executor = _Executor(files.scheduler)
        executor.update_parameters(**self._parameters(run, tag, resources))
        said = io.StringIO()  # submitit prints what its errors hold
        try:
            with contextlib.redirect_stderr(said):
                job = executor.submit(
                    worker.run_in_slurm, str(run.root), attempt, resources.processes, resources.timeout_seconds,
                    self.resources.python,
                )  # fmt: skip
        except (FailedJobError, FailedSubmissionError) as error:
            words = str(error).strip() or said.getvalue().strip()
            if isinstance(error, FailedJobError) and words and not _TRANSIENT.search(words):
                raise self._refusal(words, resources) from error
            self._doubtful[tag] = time.monotonic()
            raise Unanswered(f"sbatch: {words or 'ended without a word'}") from error
        return str(job.job_id)

    def _parameters(self, run: RunDir, tag: str, resources: JobResources) -> dict[str, Any]:
        """What submitit makes sbatch's options of."""
        asked = self.resources
        exclude = ",".join(filter(None, [str(asked.sbatch.get("exclude", "")), *resources.exclude]))
        cpus = asked.sbatch.get("cpus-per-task")
        further = {name: value for name, value in asked.sbatch.items() if value is not False and name != "exclude"}
        srun = ["--cpu-bind=none", "--mpi=none", "--kill-on-bad-exit=1", *([f"--cpus-per-task={cpus}"] if cpus else [])]
        has_gpus = resources.gpus_per_node and not {"gres", "gpus-per-task"} & set(asked.sbatch)
        return {
            "job_name": tag,
            "time": math.ceil(resources.timeout_seconds / 60 + OUTER_MARGIN_MINUTES),
            "nodes": resources.nodes,
            "ntasks_per_node": 1,
            "gpus_per_node": resources.gpus_per_node if has_gpus else None,
            "partition": asked.partition or None,
            "account": asked.account or None,
            "qos": asked.qos or None,
            "constraint": asked.constraint or None,
            "comment": asked.comment or None,
            "exclusive": asked.exclusive or None,
            "exclude": exclude or None,
            "signal_delay_s": NOTICE_SECONDS,
            "wckey": None,  # submitit's own, which clusters that track them refuse
            "setup": [*asked.setup, *exports(tag)],
            "additional_parameters": {"no-requeue": True, "chdir": str(run.root), **further},
            "srun_args": srun,
        }

    def _refusal(self, words: str, resources: JobResources) -> ConfigError:
        excluded = f"; nodes that failed are excluded: {', '.join(resources.exclude)}" if resources.exclude else ""
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in words.splitlines()]
        return ConfigError(
            f"sbatch refuses the job: {'; '.join(lines)}",
            hint=f"change [resources] and give the same command again: it goes on{excluded}",
        )

    # ------------------------------------------------------------------------------------------------ finding

    def find(self, attempt: AttemptDir, *, tag: str) -> str | None:
        """The id of the attempt's job; None where Slurm certainly does not have it. Raises Unanswered.

        A job whose submitter was killed, or got no answer, before it gave the job its task is given it now: it waits for it.
        """
        scripts = list(attempt.scheduler.glob("*_submission.sh"))
        if not scripts and not any(attempt.scheduler.glob(".submission_file_*")):
            return None  # sbatch was never called
        job_id = scripts[0].name.partition("_")[0] if scripts else self._id_of(tag)
        if job_id is not None:
            _give_task(attempt, job_id)
            if not attempt.job.exists():
                found = {"job_id": job_id, "tag": tag, "scheduler": SLURM}
                protocol.write_json_atomically(attempt.job, found)
        return job_id

    def _id_of(self, tag: str) -> str | None:
        """The id of the live job of that name, by a question that waits for its answer. Raises Unanswered."""
        question = self.ask(slurm.squeue_command())
        answer = slurm.wait_for(question)
        if not answer.is_given:
            raise Unanswered(f"squeue: {answer.errors or f'ended with {answer.returncode}'}")
        jobs = slurm.by_name(slurm.read_squeue(answer.output)).get(tag, [])
        live = [job for job in jobs if job.meaning.standing != ENDED]
        if live:
            return live[0].job_id
        if question.asked < self._doubtful.get(tag, self._begun) + DOUBT_SECONDS:
            raise Unanswered("its submission may still arrive")
        return None

    # ------------------------------------------------------------------------------------------------ watching

    def look(self, jobs: Collection[OpenJob]) -> list[str]:
        """Ask Slurm about all jobs at once, end those that nobody waits for, and say what people should know."""
        self._ids = {job.tag: job.job_id for job in jobs}
        self.table.refresh(self._ids)
        self._commands = [command for command in self._commands if command.answer() is None]
        for job in jobs:
            self._tidy(job)
        self._end_strays()
        return list(self._notes(jobs))

    def _tidy(self, job: OpenJob) -> None:
        """End a waiting job whose attempt is asked to stop, one that Slurm could not start, and a second copy."""
        live = self.table.live(job.tag)
        claim = read_claim(job.files) if len(live) > 1 else None
        owner = claim.job if claim is not None else (job.job_id or (live[0].job_id if live else ""))
        for found in live:
            is_hopeless = found.meaning.standing == QUEUED and (
                job.files.stop.exists() or found.reason.startswith(NEVER_STARTED)
            )
            if is_hopeless or (len(live) > 1 and found.job_id != owner):
                self._cancel_job(found)

    def _end_strays(self) -> None:
        """End what lives under the study's names and is no open attempt's: requeued after its end, or hanging."""
        now, ours = time.monotonic(), [job for job in self.table.all_live() if self.names.is_ours(job.name)]
        strays = {job.job_id: job for job in ours if job.name not in self._ids}
        self._astray = {job_id: self._astray.get(job_id, now) for job_id in strays}
        for job_id, since in self._astray.items():
            if strays[job_id].meaning.standing == QUEUED or now - since > LEAVE_SECONDS:
                self._cancel_job(strays[job_id])

    def _notes(self, jobs: Collection[OpenJob]) -> Iterator[str]:
        if self.table.silent_since is not None and self._is_new(self.table.problem.partition(":")[0]):
            yield f"Slurm does not answer: {self.table.problem}; running jobs go on, and are followed by their files"
        reasons = {
            found.reason for job in jobs for found in self.table.live(job.tag) if found.meaning.standing == QUEUED
        }
        for reason in sorted(reasons & _WILL_NOT_START):
            if self._is_new(reason):
                yield f"Slurm lets jobs wait and may never start them: {reason} (squeue --me says which)"

    def _is_new(self, trouble: str) -> bool:
        now = time.monotonic()
        if now - self._noted.get(trouble, -math.inf) < NOTE_SECONDS:
            return False
        self._noted[trouble] = now
        return True

    def is_alive(self, attempt: AttemptDir, *, tag: str | None) -> bool:
        """Whether an attempt waits or runs. One with a result does not: what is left of its job is Slurm's to keep apart.

        Without a tag, as with another study's attempt, the name is read from its record.
        """
        if attempt.result.exists():
            self.pulse.forget(attempt)
            return False
        name = tag if tag is not None else _recorded_tag(attempt)
        silent = self.pulse.silent_seconds(attempt)
        if name is None:  # not a job of Slurm's
            return silent is not None and silent < SILENCE_SECONDS
        if silent is not None and silent > SILENCE_SECONDS:
            return False  # a node that Slurm has not missed yet
        gone = self._gone_seconds(name)
        if gone is None or gone < SETTLE_SECONDS or (silent is not None and silent < SETTLE_SECONDS):
            return True
        with contextlib.suppress(OSError):
            os.listdir(attempt.root)  # a network file system may not have heard of the result
        return (
            not attempt.result.exists()
            and tag is not None
            and not self.table.is_explained(name, self._ids.get(name, ""))
        )

    def _gone_seconds(self, name: str) -> float | None:
        if name in self._ids:
            return self.table.gone_seconds(name)
        return None if self.table.live(name) or self.table.asked < self._begun else math.inf

    def ending(self, attempt: AttemptDir, *, tag: str) -> Ending | None:
        """Why an attempt that is gone left no result: what Slurm says of its job, or that it fell silent."""
        job = self.table.last(tag, self._ids.get(tag, ""))
        if job is not None and job.meaning.kind:
            words = f" on {job.nodes}" if job.nodes else ""
            return Ending(
                kind=job.meaning.kind, message=f"{job.meaning.words} (Slurm: job {job.job_id} {job.state}{words})"
            )
        silent = self.pulse.silent_seconds(attempt)
        if silent is not None and silent > SILENCE_SECONDS:
            claim = read_claim(attempt)
            place = claim.node if claim is not None else "its node"
            return Ending(
                kind=NODE, message=f"nothing was heard from {place} for {silent:.0f} s, while Slurm says that it runs"
            )
        where = f"Slurm knows no job {self._ids.get(tag, '')}" if job is None else f"Slurm: {job.state}"
        if job is None and not attempt.claim.exists():
            # A slurmctld that was killed has forgotten it: nothing ran, it has lost its place.
            return Ending(kind=PREEMPTED, message=f"the job is gone and had not begun ({where})")
        return Ending(kind=INFRASTRUCTURE, message=f"the job is gone and left no result ({where})")

    def nodes_of(self, attempt: AttemptDir, *, tag: str) -> tuple[str, ...]:
        """Where an attempt ran; of several nodes, where one failed, those that are known to have."""
        job = self.table.last(tag, self._ids.get(tag, ""))
        try:
            given = expand_nodes(job.nodes) if job is not None else ()
        except ValueError:
            given = ()
        claim = read_claim(attempt)
        given = given or ((claim.node,) if claim is not None and claim.node else ())
        told = tuple(name for number, name in enumerate(given) if number and attempt.node_failure(number).exists())
        if told or len(given) < 2 or job is None or job.meaning.kind != NODE:
            return told or given
        return self._down_among(given)

    def _down_among(self, nodes: Collection[str]) -> tuple[str, ...]:
        """Those of the nodes that Slurm does not use now."""
        answer = slurm.wait_for(self.ask(slurm.sinfo_command(nodes)))
        return slurm.read_down_nodes(answer.output) if answer.is_given else ()

    # ------------------------------------------------------------------------------------------------ ending

    def cancel(self, tag: str) -> None:
        """End the jobs of that name."""
        self._run_once(tag, slurm.scancel_name_command(tag))

    def _cancel_job(self, job: Job) -> None:
        self._run_once(job.job_id, slurm.scancel_command(job))

    def _run_once(self, what: str, command: list[str]) -> None:
        now = time.monotonic()
        if now - self._cancelled.get(what, -math.inf) > CANCEL_SECONDS:
            self._cancelled[what] = now
            self._commands.append(self.ask(command))


_WILL_NOT_START = frozenset(
    {
        "JobHeldUser", "JobHeldAdmin", "BadConstraints", "PartitionTimeLimit", "PartitionNodeLimit", "PartitionDown",
        "PartitionInactive", "InvalidQOS", "InvalidAccount", "QOSMaxWallDurationPerJobLimit", "AssocMaxWallDurationPerJobLimit",
        "QOSMaxNodePerJobLimit", "AssocMaxNodePerJobLimit", "ReqNodeNotAvail", "DependencyNeverSatisfied",
    }
)  # fmt: skip


class _Executor(SlurmExecutor):
    """submitit's executor, whose sbatch does not see what the controller's own job, if it is one, was given."""

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        named = {key for key, value in self.parameters.items() if value}
        hidden = [name for name in os.environ if is_hidden(name, named)]
        command: list[str] = super()._make_submission_command(submission_file_path)
        return ["env", *(f"--unset={name}" for name in hidden), *command]


def is_hidden(name: str, named: Collection[str] = ()) -> bool:
    """Whether a variable must not reach sbatch. `named` are the parameters that the study gives itself."""
    if name.startswith("SBATCH_"):
        return _DEFAULTS.get(name, name) in {name, *named}
    return slurm.is_leaked(name) or name in _DISTRIBUTED or name in _SECRET


def _clear(folder: Path) -> None:
    """Empty the scheduler's folder of a submission that was refused, or never made."""
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def _give_task(attempt: AttemptDir, job_id: str) -> None:
    """Put submitit's task where its job looks for it, where the submitter did not come to do so."""
    task = attempt.scheduler / f"{job_id}_submitted.pkl"
    for left in attempt.scheduler.glob("*.pkl"):
        if not task.exists() and "_" not in left.name:
            left.rename(task)


def _recorded_tag(attempt: AttemptDir) -> str | None:
    """The name of an attempt's job, where it is a job of a cluster."""
    try:
        record = protocol.read_json(attempt.job)
    except (FileNotFoundError, ProtocolError):
        return None
    return str(record["tag"]) if record.get("scheduler") == SLURM else None
