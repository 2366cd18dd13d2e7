"""The mirror of studies in MLflow: a view made from ledgers and run directories. The only module that imports MLflow.

    experiment = study;  runs nest by mlflow.parentRunId: study → trial or arm → seed
    metrics        train_loss, ...            step = optimiser step (TTT: chunk), time = start + t
                   by_ms/train_loss, ...      the same points, step = milliseconds of training
                   final/ttt_bpb, ...         scores of their own names: MLflow shows a name's highest step as its value
                   phase_seconds/train, ...

Everything is written through MlflowClient with absolute URIs, in batches, under one lock of the home. Written twice it
stays the same: MLflow ignores a metric point, and a parameter, that it already has with that value.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before the import: telemetry is on unless this says otherwise, and a pooled connection would go on writing to a
# database that a rebuild has moved away.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType

from orchestrator import ledger
from orchestrator.errors import CaddieError, ConfigError, ProtocolError, StorageError
from orchestrator.evidence import read_study
from orchestrator.home import Home
from orchestrator.ledger import Arm, StudyState, Trial
from orchestrator.runs import RunStore
from orchestrator.statistics import mean, sample_std
from orchestrator.study import Study
from trainer import protocol
from trainer.protocol import METRIC, RETRYABLE, START, AttemptDir, Result, Spec, storage_error

MOST_METRICS, MOST_PARAMS = 1000, 100
"""Of one log_batch; more is refused by MLflow."""

MOST_PARAM_CHARACTERS = 6000
"""MLflow cuts a longer value with only a line in its log."""

KEY, LEVEL, STUDY, TRIAL, ARM, SEED, RUN_ID, ATTEMPT, STATUS, MIRRORED, REPORT, PROBLEM = (
    "caddie.key", "caddie.level", "caddie.study", "caddie.trial", "caddie.arm", "caddie.seed", "caddie.run_id", "caddie.attempt",
    "caddie.status", "caddie.mirrored", "caddie.report", "caddie.problem",
)  # fmt: skip
PARENT, NAME, NOTE, GIT_COMMIT = (
    "mlflow.parentRunId",
    "mlflow.runName",
    "mlflow.note.content",
    "mlflow.source.git.commit",
)
VIEW_KEY = "caddie"
"""Name of the experiment's shared view: MLflow opens it for ?viewStateShareKey=."""

COLUMN_PIXELS = 150
"""Width of a column in that view: a score with its digits, a knob with its name."""

CHUNK = "ttt_chunk"
"""Value of a metric event that says to which chunk of test-time training the others belong."""

RUN_STATUS = {protocol.COMPLETE: "FINISHED", protocol.FAILED: "FAILED", protocol.STOPPED: "KILLED"}
TRIAL_STATUS = {ledger.COMPLETE: "FINISHED", ledger.FAILED: "FAILED", ledger.PRUNED: "KILLED"}
STUDY_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
ENDED = frozenset({"FINISHED", "FAILED", "KILLED"})

for _noisy in ("mlflow", "alembic"):  # both tell of every table that they make
    logging.getLogger(_noisy).setLevel(logging.WARNING)


@dataclass
class _Mirrored:
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


def database_uri(path: Path) -> str:
    return f"sqlite:///{path}"


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


@contextmanager
def _named_failures(database: Path) -> Iterator[None]:
    """Whatever MLflow and its database raise, as one StorageError that names the remedy."""
    try:
        yield
    except CaddieError:
        raise
    except Exception as error:  # MLflow, SQLAlchemy and SQLite each have a family of their own
        reason = (str(error).splitlines() or [""])[0]
        raise StorageError(
            f"{database}: MLflow cannot use it: {type(error).__name__}: {reason}",
            hint="caddie track --rebuild makes it again from the run directories",
        ) from error


