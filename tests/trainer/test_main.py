import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from orchestrator.score_chain import problems
from tests.trainer.make_data import manifest_in
from tests.trainer.make_run import execute, metrics_of, micro_config, plan, result_of
from trainer import artifact, protocol
from trainer.errors import StorageError
from trainer.main import LOG_LINES
from trainer.protocol import WEIGHTS, RunDir, read_lines, read_result, read_spec, sha256_of
from trainer.quantize import LEFT
from trainer.ttt import PARITY_TOLERANCE


def phases_of(attempt):
    return [(e["name"], e["state"]) for _, e in read_lines(attempt.events) if e["kind"] == protocol.PHASE]


def test_a_run_ends_with_every_score_size_and_time(finished):
    run, attempt = finished
    result = result_of(attempt)
    assert (result.status, result.failure, result.steps) == (protocol.COMPLETE, None, 12)
    assert list(result.scores) == list(protocol.STAGES)
    assert result.artifact_bytes == run.bundle.stat().st_size + run.artifact.stat().st_size
    assert result.artifact_sha256 == sha256_of(run.artifact)
    assert result.bundle_sha256 == sha256_of(run.bundle)
    assert set(result.phases) == {
        "load", "warm_up", "train", "calibrate", "quantize", "pack", "reload", *protocol.STAGES,
    }  # fmt: skip
    assert result.train_seconds == pytest.approx(result.phases["train"] + result.phases["calibrate"], abs=0.1)
    assert result.tokens == 12 * 256


def test_every_token_of_the_split_is_scored_once_and_every_byte_of_its_text_counted(finished, prepared):
    split = manifest_in(prepared).splits["val"]
    for score in result_of(finished[1]).scores.values():
        assert score.tokens == split.tokens - 1  # all but the first BOS, which nothing stands before
        assert score.bytes == split.text_bytes


def test_the_first_ttt_chunk_before_any_update_is_the_sliding_score(finished):
    parity = result_of(finished[1]).parity_nats
    assert parity is not None
    assert abs(parity) <= PARITY_TOLERANCE


def test_every_score_follows_from_the_chain_of_its_chunks(finished):
    result = result_of(finished[1])
    assert problems([event for _, event in read_lines(finished[1].events)], result) == []
    assert list(result.chains) == list(protocol.STAGES)


