"""A data set laid out as scripts of the challenge look for one: `data/datasets/<name>/fineweb_*.bin`, `data/tokenizers`.

The files stay where they are and are linked to. A folder that others have prepared so already is taken as it is.
Standard library only: this runs inside a job.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import DataError
from trainer import protocol
from trainer.protocol import TRAIN, VALIDATION, DataDir, sha256_of, storage_error

DATASETS, TOKENIZERS = "datasets", "tokenizers"
SHARDS = {TRAIN: "fineweb_train_{:06d}.bin", VALIDATION: "fineweb_val_{:06d}.bin"}
VALIDATION_SHARDS = "fineweb_val_*.bin"

DATA_DIR, DATA_PATH, TOKENIZER_PATH, VOCAB_SIZE = VARIABLES = ("DATA_DIR", "DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE")
"""The variables by which scripts are told where their data are."""


def is_laid_out(folder: Path) -> bool:
    """Whether a folder has the layout already, without a manifest of ours."""
    return (folder / DATASETS).is_dir() and not DataDir(folder).manifest.exists()


def lay_out(data_dir: Path, work: Path) -> dict[str, str]:
    """Make the layout in a script's working folder; the variables that name it. Raises ProtocolError, StorageError."""
    data = work / "data"
    try:
        if is_laid_out(data_dir):
            _link(data, data_dir)
            return _variables_of(data_dir)
        return _link_all(DataDir(data_dir), data)
    except OSError as error:
        raise storage_error(error, data) from error


def _link_all(source: DataDir, data: Path) -> dict[str, str]:
    manifest = protocol.read_manifest(source.manifest)
    dataset = data / DATASETS / f"fineweb10B_sp{manifest.vocab_size}"
    tokenizer = data / TOKENIZERS / f"fineweb_{manifest.vocab_size}_bpe.model"
    for split, pattern in SHARDS.items():
        for number, shard in enumerate(manifest.splits[split].shards):
            _link(dataset / pattern.format(number), source.root / shard.file)
    _link(tokenizer, source.root / manifest.tokenizer)
    return {
        DATA_DIR: str(data), DATA_PATH: str(dataset), TOKENIZER_PATH: str(tokenizer), VOCAB_SIZE: str(manifest.vocab_size)
    }  # fmt: skip


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # another node of the run was here first
        os.symlink(target, path)


def _variables_of(folder: Path) -> dict[str, str]:
    """Of what lies in the layout only what it has one of: which of several is meant, the study must say."""
    datasets = [path for path in sorted((folder / DATASETS).iterdir()) if any(path.glob(VALIDATION_SHARDS))]
    tokenizers = sorted((folder / TOKENIZERS).glob("*.model"))
    found = {DATA_DIR: str(folder)}
    found |= {DATA_PATH: str(datasets[0])} if len(datasets) == 1 else {}
    return found | ({TOKENIZER_PATH: str(tokenizers[0])} if len(tokenizers) == 1 else {})


def validation_files(data_dir: Path) -> tuple[list[Path], Path] | None:
    """The validation shards in their order and the tokenizer; None where a folder has several of which a script takes one.

    Raises ProtocolError.
    """
    if is_laid_out(data_dir):
        found = _variables_of(data_dir)
        if not {DATA_PATH, TOKENIZER_PATH} <= found.keys():
            return None
        return sorted(Path(found[DATA_PATH]).glob(VALIDATION_SHARDS)), Path(found[TOKENIZER_PATH])
    source = DataDir(data_dir)
    manifest = protocol.read_manifest(source.manifest)
    shards = manifest.splits[VALIDATION].shards
    return [source.root / shard.file for shard in shards], source.root / manifest.tokenizer


def outline_sha256(folder: Path) -> str:
    """Identity of a folder without a manifest: names and sizes of its files, and what of them decides about scores.

    Raises DataError where it has no validation shards.
    """
    files = [path for part in (DATASETS, TOKENIZERS) for path in sorted((folder / part).rglob("*")) if path.is_file()]
    if not any(path.match(VALIDATION_SHARDS) for path in files):
        raise DataError(
            f"{folder / DATASETS}: no {VALIDATION_SHARDS} is in it, nor in its folders",
            hint="name the folder that has datasets/ and tokenizers/, or a data set of caddie's: caddie data fetch sp1024",
        )
    outline = [
        [path.relative_to(folder).as_posix(), path.stat().st_size, sha256_of(path) if _decides(path) else ""]
        for path in files
    ]
    return hashlib.sha256(json.dumps(outline).encode()).hexdigest()


def _decides(path: Path) -> bool:
    return path.match(VALIDATION_SHARDS) or path.suffix == ".model"
