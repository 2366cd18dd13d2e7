"""The judge: which window scores which position, in which order, and what is counted. Knows no model's inside.

The driver owns the order. It commits a chunk's score before an adapter may learn from that chunk, every position is
scored exactly once, and nats, tokens and bytes are counted at one place, in float64 and integers.
"""

from __future__ import annotations

import functools
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
from trainer.protocol import Score, ScoreChain

# Dimensions: N tokens of the split, P = N - 1 positions (targets) to score, D documents, W windows, L tokens of a window,
# S positions of a window whose targets are asked for.

RUNNING_SCORES = 50  # running scores of one evaluation, at most


class JudgeError(CaddieError):
    """An evaluation that would not be a score: a position scored twice or never."""


class Scorer(Protocol):
    """What the judge needs of a model: the cross-entropy of the last `scored` targets of each row, in nats."""

    def __call__(self, tokens_BT: Tensor, targets_BT: Tensor, /, *, recurrent: int, scored: int) -> Tensor: ...


class Adapter(Protocol):
    """Something that learns from positions that have been scored."""

    def learn(self, first: int, last: int, *, chunk: int, chunks: int) -> None:
        """Learn from positions first ... last - 1; chunk `chunk` of `chunks`."""


OnChunk = Callable[[int, int, float], None]
"""Hears a chunk's number, the number of chunks, and the bits per byte of all processes so far."""


@dataclass(frozen=True)
class Stream:
    """A token stream to score. Position p predicts tokens[p + 1] from what stands before it."""

    tokens_N: Tensor
    target_bytes_P: Tensor
    """Bytes of text that each target stands for."""

    @property
    def positions(self) -> int:
        return self.tokens_N.numel() - 1

    def documents(self, bos: int) -> Tensor:
        """First position of each document, on the CPU: the first one, and wherever a `bos` stands."""
        starts_P = self.tokens_N[:-1] == bos
        starts_P[0] = True
        return starts_P.nonzero().flatten().cpu()

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Token and target at each position, any shape; beyond the end stands the last one, for nothing to count."""
        inside = positions.clamp(max=self.positions - 1)
        return self.tokens_N[inside].long(), self.tokens_N[inside + 1].long()


@dataclass(frozen=True)
class Windows:
    """Window w reads `length` tokens from starts[w] on, and scores positions begins[w] ... ends[w] - 1 of them."""

    length: int
    stride: int
    places_3W: Tensor
    """Starts, begins and ends."""

    def is_whole(self) -> Tensor:
        """Whether a window scores more than its last `stride` positions, [W]."""
        return self.places_3W[1] < self.places_3W[0] + self.length - self.stride

    def cut(self, chunk_tokens: int) -> Windows:
        """The same windows chunk by chunk, each scoring in one chunk alone, and in each chunk the whole ones first."""
        first_W = self.places_3W[1] // chunk_tokens
        parts_W = (self.places_3W[2] - 1) // chunk_tokens - first_W + 1
        window = torch.repeat_interleave(parts_W)
        part = torch.arange(len(window)) - (parts_W.cumsum(0) - parts_W)[window]
        low, places = (first_W[window] + part) * chunk_tokens, self.places_3W[:, window]
        places[1], places[2] = places[1].maximum(low), places[2].minimum(low + chunk_tokens)
        whole = Windows(self.length, self.stride, places).is_whole()
        return Windows(self.length, self.stride, places[:, torch.argsort(2 * low + ~whole, stable=True)])


def plan_windows(positions: int, *, length: int, stride: int) -> Windows:
    """Sliding windows over a split: the first scores all its positions, each later one its last `stride`.

    The last one scores what is left, with full context, so that no position is missed and none is scored twice.
    `stride == length` is the flat evaluation.
    """
    length = min(length, positions)
    ends = torch.arange(length, positions + stride, stride).clamp_(max=positions)
    ends = ends[: int((ends < positions).sum()) + 1]
    begins = torch.cat((torch.zeros(1, dtype=ends.dtype), ends[:-1]))
    return Windows(length, min(stride, length), torch.stack((ends - length, begins, ends)))


def plan_documents(begins_D: Tensor, positions: int, *, length: int, stride: int) -> Windows:
    """The same over each document by itself: no window reads a token before the beginning of the document it scores in.

    The one window of a short document reads on behind its end, of which nothing is counted.
    """
    plan = functools.cache(functools.partial(plan_windows, length=length, stride=stride))  # many are of one length
    edges = itertools.pairwise([*begins_D.tolist(), positions])
    places = [plan(end - begin).places_3W + begin for begin, end in edges]
    return Windows(min(length, positions), min(stride, length, positions), torch.cat(places, dim=1))


class Tally:
    """Counts nats, tokens and bytes of scored positions, once each: the one account of every evaluation."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.times_scored_P = torch.zeros(stream.positions, dtype=torch.int32, device=stream.tokens_N.device)
        self.rounds: list[Tensor] = []
        """Nats, tokens and bytes that this process committed to the open chunk, round by round."""

        self.nats: list[float] = []
        """Of each closed chunk, over all processes."""

        self.tokens, self.bytes = 0, 0
        """Of all closed chunks, over all processes."""

    def begin_round(self) -> None:
        """Add up what is committed from here on apart from what was before."""
        self.rounds.append(torch.zeros(3, dtype=torch.float64, device=self.times_scored_P.device))

    def commit(self, positions_WS: Tensor, nats_WS: Tensor, counted_WS: Tensor) -> None:
        """Fix the scores of these positions, where they are counted."""
        positions = positions_WS.clamp(max=self.stream.positions - 1)
        self.times_scored_P.index_add_(0, positions.flatten(), counted_WS.flatten().int())
        counts = (counted_WS, self.stream.target_bytes_P[positions] * counted_WS)
        values = (nats_WS.masked_fill(~counted_WS, 0), *counts)
        self.rounds[-1] += torch.stack([value.sum(dtype=torch.float64) for value in values])

    def close(self, first: int, last: int, world: World, chain: ScoreChain | None) -> None:
        """End the next chunk, of positions first ... last - 1 in the order of scoring: take its sums over all processes,
        into the chain before anything can learn from it.
        """
        chunk, (rounds, *counts) = len(self.nats), world.sum(torch.stack(self.rounds)).T.tolist()
        nats, (tokens, scored_bytes) = math.fsum(rounds), (int(sum(count)) for count in counts)
        self.nats.append(nats)
        self.tokens, self.bytes, self.rounds = self.tokens + tokens, self.bytes + scored_bytes, []
        if chain is not None:
            by_round = {"rounds": rounds} if len(rounds) > 1 else {}
            chain.scored(chunk, first, last, nats=nats, tokens=tokens, bytes=scored_bytes, **by_round)

    def score(self, seconds: float) -> Score:
        """The score of the chunks closed so far."""
        return score_of(math.fsum(self.nats), self.tokens, self.bytes, seconds)

    def finish(self, world: World, seconds: float) -> Score:
        """The score over all processes; raises JudgeError where a position was not scored exactly once."""
        times = world.sum(self.times_scored_P)
        if not bool((times == 1).all()):
            wrong = int((times != 1).nonzero()[0])
            raise JudgeError(
                f"position {wrong} of {self.stream.positions} was scored {int(times[wrong])} times, not once"
            )
        return self.score(seconds)


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