class Mirror:
    """Brings MLflow up to the state of ledgers and run directories; `sync` may be called again and again."""

    def __init__(self, home: Home, database: Path | None = None) -> None:
        self.home = home
        self.store = RunStore(home)
        self.database = database or home.mlflow_database
        self._experiments: dict[str, str] = {}
        self._known: dict[tuple[str, str], _Mirrored] = {}
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """The client; the first use creates the schema, so the caller must hold the lock."""
        if self._client is None:
            uri = database_uri(self.database)
            self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        return self._client

    def sync(self, study_name: str) -> list[str]:
        """Mirror what is new in a study; returns what could not be read. Raises ConfigError, StorageError."""
        with _locked(self.home), _named_failures(self.database):
            return _StudySync(self, study_name).run()

    @property
    def mlflow_ids(self) -> set[str]:
        """Every MLflow run that this mirror knows."""
        return {run.mlflow_id for run in self._known.values()}

    def run_of(self, experiment_id: str, key: str) -> _Mirrored | None:
        """The MLflow run of a key, also one that an earlier process made."""
        if (experiment_id, key) not in self._known:
            found = self.client.search_runs(
                [experiment_id], f"tags.`{KEY}` = '{key}'", ViewType.ACTIVE_ONLY, max_results=1
            )
            if found:
                self._remember(experiment_id, found[0])
        return self._known.get((experiment_id, key))

    def load(self, experiment_id: str) -> None:
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
            self._known[experiment_id, tags[KEY]] = _Mirrored(
                mlflow_id=run.info.run_id, status=run.info.status, attempt=int(tags.get(ATTEMPT, 0)),
                is_whole=MIRRORED in tags and run.info.status in ENDED, tags=dict(tags),
            )  # fmt: skip

    def create(
        self, experiment_id: str, key: str, *, name: str, started: float, tags: Mapping[str, str], attempt: int = 0
    ) -> _Mirrored:
        """A new MLflow run; the caller has looked that there is none."""
        tags = {**tags, KEY: key, ATTEMPT: str(attempt)} if attempt else {**tags, KEY: key}
        run = self.client.create_run(experiment_id, start_time=_milliseconds(started), tags=dict(tags), run_name=name)
        mirrored = _Mirrored(
            mlflow_id=run.info.run_id, status="RUNNING", attempt=attempt, started=started, tags=dict(tags)
        )
        self._known[experiment_id, key] = mirrored
        return mirrored

    def drop(self, experiment_id: str, key: str) -> None:
        """Put a run away whose curve a newer attempt replaces."""
        old = self._known.pop((experiment_id, key))
        self.client.delete_run(old.mlflow_id)

    def finish(self, mirrored: _Mirrored, status: str, ended: float) -> None:
        """Give a run its final status; a run that has ended is never set running again."""
        if status in ENDED and mirrored.status != status:
            self.client.set_terminated(mirrored.mlflow_id, status, _milliseconds(ended))
            mirrored.status = status

    def set_tags(self, mirrored: _Mirrored, tags: Mapping[str, str]) -> None:
        """Set the tags that have changed."""
        changed = {key: value for key, value in tags.items() if mirrored.tags.get(key) != value}
        if changed:
            self.client.log_batch(mirrored.mlflow_id, tags=[RunTag(key, value) for key, value in changed.items()])
            mirrored.tags.update(changed)

    def log_params(self, mirrored: _Mirrored, params: Mapping[str, Any]) -> None:
        """Log parameters in batches; one that MLflow would cut is left out, its whole value is in the spec's artifact."""
        texts = {key: _param_text(value) for key, value in params.items()}
        found = [Param(key, text) for key, text in texts.items() if len(text) <= MOST_PARAM_CHARACTERS]
        for start in range(0, len(found), MOST_PARAMS):
            self.client.log_batch(mirrored.mlflow_id, params=found[start : start + MOST_PARAMS])

    def log_metrics(self, mirrored: _Mirrored, metrics: Iterable[Metric]) -> None:
        found = list(metrics)
        for start in range(0, len(found), MOST_METRICS):
            self.client.log_batch(mirrored.mlflow_id, metrics=found[start : start + MOST_METRICS])

    def log_file(self, mirrored: _Mirrored, path: Path, folder: str | None = None) -> None:
        """Copy a file into a run's artifacts, over an older copy; one that does not exist is left out."""
        if path.is_file():
            self.client.log_artifact(mirrored.mlflow_id, str(path), folder)

    def experiment(self, study: Study) -> str:
        """The study's experiment, made or restored where necessary, with its description and its view."""
        if study.name not in self._experiments:
            found = self.client.get_experiment_by_name(study.name)
            if found is None:
                location = (self.home.mlflow_artifacts / study.name).resolve().as_uri()
                experiment_id = self.client.create_experiment(study.name, artifact_location=location)
            else:
                experiment_id = found.experiment_id
                if found.lifecycle_stage == "deleted":
                    self.client.restore_experiment(experiment_id)
            for key, value in _experiment_tags(study).items():
                self.client.set_experiment_tag(experiment_id, key, value)
            self.load(experiment_id)
            self._experiments[study.name] = experiment_id
        return self._experiments[study.name]


