"""The MLflow store of a home: how things are found and written in it. The only module that imports MLflow.

Everything is written through MlflowClient with absolute URIs, in batches, under one lock of the home. Written twice it
stays the same: MLflow ignores a metric point, and a parameter, that it already has with that value.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before the import: telemetry is on unless this says otherwise, and a pooled connection would go on writing to a
# database that a rebuild has moved away.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
# A server that is away is asked again with the next pass; with MLflow's own patience one call would take four minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # which is for what a command found

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType

from orchestrator import tracking_server
from orchestrator.errors import CaddieError, ConfigError, StorageError
from orchestrator.home import Home
from orchestrator.mlflow_entries import ATTEMPT, KEY, MIRRORED, Point, experiment_tags, milliseconds, param_text
from orchestrator.study import Study
from trainer.protocol import storage_error

MOST_METRICS, MOST_PARAMS = 1000, 100
"""Of one log_batch; more is refused by MLflow."""

MOST_METRICS_WITH_TAGS = 900
"""Metrics beside tags: all together are at most 1,000, and tags at most 100."""

MOST_PARAM_CHARACTERS = 6000
"""MLflow cuts a longer value with only a line in its log."""

PARTIAL = ".partial"
"""End of the name of a database that is still being made."""

ENDED = frozenset({"FINISHED", "FAILED", "KILLED"})
HOME = "caddie.home"
"""Tag of an experiment on a server: the home whose study it shows."""


for _noisy in ("mlflow", "alembic"):  # both tell of every table that they make
    logging.getLogger(_noisy).setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback of what it then raises


@dataclass
class MlflowRun:
    """What is known of one MLflow run."""

    mlflow_id: str
    status: str
    attempt: int = 0
    offset: int = 0
    """Byte of the event file up to which this process has mirrored."""

    started: float = 0.0
    """Unix time of the start event."""

    is_whole: bool = False
    """Nothing will come any more."""

    tags: dict[str, str] = field(default_factory=dict)


def _client(database: Path) -> MlflowClient:
    return _client_at(f"sqlite:///{database}")


def _client_at(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_database(database: Path) -> None:
    """Make an empty database whole or not at all: MLflow never finishes a schema in whose making it was killed."""
    for left in database.parent.glob(f".{database.name}.*{PARTIAL}*"):
        left.unlink()
    partial = database.with_name(f".{database.name}.{os.getpid()}{PARTIAL}")
    _client(partial).search_experiments(max_results=1)
    os.replace(partial, database)


class MlflowStore:
    """One database, or a server's, with its artifacts, and what this process has learnt of the runs in it."""

    def __init__(self, home: Home, database: Path | None = None) -> None:
        self.home = home
        self.database = database or home.mlflow_database
        self.server = "" if database else tracking_server.address()
        """Address of the server that is used in place of the database; empty where there is none."""

        self._experiments: dict[str, str] = {}
        self._known: dict[tuple[str, str], MlflowRun] = {}
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """The client; the first use makes the database, so the caller must hold the lock."""
        if self._client is None:
            if not self.server and not self.database.exists():
                _make_database(self.database)
            self._client = _client_at(self.server) if self.server else _client(self.database)
        return self._client

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the home's MLflow lock; whatever MLflow raises meanwhile becomes a StorageError that names the remedy."""
        with _locked(self.home), _named_failures(self.server or str(self.database), _remedy(self.server)):
            yield

    def prepare(self) -> None:
        """Make the database where there is none."""
        self.client.search_experiments(max_results=1)

    @property
    def mlflow_ids(self) -> set[str]:
        """Every MLflow run that is known."""
        return {run.mlflow_id for run in self._known.values()}

    def run_of(self, experiment_id: str, key: str) -> MlflowRun | None:
        """The MLflow run of a key, also one that an earlier process made."""
        if (experiment_id, key) not in self._known:
            found = self.client.search_runs(
                [experiment_id], f"tags.`{KEY}` = '{key}'", ViewType.ACTIVE_ONLY, max_results=1
            )
            if found:
                self._remember(experiment_id, found[0])
        return self._known.get((experiment_id, key))

    def _load(self, experiment_id: str) -> None:
        """Learn every run that an earlier process made, by pages."""
        token = None
        while True:
            page = self.client.search_runs(
                [experiment_id], "", ViewType.ACTIVE_ONLY, max_results=1000, page_token=token
            )
            for run in page:
                self._remember(experiment_id, run)
            token = page.token
            if not token:
                return

    def _remember(self, experiment_id: str, run: Run) -> None:
        tags = run.data.tags
        if KEY in tags:
            self._known[experiment_id, tags[KEY]] = MlflowRun(
                mlflow_id=run.info.run_id, status=run.info.status, attempt=int(tags.get(ATTEMPT, 0)),
                is_whole=MIRRORED in tags and run.info.status in ENDED, tags=dict(tags),
            )  # fmt: skip

    def create(
        self, experiment_id: str, key: str, *, name: str, started: float, tags: Mapping[str, str], attempt: int = 0
    ) -> MlflowRun:
        """A new MLflow run; the caller has looked that there is none."""
        tags = {**tags, KEY: key, ATTEMPT: str(attempt)} if attempt else {**tags, KEY: key}
        run = self.client.create_run(experiment_id, start_time=milliseconds(started), tags=dict(tags), run_name=name)
        mirrored = MlflowRun(
            mlflow_id=run.info.run_id, status="RUNNING", attempt=attempt, started=started, tags=dict(tags)
        )
        self._known[experiment_id, key] = mirrored
        return mirrored

    def drop(self, experiment_id: str, key: str) -> None:
        """Put a run away whose curve a newer attempt replaces."""
        old = self._known.pop((experiment_id, key))
        self.client.delete_run(old.mlflow_id)

    def finish(self, mirrored: MlflowRun, status: str, ended: float) -> None:
        """Give a run its final status."""
        if mirrored.status != status:
            self.client.set_terminated(mirrored.mlflow_id, status, milliseconds(ended))
            mirrored.status = status

    def set_tags(self, mirrored: MlflowRun, tags: Mapping[str, str]) -> None:
        """Set the tags that have changed."""
        self.log_metrics(mirrored, (), tags)

    def log_params(self, mirrored: MlflowRun, params: Mapping[str, Any]) -> None:
        """Log parameters in batches; one that MLflow would cut is left out, its whole value is in the spec's artifact."""
        texts = {key: param_text(value) for key, value in params.items()}
        found = [Param(key, text) for key, text in texts.items() if len(text) <= MOST_PARAM_CHARACTERS]
        for start in range(0, len(found), MOST_PARAMS):
            self.client.log_batch(mirrored.mlflow_id, params=found[start : start + MOST_PARAMS])

    def log_metrics(self, mirrored: MlflowRun, points: Iterable[Point], tags: Mapping[str, str] | None = None) -> None:
        """Log metric points in batches, those that MLflow has already change nothing; tags that have changed go with them."""
        found = [Metric(*point) for point in points]
        changed = {key: value for key, value in (tags or {}).items() if mirrored.tags.get(key) != value}
        last = max(len(found) - MOST_METRICS_WITH_TAGS, 0) if changed else len(found)
        for start in range(0, last, MOST_METRICS):
            self.client.log_batch(mirrored.mlflow_id, metrics=found[start : min(start + MOST_METRICS, last)])
        if changed:
            run_tags = [RunTag(key, value) for key, value in changed.items()]
            self.client.log_batch(mirrored.mlflow_id, metrics=found[last:], tags=run_tags)
            mirrored.tags.update(changed)

    def log_file(self, mirrored: MlflowRun, path: Path, folder: str | None = None) -> None:
        """Copy a file into a run's artifacts, over an older copy; one that does not exist is left out."""
        if path.is_file():
            self.client.log_artifact(mirrored.mlflow_id, str(path), folder)

    def experiment(self, study: Study) -> str:
        """The study's experiment, made or restored where necessary, with its description and its view.

        Raises ConfigError where another home has one of that name on the same server.
        """
        if not self.server:
            return self.named_experiment(study.name, experiment_tags(study))
        if study.name not in self._experiments:
            self._require_own(study.name)
        return self.named_experiment(study.name, {**experiment_tags(study), HOME: str(self.home.root)})

    def _require_own(self, name: str) -> None:
        found = self.client.get_experiment_by_name(name)
        owner = str(self.home.root) if found is None else found.tags.get(HOME, "")
        if owner != str(self.home.root):
            raise ConfigError(
                f"{self.server}: the experiment {name!r} is not this home's but that of {owner or 'somebody else'}",
                hint="give the study another name; where the home was moved, caddie track --rebuild takes it over",
            )

    def put_away(self, name: str) -> None:
        """Delete the runs of an experiment on the server, to be made again by this home; there may be none."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            return
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        self._load(found.experiment_id)
        for mirrored in self._known.values():
            self.client.delete_run(mirrored.mlflow_id)
        self._known.clear()
        self.client.set_experiment_tag(found.experiment_id, HOME, str(self.home.root))

    def named_experiment(self, name: str, tags: Mapping[str, str]) -> str:
        """An experiment by its name, made or restored where necessary, with its tags set; learns the runs in it."""
        if name not in self._experiments:
            found = self.client.get_experiment_by_name(name)
            if found is None:
                own = None if self.server else (self.home.mlflow_artifacts / name).resolve().as_uri()
                experiment_id = self.client.create_experiment(name, artifact_location=own)
            else:
                experiment_id = found.experiment_id
                if found.lifecycle_stage == "deleted":
                    self.client.restore_experiment(experiment_id)
            for key, value in tags.items():
                self.client.set_experiment_tag(experiment_id, key, value)
            self._load(experiment_id)
            self._experiments[name] = experiment_id
        return self._experiments[name]


@contextmanager
def _locked(home: Home) -> Iterator[None]:
    """Hold the home's MLflow lock: two writers would make every run twice, and a parallel start destroys the database."""
    try:
        home.root.mkdir(parents=True, exist_ok=True)
        file = home.mlflow_lock.open("w")
    except OSError as error:
        raise storage_error(error, home.mlflow_lock) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remedy(server: str) -> str:
    if server:
        return f"does it answer, and let you in ({tracking_server.SIGN_IN})? `caddie track` then completes it"
    return "caddie track --rebuild makes it again from the run directories"


@contextmanager
def _named_failures(place: str, remedy: str) -> Iterator[None]:
    """Whatever MLflow and its database raise, as one StorageError that names the remedy."""
    try:
        yield
    except CaddieError:
        raise
    except Exception as error:  # MLflow, SQLAlchemy and SQLite each have a family of their own
        reason = (str(error).splitlines() or [""])[0]
        raise StorageError(f"{place}: MLflow cannot use it: {type(error).__name__}: {reason}", hint=remedy) from error
