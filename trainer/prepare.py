"""Text to a data set: documents, tokenizer, shards, manifest.

    corpus ─► documents, each once ─► train | validation by hash ─► tokenizer from train ─► shards ─► manifest

Documents are read and encoded by several processes; what comes out does not depend on how many. Everything is made in a
sibling folder and renamed into place.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import itertools
import os
import platform
import shutil
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

from trainer.corpus import PYDOC, Batch, corpus_bytes, read_batches, read_corpus
from trainer.data import BOS, HEADER_INTS, MAGIC, VERSION, TokenBytes, load_tokenizer
from trainer.documents import KEY_BYTES, NORMALIZATION, Document, Encoded, Encoder, Reader, line_of, read_listing
from trainer.errors import DataError
from trainer.pool import in_order, usable_processes
from trainer.protocol import (
    SPLITS,
    TRAIN,
    VALIDATION,
    DataDir,
    Manifest,
    Shard,
    Split,
    read_manifest,
    sha256_of,
    storage_error,
    write_manifest,
)

VAL_FRAC = 0.05
SHARD_TOKENS = 100_000_000  # the challenge's training shards
TOKENIZER_SETTINGS: dict[str, Any] = {  # the challenge's: openai/parameter-golf, data preparation
    "model_type": "bpe", "character_coverage": 0.999, "byte_fallback": True, "split_digits": True,
    "normalization_rule_name": NORMALIZATION, "add_dummy_prefix": False,
    "pad_id": 0, "bos_id": BOS, "eos_id": 2, "unk_id": 3,
}  # fmt: skip
LONGEST_SENTENCE = 1 << 30  # SentencePiece leaves out longer ones; its default would drop most documents
MAX_VOCAB_SIZE = 1 << 16  # shards hold uint16
PROGRESS_SECONDS = 2.0  # between two progress lines
SMALL_CORPUS_BYTES = 8_000_000  # read sooner by one process than others are started
HASH_SPACE = 1 << 8 * KEY_BYTES

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a data set is to be made of."""

    corpus: Sequence[str]
    """`pydoc`, or files: JSON lines with a `text`, plain text (one document a file), each also as .xz, .gz or .zst."""

    vocab_size: int
    tokenizer: Path | None = None
    """A SentencePiece model to take instead of training one."""

    val_frac: float = VAL_FRAC
    """Share of the documents that is kept for validation."""

    val_documents: int | None = None
    """Exact number of validation documents; goes before `val_frac`."""

    shard_tokens: int = SHARD_TOKENS
    """A shard is closed before the document that would take it beyond this."""

    processes: int | None = None
    """Processes that read and encode; by default as many as the machine lends, one for a small corpus."""

    def __post_init__(self) -> None:
        if not 8 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise DataError(f"vocab_size must be in [8, {MAX_VOCAB_SIZE}], shards hold uint16; got {self.vocab_size}")
        if not 0 < self.val_frac < 1:
            raise DataError(f"val_frac must lie between 0 and 1, got {self.val_frac}")
        if self.val_documents is not None and self.val_documents < 1:
            raise DataError(f"val_documents must be at least 1, got {self.val_documents}")
        if self.shard_tokens < 1:
            raise DataError(f"shard_tokens must be at least 1, got {self.shard_tokens}")
        if self.processes is not None and self.processes < 1:
            raise DataError(f"processes must be at least 1, got {self.processes}")
        if not self.corpus:
            raise DataError("a corpus is needed", hint=f"name {PYDOC!r}, or files of text")

    def workers(self) -> int:
        """The number of processes to work with."""
        is_small = corpus_bytes(self.corpus) < SMALL_CORPUS_BYTES
        return self.processes or (1 if is_small else usable_processes())


# ---- documents ---------------------------------------------------------------------------------------------------


class Progress:
    """Tells now and then how far a phase is."""

    def __init__(self, say: Say) -> None:
        self.say, self.told = say, time.monotonic()

    def tick(self, message: str) -> None:
        if time.monotonic() - self.told > PROGRESS_SECONDS:
            self.say(message)
            self.told = time.monotonic()