class _StudySync:
    """One pass over one study."""

    def __init__(self, mirror: Mirror, study_name: str) -> None:
        self.mirror, self.store = mirror, mirror.store
        self.study, self.state = read_study(mirror.home, study_name)
        self.experiment_id = mirror.experiment(self.study)
        self.problems: list[str] = []

    def run(self) -> list[str]:
        """Parents before children, ends after the children's."""
        study_run = self._study_run()
        for trial in self.state.trials.values():
            self._sync_owner(study_run, trial, key=f"trial/{trial.number}")
        for arm in self.state.arms.values():
            self._sync_owner(study_run, arm, key=f"arm/{arm.name}")
        self._finish_study(study_run)
        return self.problems

    # ── study ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _study_run(self) -> _Mirrored:
        found = self.mirror.run_of(self.experiment_id, "study")
        if found is None:
            tags = {LEVEL: "study", STUDY: self.study.name, NOTE: _study_note(self.study, self.state)}
            found = self.mirror.create(
                self.experiment_id, "study", name=f"study {self.study.name}", started=self.state.opened_at, tags=tags
            )
            self.mirror.log_params(found, _study_params(self.study))
        return found

    def _finish_study(self, study_run: _Mirrored) -> None:
        told = {number: trial for number, trial in self.state.trials.items() if trial.value is not None}
        mirrored = study_run.tags.get(MIRRORED, "")
        if mirrored != str(len(told)):
            self.mirror.log_metrics(study_run, _search_metrics(told.values(), self.state.opened_at))
            self.mirror.set_tags(study_run, {NOTE: _study_note(self.study, self.state), MIRRORED: str(len(told))})
        self._sync_report(study_run)
        status = self.state.closed or "open"
        self.mirror.set_tags(study_run, {STATUS: status})
        if self.state.closed:
            ended = max((a.submitted + a.seconds for a in self.state.attempts.values()), default=self.state.opened_at)
            self.mirror.finish(study_run, STUDY_STATUS.get(self.state.closed, "KILLED"), ended)

    def _sync_report(self, study_run: _Mirrored) -> None:
        folder = self.mirror.home.study(self.study.name)
        if folder.report_page.exists():
            written = str(folder.report_page.stat().st_mtime_ns)
            if study_run.tags.get(REPORT) != written:
                for path in (folder.report_page, folder.report_text, folder.report_data, folder.record_csv):
                    self.mirror.log_file(study_run, path, folder.report.name)
                self.mirror.set_tags(study_run, {REPORT: written})

    # ── trials and arms ──────────────────────────────────────────────────────────────────────────────────────────────

    def _sync_owner(self, study_run: _Mirrored, owner: Trial | Arm, *, key: str) -> None:
        found = self.mirror.run_of(self.experiment_id, key)
        if found is not None and found.is_whole:
            return
        found = found or self._create_owner(study_run, owner, key)
        ended = [
            self._sync_seed(found, owner, seed, run_id, key=f"{key}/seed/{seed}") for seed, run_id in owner.runs.items()
        ]
        is_over = owner.state != ledger.RUNNING if isinstance(owner, Trial) else all(ended)
        if is_over and all(ended):
            self._finish_owner(found, owner)

    def _create_owner(self, study_run: _Mirrored, owner: Trial | Arm, key: str) -> _Mirrored:
        submitted = [a.submitted for run_id in owner.runs.values() for a in self.state.attempts_of(run_id)]
        found = self.mirror.create(
            self.experiment_id, key, name=_owner_name(owner), started=min(submitted, default=self.state.opened_at),
            tags={LEVEL: key.partition("/")[0], PARENT: study_run.mlflow_id, STUDY: self.study.name, **_owner_tags(owner)},
        )  # fmt: skip
        self.mirror.log_params(found, owner.params)
        return found

    def _finish_owner(self, found: _Mirrored, owner: Trial | Arm) -> None:
        results = [result for result in map(self._result, owner.runs.values()) if result is not None]
        complete = [result for result in results if result.status == protocol.COMPLETE]
        ended = (
            max((_ended_at(self.state, run_id) for run_id in owner.runs.values()), default=0.0) or self.state.opened_at
        )
        values = _mean_values(complete, self.study.search.objective)
        if isinstance(owner, Trial):
            values |= {f"constraint/{name}": value for name, value in owner.constraints.items()}
            if owner.value is not None:
                values["objective_bpb"] = owner.value
            state, status = owner.state, TRIAL_STATUS[owner.state]
        else:
            state = protocol.COMPLETE if len(complete) == len(owner.runs) else protocol.FAILED
            status = RUN_STATUS[state]
        self.mirror.log_metrics(found, _final_metrics(values, ended))
        note = _owner_note(owner, self.study.search.objective, values)
        self.mirror.set_tags(found, {STATUS: state, NOTE: note, MIRRORED: "whole"})
        self.mirror.finish(found, status, ended)
        found.is_whole = True

    def _result(self, run_id: str) -> Result | None:
        try:
            return self.store.result(run_id)
        except CaddieError:
            return None  # named by the seed's own pass

    # ── seeds ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _sync_seed(self, owner_run: _Mirrored, owner: Trial | Arm, seed: int, run_id: str, *, key: str) -> bool:
        """Mirror one run; returns whether it has ended. A damaged file is reported and ends the mirroring of this run only."""
        known = self.mirror.run_of(self.experiment_id, key)
        if known is not None and known.is_whole:
            return True
        try:
            attempt = self.store.deciding_attempt(run_id)
            status = self._outcome(owner, run_id)
            if attempt is None or (not attempt.events.exists() and status is None):
                return status is not None
            found = self._seed_run(owner_run, owner, seed, run_id, attempt=attempt, key=key)
            self._sync_events(found, attempt, run_id)
            if status is not None:
                self._finish_seed(found, attempt, run_id, status)
        except CaddieError as error:
            self.problems.append(str(error))
            return self._is_decided(owner, run_id)
        return status is not None

    def _outcome(self, owner: Trial | Arm, run_id: str) -> str | None:
        """The status with which a run has ended for good; None while it runs or will be attempted again."""
        result = self.store.result(run_id)
        if result is not None and result.status == protocol.COMPLETE:
            return result.status
        attempts = self.state.attempts_of(run_id)
        status = result.status if result is not None else attempts[-1].status if attempts else None
        return status if self._is_decided(owner, run_id) else None

    def _is_decided(self, owner: Trial | Arm, run_id: str) -> bool:
        """Whether the controller will not attempt a run again."""
        if self.state.closed or (isinstance(owner, Trial) and owner.state != ledger.RUNNING):
            return True
        attempts = self.state.attempts_of(run_id)
        if not attempts or attempts[-1].status is None:
            return False
        return attempts[-1].failure not in RETRYABLE or len(attempts) >= self.study.resources.max_attempts

    def _seed_run(
        self, owner_run: _Mirrored, owner: Trial | Arm, seed: int, run_id: str, *, attempt: AttemptDir, key: str
    ) -> _Mirrored:
        found = self.mirror.run_of(self.experiment_id, key)
        if found is not None and found.attempt != attempt.number:
            self.mirror.drop(self.experiment_id, key)
            found = None
        if found is None:
            spec = protocol.read_spec(self.mirror.home.run(run_id).spec)
            tags = {
                LEVEL: "seed",
                PARENT: owner_run.mlflow_id,
                **_owner_tags(owner),
                **_seed_tags(spec, self.study.name, seed),
            }
            found = self.mirror.create(
                self.experiment_id, key, name=f"{_owner_name(owner)} · seed {seed}", attempt=attempt.number,
                started=self._started(attempt, run_id), tags=tags,
            )  # fmt: skip
            self.mirror.log_params(found, _flat(spec))
        found.started = found.started or self._started(attempt, run_id)
        return found

    def _started(self, attempt: AttemptDir, run_id: str) -> float:
        """Unix time of the start event; where a run died before it, that of its submission."""
        for _, event in self.store.events(attempt):
            if event["kind"] == START:
                return float(event["time"])
            break
        submitted = [a.submitted for a in self.state.attempts_of(run_id) if a.number == attempt.number]
        return submitted[0] if submitted else self.state.opened_at

    def _sync_events(self, found: _Mirrored, attempt: AttemptDir, run_id: str) -> None:
        """Log the metric points since the last pass; after a damaged line the run's mirror keeps what came before it."""
        pending: list[Metric] = []
        offset, problem = found.offset, ""
        try:
            for offset, event in self.store.events(attempt, found.offset):
                if event.get("kind") == METRIC:
                    pending += _points(event, found.started)
                if len(pending) >= MOST_METRICS:
                    self.mirror.log_metrics(found, pending)
                    pending, found.offset = [], offset
        except CaddieError as error:
            problem = str(error)
        self.mirror.log_metrics(found, pending)
        found.offset = offset
        if problem:
            self.problems.append(problem)
            self.mirror.set_tags(found, {PROBLEM: problem})

    def _finish_seed(self, found: _Mirrored, attempt: AttemptDir, run_id: str, status: str) -> None:
        result = protocol.read_result(attempt.result) if attempt.result.exists() else None
        ended = _ended_at(self.state, run_id, attempt.number) or _written_at(attempt.result)
        if result is not None:
            self.mirror.log_metrics(found, _final_metrics(final_values(result), ended))
        run = self.mirror.home.run(run_id)
        for path in (run.spec, run.bundle, attempt.result, attempt.events):
            self.mirror.log_file(found, path)
        note = _seed_note(run_id, attempt, result, status)
        self.mirror.set_tags(found, {STATUS: status, NOTE: note, MIRRORED: "whole"})
        self.mirror.finish(found, RUN_STATUS[status], ended)
        found.is_whole = True


