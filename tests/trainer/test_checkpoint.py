import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.trainer.make_run import execute, metrics_of, micro_config, plan, result_of
from tests.trainer.tiny import ALONE
from trainer import protocol
from trainer.checkpoint import Checkpoint, read_checkpoint
from trainer.data import Dataset
from trainer.model import Model
from trainer.protocol import EventLog, RunDir, read_lines
from trainer.train import Network, train

STEPS, LEFT_AFTER = 12, 5  # recurrence comes on at the sixth step


def attempt_of(run, number, data, world=ALONE, *, leaves_after=None, seed=1, **knobs):
    """One attempt's training, which leaves after so many steps of its own: outcome, weights and the seconds it continues."""
    knobs = {"schedule__clock": "step", **knobs}
    config = micro_config(schedule__steps=STEPS, runtime__resumable=True, **knobs)
    torch.manual_seed(seed)
    model = Model(config.model, train_length=config.data.sequence_length)
    attempt = run.attempt(number)
    attempt.root.mkdir(parents=True, exist_ok=True)
    log = EventLog(attempt.events if world.is_first else None)
    checkpoint, asked = Checkpoint(run, attempt, world, log), iter(range(STEPS + 1))
    dataset = Dataset.open(data, config.model.vocab_size)
    outcome = train(
        model, Network(model, config, world), dataset, config=config, seed=seed, world=world, log=log, reserve=0.0,
        stop_asked=lambda: next(asked) == leaves_after, checkpoint=checkpoint,
    )  # fmt: skip
    return outcome, [parameter.detach() for parameter in model.parameters()], checkpoint.earlier


def events_of(run, number):
    return [event for _, event in read_lines(run.attempt(number).events)]


def warnings_of(run, number):
    return [event for event in events_of(run, number) if event["kind"] == protocol.WARNING]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, prepared):
    """Uninterrupted training."""
    return attempt_of(RunDir(tmp_path_factory.mktemp("whole") / "run"), 1, prepared)


@pytest.mark.parametrize("leaves", [(1,), (LEFT_AFTER,), (STEPS - 1,), (3, 4, 2)])
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one_to_the_bit(run, prepared, whole, leaves):
    for number, steps in enumerate(leaves, start=1):
        outcome, *_ = attempt_of(run, number, prepared, leaves_after=steps)
        assert outcome.was_stopped and outcome.steps == sum(leaves[:number])
    outcome, weights, earlier = attempt_of(run, len(leaves) + 1, prepared)
    assert same(weights, whole[1])
    ended = replace(outcome, train_seconds=0.0)
    assert ended == replace(whole[0], train_seconds=0.0)
    assert list(earlier) == [str(number) for number in range(1, len(leaves) + 1)]


@pytest.mark.parametrize("knobs", [{"optim__ema_decay": 0.0}, {"model__tie_embeddings": False}])
def test_what_a_configuration_does_without_is_not_missed(run, prepared, knobs):
    _, weights, _ = attempt_of(RunDir(run.root.parent / "whole"), 1, prepared, **knobs)
    attempt_of(run, 1, prepared, leaves_after=LEFT_AFTER, **knobs)
    assert same(attempt_of(run, 2, prepared, **knobs)[1], weights)


def test_the_curve_goes_on_where_it_was_left_and_its_seconds_add_up(run, prepared):
    attempt_of(run, 1, prepared, leaves_after=LEFT_AFTER, schedule__clock="time")
    outcome, _, earlier = attempt_of(run, 2, prepared, schedule__clock="time")
    metrics = [e for number in (1, 2) for e in events_of(run, number) if e["kind"] == protocol.METRIC]
    assert [event["step"] for event in metrics] == list(range(1, STEPS + 1))
    seconds = [event["train_seconds"] for event in metrics]
    assert seconds == sorted(seconds)
    kept = next(e for e in events_of(run, 1) if e["kind"] == protocol.CHECKPOINT)
    back = next(e for e in events_of(run, 2) if e["kind"] == protocol.CHECKPOINT)
    assert (kept["state"], kept["step"], back["state"], back["step"]) == ("kept", LEFT_AFTER, "restored", LEFT_AFTER)
    assert earlier == {"1": kept["train_seconds"]} and back["train_seconds"] == kept["train_seconds"]
    assert seconds[LEFT_AFTER] > kept["train_seconds"] > seconds[LEFT_AFTER - 1] - 1e-4  # rounded in the event
    assert outcome.train_seconds > kept["train_seconds"]


