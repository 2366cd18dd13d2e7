"""Score-first test-time training: what learns from positions after the judge has scored them. #461, #1326, #1341, #1530."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from trainer.config import TTTConfig
from trainer.distributed import World
from trainer.errors import CaddieError
from trainer.evaluate import Stream
from trainer.graphs import Recorded
from trainer.lora import LoRA
from trainer.model import Model
from trainer.optim import CLIP_EPS, Gradients

PARITY_TOLERANCE = 1e-4  # nats per token: above rounding between two forward paths, far below a broken one (#1334: 0.6)


class ParityError(CaddieError):
    """The path that adapts does not score like the path that does not, before anything was adapted."""


def chunk_lr(base_lr: float, chunk: int, chunks: int) -> float:
    """Learning rate of a chunk: a cosine from `base_lr` to 0 over the chunks."""
    return base_lr * 0.5 * (1 + math.cos(math.pi * chunk / max(1, chunks - 1)))


def require_parity(plain_loss: float, ttt_loss: float) -> float:
    """First-chunk loss of TTT before any update minus the plain one, nats per token; raises ParityError if not equal."""
    difference = ttt_loss - plain_loss
    if not abs(difference) <= PARITY_TOLERANCE:
        raise ParityError(
            f"first TTT chunk, before any update, scores {ttt_loss:.6f} nats per token, plain evaluation {plain_loss:.6f} "
            f"on the same tokens; they must agree to {PARITY_TOLERANCE}",
            hint="no TTT score of this model means anything",
        )
    return difference


def learners(
    model: Model, config: TTTConfig, *, recurrent: int, adapters: int, device: torch.device
) -> list[nn.Parameter]:
    """What learns; all else is frozen. Under `lora`, so many adapters side by side are put into the model."""
    if config.method == "lora":
        model.requires_grad_(False)
        model.lora = LoRA(model.config, model.layer_order(recurrent), config, adapters=adapters, device=device)
        return model.lora.parameters
    if config.parameters == "query":
        model.requires_grad_(False)
        for block in model.blocks:
            block.attention.query.requires_grad_(True)
    for block in model.blocks[: config.frozen_blocks]:
        block.requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_of(weights: list[nn.Parameter], config: TTTConfig) -> torch.optim.Optimizer:
    """The rule by which these learn, with nothing remembered yet."""
    rule = config.lora_optimizer if config.method == "lora" else config.method
    if rule == "adamw":
        return torch.optim.AdamW(
            weights, lr=config.lr, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps,
            weight_decay=config.weight_decay, fused=weights[0].is_cuda,
        )  # fmt: skip
    return torch.optim.SGD(weights, lr=config.lr, momentum=config.momentum)


class ChunkAdapter:
    """Learns from chunk to chunk; every process ends a chunk with the same weights."""

    def __init__(
        self,
        model: Model,
        stream: Stream,
        *,
        config: TTTConfig,
        length: int,
        recurrent: int,
        world: World,
    ) -> None:
        self.model, self.stream, self.config, self.length = model, stream, config, length
        self.recurrent, self.world = recurrent, world
        weights = learners(model, config, recurrent=recurrent, adapters=1, device=world.device)
        self.gradients = Gradients([], weights, world)
        self.optimizer = optimizer_of(weights, config)
        self.accumulate = Recorded(self._accumulate, is_pure=False)

    def learn(self, first: int, last: int, *, chunk: int, chunks: int) -> None:
        """A few epochs over the chunk, cut into non-overlapping sequences."""
        self.optimizer.param_groups[0]["lr"] = chunk_lr(self.config.lr, chunk, chunks)
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
        self.optimizer.step()
        self.gradients.all.zero_()

    def _accumulate(self, tokens_BT: Tensor, weight: Tensor) -> Tensor:
        """Add the gradient of `weight` times the sequences' mean loss to the gradients."""
        loss: Tensor = self.model(tokens_BT[:, :-1], tokens_BT[:, 1:], self.recurrent)
        loss.backward(weight)
        return loss.detach()


class DocumentAdapter:
    """Learns from several documents side by side, each by an adapter of its own that ends with it."""

    def __init__(self, model: Model, *, config: TTTConfig, recurrent: int, world: World) -> None:
        self.model, self.config, self.recurrent = model, config, recurrent
        self.weights = learners(
            model, config, recurrent=recurrent, adapters=config.batch_documents, device=world.device
        )
        self.gradients = Gradients([], self.weights, replace(world, rank=0, size=1))  # nothing to share with others
        self.differentiate = Recorded(self._differentiate, is_pure=True)

    def begin(self) -> None:
        """Forget what earlier documents left: adapters and optimiser start anew."""
        assert self.model.lora is not None, "learners made it"
        self.model.lora.reset()
        self.optimizer = optimizer_of(self.weights, self.config)

    def learn(self, tokens_BT: Tensor, targets_BT: Tensor, learns_B: Tensor, *, scored: int) -> None:
        """One step of each document that learns, on the mean loss of its last `scored` targets."""
        with torch.enable_grad():
            self.differentiate(tokens_BT, targets_BT, learns_B, scored=scored)
        self.optimizer.step()

    def _differentiate(self, tokens_BT: Tensor, targets_BT: Tensor, weights_B: Tensor, *, scored: int) -> Tensor:
        """Each document's gradient, times its weight and clipped, in the place of what was there."""
        self.gradients.all.zero_()
        loss = (
            self.model.nats(tokens_BT, targets_BT, recurrent=self.recurrent, scored=scored).mean(1) * weights_B
        ).sum()
        loss.backward()
        if self.config.grad_clip_norm:
            gradients = [weight.grad for weight in self.weights if weight.grad is not None]
            norms_P = torch.stack([gradient.square().sum((1, 2)) for gradient in gradients]).sum(0).sqrt()
            factors_P11 = (self.config.grad_clip_norm / (norms_P + CLIP_EPS)).clamp(max=1.0)[:, None, None]
            for gradient in gradients:
                gradient *= factors_P11
        return loss.detach()
