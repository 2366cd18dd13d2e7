"""The command line: each command parses, calls one function and prints. Data to stdout, the rest to stderr.

What a command needs is imported when it runs: `caddie --help` loads neither MLflow nor Optuna nor pandas.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from orchestrator import __version__, datasets, hub
from orchestrator.errors import CaddieError, ConfigError, DataError, ProtocolError
from orchestrator.home import Home, default_home
from trainer.config import parse_value
from trainer.protocol import STAGES, storage_error

if TYPE_CHECKING:
    from orchestrator.assembly import Outcome
    from orchestrator.detach import Started
    from orchestrator.findings import Finding
    from orchestrator.leaderboard import Leaderboard
    from orchestrator.report import Report
    from orchestrator.review import Review
    from orchestrator.script import Script
    from orchestrator.study import Study

RECORD_SEEDS = "42,314,999"  # the challenge's usual three
SAMPLE_POSITIONS = 32_768  # a chunk of test-time training in the challenge's configurations
UI_HOST, UI_PORT = "127.0.0.1", 5000
USAGE = 2  # as argparse has it
INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + signal, as shells have it
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ESTALE})

Command = Callable[[argparse.Namespace, Home], int]


# ---- the commands ------------------------------------------------------------------------------------------------


def demo(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import assembly

    return show_outcome(assembly.run_demo(home), home)


def data_prepare(arguments: argparse.Namespace, home: Home) -> int:
    home.require_writable()
    out = home.dataset(arguments.out)
    options = ["--corpus", *arguments.corpus, "--out", str(out), "--vocab-size", str(arguments.vocab_size)]
    for name in ("tokenizer", "val_documents", "val_frac", "shard_tokens", "processes"):
        if getattr(arguments, name) is not None:
            options += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return show_data(datasets.prepare(options), arguments)


def data_fetch(arguments: argparse.Namespace, home: Home) -> int:
    home.require_writable()
    request = datasets.Request(
        variant=arguments.variant, repo=arguments.repo or datasets.known_repository(arguments.variant),
        train_shards=arguments.train_shards, revision=arguments.revision, prefix=arguments.prefix,
    )  # fmt: skip
    out = home.dataset(arguments.out or f"fineweb-{arguments.variant}")
    return show_data(datasets.fetch(request, out, lambda line: print(line, file=sys.stderr, flush=True)), arguments)


def data_verify(arguments: argparse.Namespace, home: Home) -> int:
    root = datasets.find(home, arguments.data).root
    options = ["--corpus", *arguments.corpus] if arguments.corpus else []
    options += ["--processes", str(arguments.processes)] if arguments.processes is not None else []
    found = datasets.verify(root, options)
    problems = found["problems"]
    if arguments.json:
        show_json({**found, "data": str(root)})
    else:
        for problem in problems:
            print(f"problem: {problem}", file=sys.stderr)
        show_splits(found)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        print(f"{root}: {count if problems else 'sound'}")
    return DataError.exit_code if problems else 0


def study_check(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import plan, preflight, source_run
    from orchestrator.study import load_study

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
    from orchestrator.study import load_study

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


def costs(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import costs as bills
    from orchestrator.cells import as_text

    found = bills.bill(home, arguments.studies or home.study_names())
    if arguments.json:
        show_json(bills.as_record(found))
    else:
        print(as_text(bills.studies_table(found)))
        for one in found.studies if arguments.studies else ():
            print("", one.study, as_text(bills.phases_table(one)), sep="\n")
    return tell_damage(found.problems)


def run(arguments: argparse.Namespace, home: Home) -> int:
    if is_beside_record(arguments):
        require_record(arguments.against, home)
    study = study_from_run(arguments, home) if arguments.from_run else study_of_preset(arguments)
    return carry_out(study, arguments, home)


def replay(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import replay as replays
    from orchestrator.record_folder import is_record
    from orchestrator.script import read_script

    script = read_script(arguments.script)
    if arguments.look:
        return show_script(script, replays.describe(script), has_json=arguments.json)
    if arguments.against is None and is_record(script.path.parent):
        arguments.against = str(script.path.parent)
    settings = replays.variables(parse_pairs(arguments.set))
    stage, logged = claim_of(arguments, script, home)
    missing = {f"env.{name}": text for name, text in logged.items() if f"env.{name}" not in settings}
    if missing and not arguments.as_logged:
        told = ", ".join(f"{knob.removeprefix('env.')}={text}" for knob, text in missing.items())
        warn([f"the record's logs have {told}, which are not the script's defaults: --as-logged takes them"])
    study = replays.replay_study(
        script.path, data=arguments.data or datasets.PYDOC, seeds=parse_seeds(arguments.seeds or RECORD_SEEDS),
        settings={**(missing if arguments.as_logged else {}), **settings}, resources=resources_of(arguments),
        name=arguments.name, stage=arguments.stage or stage, home=home,
    )  # fmt: skip
    return carry_out(study, arguments, home)


def claim_of(arguments: argparse.Namespace, script: Script, home: Home) -> tuple[str, dict[str, str]]:
    """The stage that the record beside a script was submitted by, empty where it is not known, and the settings that its
    logs have otherwise than the script."""
    from orchestrator import reproduction
    from orchestrator.replay import as_logged

    if not arguments.against:
        return "", {}
    record = reproduction.find_record(home, arguments.against).record
    return (record.stage if record.stage in STAGES else ""), as_logged(script, record)


def show_script(script: Script, rows: Sequence[tuple[str, str, str, str]], *, has_json: bool) -> int:
    """What a script looks at, by its text."""
    from orchestrator.cells import Table, as_text

    if has_json:
        keys = ("name", "kind", "default", "setting")
        show_json({
            "script": str(script.path), "sha256": script.sha256, "bytes": len(script.content), "stages": script.stages,
            "is_opaque": script.is_opaque, "variables": [dict(zip(keys, row, strict=True)) for row in rows],
        })  # fmt: skip
        return 0
    columns = ("Variable", "Type", "Default", "Setting")
    print(as_text(Table(title=f"What {script.name} looks at", columns=columns, rows=tuple(rows))))
    print(
        f"\n{len(script.content):,} bytes; it can print the stages {', '.join(script.stages) or 'of no label that is known'}"
    )
    warn(["its text does not show all that it looks at; its reads are traced as it runs"] if script.is_opaque else [])
    return 0


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


def study_of_preset(arguments: argparse.Namespace) -> Study:
    """The record attempt that the arguments ask for. Raises ConfigError."""
    from orchestrator.study import record_study

    if not arguments.preset:
        raise ConfigError("a preset or --from RUN must be given", hint=f"{command_name()} run --help")
    return record_study(
        named_preset(arguments.preset), data=arguments.data or datasets.PYDOC, seeds=parse_seeds(arguments.seeds or RECORD_SEEDS),
        knobs=parse_settings(arguments.set), resources=resources_of(arguments), name=arguments.name,
        interleave=interleave_of(arguments),
    )  # fmt: skip


def interleave_of(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The table [interleave] that the arguments ask for; None where no candidate is named. Raises ConfigError."""
    against = None if is_beside_record(arguments) else arguments.against
    entries = {
        "against": named_preset(against) if against else None,
        "set": parse_settings(arguments.set_against) or None, "max_gap": arguments.max_gap, "throughput": arguments.throughput,
    }  # fmt: skip
    given = {name: value for name, value in entries.items() if value is not None}
    if bool(given) != arguments.interleave or (given and not {"against", "set"} & set(given)):
        raise ConfigError(
            "--interleave goes with a candidate: --against PRESET, or --set-against KNOB=VALUE",
            hint=f"{command_name()} run pr1326 --against pr1326-fisher --interleave",
        )
    return given or None