@dataclass
class Documents:
    """The distinct documents of a corpus, known by the hash of their scored text."""

    recipe: Recipe
    keys: bytearray = field(default_factory=bytearray)
    """Of every document of the corpus in its order, `KEY_BYTES` each."""

    is_kept: bytearray = field(default_factory=bytearray)
    """Of every document, 1 where it belongs to the data set: it is not empty, and the first of its key."""

    count: int = 0
    raw_bytes: int = 0
    counted_bytes: int = 0
    duplicates: int = 0
    empty: int = 0
    digest: str = ""
    """SHA-256 over the kept documents' keys in their order."""

    threshold: int = 0
    """Documents whose key is below it are for validation."""

    def survey(self, progress: Progress) -> None:
        """Read the corpus once: which documents there are, and where the splits part. Raises DataError."""
        seen: set[bytes] = set()
        reader = Reader(self.recipe.tokenizer.read_bytes() if self.recipe.tokenizer else None)
        for _, documents in in_order(reader, read_batches(self.recipe.corpus), self.recipe.workers()):
            for document in documents:
                is_new = document.counted_bytes > 0 and document.key not in seen
                self.keys += document.key
                self.is_kept.append(is_new)
                self.empty += not document.counted_bytes
                if is_new:
                    seen.add(document.key)
                    self.raw_bytes += document.raw_bytes
                    self.counted_bytes += document.counted_bytes
            progress.tick(f"reading: {len(seen):,} documents, {self.counted_bytes:,} bytes")
        self.count = len(seen)
        self.duplicates = len(self.is_kept) - self.count - self.empty
        self._part()

    def _part(self) -> None:
        running = hashlib.sha256()
        numbers = []
        for place in self.kept():
            running.update(self.key(place))
            numbers.append(int.from_bytes(self.key(place)))
        self.digest = running.hexdigest()
        numbers.sort()
        self.threshold = int(self.recipe.val_frac * HASH_SPACE)
        if self.recipe.val_documents is not None:
            kept = min(self.recipe.val_documents, len(numbers))
            self.threshold = numbers[kept] if kept < len(numbers) else HASH_SPACE
        validation = sum(number < self.threshold for number in numbers)
        if not 0 < validation < len(numbers):
            raise DataError(
                f"{len(numbers)} distinct documents give {validation} for validation and {len(numbers) - validation} for "
                "training; both need one",
                hint="give more documents (a plain text file is one document), or another --val-documents",
            )

    def kept(self) -> Iterator[int]:
        """Places in the corpus of the documents that belong to the data set."""
        return itertools.compress(range(len(self.is_kept)), self.is_kept)

    def key(self, place: int) -> bytes:
        return bytes(self.keys[KEY_BYTES * place : KEY_BYTES * (place + 1)])

    def split(self, place: int) -> str:
        return VALIDATION if int.from_bytes(self.key(place)) < self.threshold else TRAIN

    def training_texts(self) -> Iterator[str]:
        """The texts that a tokenizer may learn from."""
        texts = read_corpus(self.recipe.corpus)
        for is_kept, (place, text) in zip(self.is_kept, enumerate(texts), strict=False):
            if is_kept and self.split(place) == TRAIN:
                yield text


# ---- tokenizer ---------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train SentencePiece BPE with the challenge's settings; raises DataError where the text is too small for it."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, minloglevel=2,
            max_sentence_length=LONGEST_SENTENCE, num_threads=1, **TOKENIZER_SETTINGS,
        )  # fmt: skip
    except RuntimeError as error:
        raise DataError(
            f"the training text does not give a tokenizer of {vocab_size} pieces: {_last_sentence(error)}",
            hint="give more text, or a --vocab-size that the text can fill",
        ) from error
    return model.getvalue()


def _last_sentence(error: RuntimeError) -> str:
    """SentencePiece's reason without the place in its own source."""
    return str(error).rpartition("] ")[2] or str(error)


# ---- shards ------------------------------------------------------------------------------------------------------


