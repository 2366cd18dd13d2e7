"""Probes of an evaluation: each disturbs what a score must not depend on, and counts the scores that moved all the same.

A probe takes what is judged as an argument, a scorer, a whole evaluation or an account, ours or anybody's, and knows
nothing of its inside. It gives numbers; what they mean is for the reader to say. The conditions C1 to C4 are those of
openai/parameter-golf#1017: causality, a full distribution, score before update, one pass.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.data import BOS
from trainer.distributed import World
from trainer.errors import CaddieError
from trainer.evaluate import Scorer, Stream, Tally
from trainer.protocol import Score, ScoreChain

# Dimensions: B rows, T tokens of a row, S positions scored of it, its last; L = T + 1, a row and its last target;
# N tokens of a stream, P = N - 1 positions, V vocabulary.


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Scores that had to stay when something was disturbed."""

    compared: int
    moved: int
    """How many of them changed, by any bit."""

    largest: float
    """Largest change of one of them, in nats; infinite for a score that is no number."""

    mean: float
    """Change of all that were compared, in nats a score, by absolute value."""

    control: int
    """Scores that were free to change and did: where this is 0, nothing was disturbed and nothing is shown."""

    noise: float = 0.0
    """Largest change of the same scores between two equal evaluations, measured where any of them moved."""

    def __add__(self, other: Moved) -> Moved:
        compared = self.compared + other.compared
        return Moved(
            compared=compared, moved=self.moved + other.moved, largest=max(self.largest, other.largest),
            mean=(self.mean * self.compared + other.mean * other.compared) / max(1, compared),
            control=self.control + other.control, noise=max(self.noise, other.noise),
        )  # fmt: skip


NOTHING = Moved(compared=0, moved=0, largest=0.0, mean=0.0, control=0)


