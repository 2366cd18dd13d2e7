"""The controller as a small job of the cluster, for studies that outlive every login session.

The first thing that a controller job does, before its program is loaded, is to queue its successor, to start once it has
ended: whether its time is up, its node dies or it is killed, another goes on from the ledger. A controller that brings
the study to its end, or finds that a person is needed, takes its successor out of the queue; where several in a row
never came to begin, as where the environment is broken, no further one is queued.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from orchestrator import detach
from orchestrator.errors import Interrupted, MachineError
from orchestrator.home import Home, StudyDir
from orchestrator.study import Resources, Study
from trainer.protocol import write_bytes_atomically

NOTICE_SECONDS = 120  # before its time is up a controller is told to leave
PATIENCE_SECONDS = 240.0  # for a predecessor on another node, whose death shows by its silence only
ANSWER_SECONDS = 30  # for the scheduler's commands
QUEUE_SECONDS = 0.5  # after which the scheduler shows a job that was submitted
MOST_STILLBORN = 3  # controllers in a row that end before their program begins

SUCCESSOR = "CADDIE_SUCCESSOR"
"""Environment variable with the id of the successor that the job's script has queued."""

QUEUE_SUCCESSOR = """\
echo "$SLURM_JOB_ID" >>{births}
if [ "$(wc -l <{births})" -le {most} ]; then
    inherited=$(compgen -v SLURM_ | grep -vx SLURM_CONF | sed 's/^/--unset=/')
    queued=$(env $inherited timeout {seconds} sbatch --parsable "--dependency=afterany:$SLURM_JOB_ID" {script}) &&
        export {variable}="${{queued%%;*}}"
fi"""
"""Part of the job's script. What would make the successor this job's is not handed on."""


def job_name(home: Home, study: str) -> str:
    """Name of a study's controller jobs; another CADDIE_HOME may hold a study of the same name."""
    digest = hashlib.sha256(str(home.root.resolve()).encode()).hexdigest()[:8]
    return f"caddie-controller.{study}.{digest}"


def submit(home: Home, study: str, arguments: Sequence[str], options: Sequence[str]) -> str:
    """Queue a command as a study's controller, with further options of sbatch; the job's id.

    Raises MachineError with sbatch's own words, StorageError.
    """
    files = home.study(study)
    _forget_births(files)
    write_bytes_atomically(files.job_script, _script(home, study, files, arguments, options).encode())
    return _queue(files)


def jobs_of(home: Home, study: str, *, states: str = "PENDING,RUNNING") -> list[str]:
    """Ids of the study's controller jobs in these states; none where there is no answer."""
    if not home.study(study).job_script.exists():
        return []
    try:
        told = _ask(
            "squeue", "--noheader", "--format=%i", f"--name={job_name(home, study)}", "--me", f"--states={states}"
        )
    except MachineError:
        return []
    return told.split()


def cancel_idle(home: Home, study: str, *, is_worked_on: bool) -> list[str]:
    """Take the study's controller jobs that wait out of the queue, and where none of them works on it, those that are just
    starting; their ids. A job that is ended as it starts may have queued its successor meanwhile, which goes as well.
    """
    taken: list[str] = []
    states = "PENDING" if is_worked_on else "PENDING,RUNNING"
    while idle := [job for job in jobs_of(home, study, states=states) if job not in taken]:
        _cancel(idle)
        taken += idle
        time.sleep(QUEUE_SECONDS)
    return taken


def _cancel(jobs: Sequence[str]) -> None:
    """Take jobs out of the queue, those that are still there."""
    if jobs:
        with contextlib.suppress(MachineError):
            _ask("scancel", *jobs)


@contextmanager
def succeeded(study: StudyDir, job_id: str) -> Iterator[None]:
    """Within the block, this controller job has a successor, which stays where the controller only has to leave.

    Where the job's script could not queue it, the scheduler is asked here, and once more when the time is up.
    """
    after, queued = f"--dependency=afterany:{job_id}", os.environ.pop(SUCCESSOR, "")
    successor = [queued] if queued else _queued_or_told(study, after)
    _forget_births(study)
    try:
        yield
    except Interrupted:
        if not successor:
            _queued_or_told(study, after)
        raise
    except Exception:  # somebody has to look at it
        _cancel(successor)
        raise
    else:
        _cancel(successor)


