from __future__ import annotations

import gzip
import io
import json
import lzma
import sys
import types
from pathlib import Path
from typing import IO

import pytest
from make_data import write_jsonl

from trainer import corpus as corpus_module
from trainer.corpus import docstrings, is_documented_module, pydoc_documents, read_batches, read_corpus
from trainer.errors import DataError


def test_the_documents_of_json_lines_plain_and_compressed_files_are_read(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two"))
    plain, gz, xz, text = (tmp_path / name for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.txt.xz"))
    plain.write_text(lines)
    gz.write_bytes(gzip.compress(lines.encode()))
    xz.write_bytes(lzma.compress(lines.encode()))
    text.write_bytes(lzma.compress(b"first line\nsecond line"))
    found = list(read_corpus([str(path) for path in (plain, gz, xz, text)]))
    assert found == ["one", "two"] * 3 + ["first line\nsecond line"]


def test_the_marks_of_sentencepiece_in_a_text_are_read_as_spaces(tmp_path: Path) -> None:
    assert list(read_corpus([str(write_jsonl(tmp_path / "a.jsonl", ["a▁b\0c"]))])) == ["a b c"]


def test_blank_lines_and_a_byte_order_mark_are_passed_over_and_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n  \n{"text": "two"}')
    assert list(read_corpus([str(path)])) == ["one", "two"]
    path.write_bytes(b'{"text": "one"}\n\n\n{"txt": "two"}\n')
    with pytest.raises(DataError, match="a.jsonl:4: needs a JSON object"):
        list(read_corpus([str(path)]))


def test_a_text_keeps_its_line_ends_and_escaped_pairs_are_one_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83c\\udf89"}\n')
    assert list(read_corpus([str(tmp_path / "a.txt"), str(tmp_path / "a.jsonl")])) == ["one\r\ntwo\rthree\n", "🎉"]


def test_lines_come_in_batches_that_know_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "BATCH_BYTES", 30)
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three", "four", "five"])
    batches = list(read_batches([str(path)]))
    assert [batch.texts() for batch in batches] == [["one", "two"], ["three", "four"], ["five"]]
    assert batches[1].place(1) == f"{path}:4"


class FakeZstd(types.ModuleType):
    """What Python 3.14 has, as far as a corpus needs it."""

    class ZstdError(Exception):
        pass

    @staticmethod
    def open(path: Path, mode: str) -> IO[bytes]:
        content = path.read_bytes()
        if content == b"broken":
            raise FakeZstd.ZstdError("not a frame")
        return io.BytesIO(content)


def test_zst_is_read_where_python_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b'{"text": "one"}\n')
    for name in ("compression", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, FakeZstd(name))
    assert list(read_corpus([str(path)])) == ["one"]
    path.write_bytes(b"broken")
    with pytest.raises(DataError, match="a.jsonl.zst: damaged or truncated zst: not a frame"):
        list(read_corpus([str(path)]))
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    with pytest.raises(DataError, match=r"a.jsonl.zst: reading .zst needs Python 3.14") as caught:
        list(read_corpus([str(path)]))
    assert "unzstd" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"a.jsonl:2: needs a JSON object with a \"text\": '{\"txt\""),
        ("a.jsonl", b'{"text": 7}\n', "a.jsonl:1: needs a JSON object"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: needs a JSON object"),
        ("a.jsonl", b"{\n", "a.jsonl:1: needs a JSON object"),
        (
            "a.jsonl",
            b'{"text": "ab\\ud800"}\n',
            "a.jsonl:1: a text must be Unicode, character 2 of this one is half a surrogate",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8: invalid start byte at byte 10"),
        ("a.txt", b"\xff\xfe", "a.txt: not UTF-8: invalid start byte at byte 0"),
        ("a.txt.xz", lzma.compress(b"text")[:-8], "a.txt.xz: damaged or truncated xz"),
        ("a.txt.xz", b"not xz", "a.txt.xz: damaged or truncated xz"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:-8], "a.txt.gz: damaged or truncated gz"),
        ("a.txt.gz", b"not gz", "a.txt.gz: damaged or truncated gz"),
    ],
)
def test_a_damaged_file_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_corpus([str(tmp_path / name)]))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.txt: cannot be read: No such file") as caught:
        list(read_corpus([str(tmp_path / "nowhere.txt")]))
    assert "pydoc" in str(caught.value.hint)


def test_docstrings_come_in_the_order_of_the_source_without_their_indent() -> None:
    source = b'"""Module."""\nclass A:\n    """Class."""\n    async def f(self):\n        """Method.\n\n        More."""\ndef g(): "Function."\n'
    assert docstrings(source) == "Module.\n\nClass.\n\nMethod.\n\nMore.\n\nFunction."


def test_a_source_that_is_not_python_has_no_docstrings() -> None:
    assert docstrings(b"class {{name}}:") == ""


@pytest.mark.parametrize(
    ("name", "is_part"),
    [
        ("json/__init__.py", True), ("unittest/mock.py", True), ("ast.py", True),
        ("test/test_ast.py", False), ("idlelib/idle.py", False), ("site-packages/pip/a.py", False),
        ("_sysconfigdata__linux_x86_64-linux-gnu.py", False), ("sitecustomize.py", False), ("ctypes/test/a.py", False),
    ],
)  # fmt: skip
def test_tests_programs_and_files_of_the_build_are_not_documentation(name: str, is_part: bool) -> None:
    assert is_documented_module(name) is is_part


def test_the_documentation_of_python_is_about_two_megabytes_and_carries_topics_and_docstrings() -> None:
    documents = pydoc_documents()
    assert 1_500_000 < sum(len(text.encode()) for text in documents) < 4_000_000
    assert any(text.startswith("JSON (JavaScript Object Notation)") for text in documents)
    assert any("augmented assignment" in text for text in documents)


def test_a_python_without_its_topics_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    pydoc_documents.cache_clear()
    with pytest.raises(DataError, match="no pydoc_data.topics") as caught:
        pydoc_documents()
    assert "standard library" in str(caught.value.hint)