def compare(before: Tensor, after: Tensor, stays: Tensor) -> Moved:
    """What became of the scores that had to stay, any shape."""
    change = (after.double() - before.double()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    kept = change[stays]
    return Moved(
        compared=kept.numel(), moved=int((kept > 0).sum()), largest=float(kept.max()) if kept.numel() else 0.0,
        mean=float(kept.mean()) if kept.numel() else 0.0, control=int((change[~stays] > 0).sum()),
    )  # fmt: skip


def disturbed(
    tokens: Tensor, where: Tensor, *, vocab_size: int, generator: torch.Generator, keeps_bos: bool = False
) -> Tensor:
    """Other tokens where asked, none of them as it was and none a BOS; with `keeps_bos`, a BOS stays where it stands."""
    shift = torch.randint(1, vocab_size - 1, tokens.shape, generator=generator).to(tokens)
    texts = tokens - (tokens > BOS).to(tokens)  # numbers of the vocabulary less BOS
    others = (texts + shift) % (vocab_size - 1)
    where = where & (tokens != BOS) if keeps_bos else where
    return torch.where(where, others + (others >= BOS).to(tokens), tokens)


# ---- scorers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A scorer, and how it is asked."""

    scorer: Scorer
    recurrent: int
    vocab_size: int
    rows: int
    """Rows of a call; what lacks rows is filled up, so that all calls have one shape and round alike."""

    def nats(self, tokens_BT: Tensor, targets_BT: Tensor, *, scored: int) -> Tensor:
        """Nats of the last `scored` targets of each row, (B, S), on the CPU; any number of rows."""
        found = []
        with torch.no_grad():
            for tokens, targets in zip(tokens_BT.split(self.rows), targets_BT.split(self.rows), strict=True):
                filling = torch.arange(self.rows, device=tokens.device).clamp(max=len(tokens) - 1)
                nats = self.scorer(tokens[filling], targets[filling], recurrent=self.recurrent, scored=scored)
                found.append(nats[: len(tokens)].detach().to("cpu", copy=True))
        return torch.cat(found)


def future_reach(judged: Judged, rows_BL: Tensor, *, scored: int, generator: torch.Generator) -> dict[str, Moved]:
    """C1: disturb each row from a random target on, in five ways, and see which scores before it move.

    `future`: the target and everything behind it. `target`: it alone, as a target and as the next position's input.
    `targets`: the same targets as `future`, the inputs left as they are. `inputs`: the same inputs, the targets left as
    they are, so that the target's own score must stay too. `other rows`: all rows of the call but one.
    """
    count, length = rows_BL.size(0), rows_BL.size(1) - 1
    first = min(length - scored + 1, length - 1)  # so that a score stands before it, where more than one is asked for
    places_B = torch.randint(first, length, (count,), generator=generator).to(rows_BL.device)
    columns_L = torch.arange(length + 1, device=rows_BL.device)
    behind_BL = columns_L > places_B[:, None]
    another_BL = disturbed(rows_BL, torch.ones_like(behind_BL), vocab_size=judged.vocab_size, generator=generator)
    before_BS = judged.nats(rows_BL[:, :-1], rows_BL[:, 1:], scored=scored)
    future_BL = torch.where(behind_BL, another_BL, rows_BL)
    target_BL = torch.where(columns_L == places_B[:, None] + 1, another_BL, rows_BL)
    inputs_BT, targets_BT = rows_BL[:, :-1], rows_BL[:, 1:]
    earlier_BS = (columns_L[:-1] < places_B[:, None])[:, -scored:].cpu()
    so_far_BS = (columns_L[:-1] <= places_B[:, None])[:, -scored:].cpu()
    ways = {
        "future": (future_BL[:, :-1], future_BL[:, 1:], earlier_BS),
        "target": (target_BL[:, :-1], target_BL[:, 1:], earlier_BS),
        "targets": (inputs_BT, future_BL[:, 1:], earlier_BS),
        "inputs": (future_BL[:, :-1], targets_BT, so_far_BS),
    }
    found = {
        way: compare(before_BS, judged.nats(inputs, targets, scored=scored), stays_BS)
        for way, (inputs, targets, stays_BS) in ways.items()
    }
    return {**found, "other rows": _reach_of_other_rows(judged, rows_BL, another_BL, before_BS, scored)}


def _reach_of_other_rows(judged: Judged, rows_BL: Tensor, another_BL: Tensor, before_BS: Tensor, scored: int) -> Moved:
    """Keep one row of each call, its first, and change the others: windows of a call are each other's future."""
    is_kept_B = torch.arange(len(rows_BL)) % judged.rows == 0
    mixed_BL = torch.where(is_kept_B[:, None].to(rows_BL.device), rows_BL, another_BL)
    after_BS = judged.nats(mixed_BL[:, :-1], mixed_BL[:, 1:], scored=scored)
    return compare(before_BS, after_BS, is_kept_B[:, None].expand_as(before_BS))


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """What a scorer charges for each token of the vocabulary, at some positions."""

    positions: int
    context: int
    """Tokens before each of them."""

    largest_log_sum: float
    """Largest distance from 0 of log Σ exp(-nats) over the vocabulary."""

    largest_entry_gap: float
    """Largest difference between a target's score and its entry of that distribution, in nats."""


def distribution(judged: Judged, rows_BL: Tensor, *, scored: int) -> Distribution:
    """C2: ask for each token of the vocabulary as the last target of each row, which no input holds."""
    tokens_BT, targets_BT = rows_BL[:, :-1], rows_BL[:, 1:]
    log_sums, gaps = [], []
    for tokens_T, targets_T in zip(tokens_BT, targets_BT, strict=True):
        targets_VT = targets_T.repeat(judged.vocab_size, 1)
        targets_VT[:, -1] = torch.arange(judged.vocab_size, device=targets_T.device)
        nats_V = judged.nats(tokens_T.expand_as(targets_VT), targets_VT, scored=scored)[:, -1].double()
        charged = float(judged.nats(tokens_T[None], targets_T[None], scored=scored)[0, -1])
        log_sums.append(abs(float(torch.logsumexp(-nats_V, 0))))
        gaps.append(abs(charged - float(nats_V[int(targets_T[-1])])))
    return Distribution(
        positions=len(rows_BL), context=tokens_BT.size(1), largest_log_sum=_largest(log_sums), largest_entry_gap=_largest(gaps)
    )  # fmt: skip


def _largest(values: list[float]) -> float:
    return max((math.inf if math.isnan(value) else value for value in values), default=0.0)


# ---- whole evaluations -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Committed:
    """What an evaluation committed, position by position."""

    nats_P: Tensor
    """Score of each position's target, on the CPU; the last one of several, not a number where there is none."""

    times_P: Tensor
    """How often each position was scored, on the CPU."""

    tokens: int
    bytes: int
    """Both as the evaluation counted them."""


Driver = Callable[[Stream], Committed]
"""A whole evaluation, from the same start each time."""


class Book(Tally):
    """The judge's account, which also keeps each score."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self.nats_P = torch.full((stream.positions,), math.nan, device=stream.tokens_N.device)

    def commit(self, positions_WS: Tensor, nats_WS: Tensor, counted_WS: Tensor) -> None:
        super().commit(positions_WS, nats_WS, counted_WS)
        self.nats_P[positions_WS[counted_WS]] = nats_WS[counted_WS].float()

    def committed(self) -> Committed:
        return Committed(self.nats_P.cpu(), self.times_scored_P.cpu(), self.tokens, self.bytes)


def reach_back(
    driver: Driver, stream: Stream, place: int, *, vocab_size: int, generator: torch.Generator, keeps_bos: bool
) -> Moved:
    """C1 and C3: replace the tokens from `place` on; no score of an earlier token may move.

    Where documents are scored apart, `keeps_bos` leaves their boundaries.
    """
    columns_N = torch.arange(len(stream.tokens_N), device=stream.tokens_N.device)
    tokens_N = disturbed(
        stream.tokens_N, columns_N >= place, vocab_size=vocab_size, generator=generator, keeps_bos=keeps_bos
    )
    return _changes(driver, stream, tokens_N, columns_N[1:].cpu() < place)


def boundary_reach(
    driver: Driver, stream: Stream, boundary: int, *, vocab_size: int, generator: torch.Generator
) -> Moved:
    """Replace what stands before the document that begins at `boundary`, and see which scores of its tokens move."""
    columns_N = torch.arange(len(stream.tokens_N), device=stream.tokens_N.device)
    tokens_N = disturbed(
        stream.tokens_N, columns_N < boundary, vocab_size=vocab_size, generator=generator, keeps_bos=True
    )
    return _changes(driver, stream, tokens_N, columns_N[1:].cpu() > boundary)


def _changes(driver: Driver, stream: Stream, tokens_N: Tensor, stays_P: Tensor) -> Moved:
    """What becomes of scores with other tokens; beside it, where anything moved, what moves with the same tokens."""
    before, after = driver(stream), driver(dataclasses.replace(stream, tokens_N=tokens_N))
    found = compare(before.nats_P, after.nats_P, stays_P)
    if not found.moved:
        return found
    again = compare(before.nats_P, driver(stream).nats_P, stays_P)
    return dataclasses.replace(found, noise=again.largest)


def loss_gap(one: Committed, other: Committed, positions: int) -> float:
    """Nats per token by which two evaluations differ on their first positions, before anything can have been learned."""
    first, second = (found.nats_P[:positions].double().mean() for found in (one, other))
    return abs(float(second - first))


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How often an evaluation scored what it had to score once."""

    positions: int
    never: int
    again: int
    """Scores of positions that had one before."""

    tokens: int
    bytes: int
    """Both as the evaluation counted them."""

    stream_bytes: int
    """Bytes of the stream's targets."""


def coverage(found: Committed, stream: Stream) -> Coverage:
    """C4: how often each position was committed, and what was counted."""
    return Coverage(
        positions=stream.positions, never=int((found.times_P == 0).sum()), again=int((found.times_P - 1).clamp(min=0).sum()),
        tokens=found.tokens, bytes=found.bytes, stream_bytes=int(stream.target_bytes_P.sum()),
    )  # fmt: skip


# ---- accounts ----------------------------------------------------------------------------------------------------


class Account(Protocol):
    """What counts nats, tokens and bytes of committed positions."""

    def begin_round(self) -> None: ...

    def commit(self, positions_WS: Tensor, nats_WS: Tensor, counted_WS: Tensor) -> None: ...

    def close(self, first: int, last: int, world: World, chain: ScoreChain | None) -> None: ...

    def finish(self, world: World, seconds: float) -> Score: ...


def faults_taken(open_account: Callable[[Stream], Account], world: World) -> list[str]:
    """C4: commit positions once, twice and never, with sums known in advance; the faults that the account does not refuse."""
    stream = Stream(torch.arange(9, device=world.device), torch.arange(8, device=world.device) % 3)
    each, taken = list(range(8)), []
    for fault, positions in (
        ("", each),
        ("a position scored twice", [*each, 3]),
        ("a position never scored", each[1:]),
    ):
        account = open_account(stream)
        places_WS = torch.tensor([positions], device=world.device)
        account.begin_round()
        account.commit(places_WS, places_WS / 4, torch.ones_like(places_WS) == 1)
        account.close(0, 8, world, None)
        try:
            score = account.finish(world, 0.0)
        except CaddieError:
            taken += [] if fault else ["each position once, which is no fault, is refused"]
            continue
        if fault:
            taken.append(fault)
        elif (score.nats, score.tokens, score.bytes) != (7.0, 8, 7):
            taken.append(
                f"sums of 7.0 nats, 8 tokens and 7 bytes come to {score.nats}, {score.tokens} and {score.bytes}"
            )
    return taken


# ---- bytes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ByteCount:
    """Bytes of some documents, counted by tokens and in the text that they spell."""

    documents: int
    counted: int
    spelled: int
    wrong: int
    """Documents for which the two differ."""


def byte_count(stream: Stream, spell: Callable[[list[list[int]]], list[bytes]]) -> ByteCount:
    """Compare the stream's bytes with the text of its whole documents, as `spell` puts it together from tokens."""
    starts = (stream.tokens_N == BOS).nonzero().flatten().tolist()
    spans = list(itertools.pairwise(starts))
    tokens, counts = stream.tokens_N.tolist(), [0, *stream.target_bytes_P.tolist()]  # by token: its bytes as a target
    counted = [sum(counts[begin + 1 : end]) for begin, end in spans]
    spelled = [len(text) for text in spell([tokens[begin + 1 : end] for begin, end in spans])] if spans else []
    return ByteCount(
        documents=len(spans), counted=sum(counted), spelled=sum(spelled),
        wrong=sum(a != b for a, b in zip(counted, spelled, strict=True)),
    )  # fmt: skip