def test_the_steps_before_it_left_say_how_long_the_next_may_take(run, prepared):
    attempt_of(run, 1, prepared, leaves_after=LEFT_AFTER)
    reached, _ = read_checkpoint(run.checkpoint)
    assert len(reached.step_seconds) == LEFT_AFTER and sum(reached.step_seconds) <= reached.seconds["1"]


def test_an_attempt_that_was_cut_off_after_training_trains_no_more(run, prepared, whole):
    attempt_of(run, 1, prepared)  # and is ended while it is scored
    outcome, weights, _ = attempt_of(run, 2, prepared)
    assert outcome.steps == STEPS and outcome.final_train_loss == whole[0].final_train_loss
    assert same(weights, whole[1])
    assert not [event for event in events_of(run, 2) if event["kind"] == protocol.METRIC]


def test_a_first_attempt_takes_no_checkpoint(run, prepared, whole):
    attempt_of(run, 1, prepared, leaves_after=LEFT_AFTER)
    run.attempt(1).events.unlink()
    _, weights, earlier = attempt_of(run, 1, prepared)
    assert (same(weights, whole[1]), earlier) == (True, {}) and not warnings_of(run, 1)


def truncate(content):
    return content[: len(content) // 2]


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def pickled(_content):
    """A file that would run code if it were unpickled."""
    return b"\x80\x04cos\nsystem\n."


@pytest.mark.parametrize("damage", [truncate, flip, pickled, lambda _: b""])
def test_a_damaged_checkpoint_is_told_and_training_begins_anew(run, prepared, whole, damage):
    attempt_of(run, 1, prepared, leaves_after=LEFT_AFTER)
    run.checkpoint.write_bytes(damage(run.checkpoint.read_bytes()))
    _, weights, earlier = attempt_of(run, 2, prepared)
    assert same(weights, whole[1]) and earlier == {}
    (warning,) = warnings_of(run, 2)
    assert warning["name"] == "restarted" and "cannot be read" in warning["reason"]


def test_a_later_attempt_without_a_checkpoint_says_that_it_began_anew(run, prepared, whole):
    _, weights, earlier = attempt_of(run, 2, prepared)
    assert same(weights, whole[1]) and earlier == {}
    (warning,) = warnings_of(run, 2)
    assert warning["name"] == "restarted" and "FileNotFoundError" in warning["reason"]


def test_the_checkpoint_of_another_run_or_of_more_processes_is_not_taken(run, prepared):
    attempt_of(run, 1, prepared, leaves_after=LEFT_AFTER)
    with np.load(run.checkpoint) as file:
        arrays = dict(file)
    for before, after in ((b'"run", 1]', b'"run", 2]'), (b'"run", 1]', b'"nur", 1]')):
        content = arrays["reached"].tobytes()
        assert before in content
        changed = {**arrays, "reached": np.frombuffer(content.replace(before, after), np.uint8)}
        with run.checkpoint.open("wb") as file:
            np.savez(file, **changed)
        run.attempt(2).events.unlink(missing_ok=True)
        assert attempt_of(run, 2, prepared)[2] == {}
        (warning,) = warnings_of(run, 2)
        assert warning["reason"].startswith("the checkpoint is of run ")


def test_nothing_is_kept_where_the_study_itself_asked_for_the_stop(run, prepared):
    run.attempt(1).root.mkdir(parents=True)
    run.attempt(1).stop.touch()
    attempt_of(run, 1, prepared, leaves_after=LEFT_AFTER)
    assert not run.checkpoint.exists()


def test_an_attempt_that_no_longer_owns_the_run_keeps_nothing(run, prepared):
    attempt_of(run, 2, prepared, leaves_after=LEFT_AFTER)
    before = run.checkpoint.read_bytes()
    run.attempt(3).root.mkdir()
    attempt_of(run, 2, prepared)
    assert run.checkpoint.read_bytes() == before


def test_a_disk_without_room_for_a_checkpoint_is_told_and_costs_nothing_else(run, prepared, whole, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    _, weights, _ = attempt_of(run, 1, prepared)
    assert same(weights, whole[1]) and not list(run.checkpoint.parent.iterdir())
    assert [warning["name"] for warning in warnings_of(run, 1)] == ["no_checkpoint"]


def both(world, run, data, leaves_after, number):
    outcome, weights, earlier = attempt_of(run, number, data, world, leaves_after=leaves_after)
    return outcome.steps, outcome.final_train_loss, weights, list(earlier)


def test_two_processes_put_their_shares_together_and_take_them_back(run, prepared, pair):
    alone = RunDir(run.root.parent / "alone")
    expected = pair(both, alone, prepared, None, 1)
    assert [steps for steps, *_ in pair(both, run, prepared, LEFT_AFTER, 1)] == [LEFT_AFTER] * 2
    for (steps, loss, weights, earlier), (_, whole_loss, whole_weights, _) in zip(
        pair(both, run, prepared, None, 2), expected, strict=True
    ):
        assert (steps, loss, earlier) == (STEPS, whole_loss, ["1"])
        assert same(weights, whole_weights)


def damaged_for_one(world, run, data):
    """As if a file system had shown the second process an older file."""
    local = run if world.is_first else RunDir(run.root.parent / "stale" / "run")
    return attempt_of(local, 2, data, world)[2]


def test_what_one_process_cannot_read_all_do_without(run, prepared, pair):
    pair(both, run, prepared, LEFT_AFTER, 1)
    assert pair(damaged_for_one, run, prepared) == [{}, {}]
    (warning,) = warnings_of(run, 2)
    assert warning["reason"] == "another process could not read the checkpoint"


# ---- whole runs ------------------------------------------------------------------------------------------------


def start(run, number):
    """Start an attempt of the bundle, as `execute` does, and come back at once."""
    attempt = run.attempt(number)
    attempt.root.mkdir(parents=True, exist_ok=True)
    with attempt.stderr.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, run.bundle, run.root, "--attempt", str(number)],
            cwd=run.root, stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        )  # fmt: skip
    return attempt, process


