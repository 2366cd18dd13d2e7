"""The ports of a sweep: what it needs of the scheduler, of the search and of the views. Fakes stand here in tests."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.ledger import StudyState, Trial
from orchestrator.slots import JobResources
from trainer.config import Config
from trainer.protocol import AttemptDir, RunDir

Packer = Callable[[Config | None], bytes]
"""Gives the bundle for runs of a configuration, or for any run; asked for every run, so what it made it keeps."""


@dataclass(frozen=True, kw_only=True)
class OpenJob:
    """An attempt that has not been seen to end, as its scheduler knows it."""

    tag: str
    job_id: str
    """Empty where it is not known whether the scheduler has it."""

    files: AttemptDir


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What a scheduler says of the end of an attempt that left no result."""

    kind: str
    """Of failure, as in trainer.protocol."""

    message: str


class Unanswered(Exception):
    """The scheduler gave no answer: whether it has the job will show later. Its text is for people."""


class Launcher(Protocol):
    """Puts attempts on a scheduler."""

    has_queue: bool
    """Whether a job may wait before it begins, so that its time counts from its beginning."""

    def look(self, jobs: Collection[OpenJob]) -> list[str]:
        """Take up what the scheduler says, without waiting for it; once a turn. Returns what people should know.

        `jobs` are all that the study has open: what else there is under the study's names is ended.
        """

    def submit(self, run: RunDir, attempt: int, *, tag: str, resources: JobResources) -> str:
        """Start an attempt under a name and return the job's id.

        Raises Unanswered where it may or may not have been started, ConfigError where the scheduler refuses what is
        asked for, MachineError, StorageError.
        """

    def is_alive(self, attempt: AttemptDir, *, tag: str | None) -> bool:
        """Whether any process of the attempt runs; without a tag, whether its worker or its trainer does."""

    def find(self, attempt: AttemptDir, *, tag: str) -> str | None:
        """The id of the job of that name, which its submitter may have left without its task; None where there is none.

        Raises Unanswered where that cannot be said now.
        """

    def ending(self, attempt: AttemptDir, *, tag: str) -> Ending | None:
        """Why an attempt that is gone has left no result, as far as the scheduler knows."""

    def nodes_of(self, attempt: AttemptDir, *, tag: str) -> tuple[str, ...]:
        """Where an attempt ran, by the scheduler's names; of one that its node failed, only what failed."""

    def cancel(self, tag: str) -> None:
        """End whatever is left of the job of that name."""


class Search(Protocol):
    """Says which point comes next and which trial is not worth finishing."""

    def rebuild(self, state: StudyState) -> None:
        """Learn what the ledger says."""

    def ask(self, number: int) -> dict[str, Any]:
        """The point of a new trial."""

    def begin(self, trial: Trial) -> None:
        """Note a trial that the ledger holds by now."""

    def should_stop(self, number: int, per_mille: int, loss: float) -> bool:
        """Whether a running trial with that training loss at that part of its schedule is not worth finishing."""

    def tell(self, trial: Trial) -> None:
        """Note how a trial ended."""


class Progress(Protocol):
    """Shows people how a study stands."""

    def show(self, state: StudyState) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Mirror(Protocol):
    """Copies a study to where it is looked at; must not hold the loop up."""

    def nudge(self) -> None: ...

    def close(self, timeout: float = ...) -> None:
        """Copy a last time and end, within so many seconds."""
