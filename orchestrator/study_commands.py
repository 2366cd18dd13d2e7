"""`caddie study`: a study checked, run, looked at, stopped, mended, and given points by hand."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from orchestrator.assignments import parse_settings
from orchestrator.errors import ConfigError
from orchestrator.execution import carry_out
from orchestrator.home import Home
from orchestrator.terminal import command_name, fail, show_json, warn

if TYPE_CHECKING:
    from orchestrator.study import Study


def study_check(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import plan, preflight, source_run
    from orchestrator.study_file import load_study

    study = source_run.bound(home, load_study(arguments.file))
    if study.rungs:
        return ladder_check(study, arguments, home)
    data = preflight.check(study, home)
    warnings, heeded = study.warnings(), []
    if study.script:
        from orchestrator import script_check

        warnings += script_check.warnings(study)
        heeded = script_check.prove(study, home)
    planned = plan.plan(study, home, slots=plan.slots_of(study))
    found = {
        "name": study.name, "question": study.question, "preset": study.preset, "data": str(data.root),
        "knobs": list(study.space), "trials": study.search.trials, "cells": [cell.name for cell in study.cells],
        "seeds": study.confirm.seeds if study.confirm else study.search.seeds, "runs_at_most": preflight.runs_of(study),
        "warnings": warnings, "plan": plan.as_record(planned), "variables": [dataclasses.asdict(one) for one in heeded],
    }  # fmt: skip
    if arguments.json:
        show_json(found)
    else:
        print(f"{study.name}: sound; {study.plan_text()}")
        print(f"at most {found['runs_at_most']} runs of {study.preset} on {data.root}")
        for one in heeded:
            print(f"env.{one.name}: {one.status}, {one.found}")
        print(plan.as_text(planned))
        warn(warnings)
    return 0


def ladder_check(study: Study, arguments: argparse.Namespace, home: Home) -> int:
    """What every rung of a study will take, and how those that have been run agree."""
    from orchestrator import agreement, climb, ladder, preflight
    from orchestrator import ladder_tables as tables
    from orchestrator.cells import as_text

    rungs = ladder.rungs_of(study)
    data = [preflight.check(rung, home) for rung in rungs][-1]
    planned, warnings = climb.plans(home, rungs), rungs[-1].warnings()
    if arguments.json:
        show_json({
            "name": rungs[-1].name, "question": study.question, "preset": study.preset, "data": str(data.root),
            "knobs": list(study.space), "warnings": warnings, "ladder": climb.as_record(home, rungs),
        })  # fmt: skip
        return 0
    print(f"{rungs[-1].name}: sound; a ladder of {len(rungs)} rungs over {', '.join(study.space)}\n")
    print(as_text(tables.plan_table(rungs, planned)))
    for found in climb.agreements(rungs, climb.states_of(home, rungs)):
        print(f"\n{agreement.in_words(found)}")
    warn([*warnings, *climb.cap_notes(home, rungs, planned)])
    return 0


def study_run(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator.study_file import load_study

    if arguments.dry_run:
        arguments.json = False
        return study_check(arguments, home)
    return carry_out(load_study(arguments.file), arguments, home)


def study_status(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import oversight

    found = oversight.status(home, arguments.study)
    show_json(dataclasses.asdict(found)) if arguments.json else print(oversight.as_text(found))
    return 0


def study_list(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import oversight

    found, problems = oversight.statuses(home)
    if arguments.json:
        show_json([dataclasses.asdict(status) for status in found])
    elif found:
        print("\n".join(map(oversight.as_line, found)))
    elif not problems:
        print(f"no studies under {home.studies}", file=sys.stderr)
    return max(map(fail, problems), default=0)


def study_stop(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import oversight

    print(oversight.ask_to_stop(home, arguments.study, cancel=arguments.cancel))
    return 0


def study_retry(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import oversight

    home.require_writable()
    print(oversight.ask_to_retry(home, arguments.study, kinds=arguments.failure))
    return 0


def study_enqueue(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import enqueued

    home.require_writable()
    study, settings = enqueued.named_study(home, arguments.study), parse_settings(arguments.set)
    if bool(settings) == bool(arguments.source):
        raise ConfigError(
            "a point is needed: either --set KNOB=VALUE or --from SOURCE",
            hint=f"{command_name()} study enqueue {study.name} --set {next(iter(study.space), 'KNOB')}=VALUE",
        )
    if arguments.source:
        points, notes = enqueued.points_from(home, study, arguments.source, top=arguments.top)
    else:
        points, notes = [(enqueued.by_hand(study, settings), "by hand")], []
    made, left_out = enqueued.enqueue(home, study, points)
    for request in made:
        values = ", ".join(f"{knob} = {value}" for knob, value in request.params.items())
        print(f"{study.name}: will try {values} ({request.source})")
    warn([*notes, *left_out])
    return 0
