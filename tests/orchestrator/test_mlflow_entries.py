import math

import pytest
from make_study import Maker, sampled_params

from orchestrator import ledger
from orchestrator.ledger import Arm, Trial
from orchestrator.mlflow_entries import (
    Point,
    final_values,
    owner_name,
    owner_note,
    param_text,
    points_of,
    search_points,
)
from trainer import protocol
from trainer.protocol import Result, Score


def score(bpb):
    return Score(nats=1.0, tokens=1, bytes=1, loss=2.0, bpb=bpb, seconds=3.0)


def trial(number, value, **fields):
    return Trial(number=number, origin="sampler", params={}, runs={}, state=ledger.COMPLETE, value=value, **fields)


def test_a_point_is_kept_by_step_and_by_milliseconds_of_training():
    event = {"kind": "metric", "t": 2.5, "step": 7, "train_seconds": 1.25, "values": {"train_loss": 3.0}}
    assert list(points_of(event, 1000.0)) == [
        Point("train_loss", 3.0, 1_002_500, 7),
        Point("by_ms/train_loss", 3.0, 1_002_500, 1250),
    ]


def test_a_point_of_test_time_training_is_kept_by_its_chunk_alone():
    event = {"kind": "metric", "t": 1.0, "step": 7, "train_seconds": 1.0, "values": {"ttt_bpb": 2.0, "ttt_chunk": 4}}
    assert list(points_of(event, 0.0)) == [Point("ttt_bpb", 2.0, 1000, 4)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_no_chart_survives_is_not_a_number(value):
    event = {"t": 0.0, "step": 1, "train_seconds": 0.0, "values": {"loss[0]": value}}
    points = list(points_of(event, 0.0))
    assert [point.name for point in points] == ["loss_0_", "by_ms/loss_0_"]
    assert all(math.isnan(point.value) for point in points)


def test_the_best_so_far_follows_the_trials_in_their_order_and_leaves_out_what_breaks_a_limit():
    trials = [trial(2, 1.5), trial(0, 2.0), trial(1, 1.0, constraints={"artifact_bytes": 1.0})]
    points = list(search_points(trials, 0.0))
    assert [(p.step, p.value) for p in points if p.name == "trial_bpb"] == [(0, 2.0), (1, 1.0), (2, 1.5)]
    assert [(p.step, p.value) for p in points if p.name == "best_bpb"] == [(0, 2.0), (1, 2.0), (2, 1.5)]


def test_scores_come_last_stage_first_and_what_was_not_measured_is_left_out():
    result = Result(
        run_id="r", attempt=1, status=protocol.FAILED, seed=1,
        scores={protocol.SLIDING: score(1.2), protocol.TTT: score(1.1)}, phases={"train": 5.0},
    )  # fmt: skip
    values = final_values(result)
    assert list(values)[:2] == ["final/ttt_bpb", "final/sliding_bpb"]
    assert values["phase_seconds/train"] == 5.0
    assert "final/artifact_bytes" not in values and "final/parity_nats" not in values


def test_parameters_keep_every_digit():
    assert (param_text(0.1 + 0.2), param_text((2, 3)), param_text("gptq")) == ("0.30000000000000004", "2, 3", "gptq")


def test_owners_are_named_and_described_for_people(tmp_path):
    study = Maker(tmp_path).study
    params = sampled_params(study, 0)
    arm = Arm(name="best", trial=3, params=params, runs={42: "r", 314: "s"})
    assert (owner_name(arm), owner_name(trial(0, 1.0)), owner_name(trial(4, 1.0))) == (
        "arm best", "trial 0 (preset)", "trial 4",
    )  # fmt: skip
    note = owner_note(arm, "ttt", {"final/ttt_bpb": 1.23456789})
    assert "ttt BPB 1.23457, mean over seeds 42, 314" in note and "- `ttt.lr` = 0.002" in note
    pruned = Trial(number=5, origin="sampler", params={}, runs={}, state=ledger.PRUNED, reason="stopped early")
    assert owner_note(pruned, "ttt", {}) == "No score.\n\n- unchanged\n\nstopped early"
