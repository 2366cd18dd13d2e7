"""Fitting a model file under the cap: a coarser grid, found by entropy without compressing; single ±1 at the last."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainer import artifact
from trainer.artifact import ModelFile, Stored
from trainer.calibration import Calibration
from trainer.config import QuantConfig
from trainer.gptq import Quantized, round_to_nearest
from trainer.model import Model
from trainer.quantize import FISHER_BITS, Rounded, fisher_steps, grids_of, quantize, unclipped

TRIES = 4  # grids that are packed before single weights have to go
HALVINGS = 14  # of the interval in which the grid's factor lies
FINEST, COARSEST = 1 / 2, 16.0  # factors beyond which a grid clips, or is another configuration
FINEST_FISHER = 1 / 64  # never clips
FLATTEST, STEEPEST = 0.3, 2.0  # bytes of the file for each byte of entropy, as far as two packings are believed
WEIGHTS_A_BYTE = 8  # first guess of the ±1 to prune for each byte over the cap: #1334
GROWTH = 2.0  # factor by which pruning is stepped up while the file stays over its cap
SMALLEST_ERROR = 1e-30  # below which rounding left none


@dataclass(frozen=True)
class Fitted:
    """A packed model file and what it took to fit it."""

    packed: bytes
    without_feedback: list[str]
    """Matrices in which GPTQ could not feed errors back."""

    factor: float = 1.0
    """How many times coarser (below 1: finer) the matrices' grid is than the configuration's."""

    pruned: int = 0
    """Quantised ±1 set to zero."""

    added_error: float = 0.0
    """Squared error of the weights that pruning added, as a part of the squared error that rounding left."""


def fit(
    model: Model,
    found: Calibration,
    meta: dict[str, Any],
    *,
    cap_bytes: int,
    config: QuantConfig,
    phase: Callable[[str], AbstractContextManager[None]],
) -> Fitted:
    """Quantise and pack a trained model so that its file has at most `cap_bytes`; `phase` times the two.

    The grid of the configuration is taken where it fits. Else the matrices' grid is made coarser by the factor at
    which the entropy of the rounded weights puts the file `config.margin_bytes` under the cap; each packing corrects
    that prediction by what it was wrong. What is over the cap then is pruned. A file that does not fit with every ±1
    gone comes back on the configuration's grid, over the cap: the caller reports it.
    """

    def packed_file(tensors: Mapping[str, Stored]) -> bytes:
        return artifact.pack(ModelFile(meta, dict(tensors)), config.coder, config.brotli_quality)

    with phase("quantize"):
        first = quantize(model, found, config)
        grids = Grids(model, first, found, config)
        finest = FINEST_FISHER if config.grid == "fisher" else FINEST
        bounds = {"prune": (1.0, 1.0), "coarsen": (1.0, COARSEST), "fill": (finest, COARSEST)}[config.fit]
        known, slope = grids.entropy_bytes(1.0), 1.0
    with phase("pack"):
        size = artifact.estimate(ModelFile(meta, first.tensors), config.coder, config.brotli_quality)
    best, factor = None, 0.0
    for attempt in range(TRIES):
        with phase("quantize"):
            wanted = known + (cap_bytes - config.margin_bytes - size) / slope
            last, factor = factor, grids.factor_for(wanted, *bounds)
            if factor == last:
                break
            rounded = first if factor == 1 else quantize(model, found, config, grids.scales(factor))
        with phase("pack"):
            packed = packed_file(rounded.tensors)
        if len(packed) <= cap_bytes:
            if best is None or factor < best.factor:
                best = Fitted(packed, first.without_feedback, factor)
            if factor == bounds[0] or len(packed) >= cap_bytes - 2 * config.margin_bytes:
                break
        before, known = known, grids.entropy_bytes(factor)
        if attempt and known != before:
            slope = min(max((len(packed) - size) / (known - before), FLATTEST), STEEPEST)
        size = len(packed)
    if best:
        return best
    with phase("pack"):
        whole = Fitted(packed, first.without_feedback, factor)
        return _pruned(model, rounded, packed_file, cap_bytes, whole) or replace(
            whole, packed=packed_file(first.tensors), factor=1.0
        )


class Grids:
    """A model's grids, finer and coarser than the configuration's by one factor, and Shannon's bound on the integers."""

    def __init__(self, model: Model, first: Rounded, found: Calibration, config: QuantConfig) -> None:
        self.model, self.first = model, first
        self.steps = fisher_steps(model, found, config) if config.grid == "fisher" else None
        self.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        grids = grids_of(model, found.moments, config)
        self.matrices = {f"{name}.weight": grid.bits for name, grid in grids.items()}

    def scales(self, factor: float) -> dict[str, Tensor]:
        """Scales of the rows by the parameter's name: of block matrices the first ones times the factor."""
        if self.steps:
            return unclipped(self.model, self.steps, factor)
        old = {name: self.first.tensors[name] for name in self.matrices}
        return {name: tensor.scaled(factor).scales_M for name, tensor in old.items() if isinstance(tensor, Quantized)}

    def entropy_bytes(self, factor: float) -> float:
        """Bytes of the integers on a grid so many times coarser, by how often each comes up in its matrix.

        Rounded to nearest: GPTQ moves single integers to a neighbour, which the bound does not notice.
        """
        bits = 0.0
        for name, scales_M in self.scales(factor).items():
            depth = self.matrices.get(name, FISHER_BITS)
            integers = round_to_nearest(self.weights[name], scales_M, depth)
            counts = torch.bincount(integers.flatten().int() + 2**depth)
            frequencies = counts[counts > 0] / integers.numel()
            bits -= integers.numel() * float((frequencies * frequencies.log2()).sum())
        return bits / 8

    def factor_for(self, most: float, finest: float, coarsest: float) -> float:
        """The finest factor between two bounds at which the integers take at most so many bytes; else the coarsest."""
        if finest == coarsest or self.entropy_bytes(finest) <= most:
            return finest
        low, high = math.log2(finest), math.log2(coarsest)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.entropy_bytes(2**middle) <= most else (middle, high)
        return float(2**high)