@pytest.mark.parametrize("ends_well", [True, False])
def test_where_the_disk_takes_neither_result_nor_log_the_exit_code_says_so(tmp_path, prepared, ends_well):
    run = plan(tmp_path, prepared, micro_config(schedule__steps=2, evaluation__protocol="flat", ttt__method="off"))
    attempt = run.attempt(1)
    (attempt.result / "in the way").mkdir(parents=True)
    if not ends_well:
        attempt.events.mkdir()
    with open("/dev/full", "wb") as full:
        command = [sys.executable, str(run.bundle), str(run.root), "--attempt", "1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=run.root, env=environment, stderr=full, check=False, timeout=300)
    assert done.returncode == StorageError.exit_code
    assert run.artifact.exists() == ends_well


def test_phases_follow_one_another_on_one_clock(finished):
    events = [event for _, event in read_lines(finished[1].events)]
    assert events[0]["kind"] == protocol.START
    assert [e["t"] for e in events] == sorted(e["t"] for e in events)
    open_phase = None
    for name, state in phases_of(finished[1]):
        if state == "start":
            assert open_phase is None
            open_phase = name
        elif state == "end":
            assert open_phase == name
            open_phase = None


def test_every_step_says_how_much_of_its_schedule_is_used_up(finished):
    assert metrics_of(finished[1], protocol.ELAPSED_FRAC) == {step: step / 12 for step in range(1, 13)}


def test_by_the_clock_of_time_it_is_the_part_of_the_seconds(tmp_path, prepared):
    limits = {"limits__train_seconds": 3.0, "limits__reserve_seconds": 1.0}
    attempt = execute(plan(tmp_path, prepared, micro_config(schedule__clock="time", schedule__steps=10_000, **limits)))
    metrics = [event for _, event in read_lines(attempt.events) if protocol.values_of(event, protocol.TRAIN_LOSS)]
    assert len(metrics) == result_of(attempt).steps < 10_000
    for event in metrics:  # the last step may take more than is left: the schedule is used up, and no more than that
        used_up = min(1.0, event["train_seconds"] / 2.0)
        assert event["values"][protocol.ELAPSED_FRAC] == pytest.approx(used_up, abs=1e-4)
    assert metrics[-1]["values"][protocol.ELAPSED_FRAC] > 0.8


def test_validating_while_it_trains_changes_nothing_but_the_log_and_takes_no_training_time(
    finished, tmp_path, prepared
):
    config = micro_config(schedule__validations=3, schedule__validation_sequences=4)
    attempt = execute(plan(tmp_path, prepared, config))
    losses = metrics_of(attempt, protocol.VAL_LOSS)
    assert list(losses) == [3, 6, 9] and all(0 < loss < 10 for loss in losses.values())
    assert losses[9] < losses[3]
    assert metrics_of(attempt, protocol.TRAIN_LOSS) == metrics_of(finished[1], protocol.TRAIN_LOSS)
    result = result_of(attempt)
    assert result.scores[protocol.TTT].nats == result_of(finished[1]).scores[protocol.TTT].nats
    assert result.train_seconds < result.phases["train"] + result.phases["calibrate"]


def test_recurrence_comes_on_at_its_fraction(finished):
    on = [e for _, e in read_lines(finished[1].events) if e.get("name") == "recurrence"]
    assert [(e["step"], e["layers"]) for e in on] == [(6, [0, 1, 2, 3, 2, 3, 4, 5])]


def test_a_second_run_of_one_spec_gives_the_same_curve_bit_for_bit(finished):
    run, attempt = finished
    again = execute(run)
    assert metrics_of(again, "train_loss") == metrics_of(attempt, "train_loss")
    assert result_of(again).artifact_sha256 == result_of(attempt).artifact_sha256
    first, second = result_of(attempt).scores, result_of(again).scores
    assert {stage: score.nats for stage, score in first.items()} == {
        stage: score.nats for stage, score in second.items()
    }


def test_another_seed_differs_at_the_first_step(finished, tmp_path, prepared):
    other = execute(plan(tmp_path, prepared, micro_config(schedule__steps=1), seed=2))
    assert metrics_of(other, "train_loss")[1] != metrics_of(finished[1], "train_loss")[1]


def test_warm_up_is_undone_to_the_last_bit(finished, tmp_path, prepared):
    without = execute(plan(tmp_path, prepared, micro_config(schedule__warmup_steps=0)))
    assert metrics_of(without, "train_loss") == metrics_of(finished[1], "train_loss")


def test_readable_source_and_bundle_give_the_same_loss(finished):
    run, attempt = finished
    from_source = execute(run, source=True)
    assert metrics_of(from_source, "train_loss") == metrics_of(attempt, "train_loss")
    assert result_of(from_source).artifact_sha256 == result_of(attempt).artifact_sha256


def test_the_artifact_gives_back_the_scored_weights(finished):
    run, _ = finished
    file = artifact.load(run.artifact.read_bytes(), "artifact")
    weights = artifact.decode(run.weights.read_bytes(), "weights")
    assert set(file.tensors) == set(weights.tensors)
    assert file.meta["recurrent"] == 1
    for name, tensor in file.state().items():
        assert torch.isfinite(tensor).all()
        assert (tensor - weights.state()[name]).norm() <= 0.2 * weights.state()[name].norm() + 1e-6, name


def recheck(directory, data):
    """Score the model file and the bundle that lie in a directory, with nothing else of the run."""
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "train_gpt.py", ".", "--recheck", str(data)],
        cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def alone(run, directory):
    directory.mkdir()
    for path in (run.bundle, run.artifact):
        shutil.copy(path, directory)
    return RunDir(directory)


