"""Slurm's commands and their answers: asked without waiting where the controller's loop asks, read strictly.

Variables that would change an answer's form, or make a command think that it runs inside a job, are kept from them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from orchestrator.errors import MachineError
from orchestrator.slurm_states import Meaning, meaning_of

ANSWER_SECONDS = 60.0  # after which a command counts as unanswered; Slurm's own time-outs are shorter
WAIT_SECONDS = 0.02
_UNUSABLE = re.compile(r"(?:down|drain|fail|unk|power|inval)|.*\*")
CLIENTS = ("sbatch", "squeue", "scancel", "srun")

CONNECTION = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS"})
"""Of the variables that Slurm's commands read, those that say where Slurm is."""

READ_BY_COMMANDS = ("SLURM_", "SLURMD_", "SRUN_", "SQUEUE_", "SACCT_", "SCANCEL_", "SUBMITIT_", "PMI")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as Slurm tells of it."""

    job_id: str
    name: str
    state: str
    reason: str = ""
    nodes: str = ""
    """As Slurm writes a list of nodes; empty where it has none yet."""

    @property
    def meaning(self) -> Meaning:
        return meaning_of(self.state)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command wrote, and how it ended."""

    output: str
    errors: str
    returncode: int

    @property
    def is_given(self) -> bool:
        return self.returncode == 0


class Question:
    """A command under way; its answer is taken up when it is there."""

    def __init__(self, command: Sequence[str]) -> None:
        self.asked = time.monotonic()
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 closed with the answer
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._errors, env=environment(),
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._process = None
            self._errors.write(str(error).encode())

    def __del__(self) -> None:
        """Leave no command behind when the controller leaves."""
        process = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        for file in (self._output, self._errors):
            file.close()

    def answer(self) -> Answer | None:
        """The answer, once; None while there is none. A command that takes too long is ended."""
        if self._process is not None and self._process.poll() is None:
            if time.monotonic() - self.asked < ANSWER_SECONDS:
                return None
            self._process.kill()
            self._process.wait()
        returncode = self._process.returncode if self._process is not None else -1
        return Answer(output=_text(self._output), errors=_text(self._errors).strip(), returncode=returncode)


def _text(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode(errors="replace")


def wait_for(question: Question) -> Answer:
    """The answer to a question that is worth waiting for."""
    while (answer := question.answer()) is None:
        time.sleep(WAIT_SECONDS)
    return answer


Ask = Callable[[Sequence[str]], Question]


def environment() -> dict[str, str]:
    """This process's environment as Slurm's commands may see it."""
    return {name: value for name, value in os.environ.items() if not is_leaked(name)}


def is_leaked(name: str) -> bool:
    """Whether a variable would change what Slurm's commands do or show."""
    return name.startswith(READ_BY_COMMANDS) and name not in CONNECTION


def squeue_command() -> list[str]:
    """All jobs of this user, those that ended lately too: squeue knows them for some minutes, without accounting."""
    return ["squeue", f"--user={os.getuid()}", "--noheader", "--states=all", "--format=%A|%j|%T|%r|%N"]


def read_squeue(output: str) -> list[Job]:
    """The jobs of an answer; a name may hold the separator, nothing else does."""
    jobs = []
    for line in output.splitlines():
        job_id, bar, rest = line.strip().partition("|")
        fields = rest.rsplit("|", 3)
        if bar and len(fields) == 4:
            name, state, reason, nodes = fields
            jobs.append(Job(job_id=job_id, name=name, state=state, reason=reason, nodes=nodes))
    return jobs


def sacct_command(job_ids: Iterable[str]) -> list[str]:
    """What accounting knows of these jobs."""
    return [
        "sacct", "--allocations", "--noheader", "--parsable2", "--format=JobIDRaw,JobName,State,NodeList",
        f"--jobs={','.join(sorted(job_ids))}",
    ]  # fmt: skip


def read_sacct(output: str) -> list[Job]:
    """The jobs of an answer."""
    jobs = []
    for line in output.splitlines():
        job_id, bar, rest = line.strip().partition("|")
        fields = rest.rsplit("|", 2)
        if bar and len(fields) == 3:
            name, state, nodes = fields
            jobs.append(Job(job_id=job_id, name=name, state=state, nodes="" if nodes == "None assigned" else nodes))
    return jobs


def sinfo_command(nodes: Collection[str]) -> list[str]:
    """The state of these nodes."""
    return ["sinfo", "--Node", "--noheader", f"--nodes={','.join(sorted(nodes))}", "--format=%N|%T"]


def read_down_nodes(output: str) -> tuple[str, ...]:
    """The nodes of an answer that Slurm does not use, or that do not answer it."""
    states = dict(line.strip().split("|", 1) for line in output.splitlines() if "|" in line)
    return tuple(sorted(name for name, state in states.items() if _UNUSABLE.match(state)))


def scancel_name_command(name: str) -> list[str]:
    return ["scancel", f"--user={os.getuid()}", f"--name={name}"]


def scancel_command(job: Job) -> list[str]:
    """The name too: a slurmctld that has forgotten a job may have given its id to another."""
    return ["scancel", f"--name={job.name}", job.job_id]


def require_clients() -> None:
    """Raise MachineError where this machine cannot submit to a cluster."""
    missing = [program for program in CLIENTS if shutil.which(program) is None]
    if missing:
        raise MachineError(
            f"[resources] launcher is slurm, and this machine has no {', '.join(missing)}",
            hint='run caddie on a node from which jobs are submitted, or take launcher = "local"',
        )


def by_name(jobs: Iterable[Job]) -> Mapping[str, list[Job]]:
    """Jobs by their name, in the order of their ids."""
    found: dict[str, list[Job]] = {}
    for job in sorted(jobs, key=lambda job: int(job.job_id) if job.job_id.isdecimal() else 0):
        found.setdefault(job.name, []).append(job)
    return found
