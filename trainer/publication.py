"""Shards that others published, as a data set of ours: read once, counted, and described by a manifest.

A published export cuts its stream of documents where a shard is full, so that a document may cross two shards; and its
texts are not at hand, so that there is no list of documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

from trainer.data import BOS, HEADER_BYTES, TokenBytes, load_tokenizer, read_shard
from trainer.errors import DataError
from trainer.pool import in_order, usable_processes
from trainer.prepare import Progress, Say
from trainer.protocol import SPLITS, TRAIN, VALIDATION, DataDir, Manifest, Shard, Split, sha256_of, write_manifest

# Dimensions: N tokens.

VARIANT = "variant"
"""Key of a recipe that names the published export; a data set prepared from text has none."""

STATED = "stated"
"""Key of a recipe: what the publisher's manifest says of the data set, as `docs_val` and `tokens_val`."""

SPAN_TOKENS = 1 << 22  # counted at a time, to bound memory
SMALL_BYTES = 20_000_000  # counted sooner by one process than others are started
WINDOW_TOKENS = 2048  # public scripts score whole windows of this length and leave the rest


@dataclass(frozen=True)
class Known:
    """What public logs say of a variant's validation split, in whole windows."""

    targets: int
    counted_bytes: int
    """Their loss and bits per byte imply it."""


KNOWN = {  # published records, March to April 2026: their logs' `val_tokens`, `val_loss` and `val_bpb`
    "sp1024": Known(62_021_632, 151_080_364),
    "sp4096": Known(45_508_608, 151_074_053),
    "sp8192": Known(40_540_160, 151_078_224),
}
LOG_BYTES = 8  # as far as counts from losses of eight digits may be off


def stream_bytes(table: TokenBytes, tokens_N: np.ndarray, previous: int | None = None) -> int:
    """Bytes that the tokens stand for; the first has some where `previous`, the token before it, is known."""
    total = 0
    for start in range(0, len(tokens_N), SPAN_TOKENS):
        span = torch.from_numpy(tokens_N[start : start + SPAN_TOKENS].astype(np.int64))
        if previous is not None:
            span = torch.cat((torch.tensor([previous]), span))
        total += int(table.bytes_of_targets(span[:-1], span[1:]).sum())
        previous = int(span[-1])
    return total


def against_known(variant: str, val_tokens_N: np.ndarray, table: TokenBytes) -> str | None:
    """How a validation split compares with the public logs of its variant, in words; None for a variant without any."""
    if variant not in KNOWN:
        return None
    known = KNOWN[variant]
    targets = (len(val_tokens_N) - 1) // WINDOW_TOKENS * WINDOW_TOKENS
    counted = stream_bytes(table, val_tokens_N[: targets + 1])
    counts = f"{targets:,} targets and {counted:,} bytes in whole windows of {WINDOW_TOKENS}"
    if targets == known.targets and abs(counted - known.counted_bytes) <= LOG_BYTES:
        return f"validation has {counts}, as the public logs of {variant}"
    return (
        f"validation has {counts}; the public logs of {variant} have {known.targets:,} and {known.counted_bytes:,}: "
        "scores on it do not compare with theirs"
    )


def notes_on(manifest: Manifest, val_tokens_N: np.ndarray, table: TokenBytes) -> list[str]:
    """How a published data set's validation split compares with public logs, and with what its publisher states."""
    validation = manifest.splits[VALIDATION]
    counts = {"docs_val": validation.documents, "tokens_val": validation.tokens}
    stated = manifest.recipe.get(STATED, {})
    known = against_known(str(manifest.recipe[VARIANT]), val_tokens_N, table)
    notes = [] if known is None else [known]
    return notes + [
        f"the publisher's manifest says {key} {stated[key]:,}, the validation shards have {counted:,}: ask which is meant"
        for key, counted in counts.items()
        if stated.get(key, counted) != counted
    ]


@dataclass(frozen=True)
class Counted:
    """One shard as it was found, and the bytes its tokens stand for."""

    shard: Shard
    counted_bytes: int


