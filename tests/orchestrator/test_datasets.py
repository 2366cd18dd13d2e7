from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from make_data import VOCAB_SIZE, make_data, texts, write_jsonl

from orchestrator import datasets
from orchestrator.errors import DataError, MachineError, ProtocolError
from orchestrator.home import Home
from trainer.protocol import TRAIN, VALIDATION, DataDir, sha256_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home(tmp_path_factory.mktemp("home"))
    home.data.mkdir()
    make_data(home.data)
    return home


def test_a_data_set_is_found_by_name_and_by_path(made: Home) -> None:
    by_name = datasets.find(made, "small")
    assert by_name == datasets.find(made, str(made.data / "small"))
    assert by_name.vocab_size == VOCAB_SIZE
    assert by_name.manifest_sha256 == sha256_of(DataDir(made.data / "small").manifest)
    assert datasets.names(made) == ["small"]


def test_what_is_still_being_written_is_no_data_set(made: Home, tmp_path: Path) -> None:
    home = Home(tmp_path)
    shutil.copytree(made.data / "small", home.data / ".small.partial")
    assert datasets.names(home) == []


def test_a_folder_without_a_manifest_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data set"):
        datasets.manifest_of(tmp_path)


def test_preparing_runs_the_trainer_and_returns_the_totals(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts())
    options = [
        "--corpus",
        str(corpus),
        "--out",
        str(tmp_path / "d"),
        "--vocab-size",
        str(VOCAB_SIZE),
        "--val-frac",
        "0.2",
    ]
    made = datasets.prepare(options)
    assert made["splits"]["train"]["documents"] == datasets.manifest_of(tmp_path / "d").manifest.splits[TRAIN].documents


def test_an_error_of_the_trainer_comes_back_as_itself(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.txt: cannot be read") as caught:
        datasets.prepare(
            ["--corpus", str(tmp_path / "nowhere.txt"), "--out", str(tmp_path / "d"), "--vocab-size", "420"]
        )
    assert caught.value.hint


def test_verifying_returns_the_problems(made: Home, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(made.data / "small", tmp_path / "damaged"))
    assert datasets.verify(damaged)["problems"] == []
    DataDir(damaged).shard(TRAIN, 0).unlink()
    assert len(datasets.verify(damaged)["problems"]) == 1


def test_a_trainer_that_cannot_run_is_the_machines_lack() -> None:
    with pytest.raises(MachineError, match="the trainer ended with 2 and said nothing") as caught:
        datasets.prepare(["--no-such-option"])
    assert "pip install" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: folder.shard(TRAIN, 0).unlink(), "train_000000.bin: the shard is missing"),
        (lambda folder: os.truncate(folder.shard(TRAIN, 0), 3001), "the shard is truncated: 3,001 bytes, the manifest says"),
        (lambda folder: os.truncate(folder.shard(TRAIN, 0), 99_999), "the shard is too long: 99,999 bytes"),
        (lambda folder: flip_byte(folder.shard(VALIDATION, 0)), "val_000000.bin: changed bytes: its sha256"),
        (lambda folder: folder.tokenizer.unlink(), "the tokenizer is missing"),
        (lambda folder: flip_byte(folder.tokenizer), "tokenizer.model: changed bytes"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_the_manifests_is_named(
    made: Home, tmp_path: Path, damage: Callable[[DataDir], None], message: str
) -> None:
    damaged = Path(shutil.copytree(made.data / "small", tmp_path / "damaged"))
    datasets.require_sound(datasets.manifest_of(damaged))
    damage(DataDir(damaged))
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        datasets.require_sound(datasets.manifest_of(damaged))
    assert f"move {damaged} away" in str(caught.value.hint)


def test_a_manifest_with_a_value_of_another_type_is_damaged(made: Home, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(made.data / "small", tmp_path / "damaged"))
    record = json.loads(DataDir(damaged).manifest.read_text())
    record["splits"][TRAIN]["shards"][0]["tokens"] = "many"
    DataDir(damaged).manifest.write_text(json.dumps(record))
    with pytest.raises(ProtocolError, match="shard tokens must be of type int, got 'many'"):
        datasets.manifest_of(damaged)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 0xFF
    path.write_bytes(content)
