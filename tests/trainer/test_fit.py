from contextlib import contextmanager

import pytest
import torch

from tests.trainer.tiny import calibrated, random_model
from trainer.artifact import ModelFile, load, pack
from trainer.calibration import Calibration
from trainer.config import QuantConfig
from trainer.fit import COARSEST, Grids, fit, prune
from trainer.gptq import Quantized
from trainer.quantize import quantize

NOTHING = Calibration()


def with_fit(fit, **knobs):
    return QuantConfig(**{"method": "rtn", "brotli_quality": 9, "margin_bytes": 50, "fit": fit, **knobs})


RTN = with_fit("coarsen")


@contextmanager
def untimed(_name):
    yield


@pytest.fixture(scope="module")
def model():
    return random_model(width=64, rope_dims=4)


@pytest.fixture(scope="module")
def found(model):
    return calibrated(model, batches=16, rows=4)


def fitted(model, config, cap_bytes, found=NOTHING):
    return fit(model, found, {}, cap_bytes=cap_bytes, config=config, phase=untimed)


def packed(model, config, found=NOTHING):
    return pack(ModelFile({}, quantize(model, found, config).tensors), config.coder, config.brotli_quality)


def squared_error(model, tensors):
    state = ModelFile({}, tensors).state()
    return sum((state[n] - p.detach()).square().sum().item() for n, p in model.named_parameters())


@pytest.mark.parametrize("way", ["coarsen", "prune"])
@pytest.mark.parametrize("coder", ["brotli", "entropy"])
def test_a_file_that_fits_is_left_alone(model, way, coder):
    config = with_fit(way, coder=coder)
    result = fitted(model, config, 10**6)
    assert (result.factor, result.pruned, result.added_error) == (1.0, 0, 0.0)
    assert result.packed == packed(model, config)


@pytest.mark.parametrize("part", [0.95, 0.8, 0.6])
@pytest.mark.parametrize("coder", ["brotli", "entropy"])
def test_a_file_over_its_cap_gets_a_grid_so_coarse_that_it_just_fits(model, part, coder):
    config = with_fit("coarsen", coder=coder)
    cap = int(part * len(packed(model, config)))
    result = fitted(model, config, cap)
    assert 0 <= cap - len(result.packed) <= 0.01 * cap
    assert result.factor > 1
    assert result.pruned == 0


def test_a_coarser_grid_loses_less_than_pruning_to_the_same_bytes(model):
    """500 bytes less: pruning takes a tenth of all weights for it."""
    errors = {}
    for way in ("coarsen", "prune"):
        config = with_fit(way, coder="brotli")
        cap = len(packed(model, config)) - 500
        errors[way] = squared_error(model, load(fitted(model, config, cap).packed, "model").tensors)
    assert errors["coarsen"] < 0.8 * errors["prune"]


@pytest.mark.parametrize("grid", ["quantile", "fisher"])
def test_gptq_feeds_errors_back_on_the_coarser_grid_too(model, found, grid):
    config = with_fit("coarsen", method="gptq", grid=grid, fisher_nats=0.001)
    result = fitted(model, config, int(0.8 * len(packed(model, config, found))), found)
    coarse = load(result.packed, "model")

    def output_error(tensors):
        weights = ModelFile({}, tensors).state()
        return sum(
            (error := linear.weight.detach() - weights[f"{name}.weight"])
            .mm(found.moments[name])
            .mul(error)
            .sum()
            .item()
            for name, linear, _ in model.matrices()
        )

    scales = {name: t.scales_M for name, t in coarse.tensors.items() if isinstance(t, Quantized)}
    assert result.factor > 1
    assert output_error(coarse.tensors) < 0.8 * output_error(quantize(model, NOTHING, config, scales).tensors)


@pytest.mark.parametrize(
    "config",
    [
        with_fit("fill", grid="std", attention_clip_std=30.0, mlp_clip_std=30.0),
        with_fit("fill", grid="fisher", fisher_nats=1.0),
    ],
)
def test_a_file_with_room_fills_it_with_a_finer_grid(model, found, config):
    cap = int(1.2 * len(packed(model, config, found)))
    result = fitted(model, config, cap, found)
    assert 0 <= cap - len(result.packed) <= 0.02 * cap
    assert result.factor < 1


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
    config = with_fit("prune")
    cap = len(packed(model, config)) - 300
    result = fitted(model, config, cap)
    assert len(result.packed) <= cap
    assert result.pruned > 0
    before = squared_error(model, quantize(model, NOTHING, config).tensors)
    after = squared_error(model, load(result.packed, "model").tensors)
    assert result.added_error == pytest.approx(after / before - 1, rel=1e-3)


def test_a_cap_out_of_reach_gives_the_whole_file_back(model):
    result = fitted(model, RTN, 100)
    assert (result.packed, result.factor, result.pruned) == (packed(model, RTN), 1.0, 0)


def test_the_entropy_falls_as_the_grid_gets_coarser(model):
    grids = Grids(model, quantize(model, NOTHING, RTN), NOTHING, RTN)
    sizes = [grids.entropy_bytes(factor) for factor in (0.5, 1.0, 2.0, 4.0, COARSEST)]
    assert sizes == sorted(sizes, reverse=True)
    weights = sum(linear.weight.numel() for _, linear, _ in model.matrices())
    assert sizes[1] - sizes[2] == pytest.approx(weights / 8, rel=0.1)  # a doubled step costs one bit a weight