def test_a_model_file_and_its_bundle_alone_give_the_run_s_scores_to_the_bit(finished, tmp_path, prepared):
    run, attempt = finished
    lone, data = alone(run, tmp_path / "lone"), tmp_path / "validation"
    shutil.copytree(prepared, data)
    for shard in data.glob("*train*"):
        shard.unlink()  # the training data take no part
    done = recheck(lone.root, data)
    assert done.returncode == 0, done.stderr
    found, result = read_result(lone.recheck), result_of(attempt)
    assert set(found.scores) == set(result.scores) - {protocol.POST_EMA}
    for stage, score in found.scores.items():
        assert replace(score, seconds=0) == replace(result.scores[stage], seconds=0)
    assert found.parity_nats == result.parity_nats
    assert found.status == protocol.COMPLETE


BY_DOCUMENT = {
    "ttt__method": "lora", "ttt__lora_unit": "document", "ttt__document_tokens": 8, "ttt__batch_documents": 4,
    "ttt__lora_targets": ("q", "k", "v", "out", "mlp", "head"), "ttt__lr": 0.01,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        {"ttt__method": "adamw", "ttt__parameters": "query", "evaluation__protocol": "documents"},
        {"ttt__method": "lora", "ttt__lora_targets": ("q", "up", "head"), "ttt__lr": 0.05, "evaluation__stride": 8},
        BY_DOCUMENT,
    ],
    ids=["query", "lora", "document"],
)
def test_a_stored_model_is_scored_again_with_other_knobs_and_no_training(finished, prepared, tmp_path, knobs):
    run, attempt = finished
    again = plan(run.root.parents[1], prepared, micro_config(**knobs), source=run)
    result, before = result_of(execute(again)), result_of(attempt)
    assert (result.status, result.steps, result.train_seconds) == (protocol.COMPLETE, 0, 0.0)
    assert "train" not in result.phases and protocol.POST_EMA not in result.scores
    assert replace(result.scores["roundtrip"], seconds=0) == replace(before.scores["roundtrip"], seconds=0)
    assert abs(result.parity_nats) <= PARITY_TOLERANCE
    assert result.scores["ttt"].bpb < result.scores["sliding"].bpb
    assert result.scores["ttt"].bpb != before.scores["ttt"].bpb
    split = manifest_in(prepared).splits["val"]
    assert {score.tokens for score in result.scores.values()} == {split.tokens - 1}
    assert result.artifact_bytes == again.bundle.stat().st_size + again.artifact.stat().st_size
    files = [artifact.load(path.read_bytes(), "artifact") for path in (again.artifact, again.source)]
    assert files[0].meta["config"] == read_spec(again.spec).config != files[1].meta["config"]
    assert all(torch.equal(one, other) for one, other in zip(*(file.state().values() for file in files), strict=True))
    assert problems([event for _, event in read_lines(again.attempt(1).events)], result) == []
    lone = alone(again, tmp_path / "lone")
    assert recheck(lone.root, prepared).returncode == 0
    found = read_result(lone.recheck)
    assert {stage: score.nats for stage, score in found.scores.items()} == {
        stage: score.nats for stage, score in result.scores.items()
    }
    assert found.chains == result.chains  # the same chunks, to the bit


@pytest.mark.slow
def test_stored_weights_are_quantised_anew_as_if_they_had_just_been_trained(finished, prepared):
    """A coder is no part of the weights: another one must give the same stored model as the run that trained them."""
    run, attempt = finished
    again = plan(run.root.parents[1], prepared, micro_config(quant__coder="brotli"), source=run, part=WEIGHTS)
    result, before = result_of(execute(again)), result_of(attempt)
    assert (result.status, result.steps, result.train_seconds) == (protocol.COMPLETE, 0, 0.0)
    assert "train" not in result.phases and "calibrate" in result.phases
    for stage in (protocol.POST_EMA, protocol.ROUNDTRIP, protocol.SLIDING, protocol.TTT):
        assert replace(result.scores[stage], seconds=0) == replace(before.scores[stage], seconds=0), stage
    files = [artifact.load(path.read_bytes(), "artifact") for path in (again.artifact, run.artifact)]
    assert all(torch.equal(one, other) for one, other in zip(*(file.state().values() for file in files), strict=True))
    assert not again.weights.exists()  # they are the source's
    assert problems([event for _, event in read_lines(again.attempt(1).events)], result) == []


