"""Text to a data set: documents, tokenizer, shards, manifest.

    corpus ─► normalised documents, each once ─► train | validation by hash ─► tokenizer from train ─► shards ─► manifest

Everything is made in a sibling folder and renamed into place.
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

from trainer.corpus import PYDOC, read_corpus
from trainer.data import BOS, HEADER_INTS, MAGIC, SPACE, VERSION, TokenBytes, load_tokenizer
from trainer.errors import DataError
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
NORMALIZATION = "nmt_nfkc"
TOKENIZER_SETTINGS: dict[str, Any] = {  # the challenge's: openai/parameter-golf, data preparation
    "model_type": "bpe", "character_coverage": 0.999, "byte_fallback": True, "split_digits": True,
    "normalization_rule_name": NORMALIZATION, "add_dummy_prefix": False,
    "pad_id": 0, "bos_id": BOS, "eos_id": 2, "unk_id": 3,
}  # fmt: skip
LONGEST_SENTENCE = 1 << 30  # SentencePiece leaves out longer ones; its default would drop most documents
MAX_VOCAB_SIZE = 1 << 16  # shards hold uint16
BATCH_DOCUMENTS = 256  # encoded at a time
PROGRESS_SECONDS = 2.0  # between two progress lines
HASH_SPACE = 1 << 256

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a data set is to be made of."""

    corpus: Sequence[str]
    """`pydoc`, or files: JSON lines with a `text`, plain text (one document a file), each also as .xz or .gz."""

    vocab_size: int
    tokenizer: Path | None = None
    """A SentencePiece model to take instead of training one."""

    val_frac: float = VAL_FRAC
    """Share of the documents that is kept for validation."""

    val_documents: int | None = None
    """Exact number of validation documents; goes before `val_frac`."""

    shard_tokens: int = SHARD_TOKENS
    """A shard is closed before the document that would take it beyond this."""

    def __post_init__(self) -> None:
        if not 8 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise DataError(f"vocab_size must be in [8, {MAX_VOCAB_SIZE}], shards hold uint16; got {self.vocab_size}")
        if not 0 < self.val_frac < 1:
            raise DataError(f"val_frac must lie between 0 and 1, got {self.val_frac}")
        if self.val_documents is not None and self.val_documents < 1:
            raise DataError(f"val_documents must be at least 1, got {self.val_documents}")
        if self.shard_tokens < 1:
            raise DataError(f"shard_tokens must be at least 1, got {self.shard_tokens}")
        if not self.corpus:
            raise DataError("a corpus is needed", hint=f"name {PYDOC!r}, or files of text")


# ---- documents ---------------------------------------------------------------------------------------------------


class Progress:
    """Tells now and then how far a phase is."""

    def __init__(self, say: Say) -> None:
        self.say, self.told = say, time.monotonic()

    def tick(self, message: str) -> None:
        if time.monotonic() - self.told > PROGRESS_SECONDS:
            self.say(message)
            self.told = time.monotonic()


class Normalizer:
    """A document's normalised text: what the tokenizer sees, with plain spaces. Its UTF-8 bytes are what is scored."""

    def __init__(self, model: Path | None) -> None:
        self._normalizer = (
            sentencepiece.SentencePieceProcessor(model_file=str(model))
            if model
            else sentencepiece.SentencePieceNormalizer(rule_name=NORMALIZATION, add_dummy_prefix=False)
        )

    def __call__(self, text: str) -> bytes:
        normalized: str = self._normalizer.normalize(text)
        return normalized.replace(SPACE, " ").encode()


@dataclass
class Documents:
    """The distinct documents of a corpus, known by the hash of their normalised text."""

    recipe: Recipe
    normalizer: Normalizer
    hashes: set[bytes] = field(default_factory=set)
    text_bytes: int = 0
    duplicates: int = 0
    empty: int = 0
    digest: str = ""
    """SHA-256 over the documents' hashes in their order."""

    threshold: int = 0
    """Documents whose hash is below it are for validation."""

    def survey(self, progress: Progress) -> None:
        """Read the corpus once: which documents there are, and where the splits part. Raises DataError."""
        running = hashlib.sha256()
        for text in read_corpus(self.recipe.corpus):
            normalized = self.normalizer(text)
            key = hashlib.sha256(normalized).digest()
            if not normalized:
                self.empty += 1
            elif key in self.hashes:
                self.duplicates += 1
            else:
                self.hashes.add(key)
                running.update(key)
                self.text_bytes += len(normalized)
            progress.tick(f"reading: {len(self.hashes):,} documents, {self.text_bytes:,} bytes")
        self.digest = running.hexdigest()
        self._part()

    def _part(self) -> None:
        numbers = sorted(int.from_bytes(key) for key in self.hashes)
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

    def __iter__(self) -> Iterator[tuple[str, str, bytes]]:
        """Yield (split, raw text, hash) of each distinct document, in the corpus's order."""
        seen: set[bytes] = set()
        for text in read_corpus(self.recipe.corpus):
            key = hashlib.sha256(self.normalizer(text)).digest()
            if key in self.hashes and key not in seen:
                seen.add(key)
                yield (VALIDATION if int.from_bytes(key) < self.threshold else TRAIN), text, key


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
        self.documents = self.text_bytes = self._first = 0
        self._tokens = array("H")

    def add(self, ids: list[int], text_bytes: int) -> None:
        """Append one document, BOS included."""
        if self._tokens and len(self._tokens) + len(ids) > self.shard_tokens:
            self._close_shard()
        self._tokens.extend(ids)
        self.documents += 1
        self.text_bytes += text_bytes

    def finish(self) -> Split:
        self._close_shard()
        tokens = sum(shard.tokens for shard in self.shards)
        return Split(shards=tuple(self.shards), tokens=tokens, documents=self.documents, text_bytes=self.text_bytes)

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


