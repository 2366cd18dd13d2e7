from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from make_data import VOCAB_SIZE, make_data

from orchestrator import preflight
from orchestrator.errors import ConfigError, DataError, StorageError
from orchestrator.home import Home
from orchestrator.record_attempt import record_study
from orchestrator.study_file import load_study
from trainer.protocol import TRAIN, DataDir


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home(tmp_path_factory.mktemp("home"))
    home.data.mkdir()
    make_data(home.data)
    return home


def record(data: str = "small", **knobs: object) -> object:
    return record_study("smoke", data=data, seeds=(1, 2, 3), knobs=knobs)


def test_a_study_that_can_be_run_gives_its_data_set(home: Home) -> None:
    study = record(**{"model.vocab_size": VOCAB_SIZE})
    assert preflight.check(study, home).root == home.dataset("small")  # type: ignore[arg-type]


def test_a_vocabulary_that_is_not_the_data_sets_is_refused_with_both(home: Home) -> None:
    with pytest.raises(ConfigError, match=f"model.vocab_size is 1024, the data set .*small has {VOCAB_SIZE} pieces"):
        preflight.check(record(), home)  # type: ignore[arg-type]


def test_a_data_set_that_is_not_there_is_refused_with_the_ones_that_are(home: Home) -> None:
    with pytest.raises(DataError, match="there is no data set 'large' at ") as caught:
        preflight.check(record("large"), home)  # type: ignore[arg-type]
    assert "there are: small; caddie data prepare --out large" in str(caught.value.hint)


def test_a_home_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="must be a directory"):
        preflight.check(record(), Home(tmp_path / "file" / "home"))  # type: ignore[arg-type]


def test_a_disk_on_which_the_runs_would_not_fit_is_refused(home: Home) -> None:
    free = shutil.disk_usage(home.root).free
    study = record(**{"model.vocab_size": VOCAB_SIZE, "limits.artifact_bytes": free})
    with pytest.raises(StorageError, match="bytes are free, 3 runs of record-smoke-.* may take") as caught:
        preflight.check(study, home)  # type: ignore[arg-type]
    assert "CADDIE_HOME" in str(caught.value.hint)


def test_a_search_counts_its_trials_by_seeds_and_both_confirmations() -> None:
    study = load_study(Path("wd-qk-ttt-smoke"))
    assert preflight.runs_of(study) == study.search.trials * len(study.search.seeds) + 2 * 3


def test_a_data_set_with_a_missing_shard_is_refused_before_anything_is_submitted(home: Home, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(home.dataset("small"), tmp_path / "damaged"))
    DataDir(damaged).shard(TRAIN, 0).unlink()
    with pytest.raises(DataError, match="the shard is missing"):
        preflight.check(record(str(damaged), **{"model.vocab_size": VOCAB_SIZE}), home)  # type: ignore[arg-type]