# ── what is written ─────────────────────────────────────────────────────────────────────────────────────────────────


def final_values(result: Result) -> dict[str, float]:
    """Scores, sizes and seconds of a result by their names in MLflow."""
    last_first = reversed(protocol.STAGES)  # MLflow's comparison begins with the first name that a run has
    values = {f"final/{stage}_bpb": result.scores[stage].bpb for stage in last_first if stage in result.scores}
    values |= {f"final/{stage}_loss": score.loss for stage, score in result.scores.items()}
    values |= {f"final/{stage}_seconds": score.seconds for stage, score in result.scores.items()}
    values |= {f"phase_seconds/{name}": seconds for name, seconds in result.phases.items()}
    measured: dict[str, float | None] = {
        "final/parity_nats": result.parity_nats,
        "final/train_loss": result.final_train_loss,
        # Zero means that the run ended before it was measured.
        "final/artifact_bytes": result.artifact_bytes or None,
        "final/model_bytes": result.model_bytes or None,
        "final/bundle_bytes": result.bundle_bytes or None,
        "final/peak_memory_bytes": result.peak_memory_bytes or None,
        "final/parameters": result.parameters or None,
        "final/steps": result.steps or None,
        "final/tokens": result.tokens or None,
        "final/train_seconds": result.train_seconds or None,
    }
    values |= {name: float(value) for name, value in measured.items() if value is not None}
    return {_metric_name(name): value for name, value in values.items()}


