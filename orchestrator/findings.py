"""Findings: the verdict that checks lead to, how a run's directory keeps it, and how people are shown it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator import __version__
from orchestrator.checks import DATA, FAILED, PASSED, UNDECIDED, Check, Value
from orchestrator.errors import DataError, ProtocolError
from trainer import protocol
from trainer.protocol import Failure, sha256_of

SHOWN_HASH = 12  # characters of a hash that tell two apart by eye
SHOWN_TEXT = 40


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found of one run, whatever it was examined for."""

    run_id: str
    verdict: str
    """passed, or failed."""

    checks: tuple[Check, ...]
    bundle_sha256: str | None
    """Of the file that was found, as the next; None where there was none."""

    artifact_sha256: str | None
    result_sha256: str | None
    """Of the result file whose claims were checked: an edited one has no verdict."""

    data_dir: str
    failure: Failure | None
    """Why the bundle gave no scores, with the end of its log."""

    wall_seconds: float
    time: float
    """Unix time at the end."""

    caddie: str = __version__

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == FAILED)

    @property
    def exit_code(self) -> int:
        """0; DataError's where only the data at hand are wrong, which says nothing against the run; else ProtocolError's."""
        if not self.failed:
            return 0
        is_about_data = all(check.name.startswith(DATA) for check in self.failed)
        return DataError.exit_code if is_about_data else ProtocolError.exit_code


def write(path: Path, found: Finding) -> None:
    """Keep a finding in a run's directory, whole; raises StorageError."""
    protocol.write_json_atomically(path, dataclasses.asdict(found))


def recorded_verdict(path: Path, result_file: Path, command: str) -> str:
    """The verdict in a record that `command` wrote; empty without one of this very result. Raises ProtocolError."""
    if not path.exists() or not result_file.exists():
        return ""
    record = protocol.read_json(path)
    verdict = record.get("verdict")
    if verdict not in (PASSED, FAILED) or "result_sha256" not in record:
        raise ProtocolError(
            f"{path}: this is no verdict on a run: its verdict is {verdict!r}", hint=f"make it again: {command}"
        )
    return str(verdict) if record["result_sha256"] == sha256_of(result_file) else ""


def shown(value: Value, check: Check) -> str:
    """A value in one column."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if isinstance(value, float):
        return f"{value:.7f}" if check.tolerance else f"{value:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    is_hash = len(value) == 64 and " " not in value
    return value[:SHOWN_HASH] + "…" if is_hash else value if len(value) <= SHOWN_TEXT else value[: SHOWN_TEXT - 1] + "…"


def check_table(checks: Sequence[Check], *, has_notes: bool = False) -> list[str]:
    """The lines of a table with a row a check; with its note, where that tells what was measured."""
    rows = [("Check", "Status", "Expected", "Found", "Tolerance", *(["Measured"] if has_notes else []))]
    for check in checks:
        tolerance = f"{check.tolerance:g}" if check.tolerance else ""
        values = ("≤ " * check.is_limit + shown(check.expected, check), shown(check.found, check), tolerance)
        rows.append((check.name, check.status, *values, *([check.note] if has_notes else [])))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "─" * max(map(len, lines)), *lines[1:]]


def failure_lines(found: Finding) -> list[str]:
    """Every failure in full, the bundle's own where it was run, then what could not be decided and why."""
    lines, failure = failed_lines(found.checks), found.failure
    if failure and failure.log:
        lines += ["the bundle's last words:", *(f"  {line}" for line in failure.log.splitlines())]
    return lines + undecided_lines(found.checks)


def failed_lines(checks: Sequence[Check]) -> list[str]:
    """Every failed check with its rule, values, place and remedy."""
    lines = []
    for check in checks:
        if check.status != FAILED:
            continue
        within = f" within {check.tolerance:g}" if check.tolerance else ""
        most = "at most " if check.is_limit else ""
        values = f"expected {most}{_full(check.expected)}{within}, found {_full(check.found)}"
        values += f"; {check.note}" if check.note else ""
        lines += [f"error: {check.name}: {check.rule}: {values} ({check.place})", f"hint: {check.remedy}"]
    return lines


def undecided_lines(checks: Sequence[Check]) -> list[str]:
    """What could not be decided, by its reason."""
    undecided_checks = [check for check in checks if check.status == UNDECIDED]
    return [
        f"note: undecided: {', '.join(check.name for check in undecided_checks if check.note == note)}: {note}"
        for note in dict.fromkeys(check.note for check in undecided_checks)
    ]


def _full(value: Value) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
