"""An audit of a real run: probes of its own model file, a replay of its log, its bundle watched while it scores."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ProtocolError
from tests.end_to_end.records import checked, failures, named
from tests.trainer.make_run import execute, micro_config, plan, result_of
from trainer import protocol
from trainer.protocol import TRAIN, VALIDATION, DataDir, RunDir

pytestmark = pytest.mark.slow

KNOBS: dict[str, dict[str, Any]] = {
    "chunks": {},
    "documents": {
        "ttt__method": "lora", "ttt__lora_unit": "document", "ttt__batch_documents": 4, "ttt__document_tokens": 16,
        "ttt__lr": 0.01, "evaluation__protocol": "documents",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> RunDir:
    """A complete run that learns chunk by chunk, and its sibling of another seed."""
    home = tmp_path_factory.mktemp("home")
    runs = [plan(home, data, micro_config(), seed=seed) for seed in (1, 2)]
    assert [result_of(execute(run)).status for run in runs] == [protocol.COMPLETE] * 2
    return runs[0]


def test_a_real_run_passes_its_audit(finished: RunDir) -> None:
    code, record = checked("audit", finished)
    assert (code, record["verdict"], failures(record)) == (0, "passed", [])
    assert {check["name"] for check in record["checks"] if check["status"] == "undecided"} == set()
    for name in (
        "probes.source",
        "c1.scorer.ttt",
        "c3.evaluation.ttt",
        "c3.log",
        "live.seed",
        "reach.files",
        "ttt.bpb",
    ):
        assert named(record, name)["status"] == "passed", name
    probes = record["measured"]["probes"]
    assert probes["ttt_reach_back"]["compared"] > 500 and probes["ttt_reach_back"]["control"] > 500
    assert probes["boundary"]["moved"] > 0  # windows lead across documents
    assert protocol.read_json(finished.audit) == record


def test_a_real_run_that_scores_documents_apart_passes(tmp_path: Path, data: Path) -> None:
    run = plan(tmp_path, data, micro_config(**KNOBS["documents"]))
    assert result_of(execute(run)).status == protocol.COMPLETE
    code, record = checked("audit", run, "--no-evaluation")
    assert (code, failures(record)) == (0, [])
    for stage in ("sliding", "ttt"):
        assert named(record, f"c1.boundary.{stage}")["status"] == "passed"
        assert named(record, f"c1.boundary.{stage}")["found"] == 0.0


def test_a_real_log_that_was_edited_is_told(finished: RunDir, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(finished.root, tmp_path / "run"))
    log = run.attempt(1).events
    lines = log.read_text().splitlines(keepends=True)
    scored, learned = (
        next(i for i, line in enumerate(lines) if f'"kind":"{kind}"' in line and '"ttt"' in line)
        for kind in ("scored", "learned")
    )
    lines.insert(scored, lines.pop(learned))  # chunk 0, now learned before it was scored
    log.write_text("".join(lines))
    code, record = checked("audit", run, "--no-evaluation", "--sample", "512")
    assert code == ProtocolError.exit_code
    assert "c3.log" in failures(record)
    assert any("learned before it was scored" in problem for problem in named(record, "c3.log")["found"])


def test_validation_text_in_a_real_training_split_is_told(finished: RunDir, data: Path, tmp_path: Path) -> None:
    copy = DataDir(Path(shutil.copytree(data, tmp_path / "leaky")))
    train, val = copy.shard(TRAIN, 0).read_bytes(), copy.shard(VALIDATION, 0).read_bytes()
    header = 4 * 256
    size = min(len(train), len(val))
    copy.shard(TRAIN, 0).write_bytes(train[:header] + val[header:size] + train[size:])  # as long as before
    code, record = checked("audit", finished, "--data", copy.root, "--no-evaluation", "--sample", "512")
    assert (code, failures(record)) == (ProtocolError.exit_code, ["split.disjoint"])
    assert named(record, "split.disjoint")["found"] > 40
