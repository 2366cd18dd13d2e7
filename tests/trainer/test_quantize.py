import dataclasses

import pytest
import torch

from tests.trainer.tiny import calibrated, random_model, random_tokens
from trainer.calibration import Calibration, feel
from trainer.config import QuantConfig
from trainer.gptq import Quantized, remaining_error
from trainer.model import HEAD
from trainer.quantize import LEAST_FELT, LEFT, RIGHT, corrected, fisher_steps, grids_of, quantize

NOTHING = Calibration()


@pytest.fixture(scope="module")
def model():
    return random_model(width=64, rope_dims=4)


@pytest.fixture(scope="module")
def found(model):
    return calibrated(model)


def state_of(rounded):
    plain = {n: t.dequantize() if isinstance(t, Quantized) else t.float() for n, t in rounded.tensors.items()}
    return corrected(plain)


def error(model, rounded, names):
    state, parameters = state_of(rounded), dict(model.named_parameters())
    return sum((state[name] - parameters[name].detach()).square().sum().item() for name in names)


def matrices(model, role=""):
    return [f"{name}.weight" for name, _, _ in model.matrices() if role in name]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_matrices_and_tables_are_stored_as_integers_and_vectors_as_they_are(model, found, method):
    rounded = quantize(model, found, QuantConfig(method=method))
    quantized = {name for name, tensor in rounded.tensors.items() if isinstance(tensor, Quantized)}
    assert quantized == {*matrices(model), "embedding.weight", "value_embedding.table.weight"}
    assert set(rounded.tensors) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            assert torch.equal(rounded.tensors[name], parameter)
    model.load_state_dict(state_of(rounded))


def test_bits_go_by_role(model):
    rounded = quantize(model, NOTHING, QuantConfig(attention_bits=6, mlp_bits=5, embedding_bits=8))
    for name in matrices(model):
        largest = 15 if ".mlp." in name else 31
        assert int(rounded.tensors[name].integers_MN.abs().max()) == largest
    assert int(rounded.tensors["embedding.weight"].integers_MN.abs().max()) == 127


def test_deviations_go_by_role(model):
    config = QuantConfig(grid="std", attention_clip_std=13.0, mlp_clip_std=11.5)
    grids = grids_of(model, {}, config)
    assert grids["blocks.0.mlp.up"].clip_std == 11.5
    assert grids["blocks.0.attention.query"].clip_std == 13.0
    by_quantile = grids_of(model, {}, dataclasses.replace(config, grid="quantile"))
    assert by_quantile["blocks.0.mlp.up"].clip_std == 0


def test_matrices_whose_inputs_are_smallest_get_one_bit_less(model, found):
    config = QuantConfig(coarse_matrices=5)
    bits = {name: grid.bits for name, grid in grids_of(model, found.moments, config).items()}
    traces = {name: float(found.moments[name].trace()) for name in bits}
    coarse = {name for name, depth in bits.items() if depth == 5}
    assert len(coarse) == 5 and set(bits.values()) == {5, 6}
    assert max(traces[name] for name in coarse) <= min(traces[name] for name in set(bits) - coarse)
    stored = quantize(model, found, config).tensors
    assert all(int(stored[f"{name}.weight"].integers_MN.abs().max()) <= 15 for name in coarse)


def test_matrices_that_nothing_reads_are_zero_in_the_file_and_no_coarser_for_it():
    model = random_model(first_attention_layer=2)
    found, config = calibrated(model), QuantConfig(coarse_matrices=3)
    unread = [f"blocks.{layer}.attention.{name}" for layer in (0, 1) for name in ("query", "key", "value", "out")]
    assert {grids_of(model, found.moments, config)[name].bits for name in unread} == {6}
    stored = quantize(model, found, config).tensors
    assert [name for name in matrices(model) if not stored[name].integers_MN.any()] == [
        f"{name}.weight" for name in unread
    ]


def test_the_output_head_by_gptq_loses_less_in_the_logits(model, found):
    config = QuantConfig(embedding_bits=4)
    table = model.embedding.weight.detach()

    def logit_error(method):
        rounded = quantize(model, found, dataclasses.replace(config, embedding_method=method))
        difference = rounded.tensors["embedding.weight"].dequantize() - table
        return float((difference @ found.moments[HEAD] * difference).sum())

    assert logit_error("gptq") < 0.9 * logit_error("rtn")


def test_low_rank_factors_correct_the_worst_rounded_matrices(model):
    plain = quantize(model, NOTHING, QuantConfig(mlp_bits=4))
    helped = quantize(model, NOTHING, QuantConfig(mlp_bits=4, low_rank_tensors=3, low_rank=4))
    names = sorted(n.removesuffix(LEFT) for n in helped.tensors if n.endswith(LEFT))
    assert sorted(n.removesuffix(RIGHT) for n in helped.tensors if n.endswith(RIGHT)) == names
    others = set(matrices(model)) - set(names)
    assert len(names) == 3
    assert all(".mlp." in name for name in names)
    assert error(model, helped, names) < 0.95 * error(model, plain, names)
    assert error(model, helped, others) == error(model, plain, others)
    worst = {name: error(model, plain, [name]) for name in matrices(model)}
    assert sorted(sorted(worst, key=worst.get)[-3:]) == names


