"""From trained weights to stored tensors: which tensor is rounded how, shapes side by side, and what corrects the worst."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.artifact import Stored
from trainer.calibration import Calibration
from trainer.config import QuantConfig
from trainer.gptq import (
    SMALLEST_SCALE,
    Grid,
    Quantized,
    as_scales,
    largest_integer,
    quantize_matrices,
    remaining_error,
    round_to_nearest,
    row_quantiles,
    scales_for,
    std_clip,
)
from trainer.model import HEAD, Model
from trainer.optim import parameter_groups

# Dimensions: M rows and N columns of a matrix, R rank of a correction.

LEFT, RIGHT = ".left", ".right"  # ends of the names of a correction's factors
FISHER_BITS = 8  # room in which no step has to clip
LEAST_FELT = 1e-3  # of a matrix's mean: what a row's gradients show to be less is not believed
LEFT_BITS, RIGHT_BITS = 2, 4  # of a correction: #1797 has int2 and int4


@dataclass(frozen=True)
class Rounded:
    """The stored tensors by name, and the matrices for which error feedback could not be used."""

    tensors: dict[str, Stored]
    without_feedback: list[str]


def quantize(
    model: Model, found: Calibration, config: QuantConfig, scales: Mapping[str, Tensor] | None = None
) -> Rounded:
    """Every tensor of the model in the form in which it is stored.

    Without moments all is rounded to nearest. `scales` are scales of rows by the parameter's name, instead of those that
    the configuration asks for. Raises KeyError where `fisher` lacks its information.
    """
    rounded, given = Rounded({}, []), dict(scales or {})
    if config.grid == "fisher" and not scales:
        given = unclipped(model, fisher_steps(model, found, config))
    _round_matrices(model, found.moments, config, rounded, given)
    group_of = {id(parameter): group for group, members in parameter_groups(model).items() for parameter in members}
    for name, parameter in model.named_parameters():
        tensor, group = parameter.detach(), group_of[id(parameter)]
        if name in rounded.tensors:
            continue
        if group in ("embedding", "head") or name in given:
            is_head = parameter is (model.embedding if model.head is None else model.head).weight
            moments = found.moments.get(HEAD) if is_head and config.embedding_method == "gptq" else None
            rounded.tensors[name] = _table(tensor, moments, config, given.get(name))
        else:
            is_exact = group == "scalar" and not config.half_vectors
            rounded.tensors[name] = tensor if is_exact else tensor.half()
    if config.low_rank_tensors:
        _correct(model, config, rounded)
    return rounded


def fisher_steps(model: Model, found: Calibration, config: QuantConfig) -> dict[str, Tensor]:
    """Steps of the rows (M) of every matrix and table, by the parameter's name, at which each weight adds the same loss.

    A step s adds about ½ F s²/12 a weight, F its Fisher information. Where GPTQ hands errors on, what is left of them is
    smaller by the geometric mean of the moments' eigenvalues over the arithmetic one. All weights together add
    `config.fisher_nats`.
    """
    weights = {name: p for name, p in model.named_parameters() if name in found.information}
    size = math.sqrt(24 * config.fisher_nats / sum(weight.numel() for weight in weights.values()))
    steps = {}
    for name in weights:
        information = found.information[name]
        felt_M = information.clamp_min(LEAST_FELT * float(information.mean()) + SMALLEST_SCALE**2)
        moments = found.moments.get(name.removesuffix(".weight"))
        felt_M = felt_M if moments is None else felt_M * remaining_error(moments, config.damping)
        steps[name] = size / felt_M.sqrt()
    return steps


def unclipped(model: Model, steps: Mapping[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
    """Float16 scales for so many times these steps, but none so small that its row would have to be clipped."""
    scales = {}
    for name, weight in model.named_parameters():
        if name in steps:
            smallest_M = weight.detach().float().abs().amax(1) / (largest_integer(FISHER_BITS) - 1)
            scales[name] = as_scales(torch.maximum(steps[name] * factor, smallest_M))
    return scales


def coarse_matrices(model: Model, moments: Mapping[str, Tensor], config: QuantConfig) -> set[str]:
    """The matrices that get one bit less: of those that are read, whose inputs have the smallest second moments. #1260."""
    felt = {name: trace for name, _, _ in model.matrices() if (trace := float(moments[name].trace()))}
    return set(sorted(felt, key=felt.__getitem__)[: config.coarse_matrices])