def prune(tensors: Mapping[str, Stored], count: int) -> dict[str, Stored]:
    """Set the `count` cheapest quantised ±1 to zero: the cost of zeroing one is its row's squared scale. #1334."""
    ones = {
        name: (t.integers_MN.abs() == 1).nonzero() for name, t in tensors.items() if isinstance(t, Quantized)
    }  # fmt: skip
    scales = torch.cat([tensors[name].scales_M.float()[where[:, 0]] for name, where in ones.items()])  # type: ignore[union-attr]
    cheapest = torch.zeros(scales.numel(), dtype=torch.bool)
    cheapest[scales.argsort(stable=True)[:count].cpu()] = True
    pruned = dict(tensors)
    for (name, where), hit in zip(ones.items(), cheapest.split([len(w) for w in ones.values()]), strict=True):
        old = tensors[name]
        integers = old.integers_MN.clone()  # type: ignore[union-attr]
        integers[where[hit, 0], where[hit, 1]] = 0
        pruned[name] = Quantized(integers, old.scales_M)  # type: ignore[union-attr]
    return pruned


def _pruned(
    model: Model, rounded: Rounded, packed_file: Callable[[Mapping[str, Stored]], bytes], cap_bytes: int, whole: Fitted
) -> Fitted | None:
    """Prune so many ±1 that the file fits, by a guess from the missing bytes that is stepped up; None if all are too few."""
    quantized = [t for t in rounded.tensors.values() if isinstance(t, Quantized)]
    most = sum(int((t.integers_MN.abs() == 1).sum()) for t in quantized)
    count = float(WEIGHTS_A_BYTE * (len(whole.packed) - cap_bytes))
    while most:
        pruned = prune(rounded.tensors, min(int(count), most))
        packed = packed_file(pruned)
        if len(packed) <= cap_bytes:
            added = _squared_error(model, pruned) / max(_squared_error(model, rounded.tensors), SMALLEST_ERROR) - 1
            return replace(whole, packed=packed, pruned=min(int(count), most), added_error=added)
        if count >= most:
            break
        count *= GROWTH
    return None


def _squared_error(model: Model, tensors: Mapping[str, Stored]) -> float:
    """Of all quantised weights against the trained ones."""
    weights = dict(model.named_parameters())
    return sum(
        float((weights[name].detach() - t.dequantize()).square().sum())
        for name, t in tensors.items()
        if isinstance(t, Quantized) and name in weights
    )
