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
    def controller(self) -> Path:  # who works on the study; there for as long as somebody does
        return self.root / "controller.json"

    @property
    def log(self) -> Path:  # what detached controllers say
        return self.root / "controller.log"

    @property
    def job_script(self) -> Path:  # of controllers that are jobs of the cluster
        return self.root / "controller.sbatch"

    @property
    def job_births(self) -> Path:  # ids of controller jobs that have started and whose program has not begun
        return self.root / "controller.births"

    @property
    def optuna_journal(self) -> Path:  # a view: made again from the ledger at every start
        return self.root / "optuna.journal"

    @property
    def stop(self) -> Path:  # asks the controller to stop; "cancel" inside also stops the running jobs
        return self.root / "stop"

    @property
    def retry(self) -> Path:  # asks for failed runs again; kinds of failure inside are meant too
        return self.root / "retry"

    @property
    def queue(self) -> Path:  # points that people want tried next, a file each
        return self.root / "queue"

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
    def liveness(self) -> Path:  # what was seen of a script's variables before the first run
        return self.root / "liveness.json"

    @property
    def reproduction_text(self) -> Path:  # a public record's numbers beside the study's
        return self.report / "reproduction.md"

    @property
    def reproduction_data(self) -> Path:
        return self.report / "reproduction.json"

    @property
    def record_csv(self) -> Path:
        return self.report / "record.csv"

    @property
    def runs_csv(self) -> Path:  # the same of every run, the search's too
        return self.report / "runs.csv"


@dataclass(frozen=True)
class AccessDir:
    """Names every file that decides who may open MLflow's pages from another machine; nobody else may read them."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "access.ini"

    @property
    def users(self) -> Path:  # MLflow's own: names, hashes of passwords, permissions
        return self.root / "users.db"

    @property
    def password(self) -> Path:  # of the first user
        return self.root / "password"

    @property
    def secret(self) -> Path:  # signs forms
        return self.root / "secret"


@dataclass(frozen=True)
class ImportDir:
    """Names every file of an imported record."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def files(self) -> Path:  # the record's own, as they were found
        return self.root / "files"

    @property
    def provenance(self) -> Path:  # where they were found, and the hash of each; written last
        return self.root / "provenance.json"


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
    def imports(self) -> Path:  # records of others, as they published them
        return self.root / "imports"

    def imported(self, name: str) -> ImportDir:
        return ImportDir(self.imports / name)

    def import_names(self) -> list[str]:
        """Every imported record."""
        found = self.imports.glob(f"*/{self.imported('').provenance.name}")
        return sorted(path.parent.name for path in found)

    @property
    def gates(self) -> Path:  # rules of one's own, beside the shipped ones
        return self.root / "gates.toml"

    @property
    def purse(self) -> Path:  # GPU-seconds promised and taken, of every study
        return self.root / "purse.jsonl"

    @property
    def purse_lock(self) -> Path:
        return self.root / "purse.lock"

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
    def mlflow_access(self) -> AccessDir:
        return AccessDir(self.root / "mlflow-access")

    @property
    def compile_cache(self) -> Path:  # what nodes compiled, for other nodes; losing it costs time only
        return self.root / "compile-cache"

    def compiled(self, key: str) -> Path:
        return self.compile_cache / f"{key}.tar.gz"

    @property
    def bundles(self) -> Path:  # packed trainers, by what they were packed from; losing them costs time only
        return self.root / "bundles"

    @property
    def scripts(self) -> Path:  # programs of others, as they were when they were asked for
        return self.root / "scripts"

    def script(self, name: str) -> Path:
        return self.scripts / name

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
