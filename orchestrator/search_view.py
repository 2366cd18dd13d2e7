"""The search's view in Optuna's storage, for optuna-dashboard: a journal in the home, or a database by its address.

It is made from the ledger's trials and kept in step with them; nothing is decided from it, and no study stops for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.pool import NullPool

from orchestrator.errors import ConfigError
from trainer.protocol import storage_error

VARIABLE = "CADDIE_OPTUNA_URL"
"""Names a database in place of the journals: postgresql+psycopg://USER@HOST/NAME, with the password in PGPASSWORD or
~/.pgpass, or sqlite:////PATH. In the environment, because a study's file is copied into its ledger."""

SCHEMES = ("postgresql", "sqlite")
OWNER = "caddie_home"  # attribute of a study in a shared database: whose it is
NUMBER, REASON = "caddie_trial", "caddie_reason"  # attributes of a trial: its number in the ledger, why it has no value
CONNECT_SECONDS = 5
RETRY_SECONDS = 60.0  # after a failure: a server that is away must not hold every trial up


def address() -> str:
    """The database's address; empty where the studies' own journals are used.

    Raises ConfigError for what is no address, or holds a password, which would then stand in messages and logs.
    """
    given = os.environ.get(VARIABLE, "")
    if not given:
        return ""
    parts = urlsplit(given)
    if parts.scheme.partition("+")[0] not in SCHEMES:
        raise ConfigError(
            f"{VARIABLE} must begin with {' or '.join(f'{scheme}://' for scheme in SCHEMES)}, got {(parts.scheme or given)!r}",
            hint=f"leave {VARIABLE} out to use the studies' own journals",
        )
    if parts.password:
        raise ConfigError(f"{VARIABLE} must not hold a password", hint="put it into PGPASSWORD, or into ~/.pgpass")
    return given


class View:
    """One study as Optuna shows it."""

    def __init__(self, journal: Path, *, name: str, directions: Sequence[StudyDirection], url: str = "") -> None:
        self.journal = journal
        self.name = name
        self.directions = list(directions)
        self.url = url
        self.problem: str | None = None
        """Why it does not show all; None where it does. The next trial, or the next start, makes it whole."""

        self.note: Callable[[str], None] = lambda text: None
        """Told of each new problem."""

        self._study: optuna.Study | None = None
        self._not_before = 0.0

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return self.url or str(self.journal)

    def rebuild(self, trials: Callable[[], list[FrozenTrial]]) -> None:
        """Bring it into line with these trials at a controller's start. Raises StorageError for a journal.

        A journal is made anew: a killed controller's lock would block for ever. A database may be away, and is then
        tried again.
        """
        if not self.url:
            try:
                self.journal.parent.mkdir(parents=True, exist_ok=True)
                for leftover in self.journal.parent.glob(f"{self.journal.name}*"):
                    leftover.unlink()
            except OSError as error:
                raise storage_error(error, self.journal) from error
            self._make(trials())
            return
        self._study, self._not_before = None, 0.0
        self.show(lambda study: None, trials)

    def show(self, change: Callable[[optuna.Study], None], trials: Callable[[], list[FrozenTrial]]) -> None:
        """Bring it up to date by a change, or by all trials where it was lost or damaged under way."""
        if time.monotonic() < self._not_before:
            return
        try:
            if self._study is not None and (self.url or self.journal.exists()):
                change(self._study)
            else:
                self._make(trials())
        except Exception as error:  # whatever a view raises: the ledger has it
            self._tell(f"{self.place}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            self._study = None
            if self.url:
                self._not_before = time.monotonic() + RETRY_SECONDS
            with contextlib.suppress(OSError):
                self.journal.unlink(missing_ok=True)

    def _tell(self, problem: str) -> None:
        if problem != self.problem:
            self.note(f"Optuna's view does not show all of it: {problem}")
        self.problem = problem

    def _make(self, trials: list[FrozenTrial]) -> None:
        study = self._open_shared() if self.url else self._open(self.name, _journal(self.journal))
        if not _is_beginning(study.trials, trials):
            optuna.delete_study(study_name=study.study_name, storage=study._storage)
            study = self._open(study.study_name, study._storage)
        if self.url:
            study.set_user_attr(OWNER, self._owner)
        _bring_up(study, trials)
        self._study, self.problem = study, None

    @property
    def _owner(self) -> str:
        return str(self.journal.parent.resolve())

    def _open(self, name: str, storage: BaseStorage) -> optuna.Study:
        return optuna.create_study(study_name=name, storage=storage, directions=self.directions, load_if_exists=True)

    def _open_shared(self) -> optuna.Study:
        """This home's study in a database that may serve several; another's of the same name is left as it is."""
        storage, suffix = database(self.url), hashlib.sha256(self._owner.encode()).hexdigest()[:6]
        study = self._open(self.name, storage)
        if study.user_attrs.get(OWNER, self._owner) == self._owner and study.directions == self.directions:
            return study
        return self._open(f"{self.name}-{suffix}", storage)


def _journal(path: Path) -> BaseStorage:
    return JournalStorage(JournalFileBackend(str(path), lock_obj=OnlyWriter(str(path))))


def database(url: str) -> BaseStorage:
    """Optuna's storage in a database. Connections end with each question: between trials lie minutes."""
    options: dict[str, Any] = {"poolclass": NullPool}
    if url.startswith("postgresql"):
        options["connect_args"] = {"connect_timeout": CONNECT_SECONDS}
    return RDBStorage(url, engine_kwargs=options)


def _is_beginning(shown: Sequence[FrozenTrial], trials: Sequence[FrozenTrial]) -> bool:
    """Whether what is shown is a beginning of what should be, but for trials that have ended since."""
    known = [(trial.params, trial.user_attrs.get(NUMBER)) for trial in shown]
    return known == [(trial.params, trial.user_attrs.get(NUMBER)) for trial in trials[: len(known)]] and all(
        old.state in (TrialState.RUNNING, new.state) for old, new in zip(shown, trials, strict=False)
    )


def _bring_up(study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    """Show what is not shown yet: a database takes a while to write thousands of trials."""
    shown = study.trials
    for number, (old, new) in enumerate(zip(shown, trials, strict=False)):
        if old.state is not new.state:
            end(study, number, new)
    study.add_trials(trials[len(shown) :])


def end(study: optuna.Study, number: int, trial: FrozenTrial) -> None:
    """Note how a trial ended that is shown as running."""
    # A trial that was added, not asked, is reached by its storage id; Optuna 5 has no public way to it.
    view = optuna.trial.Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)
    for step, loss in sorted(trial.intermediate_values.items()):
        view.report(loss, step)
    for name, value in trial.user_attrs.items():
        view.set_user_attr(name, value)
    for name, excess in trial.constraints.items():
        view.set_constraint(name, excess)  # nothing can be attached once the trial is told
    values = list(trial.values) if trial.state is TrialState.COMPLETE else None
    study.tell(number, values=values, state=trial.state)


class OnlyWriter(JournalFileOpenLock):
    """The journal's lock: none, because only the holder of the study's lock writes. A file that somebody left would hold
    the study up for half a minute at each trial.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return