@pytest.mark.slow
def test_weights_that_learn_before_quantisation_are_scored_once_and_the_log_says_so(finished, prepared, tmp_path):
    run, attempt = finished
    positions, length = manifest_in(prepared).splits["val"].tokens - 1, 32
    whole = positions // length * length  # what is left is shorter than a sequence
    assert 0 < positions - whole < length
    knobs = {"ttt__before_quantization": True, "ttt__chunk_tokens": whole, "ttt__lr": 0.5, "quant__method": "rtn"}
    again = plan(run.root.parents[1], prepared, micro_config(**knobs), source=run, part=WEIGHTS)
    result, before = result_of(execute(again)), result_of(attempt)
    assert result.status == protocol.COMPLETE
    assert set(result.scores) == {protocol.POST_EMA, protocol.ROUNDTRIP, protocol.SLIDING}
    assert result.parity_nats is None and "adapt" in result.phases
    assert result.scores["post_ema"].bpb < before.scores["post_ema"].bpb - 0.01  # it has learned what it is scored on
    assert result.scores["sliding"].bpb < before.scores["sliding"].bpb
    warned = [e["name"] for _, e in read_lines(again.attempt(1).events) if e["kind"] == protocol.WARNING]
    assert "learned_before_quantization" in warned
    lone = alone(again, tmp_path / "lone")
    assert recheck(lone.root, prepared).returncode == 0
    assert read_result(lone.recheck).scores.keys() == {protocol.ROUNDTRIP, protocol.SLIDING}


@pytest.mark.slow
def test_two_processes_adapt_by_document_as_one_does(finished, prepared):
    run, _ = finished
    again = plan(run.root.parents[1], prepared, micro_config(**{**BY_DOCUMENT, "ttt__lr": 0.02}), source=run)
    one, two = (result_of(execute(again, processes=processes)) for processes in (1, 2))
    assert (two.status, two.world_size) == (protocol.COMPLETE, 2)
    for stage, score in one.scores.items():
        assert (two.scores[stage].tokens, two.scores[stage].bytes) == (score.tokens, score.bytes)
        assert two.scores[stage].bpb == pytest.approx(score.bpb, rel=1e-5)
    assert problems([event for _, event in read_lines(again.attempt(2).events)], two) == []