def study_from_run(arguments: argparse.Namespace, home: Home) -> Study:
    """Runs' stored models, scored again with other knobs of evaluation or rounding. Raises ConfigError, ProtocolError."""
    from orchestrator import source_run
    from orchestrator.study import record_study

    if arguments.preset:
        raise ConfigError(
            f"a preset and --from exclude one another, got {arguments.preset!r} and --from {arguments.from_run}",
            hint="leave the preset out: the run has its own",
        )
    sources = source_run.find_all(home, arguments.from_run.split(","))
    source = sources.runs[0]
    return record_study(
        source.spec.preset, data=arguments.data or source.spec.data_dir,
        seeds=parse_seeds(arguments.seeds) if arguments.seeds else sources.seeds,
        knobs={**source_run.knobs_set(source), **parse_settings(arguments.set)}, resources=resources_of(arguments),
        name=arguments.name, from_runs=[found.spec.run_id for found in sources.runs],
    )  # fmt: skip


def resources_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The table [resources] that the arguments ask for; what is not given is left to its default."""
    resources = {"gpus_per_run": arguments.gpus, "timeout_minutes": arguments.timeout_minutes, "slots": arguments.slots}
    for name in ("launcher", "nodes", "partition", "account", "qos", "constraint", "python"):
        resources[name] = getattr(arguments, name)
    resources["exclusive"] = arguments.exclusive or None
    resources["sbatch"] = parse_options(arguments.sbatch) or None
    if arguments.launcher == "slurm" and arguments.slots is None:  # all seeds at once, as far as the cluster lets them
        resources["slots"] = len((arguments.seeds or RECORD_SEEDS).split(","))
    return {name: value for name, value in resources.items() if value is not None}


def report(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator.report import as_record, write_report

    written = write_report(home, arguments.study, against=arguments.against, gates=arguments.gate)
    if arguments.json:
        show_json(as_record(written))
        return tell_damage(written.damage)
    return show_report(written, home)


def compare(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import compare as comparisons

    found = comparisons.compare(
        home, arguments.candidate, arguments.baseline, gates=arguments.gate, paired=arguments.paired or None,
        split=arguments.split, stage=arguments.stage,
    )  # fmt: skip
    show_json(comparisons.as_record(found)) if arguments.json else print(comparisons.as_text(found))
    warn([] if arguments.json else found.warnings)
    return comparisons.exit_code(found, asked=bool(arguments.gate))


def import_records(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import gates, imports, leaderboard, mirror
    from orchestrator.record_folder import find_records

    home.require_writable()
    folders = [found for folder in arguments.folders for found in find_records(folder.expanduser())]
    kept = []
    for number, folder in enumerate(folders, start=1):
        kept.append(imports.keep(home, folder))
        if len(folders) > 1:
            print(f"{number}/{len(folders)} {folder.name}", file=sys.stderr)
    board = leaderboard.rank(
        [(found.record, imports.track_of(found)) for found in kept], leaderboard.chosen_gates(gates.load_gates(home))
    )
    if arguments.json:
        show_json(leaderboard.as_record(board))
    elif arguments.csv:
        print(leaderboard.as_csv(board), end="")
    else:
        show_imports(board, has_details=arguments.details or len(kept) == 1)
    damage = [] if arguments.no_mlflow else mirror.sync_imports(home, [found.folder.name for found in kept])
    if damage:
        return tell_damage(damage)
    return ProtocolError.exit_code if not any(found.record.scores for found in kept) else 0


def package_record(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import package, review

    who = package.Submitter(
        author=arguments.author, github_id=arguments.github_id, name=arguments.name, blurb=arguments.blurb,
        track=arguments.track,
    )  # fmt: skip
    found = package.collect(home, arguments.record)
    if arguments.verify:
        package.verify_seeds(
            found, data_dir=home.dataset(arguments.data) if arguments.data else None, gpus=arguments.gpus,
            timeout_seconds=60 * arguments.timeout_minutes, say=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
        found = package.collect(home, arguments.record)
    seen = package.package(home, found, arguments.out.expanduser().absolute(), who)
    return show_review(seen, review.as_text(seen), has_json=arguments.json)


def review_folder(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import review

    if not arguments.folder.is_dir():
        raise ConfigError(f"{arguments.folder}: there is no such folder", hint="name a submission folder")
    seen = review.review(arguments.folder, seeds=arguments.seeds)
    return show_review(seen, review.as_text(seen), has_json=arguments.json)


def show_review(seen: Review, text: str, *, has_json: bool) -> int:
    """What a reviewer finds in a folder; returns its exit code."""
    from orchestrator.review import failures

    if has_json:
        checks = [dataclasses.asdict(check) for check in seen.checks]
        show_json({"folder": str(seen.folder), "checks": checks, "failed": [check.name for check in seen.failed]})
    else:
        print(text, flush=True)
    for line in failures(seen):
        print(line, file=sys.stderr)
    return seen.exit_code


def show_imports(board: Leaderboard, *, has_details: bool) -> None:
    """The leaderboard, or each record's seeds; what was refused and what disagrees."""
    from orchestrator import leaderboard
    from orchestrator.cells import as_text

    if has_details:
        for row in board.rows:
            print(as_text(leaderboard.seed_table(row.record)), end="\n\n")
    if len(board.rows) > 1:
        print("\n\n".join(map(as_text, leaderboard.as_tables(board))))
    for row in board.rows:
        for refused in row.record.refused:
            print(f"refused: {row.record.name}, seed {refused.seed}: {refused.why}", file=sys.stderr)
        for conflict in row.record.conflicts:
            print(f"conflict: {row.record.name}: {conflict}", file=sys.stderr)
        for doubt in row.record.doubts:
            print(f"doubt: {row.record.name}: {doubt}", file=sys.stderr)
        for note in row.record.notes:
            print(f"note: {row.record.name}: {note}", file=sys.stderr)


