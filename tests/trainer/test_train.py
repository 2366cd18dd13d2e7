import math

import pytest
import torch

from tests.trainer.make_run import micro_config
from tests.trainer.tiny import ALONE, CONFIG, LENGTH, random_model, random_tokens
from trainer import protocol
from trainer.config import with_knobs
from trainer.data import Dataset
from trainer.distributed import World
from trainer.errors import ConfigError
from trainer.model import Model
from trainer.protocol import EventLog, read_lines
from trainer.train import Network, TrainClock, reserve_seconds, sequences_per_process, train, warm_up

MICRO_BATCHES = {
    "data.sequence_length": LENGTH,
    "data.tokens_per_step": 5 * LENGTH,
    "data.micro_batch_sequences": 2,
    "schedule.warmup_steps": 2,
    "quant.calibration_steps": 3,
}


ONE_OF_TWO = World(rank=0, size=2, device=ALONE.device)


def network_of(model, world=ALONE, **knobs):
    config = with_knobs(CONFIG, {**MICRO_BATCHES, **{name.replace("__", "."): value for name, value in knobs.items()}})
    return Network(model, config, world)


@pytest.fixture
def dataset(prepared):
    return Dataset.open(prepared, micro_config().model.vocab_size)


def trained(dataset, tmp_path, kind=Network, **knobs):
    """A few steps in this process: the outcome and its events."""
    config = micro_config(schedule__steps=4, **knobs)
    torch.manual_seed(0)
    model = Model(config.model, train_length=config.data.sequence_length)
    log = EventLog(tmp_path / "events.jsonl")
    outcome = train(
        model, kind(model, config, ALONE), dataset, config=config, seed=1, world=ALONE, log=log, reserve=0.0,
        stop_asked=lambda: False,
    )  # fmt: skip
    return outcome, [event for _, event in read_lines(tmp_path / "events.jsonl")]


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("sequences", [1, 4, 5, 7])
def test_unequal_micro_batches_add_up_to_the_gradient_of_the_mean(recurrent, sequences):
    model, whole = random_model(), random_model()
    network, batch = network_of(model), random_tokens(rows=sequences, length=LENGTH + 1)
    loss = network.backward(batch, recurrent)
    expected = whole(batch[:, :-1], batch[:, 1:], recurrent)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for (name, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (parameter.grad - other.grad).norm() <= 1e-5 * other.grad.norm() + 1e-8, name  # sums in another order


def test_one_process_of_several_gives_its_share_of_the_gradient_and_its_own_mean_loss():
    model, whole, batch = random_model(), random_model(), random_tokens(rows=4, length=LENGTH + 1)
    network = network_of(model, ONE_OF_TWO)
    losses = [network.backward(part, True) for part in batch.split(2)]  # as if it were both, one after the other
    expected = whole(batch[:, :-1], batch[:, 1:], True)
    expected.backward()
    torch.testing.assert_close(sum(losses) / 2, expected.detach())
    for parameter, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-6, rtol=1e-4)


def test_preparing_leaves_no_gradients():
    model = random_model()
    network = network_of(model)
    network.prepare()
    assert network.gradients.all.abs().max() == 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_warm_up_leaves_weights_and_gradients_as_they_were_and_times_the_calibration():
    model, before = random_model(), random_model()
    network = network_of(model)
    seconds = warm_up(model, network, network.config, ALONE)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before.parameters(), strict=True))
    assert network.gradients.all.abs().max() == 0
    assert 0 < seconds < 60


def test_without_gptq_there_is_no_calibration_to_wait_for():
    model = random_model()
    network = network_of(model, quant__method="rtn")
    assert warm_up(model, network, network.config, ALONE) == 0.0


@pytest.mark.parametrize(
    ("clock", "calibration_seconds", "reserve"),
    [("time", 3.0, 5.0), ("time", 7.0, 7.0), ("step", 7.0, 7.0), ("step", 90.0, 90.0)],
)
def test_a_calibration_that_takes_longer_enlarges_the_reserve(clock, calibration_seconds, reserve):
    limits = {"schedule.clock": clock, "limits.train_seconds": 60.0, "limits.reserve_seconds": 5.0}
    assert reserve_seconds(with_knobs(CONFIG, limits), calibration_seconds) == reserve


def test_a_calibration_that_leaves_no_time_to_train_is_refused():
    limits = {"schedule.clock": "time", "limits.train_seconds": 60.0, "limits.reserve_seconds": 5.0}
    with pytest.raises(ConfigError, match="would take 60.0 s, limits.train_seconds is 60") as caught:
        reserve_seconds(with_knobs(CONFIG, limits), 60.0)
    assert "quant.calibration_steps" in caught.value.hint


def test_the_clock_expects_one_more_step_as_slow_as_the_slowest():
    clock = TrainClock(ALONE)
    clock.step_seconds.extend([30.0, 10.0])
    assert clock.next_step_end() == pytest.approx(30.0, abs=1.0)


def test_the_clock_counts_the_step_that_is_still_under_way():
    clock = TrainClock(ALONE)
    clock.step_seconds.extend([30.0, 10.0])
    clock.pending = object()  # the GPU's mark at the end of the step before
    assert clock.next_step_end() == pytest.approx(60.0, abs=1.0)


def test_before_the_first_step_nothing_is_known_of_a_steps_time():
    assert TrainClock(ALONE).next_step_end() == pytest.approx(0.0, abs=1.0)


class Surprised(Network):
    """Compiles once more in its third step."""

    steps = 0

    def backward(self, batch_BT, recurrent):
        self.steps += 1
        return super().backward(batch_BT, recurrent)

    def surprises(self):
        return 7 + (self.steps >= 3)


def test_a_compilation_in_a_timed_step_is_told(dataset, tmp_path):
    _, events = trained(dataset, tmp_path, Surprised)
    (warning,) = [event for event in events if event["kind"] == protocol.WARNING]
    assert (warning["name"], warning["step"]) == ("recompiled", 3)
    assert warning["seconds"] > 0


def test_steps_without_surprises_warn_of_nothing(dataset, tmp_path):
    outcome, events = trained(dataset, tmp_path)
    assert outcome.steps == 4
    assert math.isfinite(outcome.final_train_loss)
    assert protocol.WARNING not in {event["kind"] for event in events}


def test_training_does_not_depend_on_how_a_step_is_cut(dataset, tmp_path):
    whole, _ = trained(dataset, tmp_path)
    cut, _ = trained(dataset, tmp_path, data__micro_batch_sequences=3)
    assert cut.final_train_loss == pytest.approx(
        whole.final_train_loss, rel=1e-3
    )  # bfloat16 in Muon amplifies rounding


def test_a_step_that_processes_cannot_share_equally_is_refused():
    with pytest.raises(ConfigError, match="holds 5 sequences, which 2 processes cannot share equally"):
        sequences_per_process(with_knobs(CONFIG, MICRO_BATCHES), ONE_OF_TWO)
