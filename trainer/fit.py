"""Fitting a model file under the cap."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trainer.artifact import ModelFile, Stored, compress, encode
from trainer.gptq import Quantized

WEIGHTS_A_BYTE = 8  # first guess of the ±1 to prune for each byte over the cap: #1334
GROWTH = 2.0  # factor by which pruning is stepped up while the file stays over its cap


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


def fit(file: ModelFile, *, cap_bytes: int, quality: int) -> tuple[bytes, int]:
    """Compress a model file under a cap; returns the bytes and how many weights had to be pruned for it.

    Starts from a guess by the missing bytes and steps up until the file fits. A file that does not fit with every
    ±1 gone is returned as it came, over the cap: the caller reports it.
    """
    compressed = compress(encode(file), quality)
    most = sum(int((t.integers_MN.abs() == 1).sum()) for t in file.tensors.values() if isinstance(t, Quantized))
    count = WEIGHTS_A_BYTE * (len(compressed) - cap_bytes)
    while most and count > 0:
        count = min(count, most)
        smaller = compress(encode(ModelFile(file.meta, prune(file.tensors, count))), quality)
        if len(smaller) <= cap_bytes:
            return smaller, count
        if count == most:
            break
        count = int(GROWTH * count)
    return compressed, 0
