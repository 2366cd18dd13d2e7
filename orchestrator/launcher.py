"""The launcher of this machine: starts attempts through submitit and tells whether they live.

submitit's local executor takes any job at once, calls a running job done after a restart of the controller, and leaves
zombies; so the queue is in `slots`, and a job's life is read off the worker's claim and off the processes that carry
the job's tag in their environment.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
import shutil
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from submitit import Job, LocalExecutor

from orchestrator import worker
from orchestrator.claims import is_elsewhere, is_live, read_claim
from orchestrator.errors import MachineError
from orchestrator.ports import Ending, OpenJob
from orchestrator.processes import TRAINER_TAG, signal_tagged, tagged_processes, trainer_tag
from orchestrator.pulse import SILENCE_SECONDS, Pulse
from orchestrator.slots import JobResources
from orchestrator.study import LOCAL
from trainer import protocol
from trainer.protocol import AttemptDir, RunDir

JOB_TAG = "CADDIE_JOB_TAG"
"""Environment variable of a job and of all that it starts; the name by which a job is found again."""

OUTER_MARGIN_MINUTES = 5.0
"""submitit's own limit lies this much beyond the worker's, which ends the trainer in order."""

TASK_FILES = "*_submitted.pkl"
"""submitit's name for a task that its job can find."""

WRAPPER_LOG = "wrapper.err"
"""What submitit itself and the shell around it say, beside the logs of the task."""

STORAGE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})

# Ctrl-C, Ctrl-\, Ctrl-Z and a closing terminal reach every process of the controller's group; they are not for the jobs.
IGNORE_TERMINAL = "trap '' INT QUIT TSTP HUP"


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """What `job.json` says, for people."""

    job_id: str
    tag: str
    submitted: float
    """Unix seconds."""

    resources: JobResources
    scheduler: str = LOCAL


def exports(tag: str) -> list[str]:
    """Lines of a job's script: its tag, and the place of this code, which need not be installed."""
    checkout = str(Path(protocol.__file__).resolve().parent.parent)
    known = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join([checkout, known]) if known else checkout
    return [f"export {name}={shlex.quote(value)}" for name, value in ((JOB_TAG, tag), ("PYTHONPATH", path))]


class LocalLauncher:
    """Runs attempts as processes of this machine, which outlive the controller."""

    jobs: ClassVar[list[Job[Any]]] = []
    """Children of this process, whichever launcher started them, kept until they have ended and been reaped."""

    has_queue = False

    def __init__(self) -> None:
        self.pulse = Pulse()

    def look(self, jobs: Collection[OpenJob]) -> list[str]:
        """Nothing: processes are looked for where they are asked for, and nobody starts one again."""
        return []

    def submit(self, run: RunDir, attempt: int, *, tag: str, resources: JobResources) -> str:
        """Start an attempt and return the job's id.

        Raises StorageError where its files cannot be written, MachineError where the machine takes no more processes.
        """
        files = run.attempt(attempt)
        shutil.rmtree(files.scheduler, ignore_errors=True)  # of a submission that a killed controller did not finish
        try:
            files.scheduler.mkdir(parents=True, exist_ok=True)
            executor = LocalExecutor(files.scheduler)
            executor.update_parameters(
                timeout_min=resources.timeout_seconds / 60 + OUTER_MARGIN_MINUTES,
                tasks_per_node=1,
                setup=[IGNORE_TERMINAL, *exports(tag), self._detach(files)],
            )
            gpus = ",".join(resources.gpus)
            job = executor.submit(
                worker.run_in_own_session, str(run.root), attempt, resources.processes, gpus, resources.timeout_seconds,
                resources.beside,
            )  # fmt: skip
        except OSError as error:
            if error.errno in STORAGE_ERRORS:
                raise protocol.storage_error(error, files.scheduler) from error
            raise MachineError(
                f"{files.root}: the job could not be started: {error.strerror or error}",
                hint="free memory or processes on this machine, then give the same command again",
            ) from error
        self.jobs.append(job)
        record = JobRecord(job_id=str(job.job_id), tag=tag, submitted=time.time(), resources=resources)
        protocol.write_json_atomically(files.job, dataclasses.asdict(record))
        return record.job_id

    @staticmethod
    def _detach(files: AttemptDir) -> str:
        """Keep a job off the controller's terminal and pipes: it outlives them, and a reader would wait for its end."""
        return f"exec </dev/null >>{shlex.quote(str(files.scheduler / WRAPPER_LOG))} 2>&1"

    def is_alive(self, attempt: AttemptDir, *, tag: str | None) -> bool:
        """Whether any process of the attempt runs: the worker that claimed it, its trainer, or what carries the job's tag.

        Without a tag the scheduler's wrapper is not asked for: after a result, and in another study's attempt. That one
        may run on another host, where only its pulse is heard.
        """
        self.jobs[:] = [job for job in self.jobs if not job.done()]  # asking reaps the ended ones
        claim = read_claim(attempt)
        if claim is not None and (is_live(claim) or (is_elsewhere(claim) and self._is_heard(attempt))):
            return True
        if tagged_processes(TRAINER_TAG, trainer_tag(attempt)):  # it outlives a killed worker
            return True
        return tag is not None and bool(tagged_processes(JOB_TAG, tag))

    def _is_heard(self, attempt: AttemptDir) -> bool:
        silent = self.pulse.silent_seconds(attempt)
        return silent is not None and silent < SILENCE_SECONDS

    def ending(self, attempt: AttemptDir, *, tag: str) -> Ending | None:
        """Nothing: a machine keeps no record of its processes."""
        return None

    def nodes_of(self, attempt: AttemptDir, *, tag: str) -> tuple[str, ...]:
        """None: there is no other machine to run on."""
        return ()

    def find(self, attempt: AttemptDir, *, tag: str) -> str | None:
        """The id of the job that carries the tag, or None; to be asked after a restart, when nobody submits.

        submitit starts a job and then gives it its task. One whose submitter was killed in between would wait for a
        minute and fail: it is ended, so that the attempt can be submitted again.
        """
        processes = tagged_processes(JOB_TAG, tag)
        if processes and not attempt.claim.exists() and not any(attempt.scheduler.glob(TASK_FILES)):
            self.cancel(tag)
            return None
        return str(processes[0]) if processes else None

    def cancel(self, tag: str) -> None:
        """End every process of an attempt that does not end by itself, or whose worker died and left its trainer."""
        signal_tagged(JOB_TAG, tag, signal.SIGKILL)
