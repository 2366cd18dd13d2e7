"""Commands on what has been run: reported, compared, imported, packaged, reviewed, verified, audited."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import ConfigError, ProtocolError
from orchestrator.execution import show_report
from orchestrator.home import Home
from orchestrator.terminal import show_json, tell_damage, warn

if TYPE_CHECKING:
    from orchestrator.findings import Finding
    from orchestrator.leaderboard import Leaderboard
    from orchestrator.review import Review


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
