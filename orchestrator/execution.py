"""A study carried out for a command: here, in a session of its own, or by jobs of a cluster; and what came of it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.home import Home
from orchestrator.terminal import command_name, tell_damage, warn

if TYPE_CHECKING:
    from orchestrator.assembly import Outcome
    from orchestrator.detach import Started
    from orchestrator.report import Report
    from orchestrator.study import Study


def carry_out(study: Study, arguments: argparse.Namespace, home: Home) -> int:
    """Run a study here, in a session of its own, or by jobs of the cluster that follow one another."""
    from orchestrator import assembly, climb, controller_job, detach, ladder, source_run
    from orchestrator.study import SLURM

    study = source_run.bound(home, ladder.rungs_of(study)[-1])
    role, files, until = detach.take_role(), home.study(study.name), getattr(arguments, "until", "")
    climb.number_of(ladder.rungs_of(study), until)
    warn(study.warnings())
    if study.script:
        from orchestrator import script_check

        warn(script_check.warnings(study))
    if study.interleave is not None and study.resources.launcher == SLURM:
        if role != detach.JOB:
            return queue_controller(study, arguments, home, options=controller_job.allocation_of(study))
        study = controller_job.within_allocation(study)
    if not role and arguments.as_job:
        return queue_controller(study, arguments, home)
    if not role and arguments.detach:
        rungs = [home.study(name) for name in study.other_rungs]
        return show_started(detach.start(files, arguments.words, rungs=rungs), study, home)
    if role != detach.JOB:
        return show_beside(assembly.run_study(study, home, until=until), arguments, home)
    with controller_job.succeeded(files, os.environ["SLURM_JOB_ID"]):
        patience = controller_job.PATIENCE_SECONDS
        outcome = assembly.run_study(study, home, patience_seconds=patience, until=until)
    return show_beside(outcome, arguments, home)


def queue_controller(study: Study, arguments: argparse.Namespace, home: Home, *, options: Sequence[str] = ()) -> int:
    """Queue the controller as a job of the cluster, with these options of sbatch and the user's."""
    from orchestrator import controller_job, preflight

    preflight.check(study, home)
    job = controller_job.submit(home, study.name, arguments.words, [*options, *shlex.split(arguments.job_options)])
    print(f"{study.name}: its controller is job {job}, and queues its successor when it starts")
    show_how_to_follow(study, home)
    return 0


def show_started(started: Started, study: Study, home: Home) -> int:
    """A detached controller, or what its command said where it has ended by now."""
    if started.exit_code is not None:
        print(started.said, end="", file=sys.stderr if started.exit_code else sys.stdout)
        return started.exit_code
    print(f"{study.name}: process {started.pid} works on it, whatever becomes of this terminal")
    show_how_to_follow(study, home)
    return 0


def show_how_to_follow(study: Study, home: Home) -> None:
    base = f"{command_name()} --home {shlex.quote(str(home.root))}"
    print(f"follow   tail -f {shlex.quote(str(home.study(study.name).log))}")
    print(f"status   {base} study status {study.name}")
    print(f"stop     {base} study stop {study.name}")


def show_beside(outcome: Outcome, arguments: argparse.Namespace, home: Home) -> int:
    """An outcome, and the public record that it was to be compared with, where one was named."""
    code = show_outcome(outcome, home)
    if is_beside_record(arguments):
        from orchestrator import reproduction

        study = outcome.report.evidence.study.name
        found = reproduction.reproduce(home, study, reproduction.find_record(home, arguments.against))
        print(f"\n{reproduction.as_lines(found)}\n\nbeside the record   {home.study(study).reproduction_text}")
    return code


def is_beside_record(arguments: argparse.Namespace) -> bool:
    """Whether --against names a public record; a preset goes with --interleave."""
    from orchestrator.presets import is_preset

    against = getattr(arguments, "against", None)
    return bool(against) and not getattr(arguments, "interleave", False) and not is_preset(str(against))


def show_outcome(outcome: Outcome, home: Home) -> int:
    if outcome.mirror_problem:
        warn([f"MLflow does not show all of it: {outcome.mirror_problem}; `caddie track` tries again"])
    code = show_report(outcome.report, home)
    if outcome.notes:
        print("", *outcome.notes, sep="\n")
    return code


def show_report(written: Report, home: Home) -> int:
    """The record tables, and where the rest of it is."""
    from orchestrator.report import render_text

    print(render_text(written))
    print()
    print(f"report   {written.page}")
    print(f"MLflow   {command_name()} --home {shlex.quote(str(home.root))} ui")
    return tell_damage(written.damage)
