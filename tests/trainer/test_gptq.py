import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.trainer.tiny import random_model, random_tokens, rounded
from trainer.config import QuantConfig
from trainer.gptq import (
    Grid,
    Quantized,
    SecondMoments,
    as_scales,
    inverse_factors,
    largest_integer,
    quantize_matrices,
    round_to_nearest,
    row_errors,
    row_quantiles,
    scales_for,
    std_clip,
)

GPTQ = QuantConfig(block_columns=16)


def moments_of(inputs):
    return inputs.T @ inputs / len(inputs)


def correlated_inputs(columns=64, positions=4096, seed=0):
    """Inputs that share few directions, as a network's do, and a different scale for each column."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, columns, generator=generator)
    inputs = torch.randn(positions, 8, generator=generator) @ mixing + 0.3 * torch.randn(
        positions, columns, generator=generator
    )
    return inputs * torch.linspace(0.5, 2.0, columns)


def weights(rows=32, columns=64, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def output_error(weight, quantized, inputs):
    return ((weight - quantized.dequantize()) @ inputs.T).square().mean().item()


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_with_a_diagonal_moment_matrix_is_round_to_nearest(act_order):
    moments = torch.linspace(0.1, 3.0, 64).diag()
    quantized = rounded(weights(), moments, config=dataclasses.replace(GPTQ, act_order=act_order))
    nearest = rounded(weights())
    assert torch.equal(quantized.integers_MN, nearest.integers_MN)
    assert torch.equal(quantized.scales_M, nearest.scales_M)


@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("criterion", ["weight", "output"])
def test_gptq_beats_round_to_nearest_on_correlated_inputs(bits, criterion):
    inputs, weight = correlated_inputs(), weights()
    config = dataclasses.replace(GPTQ, clip_criterion=criterion)
    quantized = rounded(weight, moments_of(inputs), bits=bits, config=config)
    nearest = rounded(weight, bits=bits, config=config)
    assert output_error(weight, quantized, inputs) < 0.5 * output_error(weight, nearest, inputs)


@pytest.mark.parametrize("block_columns", [1, 7, 64, 128])
def test_the_block_size_changes_nothing_but_rounding(block_columns):
    moments = moments_of(correlated_inputs())
    whole = rounded(weights(), moments, config=dataclasses.replace(GPTQ, block_columns=64))
    other = rounded(weights(), moments, config=dataclasses.replace(GPTQ, block_columns=block_columns))
    # A sum in another order can tip a value that lies between two integers.
    assert (whole.integers_MN != other.integers_MN).float().mean() < 0.01


def test_columns_are_quantised_one_after_the_other_with_the_error_of_each_fed_back():
    """Two columns by hand: the second absorbs the first one's rounding error through their correlation."""
    moments = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    weight = torch.tensor([[1.0, 0.24]])
    config = QuantConfig(clip_quantiles=(1.0,), damping=1e-9)
    scale = torch.tensor([1.0 / 3]).half().float()  # integers -3 ... 3
    first = (weight[0, 0] / scale).round() * scale
    # minimising over the second weight, given the first: w2' = w2 + (H01 / H11) (w1 - q1)
    second = weight[0, 1] + (weight[0, 0] - first) * moments[0, 1] / moments[1, 1]
    quantized = rounded(weight, moments, bits=3, config=config)
    assert quantized.integers_MN.tolist() == [[3, int((second / scale).round())]]


def test_matrices_of_one_shape_side_by_side_are_each_quantised_as_alone():
    inputs = [correlated_inputs(seed=seed) for seed in range(3)]
    moments = torch.stack([moments_of(x) for x in inputs])
    moments[1] = -torch.eye(64)  # and one that stays singular does not disturb its neighbours
    matrices = torch.stack([weights(seed=seed) for seed in range(3)])
    together, has_feedback = quantize_matrices(matrices, moments, Grid(6, 0.0), GPTQ)
    assert has_feedback.tolist() == [True, False, True]
    for matrix, own, quantized in zip(matrices, moments, together, strict=True):
        alone = rounded(matrix, own)
        assert (quantized.integers_MN != alone.integers_MN).float().mean() < 0.01
        assert torch.equal(quantized.scales_M, alone.scales_M)


def test_the_factors_are_those_of_the_inverse_to_float32s_last_digits():
    moments = moments_of(correlated_inputs())[None]
    factors, is_regular = inverse_factors(moments, 0.01)
    damped = moments[0].double() + 0.01 * moments[0].double().diagonal().mean() * torch.eye(64, dtype=torch.float64)
    product = factors[0].double().T @ factors[0].double() @ damped
    assert is_regular.all()
    torch.testing.assert_close(product, torch.eye(64, dtype=torch.float64), atol=1e-4, rtol=0)
    assert factors[0].tril(-1).abs().max() == 0


def test_an_input_that_is_always_zero_costs_nothing():
    inputs = correlated_inputs()
    inputs[:, 5] = 0
    quantized = rounded(weights(), moments_of(inputs))
    assert quantized.integers_MN[:, 5].abs().max() == 0
    assert quantized.integers_MN[:, 6].abs().max() > 0


def test_moments_that_stay_singular_fall_back_to_round_to_nearest():
    found, has_feedback = quantize_matrices(weights()[None], (-torch.eye(64) + 1e-3)[None], Grid(6, 0.0), GPTQ)
    nearest = rounded(weights())
    assert has_feedback.tolist() == [False]
    assert torch.equal(found[0].integers_MN, nearest.integers_MN)


