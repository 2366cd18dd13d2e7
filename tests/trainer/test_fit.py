from contextlib import contextmanager

import pytest
import torch

from tests.trainer.tiny import random_model, random_tokens
from trainer.artifact import ModelFile, compress, encode, load
from trainer.config import QuantConfig
from trainer.fit import COARSEST, Entropy, fit, prune
from trainer.gptq import Quantized, SecondMoments
from trainer.quantize import quantize

RTN = QuantConfig(method="rtn", brotli_quality=9, margin_bytes=50)


@contextmanager
def untimed(_name):
    yield


@pytest.fixture(scope="module")
def model():
    return random_model(width=64, rope_dims=4)


def fitted(model, config, cap_bytes, moments=None):
    return fit(model, moments or {}, {}, cap_bytes=cap_bytes, config=config, phase=untimed)


def whole_bytes(model, config):
    return len(compress(encode(ModelFile({}, quantize(model, {}, config).tensors)), config.brotli_quality))


def with_fit(fit, **knobs):
    return QuantConfig(method="rtn", brotli_quality=9, margin_bytes=50, fit=fit, **knobs)


@pytest.mark.parametrize("way", ["coarsen", "prune"])
def test_a_file_that_fits_is_left_alone(model, way):
    found = fitted(model, with_fit(way), 10**6)
    assert (found.factor, found.pruned, found.added_error) == (1.0, 0, 0.0)
    assert found.packed == compress(encode(ModelFile({}, quantize(model, {}, with_fit(way)).tensors)), 9)


@pytest.mark.parametrize("part", [0.95, 0.8, 0.6])
def test_a_file_over_its_cap_gets_a_grid_so_coarse_that_it_just_fits(model, part):
    cap = int(part * whole_bytes(model, RTN))
    found = fitted(model, RTN, cap)
    assert 0 <= cap - len(found.packed) <= 0.01 * cap
    assert found.factor > 1
    assert found.pruned == 0


def test_a_coarser_grid_loses_less_than_pruning_to_the_same_bytes(model):
    """500 bytes less: pruning takes a tenth of all weights for it."""
    cap = whole_bytes(model, RTN) - 500
    errors = {}
    for way in ("coarsen", "prune"):
        state = load(fitted(model, with_fit(way), cap).packed, "model").state()
        errors[way] = sum((state[n] - p.detach()).square().sum().item() for n, p in model.named_parameters())
    assert errors["coarsen"] < 0.8 * errors["prune"]


def test_gptq_feeds_errors_back_on_the_coarser_grid_too(model):
    config, moments = QuantConfig(brotli_quality=9, margin_bytes=50), SecondMoments()
    with torch.no_grad():
        model.hidden(random_tokens(64, 16), True, observe=moments)
    read = {name: moments.sums[shared] for name, _, shared in model.matrices()}
    found = fitted(model, config, int(0.8 * whole_bytes(model, RTN)), read)
    state = load(found.packed, "model").state()

    def output_error(weights):
        return sum(
            (error := linear.weight.detach() - weights[f"{name}.weight"]).mm(read[name]).mul(error).sum().item()
            for name, linear, _ in model.matrices()
        )

    nearest = quantize(model, {}, RTN, like=quantize(model, {}, RTN), factor=found.factor)
    assert output_error(state) < 0.8 * output_error(ModelFile({}, nearest.tensors).state())


def test_a_file_with_room_fills_it_with_a_finer_grid(model):
    coarse = with_fit("fill", clip="std", attention_clip_std=30.0, mlp_clip_std=30.0)
    cap = int(1.2 * whole_bytes(model, coarse))
    found = fitted(model, coarse, cap)
    assert 0 <= cap - len(found.packed) <= 0.02 * cap
    assert found.factor < 1


def test_pruning_zeroes_the_ones_with_the_smallest_scales_first():
    tensors = {
        "a": Quantized(torch.tensor([[1, -1, 2], [1, 0, 3]], dtype=torch.int8), torch.tensor([0.5, 0.1]).half()),
        "b": Quantized(torch.tensor([[-1, 5]], dtype=torch.int8), torch.tensor([0.2]).half()),
        "c": torch.ones(2),
    }
    pruned = prune(tensors, 2)
    assert pruned["a"].integers_MN.tolist() == [[1, -1, 2], [0, 0, 3]]
    assert pruned["b"].integers_MN.tolist() == [[0, 5]]
    assert tensors["b"].integers_MN.tolist() == [[-1, 5]]
    assert pruned["c"] is tensors["c"]


def test_a_file_that_may_only_be_pruned_is_pruned_until_it_fits(model):
    cap = whole_bytes(model, RTN) - 300
    found = fitted(model, with_fit("prune"), cap)
    assert len(found.packed) <= cap
    assert found.pruned > 0
    state = load(found.packed, "model").state()
    plain = ModelFile({}, quantize(model, {}, RTN).tensors).state()
    before, after = (
        sum((weights[name] - p.detach()).square().sum().item() for name, p in model.named_parameters())
        for weights in (plain, state)
    )
    assert found.added_error == pytest.approx(after / before - 1, rel=1e-3)


def test_a_cap_out_of_reach_gives_the_whole_file_back(model):
    found = fitted(model, RTN, 100)
    assert (len(found.packed), found.factor, found.pruned) == (whole_bytes(model, RTN), 1.0, 0)


def test_the_entropy_falls_as_the_grid_gets_coarser_and_bounds_the_bytes(model):
    entropy = Entropy(model, quantize(model, {}, RTN), RTN)
    sizes = [entropy.bytes_at(factor) for factor in (0.5, 1.0, 2.0, 4.0, COARSEST)]
    assert sizes == sorted(sizes, reverse=True)
    weights = sum(linear.weight.numel() for _, linear, _ in model.matrices())
    assert sizes[1] - sizes[2] == pytest.approx(weights / 8, rel=0.1)  # a doubled step costs one bit a weight
