"""Bytes behind the first targets of shards, counted apart from data set and manifest."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer import publication, target_bytes
from trainer.data import Dataset
from trainer.errors import DataError
from trainer.protocol import VALIDATION, DataDir


@pytest.fixture
def files(prepared: Path) -> tuple[list[Path], Path]:
    dataset = Dataset.open(prepared, DATA_VOCAB)
    return [prepared / shard.file for shard in dataset.manifest.splits[VALIDATION].shards], DataDir(prepared).tokenizer


DATA_VOCAB = 420


def write_shard(path: Path, tokens: np.ndarray) -> Path:
    path.write_bytes(struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + tokens.astype("<u2").tobytes())
    return path


@pytest.mark.parametrize("span", [2**22, 7, 1])
def test_the_first_targets_have_the_bytes_that_the_judge_counts(files, prepared, span, monkeypatch) -> None:
    monkeypatch.setattr(publication, "SPAN_TOKENS", span)
    dataset = Dataset.open(prepared, DATA_VOCAB)
    tokens_N = dataset.validation_tokens()[:400]
    bytes_N = dataset.byte_counts().bytes_of_targets(tokens_N[:-1], tokens_N[1:])
    parts = [write_shard(prepared.parent / f"part{n}.bin", part.numpy()) for n, part in enumerate(tokens_N.split(150))]
    found = target_bytes.count(parts, files[1], [1, 149, 150, 151, 399, 400])
    assert found == {
        "targets": 399, "bytes": int(bytes_N.sum()),
        "first": {str(n): int(bytes_N[:n].sum()) for n in (1, 149, 150, 151, 399)},
    }, "a number beyond the split is left out"  # fmt: skip


def test_the_whole_split_has_its_manifests_bytes(files, prepared: Path) -> None:
    found = target_bytes.count(*files, [])
    split = Dataset.open(prepared, DATA_VOCAB).manifest.splits[VALIDATION]
    assert (found["bytes"], found["targets"]) == (split.text_bytes, split.tokens - 1)


def test_the_command_says_it_as_json(files) -> None:
    shards, tokenizer = files
    words = [*map(str, shards), "--tokenizer", str(tokenizer), "--targets", "5", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "target-bytes", *words], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == target_bytes.count(shards, tokenizer, [5])


def test_what_is_no_shard_or_no_tokenizer_is_named(files, tmp_path: Path) -> None:
    shards, tokenizer = files
    bad = tmp_path / "fineweb_val_000000.bin"
    cases = [
        (b"short", "5 bytes, the shard's 0 tokens need 1024"),
        (b"\0" * 2048, r"header \[0, 0, 0\], must be \[20240520, 1, 512\]"),
        (shards[0].read_bytes()[:-2], r"header \[20240520, 1, \d+\], must be"),
        (shards[0].read_bytes()[:-1], r"\d+ bytes, the shard's \d+ tokens need \d+"),
    ]
    for content, message in cases:
        bad.write_bytes(content)
        with pytest.raises(DataError, match=rf"fineweb_val_000000\.bin: {message}"):
            target_bytes.count([bad], tokenizer, [])
    with pytest.raises(DataError, match=r"none\.bin: the shard is missing"):
        target_bytes.count([tmp_path / "none.bin"], tokenizer, [])
    bad.write_bytes(b"a tokenizer")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        target_bytes.count(shards, bad, [])


def test_a_token_that_the_tokenizer_lacks_is_refused(files, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "other.bin", np.array([1, 5, 5000]))
    with pytest.raises(DataError, match=r"other\.bin: token 5000, the tokenizer has 420 pieces"):
        target_bytes.count([shard], files[1], [])