class SplitWriter:
    """Writes the shards of one split."""

    def __init__(self, folder: DataDir, split: str, shard_tokens: int) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.shards: list[Shard] = []
        self.documents = self.counted_bytes = self._first = 0
        self._tokens = array("H")

    def add(self, tokens_N: np.ndarray, document: Document) -> None:
        """Append one document, BOS included."""
        if self._tokens and len(self._tokens) + len(tokens_N) > self.shard_tokens:
            self._close_shard()
        self._tokens.frombytes(tokens_N.tobytes())
        self.documents += 1
        self.counted_bytes += document.counted_bytes

    def finish(self) -> Split:
        self._close_shard()
        tokens = sum(shard.tokens for shard in self.shards)
        return Split(shards=tuple(self.shards), tokens=tokens, documents=self.documents, text_bytes=self.counted_bytes)

    def _close_shard(self) -> None:
        path = self.folder.shard(self.split, len(self.shards))
        content = shard_bytes(np.frombuffer(self._tokens, dtype=np.uint16))
        path.write_bytes(content)
        self.shards.append(
            Shard(
                file=path.name, tokens=len(self._tokens), bytes=len(content), sha256=hashlib.sha256(content).hexdigest(),
                first_document=self._first, documents=self.documents - self._first,
            )
        )  # fmt: skip
        self._first, self._tokens = self.documents, array("H")


def shard_bytes(tokens_N: np.ndarray) -> bytes:
    """A shard file: the challenge's header, then the tokens."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens_N)
    return header.tobytes() + tokens_N.astype("<u2").tobytes()


def write_shards(folder: DataDir, documents: Documents, progress: Progress) -> dict[str, Split]:
    """Encode every kept document, write it to a shard of its split and to the list of documents. Raises DataError."""
    recipe = documents.recipe
    table = TokenBytes(load_tokenizer(folder.tokenizer, recipe.vocab_size))
    writers = {split: SplitWriter(folder, split, recipe.shard_tokens) for split in SPLITS}
    encoder = Encoder(Reader(folder.tokenizer.read_bytes()))
    place = done = 0
    with folder.documents.open("w", encoding="ascii") as listing:
        for batch, encoded in in_order(encoder, read_batches(recipe.corpus), recipe.workers()):
            _require_unchanged(documents, place, encoded)
            counts = bytes_of_documents(table, encoded.tokens_N, encoded.starts)
            parts = np.split(encoded.tokens_N, encoded.starts[1:])
            for number, (tokens_N, document, counted) in enumerate(zip(parts, encoded.documents, counts, strict=True)):
                if documents.is_kept[place + number]:
                    _require_counted(counted, document, batch, number)
                    split = documents.split(place + number)
                    writers[split].add(tokens_N, document)
                    listing.write(line_of(split, document))
                    done += 1
            place += len(parts)
            progress.tick(f"encoding: {done:,} of {documents.count:,} documents")
    if place != len(documents.is_kept):
        raise _changed(f"{place} of {len(documents.is_kept)} documents were found again")
    return {split: writer.finish() for split, writer in writers.items()}


def _require_unchanged(documents: Documents, place: int, encoded: Encoded) -> None:
    keys = b"".join(document.key for document in encoded.documents)
    if keys != documents.keys[KEY_BYTES * place : KEY_BYTES * place + len(keys)]:
        raise _changed(f"not all of the documents {place} to {place + len(encoded.documents) - 1} are what they were")


def _changed(how: str) -> DataError:
    return DataError(
        f"the corpus changed while it was read: {how}", hint="run the command again when nothing writes to the corpus"
    )


def bytes_of_documents(table: TokenBytes, tokens_N: np.ndarray, starts: Sequence[int]) -> list[int]:
    """Bytes of each document's tokens by the rule that bits per byte are computed with; a document begins at each of
    `starts`, the first at 0."""
    tokens = torch.from_numpy(tokens_N.astype(np.int64))
    bytes_N = np.zeros(len(tokens_N), dtype=np.int64)  # nothing stands before the first token, a BOS
    bytes_N[1:] = table.bytes_of_targets(tokens[:-1], tokens[1:]).numpy()
    return np.add.reduceat(bytes_N, starts).tolist()


def _require_counted(counted: int, document: Document, batch: Batch, number: int) -> None:
    if counted != document.counted_bytes:
        raise DataError(
            f"{batch.place(number)}: the tokens of this document count {counted} bytes, its normalised text has "
            f"{document.counted_bytes}: {batch.texts()[number][:40]!r}",
            hint="take a tokenizer with byte fallback and without user-defined symbols that change the text",
        )


# ---- the whole ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` did."""

    manifest: Manifest
    raw_bytes: dict[str, int]
    """Bytes of each split's documents as they were given."""

    is_new: bool
    """False where the same data set stood there already."""


