"""What a tokenizer makes of a document, and which of its bytes are scored.

    given text ─► without marks ─► normalised, as the tokenizer does it ─► without one leading space = the scored text

The given text's UTF-8 bytes are the *raw bytes*, the scored text's are the *counted bytes*: the denominator of bits per
byte. The challenge's normalisation (NFKC, and runs of white space to one space) makes the second a little fewer. A space
at the start costs nothing by the challenge's rule, since no text stands before it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sentencepiece

from trainer.corpus import Batch, without_marks
from trainer.data import BOS, SPACE
from trainer.errors import DataError
from trainer.protocol import SPLITS, DataDir

# Dimensions: N tokens.

NORMALIZATION = "nmt_nfkc"  # the challenge's
KEY_BYTES = 32  # of a SHA-256


@dataclass(frozen=True)
class Document:
    """A document by its scored text."""

    key: bytes
    """SHA-256 of the scored text."""

    raw_bytes: int
    counted_bytes: int
    """Both as the text has them, without a look at any token."""


@dataclass(frozen=True)
class Encoded:
    """A batch's documents and their tokens, one after the other, BOS before each."""

    documents: list[Document]
    tokens_N: np.ndarray
    starts: list[int]
    """Place of each document's BOS."""


def scored_text(normalized: str) -> bytes:
    """The bytes that are scored of a text as SentencePiece normalised or decoded it."""
    return normalized.replace(SPACE, " ").removeprefix(" ").encode()


@dataclass(frozen=True)
class Reader:
    """Knows documents by their scored text; with a tokenizer's model, by that tokenizer's normalisation."""

    model: bytes | None = None

    @functools.cached_property
    def tokenizer(self) -> sentencepiece.SentencePieceProcessor:
        assert self.model is not None
        tokenizer = sentencepiece.SentencePieceProcessor()
        tokenizer.LoadFromSerializedProto(self.model)
        return tokenizer

    @functools.cached_property
    def _normalizer(self) -> Any:
        if self.model is not None:
            return self.tokenizer
        # Before 0.2.3 it kept extra spaces unless told otherwise, as no tokenizer does.
        return sentencepiece.SentencePieceNormalizer(
            rule_name=NORMALIZATION, add_dummy_prefix=False, remove_extra_whitespaces=True
        )

    def __call__(self, batch: Batch) -> list[Document]:
        """The documents of a batch; raises DataError."""
        return [self.document(text) for text in batch.texts()]

    def document(self, text: str) -> Document:
        scored = scored_text(self._normalizer.normalize(without_marks(text)))
        return Document(hashlib.sha256(scored).digest(), len(text.encode()), len(scored))


@dataclass(frozen=True)
class Encoder:
    """Turns documents into tokens."""

    reader: Reader

    def __call__(self, batch: Batch) -> Encoded:
        """The documents of a batch and their tokens; raises DataError."""
        texts = [without_marks(text) for text in batch.texts()]
        encoded = self.reader.tokenizer.encode(texts, num_threads=1)
        tokens_N = np.array([token for ids in encoded for token in (BOS, *ids)], dtype=np.uint16)
        starts = np.cumsum([0, *(len(ids) + 1 for ids in encoded)])[:-1].tolist()
        return Encoded(self.reader(batch), tokens_N, starts)


# ---- the list of documents ---------------------------------------------------------------------------------------


def line_of(split: str, document: Document) -> str:
    """A document's line in the list beside the shards."""
    return f"{split} {document.key.hex()} {document.raw_bytes} {document.counted_bytes}\n"


def read_listing(folder: DataDir) -> Mapping[str, list[Document]]:
    """The documents of each split, in the order of its shards; raises DataError with the line."""
    listed: dict[str, list[Document]] = {split: [] for split in SPLITS}
    with folder.documents.open(encoding="ascii", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                split, key, raw_bytes, counted_bytes = line.split()
                listed[split].append(Document(bytes.fromhex(key), int(raw_bytes), int(counted_bytes)))
                is_whole = len(key) == 2 * KEY_BYTES and line.endswith("\n")
            except (ValueError, KeyError):
                is_whole = False
            if not is_whole:
                raise DataError(
                    f"{folder.documents}:{number}: not a split, a sha256 and two numbers of bytes: {line.strip()[:60]!r}",
                    hint="prepare the data set again",
                )
    return listed
