"""What Slurm says of a study's jobs: one squeue for all of them, one sacct for those that squeue has forgotten.

Nothing waits for an answer. Answers may be late or contradict each other; what was asked before a job was known says
nothing of it, and a job is gone only when two things hold: it ran out, or was missing, in an answer, and no later one
shows it alive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from orchestrator import slurm
from orchestrator.slurm import Answer, Ask, Job, Question
from orchestrator.slurm_states import ENDED

ASK_SECONDS = 2.0  # between two squeues
HISTORY_SECONDS = 5.0  # between two saccts
HISTORY_LAG_SECONDS = 15.0  # for which accounting is asked about the end of a job that squeue does not know


class JobTable:
    """The latest answers, and since when each job is gone."""

    def __init__(self, ask: Ask = Question, clock: Callable[[], float] = time.monotonic) -> None:
        self.ask = ask
        self.clock = clock
        self.problem = ""
        """What squeue says instead of an answer; empty while it answers."""

        self.silent_since: float | None = None
        """Since when it has not answered."""

        self.asked = -float("inf")
        """When the latest answer was asked for."""

        self._jobs: Mapping[str, list[Job]] = {}
        self._past: dict[tuple[str, str], Job] = {}
        """By name and id, what accounting says of jobs that squeue has forgotten; a slurmctld that was killed before it
        had saved its state gives the last ids again.
        """

        self._gone_since: dict[str, float] = {}
        """By name, when the first of the answers was asked for that all show a job as gone."""

        self._known_since: dict[str, float] = {}
        self._queue: Question | None = None
        self._history: Question | None = None
        self._next_queue = self._next_history = -float("inf")

    def refresh(self, names: Mapping[str, str]) -> None:
        """Take up what has been answered and ask again where it is time. `names` are the jobs of interest, with ids."""
        now = self.clock()
        for name in names:
            self._known_since.setdefault(name, now)
        for forgotten in set(self._known_since) - set(names):
            self._gone_since.pop(forgotten, None)
            del self._known_since[forgotten]
        self._take_up_queue()
        self._take_up_history()
        if self._queue is None and now >= self._next_queue:
            self._queue, self._next_queue = self.ask(slurm.squeue_command()), now + ASK_SECONDS
        unexplained = {
            job_id
            for name, job_id in names.items()
            if job_id and name in self._gone_since and self.last(name, job_id) is None
        }
        if unexplained and self._history is None and now >= self._next_history:
            self._history, self._next_history = self.ask(slurm.sacct_command(unexplained)), now + HISTORY_SECONDS

    def _take_up_queue(self) -> None:
        answer = self._queue.answer() if self._queue is not None else None
        if self._queue is None or answer is None:
            return
        asked, self._queue = self._queue.asked, None
        if not answer.is_given:
            self.problem = answer.errors or f"squeue ended with {answer.returncode}"
            self.silent_since = self.silent_since if self.silent_since is not None else asked
            return
        self.problem, self.silent_since, self.asked = "", None, asked
        self._jobs = slurm.by_name(slurm.read_squeue(answer.output))
        for name, known in self._known_since.items():
            if self.live(name):
                self._gone_since.pop(name, None)
            elif asked >= known:
                self._gone_since.setdefault(name, asked)

    def _take_up_history(self) -> None:
        answer: Answer | None = self._history.answer() if self._history is not None else None
        if answer is None:
            return
        self._history = None
        if answer.is_given:
            ended = [job for job in slurm.read_sacct(answer.output) if job.meaning.standing == ENDED]
            self._past |= {(job.name, job.job_id): job for job in ended}

    def all_live(self) -> list[Job]:
        """Every job of this user that waits or runs."""
        return [job for jobs in self._jobs.values() for job in jobs if job.meaning.standing != ENDED]

    def live(self, name: str) -> list[Job]:
        """The jobs of that name that wait or run."""
        return [job for job in self._jobs.get(name, []) if job.meaning.standing != ENDED]

    def last(self, name: str, job_id: str) -> Job | None:
        """How the job of that name stands, or ended; None where neither squeue nor accounting says."""
        known = [job for job in self._jobs.get(name, []) if job_id in ("", job.job_id)]
        return known[-1] if known else self._past.get((name, job_id))

    def gone_seconds(self, name: str) -> float | None:
        """For how long all answers say that no job of that name waits or runs; None while one does, or nobody knows."""
        since = self._gone_since.get(name)
        return None if since is None else self.clock() - since

    def is_explained(self, name: str, job_id: str) -> bool:
        """Whether a gone job's end is known, or accounting had the time to tell."""
        gone = self.gone_seconds(name)
        return gone is not None and (not job_id or self.last(name, job_id) is not None or gone > HISTORY_LAG_SECONDS)