def grids_of(model: Model, moments: Mapping[str, Tensor], config: QuantConfig) -> dict[str, Grid]:
    """The grid of each block matrix by its name."""
    coarse = coarse_matrices(model, moments, config) if config.coarse_matrices else set()
    return {name: _grid(name, name in coarse, config) for name, _, _ in model.matrices()}


def _grid(name: str, is_coarse: bool, config: QuantConfig) -> Grid:
    is_mlp, by_std = ".attention." not in name, config.grid == "std"
    bits = (config.mlp_bits if is_mlp else config.attention_bits) - is_coarse
    return Grid(
        FISHER_BITS if config.grid == "fisher" else bits,
        by_std * (config.mlp_clip_std if is_mlp else config.attention_clip_std),
    )


def _round_matrices(
    model: Model, moments: Mapping[str, Tensor], config: QuantConfig, rounded: Rounded, scales: Mapping[str, Tensor]
) -> None:
    """Round the block matrices, those of one shape and grid side by side."""
    alike: dict[tuple[torch.Size, Grid], list[tuple[str, Tensor]]] = {}
    grids = grids_of(model, moments, config)
    for name, linear, _ in model.matrices():
        weight = linear.weight.detach()
        alike.setdefault((weight.shape, grids[name]), []).append((name, weight))
    for (_, grid), members in alike.items():
        names, weights = zip(*members, strict=True)
        read = torch.stack([moments[name] for name in names]) if config.method == "gptq" and moments else None
        given = torch.stack([scales[f"{name}.weight"] for name in names]) if scales else None
        found, has_feedback = quantize_matrices(torch.stack(weights), read, grid, config, given)
        for name, quantized, fed_back in zip(names, found, has_feedback.tolist(), strict=True):
            rounded.tensors[f"{name}.weight"] = quantized
            if read is not None and not fed_back:
                rounded.without_feedback.append(name)


def _table(weight_MN: Tensor, moments_NN: Tensor | None, config: QuantConfig, scales_M: Tensor | None) -> Quantized:
    """A table, each row clipped at the configured quantile or deviation or on given scales; with moments by GPTQ."""
    weight, bits = weight_MN.float()[None], FISHER_BITS if scales_M is not None else config.embedding_bits
    by_std = config.grid == "std"
    if moments_NN is not None:
        grid = Grid(bits, config.embedding_clip_std * by_std)
        given = None if scales_M is None else scales_M[None]
        return quantize_matrices(weight, moments_NN[None], grid, config, given)[0][0]
    if scales_M is None:
        if by_std:
            clip_M = std_clip(weight, config.embedding_clip_std, 0.0, None)[0]
        else:
            clip_M = row_quantiles(weight, (config.embedding_clip_quantile,))[0, 0].clamp_min(config.clip_floor)
        scales_M = scales_for(clip_M, bits)
    return Quantized(round_to_nearest(weight[0], scales_M, bits), scales_M)


def _correct(model: Model, config: QuantConfig, rounded: Rounded) -> None:
    """Store low-rank factors of the largest rounding errors beside their matrices: LQER, #1797."""
    errors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        stored = rounded.tensors[name]
        if isinstance(stored, Quantized):
            errors[name] = parameter.detach().float() - stored.dequantize()
    worst = sorted(errors, key=lambda name: -float(errors[name].norm()))[: config.low_rank_tensors]
    for name in worst:
        left, strength, right = torch.linalg.svd(errors[name], full_matrices=False)
        rank = slice(config.low_rank)
        for end, factor, bits in (
            (LEFT, (left[:, rank] * strength[rank]).T, LEFT_BITS),
            (RIGHT, right[rank], RIGHT_BITS),
        ):
            scales = scales_for(row_quantiles(factor[None], (1.0,))[0, 0], bits)
            rounded.tensors[name + end] = Quantized(round_to_nearest(factor, scales, bits), scales)


def corrected(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that a reader of the model file uses: corrections added to the matrices that they belong to."""
    factors = {name for name in tensors if name.endswith((LEFT, RIGHT))}
    weights = {name: tensor for name, tensor in tensors.items() if name not in factors}
    for name in sorted(factors):
        if name.endswith(LEFT):
            matrix = name.removesuffix(LEFT)
            weights[matrix] = weights[matrix] + tensors[name].T @ tensors[matrix + RIGHT]
    return weights
