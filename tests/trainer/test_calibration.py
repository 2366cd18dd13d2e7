import pytest
import torch

from tests.trainer.make_run import micro_config
from tests.trainer.tiny import ALONE, random_model, random_tokens
from trainer.calibration import calibrate, calibration_seconds, feel, generate, information_sequences
from trainer.data import BOS, Dataset
from trainer.distributed import World
from trainer.model import HEAD, Model
from trainer.optim import parameter_groups
from trainer.train import random_batch


@pytest.fixture(scope="module")
def dataset(prepared):
    return Dataset.open(prepared, micro_config().model.vocab_size)


def fresh(config):
    torch.manual_seed(0)
    return Model(config.model, train_length=config.data.sequence_length)


def test_every_matrix_gets_the_moments_per_position_of_what_it_reads(dataset):
    config = micro_config(quant__calibration_steps=2)
    model = fresh(config)
    found = calibrate(model, dataset, config=config, order_seed=1, recurrent=False, world=ALONE)
    assert set(found.moments) == {HEAD, *(name for name, _, _ in model.matrices())}
    assert found.moments["blocks.0.attention.query"] is found.moments["blocks.0.attention.value"]
    for name, matrix, _ in model.matrices():
        assert found.moments[name].shape == (matrix.in_features, matrix.in_features)
    assert found.moments[HEAD].trace().item() == pytest.approx(config.model.width, rel=1e-4)  # normalised positions
    # What attention reads has unit mean squares, times the layer's scale: the trace is the number of columns.
    trace = found.moments["blocks.1.attention.query"].trace().item()
    assert trace == pytest.approx(config.model.width * model.blocks[1].input_scale ** 2, rel=1e-4)
    assert found.information == {}


def test_information_is_the_mean_square_of_each_sequence_s_gradient_per_position():
    model, sequences, squares = random_model(), random_tokens(3, 17), {}
    for sequence in sequences:
        feel(model, sequence[None], True, squares)
    expected = torch.zeros(model.config.width)
    for sequence in sequences[:, None]:
        model.zero_grad()
        model.nats(sequence[:, :-1], sequence[:, 1:], recurrent=True, scored=16).sum().backward()
        expected += model.blocks[2].mlp.down.weight.grad.square().mean(1)
    torch.testing.assert_close(squares["blocks.2.mlp.down.weight"], expected)
    vectors = {id(parameter) for parameter in parameter_groups(model)["scalar"]}
    assert set(squares) == {name for name, p in model.named_parameters() if id(p) not in vectors}


def test_fisher_s_information_is_collected_where_it_is_asked_for(dataset):
    config = micro_config(quant__grid="fisher", quant__method="rtn", quant__information_sequences=8)
    model = fresh(config)
    found = calibrate(model, dataset, config=config, order_seed=1, recurrent=True, world=ALONE)
    assert found.moments == {}
    for name, parameter in model.named_parameters():
        if name in found.information:
            assert found.information[name].shape == parameter.shape[:1]
            assert (found.information[name] >= 0).all()
    assert found.information["embedding.weight"].sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("size", "sequences"), [(1, 10), (4, 3), (8, 2)])
def test_sequences_for_information_are_shared_by_the_processes(size, sequences):
    config = micro_config(quant__grid="fisher", quant__information_sequences=10)
    assert information_sequences(config, World(rank=0, size=size, device=torch.device("cpu"))) == sequences
    assert information_sequences(micro_config(), ALONE) == 0


def test_calibration_is_timed_before_training():
    seconds = {}
    for knobs in ({"method": "rtn"}, {"method": "gptq"}, {"grid": "fisher", "information_sequences": 64}):
        config = micro_config(**{f"quant__{name}": value for name, value in knobs.items()})
        seconds[str(knobs)] = calibration_seconds(fresh(config), random_batch(config, ALONE), config, ALONE)
    nothing, moments, both = seconds.values()
    assert nothing == 0 < moments < both


def test_the_model_writes_its_own_text_row_by_row_from_a_bos_on():
    config = micro_config(quant__calibration="generated", quant__generated_sequences=5, data__micro_batch_sequences=2)
    model = random_model(vocab_size=config.model.vocab_size)
    written = generate(model, config, 1, ALONE)
    assert written.shape == (5, config.data.sequence_length + 1) and written.dtype == torch.int64
    assert (written[:, 0] == BOS).all() and len({tuple(row) for row in written.tolist()}) == 5
    assert torch.equal(written, generate(model, config, 1, ALONE))
    other = World(rank=1, size=2, device=ALONE.device)
    half = generate(model, config, 1, other)
    assert len(half) == 3 and not torch.equal(half, written[:3])


def test_what_the_model_writes_follows_its_own_distribution():
    config = micro_config(
        quant__calibration="generated", quant__generated_sequences=400, quant__generated_temperature=1.0,
        data__sequence_length=2, data__tokens_per_step=2, evaluation__sequence_length=32,
    )  # fmt: skip
    model = random_model(vocab_size=config.model.vocab_size)
    with torch.no_grad():
        model.embedding.weight.mul_(4)  # so that a few pieces are likely
        chances = model.logits(model.hidden(torch.full((1, 1), BOS), 0))[0, 0].softmax(-1)
    first = generate(model, config, 0, ALONE)[:, 1]
    likely = int(chances.argmax())
    p = chances[likely].item()
    assert (first == likely).float().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / 400) ** 0.5)


def test_moments_of_what_the_model_writes_are_means_per_position(dataset):
    config = micro_config(quant__calibration="generated", quant__generated_sequences=6)
    model = fresh(config)
    found = calibrate(model, dataset, config=config, order_seed=1, recurrent=0, world=ALONE)
    assert found.moments[HEAD].trace().item() == pytest.approx(config.model.width, rel=1e-4)  # normalised positions
    assert calibration_seconds(model, random_batch(config, ALONE), config, ALONE) == 0  # takes nothing of the budget