@dataclass(frozen=True)
class ShardCounter:
    """Reads and counts shards; `task` is a file and the token before its first, None for the split's first."""

    tokenizer: sentencepiece.SentencePieceProcessor

    def __call__(self, task: tuple[Path, int | None]) -> Counted:
        path, previous = task
        tokens_N = foreign_shard(path, self.tokenizer)
        if previous is None and (not len(tokens_N) or tokens_N[0] != BOS):
            raise DataError(f"{path}: a split must begin with token {BOS}, the start of a document")
        shard = Shard(
            file=path.name, tokens=len(tokens_N), bytes=path.stat().st_size, sha256=sha256_of(path), first_document=0,
            documents=int((tokens_N == BOS).sum()),
        )  # fmt: skip
        return Counted(shard, stream_bytes(TokenBytes(self.tokenizer), tokens_N, previous))


def foreign_shard(path: Path, tokenizer: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """The tokens of a shard that no manifest speaks of, mapped. Raises DataError where it is damaged or of another tokenizer."""
    size = path.stat().st_size if path.is_file() else 0
    tokens = max(0, size - HEADER_BYTES) // 2
    tokens_N = read_shard(
        path, Shard(file=path.name, tokens=tokens, bytes=size, sha256="", first_document=0, documents=0)
    )
    above = int(tokens_N.max(initial=0))
    if above >= tokenizer.vocab_size():
        raise DataError(
            f"{path}: token {above}, the tokenizer has {tokenizer.vocab_size()} pieces",
            hint="these shards are of another tokenizer",
        )
    return tokens_N


def adopt(
    root: Path, *, variant: str, source: str, recipe: Mapping[str, Any], stated: Mapping[str, int], say: Say
) -> tuple[Manifest, list[str]]:
    """Write the manifest of a folder that holds a tokenizer and shards by our names, and nothing else of ours.

    Returns it, and what is to be noted on it. Raises DataError for shards that are damaged
    or of another tokenizer.
    """
    folder = DataDir(root)
    tokenizer = foreign_tokenizer(folder.tokenizer)
    progress = Progress(say)
    splits = {split: _adopt_split(folder, split, tokenizer, progress) for split in SPLITS}
    manifest = Manifest(
        source=source, recipe={**recipe, VARIANT: variant, STATED: dict(stated)}, tokenizer=folder.tokenizer.name,
        tokenizer_sha256=sha256_of(folder.tokenizer), vocab_size=tokenizer.vocab_size(), splits=splits,
    )  # fmt: skip
    val_tokens_N = np.concatenate([read_shard(root / shard.file, shard) for shard in splits[VALIDATION].shards])
    write_manifest(folder.manifest, manifest)
    return manifest, notes_on(manifest, val_tokens_N, TokenBytes(tokenizer))


def foreign_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model of any size; raises DataError where bytes could not be counted with it."""
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path}: not a SentencePiece model", hint="only such variants can be used") from error
    return load_tokenizer(path, tokenizer.vocab_size())


def _adopt_split(
    folder: DataDir, split: str, tokenizer: sentencepiece.SentencePieceProcessor, progress: Progress
) -> Split:
    paths = _shards(folder, split)
    if not paths:
        raise DataError(
            f"{folder.shard(split, 0)}: the shard is missing: a data set needs both {TRAIN} and {VALIDATION}"
        )
    tasks = list(zip(paths, [None, *map(_last_token, paths)], strict=False))
    size = sum(path.stat().st_size for path in paths)
    processes = min(usable_processes(), len(tasks)) if size > SMALL_BYTES else 1
    shards: list[Shard] = []
    documents = counted_bytes = 0
    for _, counted in in_order(ShardCounter(tokenizer), tasks, processes):
        shards.append(dataclasses.replace(counted.shard, first_document=documents))
        documents += counted.shard.documents
        counted_bytes += counted.counted_bytes
        progress.tick(f"counting: {len(shards)} of {len(paths)} {split} shards")
    tokens = sum(shard.tokens for shard in shards)
    return Split(shards=tuple(shards), tokens=tokens, documents=documents, text_bytes=counted_bytes)


def _shards(folder: DataDir, split: str) -> list[Path]:
    """The split's shards that are there, up to the first gap."""
    paths: list[Path] = []
    while (path := folder.shard(split, len(paths))).is_file():
        paths.append(path)
    return paths


def _last_token(path: Path) -> int:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2))
        return int.from_bytes(file.read(2), "little")
