import dataclasses
import math

import pytest
from fakes import tiny_study

from orchestrator import ledger
from orchestrator.verdict import verdict
from trainer import protocol
from trainer.protocol import Failure, Result, Score

STUDY = tiny_study()
CAP = STUDY.config.limits.artifact_bytes


def result(bpb=1.5, **changes):
    score = Score(nats=1.0, tokens=1, bytes=1, loss=1.0, bpb=bpb, seconds=10.0)
    plain = Result(
        run_id="r", attempt=1, status=protocol.COMPLETE, seed=1, scores=dict.fromkeys(protocol.STAGES, score),
        artifact_bytes=CAP, train_seconds=300.0,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def broken(kind, **changes):
    failure = Failure(kind=kind, message="why", log="/logs/stderr.log\nlast line")
    return result(status=protocol.FAILED, failure=failure, **{"scores": {}, **changes})


def test_the_value_is_the_mean_over_the_seeds_and_limits_that_are_just_kept_are_feasible():
    found = verdict(STUDY, {1: result(1.5), 2: result(1.7)})
    assert (found.state, found.value) == (ledger.COMPLETE, pytest.approx(1.6))
    assert found.constraints == {"artifact_bytes": 0.0, "train_seconds": 0.0, "eval_seconds": -290.0}


def test_the_seed_that_exceeds_a_limit_most_decides_feasibility():
    found = verdict(STUDY, {1: result(), 2: result(artifact_bytes=CAP + 7, train_seconds=301.0)})
    assert (found.constraints["artifact_bytes"], found.constraints["train_seconds"]) == (7.0, 1.0)


def test_an_artifact_over_the_cap_with_a_score_is_told_as_complete_and_infeasible():
    over = broken(protocol.OVER_CAP, scores=result(1.2).scores, artifact_bytes=CAP + 500)
    found = verdict(STUDY, {1: over})
    assert (found.state, found.value, found.constraints["artifact_bytes"]) == (ledger.COMPLETE, 1.2, 500.0)


def test_an_artifact_over_the_cap_without_a_score_is_a_failure():
    assert verdict(STUDY, {1: broken(protocol.OVER_CAP)}).failure == protocol.OVER_CAP


def test_a_failure_of_one_seed_fails_the_trial_with_its_kind_seed_and_log():
    found = verdict(STUDY, {1: result(), 2: broken(protocol.OUT_OF_MEMORY)})
    assert (found.state, found.value, found.failure) == (ledger.FAILED, None, protocol.OUT_OF_MEMORY)
    assert found.reason == "out_of_memory: why (seed 2; log: /logs/stderr.log)"


def test_a_stopped_seed_prunes_the_trial():
    found = verdict(STUDY, {1: result(), 2: result(status=protocol.STOPPED, scores={})})
    assert (found.state, found.value) == (ledger.PRUNED, None)


@pytest.mark.parametrize("bpb", [math.nan, math.inf])
def test_a_score_that_is_no_number_fails_the_trial(bpb):
    found = verdict(STUDY, {1: result(bpb)})
    assert (found.state, found.failure) == (ledger.FAILED, protocol.NOT_FINITE)


def test_a_complete_result_without_scores_fails_the_trial():
    assert verdict(STUDY, {1: result(scores={})}).failure == protocol.CODE


def test_a_failed_result_that_names_no_cause_fails_the_trial():
    assert (
        verdict(STUDY, {1: result(status=protocol.FAILED, scores={})}).reason
        == "code: the result holds no score (seed 1)"
    )


def test_what_the_runs_took_is_that_of_the_worst_seed():
    slow = result(peak_memory_bytes=7, train_seconds=250.0, tokens=500)
    fast = result(peak_memory_bytes=9, train_seconds=200.0, tokens=1000)
    found = verdict(STUDY, {1: slow, 2: fast}).measures
    assert found == {
        "artifact_bytes": CAP, "train_seconds": 250.0, "eval_seconds": 10.0, "peak_memory_bytes": 9.0, "tokens_per_second": 2.0,
    }  # fmt: skip


def test_a_study_may_have_limits_of_its_own_on_what_is_measured():
    study = tiny_study(extra="[constraints]\nartifact_bytes = 400_000\npeak_memory_bytes = 5\ntokens_per_second = 3")
    found = verdict(study, {1: result(peak_memory_bytes=7, tokens=600)})
    assert found.constraints == {
        "artifact_bytes": CAP - 400_000, "train_seconds": 0.0, "eval_seconds": -290.0, "peak_memory_bytes": 2.0,
        "tokens_per_second": 1.0,
    }  # fmt: skip
    assert "peak_memory_bytes" not in verdict(study, {1: result()}).constraints  # the CPU measures none


def test_the_kind_of_a_failure_is_told():
    assert verdict(STUDY, {1: broken(protocol.OUT_OF_MEMORY)}).failure == protocol.OUT_OF_MEMORY
