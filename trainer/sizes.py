"""Sizes: what a model file's bytes hold, by group of tensors. Not a part of the bundle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trainer import artifact
from trainer.errors import CaddieError
from trainer.gptq import Quantized
from trainer.protocol import RunDir

EMBEDDING, VALUE_EMBEDDING, ATTENTION, MLP, REST = (
    "embedding", "value embedding", "attention", "MLP", "scales, vectors, header",
)  # fmt: skip
GROUPS = (("value_embedding.", VALUE_EMBEDDING), ("embedding.", EMBEDDING), ("head.", EMBEDDING), (".mlp.", MLP))
"""Groups by a part of the tensor's name, the first that fits; other matrices are attention's."""


def group_of(name: str) -> str:
    return next((group for part, group in GROUPS if part in name), ATTENTION)


def sizes_of(runs: Sequence[RunDir]) -> dict[str, Any]:
    """Bytes by group of every run whose model file can be read, by its id; of the others, why it cannot."""
    sizes, problems = {}, {}
    for run in runs:
        try:
            sizes[run.run_id] = bytes_by_group(run)
        except (CaddieError, OSError, KeyError) as error:
            problems[run.run_id] = f"{type(error).__name__}: {error}"
    return {"sizes": sizes, "unreadable": problems}


def bytes_by_group(run: RunDir) -> dict[str, int]:
    """Bytes of each group in a run's model file; together the whole file. Raises ProtocolError, FileNotFoundError.

    What is not an integer is packed apart, and its size is measured. The integers of all matrices share one stream: its
    bytes fall to the matrices by their entropy of order 0.
    """
    packed = run.artifact.read_bytes()
    file = artifact.load(packed, str(run.artifact))
    quality = int(file.meta["config"]["quant"]["brotli_quality"])
    empty = artifact.ModelFile(file.meta, {n: t for n, t in file.tensors.items() if not isinstance(t, Quantized)})
    scales = sum(2 * len(t.scales_M) for t in file.tensors.values() if isinstance(t, Quantized))
    rest = min(len(packed), len(artifact.pack(empty, "brotli", quality)) + scales)
    shares: dict[str, float] = {}
    for name, tensor in file.tensors.items():
        if isinstance(tensor, Quantized):
            entropy = artifact.entropy_bytes(tensor.integers_MN.cpu().numpy())
            shares[group_of(name)] = shares.get(group_of(name), 0.0) + entropy
    total = math.fsum(shares.values()) or 1.0
    found = {group: round((len(packed) - rest) * share / total) for group, share in shares.items()}
    return {**found, REST: len(packed) - sum(found.values())}