def _mean_values(results: list[Result], objective: str) -> dict[str, float]:
    """Means over seeds, and the spread of the objective."""
    by_name: dict[str, list[float]] = {}
    for result in results:
        for name, value in final_values(result).items():
            by_name.setdefault(name, []).append(value)
    means = {name: average for name, values in by_name.items() if (average := mean(values)) is not None}
    spread = sample_std(by_name.get(f"final/{objective}_bpb", []))
    return means if spread is None else means | {f"final/{objective}_bpb_std": spread}


def _points(event: Mapping[str, Any], started: float) -> Iterator[Metric]:
    """The metric points of one event, by step and by milliseconds of training; in TTT, by chunk."""
    values, timestamp = event["values"], _milliseconds(started + event["t"])
    chunk = values.get(CHUNK)
    for name, value in values.items():
        if name == CHUNK:
            continue
        step = event["step"] if chunk is None else int(chunk)
        yield Metric(_metric_name(name), _number(value), timestamp, step)
        if chunk is None:
            yield Metric(
                f"by_ms/{_metric_name(name)}", _number(value), timestamp, _milliseconds(event["train_seconds"])
            )


def _final_metrics(values: Mapping[str, float], ended: float) -> list[Metric]:
    return [Metric(name, _number(value), _milliseconds(ended), 0) for name, value in values.items()]


