"""Low-rank adapters: what is added to the products of a network whose own weights stay, y = Wx + s · B(Ax). #1341, #1530."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.config import ModelConfig, TTTConfig

# Dimensions: P adapters side by side, one a row of the batch, or a single one for all rows; R rank, N inputs and M outputs
# of a matrix.

HEAD_TARGET = "head"

Pair = tuple[nn.Parameter, nn.Parameter]
"""A (P, R, N) and B (P, M, R)."""


class Terms:
    """The adapters of one layer as it is run, or of the head, by target."""

    def __init__(self, pairs: dict[str, Pair], scale: float) -> None:
        self.pairs, self.scale = pairs, scale

    def add(self, target: str, y_BTM: Tensor, x_BTN: Tensor, scale_M: Tensor | None = None) -> Tensor:
        """y and the target's s · B(Ax), times a scale of its outputs; y as it is where the target has no adapter."""
        if target not in self.pairs:
            return y_BTM
        a_PRN, b_PMR = (matrix.to(x_BTN.dtype) for matrix in self.pairs[target])
        term = (x_BTN @ a_PRN.mT * self.scale) @ b_PMR.mT
        return y_BTM + (term if scale_M is None else term * scale_M.to(term.dtype))


class LoRA:
    """All adapters of a network: one a target and layer as it is run, so that a layer that is run twice has two.

    `adapters` of each lie side by side, all with the same start: A uniform in ±1 / sqrt(N) by the seed, B zero, with
    which the network computes what it computes without them.
    """

    def __init__(
        self, model: ModelConfig, order: Sequence[int], config: TTTConfig, *, adapters: int, device: torch.device
    ) -> None:
        self.starts: list[tuple[Pair, Tensor]] = []
        width, kv_width, hidden = model.width, model.kv_heads * model.head_dim, model.hidden
        shapes = {
            "q": (width, width), "k": (width, kv_width), "v": (width, kv_width), "out": (width, width),
            "up": (width, hidden), "down": (hidden, width), "mlp": (width, width), HEAD_TARGET: (width, model.vocab_size),
        }  # fmt: skip
        generator = torch.Generator().manual_seed(config.lora_seed)

        def pair(target: str) -> Pair:
            inputs, outputs = shapes[target]
            start_RN = (2 * torch.rand(config.lora_rank, inputs, generator=generator) - 1).to(device) * inputs**-0.5
            a = nn.Parameter(start_RN.repeat(adapters, 1, 1))
            b = nn.Parameter(torch.zeros(adapters, outputs, config.lora_rank, device=device))
            self.starts.append(((a, b), start_RN))
            return a, b

        def terms(is_head: bool, learns: bool = True) -> Terms:
            targets = [target for target in config.lora_targets if learns and is_head == (target == HEAD_TARGET)]
            return Terms({target: pair(target) for target in targets}, config.lora_scale)

        self.layers = [terms(False, layer >= config.frozen_blocks) for layer in order]
        """By position in the order of execution."""

        self.head = terms(True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [matrix for pair, _ in self.starts for matrix in pair]

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to the start, at the same addresses."""
        for (a, b), start_RN in self.starts:
            a.copy_(start_RN)  # into each of them
            b.zero_()
