"""The proof that a data set is what its manifest says: every shard read again, every document put together again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

from trainer.data import BOS, HEADER_BYTES, TokenBytes, load_tokenizer, read_shard
from trainer.errors import CaddieError, DataError
from trainer.prepare import Say
from trainer.protocol import SPLITS, TRAIN, VALIDATION, DataDir, Shard, Split, read_manifest, sha256_of

SPAN_TOKENS = 1 << 22  # counted at a time, to bound memory


def verify(data_dir: Path, *, say: Say) -> list[str]:
    """Every way in which the data set is not what its manifest says; empty where it is sound. Raises DataError,
    ProtocolError where there is no manifest to compare with."""
    folder = DataDir(Path(data_dir))
    if not folder.manifest.is_file():
        raise DataError(f"{folder.manifest}: there is no data set", hint="caddie data prepare makes one")
    manifest = read_manifest(folder.manifest)
    say(f"{folder.root}: {manifest.source}, {manifest.vocab_size} pieces")
    path = folder.root / manifest.tokenizer
    tokenizer = _collect(problems := [], lambda: load_tokenizer(path, manifest.vocab_size))
    if path.is_file() and sha256_of(path) != manifest.tokenizer_sha256:
        problems.append(f"{path}: changed bytes: its sha256 is not the manifest's")
    listed = _listed_documents(folder, problems)
    for name, split in manifest.splits.items():
        problems += _verify_totals(folder, name, split)
        if tokenizer is not None:
            problems += SplitCheck(folder, name, split, tokenizer, say=say).problems(listed[name])
    both = set(listed[TRAIN]) & set(listed[VALIDATION])
    if both:
        problems.append(f"{folder.documents}: {len(both)} documents are in both splits, the first is {min(both)}")
    return problems


def _collect(problems: list[str], read: Callable[[], Any]) -> Any:
    """What `read` returns, or None with its error among the problems."""
    try:
        return read()
    except CaddieError as error:
        problems.append(str(error))
        return None


def _listed_documents(folder: DataDir, problems: list[str]) -> dict[str, list[str]]:
    """The documents' hashes by split, as the list beside the shards names them."""
    listed: dict[str, list[str]] = {split: [] for split in SPLITS}
    if not folder.documents.is_file():
        problems.append(f"{folder.documents}: the list of documents is missing: disjointness cannot be proved")
        return listed
    with folder.documents.open(encoding="ascii", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            split, _, key = line.strip().partition(" ")
            if split not in listed or len(key) != 64:
                problems.append(f"{folder.documents}:{number}: not a split and a sha256: {line.strip()[:60]!r}")
                return listed
            listed[split].append(key)
    return listed


def _verify_totals(folder: DataDir, name: str, split: Split) -> list[str]:
    """Whether the manifest's shards add up to its totals and follow one another."""
    found, first = [], 0
    for shard in split.shards:
        if shard.first_document != first:
            found.append(
                f"{folder.manifest}: {shard.file} begins with document {shard.first_document}, must be {first}"
            )
        first += shard.documents
    tokens = sum(shard.tokens for shard in split.shards)
    if (tokens, first) != (split.tokens, split.documents):
        found.append(
            f"{folder.manifest}: the {name} shards hold {tokens} tokens and {first} documents, "
            f"the split says {split.tokens} and {split.documents}"
        )
    return found


@dataclass
class SplitCheck:
    """Reads every shard of a split again."""

    folder: DataDir
    name: str
    split: Split
    tokenizer: sentencepiece.SentencePieceProcessor
    say: Say

    def problems(self, listed: list[str]) -> list[str]:
        """What is wrong; `listed` are the hashes that the split's documents should have."""
        found: list[str] = []
        table = TokenBytes(self.tokenizer)
        hashes: list[str] = []
        text_bytes = 0
        for shard in self.split.shards:
            self.say(f"verifying {shard.file}")
            tokens_N = _collect(found, lambda shard=shard: self._checked(shard))  # type: ignore[misc]  # bound now
            if tokens_N is None:
                return found  # totals of a damaged split say nothing more
            text_bytes += _shard_bytes(table, tokens_N)
            hashes += self._hashes(tokens_N)
        if text_bytes != self.split.text_bytes:
            found.append(
                f"{self.folder.root}: the {self.name} tokens count {text_bytes} bytes, the manifest says {self.split.text_bytes}"
            )
        if listed and hashes != listed:
            found.append(f"{self.folder.documents}: the {self.name} documents are not the listed ones")
        return found

    def _checked(self, shard: Shard) -> np.ndarray:
        """The shard's tokens; raises DataError for the first thing that is wrong with them."""
        path = self.folder.root / shard.file
        tokens_N = read_shard(path, shard)
        if sha256_of(path) != shard.sha256:
            raise DataError(f"{path}: changed bytes: its sha256 is not the manifest's")
        above = np.flatnonzero(tokens_N >= self.tokenizer.vocab_size())
        if above.size:
            place = int(above[0])
            raise DataError(
                f"{path}: token {int(tokens_N[place])} at byte {HEADER_BYTES + 2 * place}, "
                f"the vocabulary has {self.tokenizer.vocab_size()}"
            )
        starts = int((tokens_N == BOS).sum())
        if starts != shard.documents or (starts and tokens_N[0] != BOS):
            raise DataError(
                f"{path}: {starts} document starts, the manifest says {shard.documents}, the first token included"
            )
        return tokens_N

    def _hashes(self, tokens_N: np.ndarray) -> list[str]:
        """SHA-256 of each document's text, put together again from its tokens."""
        starts = np.flatnonzero(tokens_N == BOS)
        hashes = []
        for start, end in zip(starts, [*starts[1:], len(tokens_N)], strict=True):
            text: str = self.tokenizer.decode(tokens_N[start + 1 : end].tolist())
            hashes.append(hashlib.sha256(text.encode()).hexdigest())
        return hashes


def _shard_bytes(table: TokenBytes, tokens_N: np.ndarray) -> int:
    """Bytes of a shard's tokens, by spans; its first is BOS and has none."""
    total = 0
    for start in range(0, len(tokens_N) - 1, SPAN_TOKENS):
        span = torch.from_numpy(tokens_N[start : start + SPAN_TOKENS + 1].astype(np.int64))
        total += int(table.bytes_of_targets(span[:-1], span[1:]).sum())
    return total
