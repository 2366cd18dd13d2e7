"""Data sets: found by name, read off their manifests, prepared and verified by the trainer in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainer
from orchestrator.errors import CaddieError, ConfigError, DataError, MachineError, ProtocolError, StorageError
from orchestrator.home import Home
from trainer.protocol import VALIDATION, DataDir, Manifest, Shard, read_manifest, require_types, sha256_of

PYDOC = "pydoc"
"""The data set that every machine can make: the documentation that CPython carries."""

PYDOC_VOCAB_SIZE = 1024

ERRORS: dict[str, type[CaddieError]] = {
    error.__name__: error for error in (CaddieError, ConfigError, DataError, ProtocolError, StorageError)
}
"""What the trainer's process can name."""


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A data set as its manifest describes it."""

    root: Path
    manifest: Manifest
    manifest_sha256: str

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size


def manifest_of(data_dir: Path) -> PreparedData:
    """Read a data set's manifest; raises DataError where there is none, ProtocolError where it is damaged."""
    path = DataDir(data_dir).manifest
    if not path.is_file():
        raise DataError(f"{data_dir}: there is no data set", hint="caddie data prepare makes one")
    manifest = read_manifest(path)
    for split in manifest.splits.values():
        for record in (manifest, split, *split.shards):
            require_types(record, path)
    return PreparedData(root=data_dir, manifest=manifest, manifest_sha256=sha256_of(path))


def names(home: Home) -> list[str]:
    """Names of the data sets under CADDIE_HOME; what a preparation is still writing begins with a dot."""
    return sorted(path.name for path in home.data.glob("[!.]*") if DataDir(path).manifest.is_file())


def find(home: Home, name_or_path: str) -> PreparedData:
    """The data set of a study; raises DataError that names the ones there are."""
    root = home.dataset(name_or_path)
    if DataDir(root).manifest.is_file():
        return manifest_of(root)
    known = names(home)
    remedy = f"caddie data prepare --out {name_or_path} --corpus ... makes one"
    raise DataError(
        f"there is no data set {name_or_path!r} at {root}",
        hint=f"there are: {', '.join(known)}; {remedy}" if known else remedy,
    )


def require_vocabulary(data: PreparedData, vocab_size: int) -> None:
    """Raise ConfigError where a model's vocabulary is not the data set's."""
    if data.vocab_size != vocab_size:
        raise ConfigError(
            f"model.vocab_size is {vocab_size}, the data set {data.root} has {data.vocab_size} pieces",
            hint=f"take another data set, or set model.vocab_size to {data.vocab_size}",
        )


def damage(data: PreparedData) -> str | None:
    """The first of the data set's files that is not what the manifest says, in words; None where all are.

    Sizes, and the content of what every run reads whole. The content of the training shards is left to `verify`.
    """
    for name, split in data.manifest.splits.items():
        for shard in split.shards:
            problem = _damage_of_shard(data.root / shard.file, shard, is_hashed=name == VALIDATION)
            if problem is not None:
                return problem
    path = data.root / data.manifest.tokenizer
    if not path.is_file():
        return f"{path}: the tokenizer is missing"
    if sha256_of(path) != data.manifest.tokenizer_sha256:
        return f"{path}: changed bytes: its sha256 is not the manifest's"
    return None


def _damage_of_shard(path: Path, shard: Shard, *, is_hashed: bool) -> str | None:
    if not path.is_file():
        return f"{path}: the shard is missing"
    size = path.stat().st_size
    if size != shard.bytes:
        state = "truncated" if size < shard.bytes else "too long"
        return f"{path}: the shard is {state}: {size:,} bytes, the manifest says {shard.bytes:,}"
    if is_hashed and sha256_of(path) != shard.sha256:
        return f"{path}: changed bytes: its sha256 is not the manifest's"
    return None


def require_sound(data: PreparedData) -> None:
    """Raise DataError where a file of the data set is missing, truncated or changed."""
    problem = damage(data)
    if problem is not None:
        raise DataError(
            problem,
            hint=f"put the file back, or move {data.root} away and prepare the data set again; "
            "caddie data verify tells all that is wrong",
        )


def ensure_pydoc(home: Home) -> PreparedData:
    """The data set `pydoc`, prepared where it is missing. Raises what `prepare` raises."""
    root = home.dataset(PYDOC)
    if not DataDir(root).manifest.is_file():
        prepare(["--corpus", PYDOC, "--out", str(root), "--vocab-size", str(PYDOC_VOCAB_SIZE)])
    return manifest_of(root)


def prepare(options: Sequence[str]) -> dict[str, Any]:
    """Run `python -m trainer prepare`; its progress goes to stderr. Returns what it made.

    Raises the trainer's DataError, ProtocolError or StorageError; MachineError where the trainer cannot run here.
    """
    return _trainer(["prepare", *options])


def verify(data_dir: Path) -> list[str]:
    """Read a data set again, whole; every way in which it is not what its manifest says. Raises as `prepare` does."""
    problems: list[str] = _trainer(["verify-data", str(data_dir)])["problems"]
    return problems


def _trainer(arguments: Sequence[str]) -> dict[str, Any]:
    source = str(Path(trainer.__file__).parent.parent)
    path = os.pathsep.join(part for part in (source, os.environ.get("PYTHONPATH", "")) if part)
    process = subprocess.run(
        [sys.executable, "-m", "trainer", *arguments, "--json"],
        stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    try:
        outcome: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise MachineError(
            f"the trainer ended with {process.returncode} and said nothing that can be read",
            hint="its own words are above; is it installed? pip install 'caddie[trainer]'",
        ) from error
    if "error" in outcome:
        raise ERRORS.get(outcome["kind"], CaddieError)(outcome["error"], hint=outcome["hint"])
    return outcome