def test_given_scales_are_taken_as_they_are(model, found):
    first = quantize(model, found, QuantConfig())
    scales = {name: first.tensors[name].scaled(1.5).scales_M for name in matrices(model)}
    coarser = quantize(model, found, QuantConfig(), scales)
    for name in matrices(model):
        assert torch.equal(coarser.tensors[name].scales_M, scales[name])
    assert torch.equal(coarser.tensors["embedding.weight"].scales_M, first.tensors["embedding.weight"].scales_M)
    assert error(model, coarser, matrices(model)) > error(model, first, matrices(model))


def test_under_fisher_every_row_adds_the_same_to_the_loss(model, found):
    config = QuantConfig(grid="fisher", method="rtn", fisher_nats=0.01)
    steps = fisher_steps(model, Calibration({}, found.information), config)
    assert set(steps) == set(found.information)
    weights = sum(p.numel() for n, p in model.named_parameters() if n in steps)
    for name, steps_M in steps.items():
        felt = found.information[name] * steps_M**2 / 24
        least = LEAST_FELT * found.information[name].mean()
        expected = torch.full_like(felt, 0.01 / weights)
        believed = found.information[name] > least
        torch.testing.assert_close(felt[believed], expected[believed])
        assert (felt[~believed] <= expected[~believed]).all()


def test_error_feedback_allows_larger_steps(model, found):
    config = QuantConfig(grid="fisher")
    plain = fisher_steps(model, Calibration({}, found.information), config)
    fed_back = fisher_steps(model, found, config)
    for name in matrices(model):
        expected = remaining_error(found.moments[name.removesuffix(".weight")], config.damping) ** -0.5
        torch.testing.assert_close(fed_back[name] / plain[name], torch.full_like(plain[name], expected))
        assert expected > 1


def test_no_step_is_so_small_that_its_row_is_clipped(model, found):
    rounded = quantize(model, found, QuantConfig(grid="fisher", fisher_nats=1e-15, method="rtn"))
    parameters = dict(model.named_parameters())
    for name in found.information:
        tensor = rounded.tensors[name]
        assert int(tensor.integers_MN.abs().max()) in (125, 126, 127)
        difference = (tensor.dequantize() - parameters[name].detach()).abs()
        assert (difference <= 0.501 * tensor.scales_M.float()[:, None]).all()


def sampled(model, sequences, length):
    """Text as the model itself would write it."""
    generator = torch.Generator().manual_seed(0)
    tokens = random_tokens(sequences, 1)
    with torch.no_grad():
        while tokens.size(1) <= length:
            logits = model.logits(model.hidden(tokens, True)[:, -1])
            tokens = torch.cat((tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)), 1)
    return tokens


def test_the_loss_that_fisher_says_is_added_is_added(model):
    """On the model's own text, where the Fisher information is the loss's curvature."""
    text, information = sampled(model, 256, 16), {}
    for sequence in text:
        feel(model, sequence[None], True, information)
    found = Calibration({}, {name: squares / text[:, 1:].numel() for name, squares in information.items()})
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    rounded = state_of(quantize(model, found, QuantConfig(grid="fisher", method="rtn", fisher_nats=0.02)))
    mirrored = {name: 2 * weights[name] - rounded[name] for name in weights}  # the mean has no first-order term

    def loss(state):
        copy = random_model(width=64, rope_dims=4)
        copy.load_state_dict(state)
        with torch.no_grad():
            return copy(text[:, :-1], text[:, 1:], True).item()

    assert (loss(rounded) + loss(mirrored)) / 2 - loss(weights) == pytest.approx(0.02, rel=0.3)


def test_a_floor_holds_for_tables_too(model):
    low, high = (
        quantize(model, NOTHING, QuantConfig(clip_floor=floor)).tensors["embedding.weight"] for floor in (0, 1)
    )
    assert low.scales_M.max() < 1 / 127
    torch.testing.assert_close(
        high.scales_M.float(), torch.full_like(high.scales_M.float(), 1 / 127), rtol=0.008, atol=0
    )


def test_vectors_can_be_stored_in_half(model):
    rounded = quantize(model, NOTHING, QuantConfig(half_vectors=True))
    plain = [t for t in rounded.tensors.values() if not isinstance(t, Quantized)]
    assert {t.dtype for t in plain} == {torch.float16}


def test_matrices_without_usable_moments_are_named(model, found):
    broken = Calibration({**found.moments, "blocks.2.mlp.up": -torch.eye(64)})
    rounded = quantize(model, broken, QuantConfig())
    assert rounded.without_feedback == ["blocks.2.mlp.up"]
    assert quantize(model, NOTHING, QuantConfig()).without_feedback == []
