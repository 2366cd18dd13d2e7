"""A data set laid out as scripts of the challenge look for one."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_scripts import make_data, make_layout, write_shard

from orchestrator.data_view import is_laid_out, lay_out, outline_sha256
from orchestrator.errors import DataError


def test_a_data_set_of_ours_is_linked_under_the_names_that_scripts_know(tmp_path: Path) -> None:
    data, work = make_data(tmp_path / "data"), tmp_path / "work"
    given = lay_out(data, work)
    dataset = work / "data" / "datasets" / "fineweb10B_sp64"
    assert given == {
        "DATA_DIR": str(work / "data"), "DATA_PATH": str(dataset), "VOCAB_SIZE": "64",
        "TOKENIZER_PATH": str(work / "data" / "tokenizers" / "fineweb_64_bpe.model"),
    }  # fmt: skip
    assert (dataset / "fineweb_train_000000.bin").resolve() == (data / "train_000000.bin").resolve()
    assert (dataset / "fineweb_val_000000.bin").resolve() == (data / "val_000000.bin").resolve()
    assert Path(given["TOKENIZER_PATH"]).read_bytes() == b"a tokenizer"
    assert lay_out(data, work) == given, "another node finds it made"


def test_a_folder_that_has_the_layout_is_taken_as_it_is(tmp_path: Path) -> None:
    raw = make_layout(tmp_path / "raw")
    given = lay_out(raw, tmp_path / "work")
    assert is_laid_out(raw) and not is_laid_out(make_data(tmp_path / "data"))
    assert given["DATA_PATH"] == str(raw / "datasets" / "fineweb10B_sp64")
    assert (tmp_path / "work" / "data").resolve() == raw.resolve(), "a script's own default leads there too"


def test_which_of_two_is_meant_is_left_to_the_study(tmp_path: Path) -> None:
    raw = make_layout(tmp_path / "raw")
    write_shard(raw / "datasets" / "fineweb10B_sp128" / "fineweb_val_000000.bin")
    assert "DATA_PATH" not in lay_out(raw, tmp_path / "work")


def test_a_folders_outline_changes_with_what_decides_about_scores(tmp_path: Path) -> None:
    raw = make_layout(tmp_path / "raw")
    before = outline_sha256(raw)
    assert outline_sha256(raw) == before
    shard = raw / "datasets" / "fineweb10B_sp64" / "fineweb_val_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\1\0")
    assert outline_sha256(raw) != before


def test_a_layout_without_validation_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "datasets").mkdir()
    with pytest.raises(DataError, match=r"no fineweb_val_\*.bin is in it"):
        outline_sha256(tmp_path)
