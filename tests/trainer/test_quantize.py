import dataclasses

import pytest
import torch

from tests.trainer.tiny import random_model, random_tokens
from trainer.config import QuantConfig
from trainer.gptq import Quantized, SecondMoments
from trainer.model import HEAD
from trainer.quantize import LEFT, RIGHT, corrected, grid_of, quantize


@pytest.fixture(scope="module")
def model():
    return random_model(width=64, rope_dims=4)


@pytest.fixture(scope="module")
def moments(model):
    heard = SecondMoments()
    with torch.no_grad():
        model.hidden(random_tokens(64, 16), True, observe=heard)
    return {HEAD: heard.sums[HEAD], **{name: heard.sums[shared] for name, _, shared in model.matrices()}}


def state_of(rounded):
    plain = {n: t.dequantize() if isinstance(t, Quantized) else t.float() for n, t in rounded.tensors.items()}
    return corrected(plain)


def error(model, rounded, names):
    state, parameters = state_of(rounded), dict(model.named_parameters())
    return sum((state[name] - parameters[name].detach()).square().sum().item() for name in names)


def matrices(model, role=""):
    return [f"{name}.weight" for name, _, _ in model.matrices() if role in name]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_matrices_and_tables_are_stored_as_integers_and_vectors_as_they_are(model, moments, method):
    rounded = quantize(model, moments, QuantConfig(method=method))
    quantized = {name for name, tensor in rounded.tensors.items() if isinstance(tensor, Quantized)}
    assert quantized == {*matrices(model), "embedding.weight", "value_embedding.table.weight"}
    assert set(rounded.tensors) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            assert torch.equal(rounded.tensors[name], parameter)
    model.load_state_dict(state_of(rounded))


def test_bits_go_by_role(model):
    rounded = quantize(model, {}, QuantConfig(attention_bits=6, mlp_bits=5, embedding_bits=8))
    for name in matrices(model):
        largest = 15 if ".mlp." in name else 31
        assert int(rounded.tensors[name].integers_MN.abs().max()) == largest
    assert int(rounded.tensors["embedding.weight"].integers_MN.abs().max()) == 127


def test_deviations_go_by_role():
    config = QuantConfig(clip="std", attention_clip_std=13.0, mlp_clip_std=11.5)
    assert grid_of("blocks.0.mlp.up", config).clip_std == 11.5
    assert grid_of("blocks.0.attention.query", config).clip_std == 13.0
    assert grid_of("blocks.0.mlp.up", dataclasses.replace(config, clip="quantile")).clip_std == 0


def test_the_output_head_by_gptq_loses_less_in_the_logits(model, moments):
    config = QuantConfig(embedding_bits=4)
    table = model.embedding.weight.detach()

    def logit_error(method):
        rounded = quantize(model, moments, dataclasses.replace(config, embedding_method=method))
        difference = rounded.tensors["embedding.weight"].dequantize() - table
        return float((difference @ moments[HEAD] * difference).sum())

    assert logit_error("gptq") < 0.9 * logit_error("rtn")


def test_low_rank_factors_correct_the_worst_rounded_matrices(model):
    plain = quantize(model, {}, QuantConfig(mlp_bits=4))
    helped = quantize(model, {}, QuantConfig(mlp_bits=4, low_rank_tensors=3, low_rank=4))
    names = sorted(n.removesuffix(LEFT) for n in helped.tensors if n.endswith(LEFT))
    assert sorted(n.removesuffix(RIGHT) for n in helped.tensors if n.endswith(RIGHT)) == names
    others = set(matrices(model)) - set(names)
    assert len(names) == 3
    assert all(".mlp." in name for name in names)
    assert error(model, helped, names) < 0.95 * error(model, plain, names)
    assert error(model, helped, others) == error(model, plain, others)
    worst = {name: error(model, plain, [name]) for name in matrices(model)}
    assert sorted(sorted(worst, key=worst.get)[-3:]) == names


def test_on_the_grid_of_another_rounding_scales_are_its_own_times_a_factor(model, moments):
    config = QuantConfig()
    first = quantize(model, moments, config)
    coarser = quantize(model, moments, config, like=first, factor=1.5)
    for name in matrices(model):
        expected = first.tensors[name].scales_M.float() * 1.5
        torch.testing.assert_close(coarser.tensors[name].scales_M.float(), expected, rtol=1e-3, atol=1e-7)
    assert torch.equal(coarser.tensors["embedding.weight"].scales_M, first.tensors["embedding.weight"].scales_M)
    assert error(model, coarser, matrices(model)) > error(model, first, matrices(model))


def test_matrices_without_usable_moments_are_named(model, moments):
    broken = {**moments, "blocks.2.mlp.up": -torch.eye(64)}
    rounded = quantize(model, broken, QuantConfig())
    assert rounded.without_feedback == ["blocks.2.mlp.up"]
    assert quantize(model, {}, QuantConfig()).without_feedback == []
