"""From float matrices to small integers: GPTQ with act-order, damping and clip search, and round-to-nearest beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import QuantConfig

# Dimensions: M rows (outputs) and N columns (inputs) of a matrix, C clip candidates.

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
DAMPING_TRIES = 4  # each ten times the damping before; round-to-nearest after the last


@dataclass(frozen=True)
class Quantized:
    """A matrix as integers in -(2^(bits-1) - 1) ... 2^(bits-1) - 1 and one float16 scale a row."""

    integers_MN: Tensor
    scales_M: Tensor

    def dequantize(self) -> Tensor:
        """The float32 matrix that a reader of the model file gets, bit for bit."""
        return self.integers_MN.float() * self.scales_M.float()[:, None]


def largest_integer(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def scales_for(clip_M: Tensor, bits: int) -> Tensor:
    """The float16 scale of each row that puts its clipping point on the largest integer."""
    return (clip_M / largest_integer(bits)).clamp_min(SMALLEST_SCALE).half()


def row_quantiles(weight_MN: Tensor, quantiles: tuple[float, ...]) -> Tensor:
    """Quantiles of each row's absolute values, (C, M)."""
    return torch.quantile(weight_MN.abs().float(), torch.tensor(quantiles, device=weight_MN.device), dim=1)


def round_to_nearest(weight_MN: Tensor, scales_M: Tensor, bits: int) -> Tensor:
    """Nearest integers for given scales, int8."""
    limit = largest_integer(bits)
    return (weight_MN / scales_M.float()[:, None]).round().clamp(-limit, limit).to(torch.int8)


def inverse_factor(moments_NN: Tensor, damping: float) -> Tensor | None:
    """Upper Cholesky factor of the inverse of the damped second moments, or None where they stay singular.

    In float64: a few thousand columns, once a matrix, and the one place where rounding can break the method.
    """
    moments = moments_NN.double()
    mean = moments.diagonal().mean()
    identity = torch.eye(moments.size(0), dtype=torch.float64, device=moments.device)
    for attempt in range(DAMPING_TRIES):
        lower, info = torch.linalg.cholesky_ex(moments + damping * 10**attempt * mean * identity)
        if int(info) == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(info) == 0:
                return upper.float()
    return None


def feed_back_errors(
    weight_MN: Tensor, scales_M: Tensor, factor_NN: Tensor, *, bits: int, block_columns: int
) -> Tensor:
    """Quantise column by column, each column's rounding error spread over the columns still to come. arXiv 2210.17323."""
    weight, scales = weight_MN.clone(), scales_M.float()
    integers = torch.empty_like(weight, dtype=torch.int8)
    limit, columns = largest_integer(bits), weight.size(1)
    for begin in range(0, columns, block_columns):
        end = min(begin + block_columns, columns)
        errors = torch.empty_like(weight[:, begin:end])
        for column in range(begin, end):
            rounded = (weight[:, column] / scales).round().clamp(-limit, limit)
            integers[:, column] = rounded.to(torch.int8)
            error = (weight[:, column] - rounded * scales) / factor_NN[column, column]
            weight[:, column:end] -= error[:, None] * factor_NN[column, column:end]
            errors[:, column - begin] = error
        weight[:, end:] -= errors @ factor_NN[begin:end, end:]
    return integers


def row_errors(weight_MN: Tensor, quantized: Quantized, moments_NN: Tensor, criterion: str) -> Tensor:
    """Squared error of each row: of its weights, or of its outputs under the inputs' second moments."""
    error = weight_MN - quantized.dequantize()
    return (error * error if criterion == "weight" else (error @ moments_NN) * error).sum(1)


def quantize_matrix(weight_MN: Tensor, moments_NN: Tensor | None, config: QuantConfig) -> tuple[Quantized, bool]:
    """Quantise one matrix by the configured method; each row takes the clip candidate with the smallest error.

    `moments_NN` are the inputs' second moments (round-to-nearest weighs all columns alike and needs none). All
    candidates of all rows go through one pass, since rows do not touch each other. The second value says whether error
    feedback was used; it is not where the moments stay singular under growing damping.
    """
    weight, bits = weight_MN.float(), config.matrix_bits
    candidates_CM = row_quantiles(weight, config.clip_quantiles)
    scales = scales_for(candidates_CM.flatten(), bits)
    stacked = weight.repeat(len(config.clip_quantiles), 1)
    moments = torch.eye(weight.size(1), device=weight.device) if moments_NN is None else moments_NN.float().clone()
    factor = None
    if config.method == "gptq" and moments_NN is not None:
        dead = moments.diagonal() == 0
        moments.diagonal()[dead] = 1
        stacked[:, dead] = 0  # an input that is always zero: its weight does nothing and costs bytes
        order = (
            moments.diagonal().argsort(descending=True, stable=True)
            if config.act_order
            else torch.arange(len(dead), device=dead.device)
        )
        factor = inverse_factor(moments[order][:, order], config.damping)
    if factor is None:
        integers = round_to_nearest(stacked, scales, bits)
    else:
        ordered = feed_back_errors(stacked[:, order], scales, factor, bits=bits, block_columns=config.block_columns)
        integers = torch.empty_like(ordered)
        integers[:, order] = ordered
    errors = row_errors(stacked, Quantized(integers, scales), moments, config.clip_criterion)
    rows = weight.size(0)
    chosen = errors.view(-1, rows).argmin(0) * rows + torch.arange(rows, device=weight.device)
    return Quantized(integers[chosen], scales[chosen]), factor is not None


def quantize_table(weight_MN: Tensor, config: QuantConfig) -> Quantized:
    """Round an embedding table to nearest, each row clipped at the configured quantile."""
    weight = weight_MN.float()
    scales = scales_for(row_quantiles(weight, (config.embedding_clip_quantile,))[0], config.embedding_bits)
    return Quantized(round_to_nearest(weight, scales, config.embedding_bits), scales)


class SecondMoments:
    """X^T X of what each matrix reads, by the matrix's name, summed over positions in float32; the model's `observe`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def __call__(self, name: str, inputs: Tensor) -> None:
        rows = inputs.flatten(0, -2)
        # The inputs' own precision multiplies exactly and the sums are float32 either way.
        product = torch.mm(rows.T, rows, out_dtype=torch.float32) if rows.is_cuda else rows.T.float() @ rows.float()
        self.sums[name] = self.sums[name].add_(product) if name in self.sums else product