def wait_for_step(attempt, process, step):
    deadline = time.monotonic() + 120
    while not any(event.get("step", 0) >= step for _, event in read_lines(attempt.events)):
        assert process.poll() is None and time.monotonic() < deadline, attempt.stderr.read_text()
        time.sleep(0.002)


LONG = {"schedule__steps": 150, "runtime__resumable": True}


@pytest.mark.slow
def test_a_run_that_is_noticed_and_told_to_end_goes_on_to_the_same_artifact(tmp_path, prepared):
    run = plan(tmp_path, prepared, micro_config(**LONG))
    first, process = start(run, 1)
    wait_for_step(first, process, 5)
    first.notice.touch()
    assert process.wait(timeout=120) == 0
    second, process = start(run, 2)
    wait_for_step(second, process, 20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    results = [result_of(attempt) for attempt in (first, second, execute(run))]
    assert [result.status for result in results] == [protocol.STOPPED, protocol.STOPPED, protocol.COMPLETE]
    assert [list(result.resumed_from) for result in results] == [[], ["1"], ["1", "2"]]
    assert results[0].train_seconds == pytest.approx(results[1].resumed_from["1"])
    assert results[1].train_seconds == pytest.approx(sum(results[2].resumed_from.values()))
    assert results[2].train_seconds > results[1].train_seconds > results[0].train_seconds
    assert not run.checkpoint.exists()  # nobody goes on from a complete run
    curves = [metrics_of(attempt, "train_loss") for attempt in run.attempts()]
    again = execute(run)
    assert metrics_of(again, "train_loss") == {**curves[0], **curves[1], **curves[2]}
    assert result_of(again).artifact_sha256 == results[2].artifact_sha256
    assert result_of(again).resumed_from == {}


def test_a_run_that_is_not_resumable_keeps_no_checkpoint_and_does_not_look_for_a_notice(tmp_path, prepared):
    run = plan(tmp_path, prepared, micro_config(schedule__steps=2, ttt__method="off"))
    run.attempt(1).root.mkdir(parents=True)
    run.attempt(1).notice.touch()
    attempt, process = start(run, 1)
    assert process.wait(timeout=120) == 0
    assert result_of(attempt).status == protocol.COMPLETE
    assert [path.name for path in run.checkpoint.parent.iterdir()] == [run.weights.name]


def test_an_attempt_that_a_later_one_has_replaced_leaves_no_result_and_no_model(tmp_path, prepared):
    run = plan(tmp_path, prepared, micro_config(schedule__steps=2, ttt__method="off"))
    run.attempt(2).root.mkdir(parents=True)
    attempt, process = start(run, 1)
    assert process.wait(timeout=120) == 0, attempt.stderr.read_text()
    assert not attempt.result.exists() and not run.artifact.exists() and not run.weights.exists()