def test_a_damaged_model_file_ends_a_recheck_in_our_own_words(finished, tmp_path, prepared):
    lone = alone(finished[0], tmp_path / "lone")
    content = bytearray(lone.artifact.read_bytes())
    content[len(content) // 2] ^= 1
    lone.artifact.write_bytes(content)
    done = recheck(lone.root, prepared)
    assert done.returncode == 5
    assert done.stderr.startswith("error: ")
    assert "artifact.bin" in done.stderr
    assert not lone.recheck.exists()


def test_accumulating_micro_batches_changes_only_rounding(finished, tmp_path, prepared):
    split = execute(plan(tmp_path, prepared, micro_config(data__micro_batch_sequences=3, schedule__steps=3)))
    whole = metrics_of(finished[1], "train_loss")
    for step, loss in metrics_of(split, "train_loss").items():
        assert loss == pytest.approx(whole[step], rel=1e-3)  # bfloat16 in Muon amplifies a sum in another order


def test_two_processes_train_and_score_as_one_does(finished, tmp_path, prepared):
    run = plan(tmp_path, prepared, micro_config(schedule__steps=3))
    alone, together = execute(run), execute(run, processes=2)
    first, second = result_of(alone), result_of(together)
    assert (first.world_size, second.world_size) == (1, 2)
    assert second.status == protocol.COMPLETE
    losses = metrics_of(alone, "train_loss"), metrics_of(together, "train_loss")
    assert losses[0].keys() == losses[1].keys()
    assert losses[1][1] == pytest.approx(losses[0][1], abs=1e-5)  # before any update: only the order of a sum differs
    assert losses[1][3] == pytest.approx(losses[0][3], rel=1e-3)  # bfloat16 in Muon amplifies it
    for stage, score in first.scores.items():
        assert (second.scores[stage].tokens, second.scores[stage].bytes) == (score.tokens, score.bytes)
        assert second.scores[stage].bpb == pytest.approx(score.bpb, rel=2e-3)


def test_the_wall_clock_stops_training_in_time_with_calibration_inside(tmp_path, prepared):
    config = micro_config(
        schedule__clock="time",
        schedule__steps=10**6,
        limits__train_seconds=4.0,
        limits__reserve_seconds=2.0,
        ttt__method="off",
    )
    result = result_of(execute(plan(tmp_path, prepared, config)))
    assert result.status == protocol.COMPLETE
    assert result.phases["train"] <= 2.5  # a last step slower than all of the tail may use up some of the reserve
    assert result.train_seconds <= 4.0
    assert result.steps > 3
    assert protocol.TTT not in result.scores


def test_a_calibration_that_takes_longer_than_planned_shortens_training_and_is_told(tmp_path, prepared):
    config = micro_config(
        schedule__clock="time",
        schedule__steps=10**6,
        limits__train_seconds=4.0,
        limits__reserve_seconds=0.01,
        quant__calibration_steps=20,
        ttt__method="off",
    )
    attempt = execute(plan(tmp_path, prepared, config))
    (warning,) = [e for _, e in read_lines(attempt.events) if e["kind"] == protocol.WARNING]
    assert (warning["name"], warning["planned"]) == ("reserve", 0.01)
    assert warning["needed"] > 0.01
    result, budget = result_of(attempt), 4.0 - warning["needed"]
    assert result.status == protocol.COMPLETE
    assert result.phases["train"] <= budget + 0.5  # as above: a last step slower than all of the tail
    for _, event in read_lines(attempt.events):
        if protocol.values_of(event, protocol.ELAPSED_FRAC) and event["train_seconds"] < budget:
            expected = event["train_seconds"] / budget
            assert event["values"][protocol.ELAPSED_FRAC] == pytest.approx(expected, abs=0.01)  # `needed` is rounded


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_both_quantisers_make_a_file_that_scores_close_to_the_average(tmp_path, prepared, method):
    result = result_of(execute(plan(tmp_path, prepared, micro_config(quant__method=method, ttt__method="off"))))
    assert ("calibrate" in result.phases) == (method == "gptq")
    assert result.scores["roundtrip"].bpb == pytest.approx(result.scores["post_ema"].bpb, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        {"grid": "std", "attention_clip_std": 8.0, "mlp_clip_std": 7.0, "clip_importance": 0.175},
        {"embedding_method": "gptq", "embedding_bits": 7, "grid": "std", "fit": "fill"},
        {"mlp_bits": 5, "low_rank_tensors": 2, "low_rank": 3},
    ],
)
def test_every_choice_of_the_quantiser_makes_a_file_that_scores_close_to_the_average(tmp_path, prepared, knobs):
    config = micro_config(**{f"quant__{name}": value for name, value in knobs.items()}, ttt__method="off")
    run = plan(tmp_path, prepared, config)
    result = result_of(execute(run))
    assert result.status == protocol.COMPLETE
    assert result.scores["roundtrip"].bpb == pytest.approx(result.scores["post_ema"].bpb, rel=0.03)
    corrections = [n for n in artifact.load(run.artifact.read_bytes(), "artifact").tensors if n.endswith(LEFT)]
    assert len(corrections) == knobs.get("low_rank_tensors", 0)


