"""The judge: which window scores which position, in which order, and what is counted. Knows no model's inside.

The driver owns the order. It commits a chunk's score before an adapter may learn from that chunk, every position is
scored exactly once, and nats, tokens and bytes are counted at one place, in float64 and integers.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.config import EvaluationConfig
from trainer.distributed import World
from trainer.errors import CaddieError
from trainer.protocol import Score

# Dimensions: N tokens of the split, P = N - 1 positions (targets) to score, W windows, L tokens of a window,
# S scored positions of a window.

RUNNING_SCORES = 50  # running scores of one evaluation, at most


class JudgeError(CaddieError):
    """An evaluation that would not be a score: a position scored twice or never."""


class Scorer(Protocol):
    """What the judge needs of a model: the cross-entropy of the last `scored` targets of each row, in nats."""

    def __call__(self, tokens_BT: Tensor, targets_BT: Tensor, /, *, recurrent: bool, scored: int) -> Tensor: ...


class Adapter(Protocol):
    """Something that learns from positions that have been scored."""

    def learn(self, first: int, last: int, *, chunk: int, chunks: int) -> None:
        """Learn from positions first ... last - 1; chunk `chunk` of `chunks`."""


@dataclass(frozen=True)
class Stream:
    """A token stream to score. Position p predicts tokens[p + 1] from what stands before it."""

    tokens_N: Tensor
    target_bytes_P: Tensor
    """Bytes of text that each target stands for."""

    @property
    def positions(self) -> int:
        return self.tokens_N.numel() - 1


@dataclass(frozen=True)
class Windows:
    """Windows in reading order: window w reads `length` tokens and scores positions begins[w] ... ends[w] - 1, its last."""

    length: int
    stride: int
    begins_W: Tensor
    ends_W: Tensor


def plan_windows(positions: int, *, length: int, stride: int) -> Windows:
    """Sliding windows over a split: the first scores all its positions, each later one its last `stride`.

    The last one scores what is left, with full context, so that no position is missed and none is scored twice.
    `stride == length` is the flat evaluation.
    """
    length = min(length, positions)
    ends = torch.arange(length, positions + stride, stride).clamp_(max=positions)
    ends = ends[: int((ends < positions).sum()) + 1]
    return Windows(length, min(stride, length), torch.cat((torch.zeros(1, dtype=ends.dtype), ends[:-1])), ends)


class Tally:
    """Counts nats, tokens and bytes of scored positions, once each."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.nats = torch.zeros((), dtype=torch.float64, device=stream.tokens_N.device)
        self.times_scored_P = torch.zeros(stream.positions, dtype=torch.int32, device=stream.tokens_N.device)

    def commit(self, positions_WS: Tensor, nats_WS: Tensor) -> None:
        """Fix the scores of these positions."""
        self.nats += nats_WS.sum(dtype=torch.float64)
        positions = positions_WS.flatten()
        self.times_scored_P.index_add_(0, positions, torch.ones_like(positions, dtype=torch.int32))

    def finish(self, world: World, seconds: float) -> Score:
        """The score over all processes; raises JudgeError where a position was not scored exactly once."""
        times = world.sum(self.times_scored_P)
        if not bool((times == 1).all()):
            wrong = int((times != 1).nonzero()[0])
            raise JudgeError(
                f"position {wrong} of {self.stream.positions} was scored {int(times[wrong])} times, not once"
            )
        nats = float(world.sum(self.nats.clone()))
        tokens = int(times.sum(dtype=torch.int64))
        scored_bytes = int((self.stream.target_bytes_P * times).sum(dtype=torch.int64))
        return score_of(nats, tokens, scored_bytes, seconds)


def score_of(nats: float, tokens: int, scored_bytes: int, seconds: float) -> Score:
    """Nats per token, and bits per byte = nats / ln 2 / bytes."""
    return Score(
        nats=nats, tokens=tokens, bytes=scored_bytes, loss=nats / tokens,
        bpb=nats / math.log(2) / max(1, scored_bytes), seconds=seconds,
    )  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """A score, and what its first chunk alone came to."""

    score: Score
    first_chunk_loss: float
    """Nats per token of the first chunk's positions."""


def _batches(windows: Windows, first: int, last: int, *, batch: int, world: World) -> Iterator[tuple[int, int, int]]:
    """This process's batches of the windows first ... last - 1: (its first window, its last + 1, positions scored in each)."""
    scored = windows.ends_W[first:last] - windows.begins_W[first:last]
    edges = [0, *((scored[1:] != scored[:-1]).nonzero().flatten() + 1).tolist(), last - first]
    for begin, end in itertools.pairwise(edges):
        mine = range(
            first + begin + (end - begin) * world.rank // world.size,
            first + begin + (end - begin) * (world.rank + 1) // world.size,
        )
        for start in mine[::batch]:
            yield start, min(start + batch, mine.stop), int(scored[begin])


def evaluate(
    scorer: Scorer, stream: Stream, windows: Windows, *, config: EvaluationConfig, recurrent: bool, world: World,
    chunk_tokens: int, adapter: Adapter | None = None, on_chunk: Callable[[int, int, float], None] | None = None,
) -> Evaluation:  # fmt: skip
    """Score every position of the split once, from left to right, chunk by chunk.

    With an adapter, each chunk but the last is handed to it after its score is committed. `on_chunk(chunk, chunks,
    bpb)` hears now and then the running bits per byte of all processes. Nothing else waits for the device.
    Raises JudgeError.
    """
    started = time.perf_counter()
    tally, device = Tally(stream), stream.tokens_N.device
    chunks = math.ceil(stream.positions / chunk_tokens)
    bounds = torch.searchsorted(windows.begins_W, torch.arange(chunks + 1) * chunk_tokens).tolist()
    # One shape for all batches, and two numbers of scored positions: what is compiled is compiled once.
    batch = min(config.batch_windows, math.ceil(max(b - a for a, b in itertools.pairwise(bounds)) / world.size))
    ends_W, offsets = windows.ends_W.to(device), torch.arange(windows.length, device=device)
    first_chunk_loss = math.nan
    for chunk in range(chunks):
        for begin, end, scored in _batches(windows, bounds[chunk], bounds[chunk + 1], batch=batch, world=world):
            numbers = torch.arange(begin, begin + batch, device=device).clamp_(max=end - 1)
            rows = ends_W[numbers, None] - windows.length + offsets
            tokens, targets = stream.tokens_N[rows].long(), stream.tokens_N[rows + 1].long()
            asked = windows.stride if scored <= windows.stride else windows.length
            with torch.no_grad():
                nats = scorer(tokens, targets, recurrent=recurrent, scored=asked)
            tally.commit(rows[: end - begin, -scored:], nats[: end - begin, -scored:])
        done = min(stream.positions, (chunk + 1) * chunk_tokens)
        is_heard = on_chunk and (chunks - 1 - chunk) % (1 + chunks // RUNNING_SCORES) == 0  # the last one always
        if chunk == 0 or is_heard:
            nats_so_far = float(world.sum(tally.nats.clone()))
            if chunk == 0:
                first_chunk_loss = nats_so_far / done
            if on_chunk and is_heard:
                so_far = score_of(nats_so_far, done, int(stream.target_bytes_P[:done].sum(dtype=torch.int64)), 0.0)
                on_chunk(chunk, chunks, so_far.bpb)
        if adapter is not None and chunk < chunks - 1:
            adapter.learn(chunk * chunk_tokens, done, chunk=chunk, chunks=chunks)
    world.synchronize()
    return Evaluation(tally.finish(world, time.perf_counter() - started), first_chunk_loss)
