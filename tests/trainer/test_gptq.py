import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.trainer.tiny import random_model, random_tokens
from trainer.config import QuantConfig
from trainer.gptq import (
    Quantized,
    SecondMoments,
    largest_integer,
    quantize_matrix,
    quantize_table,
    round_to_nearest,
    row_errors,
    scales_for,
)

GPTQ, RTN = QuantConfig(block_columns=16), QuantConfig(method="rtn")


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
    weight = weights()
    quantized, has_feedback = quantize_matrix(weight, moments, dataclasses.replace(GPTQ, act_order=act_order))
    nearest, _ = quantize_matrix(weight, None, RTN)
    assert has_feedback
    assert torch.equal(quantized.integers_MN, nearest.integers_MN)
    assert torch.equal(quantized.scales_M, nearest.scales_M)


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("criterion", ["weight", "output"])
def test_gptq_beats_round_to_nearest_on_correlated_inputs(bits, criterion):
    inputs, weight = correlated_inputs(), weights()
    moments = inputs.T @ inputs / len(inputs)
    config = dataclasses.replace(GPTQ, matrix_bits=bits, clip_criterion=criterion)
    quantized, _ = quantize_matrix(weight, moments, config)
    nearest, _ = quantize_matrix(weight, None, dataclasses.replace(RTN, matrix_bits=bits))
    assert output_error(weight, quantized, inputs) < 0.5 * output_error(weight, nearest, inputs)


@pytest.mark.parametrize("block_columns", [1, 7, 64, 128])
def test_the_block_size_changes_nothing_but_rounding(block_columns):
    inputs, weight = correlated_inputs(), weights()
    moments = inputs.T @ inputs / len(inputs)
    whole, _ = quantize_matrix(weight, moments, dataclasses.replace(GPTQ, block_columns=64))
    other, _ = quantize_matrix(weight, moments, dataclasses.replace(GPTQ, block_columns=block_columns))
    # A sum in another order can tip a value that lies between two integers.
    assert (whole.integers_MN != other.integers_MN).float().mean() < 0.01


def test_columns_are_quantised_one_after_the_other_with_the_error_of_each_fed_back():
    """Two columns by hand: the second absorbs the first one's rounding error through their correlation."""
    moments = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    weight = torch.tensor([[1.0, 0.24]])
    config = QuantConfig(matrix_bits=3, clip_quantiles=(1.0,), damping=1e-9)
    scale = torch.tensor([1.0 / 3]).half().float()  # integers -3 ... 3
    first = (weight[0, 0] / scale).round() * scale
    # minimising over the second weight, given the first: w2' = w2 + (H01 / H11) (w1 - q1)
    second = weight[0, 1] + (weight[0, 0] - first) * moments[0, 1] / moments[1, 1]
    quantized, _ = quantize_matrix(weight, moments, config)
    assert quantized.integers_MN.tolist() == [[3, int((second / scale).round())]]


def test_an_input_that_is_always_zero_costs_nothing():
    inputs = correlated_inputs()
    inputs[:, 5] = 0
    quantized, has_feedback = quantize_matrix(weights(), inputs.T @ inputs / len(inputs), GPTQ)
    assert has_feedback
    assert quantized.integers_MN[:, 5].abs().max() == 0


def test_moments_that_stay_singular_fall_back_to_round_to_nearest():
    moments = -torch.eye(64) + 1e-3
    quantized, has_feedback = quantize_matrix(weights(), moments, GPTQ)
    nearest, _ = quantize_matrix(weights(), None, RTN)
    assert not has_feedback
    assert quantized.dequantize().sub(weights()).abs().max() < 2 * nearest.dequantize().sub(weights()).abs().max()


def test_every_row_takes_its_best_clip_candidate():
    weight = weights()
    weight[0, 0] = 20.0  # an outlier: clipping it costs less in no row but can cost in this one
    chosen, _ = quantize_matrix(weight, None, RTN)
    errors = row_errors(weight, chosen, torch.eye(64), "weight")
    for quantile in RTN.clip_quantiles:
        single, _ = quantize_matrix(weight, None, dataclasses.replace(RTN, clip_quantiles=(quantile,)))
        assert (errors <= row_errors(weight, single, torch.eye(64), "weight") + 1e-9).all()


@pytest.mark.parametrize("bits", [2, 6, 8])
def test_integers_stay_symmetric_and_in_range(bits):
    weight = weights() * 100
    integers = round_to_nearest(weight, scales_for(weight.abs().amax(1) / 3, bits), bits)
    assert integers.abs().max() == largest_integer(bits)


def test_a_row_of_zeros_survives():
    quantized = Quantized(
        round_to_nearest(torch.zeros(2, 4), scales_for(torch.zeros(2), 6), 6), scales_for(torch.zeros(2), 6)
    )
    assert torch.equal(quantized.dequantize(), torch.zeros(2, 4))


def test_a_table_rounds_to_half_a_step():
    table = weights(rows=50)
    quantized = quantize_table(table, QuantConfig())
    steps = quantized.scales_M.float()[:, None]
    assert (
        (table - quantized.dequantize()).abs() <= 0.5 * steps + 0.01 * steps
    ).all()  # float16 scales, 2^-11 of 127 steps


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
            matrices = dict(zip(("query", "out", "up", "down"), block.matrices(torch.float32), strict=True))
            for name, matrix in matrices.items():
                rows = torch.cat(read[matrix.numpy().tobytes()])
                part = "attention" if name in ("query", "out") else "mlp"
                torch.testing.assert_close(moments.sums[f"blocks.{layer}.{part}.{name}"], rows.T @ rows)
