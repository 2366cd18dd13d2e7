"""Bytes of text behind a validation split's first targets: what somebody's bits per byte must have been divided by.

Of shards as scripts of the challenge read them, with or without a manifest of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data import TokenBytes
from trainer.publication import foreign_shard, foreign_tokenizer, stream_bytes

# Dimensions: N tokens.


def count(shards: Sequence[Path], tokenizer: Path, targets: Iterable[int]) -> dict[str, Any]:
    """The split's targets and their bytes, and the bytes of its first so many targets, by their number as text.

    The first token of the split is no target. Numbers beyond the split are left out. Raises DataError.
    """
    processor = foreign_tokenizer(tokenizer)
    table = TokenBytes(processor)
    tokens_N = np.concatenate([foreign_shard(path, processor) for path in shards])
    last = max(0, len(tokens_N) - 1)
    wanted = {number for number in targets if 0 < number <= last}
    ends = sorted({0, *wanted, last})
    parts = (stream_bytes(table, tokens_N[begin : end + 1]) for begin, end in pairwise(ends))
    bytes_to = dict(zip(ends, accumulate(parts, initial=0), strict=True))
    return {
        "targets": last,
        "bytes": bytes_to[last],
        "first": {str(end): bytes_to[end] for end in ends if end in wanted},
    }
