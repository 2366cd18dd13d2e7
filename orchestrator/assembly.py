"""Puts the parts together: a checked study, its data, the launcher, the search and the views, run to the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator import (
    bundle,
    climb,
    datasets,
    ladder,
    plan,
    preflight,
    replay,
    script_check,
    search_view,
    slurm,
    source_run,
)
from orchestrator.background_mirror import BackgroundMirror
from orchestrator.bundle_store import BundleStore
from orchestrator.contest import baseline_of
from orchestrator.datasets import PYDOC
from orchestrator.errors import MachineError, StudyFailed
from orchestrator.home import SHIPPED_STUDIES, Home
from orchestrator.job_names import JobNames
from orchestrator.launcher import LocalLauncher
from orchestrator.ledger import StudyState
from orchestrator.ports import Launcher
from orchestrator.progress import Progress
from orchestrator.report import Report, write_report
from orchestrator.runs import RunStore
from orchestrator.search import Search
from orchestrator.slots import Slots, machine_slots
from orchestrator.slurm_launcher import SlurmLauncher
from orchestrator.study import SLURM, Study
from orchestrator.study_file import load_study
from orchestrator.sweep import Controller

DEMO_STUDY = SHIPPED_STUDIES / "wd-qk-ttt-smoke.toml"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a study that has been run leaves."""

    report: Report
    mirror_problem: str | None
    """Why MLflow does not show all of it; None where it does."""

    notes: tuple[str, ...] = ()
    """Where a ladder was climbed to, and what comes next; empty where it ended on its last rung."""


def run_demo(home: Home) -> Outcome:
    """The small study on this machine's CPU, its data included."""
    return run_study(load_study(DEMO_STUDY), home)


def run_study(study: Study, home: Home, *, patience_seconds: float = 0.0, until: str = "") -> Outcome:
    """Check everything, run or continue the study to its end, and write its report.

    A ladder is climbed, rung after rung, up to the one that is named. Waits so long for another controller of the study
    to leave.
    Raises ConfigError, DataError, StorageError, ProtocolError, MachineError before anything is submitted; StudyBusy,
    StudyFailed (its report is written), Interrupted.
    """
    home.require_writable()
    rungs = ladder.rungs_of(study)
    last = climb.number_of(rungs, until)
    return _climb(rungs, last, home, patience_seconds) if study.rungs else _run(study, home, patience_seconds)


def _climb(rungs: Sequence[Study], last: int, home: Home, patience_seconds: float) -> Outcome:
    """Run the rungs one after another, up to the one of that number."""
    for study in rungs[: last + 1]:
        _require_room(study, home)
        plan.require_caps(study)
    outcomes: dict[str, Outcome] = {}

    def run(study: Study, notes: Sequence[str]) -> StudyState:
        outcomes[study.name] = _run(study, home, patience_seconds, notes)
        return outcomes[study.name].report.evidence.state

    end = climb.climb(home, rungs, last=last, run=run)
    return replace(outcomes.get(end.study.name) or _conclude(end.study, home), notes=end.notes)


def _require_room(study: Study, home: Home) -> None:
    """Raise MachineError where a rung could not run here, before anything is spent on those below it."""
    try:
        _launcher(study, home)
    except MachineError as error:
        raise MachineError(
            f"rung {study.rung_name}: {error}", hint=f"{error.hint}; a ladder is climbed to a lower rung with --until"
        ) from error


def _run(study: Study, home: Home, patience_seconds: float, notes: Sequence[str] = ()) -> Outcome:
    """Run or continue one study, telling the notes first."""
    study = source_run.bound(home, replay.keep(study, home))
    if study.data == PYDOC:
        datasets.ensure_pydoc(home)
    controller = _controller(study, home)
    controller.patience_seconds = patience_seconds
    for note in notes:
        controller.progress.note(note)
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
    bundles = BundleStore(home)
    pack = study.script.pack if study.script else bundles.build
    search = Search(study, home.study(study.name).optuna_journal, url=search_view.address())
    search.view.note = progress.note
    return Controller(
        study, home, launcher=launcher, search=search, pack=pack, code=bundle.code_state(), data_dir=data.root,
        manifest_sha256=data.manifest_sha256, progress=progress,
        mirror=BackgroundMirror(home, study.name), slots=slots, sources=sources, baseline=baseline_of(home, study.confirm),
        pack_ahead=None if study.script else bundles.build_ahead,
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