def _search_metrics(trials: Iterable[Trial], opened_at: float) -> Iterator[Metric]:
    """Every trial's value and the best so far, by trial number. The ledger keeps no time for it: the number orders them."""
    best = math.inf
    for trial in sorted(trials, key=lambda trial: trial.number):
        if trial.value is None:
            continue
        yield Metric("trial_bpb", trial.value, _milliseconds(opened_at), trial.number)
        if trial.is_feasible:
            best = min(best, trial.value)
        if math.isfinite(best):
            yield Metric("best_bpb", best, _milliseconds(opened_at), trial.number)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _number(value: Any) -> float:
    """A metric's value; MLflow stores infinity as the largest float, which no chart survives."""
    number = float(value)
    return number if math.isfinite(number) else math.nan


def _metric_name(name: str) -> str:
    """A name that MLflow takes: it refuses brackets among others."""
    return re.sub(r"[^\w./ :-]", "_", name)


def _param_text(value: Any) -> str:
    """A parameter in full: a float keeps every digit."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _flat(spec: Spec) -> dict[str, Any]:
    """The resolved configuration by dotted names, and what else identifies the run."""
    knobs = {f"{section}.{name}": value for section, entries in spec.config.items() for name, value in entries.items()}
    return {"seed": spec.seed, "preset": spec.preset, "manifest_sha256": spec.manifest_sha256, **knobs}


def _owner_name(owner: Trial | Arm) -> str:
    if isinstance(owner, Arm):
        return f"arm {owner.name}"
    return f"trial {owner.number}" + (" (preset)" if owner.number == 0 else "")


def _owner_tags(owner: Trial | Arm) -> dict[str, str]:
    return {TRIAL: str(owner.number)} if isinstance(owner, Trial) else {ARM: owner.name, TRIAL: str(owner.trial)}


def _seed_tags(spec: Spec, study_name: str, seed: int) -> dict[str, str]:
    tags = {STUDY: study_name, SEED: str(seed), RUN_ID: spec.run_id, STATUS: "running"}
    tags["caddie.bundle_sha256"] = spec.bundle_sha256
    if spec.code.get("git_sha"):
        tags |= {GIT_COMMIT: spec.code["git_sha"], "caddie.git_sha": spec.code["git_sha"]}
    return tags


def _study_params(study: Study) -> dict[str, Any]:
    return {
        "preset": study.preset, "data": study.data, "objective": study.search.objective, "sampler": study.search.sampler,
        "trials": study.search.trials, "search_seeds": study.search.seeds,
        "confirm_seeds": study.confirm.seeds if study.confirm else (), "study_digest": study.digest,
    }  # fmt: skip


def _study_note(study: Study, state: StudyState) -> str:
    best = state.best
    found = f"\n\nBest so far: trial {best.number}, {study.search.objective} BPB {best.value:.5f}" if best else ""
    points = "".join(f"\n- `{knob}` = {_param_text(value)}" for knob, value in best.params.items()) if best else ""
    return f"{study.question}{found}{points}\n\nThe report is among the artifacts once it has been written."


def _owner_note(owner: Trial | Arm, objective: str, values: Mapping[str, float]) -> str:
    points = "\n".join(f"- `{knob}` = {_param_text(value)}" for knob, value in owner.params.items()) or "- unchanged"
    score = values.get(f"final/{objective}_bpb")
    head = (
        f"{objective} BPB {score:.5f}, mean over seeds {', '.join(map(str, owner.runs))}"
        if score is not None
        else "No score."
    )
    reason = f"\n\n{owner.reason}" if isinstance(owner, Trial) and owner.reason else ""
    return f"{head}\n\n{points}{reason}"


def _seed_note(run_id: str, attempt: AttemptDir, result: Result | None, status: str) -> str:
    """Where the run lies and why it failed."""
    lines = [f"Run `{run_id}`, attempt {attempt.number}: {status}."]
    if result is not None and result.failure is not None:
        lines.append(f"**{result.failure.kind}**: {result.failure.message}")
    lines.append(f"Directory: `{attempt.root}`")
    return "\n\n".join(lines)


def _ended_at(state: StudyState, run_id: str, number: int | None = None) -> float:
    """Unix time at which a run's attempts (or one of them) ended by the ledger; 0 where the study made none."""
    attempts = [a for a in state.attempts_of(run_id) if number in (None, a.number) and a.status is not None]
    return max((a.submitted + a.seconds for a in attempts), default=0.0)


