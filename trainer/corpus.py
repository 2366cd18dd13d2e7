"""Corpora: text from files, or the documentation that every Python carries, as documents in a fixed order."""

from __future__ import annotations

import ast
import functools
import gzip
import importlib
import json
import lzma
import platform
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trainer.data import SPACE
from trainer.errors import DataError

PYDOC = "pydoc"

COMPRESSIONS = {".xz": "lzma", ".gz": "gzip", ".zst": "compression.zstd"}
"""Modules of the standard library that open a file, by its suffix; the last came with Python 3.14."""

BATCH_BYTES = 1 << 20  # of records in one batch: hundreds of documents, a fraction of a second's work
BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"  # some programs begin a file with it

# Parts of the standard library whose texts are not documentation, or differ between builds of one Python version.
SKIPPED_FOLDERS = frozenset({
    "test", "tests", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages", "__pycache__",
})  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class Batch:
    """Consecutive records of one source, as they were read: whole plain texts, or lines of JSON with their numbers."""

    source: str
    records: list[bytes]
    lines: list[int] | None = None

    def place(self, number: int) -> str:
        """Where record `number` of this batch stands."""
        return f"{self.source}:{self.lines[number]}" if self.lines else self.source

    def texts(self) -> list[str]:
        """The documents as they were given; raises DataError with the place."""
        read = _text_of_json if self.lines else _decoded
        return [read(record, self.place(number)) for number, record in enumerate(self.records)]


def read_corpus(corpus: Sequence[str]) -> Iterator[str]:
    """Yield the documents' texts in a fixed order, as they are tokenised; raises DataError with file and line."""
    for batch in read_batches(corpus):
        yield from map(without_marks, batch.texts())


def without_marks(text: str) -> str:
    """A text without SentencePiece's own marks, as the challenge's preparation has it."""
    return text.replace(SPACE, " ").replace("\0", " ")


def read_batches(corpus: Sequence[str]) -> Iterator[Batch]:
    """Yield the corpus's records in a fixed order, read and not parsed; raises DataError with the file."""
    for name in corpus:
        if name == PYDOC:
            yield Batch(PYDOC, [text.encode() for text in pydoc_documents()])
        else:
            yield from _file_batches(Path(name))


@functools.cache  # read several times, parsed once
def pydoc_documents() -> tuple[str, ...]:
    """The documentation that CPython carries: each topic of `help()`, then each standard module's docstrings by name."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            "this Python has no pydoc_data.topics",
            hint="install the whole standard library, or give files as the corpus",
        ) from error
    root = Path(sysconfig.get_path("stdlib"))
    sources = sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    modules = [docstrings(path.read_bytes()) for name, path in sources if is_documented_module(name)]
    return (*(topics[name] for name in sorted(topics)), *modules)


def is_documented_module(name: str) -> bool:
    """Whether a file of the standard library, by its relative path, belongs to the corpus."""
    parts = name.split("/")
    return SKIPPED_FOLDERS.isdisjoint(parts) and not any(part.startswith(SKIPPED_PREFIXES) for part in parts)


def docstrings(source: bytes) -> str:
    """The docstrings of a module, its classes and functions, in the order of the source; nothing is imported."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates that are not Python yet
        return ""
    owners = [n for n in ast.walk(tree) if isinstance(n, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    owners.sort(key=lambda node: (node.lineno, node.col_offset))
    texts = [ast.get_docstring(node) for node in (tree, *owners)]
    return "\n\n".join(text for text in texts if text)


def corpus_bytes(corpus: Sequence[str]) -> int:
    """Bytes of the corpus's files as they lie there; those that are missing and `pydoc` have none."""
    return sum(Path(name).stat().st_size for name in corpus if name != PYDOC and Path(name).is_file())


def _file_batches(path: Path) -> Iterator[Batch]:
    inner = Path(path.stem) if path.suffix in COMPRESSIONS else path
    try:
        with _open_bytes(path) as content:
            if inner.suffix in (".jsonl", ".json", ".ndjson"):
                yield from _line_batches(content, str(path))
            else:
                yield Batch(str(path), [content.read()])
    except _damages() as error:
        raise DataError(
            f"{path}: damaged or truncated {path.suffix[1:]}: {error}", hint="fetch the file again"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}", hint=f"name {PYDOC!r}, or files of text"
        ) from error


def _damages() -> tuple[type[Exception], ...]:
    """What the decompressors that are loaded raise for a damaged file."""
    zstd = sys.modules.get(COMPRESSIONS[".zst"])
    return (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile, *([zstd.ZstdError] if zstd else []))


def _open_bytes(path: Path) -> IO[bytes]:
    if path.suffix not in COMPRESSIONS:
        return path.open("rb")
    try:
        library = importlib.import_module(COMPRESSIONS[path.suffix])
    except ImportError as error:
        raise DataError(
            f"{path}: reading {path.suffix} needs Python 3.14, this is {platform.python_version()}",
            hint=f"unzstd {path}, then name the file that this makes",
        ) from error
    opened: IO[bytes] = library.open(path, "rb")
    return opened


def _line_batches(lines: Iterable[bytes], source: str) -> Iterator[Batch]:
    """Batches of the lines that are not blank."""
    records: list[bytes] = []
    numbers: list[int] = []
    size = 0
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        records.append(line)
        numbers.append(number)
        size += len(line)
        if size >= BATCH_BYTES:
            yield Batch(source, records, numbers)
            records, numbers, size = [], [], 0
    if records:
        yield Batch(source, records, numbers)


def _decoded(record: bytes, place: str) -> str:
    try:
        return record.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8: {error.reason} at byte {error.start}", hint="convert the file to UTF-8"
        ) from error


def _text_of_json(record: bytes, place: str) -> str:
    line = _decoded(record, place)
    try:
        text = json.loads(line.removeprefix(BYTE_ORDER_MARK))["text"]
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: a text must be Unicode, character {error.start} of this one is half a surrogate pair, "
            f"{error.object[error.start]!a}",
            hint="write both halves, or U+FFFD in its place; it has no UTF-8 bytes that could be counted",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{place}: needs a JSON object with a "text": {line[:60].rstrip()!r}', hint="mend or delete the line"
        ) from error
    return text
