"""Corpora: text from files, or the documentation that every Python carries, as documents in a fixed order."""

from __future__ import annotations

import ast
import functools
import gzip
import importlib
import json
import lzma
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from trainer.data import SPACE
from trainer.errors import DataError

PYDOC = "pydoc"

# Parts of the standard library whose texts are not documentation, or differ between builds of one Python version.
SKIPPED_FOLDERS = frozenset({
    "test", "tests", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages", "__pycache__",
})  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


def read_corpus(corpus: Sequence[str]) -> Iterator[str]:
    """Yield the documents' raw texts in a fixed order; raises DataError with file and line."""
    for name in corpus:
        texts: Iterable[str] = pydoc_documents() if name == PYDOC else file_documents(Path(name))
        for text in texts:
            yield text.replace(SPACE, " ").replace(
                "\0", " "
            )  # SentencePiece's own marks, as the challenge's preparation


@functools.cache  # read three times, parsed once
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


def file_documents(path: Path) -> Iterator[str]:
    """The documents of one file: each line's `text` of JSON lines, or the whole of a plain text."""
    inner = Path(path.stem) if path.suffix in (".xz", ".gz") else path
    try:
        with _open_text(path) as lines:
            if inner.suffix in (".jsonl", ".json", ".ndjson"):
                yield from _json_documents(lines, path)
            else:
                yield lines.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8: {error.reason} at byte {error.start}", hint="convert the file to UTF-8"
        ) from error
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(
            f"{path}: damaged or truncated {path.suffix[1:]}: {error}", hint="fetch the file again"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}", hint=f"name {PYDOC!r}, or files of text"
        ) from error


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _json_documents(lines: IO[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            text = json.loads(line)["text"]
            text.encode()  # JSON can spell half of a surrogate pair
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f'{path}:{number}: needs a JSON object with a "text": {line[:60].rstrip()!r}',
                hint="mend or delete the line",
            ) from error
        yield text
