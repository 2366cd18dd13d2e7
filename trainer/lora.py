"""Low-rank adapters: what is added to the products of a network whose own weights stay, y = Wx + s · B(Ax). #1341, #1530."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
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

    def of(self, target: str, x_BTN: Tensor) -> Tensor:
        """s · B(Ax) in the precision of x, (B, T, M)."""
        a_PRN, b_PMR = (matrix.to(x_BTN.dtype) for matrix in self.pairs[target])
        if a_PRN.size(0) == 1:
            return F.linear(F.linear(x_BTN, a_PRN[0]) * self.scale, b_PMR[0])
        return (x_BTN @ a_PRN.mT * self.scale) @ b_PMR.mT

    def add(self, target: str, y_BTM: Tensor, x_BTN: Tensor, scale_M: Tensor | None = None) -> Tensor:
        """y and the target's term, times a scale of its outputs; y as it is where the target has none."""
        if target not in self.pairs:
            return y_BTM
        term = self.of(target, x_BTN)
        return y_BTM + (term if scale_M is None else term * scale_M.to(term.dtype))

    def add_beside(self, targets: Iterable[tuple[str, int]], y_BTM: Tensor, x_BTN: Tensor) -> Tensor:
        """y, the products of several targets of so many outputs side by side, and their terms."""
        sides = [
            self.of(target, x_BTN) if target in self.pairs else x_BTN.new_zeros(*x_BTN.shape[:-1], outputs)
            for target, outputs in targets
        ]
        return y_BTM + torch.cat(sides, dim=-1)


class LoRA:
    """All adapters of a network: one a target and layer as it is run, so that a layer that is run twice has two.

    `adapters` of each lie side by side, all with the same start: A uniform in ±1 / sqrt(N) by the seed, B zero, with
    which the network computes what it computes without them.
    """

    def __init__(
        self, model: ModelConfig, order: Sequence[int], config: TTTConfig, *, adapters: int, device: torch.device
    ) -> None:
        self.generator = torch.Generator().manual_seed(config.lora_seed)
        self.starts: list[tuple[Pair, Tensor]] = []
        self.rank, self.adapters, self.device = config.lora_rank, adapters, device
        width, kv_width, hidden = model.width, model.kv_heads * model.head_dim, model.hidden
        shapes = {
            "q": (width, width), "k": (width, kv_width), "v": (width, kv_width), "out": (width, width),
            "up": (width, hidden), "down": (hidden, width), "mlp": (width, width), HEAD_TARGET: (width, model.vocab_size),
        }  # fmt: skip
        inner = [target for target in config.lora_targets if target != HEAD_TARGET]
        self.layers = [
            Terms({t: self._pair(*shapes[t]) for t in inner} if layer >= config.frozen_blocks else {}, config.lora_scale)
            for layer in order
        ]
        """By position in the order of execution."""

        outer = [target for target in config.lora_targets if target == HEAD_TARGET]
        self.head = Terms({target: self._pair(*shapes[target]) for target in outer}, config.lora_scale)

    def _pair(self, inputs: int, outputs: int) -> Pair:
        start_RN = (2 * torch.rand(self.rank, inputs, generator=self.generator) - 1) * inputs**-0.5
        start_RN = start_RN.to(self.device)
        a = nn.Parameter(start_RN.expand(self.adapters, -1, -1).clone())
        b = nn.Parameter(torch.zeros(self.adapters, outputs, self.rank, device=self.device))
        self.starts.append(((a, b), start_RN))
        return a, b

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [matrix for pair, _ in self.starts for matrix in pair]

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to the start, at the same addresses."""
        for (a, b), start_RN in self.starts:
            a.copy_(start_RN.expand_as(a))
            b.zero_()
