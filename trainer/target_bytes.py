"""Bytes of text behind a validation split's first targets: what somebody's bits per byte must have been divided by.

Of shards as scripts of the challenge read them, with or without a manifest of ours. Not a part of the bundle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

from trainer.data import HEADER_BYTES, HEADER_INTS, MAGIC, VERSION, TokenBytes
from trainer.errors import DataError

CHUNK_TOKENS = 2**22  # counted at once: some hundred megabytes


def count(shards: Sequence[Path], tokenizer: Path, targets: Iterable[int]) -> dict[str, Any]:
    """The split's targets and their bytes, and the bytes of its first so many targets, by their number as text.

    The first token of the split is no target. Numbers beyond the split are left out. Raises DataError.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(tokenizer.read_bytes())
    except (OSError, RuntimeError) as error:
        raise DataError(f"{tokenizer}: not a SentencePiece model that can be read") from error
    table = TokenBytes(processor)
    wanted = sorted(set(targets))
    done = total = 0
    found: dict[str, int] = {}
    last = torch.zeros(0, dtype=torch.int64)
    for tokens_N in chunks(shards):
        if int(tokens_N.max()) >= processor.vocab_size():
            raise DataError(
                f"{tokenizer}: it has {processor.vocab_size()} pieces, {shards[0].parent} has token {int(tokens_N.max())}"
            )
        run_N = torch.cat([last, tokens_N])
        bytes_N = table.bytes_of_targets(run_N[:-1], run_N[1:])
        for number in wanted:
            if done < number <= done + len(bytes_N):
                found[str(number)] = total + int(bytes_N[: number - done].sum())
        done, total, last = done + len(bytes_N), total + int(bytes_N.sum()), run_N[-1:]
    return {"targets": done, "bytes": total, "first": found}


def chunks(shards: Sequence[Path]) -> Iterator[torch.Tensor]:
    """The tokens of all shards in their order, int64. Raises DataError for a file that is no shard."""
    for path in shards:
        try:
            header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        if (
            len(header) < HEADER_INTS
            or header[:2].tolist() != [MAGIC, VERSION]
            or size != HEADER_BYTES + 2 * int(header[2])
        ):
            raise DataError(f"{path}: not a shard of the challenge's format")
        for first in range(0, int(header[2]), CHUNK_TOKENS):
            most = min(CHUNK_TOKENS, int(header[2]) - first)
            yield torch.from_numpy(
                np.fromfile(path, dtype="<u2", count=most, offset=HEADER_BYTES + 2 * first).astype(np.int64)
            )
