"""From trained weights to stored tensors: which tensor is rounded how, shapes side by side, and what corrects the worst."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.artifact import Stored
from trainer.config import QuantConfig
from trainer.gptq import Grid, Quantized, quantize_matrices, round_to_nearest, row_quantiles, scales_for, std_clip
from trainer.model import HEAD, Model
from trainer.optim import parameter_groups

# Dimensions: M rows and N columns of a matrix, R rank of a correction.

LEFT, RIGHT = ".left", ".right"  # ends of the names of a correction's factors
LEFT_BITS, RIGHT_BITS = 2, 4  # of a correction: #1797 has int2 and int4


@dataclass(frozen=True)
class Rounded:
    """The stored tensors by name, and the matrices for which error feedback could not be used."""

    tensors: dict[str, Stored]
    without_feedback: list[str]


def quantize(
    model: Model, moments: Mapping[str, Tensor], config: QuantConfig, *, like: Rounded | None = None, factor: float = 1.0
) -> Rounded:
    """Every tensor of the model in the form in which it is stored; learned vectors stay in float32.

    `moments` are the second moments of what each matrix reads, by the matrix's name; without them all is rounded to
    nearest. With `like` the block matrices take its scales, times `factor`, and nothing is searched.
    """
    rounded = Rounded({}, [])
    _round_matrices(model, moments, config, rounded, like, factor)
    group_of = {id(parameter): group for group, members in parameter_groups(model).items() for parameter in members}
    for name, parameter in model.named_parameters():
        tensor, group = parameter.detach(), group_of[id(parameter)]
        if name in rounded.tensors:
            continue
        if group in ("embedding", "head"):
            is_head = parameter is (model.embedding if model.head is None else model.head).weight
            rounded.tensors[name] = _table(tensor, moments.get(HEAD) if is_head else None, config)
        else:
            rounded.tensors[name] = tensor if group == "scalar" else tensor.half()
    _correct(model, config, rounded)
    return rounded


def grid_of(name: str, config: QuantConfig) -> Grid:
    """The grid of a block matrix by the role in its name."""
    is_mlp, by_std = ".mlp." in name, config.clip == "std"
    return Grid(
        config.mlp_bits if is_mlp else config.attention_bits,
        by_std * (config.mlp_clip_std if is_mlp else config.attention_clip_std),
    )


def _round_matrices(
    model: Model,
    moments: Mapping[str, Tensor],
    config: QuantConfig,
    rounded: Rounded,
    like: Rounded | None,
    factor: float,
) -> None:
    """Round the block matrices, those of one shape and grid side by side."""
    alike: dict[tuple[torch.Size, Grid], list[tuple[str, Tensor]]] = {}
    for name, linear, _ in model.matrices():
        weight = linear.weight.detach()
        alike.setdefault((weight.shape, grid_of(name, config)), []).append((name, weight))
    for (_, grid), members in alike.items():
        names, weights = zip(*members, strict=True)
        read = torch.stack([moments[name] for name in names]) if config.method == "gptq" and moments else None
        scales = None
        if like:
            old = [like.tensors[f"{name}.weight"] for name in names]
            scales = torch.stack([q.scaled(factor).scales_M for q in old if isinstance(q, Quantized)])
        found, has_feedback = quantize_matrices(torch.stack(weights), read, grid, config, scales)
        for name, quantized, fed_back in zip(names, found, has_feedback.tolist(), strict=True):
            rounded.tensors[f"{name}.weight"] = quantized
            if read is not None and not fed_back:
                rounded.without_feedback.append(name)


def _table(weight_MN: Tensor, moments_NN: Tensor | None, config: QuantConfig) -> Quantized:
    """A table, each row clipped at the configured quantile or deviation; the output head by GPTQ where that is asked for."""
    weight, bits = weight_MN.float()[None], config.embedding_bits
    by_std = config.clip == "std"
    if config.embedding_method == "gptq" and moments_NN is not None:
        grid = Grid(bits, config.embedding_clip_std * by_std)
        return quantize_matrices(weight, moments_NN[None], grid, config)[0][0]
    if by_std:
        clip_M = std_clip(weight, config.embedding_clip_std, 0.0, None)[0]
    else:
        clip_M = row_quantiles(weight, (config.embedding_clip_quantile,))[0, 0]
    scales = scales_for(clip_M, bits)
    return Quantized(round_to_nearest(weight[0], scales, bits), scales)


def _correct(model: Model, config: QuantConfig, rounded: Rounded) -> None:
    """Store low-rank factors of the largest rounding errors beside their matrices: LQER, #1797."""
    errors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        stored = rounded.tensors[name]
        if isinstance(stored, Quantized) and config.low_rank_tensors:
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