def _batches(documents: Iterable[tuple[str, str, bytes]]) -> Iterator[list[tuple[str, str, bytes]]]:
    remaining = iter(documents)
    while batch := list(itertools.islice(remaining, BATCH_DOCUMENTS)):
        yield batch


def write_shards(folder: DataDir, documents: Documents, progress: Progress) -> dict[str, Split]:
    """Encode every document, BOS before it, and write shards and the list of documents. Raises DataError."""
    tokenizer = load_tokenizer(folder.tokenizer, documents.recipe.vocab_size)
    table = TokenBytes(tokenizer)
    writers = {split: SplitWriter(folder, split, documents.recipe.shard_tokens) for split in SPLITS}
    done = 0
    with folder.documents.open("w", encoding="ascii") as listing:
        for batch in _batches(documents):
            encoded = tokenizer.encode([text for _, text, _ in batch], num_threads=os.cpu_count() or 1)
            for (split, text, key), ids in zip(batch, encoded, strict=True):
                text_bytes = len(documents.normalizer(text))
                _require_counted(table, ids, text_bytes, text)
                writers[split].add([BOS, *ids], text_bytes)
                listing.write(f"{split} {key.hex()}\n")
            done += len(batch)
            progress.tick(f"encoding: {done:,} of {len(documents.hashes):,} documents")
    if done != len(documents.hashes):
        raise DataError(
            f"the corpus changed while it was read: {done} of {len(documents.hashes)} documents were found again",
            hint="run the command again when nothing writes to the corpus",
        )
    return {split: writer.finish() for split, writer in writers.items()}


def counted_bytes(table: TokenBytes, ids: Iterable[int]) -> int:
    """Bytes of one document's tokens by the rule that bits per byte are computed with."""
    tokens_N = torch.tensor([BOS, *ids])
    return int(table.bytes_of_targets(tokens_N[:-1], tokens_N[1:]).sum())


def _require_counted(table: TokenBytes, ids: list[int], text_bytes: int, text: str) -> None:
    counted = counted_bytes(table, ids)
    if counted != text_bytes:
        raise DataError(
            f"the tokens of the document {text[:40]!r} count {counted} bytes, its normalised text has {text_bytes}",
            hint="take a tokenizer with byte fallback, without dummy prefix and with collapsed spaces",
        )


# ---- the whole ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` did."""

    manifest: Manifest
    is_new: bool
    """False where the same data set stood there already."""


def prepare(recipe: Recipe, out: Path, *, say: Say) -> Prepared:
    """Make the data set `out`, or leave it alone where it is already that. Raises DataError, StorageError."""
    out = Path(out).resolve()
    progress = Progress(say)
    say(f"reading {', '.join(recipe.corpus)}")
    _require_model(recipe)
    documents = Documents(recipe, Normalizer(recipe.tokenizer))
    documents.survey(progress)
    say(
        f"{len(documents.hashes):,} documents, {documents.text_bytes:,} bytes; "
        f"left out: {documents.duplicates} duplicates, {documents.empty} empty"
    )
    try:
        with _staging(out) as folder:
            if (existing := _existing(out, documents)) is not None:
                say(f"{out}: this data set is there already; left as it is")
                return Prepared(manifest=existing, is_new=False)
            manifest = _make(folder, documents, progress)
            os.rename(folder.root, out)
    except OSError as error:
        raise storage_error(error, out) from error
    say(f"{out}: done")
    return Prepared(manifest=manifest, is_new=True)


def _require_model(recipe: Recipe) -> None:
    if recipe.tokenizer is not None:
        load_tokenizer(recipe.tokenizer, recipe.vocab_size)


def _make(folder: DataDir, documents: Documents, progress: Progress) -> Manifest:
    recipe = documents.recipe
    if recipe.tokenizer is None:
        progress.say(f"training a tokenizer of {recipe.vocab_size} pieces")
        texts = (text for split, text, _ in documents if split == TRAIN)
        folder.tokenizer.write_bytes(train_tokenizer(texts, recipe.vocab_size))
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
        "documents": len(documents.hashes),
        "duplicates": documents.duplicates,
        "empty": documents.empty,
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
