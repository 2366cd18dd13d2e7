"""The ports of a sweep: what it needs of the scheduler, of the search and of the views. Fakes stand here in tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from orchestrator.ledger import StudyState, Trial
from orchestrator.slots import JobResources
from trainer.config import Config
from trainer.protocol import AttemptDir, RunDir

Packer = Callable[[Config | None], bytes]
"""Gives the bundle for runs of a configuration, or for any run; asked for every run, so what it made it keeps."""


class Launcher(Protocol):
    """Puts attempts on a scheduler."""

    def submit(self, run: RunDir, attempt: int, *, tag: str, resources: JobResources) -> str:
        """Start an attempt under a name and return the job's id."""

    def is_alive(self, attempt: AttemptDir, *, tag: str | None) -> bool:
        """Whether any process of the attempt runs; without a tag, whether its worker or its trainer does."""

    def find(self, attempt: AttemptDir, *, tag: str) -> str | None:
        """The id of the live job of that name; a job that its submitter left without a task is ended, and not found."""

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

    def close(self) -> None: ...
