"""A record's folder: its logs, submission.json and README read together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator import submission
from orchestrator.attribution import assign
from orchestrator.disagreements import README, conflicts_of, doubts_of
from orchestrator.errors import ConfigError, ProtocolError
from orchestrator.places import lines_of
from orchestrator.public_log import LoggedRun, read_log
from orchestrator.public_record import Conflict, PublicRecord, file_seed
from orchestrator.submission import Claim, Submission

LOG_SUFFIXES = (".log", ".txt")
MOST_LOG_BYTES = 20_000_000
"""A larger file is no log of one run; the largest in merged records has a tenth of it."""


def is_record(folder: Path) -> bool:
    """Whether a folder is one record: it has a submission file, or a log of its own, at its top."""
    if any(folder.glob(submission.PATTERN)):
        return True
    return (folder / README).is_file() and any(path.suffix in LOG_SUFFIXES for path in folder.iterdir())


def find_records(folder: Path) -> list[Path]:
    """The record folders in a tree, or the folder itself. Raises ConfigError where there is none."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder", hint="name a record's folder, or a tree of them")
    if is_record(folder):
        return [folder]
    found: list[Path] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_dir()):
        if not any(path.is_relative_to(parent) for parent in found) and is_record(path):
            found.append(path)
    if not found:
        raise ConfigError(
            f"{folder}: no record is in it: no folder with a {submission.PATTERN}, or a {README} beside a log",
            hint="name a record's folder, or the records/ tree",
        )
    return found


def read_record(folder: Path, *, name: str = "") -> PublicRecord:
    """Read one record folder; what cannot be read is a note, and no reason to refuse the rest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".ipynb_checkpoints" not in path.parts)
    notes: list[str] = []
    claimed = _read_claims(folder, files, notes)
    logs = _distinct(list(_read_logs(folder, files, notes)), notes)
    seeds, conflicts = assign(logs, claimed)
    used = [log for seed in seeds for log in (seed.run, seed.scored) if log]
    others = tuple(log for log in logs if log not in used and (log.scores or log.has_trained))
    readme = _text(folder / README) if (folder / README).is_file() else ""
    notes += [] if readme else [f"there is no {README}"]
    record = PublicRecord(
        name=name or folder.resolve().name, folder=str(folder), about=claimed.about if claimed else {}, submission=claimed,
        seeds=tuple(seeds), others=others, disclosed=_disclosed(claimed, logs), conflicts=(), doubts=tuple(doubts_of(seeds)), notes=tuple(notes),
    )  # fmt: skip
    found = [*conflicts, *conflicts_of(record, readme)]
    return replace(record, conflicts=tuple(_with_lines(found, folder, claimed)))


def _read_claims(folder: Path, files: list[Path], notes: list[str]) -> Submission | None:
    path = submission.find_submission([path for path in files if path.parent == folder])
    if path is None:
        notes.append(f"there is no {submission.PATTERN}")
        return None
    try:
        return submission.read_submission(path, path.name)
    except ProtocolError as error:
        notes.append(str(error))
        return None


def _read_logs(folder: Path, files: list[Path], notes: list[str]) -> Iterator[LoggedRun]:
    for path in files:
        if path.suffix not in LOG_SUFFIXES or path.stat().st_size > MOST_LOG_BYTES:
            continue
        found = read_log(_text(path), path.relative_to(folder).as_posix())
        if len(found) > 1:
            notes.append(
                f"{found[0].file} has {len(found)} runs, from lines {', '.join(str(r.first_line) for r in found)}"
            )
        yield from found


def _distinct(logs: list[LoggedRun], notes: list[str]) -> list[LoggedRun]:
    """The runs without copies; of two the one whose file names its seed."""
    kept: dict[tuple[object, ...], LoggedRun] = {}
    for log in logs:
        known = kept.get(log.fingerprint)
        if known is None:
            kept[log.fingerprint] = log
            continue
        first, copy = (
            (log, known) if file_seed(log.file) is not None and file_seed(known.file) is None else (known, log)
        )
        kept[log.fingerprint] = first
        notes.append(f"{copy.file} has the same run as {first.file}")
    return list(kept.values())


def _disclosed(claimed: Submission | None, logs: list[LoggedRun]) -> tuple[tuple[int, Claim], ...]:
    if claimed is None:
        return ()
    scores = [score.bpb for log in logs for score in log.scores]
    submitted = {
        (seed, claim[submission.BPB].value) for seed, claim in claimed.seeds.items() if submission.BPB in claim
    }
    return tuple(
        (seed, claim) for seed, claim in claimed.elsewhere
        if (seed, claim.value) not in submitted and not any(claim.is_met_by(score) for score in scores)
    )  # fmt: skip


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _with_lines(conflicts: Sequence[Conflict], folder: Path, claimed: Submission | None) -> Iterator[Conflict]:
    """The conflicts with lines of submission.json in place of JSON pointers."""
    lines = lines_of(_text(folder / claimed.file)) if claimed else {}
    for conflict in conflicts:
        said = [(_line_of(place, claimed.file if claimed else "", lines), text) for place, text in conflict.said]
        yield replace(conflict, said=tuple(said))


def _line_of(place: str, file: str, lines: dict[str, int]) -> str:
    pointer = place.removeprefix(file) if file and place.startswith(f"{file}/") else ""
    return f"{file}:{lines[pointer]}" if pointer in lines and pointer else place