def _written_at(path: Path) -> float:
    """When a file was written; now, where there is none."""
    return path.stat().st_mtime if path.exists() else time.time()


def _experiment_tags(study: Study) -> dict[str, str]:
    """Description, the kind that makes the UI open on runs, and a view with the columns that a sweep needs."""
    return {
        NOTE: study.question,
        "mlflow.experimentKind": "custom_model_development",
        f"mlflow.sharedViewState.{VIEW_KEY}": json.dumps(_view(study)),
        STUDY: study.name,
    }


def _view(study: Study) -> dict[str, Any]:
    """Trials and arms by score, with the changed knobs, every stage and the bytes; in the form of MLflow's shared views."""
    scores = [f"metrics.`final/{stage}_bpb`" for stage in reversed(protocol.STAGES)]
    columns = [
        *scores,
        "metrics.`final/artifact_bytes`",
        *(f"params.`{knob}`" for knob in study.space),
        f"tags.`{STATUS}`",
    ]
    return {
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": dict.fromkeys(columns, COLUMN_PIXELS),
        "orderByKey": f"metrics.`final/{study.search.objective}_bpb`",
        "orderByAsc": True,
        "searchFilter": f"tags.`{LEVEL}` != 'seed' AND tags.`{LEVEL}` != 'study'",
    }


# ── around the mirror ───────────────────────────────────────────────────────────────────────────────────────────────


def sync_all(home: Home) -> list[str]:
    """Mirror every study; one that cannot be read is reported and does not stop the others. Makes the database if there is none."""
    mirror, problems = Mirror(home), []
    with _locked(home), _named_failures(home.mlflow_database):
        mirror.client.search_experiments(max_results=1)
    for name in home.study_names():
        try:
            problems += mirror.sync(name)
        except (ConfigError, ProtocolError) as error:
            problems.append(str(error))
    return problems


