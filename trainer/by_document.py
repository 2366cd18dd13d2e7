"""The judge, document by document: each is scored from its own tokens alone, and may be learned from as it goes on. #1530.

Documents of like length lie side by side, the longest first. In each round the next few positions of each are scored and
committed; then an adapter may learn from these, for the rounds of the same documents that follow. It forgets them before
the next batch of documents begins, so that no document's score depends on another's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from trainer.config import TTTConfig
from trainer.distributed import World
from trainer.evaluate import OnChunk, Scorer, Stream, Tally, tell
from trainer.protocol import Score, ScoreChain

# Dimensions: D documents of the split, B documents side by side, T tokens of a row, S positions scored of it, its last.


class PrivateAdapter(Protocol):
    """Something that learns from documents side by side, from each for itself alone."""

    def begin(self) -> None:
        """Forget everything: other documents come."""

    def learn(self, tokens_BT: Tensor, targets_BT: Tensor, learns_B: Tensor, *, scored: int) -> None:
        """Learn from the last `scored` targets of the rows of which `learns` is 1, all of which have been scored."""


Round = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""The next few positions of each document, at the end of as much of the document as fits: tokens (B, T), targets (B, T),
positions (B, S), whether they belong to the document (B, S), and 1 where more of it follows (B); None after the last round.
"""


class Documents:
    """A split's documents by falling length, in batches that all processes take together, each its share."""

    def __init__(
        self, stream: Stream, begins_D: Tensor, *, config: TTTConfig, length: int, recurrent: int, world: World
    ) -> None:
        self.stream, self.config, self.length, self.recurrent, self.world = stream, config, length, recurrent, world
        ends_D = torch.cat((begins_D[1:], torch.tensor([stream.positions])))
        places_2D = torch.stack((begins_D, ends_D))[:, torch.argsort(begins_D - ends_D, stable=True)]
        self.batches = places_2D.split(config.batch_documents * world.size, dim=1)

    def rounds(self, number: int) -> Iterator[Round]:
        """This process's rounds of a batch of documents, in one number of rows; what lacks documents is filled up."""
        step, places = self.config.document_tokens, self.batches[number]
        mine, device = places[:, self.world.rank :: self.world.size], self.stream.tokens_N.device
        lacking = places[:1, :1].expand(2, self.config.batch_documents - mine.size(1))
        begins_B, ends_B = torch.cat((mine, lacking), dim=1).to(device)
        count = -(-int(places[1, 0] - places[0, 0]) // step)  # of the longest, in all processes
        for turn in range(1, count + 1):
            width, last_B = min(turn * step, self.length), begins_B + turn * step
            positions_BT = (last_B - width)[:, None] + torch.arange(width, device=device)
            scored_BS = positions_BT[:, -step:]
            learns_B = (last_B < ends_B).float() if turn < count else None
            yield *self.stream.rows(positions_BT), scored_BS, scored_BS < ends_B[:, None], learns_B

    def commit(self, scorer: Scorer, found: Round, tally: Tally) -> None:
        """Score a round."""
        tokens, targets, positions, is_counted, _ = found
        with torch.no_grad():
            nats = scorer(tokens, targets, recurrent=self.recurrent, scored=self.config.document_tokens)
        tally.begin_round()
        tally.commit(positions, nats, is_counted)

    def first_loss(self, scorer: Scorer) -> float:
        """Nats per token of the first batch of documents, where nothing is learned and nothing counted."""
        tally = Tally(self.stream)
        for found in self.rounds(0):
            self.commit(scorer, found, tally)
        tally.close(0, 0, self.world, None)
        return tally.score(0.0).loss


def evaluate_documents(
    scorer: Scorer, documents: Documents, *, adapter: PrivateAdapter | None = None, chain: ScoreChain | None = None,
    on_chunk: OnChunk | None = None, tally: Tally | None = None,
) -> Score:  # fmt: skip
    """Score every position of the split once; a chunk of the chain is a batch of documents, round by round.

    A round is committed before an adapter may learn from it. What it learned is no longer there when the next chunk
    begins, so that the chain notes no learning. The device is waited for once a chunk. A new tally may be given, for one
    that also keeps what it counts. Raises JudgeError.
    """
    started, batches = time.perf_counter(), documents.batches
    tally, last = tally or Tally(documents.stream), 0
    for number, (begins_B, ends_B) in enumerate(batches):
        if adapter is not None:
            adapter.begin()
        for found in documents.rounds(number):
            documents.commit(scorer, found, tally)
            tokens, targets, _, _, learns = found
            if adapter is not None and learns is not None:
                adapter.learn(tokens, targets, learns, scored=documents.config.document_tokens)
        first, last = last, last + int((ends_B - begins_B).sum())
        tally.close(first, last, documents.world, chain)
        tell(on_chunk, tally, number, len(batches))
    documents.world.synchronize()
    return tally.finish(documents.world, time.perf_counter() - started)
