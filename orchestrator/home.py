"""CADDIE_HOME: where runs, ledgers, data and the views of them lie; names every path in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import trainer
from orchestrator.errors import StorageError
from trainer.protocol import RunDir, storage_error

SHIPPED_STUDIES = Path(trainer.__file__).parent.parent / "studies"


@dataclass(frozen=True)
class StudyDir:
    """Names every file of a study."""

    root: Path

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def lock(self) -> Path:
        return self.root / "controller.lock"

    @property
    def optuna_journal(self) -> Path:  # a view: made again from the ledger at every start
        return self.root / "optuna.journal"

    @property
    def stop(self) -> Path:  # asks the controller to stop; "cancel" inside also stops the running jobs
        return self.root / "stop"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def report_page(self) -> Path:
        return self.report / "report.html"

    @property
    def report_text(self) -> Path:
        return self.report / "report.md"

    @property
    def report_data(self) -> Path:
        return self.report / "report.json"

    @property
    def record_csv(self) -> Path:
        return self.report / "record.csv"


@dataclass(frozen=True)
class Home:
    """Names every path under CADDIE_HOME."""

    root: Path

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def studies(self) -> Path:
        return self.root / "studies"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def mlflow_database(self) -> Path:
        return self.root / "mlflow.db"

    @property
    def mlflow_lock(self) -> Path:  # held by whoever writes to MLflow, so that nothing is made twice
        return self.root / "mlflow.lock"

    @property
    def mlflow_previous(self) -> Path:  # the database before the last rebuild
        return self.root / "mlflow.previous.db"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.root / "mlflow-artifacts"

    @property
    def compile_cache(self) -> Path:  # what nodes compiled, for other nodes; losing it costs time only
        return self.root / "compile-cache"

    def compiled(self, key: str) -> Path:
        return self.compile_cache / f"{key}.tar.gz"

    def run(self, run_id: str) -> RunDir:
        return RunDir(self.runs / run_id)

    def study(self, name: str) -> StudyDir:
        return StudyDir(self.studies / name)

    def study_names(self) -> list[str]:
        """Every study that has a ledger."""
        ledgers = self.studies.glob(f"*/{self.study('').ledger.name}")
        return sorted(path.parent.name for path in ledgers if path.stat().st_size)

    def dataset(self, name_or_path: str) -> Path:
        """The folder of a data set: a name under `data/`, or a path as it stands."""
        return Path(name_or_path).expanduser().resolve() if os.sep in name_or_path else self.data / name_or_path

    def require_writable(self) -> None:
        """Raise StorageError where a file cannot be made, before anything is submitted."""
        for path in (self.root, *self.root.parents):
            if path.exists() and not path.is_dir():
                raise StorageError(
                    f"{path}: CADDIE_HOME must be a directory, this is a file",
                    hint="set CADDIE_HOME to a directory of your own, or move the file away",
                )
        probe = self.root / f".probe-{os.getpid()}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                probe.write_bytes(b"probe\n")
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, self.root) from error


def home_of(run: RunDir) -> Home:
    """The home that a run lies in."""
    return Home(run.root.parent.parent)


def default_home() -> Home:
    """CADDIE_HOME, or `.caddie` in the current directory."""
    root = os.environ.get("CADDIE_HOME") or ".caddie"
    try:
        return Home(Path(root).expanduser().resolve())
    except (OSError, RuntimeError) as error:
        raise StorageError(f"CADDIE_HOME {root!r} is not a path: {error}") from error
