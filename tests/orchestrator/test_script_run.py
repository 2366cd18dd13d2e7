"""Runs of somebody else's script, through the worker that carries them out."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from make_scripts import TOKENS, make_layout, plan_run, write_script

from orchestrator import script_run, worker
from orchestrator.claims import claim_of
from orchestrator.home import Home
from orchestrator.notice import Notice
from orchestrator.script_run import ScriptRun, is_same
from trainer import protocol
from trainer.protocol import (
    CODE,
    COMPLETE,
    FAILED,
    METRIC,
    NOT_FINITE,
    PHASE,
    START,
    STOPPED,
    TRAIN_LOSS,
    WARNING,
    Result,
    RunDir,
)


def attempt(run: RunDir, *, processes: int = 1, timeout: float = 60.0) -> Result:
    worker.run_attempt(str(run.root), 1, processes, "", timeout, 1.0)
    return protocol.read_result(run.attempt(1).result)


def events(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [event for _, event in protocol.read_lines(run.attempt(1).events) if event["kind"] == kind]


@pytest.mark.parametrize(
    ("family", "packed", "knob", "stages", "size"),
    [
        ("A", False, "WEIGHT_DECAY", {"roundtrip"}, 7042),
        ("B", True, "MUON_WD", {"post_ema", "roundtrip", "sliding"}, 5000),
        ("C", False, "WD", {"roundtrip"}, 0),
    ],
)
def test_a_script_of_each_family_becomes_a_run_with_its_scores(tmp_path, family, packed, knob, stages, size) -> None:
    run = plan_run(Home(tmp_path), write_script(tmp_path / "Record", family, packed=packed), **{knob: "0.15"})
    result = attempt(run)
    assert (result.status, result.failure, set(result.scores)) == (COMPLETE, None, stages)
    last = [stage for stage in protocol.STAGES if stage in stages][-1]
    digits = 4 if family == "C" else 8
    assert result.scores[last].bpb == pytest.approx(1.2 + 0.1**2 + 42 / 1e6, abs=0.6 * 10**-digits)
    assert (result.steps, result.seed, result.model_bytes) == (200, 42, size)
    assert result.artifact_bytes == (
        len(run.bundle.read_bytes()) + size if family == "A" else 9000 if family == "B" else 12_000
    )
    assert run.artifact.exists() == bool(size), "the file of the logged size is the model"
    assert [event["step"] for event in events(run, METRIC) if TRAIN_LOSS in event["values"]][-1] == 200
    assert events(run, START)[0]["seed"] == 42
    assert not events(run, WARNING)
    told = [(event["name"], event["seconds"]) for event in events(run, PHASE)]
    assert {name for name, _ in told} == stages, "each evaluation is told when it has ended"
    timed = {name: seconds for name, seconds in told if seconds}
    assert timed and timed == {name: seconds for name, seconds in result.phases.items() if name in protocol.STAGES}


def test_a_scores_sums_are_those_that_its_two_values_imply(tmp_path: Path) -> None:
    result = attempt(plan_run(Home(tmp_path), write_script(tmp_path / "A", "A")))
    score = result.scores["roundtrip"]
    assert (score.tokens, score.seconds) == (TOKENS, 1.5), "the time is the shorter twin's"
    assert score.nats / math.log(2) / score.bytes == pytest.approx(score.bpb, rel=1e-3), "whole bytes"


def test_the_work_of_an_attempt_lies_in_a_folder_of_its_own(tmp_path: Path) -> None:
    run = plan_run(Home(tmp_path), write_script(tmp_path / "A", "A"))
    attempt(run)
    assert (run.attempt(1).work / "logs" / f"{run.run_id}.txt").is_file()
    assert sorted(path.name for path in run.root.iterdir()) == ["artifact.bin", "attempts", "spec.json", "train_gpt.py"]


def test_data_that_others_laid_out_are_read_where_they_are(tmp_path: Path) -> None:
    raw = make_layout(tmp_path / "raw")
    run = plan_run(Home(tmp_path / "home"), write_script(tmp_path / "B", "B"), data_dir=raw)
    assert attempt(run).status == COMPLETE


def test_the_shells_own_settings_do_not_reach_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHT_DECAY", "9")
    monkeypatch.setenv("UNRELATED", "kept")
    run = plan_run(Home(tmp_path), write_script(tmp_path / "A", "A"))
    assert attempt(run).scores["roundtrip"].bpb == pytest.approx(1.2 + 0.01**2 + 42 / 1e6)
    script = ScriptRun(run, run.attempt(2), protocol.read_spec(run.spec))
    given = script.prepare(os.environ, "python")
    assert given["UNRELATED"] == "kept" and "WEIGHT_DECAY" not in given


def test_a_setting_that_the_script_logs_otherwise_is_told(tmp_path: Path) -> None:
    path = write_script(tmp_path / "A", "A", changes={"weight_decay:{args.weight_decay}": "weight_decay:0.04"})
    run = plan_run(Home(tmp_path), path, WEIGHT_DECAY="0.1")
    attempt(run)
    assert [(e["name"], e["variable"], e["asked"], e["logged"]) for e in events(run, WARNING)] == [
        ("other_setting", "WEIGHT_DECAY", "0.1", "weight_decay 0.04")
    ]


def test_a_seed_that_the_script_does_not_take_is_told(tmp_path: Path) -> None:
    path = write_script(tmp_path / "A", "A", changes={'int(os.environ.get("SEED", 1337))': "1337"})
    run = plan_run(Home(tmp_path), path)
    assert attempt(run).status == COMPLETE
    found = {event["name"]: event for event in events(run, WARNING)}
    assert (found["other_seed"]["asked"], found["other_seed"]["logged"]) == (42, 1337)
    assert found["unread_variable"]["variable"] == "SEED"


def test_a_script_that_ends_without_a_score_has_failed_and_says_what_its_log_has(tmp_path: Path) -> None:
    path = write_script(tmp_path / "C", "C", changes={"final_ternary_roundtrip val_loss": "my_new_score val_loss"})
    result = attempt(plan_run(Home(tmp_path), path))
    assert (result.status, result.failure and result.failure.kind) == (FAILED, CODE)
    assert (
        result.failure
        and "ends without a line of a final score; unknown labels: line 9: 'my_new_score'" in result.failure.message
    )


def test_a_script_without_any_log_has_failed(tmp_path: Path) -> None:
    (tmp_path / "train_gpt.py").write_text(
        "import os\nos.environ.get('DATA_PATH')\nos.environ.get('SEED')\nprint('hello')\n"
    )
    result = attempt(plan_run(Home(tmp_path), tmp_path))
    assert result.failure and "is a log of a known form" in result.failure.message


def test_a_loss_that_is_no_number_is_told_as_that(tmp_path: Path) -> None:
    changes = {"train_loss:{loss:.4f}": "train_loss:nan", "final_int8_zlib_roundtrip": "nothing"}
    result = attempt(plan_run(Home(tmp_path), write_script(tmp_path / "A", "A", changes=changes)))
    assert result.failure and result.failure.kind == NOT_FINITE


def test_a_script_that_breaks_is_told_by_its_exception(tmp_path: Path) -> None:
    path = write_script(
        tmp_path / "B", "B", changes={'print("train_shards: 1")': 'raise RuntimeError("CUDA is required")'}
    )
    result = attempt(plan_run(Home(tmp_path), path))
    assert (result.status, result.failure and result.failure.message) == (FAILED, "RuntimeError: CUDA is required")


def test_its_curve_is_followed_while_it_runs_and_it_can_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "OWNER_SECONDS", 0.05)
    run = plan_run(Home(tmp_path), write_script(tmp_path / "A", "A"), STEP_SECONDS="0.004", ITERATIONS="100000")
    thread = threading.Thread(target=attempt, args=(run,))
    thread.start()
    until = time.monotonic() + 30
    while time.monotonic() < until and not events(run, METRIC):
        time.sleep(0.02)
    first = events(run, METRIC)[0]
    protocol.write_bytes_atomically(run.attempt(1).stop, b"")
    thread.join(30)
    assert protocol.read_result(run.attempt(1).result).status == STOPPED
    assert first["values"]["elapsed_frac"] < 0.01, "of the planned steps, or of the limit"


def test_a_changed_script_is_not_run(tmp_path: Path) -> None:
    run = plan_run(Home(tmp_path), write_script(tmp_path / "A", "A"))
    run.bundle.write_text("print('another')")
    result = attempt(run)
    assert result.failure and "its SHA-256 is" in result.failure.message


def test_flash_attention_is_stood_in_for_only_where_it_is_missing(tmp_path: Path) -> None:
    path = write_script(tmp_path / "C", "C", changes={"from os import": "import flash_attn_interface\nfrom os import"})
    run = plan_run(Home(tmp_path), path)
    installed = tmp_path / "site"
    installed.mkdir()
    (installed / "flash_attn_interface.py").write_text("")
    python = worker.sys.executable
    for place, is_stood_in in (("", True), (str(installed), False)):
        script = ScriptRun(run, run.attempt(1), protocol.read_spec(run.spec))
        given = script.prepare({**os.environ, "PYTHONPATH": place}, python)
        assert (str(script_run.FLASH_ATTENTION_SHIM) in given["PYTHONPATH"].split(os.pathsep)) == is_stood_in
        assert [warning["name"] for warning in script.warnings] == (["stand_in"] if is_stood_in else [])


@pytest.mark.slow
def test_several_processes_run_under_torchrun(tmp_path: Path) -> None:
    run = plan_run(Home(tmp_path), write_script(tmp_path / "A", "A"))
    result = attempt(run, processes=2, timeout=120)
    assert (result.status, result.world_size) == (COMPLETE, 2)
    lines = run.attempt(1).reads.read_text().splitlines()
    assert sum(json.loads(line).get("name") == "SEED" for line in lines) == 1, "of one rank"


def test_one_gpu_has_torchrun_too(tmp_path: Path) -> None:
    run = plan_run(Home(tmp_path), write_script(tmp_path / "A", "A"))
    script = ScriptRun(run, run.attempt(1), protocol.read_spec(run.spec))
    part = worker.Part(
        run=run, files=run.attempt(1), order=worker.Order(processes=1, gpus="0", timeout_seconds=1.0),
        allocation=worker.Allocation(), claim=claim_of(os.getpid()), notice=Notice(run.attempt(1)),
    )  # fmt: skip
    command = worker.part_command(part, torch="2.11.0", script=script)
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    assert command[-1] == str(run.bundle), "as its author starts it, with no arguments of ours"


@pytest.mark.parametrize(
    ("asked", "logged", "same"),
    [
        ("0.1", "0.1", True), ("1", "True", True), ("0", "False", True), ("0.085", "0.1", True), ("0.085", "0.0850", True),
        ("0.085", "0.090", False), ("600", "600.000", True), ("300", "301", False), ("1e-8", "1e-08", True),
        ("linear", "LINEAR", True), ("linear", "cosine", False),
    ],
)  # fmt: skip
def test_a_logged_setting_is_compared_as_far_as_it_has_decimals(asked: str, logged: str, same: bool) -> None:
    assert is_same(asked, logged) is same
