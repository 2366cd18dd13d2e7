from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from make_data import VOCAB_SIZE, make_data, texts, write_jsonl

from orchestrator import datasets
from orchestrator.errors import DataError, MachineError
from orchestrator.home import Home
from trainer.protocol import TRAIN, DataDir, sha256_of


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
    assert datasets.verify(damaged) == []
    DataDir(damaged).shard(TRAIN, 0).unlink()
    assert len(datasets.verify(damaged)) == 1


def test_a_trainer_that_cannot_run_is_the_machines_lack() -> None:
    with pytest.raises(MachineError, match="the trainer ended with 2 and said nothing") as caught:
        datasets.prepare(["--no-such-option"])
    assert "pip install" in str(caught.value.hint)