def test_every_row_takes_its_best_clip_candidate():
    weight = weights()
    weight[0, 0] = 20.0  # an outlier: clipping it costs less in no row but can cost in this one
    chosen = rounded(weight)
    errors = row_errors(weight, chosen, torch.eye(64), "weight")
    for quantile in GPTQ.clip_quantiles:
        single = rounded(weight, config=dataclasses.replace(GPTQ, clip_quantiles=(quantile,)))
        assert (errors <= row_errors(weight, single, torch.eye(64), "weight") + 1e-9).all()


def test_quantiles_of_rows_are_torch_s_own():
    weight = torch.randn(3, 5, 41, generator=torch.Generator().manual_seed(0))
    levels = [0.5, 0.7, 0.999, 1.0]
    torch.testing.assert_close(
        row_quantiles(weight, levels), torch.quantile(weight.abs(), torch.tensor(levels), dim=-1)
    )


def test_a_clip_by_deviations_is_so_many_of_each_row():
    weight = weights() * torch.linspace(0.1, 3, 32)[:, None]
    found, _ = quantize_matrices(weight[None], None, Grid(6, 12.85), GPTQ)
    expected = 12.85 * weight.std(1) / 31
    torch.testing.assert_close(found[0].scales_M.float(), expected, rtol=0.008, atol=0)


def test_rows_that_matter_more_are_clipped_later_under_importance():
    moments = torch.linspace(0.1, 10.0, 64).diag()
    weight = torch.ones(2, 64)
    weight[0, :32], weight[1, 32:] = 2.0, 2.0  # the second row's large weights meet the large inputs
    plain = std_clip(weight[None], 10.0, 0.0, moments[None])[0]
    clip = std_clip(weight[None], 10.0, 0.175, moments[None], damping=0.5)[0]
    weigh = weight @ (moments.diagonal() + 0.5 * moments.diagonal().mean())
    expected = plain * (1 + 0.175 * (weigh / weigh.mean() - 1))
    torch.testing.assert_close(clip, expected)
    assert clip[1] > plain[1] > clip[0]
    assert torch.equal(std_clip(weight[None], 10.0, 0.175, None)[0], plain)


def test_under_a_floor_rows_of_small_weights_share_a_grid_and_those_of_large_ones_keep_their_own():
    weight = weights() / weights().abs().amax(1, keepdim=True) * torch.linspace(0.1, 3, 32)[:, None]
    config = QuantConfig(clip_floor=1.0, clip_quantiles=(1.0,))
    found, _ = quantize_matrices(weight[None], None, Grid(6, 0.0), config)
    expected = weight.abs().amax(1).clamp_min(1) / 31
    torch.testing.assert_close(found[0].scales_M.float(), expected, rtol=0.008, atol=0)


@pytest.mark.parametrize("bits", [2, 6, 8])
def test_integers_stay_symmetric_and_in_range(bits):
    weight = weights() * 100
    integers = round_to_nearest(weight, scales_for(weight.abs().amax(1) / 3, bits), bits)
    assert integers.abs().max() == largest_integer(bits)


def test_scales_have_six_bits_of_mantissa_and_lie_within_a_hundredth():
    steps = torch.logspace(-4, 2, 1000)
    scales = as_scales(steps)
    assert (scales.float() / steps - 1).abs().max() <= 2.0**-7 + 2.0**-11
    assert (scales.view(torch.int16) & 15 == 0).all()
    assert torch.equal(as_scales(scales.float()), scales)
    assert as_scales(torch.zeros(1)) > 0


def test_a_row_of_zeros_survives():
    quantized = Quantized(
        round_to_nearest(torch.zeros(2, 4), scales_for(torch.zeros(2), 6), 6), scales_for(torch.zeros(2), 6)
    )
    assert torch.equal(quantized.dequantize(), torch.zeros(2, 4))


def test_second_moments_are_sums_over_all_inputs_by_name():
    moments, first, second = SecondMoments(), torch.randn(2, 5, 4), torch.randn(3, 5, 4)
    moments("matrix", first), moments("other", first), moments("matrix", second)
    rows = torch.cat((first.reshape(-1, 4), second.reshape(-1, 4)))
    torch.testing.assert_close(moments.sums["matrix"], rows.T @ rows)
    torch.testing.assert_close(moments.sums["other"], first.reshape(-1, 4).T @ first.reshape(-1, 4))


def test_second_moments_are_those_of_what_each_matrix_really_reads(monkeypatch):
    """By the products themselves: what torch was given together with each block's matrix."""
    model, tokens, read, product = random_model(), random_tokens(), {}, F.linear

    def linear(inputs, weight):
        read.setdefault(weight.detach().numpy().tobytes(), []).append(inputs.flatten(0, -2))
        return product(inputs, weight)

    monkeypatch.setattr(F, "linear", linear)
    with torch.no_grad():
        model.hidden(tokens, True)
        monkeypatch.undo()
        moments = SecondMoments()
        model.hidden(tokens, True, observe=moments)
        for layer, block in enumerate(model.blocks):
            matrices = dict(zip(("query", "out", "up", "down"), block.matrices(torch.float32, block.mlp), strict=True))
            for name, matrix in matrices.items():
                rows = torch.cat(read[matrix.numpy().tobytes()])
                part = "attention" if name in ("query", "out") else "mlp"
                torch.testing.assert_close(moments.sums[f"blocks.{layer}.{part}.{name}"], rows.T @ rows)
