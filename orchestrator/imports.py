"""Imported records: copies of what others published, with where each file came from and its hash.

The copies are the record; what they say is read from them each time (`public_record`). A file that is changed afterwards is
noticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.errors import CaddieError, ConfigError, ProtocolError
from orchestrator.evidence import ScoredArm
from orchestrator.home import Home, ImportDir
from orchestrator.public_record import PublicRecord, scored_arm
from orchestrator.record_folder import LOG_SUFFIXES, MOST_LOG_BYTES, read_record
from trainer.config import nearest
from trainer.protocol import read_json, sha256_of, storage_error, write_bytes_atomically, write_json_atomically

TRACKS = "track_"
"""Beginning of the names of the challenge's folders of records."""

KEPT_SUFFIXES = (*LOG_SUFFIXES, ".md", ".json", ".py", ".tsv", ".csv")
"""Files that say something of a record; others are only named, with their hash."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where an imported record came from."""

    name: str
    source: str
    """The folder that it was copied from."""

    commit: str
    """Of the checkout that the folder lies in; empty outside one."""

    time: float
    """Unix time of the import."""

    files: dict[str, str]
    """SHA-256 of every file in the folder, by its path in it."""

    kept: tuple[str, ...]
    """Those that were copied."""

    caddie: str = __version__

    @property
    def digest(self) -> str:
        """The same for the same files."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ImportedRecord:
    """A record in the home."""

    record: PublicRecord
    provenance: Provenance
    folder: ImportDir


def keep(home: Home, folder: Path) -> ImportedRecord:
    """Copy a record folder into the home; one that is there already with the same files stays. Raises StorageError."""
    found = _provenance(folder)
    place = _place(home, found)
    if not place.provenance.exists():
        _copy(folder, place, dataclasses.replace(found, name=place.name))
    return read(home, place.name)


def _provenance(folder: Path) -> Provenance:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}
    kept = tuple(name for name in files if _is_kept(folder / name))
    return Provenance(
        name=_slug(folder.resolve().name), source=str(folder.resolve()), commit=_commit(folder), time=time.time(),
        files=files, kept=kept,
    )  # fmt: skip


def _is_kept(path: Path) -> bool:
    return path.suffix in KEPT_SUFFIXES and path.stat().st_size <= MOST_LOG_BYTES


def _slug(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "record"


def _commit(folder: Path) -> str:
    """The commit that the folder is checked out at; empty where there is none."""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _place(home: Home, found: Provenance) -> ImportDir:
    """Where a record lies or goes: under its folder's name, or with a hash behind it where another has that name."""
    plain, hashed = home.imported(found.name), home.imported(f"{found.name}-{found.digest[:8]}")
    is_taken = plain.provenance.exists() and _read_provenance(plain).digest != found.digest
    return hashed if is_taken else plain


def _copy(folder: Path, place: ImportDir, provenance: Provenance) -> None:
    """All of it or nothing that counts: the provenance comes last."""
    try:
        shutil.rmtree(place.root, ignore_errors=True)
        for name in provenance.kept:
            write_bytes_atomically(place.files / name, (folder / name).read_bytes())
        os.makedirs(place.files, exist_ok=True)
    except OSError as error:
        raise storage_error(error, place.root) from error
    write_json_atomically(place.provenance, dataclasses.asdict(provenance))


def _read_provenance(place: ImportDir) -> Provenance:
    record: dict[str, Any] = read_json(place.provenance)
    try:
        return Provenance(**{**record, "kept": tuple(record["kept"])})
    except (KeyError, TypeError) as error:
        raise ProtocolError(
            f"{place.provenance}: this is no provenance: {error}", hint="import the record again"
        ) from error


def read(home: Home, name: str) -> ImportedRecord:
    """An imported record, read anew. Raises ProtocolError where a file of it is not what was imported."""
    place = home.imported(name)
    provenance = _read_provenance(place)
    for file in provenance.kept:
        path = place.files / file
        if not path.is_file() or sha256_of(path) != provenance.files[file]:
            raise ProtocolError(
                f"{path}: this is not the file that was imported from {provenance.source}",
                hint=f"delete {place.root} and import the record again",
            )
    record = dataclasses.replace(read_record(place.files, name=name), folder=provenance.source)
    return ImportedRecord(record=record, provenance=provenance, folder=place)


def read_all(home: Home) -> tuple[list[ImportedRecord], list[str]]:
    """Every imported record, and what could not be read."""
    found, problems = [], []
    for name in home.import_names():
        try:
            found.append(read(home, name))
        except CaddieError as error:
            problems.append(str(error))
    return found, problems


def find(home: Home, text: str) -> ImportedRecord:
    """An imported record by its name or a part of it that no other has. Raises ConfigError, ProtocolError."""
    names = home.import_names()
    met = [name for name in names if name == text] or [name for name in names if text and text in name]
    if len(met) == 1:
        return read(home, met[0])
    if met:
        raise ConfigError(f"{text!r} is a part of {len(met)} imported records", hint=f"there are: {', '.join(met)}")
    raise ConfigError(
        f"there is no imported record {text!r}", hint=nearest(text, names) if names else "caddie import DIR makes one"
    )


def track_of(imported: ImportedRecord) -> str:
    """The track that a record was published in: the folder that it lay in, else what its file says."""
    return track_name(Path(imported.provenance.source), imported.record)


def track_name(folder: Path, record: PublicRecord) -> str:
    """The same of a folder as it lies."""
    parent = folder.resolve().parent.name
    return parent if parent.startswith(TRACKS) else record.about.get("track", "") or "records"


def arm_of(home: Home, imported: ImportedRecord) -> ScoredArm:
    """The record as a comparison sees it, its places under CADDIE_HOME."""
    prefix = imported.folder.files.relative_to(home.root).as_posix()
    return scored_arm(imported.record, prefix=f"{prefix}/")
