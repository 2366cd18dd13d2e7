"""Score-first test-time training: what the weights do with a chunk after the judge has scored it. #461, #549, #1326."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.config import TTTConfig
from trainer.distributed import World
from trainer.errors import CaddieError
from trainer.evaluate import Stream
from trainer.graphs import Recorded
from trainer.model import Model
from trainer.optim import Gradients

PARITY_TOLERANCE = 1e-4  # nats per token: above rounding between two forward paths, far below a broken one (#1334: 0.6)


class ParityError(CaddieError):
    """The path that adapts does not score like the path that does not, before anything was adapted."""


def chunk_lr(base_lr: float, chunk: int, chunks: int) -> float:
    """Learning rate of a chunk: a cosine from `base_lr` to 0 over the chunks."""
    return base_lr * 0.5 * (1 + math.cos(math.pi * chunk / max(1, chunks - 1)))


def require_parity(sliding_loss: float, ttt_loss: float) -> float:
    """First-chunk loss of TTT before any update minus the sliding one, nats per token; raises ParityError if not equal."""
    difference = ttt_loss - sliding_loss
    if not abs(difference) <= PARITY_TOLERANCE:
        raise ParityError(
            f"first TTT chunk, before any update, scores {ttt_loss:.6f} nats per token, sliding evaluation {sliding_loss:.6f} "
            f"on the same tokens; they must agree to {PARITY_TOLERANCE}",
            hint="the two forward paths differ; no TTT score of this model means anything",
        )
    return difference


class SGDAdapter:
    """SGD with momentum on all weights that are not frozen; every process ends a chunk with the same weights."""

    def __init__(
        self,
        model: Model,
        stream: Stream,
        *,
        config: TTTConfig,
        length: int,
        recurrent: bool,
        world: World,
    ) -> None:
        self.model, self.stream, self.config, self.length = model, stream, config, length
        self.recurrent, self.world = recurrent, world
        for block in model.blocks[: config.frozen_blocks]:
            block.requires_grad_(False)
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.gradients = Gradients([], self.weights, world)
        self.sgd = torch.optim.SGD(self.weights, lr=config.lr, momentum=config.momentum)
        self.accumulate = Recorded(self._accumulate, is_pure=False)

    def learn(self, first: int, last: int, *, chunk: int, chunks: int) -> None:
        """A few epochs over the chunk, cut into non-overlapping sequences."""
        self.sgd.param_groups[0]["lr"] = chunk_lr(self.config.lr, chunk, chunks)
        starts = torch.arange(first, last - self.length + 1, self.length, device=self.stream.tokens_N.device)
        for _ in range(self.config.epochs):
            for batch in starts.split(self.config.batch_sequences):
                self._step(batch)

    def _step(self, starts: Tensor) -> None:
        """One update from the mean loss of these sequences, each process taking its share of them."""
        mine = starts[self.world.rank :: self.world.size]
        with torch.enable_grad():
            if mine.numel():
                rows = mine[:, None] + torch.arange(self.length + 1, device=starts.device)
                tokens, share = self.stream.tokens_N[rows].long(), mine.numel() / starts.numel()
                if tokens.is_cuda and not self.accumulate.replays:
                    self.accumulate.record(tokens, torch.zeros((), device=starts.device))
                self.accumulate(tokens, torch.full((), share, device=starts.device))
        self.gradients.summed(self.config.grad_clip_norm)
        self.sgd.step()
        self.gradients.all.zero_()

    def _accumulate(self, tokens_BT: Tensor, weight: Tensor) -> Tensor:
        """Add the gradient of `weight` times the sequences' mean loss to the gradients."""
        loss: Tensor = self.model(tokens_BT[:, :-1], tokens_BT[:, 1:], self.recurrent)
        loss.backward(weight)
        return loss.detach()