def test_a_cap_just_below_the_file_is_kept_by_a_coarser_grid(finished, tmp_path, prepared):
    cap = result_of(finished[1]).artifact_bytes - 200
    knobs = {"limits__artifact_bytes": cap, "quant__margin_bytes": 50}
    attempt = execute(plan(tmp_path, prepared, micro_config(**knobs)))
    result = result_of(attempt)
    assert result.status == protocol.COMPLETE
    assert cap - 600 <= result.artifact_bytes <= cap
    (fitted,) = [e for _, e in read_lines(attempt.events) if e["kind"] == protocol.WARNING]
    assert (fitted["name"], fitted["pruned"]) == ("fitted", 0)
    assert fitted["grid_factor"] > 1


def test_an_artifact_over_the_cap_fails_with_its_scores_beside_it(finished, tmp_path, prepared):
    cap = result_of(finished[1]).bundle_bytes + 500
    result = result_of(execute(plan(tmp_path, prepared, micro_config(limits__artifact_bytes=cap))))
    assert (result.status, result.failure.kind) == (protocol.FAILED, protocol.OVER_CAP)
    assert f"the cap is {cap}: {result.artifact_bytes - cap} too many" in result.failure.message
    assert list(result.scores) == list(protocol.STAGES)


def test_a_loss_that_is_not_a_number_fails_with_its_step(tmp_path, prepared):
    attempt = execute(plan(tmp_path, prepared, micro_config(optim__embedding_lr=1e30, optim__grad_clip_norm=0.0)))
    result = result_of(attempt)
    assert (result.status, result.failure.kind) == (protocol.FAILED, protocol.NOT_FINITE)
    assert "training loss is nan at step" in result.failure.message
    assert "hint: lower optim.matrix_lr" in attempt.stderr.read_text()
    assert len(result.failure.log.splitlines()) <= LOG_LINES + 1


def test_a_vocabulary_that_is_not_the_tokenizers_fails_as_data(tmp_path, prepared):
    result = result_of(execute(plan(tmp_path, prepared, micro_config(model__vocab_size=512))))
    assert (result.status, result.failure.kind) == (protocol.FAILED, protocol.DATA)
    assert "pieces" in result.failure.message


def test_a_batch_that_processes_cannot_share_fails_as_configuration(tmp_path, prepared):
    config = micro_config(data__tokens_per_step=96)
    result = result_of(execute(plan(tmp_path, prepared, config), processes=2))
    assert (result.status, result.failure.kind) == (protocol.FAILED, protocol.CONFIG)
    assert "2 processes cannot share" in result.failure.message


def test_a_gpu_that_is_not_there_is_said_at_once(tmp_path, prepared):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    attempt = execute(plan(tmp_path, prepared, micro_config(runtime__device="cuda")))
    assert "torch sees no GPU" in attempt.stderr.read_text()
    assert not attempt.result.exists()


def test_a_truncated_shard_is_named(tmp_path, folder):
    shard = next(folder.glob("train_*.bin"))
    os.truncate(shard, shard.stat().st_size - 10)
    result = result_of(execute(plan(tmp_path, folder, micro_config())))
    assert (result.status, result.failure.kind) == (protocol.FAILED, protocol.DATA)
    assert "truncated" in result.failure.message


def test_a_stop_ends_training_after_a_step_with_a_result(tmp_path, prepared):
    run = plan(tmp_path, prepared, micro_config(schedule__steps=10**5, schedule__log_every=1))
    attempt = run.attempt(1)
    attempt.root.mkdir(parents=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    trainer = subprocess.Popen([sys.executable, run.bundle, run.root, "--attempt", "1"], env=environment)
    deadline = time.monotonic() + 60
    while not (attempt.events.exists() and len(attempt.events.read_text().splitlines()) > 10):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    trainer.send_signal(signal.SIGTERM)
    assert trainer.wait(timeout=30) == 0
    result = result_of(attempt)
    assert result.status == protocol.STOPPED
    assert 0 < result.steps < 10**5
    assert not run.artifact.exists()
