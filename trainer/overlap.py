"""Documents that stand in two splits, found by their tokens; a data set's own list of documents is not asked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from trainer.data import BOS

# Dimensions: N tokens of a shard, D its documents, H tokens of a document's head.

HEAD_TOKENS = 32  # a document's first ones: only where these are a validation document's, the whole of it is compared
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no product loses a bit; 2^64 over the golden ratio
KEY_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What two splits have in common."""

    val_documents: int
    train_documents: int
    repeated: int
    """Training documents whose tokens are those of a validation document."""

    repeated_tokens: int
    first: int | None
    """Number of the first of them within the training split."""


def overlap(val_shards: Iterable[np.ndarray], train_shards: Iterable[np.ndarray]) -> Overlap:
    """Compare the documents of two splits, each a BOS and what follows it in its shard; empty ones are none."""
    keys: set[bytes] = set()
    heads: list[np.ndarray] = []
    for tokens_N in val_shards:
        starts_D, ends_D = bounds(tokens_N)
        heads.append(heads_of(tokens_N, starts_D, ends_D))
        keys.update(key_of(tokens_N, start, end) for start, end in zip(starts_D.tolist(), ends_D.tolist(), strict=True))
    known = np.unique(np.concatenate(heads)) if heads else np.zeros(0, dtype=np.uint64)
    train_documents, found = 0, list[tuple[int, int]]()
    for tokens_N in train_shards:
        starts_D, ends_D = bounds(tokens_N)
        found += [
            (train_documents + number, size) for number, size in _repeated(tokens_N, starts_D, ends_D, known, keys)
        ]
        train_documents += len(starts_D)
    return Overlap(
        val_documents=len(keys), train_documents=train_documents, repeated=len(found),
        repeated_tokens=sum(size for _, size in found), first=found[0][0] if found else None,
    )  # fmt: skip


def _repeated(
    tokens_N: np.ndarray, starts_D: np.ndarray, ends_D: np.ndarray, known: np.ndarray, keys: set[bytes]
) -> Iterator[tuple[int, int]]:
    """Number and tokens of each document of a shard that is one of the keys'."""
    for number in np.flatnonzero(np.isin(heads_of(tokens_N, starts_D, ends_D), known)).tolist():
        start, end = int(starts_D[number]), int(ends_D[number])
        if key_of(tokens_N, start, end) in keys:
            yield number, end - start


def bounds(tokens_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First token behind its BOS, and the one after the last, of each document that has any."""
    places = np.flatnonzero(tokens_N == BOS)
    starts_D, ends_D = places + 1, np.append(places[1:], len(tokens_N))
    has_text = ends_D > starts_D
    return starts_D[has_text], ends_D[has_text]


def heads_of(tokens_N: np.ndarray, starts_D: np.ndarray, ends_D: np.ndarray) -> np.ndarray:
    """A hash of each document's first tokens, uint64."""
    places_DH = starts_D[:, None] + np.arange(HEAD_TOKENS)
    is_inside_DH = places_DH < ends_D[:, None]
    tokens_DH = np.where(is_inside_DH, tokens_N[np.minimum(places_DH, len(tokens_N) - 1)], 0xFFFF).astype(np.uint64)
    heads_D = np.zeros(len(starts_D), dtype=np.uint64)
    for column in tokens_DH.T:
        heads_D = (heads_D ^ column) * FACTOR  # wraps around, as it should
        heads_D ^= heads_D >> np.uint64(29)
    return heads_D


def key_of(tokens_N: np.ndarray, start: int, end: int) -> bytes:
    return hashlib.blake2b(tokens_N[start:end].tobytes(), digest_size=KEY_BYTES).digest()
