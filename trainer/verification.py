"""The proof that a data set is what its manifest says: every shard read again, every document put together again.

The bytes that scores are divided by are counted three times, by ways that share nothing: from the tokens by the table that
the judge uses, from the text that the tokenizer makes of a document's tokens, and, where the corpus is given, from the
documents themselves.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import sentencepiece
import torch

from trainer.corpus import read_batches
from trainer.data import BOS, HEADER_BYTES, SPACE, TokenBytes, load_tokenizer, read_shard
from trainer.documents import Document, Reader, read_listing, scored_text
from trainer.errors import CaddieError, DataError
from trainer.pool import in_order, usable_processes
from trainer.prepare import Progress, Say, bytes_of_documents
from trainer.protocol import SPLITS, TRAIN, VALIDATION, DataDir, Manifest, Shard, Split, read_manifest, sha256_of
from trainer.publication import VARIANT, notes_on

# Dimensions: N tokens.

SPAN_TOKENS = 1 << 20  # of documents that are spelled in one task
SMALL_TOKENS = 4_000_000  # spelled sooner by one process than others are started
REPEATED_FRAC = 0.01
"""Crawled text repeats itself: so many of a published validation split's documents may be in the training split as well.
The leak of openai/parameter-golf#2127 took in four fifths of them."""

T = TypeVar("T")
Listing = Mapping[str, list[Document]]


@dataclass(frozen=True)
class SplitCount:
    """One split, as its shards have it."""

    documents: int
    tokens: int
    raw_bytes: int | None
    """Bytes of the documents as they were given; unknown for a published export."""

    counted_bytes: int
    """Bytes of the tokens, by the judge's table."""

    spelled_bytes: int
    """Bytes of the text that the tokens spell, without the table."""


@dataclass
class Verification:
    """What was found."""

    problems: list[str] = field(default_factory=list)
    """Every way in which the data set is not what its manifest says."""

    notes: list[str] = field(default_factory=list)
    splits: dict[str, SplitCount] = field(default_factory=dict)


def verify(data_dir: Path, *, say: Say, corpus: Sequence[str] = (), processes: int | None = None) -> Verification:
    """Read a data set again, whole, and, where it is given, the corpus that it was made of.

    Raises DataError, ProtocolError where there is no manifest to compare with, or the corpus cannot be read.
    """
    folder = DataDir(Path(data_dir))
    if not folder.manifest.is_file():
        raise DataError(f"{folder.manifest}: there is no data set", hint="caddie data prepare makes one")
    manifest = read_manifest(folder.manifest)
    say(f"{folder.root}: {manifest.source}, {manifest.vocab_size} pieces")
    found = Verification()
    path = folder.root / manifest.tokenizer
    tokenizer = _collect(found.problems, lambda: load_tokenizer(path, manifest.vocab_size))
    if path.is_file() and sha256_of(path) != manifest.tokenizer_sha256:
        found.problems.append(f"{path}: changed bytes: its sha256 is not the manifest's")
    listing = _listing(folder, manifest, found.problems)
    checks = [
        SplitCheck(folder, name, manifest.splits[name], manifest, tokenizer, listing, found, Progress(say))
        for name in (VALIDATION, TRAIN)
    ]
    for check in checks:
        check.read()
    if tokenizer is not None:
        val_keys: set[bytes] = set()
        for check in checks:
            check.spell(_processes(processes, check.split.tokens), val_keys)
        if VARIANT in manifest.recipe and checks[0].is_whole:
            tokens_N = np.concatenate(list(checks[0].tokens.values()))
            found.notes += notes_on(manifest, tokens_N, TokenBytes(tokenizer))
    if corpus and tokenizer is not None and listing is not None:
        reader = Reader(path.read_bytes())
        found.problems += corpus_problems(folder, listing, corpus, reader, processes or usable_processes(), say)
    found.splits = {name: found.splits[name] for name in SPLITS if name in found.splits}
    return found


def _processes(asked: int | None, tokens: int) -> int:
    return asked or (1 if tokens < SMALL_TOKENS else usable_processes())


def _collect(problems: list[str], read: Callable[[], T]) -> T | None:
    """What `read` returns, or None with its error among the problems."""
    try:
        return read()
    except CaddieError as error:
        problems.append(str(error))
        return None