def tell(on_chunk: OnChunk | None, tally: Tally, chunk: int, chunks: int) -> None:
    """The score after a chunk, to whoever listens: of few chunks after each one, of many after some, and after the last."""
    if on_chunk and (chunks - 1 - chunk) % (1 + chunks // RUNNING_SCORES) == 0:
        on_chunk(chunk, chunks, tally.score(0.0).bpb)


def _batches(whole_W: Tensor, first: int, last: int, *, batch: int, world: World) -> Iterator[tuple[int, int, bool]]:
    """This process's batches of a chunk's windows: (the first, the one after the last, whether they are whole)."""
    middle = first + int(whole_W[first:last].sum())
    for begin, end in ((first, middle), (middle, last)):
        mine = range(
            begin + (end - begin) * world.rank // world.size, begin + (end - begin) * (world.rank + 1) // world.size
        )
        for start in mine[::batch]:
            yield start, min(start + batch, mine.stop), begin < middle


def evaluate(
    scorer: Scorer, stream: Stream, windows: Windows, *, config: EvaluationConfig, recurrent: int, world: World,
    chunk_tokens: int, adapter: Adapter | None = None, chain: ScoreChain | None = None, on_chunk: OnChunk | None = None,
    tally: Tally | None = None,
) -> Evaluation:  # fmt: skip
    """Score every position of the split once, from left to right, chunk by chunk.

    With an adapter, each chunk but the last is handed to it after its score is committed, in the chain if there is one.
    `on_chunk` hears the score so far now and then; `tally` is the account, a fresh one if none is given. The device is
    waited for once a chunk. Raises JudgeError.
    """
    started = time.perf_counter()
    tally, device = tally or Tally(stream), stream.tokens_N.device
    chunks = math.ceil(stream.positions / chunk_tokens)
    if config.protocol == "documents":  # of the others no window scores in two chunks
        windows = windows.cut(chunk_tokens)
    places_3W, whole_W = windows.places_3W.to(device), windows.is_whole()
    bounds = torch.searchsorted(windows.places_3W[1] // chunk_tokens, torch.arange(chunks + 1)).tolist()
    # One shape for all batches, and two numbers of scored positions: what is compiled is compiled once.
    batch = min(config.batch_windows, math.ceil(max(b - a for a, b in itertools.pairwise(bounds)) / world.size))
    offsets, filling = torch.arange(windows.length, device=device), torch.arange(batch, device=device)
    for chunk in range(chunks):
        tally.begin_round()
        for begin, end, is_whole in _batches(whole_W, bounds[chunk], bounds[chunk + 1], batch=batch, world=world):
            starts, begins, ends = places_3W[:, (begin + filling).clamp_(max=end - 1), None]
            rows = starts + offsets
            asked = windows.length if is_whole else windows.stride
            with torch.no_grad():
                nats = scorer(*stream.rows(rows), recurrent=recurrent, scored=asked)
            positions = rows[:, -asked:]
            is_counted = (begins <= positions) & (positions < ends) & (filling[:, None] < end - begin)
            tally.commit(positions, nats, is_counted)
        first, last = chunk * chunk_tokens, min((chunk + 1) * chunk_tokens, stream.positions)
        tally.close(first, last, world, chain)
        tell(on_chunk, tally, chunk, chunks)
        if adapter is not None and chunk < chunks - 1:
            adapter.learn(first, last, chunk=chunk, chunks=chunks)
            if chain is not None:
                chain.learned(chunk, first, last)
    world.synchronize()
    score = tally.finish(world, time.perf_counter() - started)
    return Evaluation(score, tally.nats[0] / min(chunk_tokens, stream.positions))