def _forget_births(study: StudyDir) -> None:
    """Count anew the controllers that never began."""
    with contextlib.suppress(OSError):
        study.job_births.unlink(missing_ok=True)


def _queued_or_told(study: StudyDir, *options: str) -> list[str]:
    """The successor that was queued; none, and why on stderr, where the scheduler took none."""
    try:
        return [_queue(study, *options)]
    except MachineError as error:
        sys.stderr.write(f"this controller has no successor: {error}\n")
        return []


# ---------------------------------------------------------------------------------------------------- a study in one job


def allocation_of(study: Study) -> list[str]:
    """Options of sbatch for a controller whose runs follow one another within its own job, on one node."""
    resources, texts = study.resources, ("partition", "account", "qos", "constraint", "comment")
    options = [f"--{name}={getattr(resources, name)}" for name in texts if getattr(resources, name)]
    seeds = len(study.confirm.seeds) if study.confirm else 1
    minutes = math.ceil(2 * seeds * study.timeout_minutes + NOTICE_SECONDS / 60)
    options += ["--nodes=1", f"--time={minutes}"]
    if resources.gpus_of_run:
        options.append(f"--gpus-per-node={resources.gpus_of_run}")
    if resources.exclusive:
        options.append("--exclusive")
    return options + [f"--{name}" if value is True else f"--{name}={value}" for name, value in resources.sbatch.items()]


def within_allocation(study: Study) -> Study:
    """The study as its controller runs it within that job: on the node that it has."""
    resources = Resources(
        slots=1, gpus_per_run=study.resources.gpus_of_run, processes_per_run=study.resources.processes_per_run,
        timeout_minutes=study.timeout_minutes, max_attempts=study.resources.max_attempts,
        preflight=study.resources.preflight, gpu_model=study.resources.gpu_model,
        gpu_memory_gib=study.resources.gpu_memory_gib,
    )  # fmt: skip
    return dataclasses.replace(study, resources=resources)


# ---------------------------------------------------------------------------------------------------- the scheduler


def _script(home: Home, study: str, files: StudyDir, arguments: Sequence[str], options: Sequence[str]) -> str:
    environment = detach.environment(detach.JOB)
    directives = [
        f"--job-name={job_name(home, study)}", f"--output={files.log}", "--open-mode=append", "--ntasks=1", "--no-requeue",
        f"--signal=B:TERM@{NOTICE_SECONDS}", f"--chdir={Path.cwd()}", *options,
    ]  # fmt: skip
    exports = [f"export {name}={shlex.quote(environment[name])}" for name in (detach.ROLE, "PYTHONPATH")]
    queue_successor = QUEUE_SUCCESSOR.format(
        births=shlex.quote(str(files.job_births)), script=shlex.quote(str(files.job_script)), most=MOST_STILLBORN,
        seconds=ANSWER_SECONDS, variable=SUCCESSOR,
    )  # fmt: skip
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in directives), *exports, queue_successor]
    return "\n".join([*lines, f"exec {shlex.join(detach.command_of(arguments))}", ""])


def _queue(study: StudyDir, *options: str) -> str:
    return _ask("sbatch", "--parsable", *options, str(study.job_script)).strip().partition(";")[0]


def _ask(program: str, *arguments: str) -> str:
    """What a command of the scheduler answers; within a job, without what would make it this job's. Raises MachineError."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False, env=kept
        )
    except FileNotFoundError as error:
        raise MachineError(
            f"{program}: there is no such program here",
            hint="a controller can be a job only where Slurm is; --detach runs it here",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise MachineError(
            f"{program}: no answer within {ANSWER_SECONDS:g} s",
            hint="try again once the scheduler answers: scontrol ping",
        ) from error
    if done.returncode:
        raise MachineError(
            f"{program}: {done.stderr.strip() or f'ended with {done.returncode}'}",
            hint="mend what it names: --job-options",
        )
    return done.stdout