# ---- the list of documents ---------------------------------------------------------------------------------------


def _listing(folder: DataDir, manifest: Manifest, problems: list[str]) -> Listing | None:
    """The list beside the shards, where it can be read; a published export has none."""
    if VARIANT in manifest.recipe:
        return None
    if not folder.documents.is_file():
        problems.append(f"{folder.documents}: the list of documents is missing: disjointness cannot be proved by it")
        return None
    listing = _collect(problems, lambda: read_listing(folder))
    if listing is None:
        return None
    both = {document.key for document in listing[TRAIN]} & {document.key for document in listing[VALIDATION]}
    if both:
        problems.append(f"{folder.documents}: {len(both)} documents are in both splits, the first is {min(both).hex()}")
    for name, documents in listing.items():
        if len(documents) != manifest.splits[name].documents:
            problems.append(
                f"{folder.documents}: lists {len(documents)} {name} documents, the manifest says "
                f"{manifest.splits[name].documents}"
            )
    return listing


def corpus_problems(
    folder: DataDir, listing: Listing, corpus: Sequence[str], reader: Reader, processes: int, say: Say
) -> list[str]:
    """Compare the list with the documents themselves, counted without any token; the way each of them differs."""
    problems: list[str] = []
    missing = {document.key: document for documents in listing.values() for document in documents}
    seen: set[bytes] = set()
    progress = Progress(say)
    for batch, documents in in_order(reader, read_batches(corpus), processes):
        for number, document in enumerate(documents):
            if document.counted_bytes == 0 or document.key in seen:
                continue
            seen.add(document.key)
            listed = missing.pop(document.key, None)
            if listed is None:
                problems.append(f"{batch.place(number)}: this document is not in the data set")
            elif listed != document:
                problems.append(
                    f"{batch.place(number)}: this document has {document.raw_bytes} raw and {document.counted_bytes} "
                    f"counted bytes, {folder.documents} says {listed.raw_bytes} and {listed.counted_bytes}"
                )
        progress.tick(f"reading the corpus: {len(seen):,} documents")
    if missing:
        first = min(missing).hex()
        problems.append(f"{folder.documents}: {len(missing)} documents are not in the corpus, the first is {first}")
    return problems


# ---- documents from tokens ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Some of a shard's tokens: begin ... end - 1."""

    path: Path
    begin: int
    end: int

    def tokens(self) -> np.ndarray:
        return np.memmap(self.path, dtype="<u2", mode="r", offset=HEADER_BYTES)[self.begin : self.end]


@dataclass(frozen=True)
class Span:
    """Consecutive whole documents of a split; the first may begin in one shard and end in the next."""

    parts: tuple[Part, ...]
    first_document: int
    is_cut: bool = False
    """Whether the last document goes on in a shard that is not at hand."""

    def place(self, offset: int) -> str:
        """File and byte of the token at `offset`."""
        for part in self.parts:
            if offset < part.end - part.begin:
                return f"{part.path}: byte {HEADER_BYTES + 2 * (part.begin + offset)}"
            offset -= part.end - part.begin
        raise IndexError(offset)


@dataclass(frozen=True)
class Spelled:
    """The documents of a span."""

    keys: list[bytes]
    starts: list[int]
    counted_bytes: list[int]
    spelled_bytes: list[int]


@dataclass(frozen=True)
class Speller:
    """Puts documents together again: the text that their tokens spell."""

    tokenizer: sentencepiece.SentencePieceProcessor

    @functools.cached_property
    def table(self) -> TokenBytes:
        return TokenBytes(self.tokenizer)

    @functools.cached_property
    def _lost(self) -> str:
        """The space that decoding takes off the front of a text, where it does."""
        return "" if self.tokenizer.decode([self.tokenizer.piece_to_id(SPACE)]) else " "

    def texts(self, documents: list[list[int]]) -> list[bytes]:
        """The scored text that each document's tokens spell, its BOS left out."""
        return [scored_text(self._lost + text) for text in self.tokenizer.decode(documents)]

    def __call__(self, span: Span) -> Spelled:
        torch.set_num_threads(1)  # other processes have the other processors
        tokens_N = np.concatenate([part.tokens() for part in span.parts])
        starts = np.flatnonzero(tokens_N == BOS).tolist()
        documents = [part[1:].tolist() for part in np.split(tokens_N, starts[1:])]
        tail = self._unfinished(documents[-1]) if span.is_cut else 0
        if tail:
            documents[-1] = documents[-1][:-tail]
        texts = self.texts(documents)
        spelled_bytes = [len(text) for text in texts]
        spelled_bytes[-1] += tail
        keys = [hashlib.sha256(text).digest() for text in texts]
        return Spelled(keys, starts, bytes_of_documents(self.table, tokens_N, starts), spelled_bytes)

    def _unfinished(self, ids: list[int]) -> int:
        """Number of byte tokens at the end: the character that they begin may be cut, each is one byte in any case."""
        count = 0
        while count < len(ids) and self.tokenizer.is_byte(ids[-1 - count]):
            count += 1
        return count


