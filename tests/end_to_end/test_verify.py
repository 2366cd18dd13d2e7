"""A stranger's check of a real run: its own bundle and model file, in the clean room, whole and tampered with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from orchestrator.errors import DataError, ProtocolError
from tests.end_to_end.records import checked, failures, named
from tests.trainer.make_data import make_data, texts
from tests.trainer.make_run import execute, micro_config, plan, result_of
from trainer import protocol
from trainer.protocol import RunDir

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> RunDir:
    """A complete run."""
    run = plan(tmp_path_factory.mktemp("home"), data, micro_config())
    assert result_of(execute(run)).status == protocol.COMPLETE
    return run


def test_a_real_run_comes_out_again_from_its_two_files(finished: RunDir) -> None:
    code, record = checked("verify", finished)
    assert (code, record["verdict"], failures(record)) == (0, "passed", [])
    for stage in ("roundtrip", "sliding", "ttt"):
        assert named(record, f"{stage}.bpb")["status"] == "passed"
    assert record["artifact_sha256"] == protocol.sha256_of(finished.artifact)
    assert protocol.read_json(finished.verify) == record


def test_a_real_model_file_with_one_byte_changed_is_named(finished: RunDir, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(finished.root, tmp_path / "run"))
    content = bytearray(run.artifact.read_bytes())
    content[len(content) // 2] ^= 0x10
    run.artifact.write_bytes(content)
    code, record = checked("verify", run)
    assert code == ProtocolError.exit_code
    assert failures(record)[0] == "model.sha256"  # whether the reader sees it too depends on the byte


def test_a_real_model_file_that_was_cut_off_is_named_and_refused_by_its_reader(
    finished: RunDir, tmp_path: Path
) -> None:
    run = RunDir(shutil.copytree(finished.root, tmp_path / "run"))
    run.artifact.write_bytes(run.artifact.read_bytes()[:-1000])
    code, record = checked("verify", run)
    assert code == ProtocolError.exit_code
    assert failures(record) == ["model.sha256", "model.bytes", "artifact.bytes", "evaluation"]
    assert str(named(record, "evaluation")["found"]).startswith("code: ")
    assert record["failure"]["log"]


def test_a_real_score_that_was_edited_is_named(finished: RunDir, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(finished.root, tmp_path / "run"))
    record = protocol.read_json(run.attempt(1).result)
    record["scores"]["ttt"]["bpb"] -= 2e-6
    protocol.write_json_atomically(run.attempt(1).result, record)
    code, found = checked("verify", run)
    assert (code, failures(found)) == (ProtocolError.exit_code, ["result.sums", "ttt.bpb"])


def test_another_split_of_the_same_text_is_named(finished: RunDir, tmp_path: Path) -> None:
    other = make_data(tmp_path, name="other", documents=texts()[::2])
    code, record = checked("verify", finished, "--data", other)
    assert (code, failures(record)) == (DataError.exit_code, ["data.manifest"])
    tokens = named(record, "ttt.tokens")
    assert (tokens["status"], tokens["note"]) == ("undecided", "the data are not the run's")
    assert tokens["expected"] != tokens["found"]
