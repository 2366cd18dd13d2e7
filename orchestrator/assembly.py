"""Puts the parts together: a checked study, its data, the launcher, the search and the views, run to the report."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator import bundle, datasets, preflight, replay, script_check, search_view, slurm, source_run
from orchestrator.background_mirror import BackgroundMirror
from orchestrator.bundle_store import BundleStore
from orchestrator.contest import baseline_of
from orchestrator.datasets import PYDOC
from orchestrator.errors import StudyFailed
from orchestrator.home import SHIPPED_STUDIES, Home
from orchestrator.job_names import JobNames
from orchestrator.launcher import LocalLauncher
from orchestrator.ports import Launcher
from orchestrator.progress import Progress
from orchestrator.report import Report, write_report
from orchestrator.runs import RunStore
from orchestrator.search import Search
from orchestrator.slots import Slots, machine_slots
from orchestrator.slurm_launcher import SlurmLauncher
from orchestrator.study import SLURM, Study, load_study
from orchestrator.sweep import Controller

DEMO_STUDY = SHIPPED_STUDIES / "wd-qk-ttt-smoke.toml"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a study that has been run leaves."""

    report: Report
    mirror_problem: str | None
    """Why MLflow does not show all of it; None where it does."""


def run_demo(home: Home) -> Outcome:
    """The small study on this machine's CPU, its data included."""
    return run_study(load_study(DEMO_STUDY), home)


def run_study(study: Study, home: Home, *, patience_seconds: float = 0.0) -> Outcome:
    """Check everything, run or continue the study to its end, and write its report.

    Waits so long for another controller of the study to leave.
    Raises ConfigError, DataError, StorageError, ProtocolError, MachineError before anything is submitted; StudyBusy,
    StudyFailed (its report is written), Interrupted.
    """
    home.require_writable()
    study = source_run.bound(home, replay.keep(study, home))
    if study.data == PYDOC:
        datasets.ensure_pydoc(home)
    controller = _controller(study, home)
    controller.patience_seconds = patience_seconds
    try:
        controller.run()
    except StudyFailed:
        _conclude(study, home)
        raise
    return _conclude(study, home)


def _controller(study: Study, home: Home) -> Controller:
    data = preflight.check(study, home)
    launcher, slots = _launcher(study, home)
    sources = source_run.sources_of(home, study)
    progress = Progress(study, RunStore(home))
    if study.script and study.resources.preflight and not home.study(study.name).ledger.exists():
        for line in script_check.as_lines(script_check.prove(study, home)):
            progress.note(line)
    pack = study.script.pack if study.script else BundleStore(home).build
    search = Search(study, home.study(study.name).optuna_journal, url=search_view.address())
    search.view.note = progress.note
    return Controller(
        study, home, launcher=launcher, search=search, pack=pack, code=bundle.code_state(), data_dir=data.root,
        manifest_sha256=data.manifest_sha256, progress=progress,
        mirror=BackgroundMirror(home, study.name), slots=slots, sources=sources, baseline=baseline_of(home, study.confirm),
    )  # fmt: skip


def _launcher(study: Study, home: Home) -> tuple[Launcher, Slots]:
    """What starts the study's jobs, and how many at a time. Raises MachineError."""
    resources = study.resources
    if resources.launcher == SLURM:
        slurm.require_clients()
        return SlurmLauncher(resources, JobNames.of_study(study.name, home.root)), Slots(((),) * resources.slots)
    slots = machine_slots(slots=resources.slots, gpus_per_run=resources.gpus_per_run)
    return LocalLauncher(), Slots(slots.groups[:1]) if study.interleave else slots  # by turns


def _conclude(study: Study, home: Home) -> Outcome:
    """Write the report, and let MLflow show its files too."""
    report = write_report(home, study.name)
    mirror = BackgroundMirror(home, study.name)
    mirror.close()
    return Outcome(report=report, mirror_problem=mirror.problem)