def plan_spans(
    folder: Path, shards: Iterable[Shard], tokens: Mapping[str, np.ndarray], *, crossing: bool
) -> Iterator[Span]:
    """Cut a split into spans; `tokens` of the shards that can be read. With `crossing`, documents cross shards."""
    parts: list[Part] = []
    first = number = 0
    for shard in shards:
        if shard.file not in tokens:
            if parts:
                yield Span(tuple(parts), first, is_cut=True)
            parts = []
            continue
        path = folder / shard.file
        starts_N = np.flatnonzero(tokens[shard.file] == BOS)
        number = shard.first_document
        begin = 0
        if not parts:
            if not starts_N.size:
                continue
            begin, first = int(starts_N[0]), number
        for place, start in enumerate(starts_N.tolist()):
            if start - begin >= SPAN_TOKENS:
                yield Span((*parts, Part(path, begin, start)), first)
                parts, begin, first = [], start, number + place
        parts.append(Part(path, begin, len(tokens[shard.file])))
        if not crossing:
            yield Span(tuple(parts), first)
            parts = []
    if parts:
        yield Span(tuple(parts), first, is_cut=True)


# ---- a split -----------------------------------------------------------------------------------------------------


@dataclass
class SplitCheck:
    """Reads every shard of a split again, and tells all that is wrong with it."""

    folder: DataDir
    name: str
    split: Split
    manifest: Manifest
    tokenizer: sentencepiece.SentencePieceProcessor | None
    listing: Listing | None
    found: Verification
    progress: Progress
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    """Of every shard whose tokens can be read, by its file."""

    @property
    def is_published(self) -> bool:
        return VARIANT in self.manifest.recipe

    @property
    def is_whole(self) -> bool:
        return len(self.tokens) == len(self.split.shards)

    def read(self) -> None:
        """Check the manifest's totals, and each shard but for its documents."""
        self._check_totals()
        for shard in self.split.shards:
            self.progress.say(f"verifying {shard.file}")
            tokens_N = self._mapped(shard)
            if tokens_N is not None and self._check_shard(shard, tokens_N):
                self.tokens[shard.file] = tokens_N

    def _mapped(self, shard: Shard) -> np.ndarray | None:
        return _collect(self.found.problems, lambda: read_shard(self.folder.root / shard.file, shard))

    def _check_totals(self) -> None:
        """Whether the manifest's shards add up to its totals and follow one another."""
        first = 0
        for shard in self.split.shards:
            if shard.first_document != first:
                self._tell(
                    self.folder.manifest, f"{shard.file} begins with document {shard.first_document}, must be {first}"
                )
            first += shard.documents
        tokens = sum(shard.tokens for shard in self.split.shards)
        if (tokens, first) != (self.split.tokens, self.split.documents):
            self._tell(
                self.folder.manifest,
                f"the {self.name} shards hold {tokens} tokens and {first} documents, the split says "
                f"{self.split.tokens} and {self.split.documents}",
            )

    def _check_shard(self, shard: Shard, tokens_N: np.ndarray) -> bool:
        """Check one shard's content; whether its documents can be read."""
        path = self.folder.root / shard.file
        if sha256_of(path) != shard.sha256:
            self._tell(path, "changed bytes: its sha256 is not the manifest's")
        starts = int((tokens_N == BOS).sum())
        if starts != shard.documents:
            self._tell(path, f"{starts} document starts, the manifest says {shard.documents}")
        is_first = shard.file == self.split.shards[0].file
        if (is_first or not self.is_published) and (not len(tokens_N) or tokens_N[0] != BOS):
            self._tell(path, f"byte {HEADER_BYTES}: must begin with token {BOS}, the start of a document")
        above_N = np.flatnonzero(tokens_N >= self.manifest.vocab_size)
        if above_N.size:
            place = int(above_N[0])
            self._tell(
                path,
                f"token {int(tokens_N[place])} at byte {HEADER_BYTES + 2 * place}, the vocabulary has "
                f"{self.manifest.vocab_size}; {above_N.size} such tokens",
            )
        return not above_N.size

    def spell(self, processes: int, val_keys: set[bytes]) -> None:
        """Put every document together again, and compare it with the list, the table and the other split.

        The validation split's documents are added to `val_keys`, the training split's are looked up there.
        """
        assert self.tokenizer is not None
        documents = tokens = counted_bytes = spelled_bytes = 0
        repeated: list[str] = []
        spans = plan_spans(self.folder.root, self.split.shards, self.tokens, crossing=self.is_published)
        for span, spelled in in_order(Speller(self.tokenizer), spans, processes):
            self._compare(span, spelled)
            documents += len(spelled.keys)
            counted_bytes += sum(spelled.counted_bytes)
            spelled_bytes += sum(spelled.spelled_bytes)
            if self.name == VALIDATION:
                val_keys.update(spelled.keys)
            else:
                repeated += [
                    span.place(start)
                    for key, start in zip(spelled.keys, spelled.starts, strict=True)
                    if key in val_keys
                ]
            self.progress.tick(f"spelling: {documents:,} of {self.split.documents:,} {self.name} documents")
        tokens = sum(len(tokens_N) for tokens_N in self.tokens.values())
        listed = self.listing[self.name] if self.listing else None
        raw_bytes = sum(document.raw_bytes for document in listed) if listed is not None else None
        self.found.splits[self.name] = SplitCount(documents, tokens, raw_bytes, counted_bytes, spelled_bytes)
        self._tell_repeated(repeated, len(val_keys))
        if self.is_whole and counted_bytes != self.split.text_bytes:
            self._tell(
                self.folder.root,
                f"the {self.name} tokens count {counted_bytes} bytes, the manifest says {self.split.text_bytes}",
            )

    def _compare(self, span: Span, spelled: Spelled) -> None:
        """Tell the first document of a span that the table counts otherwise than its text, and the first unlisted one."""
        counts = zip(spelled.counted_bytes, spelled.spelled_bytes, strict=True)
        wrong = [number for number, (counted, text) in enumerate(counts) if counted != text]
        if wrong:
            number = wrong[0]
            self._tell_document(
                span, spelled, number, len(wrong),
                f"its tokens count {spelled.counted_bytes[number]} bytes, their text has {spelled.spelled_bytes[number]}",
            )  # fmt: skip
        if self.listing is None:
            return
        first = span.first_document
        listed = self.listing[self.name][first : first + len(spelled.keys)]
        wrong = [
            number
            for number, (key, size) in enumerate(zip(spelled.keys, spelled.spelled_bytes, strict=True))
            if number >= len(listed) or (listed[number].key, listed[number].counted_bytes) != (key, size)
        ]
        if wrong:
            self._tell_document(span, spelled, wrong[0], len(wrong), f"not the one that {self.folder.documents} lists")

    def _tell_document(self, span: Span, spelled: Spelled, number: int, count: int, what: str) -> None:
        others = f"; {count - 1} more behind it" if count > 1 else ""
        self.found.problems.append(
            f"{span.place(spelled.starts[number])}: {self.name} document {span.first_document + number}: {what}{others}"
        )

    def _tell_repeated(self, repeated: list[str], val_documents: int) -> None:
        if not repeated:
            return
        words = f"{len(repeated)} training documents have the text of a validation document, the first at {repeated[0]}"
        is_usual = self.is_published and len(repeated) <= REPEATED_FRAC * val_documents
        (self.found.notes if is_usual else self.found.problems).append(words)

    def _tell(self, path: Path, what: str) -> None:
        self.found.problems.append(f"{path}: {what}")
