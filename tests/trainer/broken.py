"""A sound small evaluator, and evaluators that each break one rule in a way that has been seen: probes must tell them."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F

from tests.trainer.tiny import ALONE
from trainer.config import EvaluationConfig
from trainer.data import BOS, SPACE, TokenBytes
from trainer.evaluate import Stream, Tally, evaluate, plan_windows
from trainer.probes import Book, Committed

V, D = 24, 8
LENGTH, STRIDE, CHUNK = 16, 4, 32
CONFIG = EvaluationConfig(sequence_length=LENGTH, stride=STRIDE, batch_windows=4)


class Counting:
    """Sound: a decaying sum of the embeddings so far, and a linear head. Knows nothing of documents."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.table_VD, self.head_VD = (torch.randn(V, D, generator=generator) for _ in range(2))
        self.decay_TT = torch.tril(0.8 ** (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs().float())

    def weights(self, tokens_BT):
        """How much of each token each later position sees, (B, T, T)."""
        length = tokens_BT.size(1)
        return self.decay_TT[:length, :length].expand(len(tokens_BT), -1, -1)

    def hidden(self, tokens_BT, targets_BT):
        return self.weights(tokens_BT) @ self.table_VD[tokens_BT]

    def log_probabilities(self, tokens_BT, targets_BT):
        return F.log_softmax(self.hidden(tokens_BT, targets_BT) @ self.head_VD.T, -1)

    def __call__(self, tokens_BT, targets_BT, *, recurrent, scored):
        found = self.log_probabilities(tokens_BT, targets_BT)
        return -found.gather(-1, targets_BT[..., None])[..., 0][:, -scored:]


class Apart(Counting):
    """Sound, of documents said to be independent: a position sees its own document alone."""

    def weights(self, tokens_BT):
        document_BT = (tokens_BT == BOS).cumsum(1)
        return super().weights(tokens_BT) * (document_BT[:, :, None] == document_BT[:, None, :])


# ---- scorers that break C1 or C2 ---------------------------------------------------------------------------------


class FuturePeek(Counting):
    """A little of the next input reaches a position: a mask that is off by one."""

    def hidden(self, tokens_BT, targets_BT):
        state = super().hidden(tokens_BT, targets_BT)
        return state + 0.01 * F.pad(state[:, 1:], (0, 0, 0, 1))


class FurtherPeek(Counting):
    """A little of what stands two places on."""

    def hidden(self, tokens_BT, targets_BT):
        state = super().hidden(tokens_BT, targets_BT)
        return state + 0.01 * F.pad(state[:, 2:], (0, 0, 0, 2))


class Slot(Counting):
    """A shift of the hidden states, fitted to the very targets that are then scored. #1240"""

    def hidden(self, tokens_BT, targets_BT):
        state = super().hidden(tokens_BT, targets_BT)
        shift = torch.zeros(len(state), 1, D, requires_grad=True)
        with torch.enable_grad():
            loss = F.cross_entropy(((state + shift) @ self.head_VD.T).flatten(0, 1), targets_BT.flatten())
            (slope,) = torch.autograd.grad(loss, shift)
        return state - 0.1 * slope


class BatchSlot(Slot):
    """The same with one shift for all rows of a call, fitted to the last row alone."""

    def hidden(self, tokens_BT, targets_BT):
        state = super().hidden(tokens_BT, targets_BT)
        plain = Counting.hidden(self, tokens_BT, targets_BT)
        return plain + (state - plain)[-1:]


class UnnormalizedCache(Counting):
    """A hashed count of (last token, target) mixed into the target's own probability, and into no other's. #677"""

    def log_probabilities(self, tokens_BT, targets_BT):
        found = super().log_probabilities(tokens_BT, targets_BT).exp()
        hashed = (tokens_BT[..., None] * 7 + torch.arange(V)) % 5
        return (0.9 * found + 0.1 * (hashed == 0)).log()


class TargetOnly(Counting):
    """A bonus for whatever the target is: a gate that looks at the token it predicts. #1420"""

    def log_probabilities(self, tokens_BT, targets_BT):
        return super().log_probabilities(tokens_BT, targets_BT) + 0.05


class Smear(Apart):
    """Independent documents, but for the token before, which is mixed in across BOS as well. #1797"""

    def hidden(self, tokens_BT, targets_BT):
        before = F.pad(self.table_VD[tokens_BT][:, :-1], (0, 0, 1, 0))
        return super().hidden(tokens_BT, targets_BT) + 0.05 * before


# ---- evaluations that break C3 or C4 -----------------------------------------------------------------------------


def windows_of(stream):
    return plan_windows(stream.positions, length=LENGTH, stride=STRIDE)


class Bias:
    """Learns how frequent each token is, from what it is handed."""

    def __init__(self, scorer, stream):
        self.scorer, self.stream = scorer, stream

    def learn(self, first, last, *, chunk, chunks):
        counts = torch.bincount(self.stream.tokens_N[first + 1 : last + 1].long(), minlength=V)
        self.scorer.head_VD = self.scorer.head_VD + 0.02 * counts[:, None] / (last - first)


def drive(scorer, stream, *, learns=False):
    """Sound: the judge's own order, with or without learning; a new scorer of this kind each time."""
    book, scorer = Book(stream), scorer()
    evaluate(
        scorer, stream, windows_of(stream), config=CONFIG, recurrent=False, world=ALONE, chunk_tokens=CHUNK, tally=book,
        adapter=Bias(scorer, stream) if learns else None,
    )  # fmt: skip
    return book.committed()


def driver(scorer=Counting, *, learns=False):
    return functools.partial(drive, scorer, learns=learns)


def train_before_score(stream):
    """Each chunk is learned before it is scored. #1376"""
    scorer, parts = Counting(), []
    for first in range(0, stream.positions, CHUNK):
        last = min(first + CHUNK, stream.positions)
        Bias(scorer, stream).learn(first, last, chunk=0, chunks=1)
        part = Stream(stream.tokens_N[first : last + 1], stream.target_bytes_P[first:last])
        parts.append(drive(lambda: scorer, part))
    return joined(parts)


def rescored(stream):
    """Two passes, the second after learning, and the better of both scores for each position. #573"""
    first, second = drive(Counting, stream), drive(lambda: Counting(seed=1), stream)
    return Committed(
        torch.minimum(first.nats_P, second.nats_P), first.times_P + second.times_P, first.tokens, first.bytes
    )


def without_tail(stream):
    """Windows that do not fit are left out, and with them the last positions."""
    found = drive(Counting, stream)
    found.nats_P[-STRIDE:], found.times_P[-STRIDE:] = float("nan"), 0
    return dataclasses.replace(found, tokens=found.tokens - STRIDE)


def joined(parts):
    return Committed(
        torch.cat([part.nats_P for part in parts]), torch.cat([part.times_P for part in parts]),
        sum(part.tokens for part in parts), sum(part.bytes for part in parts),
    )  # fmt: skip


class ForgivingTally(Tally):
    """Counts whatever it is given."""

    def finish(self, world, seconds):
        return self.score(seconds)


class TwiceCountingTally(Tally):
    """Takes the bytes of every commitment for two."""

    def close(self, first, last, world, chain):
        super().close(first, last, world, chain)
        self.bytes *= 2


# ---- bytes -------------------------------------------------------------------------------------------------------


class ThreeByteSpaces(TokenBytes):
    """Takes the mark of a space for text: three bytes at every word's boundary instead of one. #897"""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.bytes_V = self.bytes_V + (len(SPACE.encode()) - 1) * self.leads_V
