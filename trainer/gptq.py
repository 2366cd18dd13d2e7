"""From float matrices to small integers: GPTQ with act-order, damping and clip choice, and round-to-nearest beside it.

Matrices of one shape go through it side by side: columns have to wait for each other, matrices and rows do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import QuantConfig

# Dimensions: P matrices of one shape, M rows (outputs) and N columns (inputs) of a matrix, C clip candidates.

SMALLEST_SCALE = 2.0**-20  # float16 has no numbers much smaller; below 2^-14 they lie farther apart
DAMPING_TRIES = 4  # each ten times the damping before; round-to-nearest after the last


@dataclass(frozen=True)
class Quantized:
    """A matrix as integers in -(2^(bits-1) - 1) ... 2^(bits-1) - 1 and one float16 scale a row."""

    integers_MN: Tensor
    scales_M: Tensor

    def dequantize(self) -> Tensor:
        """The float32 matrix that a reader of the model file gets, bit for bit."""
        return self.integers_MN.float() * self.scales_M.float()[..., None]

    def scaled(self, factor: float) -> Quantized:
        """The same integers on a grid that is so many times coarser."""
        return Quantized(self.integers_MN, as_scales(self.scales_M.float() * factor))


def largest_integer(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def as_scales(steps: Tensor) -> Tensor:
    """Float16 scales near these steps, with 6 bits of mantissa: nothing is lost by a step 0.8 % off, and 4 bits a row are won."""
    bits = steps.clamp_min(SMALLEST_SCALE).half().view(torch.int16)
    return (bits + 8 >> 4 << 4).view(torch.float16)


def scales_for(clip: Tensor, bits: int) -> Tensor:
    """The scale of each row that puts its clipping point on the largest integer, or as near as scales lie."""
    return as_scales(clip / largest_integer(bits))


@dataclass(frozen=True)
class Grid:
    """How one role's matrices are quantised: bits, and the clip in standard deviations of a row (0: searched)."""

    bits: int
    clip_std: float


def row_quantiles(weight_PMN: Tensor, quantiles: Sequence[float]) -> Tensor:
    """Quantiles of each row's absolute values, (C, P, M), between two values linearly; torch's own takes few values at once."""
    sorted_PMN = weight_PMN.abs().float().sort(-1).values
    places = [quantile * (weight_PMN.size(-1) - 1) for quantile in quantiles]
    return torch.stack(
        [sorted_PMN[..., math.floor(p)].lerp(sorted_PMN[..., math.ceil(p)], p - math.floor(p)) for p in places]
    )


def std_clip(
    weight_PMN: Tensor, clip_std: float, importance: float, moments_PNN: Tensor | None, damping: float = 0.0
) -> Tensor:
    """The clip of each row, `clip_std` of its standard deviations (over n - 1): #1394's. (P, M)

    With `importance` λ (#1412) rows that matter more are clipped later: times 1 + λ (r - 1), r a row's mean of |weight| ·
    damped second moment of its input, over the mean of that. None matter more where the moments are not known.
    """
    clip = clip_std * weight_PMN.std(-1)
    if not importance or moments_PNN is None:
        return clip
    moments_PN = moments_PNN.diagonal(dim1=-2, dim2=-1)
    weigh = weight_PMN.abs() @ (moments_PN + damping * moments_PN.mean(-1, keepdim=True))[..., None]
    relative = weigh[..., 0] / weigh.mean(-2).clamp_min(SMALLEST_SCALE)
    return clip * (1 + importance * (relative - 1)).clamp_min(0)


