"""The mirror of studies in MLflow: a view made from ledgers and run directories, which can always be made again."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from orchestrator import imported_mirror, imports, ledger
from orchestrator import mlflow_entries as entries
from orchestrator import mlflow_views as views
from orchestrator.errors import CaddieError, ConfigError, ProtocolError
from orchestrator.evidence import read_study
from orchestrator.home import Home
from orchestrator.ledger import Arm, StudyState, Trial
from orchestrator.mlflow_entries import Point
from orchestrator.runs import RunStore
from orchestrator.tracking import MOST_METRICS, MlflowRun, MlflowStore
from trainer import protocol
from trainer.protocol import METRIC, START, AttemptDir, Result


class Mirror:
    """Brings MLflow up to the state of ledgers and run directories; `sync` may be called again and again."""

    def __init__(self, home: Home, database: Path | None = None) -> None:
        self.store = MlflowStore(home, database)

    def sync(self, study_name: str) -> list[str]:
        """Mirror what is new in a study; returns what could not be read. Raises ConfigError, StorageError."""
        with self.store.held():
            return _StudySync(self.store, study_name).run()


def sync_all(home: Home) -> list[str]:
    """Mirror every study; returns what could not be read. Makes the database if there is none. Raises StorageError."""
    store = MlflowStore(home)
    with store.held():
        return _sync_every_study(store)


def sync_imports(home: Home, names: Sequence[str]) -> list[str]:
    """Mirror imported records by name; returns what could not be read. Raises StorageError."""
    store = MlflowStore(home)
    with store.held():
        store.prepare()
        return _sync_imports(store, names)


def _sync_imports(store: MlflowStore, names: Sequence[str]) -> list[str]:
    problems = []
    for name in names:
        try:
            imported_mirror.sync(store, imports.read(store.home, name))
        except (ConfigError, ProtocolError) as error:
            problems.append(str(error))
    return problems


def rebuild(home: Home) -> list[str]:
    """MLflow again from ledgers and run directories; the old database gives way only when the new one is complete.

    Returns what could not be read. The old database stays beside the new one until the next rebuild; its artifacts,
    copies of what the run directories hold, are removed. On a server the runs of this home's studies are put away first.
    """
    if MlflowStore(home).server:
        return _rebuild_on_server(MlflowStore(home))
    fresh = home.mlflow_database.with_name(f".{home.mlflow_database.name}.{os.getpid()}.{time.time_ns()}")
    store = MlflowStore(home, database=fresh)
    with store.held():
        try:
            problems = _sync_every_study(store)
            if home.mlflow_database.exists():
                os.replace(home.mlflow_database, home.mlflow_previous)
            os.replace(fresh, home.mlflow_database)
        finally:
            fresh.unlink(missing_ok=True)
        _remove_other_artifacts(home, store.mlflow_ids)
    return problems


def _rebuild_on_server(store: MlflowStore) -> list[str]:
    with store.held():
        for name in store.home.study_names():
            store.put_away(name)
        return _sync_every_study(store)


def _sync_every_study(store: MlflowStore) -> list[str]:
    """Mirror every study into a store that the caller holds; one that cannot be read does not stop the others."""
    problems: list[str] = []
    store.prepare()
    for name in store.home.study_names():
        try:
            problems += _StudySync(store, name).run()
        except (ConfigError, ProtocolError) as error:
            problems.append(str(error))
    return problems + _sync_imports(store, store.home.import_names())


def _remove_other_artifacts(home: Home, kept: set[str]) -> None:
    for folder in home.mlflow_artifacts.glob("*/*"):
        if folder.is_dir() and folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def view_paths(home: Home) -> dict[str, str]:
    """Path within MLflow's UI of each study's views: its trials as a table and as charts, and the curves of its runs."""
    store = MlflowStore(home)
    with store.held():
        experiments = store.client.search_experiments()
    paths = {}
    for found in experiments:
        if entries.STUDY in found.tags:
            paths[found.name] = views.path_of(found.experiment_id, views.TABLE)
            paths[f"{found.name}, charts"] = views.path_of(found.experiment_id, views.TABLE, has_charts=True)
            paths[f"{found.name}, curves"] = views.path_of(found.experiment_id, views.CURVES, has_charts=True)
    return paths


class _StudySync:
    """One pass over one study."""

    def __init__(self, store: MlflowStore, study_name: str) -> None:
        self.store, self.home, self.runs = store, store.home, RunStore(store.home)
        self.study, self.state = read_study(self.home, study_name)
        self.experiment_id = store.experiment(self.study)
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

    def _study_run(self) -> MlflowRun:
        found = self.store.run_of(self.experiment_id, "study")
        if found is None:
            tags = {
                views.LEVEL: "study",
                entries.STUDY: self.study.name,
                entries.NOTE: entries.study_note(self.study, self.state),
            }
            found = self.store.create(
                self.experiment_id, "study", name=f"study {self.study.name}", started=self.state.opened_at, tags=tags
            )
            self.store.log_params(found, entries.study_params(self.study))
        return found

    def _finish_study(self, study_run: MlflowRun) -> None:
        told = {number: trial for number, trial in self.state.trials.items() if trial.value is not None}
        mirrored = study_run.tags.get(entries.MIRRORED, "")
        if mirrored != str(len(told)):
            self.store.log_metrics(study_run, entries.search_points(told.values(), self.state.opened_at))
            self.store.set_tags(study_run, {entries.MIRRORED: str(len(told))})
        self._sync_report(study_run)
        self.store.set_tags(
            study_run, {entries.NOTE: entries.study_note(self.study, self.state, self._links(study_run))}
        )
        status = self.state.closed or "open"
        self.store.set_tags(study_run, {views.STATUS: status})
        if self.state.closed:
            ended = max((a.ended for a in self.state.attempts.values()), default=self.state.opened_at)
            self.store.finish(study_run, entries.STUDY_STATUS[self.state.closed], ended)

    def _links(self, study_run: MlflowRun) -> dict[str, str]:
        """Pages that the study's description leads to."""
        best, report = self.state.best, self.home.study(self.study.name)
        keys = [*([f"trial/{best.number}"] if best else []), *(f"arm/{name}" for name in self.state.arms)]
        known = {key: self.store.run_of(self.experiment_id, key) for key in keys}
        links = {key: views.run_path(self.experiment_id, run.mlflow_id) for key, run in known.items() if run}
        if report.report_page.exists():
            place = f"{report.report.name}/{report.report_page.name}"
            links["report"] = views.run_path(self.experiment_id, study_run.mlflow_id, place)
        return links

    def _sync_report(self, study_run: MlflowRun) -> None:
        folder = self.home.study(self.study.name)
        if folder.report_page.exists():
            written = str(folder.report_page.stat().st_mtime_ns)
            if study_run.tags.get(entries.REPORT) != written:
                for path in (folder.report_page, folder.report_text, folder.report_data, folder.record_csv):
                    self.store.log_file(study_run, path, folder.report.name)
                self.store.set_tags(study_run, {entries.REPORT: written})

    # ── trials and arms ──────────────────────────────────────────────────────────────────────────────────────────────

    def _sync_owner(self, study_run: MlflowRun, owner: Trial | Arm, *, key: str) -> None:
        found = self.store.run_of(self.experiment_id, key)
        if found is not None and found.is_whole and found.tags.get(entries.MIRRORED) == self._stand_of(owner):
            return
        found = found or self._create_owner(study_run, owner, key)
        ended = [
            self._sync_seed(found, owner, seed, run_id, key=f"{key}/seed/{seed}") for seed, run_id in owner.runs.items()
        ]
        is_over = owner.state != ledger.RUNNING if isinstance(owner, Trial) else all(ended)
        if is_over and all(ended):
            self._finish_owner(found, owner)

    def _create_owner(self, study_run: MlflowRun, owner: Trial | Arm, key: str) -> MlflowRun:
        submitted = [a.submitted for run_id in owner.runs.values() for a in self.state.attempts_of(run_id)]
        tags = {
            views.LEVEL: key.partition("/")[0],
            entries.PARENT: study_run.mlflow_id,
            entries.STUDY: self.study.name,
            **entries.owner_tags(owner),
        }
        found = self.store.create(
            self.experiment_id, key, name=entries.owner_name(owner), started=min(submitted, default=self.state.opened_at),
            tags=tags,
        )  # fmt: skip
        self.store.log_params(found, owner.params)
        return found

    def _finish_owner(self, found: MlflowRun, owner: Trial | Arm) -> None:
        results = [result for result in map(self._result, owner.runs.values()) if result is not None]
        complete = [result for result in results if result.status == protocol.COMPLETE]
        ended = (
            max((_ended_at(self.state, run_id) for run_id in owner.runs.values()), default=0.0) or self.state.opened_at
        )
        values = entries.mean_values(complete, self.study.search.objective)
        if isinstance(owner, Trial):
            values |= {f"constraint/{name}": value for name, value in owner.constraints.items()}
            if owner.value is not None:
                values["objective_bpb"] = owner.value
            state, status = owner.state, entries.TRIAL_STATUS[owner.state]
        else:
            state = protocol.COMPLETE if len(complete) == len(owner.runs) else protocol.FAILED
            status = entries.RUN_STATUS[state]
        note = entries.owner_note(owner, self.study.search.objective, values)
        tags = {views.STATUS: state, entries.NOTE: note, entries.MIRRORED: self._stand_of(owner)}
        self.store.log_metrics(found, entries.final_points(values, ended), tags)
        self.store.finish(found, status, ended)
        found.is_whole = True

    def _stand_of(self, owner: Trial | Arm) -> str:
        """What changes when an owner that had ended goes on: an arm gets further seeds, a failed run further attempts."""
        last = [self._last_attempt(run_id) for run_id in owner.runs.values()]
        return f"{owner.state if isinstance(owner, Trial) else 'arm'}, last attempts {last}"

    def _last_attempt(self, run_id: str) -> int:
        """Number of a run's last attempt by the study's ledger; 0 where it made none."""
        return max((attempt.number for attempt in self.state.attempts_of(run_id)), default=0)

    def _result(self, run_id: str) -> Result | None:
        try:
            return self.runs.result(run_id)
        except CaddieError:
            return None  # named by the seed's own pass

    # ── seeds ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _sync_seed(self, owner_run: MlflowRun, owner: Trial | Arm, seed: int, run_id: str, *, key: str) -> bool:
        """Mirror one run; returns whether it has ended. A damaged file is reported and ends the mirroring of this run only."""
        known = self.store.run_of(self.experiment_id, key)
        if known is not None and known.is_whole and known.attempt >= self._last_attempt(run_id):
            return True
        try:
            attempt = self.runs.deciding_attempt(run_id)
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
        result = self.runs.result(run_id)
        if result is not None and result.status == protocol.COMPLETE:
            return result.status
        attempts = self.state.attempts_of(run_id)
        status = result.status if result is not None else attempts[-1].status if attempts else None
        return status if self._is_decided(owner, run_id) else None

    def _is_decided(self, owner: Trial | Arm, run_id: str) -> bool:
        """Whether the controller will not attempt a run again."""
        if self.state.closed or (isinstance(owner, Trial) and owner.state != ledger.RUNNING):
            return True
        standing = self.state.standing(run_id, max_attempts=self.study.resources.max_attempts)
        return standing == ledger.SETTLED

    def _seed_run(
        self, owner_run: MlflowRun, owner: Trial | Arm, seed: int, run_id: str, *, attempt: AttemptDir, key: str
    ) -> MlflowRun:
        found = self.store.run_of(self.experiment_id, key)
        if found is not None and found.attempt != attempt.number:
            self.store.drop(self.experiment_id, key)
            found = None
        if found is None:
            spec = protocol.read_spec(self.home.run(run_id).spec)
            tags = {
                views.LEVEL: "seed",
                entries.PARENT: owner_run.mlflow_id,
                **entries.owner_tags(owner),
                **entries.seed_tags(spec, self.study.name, seed),
            }
            found = self.store.create(
                self.experiment_id, key, name=f"{entries.owner_name(owner)} · seed {seed}", attempt=attempt.number,
                started=self._started(attempt, run_id), tags=tags,
            )  # fmt: skip
            self.store.log_params(found, entries.run_params(spec))
        found.started = found.started or self._started(attempt, run_id)
        return found

    def _started(self, attempt: AttemptDir, run_id: str) -> float:
        """Unix time of the start event; where a run died before it, that of its submission."""
        for _, event in self.runs.events(attempt):
            if event["kind"] == START:
                return float(event["time"])
            break
        submitted = [a.submitted for a in self.state.attempts_of(run_id) if a.number == attempt.number]
        return submitted[0] if submitted else self.state.opened_at

    def _sync_events(self, found: MlflowRun, attempt: AttemptDir, run_id: str) -> None:
        """Log the metric points since the last pass; after a damaged line the run's mirror keeps what came before it."""
        pending: list[Point] = []
        offset, problem = found.offset, ""
        try:
            for offset, event in self.runs.events(attempt, found.offset):
                if event.get("kind") == METRIC:
                    pending += entries.points_of(event, found.started)
                if len(pending) >= MOST_METRICS:
                    self.store.log_metrics(found, pending)
                    pending, found.offset = [], offset
        except CaddieError as error:
            problem = str(error)
        self.store.log_metrics(found, pending)
        found.offset = offset
        if problem:
            self.problems.append(problem)
            self.store.set_tags(found, {entries.PROBLEM: problem})

    def _finish_seed(self, found: MlflowRun, attempt: AttemptDir, run_id: str, status: str) -> None:
        result = protocol.read_result(attempt.result) if attempt.result.exists() else None
        ended = _ended_at(self.state, run_id, attempt.number) or _written_at(attempt.result)
        values = entries.final_values(result) if result is not None else {}
        self._sync_system(found, attempt)
        run = self.home.run(run_id)
        for path in (run.spec, run.bundle, attempt.result, attempt.events):
            self.store.log_file(found, path)
        links = {
            path.name: views.run_path(self.experiment_id, found.mlflow_id, path.name)
            for path in (run.spec, attempt.result, attempt.events) if path.exists()
        }  # fmt: skip
        if parent := found.tags.get(entries.PARENT):
            links = {"the trial or arm": views.run_path(self.experiment_id, parent), **links}
        note = entries.seed_note(run_id, attempt, result, status, links)
        tags = {views.STATUS: status, entries.NOTE: note, entries.MIRRORED: "whole"}
        self.store.log_metrics(found, entries.final_points(values, ended), tags)
        self.store.finish(found, entries.RUN_STATUS[status], ended)
        found.is_whole = True

    def _sync_system(self, found: MlflowRun, attempt: AttemptDir) -> None:
        """What the GPUs did, node by node; a damaged line ends a node's, and is a problem."""
        for node in itertools.count():
            path, points = attempt.system(node), list[Point]()
            if not path.exists():
                return
            try:
                for step, (_, record) in enumerate(protocol.read_lines(path)):
                    points += entries.system_points(record, node, step)
            except (CaddieError, KeyError, AttributeError, TypeError) as error:
                self.problems.append(f"{path}: {error}")
            self.store.log_metrics(found, points)


def _ended_at(state: StudyState, run_id: str, number: int | None = None) -> float:
    """Unix time at which a run's attempts (or one of them) ended by the ledger; 0 where the study made none."""
    attempts = [a for a in state.attempts_of(run_id) if number in (None, a.number) and a.status is not None]
    return max((a.ended for a in attempts), default=0.0)


def _written_at(path: Path) -> float:
    """When a file was written; now, where there is none."""
    return path.stat().st_mtime if path.exists() else time.time()