def view_paths(home: Home) -> dict[str, str]:
    """Path within MLflow's UI of each study's view."""
    with _locked(home), _named_failures(home.mlflow_database):
        experiments = Mirror(home).client.search_experiments()
    return {
        found.name: f"/#/experiments/{found.experiment_id}/runs?viewStateShareKey={VIEW_KEY}&workflowType=machine_learning"
        for found in experiments
        if STUDY in found.tags
    }


def rebuild(home: Home) -> list[str]:
    """MLflow again from ledgers and run directories; the old database gives way only when the new one is complete.

    Returns what could not be read. The old database stays beside the new one until the next rebuild; its artifacts,
    copies of what the run directories hold, are removed.
    """
    fresh = home.mlflow_database.with_name(f".{home.mlflow_database.name}.{os.getpid()}.{time.time_ns()}")
    with _locked(home), _named_failures(fresh):
        mirror = Mirror(home, database=fresh)
        try:
            problems = _mirror_everything(mirror)
            if home.mlflow_database.exists():
                os.replace(home.mlflow_database, home.mlflow_previous)
            os.replace(fresh, home.mlflow_database)
        finally:
            fresh.unlink(missing_ok=True)
        _remove_other_artifacts(home, mirror.mlflow_ids)
    return problems


def _mirror_everything(mirror: Mirror) -> list[str]:
    """Every study into an empty database; the caller holds the lock."""
    problems: list[str] = []
    mirror.client.search_experiments(max_results=1)
    for name in mirror.home.study_names():
        try:
            problems += _StudySync(mirror, name).run()
        except (ConfigError, ProtocolError) as error:
            problems.append(str(error))
    return problems


def _remove_other_artifacts(home: Home, kept: set[str]) -> None:
    for folder in home.mlflow_artifacts.glob("*/*"):
        if folder.is_dir() and folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


class BackgroundMirror:
    """Mirrors one study from a thread of its own. A failure of MLflow never reaches the controller: it is kept in
    `problem` and tried again with growing pauses."""

    PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 120.0
    LEAST_PAUSE_SECONDS = 2.0
    """Between two passes, however often the controller nudges: they share its cores."""

    def __init__(self, home: Home, study_name: str, *, mirror: Mirror | None = None) -> None:
        self.home, self.study_name = home, study_name
        self.problem: str | None = None
        """What went wrong last; None while all is well."""

        self._mirror = mirror
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def nudge(self) -> None:
        """Something has changed: mirror it soon. Returns at once."""
        if self.problem is None:
            self._wake.set()

    def close(self, timeout: float = 60.0) -> None:
        """Mirror a last time and end; waits at most `timeout` seconds, what is then missing comes with the next sync."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.problem = f"the last mirroring did not end within {timeout:g} s; `caddie track` completes it"

    def _run(self) -> None:
        pause = self.PAUSE_SECONDS
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            is_last = self._closing.is_set()  # read before the pass, so that a close during it gets one more
            pause = self.PAUSE_SECONDS if self._sync() else min(2 * pause, self.LONGEST_PAUSE_SECONDS)
            if is_last:
                return
            self._closing.wait(self.LEAST_PAUSE_SECONDS)

    def _sync(self) -> bool:
        """One pass; returns whether MLflow took it."""
        if not self.home.study(self.study_name).ledger.exists():
            return True  # the controller has not opened the study yet
        try:
            self._mirror = self._mirror or Mirror(self.home)
            problems = self._mirror.sync(self.study_name)
        except Exception as error:  # whatever a view raises, the study goes on
            self.problem = (str(error).splitlines() or [type(error).__name__])[0]
            self._mirror = None  # a rebuild may have replaced the database: look everything up again
            return False
        self.problem = problems[0] if problems else None
        return True