def prepare(recipe: Recipe, out: Path, *, say: Say) -> Prepared:
    """Make the data set `out`, or leave it alone where it is already that. Raises DataError, StorageError."""
    out = Path(out).resolve()
    progress = Progress(say)
    say(f"reading {', '.join(recipe.corpus)}")
    _require_model(recipe)
    documents = Documents(recipe)
    documents.survey(progress)
    say(
        f"{documents.count:,} documents, {documents.raw_bytes:,} bytes, {documents.counted_bytes:,} of them counted; "
        f"left out: {documents.duplicates} duplicates, {documents.empty} empty"
    )
    try:
        with _staging(out) as folder:
            if (existing := _existing(out, documents)) is not None:
                say(f"{out}: this data set is there already; left as it is")
                return Prepared(manifest=existing, raw_bytes=_raw_bytes(DataDir(out)), is_new=False)
            manifest = _make(folder, documents, progress)
            os.rename(folder.root, out)
    except OSError as error:
        raise storage_error(error, out) from error
    say(f"{out}: done")
    return Prepared(manifest=manifest, raw_bytes=_raw_bytes(DataDir(out)), is_new=True)


def _raw_bytes(folder: DataDir) -> dict[str, int]:
    listed = read_listing(folder)
    return {split: sum(entry.raw_bytes for entry in listed[split]) for split in SPLITS}


def _require_model(recipe: Recipe) -> None:
    if recipe.tokenizer is not None:
        load_tokenizer(recipe.tokenizer, recipe.vocab_size)


def _make(folder: DataDir, documents: Documents, progress: Progress) -> Manifest:
    recipe = documents.recipe
    if recipe.tokenizer is None:
        progress.say(f"training a tokenizer of {recipe.vocab_size} pieces")
        folder.tokenizer.write_bytes(train_tokenizer(documents.training_texts(), recipe.vocab_size))
    else:
        folder.tokenizer.write_bytes(recipe.tokenizer.read_bytes())
    progress.say("encoding")
    splits = write_shards(folder, documents, progress)
    manifest = Manifest(
        source=source_of(recipe), recipe=recipe_record(documents), tokenizer=folder.tokenizer.name,
        tokenizer_sha256=sha256_of(folder.tokenizer), vocab_size=recipe.vocab_size, splits=splits,
    )  # fmt: skip
    write_manifest(folder.manifest, manifest)
    return manifest


def source_of(recipe: Recipe) -> str:
    """The corpus in words; `pydoc` is the same only within one Python version."""
    python = f"documentation of CPython {platform.python_version()}"
    return ", ".join(python if name == PYDOC else Path(name).name for name in recipe.corpus)


def recipe_record(documents: Documents) -> dict[str, Any]:
    """Everything that decides the data set's content."""
    recipe = documents.recipe
    return {
        "documents_sha256": documents.digest,
        "documents": documents.count,
        "duplicates": documents.duplicates,
        "empty": documents.empty,
        "raw_bytes": documents.raw_bytes,
        "vocab_size": recipe.vocab_size,
        "tokenizer": sha256_of(recipe.tokenizer) if recipe.tokenizer else TOKENIZER_SETTINGS,
        "sentencepiece": sentencepiece.__version__,
        "val": recipe.val_documents or recipe.val_frac,
        "shard_tokens": recipe.shard_tokens,
    }


def _existing(out: Path, documents: Documents) -> Manifest | None:
    """The manifest of the data set at `out` where it has this recipe; raises DataError for anything else there."""
    if not out.exists():
        return None
    hint = "take another --out, or move it away"
    if not DataDir(out).manifest.is_file():
        if out.is_dir() and not any(out.iterdir()):
            return None
        raise DataError(f"{out}: exists and is not a data set", hint=hint)
    manifest = read_manifest(DataDir(out).manifest)
    if manifest.recipe != recipe_record(documents):
        raise DataError(f"{out}: another data set is there: {manifest.source}, {manifest.vocab_size} pieces", hint=hint)
    return manifest


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[DataDir]:
    """A sibling folder to write in, held by one process, emptied at the start and gone at the end unless renamed."""
    folder = out.with_name(f".{out.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{out}: another process is preparing it", hint="wait for it, then run the command again"
            ) from error
        try:
            for stale in folder.iterdir():
                stale.unlink()
            yield DataDir(folder)
        finally:
            if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def to_stderr(message: str) -> None:
    """A progress line."""
    print(message, file=sys.stderr, flush=True)