def round_to_nearest(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Nearest integers for given scales of the rows, int8. Any leading dimensions."""
    limit = largest_integer(bits)
    return (weight / scales.float()[..., None]).round().clamp(-limit, limit).to(torch.int8)


def inverse_factors(moments_PNN: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factors of the inverses of the damped second moments, and for which matrices there is one, (P).

    In float64: a few thousand columns, once a matrix, and the one place where rounding can break the method.
    """
    moments = moments_PNN.double()
    mean_P = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    identity = torch.eye(moments.size(-1), dtype=torch.float64, device=moments.device)
    factors, is_regular = torch.zeros_like(moments), torch.zeros(len(moments), dtype=torch.bool, device=moments.device)
    for attempt in range(DAMPING_TRIES):
        left = (~is_regular).nonzero().flatten()
        if not len(left):
            break
        damped = moments[left] + (damping * 10**attempt * mean_P[left])[:, None, None] * identity
        lower, failed = torch.linalg.cholesky_ex(damped)
        inverse = torch.cholesky_inverse(torch.where((failed == 0)[:, None, None], lower, identity))
        upper, failed_too = torch.linalg.cholesky_ex(inverse, upper=True)
        fine = (failed == 0) & (failed_too == 0)
        factors[left[fine]], is_regular[left[fine]] = upper[fine], True
    return factors.float(), is_regular


def remaining_error(moments_NN: Tensor, damping: float) -> float:
    """What error feedback leaves of the squared output error of rounding: the moments' geometric mean eigenvalue over the
    arithmetic one. 1 where the moments are not usable.
    """
    moments = moments_NN.double()
    mean = moments.diagonal().mean()
    damped = moments + damping * mean * torch.eye(len(moments), dtype=torch.float64, device=moments.device)
    lower, failed = torch.linalg.cholesky_ex(damped)
    return 1.0 if int(failed) else min(1.0, float((2 * lower.diagonal().log().mean()).exp() / mean))


def feed_back_errors(
    weight_PMN: Tensor, scales_PM: Tensor, factors_PNN: Tensor, *, bits: int, block_columns: int
) -> Tensor:
    """Quantise column by column, each column's rounding error spread over the columns still to come. arXiv 2210.17323."""
    weight, scales = weight_PMN.clone(), scales_PM.float()
    integers = torch.empty_like(weight, dtype=torch.int8)
    limit, columns = largest_integer(bits), weight.size(-1)
    diagonal_PN = factors_PNN.diagonal(dim1=-2, dim2=-1)
    for begin in range(0, columns, block_columns):
        end = min(begin + block_columns, columns)
        errors = torch.empty_like(weight[..., begin:end])
        for column in range(begin, end):
            rounded = (weight[..., column] / scales).round().clamp(-limit, limit)
            integers[..., column] = rounded.to(torch.int8)
            error = (weight[..., column] - rounded * scales) / diagonal_PN[:, column, None]
            weight[..., column:end] -= error[..., None] * factors_PNN[:, None, column, column:end]
            errors[..., column - begin] = error
        weight[..., end:] -= errors @ factors_PNN[:, begin:end, end:]
    return integers


def row_errors(weight: Tensor, quantized: Quantized, moments: Tensor, criterion: str) -> Tensor:
    """Squared error of each row: of its weights, or of its outputs under the inputs' second moments."""
    error = weight - quantized.dequantize()
    return (error * error if criterion == "weight" else (error @ moments) * error).sum(-1)


def candidate_scales(weight_PMN: Tensor, moments_PNN: Tensor | None, grid: Grid, config: QuantConfig) -> Tensor:
    """The float16 scales to choose from for each row, one clip candidate after the other: (P, C·M)."""
    if grid.clip_std:
        clips_CPM = std_clip(weight_PMN, grid.clip_std, config.clip_importance, moments_PNN, config.damping)[None]
    else:
        clips_CPM = row_quantiles(weight_PMN, config.clip_quantiles).clamp_min(config.clip_floor)
    return scales_for(clips_CPM.transpose(0, 1).flatten(1), grid.bits)


def quantize_matrices(
    weight_PMN: Tensor,
    moments_PNN: Tensor | None,
    grid: Grid,
    config: QuantConfig,
    scales_PM: Tensor | None = None,
) -> tuple[list[Quantized], Tensor]:
    """Quantise matrices of one shape; of several clip candidates each row takes the one with the smallest error.

    `moments_PNN` are the inputs' second moments (round-to-nearest weighs all columns alike and needs none). All
    candidates of all rows go through one pass; `scales_PM` leaves nothing to choose. The second value says of each matrix
    whether error feedback was used; it is not where the moments stay singular under growing damping.
    """
    weight = weight_PMN.float()
    count, rows, columns = weight.shape
    scales = candidate_scales(weight, moments_PNN, grid, config) if scales_PM is None else scales_PM
    stacked = weight.repeat(1, scales.size(1) // rows, 1)
    integers = round_to_nearest(stacked, scales, grid.bits)
    has_feedback = torch.zeros(count, dtype=torch.bool, device=weight.device)
    moments = torch.eye(columns, device=weight.device) if moments_PNN is None else moments_PNN.float()
    if moments_PNN is not None:
        diagonal = moments.diagonal(dim1=-2, dim2=-1)
        dead = diagonal == 0  # an input that is always zero: its weight does nothing and costs bytes
        moments = moments + torch.diag_embed(dead.float())
        stacked = stacked.masked_fill(dead[:, None], 0)
        order = torch.arange(columns, device=weight.device).expand(count, -1)
        if config.act_order:
            order = torch.argsort(diagonal.masked_fill(dead, 1), dim=-1, descending=True, stable=True)
        along_rows = order[:, None].expand(-1, stacked.size(1), -1)
        ordered = moments.gather(1, order[..., None].expand(-1, -1, columns))
        ordered = ordered.gather(2, order[:, None].expand(-1, columns, -1))
        factors, has_feedback = inverse_factors(ordered, config.damping)
        factors = torch.where(has_feedback[:, None, None], factors, torch.eye(columns, device=weight.device))
        fed = feed_back_errors(
            stacked.gather(2, along_rows), scales, factors, bits=grid.bits, block_columns=config.block_columns
        )
        integers = torch.empty_like(fed).scatter_(2, along_rows, fed)
    errors = row_errors(stacked, Quantized(integers, scales), moments, config.clip_criterion)
    best = errors.view(count, -1, rows).argmin(1) * rows + torch.arange(rows, device=weight.device)
    chosen = integers.gather(1, best[..., None].expand(-1, -1, columns))
    return [Quantized(*pair) for pair in zip(chosen, scales.gather(1, best), strict=True)], has_feedback


class SecondMoments:
    """X^T X of what each matrix reads, by the matrix's name, summed over positions in float32; the model's `observe`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def __call__(self, name: str, inputs: Tensor) -> None:
        rows = inputs.flatten(0, -2)
        # The inputs' own precision multiplies exactly and the sums are float32 either way.
        product = torch.mm(rows.T, rows, out_dtype=torch.float32) if rows.is_cuda else rows.T.float() @ rows.float()
        self.sums[name] = self.sums[name].add_(product) if name in self.sums else product