def verify(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import verify as verification
    from orchestrator.runs import find_run

    run_dir = find_run(home, arguments.run)
    found = verification.verify(
        run_dir, data_dir=home.dataset(arguments.data) if arguments.data else None, gpus=arguments.gpus,
        timeout_seconds=60 * arguments.timeout_minutes, say=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    return show_finding(found, run_dir.verify, verification.as_text(found), has_json=arguments.json)


def audit(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import audit as audits
    from orchestrator.runs import find_run

    run_dir = find_run(home, arguments.run)
    found = audits.audit(
        run_dir, data_dir=home.dataset(arguments.data) if arguments.data else None, gpus=arguments.gpus,
        sample=arguments.sample, seed=arguments.seed, timeout_seconds=60 * arguments.timeout_minutes,
        evaluates=not arguments.no_evaluation, say=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    return show_finding(found, run_dir.audit, audits.as_text(found), has_json=arguments.json)


def show_finding(found: Finding, path: Path, text: str, *, has_json: bool) -> int:
    """Keep a finding and show it; returns its exit code."""
    from orchestrator.findings import failure_lines, write

    try:
        write(path, found)
    finally:  # a directory that cannot be written costs the record, not the finding
        if has_json:
            show_json(dataclasses.asdict(found))
        else:
            print(text, flush=True)
        print("\n".join(failure_lines(found)), end="\n" if found.failed else "", file=sys.stderr)
    return found.exit_code


def ui(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator.ui import serve

    serve(home, host=arguments.host, port=arguments.port)
    return 0


def track(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator import mirror, tracking_server

    home.require_writable()
    damage = mirror.rebuild(home) if arguments.rebuild else mirror.sync_all(home)
    print(tracking_server.place(home))
    return tell_damage(damage)


def doctor(arguments: argparse.Namespace, home: Home) -> int:
    from orchestrator.doctor import examine, exit_code

    findings = examine(home)
    if arguments.json:
        show_json([dataclasses.asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{finding.status:<8} {finding.name:<20} {finding.found}")
            if finding.remedy:
                print(f"{'':8} {'':20} → {finding.remedy}")
    return exit_code(findings)


# ---- reading arguments and showing results -----------------------------------------------------------------------


def named_preset(text: str) -> str:
    """A preset's name as it stands; a file's path in full, since a study outlives the current directory."""
    return str(Path(text).resolve()) if text.endswith(".toml") else text


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from `42,314,999`; raises ConfigError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--seeds must be whole numbers between commas, got {text!r}", hint=f"--seeds {RECORD_SEEDS}"
        ) from error


def parse_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """Knobs from `optim.matrix_lr=0.02`; raises ConfigError with the nearest name for an unknown one."""
    settings = {}
    for assignment in assignments:
        knob, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(
                f"--set must be knob=value, got {assignment!r}", hint="--set optim.muon_weight_decay=0.05"
            )
        settings[knob] = parse_value(knob, text)
    return settings


def parse_pairs(assignments: Sequence[str]) -> dict[str, str]:
    """Names and texts from `MUON_WD=0.09`; raises ConfigError."""
    pairs = [assignment.partition("=") for assignment in assignments]
    for name, equals, text in pairs:
        if not equals or not name:
            raise ConfigError(f"--set must be NAME=VALUE, got {name + equals + text!r}", hint="--set MUON_WD=0.09")
    return {name: text for name, _, text in pairs}


def require_record(text: str, home: Home) -> None:
    """Raise ConfigError before anything is run where --against names no public record."""
    from orchestrator import reproduction

    try:
        reproduction.find_record(home, text)
    except ConfigError as error:
        raise ConfigError(
            f"--against must name a public record: {error}",
            hint=f"{error.hint}; a preset is run beside another with --interleave",
        ) from error


def parse_options(assignments: Sequence[str]) -> dict[str, Any]:
    """sbatch's options from `mem=0` and `overcommit`."""
    pairs = [assignment.removeprefix("--").partition("=") for assignment in assignments]
    return {name: value if equals else True for name, equals, value in pairs}


def warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def show_json(content: object) -> None:
    print(json.dumps(content, indent=1))


def show_data(outcome: dict[str, Any], arguments: argparse.Namespace) -> int:
    """A data set that was made, and where it is."""
    if arguments.json:
        show_json(outcome)
    else:
        show_splits(outcome)
        print(outcome["data"])
    return 0


def show_splits(outcome: dict[str, Any]) -> None:
    """What each split comes to: bytes as the documents were given, where they are known, and as scores count them."""
    for name, split in outcome["splits"].items():
        raw = "" if split["raw_bytes"] is None else f"{split['raw_bytes']:>16,} raw bytes"
        print(
            f"{name:5} {split['documents']:>10,} documents {split['tokens']:>15,} tokens"
            f"{raw}{split['counted_bytes']:>16,} counted bytes"
        )
    for note in outcome.get("notes", []):
        print(f"note: {note}", file=sys.stderr)


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
    from orchestrator.study import is_preset

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


def tell_damage(damage: Sequence[str]) -> int:
    """Name the files that could not be read, after all else was shown; the exit code says that something is missing."""
    for place in damage:
        print(f"error: {place}", file=sys.stderr)
    if damage:
        print("hint: what these files hold is missing above; the rest stands", file=sys.stderr)
    return ProtocolError.exit_code if damage else 0


def command_name() -> str:
    """How this program can be called again: by its name where the shell would find it, else by its path."""
    program = Path(sys.argv[0])
    found = shutil.which("caddie")
    is_found = found is not None and program.exists() and Path(found).samefile(program)
    return shlex.quote(str(program.absolute())) if program.name == "caddie" and not is_found else "caddie"


# ---- the parser --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Tells a usage error as every other error is told, with the nearest name or the command's help as its remedy."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)|unrecognized arguments: (\S+)", message)
        word = (unknown[1] or unknown[3] or "") if unknown else ""
        known = re.findall(r"[\w-]+", unknown[2]) if unknown and unknown[2] else list(self._option_string_actions)
        near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"{self.prog} --help"
        print(f"error: {self.prog}: {message}\nhint: {remedy}", file=sys.stderr)
        self.exit(USAGE)


class Adder:
    """Adds commands to a parser, each with its sentence and an example."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(self, name: str, call: Command | None, sentence: str, example: str) -> argparse.ArgumentParser:
        parser = self.commands.add_parser(
            name, help=sentence, description=sentence[0].upper() + sentence[1:] + ".", epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if call is not None:
            parser.set_defaults(call=call, parser=parser)
            parser.add_argument(
                "--home", type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )  # in either place
        return parser


def make_parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="caddie",
        description="Sweeps and record attempts for budgeted language-model training.",
        epilog="example:\n  caddie demo\n  caddie study run studies/wd-qk-ttt-smoke.toml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"caddie {__version__}")
    top.add_argument(
        "--home", type=Path, metavar="DIR", help="where runs, data and views lie (default: CADDIE_HOME, or .caddie)"
    )
    commands = Adder(top)
    commands.add("demo", demo, "a real study on this machine's CPU, from text it has to a record table", "caddie demo")
    _add_data(commands)
    _add_study(commands)
    _add_run(commands)
    _add_replay(commands)
    _add_views(commands)
    return top


def _add_data(top: Adder) -> None:
    commands = Adder(top.add("data", None, "fetch, prepare and verify data sets", "caddie data fetch sp4096"))
    prepare = commands.add(
        "prepare", data_prepare, "text to tokenizer, shards and manifest",
        "caddie data prepare --corpus train.jsonl.xz --out books --vocab-size 4096",
    )  # fmt: skip
    prepare.add_argument("--corpus", nargs="+", default=[datasets.PYDOC], metavar="pydoc|FILE",
                         help="the documentation that Python carries (default), or JSON lines with a text, or plain text; also .xz, .gz, .zst")  # fmt: skip
    prepare.add_argument(
        "--out",
        default=datasets.PYDOC,
        metavar="NAME|DIR",
        help="name under CADDIE_HOME/data, or a folder (default: %(default)s)",
    )
    prepare.add_argument(
        "--vocab-size",
        type=int,
        default=datasets.PYDOC_VOCAB_SIZE,
        metavar="N",
        help="pieces of the tokenizer (default: %(default)s)",
    )
    prepare.add_argument("--tokenizer", metavar="MODEL", help="take this SentencePiece model instead of training one")
    share = prepare.add_mutually_exclusive_group()
    share.add_argument("--val-documents", type=int, metavar="N", help="number of documents kept for validation")
    share.add_argument("--val-frac", type=float, metavar="F", help="share of the documents kept for validation")
    prepare.add_argument("--shard-tokens", type=int, metavar="N", help="most tokens of a shard")
    _add_processes(prepare)
    _add_json(prepare)
    _add_fetch(commands)
    verify = commands.add(
        "verify", data_verify, "read a data set again, whole: checksums, counts, bytes, disjointness",
        "caddie data verify books --corpus train.jsonl.xz",
    )  # fmt: skip
    verify.add_argument("data", metavar="NAME|DIR")
    verify.add_argument(
        "--corpus", nargs="+", metavar="pydoc|FILE",
        help="what it was prepared from: count the documents' own bytes again, without tokens",
    )  # fmt: skip
    _add_processes(verify)
    _add_json(verify)


def _add_fetch(commands: Adder) -> None:
    fetch = commands.add(
        "fetch", data_fetch, "a published export from the Hugging Face hub; goes on where it ended",
        "caddie data fetch sp4096 --train-shards 80",
    )  # fmt: skip
    fetch.add_argument("variant", metavar="VARIANT", help="as the export's folder ends: sp1024, sp4096, sp8192, ...")
    fetch.add_argument(
        "--train-shards", type=int, default=hub.TRAIN_SHARDS, metavar="N",
        help="first N training shards (default: %(default)s); validation always comes whole",
    )  # fmt: skip
    fetch.add_argument("--repo", metavar="OWNER/NAME", help="the hub's data set (default: the one that records use)")
    fetch.add_argument("--revision", metavar="COMMIT", help="branch, tag or commit (default: the newest)")
    fetch.add_argument("--prefix", metavar="DIR", help="the export's folder, where the repository has several")
    fetch.add_argument(
        "--out", metavar="NAME|DIR", help="name under CADDIE_HOME/data, or a folder (default: fineweb-VARIANT)"
    )
    _add_json(fetch)


def _add_study(top: Adder) -> None:
    commands = Adder(
        top.add(
            "study",
            None,
            "search: run, continue, look at and stop studies",
            "caddie study run studies/wd-qk-ttt-smoke.toml",
        )
    )
    for name, call, sentence in (
        ("check", study_check, "check a study completely and submit nothing"),
        ("run", study_run, "run a study, or continue it to its total budget"),
    ):
        parser = commands.add(name, call, sentence, f"caddie study {name} studies/wd-qk-ttt-smoke.toml")
        parser.add_argument("file", type=Path, metavar="FILE", help="a study file, or the name of a shipped one")
        if name == "check":
            _add_json(parser)
        else:
            parser.add_argument(
                "--dry-run", action="store_true", help="print the plan, its hours and its price, and submit nothing"
            )
            parser.add_argument(
                "--until",
                default="",
                metavar="RUNG",
                help="of a ladder: end after this rung; without it, after the last",
            )
            _add_controller(parser)
    _add_enqueue(commands)
    for name, call, sentence in (
        ("status", study_status, "where a study stands"),
        ("stop", study_stop, "end a study after its running jobs"),
    ):
        parser = commands.add(name, call, sentence, f"caddie study {name} wd-qk-ttt-smoke")
        parser.add_argument("study", metavar="STUDY", help="a study's name")
        if name == "status":
            _add_json(parser)
        else:
            parser.add_argument("--cancel", action="store_true", help="stop the running jobs as well")
    _add_json(commands.add("list", study_list, "every study and where it stands", "caddie study list"))


def _add_enqueue(commands: Adder) -> None:
    parser = commands.add(
        "enqueue", study_enqueue, "try a point next: by hand, or as another study, record, preset or run had it",
        "caddie study enqueue wd-qk-ttt-smoke --set model.qk_gain=4.5",
    )  # fmt: skip
    parser.add_argument("study", metavar="STUDY", help="a study's name, or its file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KNOB=VALUE",
        help="a knob of the point; may be repeated, the others are the preset's",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="source", metavar="SOURCE",
        help="a study's best trials (STUDY, or STUDY:trial-3), an imported record (imports/NAME), a preset or a run",
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=1, metavar="N", help="so many of another study's best trials")


def _add_run(top: Adder) -> None:
    parser = top.add(
        "run", run, "a record attempt: one configuration on several seeds",
        f"caddie run pr1326 --seeds {RECORD_SEEDS} --set optim.muon_weight_decay=0.08 --data fineweb-sp4096 --gpus 8",
    )  # fmt: skip
    parser.add_argument("preset", nargs="?", metavar="PRESET", help="a shipped preset, or a TOML file")
    parser.add_argument(
        "--from", dest="from_run", metavar="RUN,RUN",
        help="train nothing: score the stored models of these runs, or of a study's, with other knobs of ttt, evaluation or quant",
    )  # fmt: skip
    parser.add_argument(
        "--seeds",
        metavar="N,N,N",
        help=f"default: {RECORD_SEEDS}; with --from the runs' own",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KNOB=VALUE", help="change a knob; may be repeated"
    )
    parser.add_argument(
        "--data", metavar="NAME|DIR", help=f"data set (default: {datasets.PYDOC}; with --from the run's own)"
    )
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs of one run; 0 runs on the CPU (default)")
    parser.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="runs at a time on the CPU; in Slurm jobs at a time (default: every seed)",
    )
    parser.add_argument(
        "--timeout-minutes", type=float, metavar="MINUTES",
        help="end an attempt after this (default: 60; in Slurm the budgets of training and evaluation, and a margin)",
    )  # fmt: skip
    _add_cluster(parser)
    parser.add_argument("--name", help="name of the record (default: from what is asked)")
    _add_interleave(parser)
    _add_controller(parser)


def _add_replay(top: Adder) -> None:
    parser = top.add(
        "replay", replay, "somebody's own script as a record attempt, its numbers beside its folder's claim",
        "caddie replay parameter-golf/records/track_10min_16mb/2026-03-17_NaiveBaseline --data fineweb-sp1024 --gpus 8",
    )  # fmt: skip
    parser.add_argument("script", type=Path, metavar="SCRIPT|DIR", help="a script, or a folder with a train_gpt.py")
    parser.add_argument("--look", action="store_true", help="only tell which variables it looks at, by its text")
    parser.add_argument("--seeds", metavar="N,N,N", help=f"default: {RECORD_SEEDS}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="set a variable (MUON_WD=0.09), or a limit of the orchestrator's (limits.eval_seconds=600); may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--as-logged",
        action="store_true",
        help="take the settings that the record's logs have otherwise than the script",
    )
    parser.add_argument(
        "--data", metavar="NAME|DIR",
        help=f"data set, or a folder that has datasets/ and tokenizers/ as the challenge lays them out (default: {datasets.PYDOC})",
    )  # fmt: skip
    parser.add_argument(
        "--stage", choices=STAGES, help="take the score at this stage (default: the claim's, else the last in its text)"
    )
    parser.add_argument(
        "--against", metavar="DIR", help="compare with this record (default: the one of the script's own folder)"
    )
    parser.add_argument(
        "--gpus", type=int, default=0, metavar="N", help="GPUs of one run, under torchrun; 0 runs on the CPU"
    )
    parser.add_argument("--slots", type=int, metavar="N", help="runs at a time on the CPU; in Slurm jobs at a time")
    parser.add_argument("--timeout-minutes", type=float, metavar="MINUTES", help="end an attempt after this")
    _add_cluster(parser)
    parser.add_argument("--name", help="name of the record (default: from what is asked)")
    _add_controller(parser)
    _add_json(parser)


def _add_interleave(parser: argparse.ArgumentParser) -> None:
    """A candidate beside the preset."""
    group = parser.add_argument_group("beside another configuration, by turns on one node")
    group.add_argument(
        "--interleave", action="store_true", help="run preset and candidate by turns, seed by seed, ABBA"
    )
    group.add_argument(
        "--against", metavar="PRESET|DIR",
        help="with --interleave the candidate, a preset or a TOML file; without it a public record, by its folder or as it was "
        "imported: its numbers are put beside the run's",
    )  # fmt: skip
    group.add_argument(
        "--set-against", action="append", default=[], metavar="KNOB=VALUE", help="change a knob of the candidate alone"
    )
    group.add_argument(
        "--max-gap",
        type=float,
        metavar="SHARE",
        help="most by which a block's steps per second may differ (default: 0.02)",
    )
    group.add_argument(
        "--throughput", choices=("equal", "median"),
        help="what a block's speeds are compared with: one another (default), or the median block's ratio",
    )  # fmt: skip


def _add_controller(parser: argparse.ArgumentParser) -> None:
    """Where the controller itself runs."""
    parser.add_argument(
        "--detach", action="store_true", help="go on without this terminal, as a process of its own on this machine"
    )
    parser.add_argument(
        "--as-job", action="store_true", help="go on as a job of the cluster (Slurm), which queues its own successor"
    )
    parser.add_argument(
        "--job-options", default="", metavar="OPTIONS",
        help="for sbatch with --as-job: --job-options='--partition=cpu --time=12:00:00'",
    )  # fmt: skip


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    """Where runs go, as in a study's [resources]."""
    group = parser.add_argument_group("on a cluster")
    group.add_argument(
        "--launcher", choices=("local", "slurm"), help="this machine (default), or a job of Slurm's for each run"
    )
    group.add_argument("--nodes", type=int, metavar="N", help="nodes of one run; --gpus are the run's, on all of them")
    for name, words in (
        ("partition", "partition of the cluster"),
        ("account", "account that pays"),
        ("qos", "quality of service"),
        ("constraint", "features that a node must have"),
        ("python", "interpreter of the trainer on the nodes (default: caddie's own)"),
    ):
        group.add_argument(f"--{name}", metavar="NAME" if name != "python" else "PATH", help=words)
    group.add_argument("--exclusive", action="store_true", help="share the nodes with no other job")
    group.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION[=VALUE]",
        help="further options of sbatch by their long names; may be repeated",
    )  # fmt: skip


def _add_views(top: Adder) -> None:
    parser = top.add("report", report, "record table, page and data of a study", "caddie report wd-qk-ttt-smoke")
    parser.add_argument("study", metavar="STUDY")
    parser.add_argument(
        "--against", metavar="B", help="compare with this, as `caddie compare` takes it (default: the study's preset)"
    )
    parser.add_argument(
        "--gate", action="append", default=[], metavar="NAME",
        help="apply this rule alone; may be repeated (default: the challenge's rules)",
    )  # fmt: skip
    _add_json(parser)
    _add_compare(top)
    _add_verify(top)
    _add_records(top)
    parser = top.add(
        "costs", costs, "GPU-hours and price by study, purpose and phase, and what an accepted improvement cost",
        "caddie costs wd-qk-ttt-smoke",
    )  # fmt: skip
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="default: every study")
    _add_json(parser)
    parser = top.add("ui", ui, "MLflow's pages on what has been run", f"caddie ui --port {UI_PORT}")
    parser.add_argument(
        "--host", default=UI_HOST, help="address to listen on (default: %(default)s, this machine only)"
    )
    parser.add_argument("--port", type=int, default=UI_PORT, help="default: %(default)s")
    parser = top.add("track", track, "bring MLflow up to date with the run directories", "caddie track --rebuild")
    parser.add_argument("--rebuild", action="store_true", help="make MLflow's database again from nothing")
    _add_json(
        top.add("doctor", doctor, "what this machine can do, what is missing, and what mends it", "caddie doctor")
    )


def _add_compare(top: Adder) -> None:
    parser = top.add(
        "compare", compare, "one arm against another: which rule is met, by how much, and how many seeds are missing",
        "caddie compare wd-qk-ttt-smoke wd-qk-ttt-smoke:preset --paired",
    )  # fmt: skip
    arm = (
        "a study (its best point) or STUDY:ARM, RUN[,RUN...], an imported record or a record's folder, a published record "
        "(pr1493), a score, or scores as N,N,N"
    )
    parser.add_argument("candidate", metavar="A", help=arm)
    parser.add_argument("baseline", metavar="B", help="what A should beat, in the same words")
    parser.add_argument(
        "--gate", action="append", default=[], metavar="NAME",
        help="apply this rule alone, and exit with 10 where it is not met; may be repeated (default: the challenge's rules)",
    )  # fmt: skip
    parser.add_argument("--paired", action="store_true", help="pair by seed, also where an arm is not ours")
    parser.add_argument("--stage", choices=STAGES, help="compare this stage (default: the last that the runs have)")
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="published split whose tokens and bytes turn nats into bits per byte: sp8192, ...",
    )
    _add_json(parser)


def _add_records(top: Adder) -> None:
    parser = top.add(
        "import", import_records, "record folders of others: their scores, where each stands, and a leaderboard of a tree of them",
        "caddie import parameter-golf/records",
    )  # fmt: skip
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a record's folder, or a tree of them")
    parser.add_argument("--details", action="store_true", help="every record's seeds, with the line of each score")
    parser.add_argument("--csv", action="store_true", help="print the leaderboard as CSV")
    parser.add_argument("--no-mlflow", action="store_true", help="leave MLflow as it is; `caddie track` catches up")
    _add_json(parser)
    parser = top.add(
        "package", package_record, "the submission folder of a record, made from its runs and reviewed",
        "caddie package record-pr1326-1a2b3c4d --out my-record --author APlayer --github-id aplayer",
    )  # fmt: skip
    parser.add_argument("record", metavar="RECORD", help="a study's name, with :ARM for another than its best point")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--author", required=True, help="your name, as the leaderboard shows it")
    parser.add_argument("--github-id", required=True, metavar="ID", help="your name on GitHub")
    parser.add_argument("--name", default="", help="of the record (default: from its preset and knobs)")
    parser.add_argument("--blurb", default="", metavar="TEXT", help="what is new (default: the study's question)")
    parser.add_argument(
        "--track", default="", choices=("10min_16mb", "non_record_16mb"), metavar="TRACK",
        help="10min_16mb or non_record_16mb (default: by the hardware of its runs)",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true", help="score each seed's model file again in an empty directory first"
    )
    parser.add_argument("--data", metavar="NAME|DIR", help="another copy of the data set for --verify")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs for --verify (default: as the runs had)")
    parser.add_argument(
        "--timeout-minutes",
        type=float,
        default=60.0,
        metavar="MINUTES",
        help="of one evaluation (default: %(default)s)",
    )
    _add_json(parser)
    parser = top.add(
        "review", review_folder, "check a submission folder as its reader would: files, sizes, seeds, source, numbers",
        "caddie review parameter-golf/records/track_10min_16mb/2026-04-09_A2_Muon097_3Seed",
    )  # fmt: skip
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds that it needs (default: %(default)s)")
    _add_json(parser)


def _add_verify(top: Adder) -> None:
    parser = top.add(
        "verify", verify, "check a run's files, and score its artifact again in an empty directory without network",
        "caddie verify 3f2a --data fineweb-sp4096",
    )  # fmt: skip
    _add_examined(parser)
    parser = top.add(
        "audit", audit, "probe whether a run's scores mean what they say: causality, order, coverage, bytes, limits",
        "caddie audit 3f2a --sample 65536",
    )  # fmt: skip
    _add_examined(parser)
    parser.add_argument(
        "--sample", type=int, default=SAMPLE_POSITIONS, metavar="N",
        help="positions of the split that are probed (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (default: %(default)s)")
    parser.add_argument(
        "--no-evaluation", action="store_true", help="leave out the watched evaluation of the whole split"
    )


def _add_examined(parser: argparse.ArgumentParser) -> None:
    """The run that is looked at, and how its bundle is run for it."""
    parser.add_argument("run", metavar="RUN", help="a run's id, the beginning of one, or a run's directory")
    parser.add_argument("--data", metavar="NAME|DIR", help="another copy of the data set (default: the run's own)")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs to score on; 0 for the CPU (default: as the run had)"
    )
    parser.add_argument(
        "--timeout-minutes",
        type=float,
        default=60.0,
        metavar="MINUTES",
        help="end the evaluation after this (default: %(default)s)",
    )
    _add_json(parser)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, metavar="N", help="processes to work with (default: one a processor)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of text")


# ---- the entry ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; see `trainer.errors` and `orchestrator.errors`."""
    arguments, unknown = make_parser().parse_known_args(argv)
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.words = list(sys.argv[1:] if argv is None else argv)  # for a command that gives itself again
    try:
        home = Home(arguments.home.expanduser().resolve()) if arguments.home else default_home()
        code: int = arguments.call(arguments, home)
        sys.stdout.flush()
        return code
    except CaddieError as error:
        return fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, `head` say, had enough; nothing more may be flushed into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return fail(storage_error(error, Path(error.filename or ".")))


def fail(error: CaddieError) -> int:
    """Tell an error and its remedy; its exit code."""
    print(f"error: {error}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
