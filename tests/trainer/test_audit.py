import shutil

import numpy as np
import pytest

from tests.trainer.make_data import VOCAB_SIZE, quiet
from tests.trainer.make_run import micro_config
from trainer.__main__ import main
from trainer.audit import Sampling, audit, data_facts
from trainer.data import HEADER_BYTES, Dataset
from trainer.errors import ConfigError
from trainer.protocol import TRAIN, VALIDATION, DataDir, RunDir


def measured(run, data, positions=600, seed=0):
    return audit(run, data, sampling=Sampling(positions, seed), say=quiet)


@pytest.fixture(scope="module")
def outcome(finished, prepared):
    return measured(finished[0], prepared)


def test_every_probe_of_a_real_model_shows_something_and_nothing_moves(outcome):
    probes = outcome["probes"]
    for prefix in ("", "ttt_"):
        for moved in (*probes[f"{prefix}future"].values(), probes[f"{prefix}reach_back"]):
            assert moved["compared"] > 50 and moved["control"] > 50
            assert moved["largest"] == 0.0
        assert probes[f"{prefix}distribution"]["largest_log_sum"] < 1e-5
        assert (probes[f"{prefix}coverage"]["never"], probes[f"{prefix}coverage"]["again"]) == (0, 0)
        assert probes[f"{prefix}boundary"]["moved"] > 0  # windows lead across documents
    assert (probes["account"], probes["bytes"]["wrong"], probes["parity"]) == ([], 0, 0.0)


def test_the_sample_is_a_part_of_the_split_that_its_seed_decides(finished, prepared, outcome):
    sample = outcome["sample"]
    assert sample["last"] - sample["first"] == outcome["probes"]["coverage"]["positions"] == 600
    assert measured(finished[0], prepared)["probes"] == outcome["probes"]
    other = measured(finished[0], prepared, seed=1)
    assert other["sample"]["first"] != sample["first"]
    assert other["probes"]["boundary"] != outcome["probes"]["boundary"]


def test_the_first_chunk_is_left_out_of_a_sample_that_is_smaller(finished, prepared, outcome):
    assert outcome["probes"]["first_chunk"]["last"] == micro_config().ttt.chunk_tokens
    small = measured(finished[0], prepared, positions=100)
    assert small["probes"]["first_chunk"] is None
    assert small["sample"]["chunk_tokens"] == 32  # of one row: the fewest that can be learned from


def test_the_outcome_holds_what_the_model_file_says_of_itself(outcome):
    assert outcome["config"]["model"]["width"] == 32
    assert outcome["device"] == "cpu" and outcome["parameters"] > 50_000


def test_the_data_sets_facts_are_counted_in_its_shards(prepared, folder):
    facts = data_facts(Dataset.open(prepared, VOCAB_SIZE))
    manifest = Dataset.open(prepared, VOCAB_SIZE).manifest
    val = manifest.splits[VALIDATION]
    assert (facts["targets"], facts["counted_bytes"]) == (val.tokens - 1, val.text_bytes)
    common = facts["overlap"]
    assert (common["repeated"], common["train_documents"]) == (0, manifest.splits[TRAIN].documents)
    leak(DataDir(folder))
    assert data_facts(Dataset.open(folder, VOCAB_SIZE))["overlap"]["repeated"] > 10
    DataDir(folder).shard(TRAIN, 0).unlink()
    assert data_facts(Dataset.open(folder, VOCAB_SIZE, splits=(VALIDATION,)))["overlap"] is None


def leak(data):
    """Write the validation split's tokens over the beginning of the training split's."""
    val, train = (
        np.memmap(data.shard(split, 0), dtype="<u2", mode="r+", offset=HEADER_BYTES) for split in (VALIDATION, TRAIN)
    )
    size = min(len(val), len(train))
    train[:size] = val[:size]
    train.flush()


def test_a_published_split_is_counted_in_whole_windows(prepared, monkeypatch):
    dataset = Dataset.open(prepared, VOCAB_SIZE)
    dataset.manifest.recipe["variant"] = "sp1024"
    published = data_facts(dataset)["published"]
    assert published["targets"] == 2048
    assert 4 * 2048 < published["counted_bytes"] < dataset.manifest.splits[VALIDATION].text_bytes
    assert published["known"]["targets"] == 62_021_632
    del dataset.manifest.recipe["variant"]


def test_a_sample_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="--sample must be at least 1 position, got 0"):
        Sampling(0, 0)


def test_a_damaged_model_file_is_told_as_every_error_is(finished, prepared, tmp_path, capsys):
    run = RunDir(shutil.copytree(finished[0].root, tmp_path / "run"))
    run.artifact.write_bytes(run.artifact.read_bytes()[:-100])
    command = ["audit", str(run.root), "--data", str(prepared), "--sample", "100", "--seed", "0", "--json"]
    assert main(command) == 5
    assert '"kind": "ProtocolError"' in capsys.readouterr().out
