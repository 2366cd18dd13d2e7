"""SLOT, #1217: a vector is added to the last hidden states, fitted to each batch's contexts before its windows are scored.

Not accepted by the challenge: windows of one batch overlap, so what one of them scores lies in the context of another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config import EvaluationConfig
from trainer.model import Model


class Slot:
    """A scorer like `Model.nats`, with the vector in between."""

    def __init__(self, model: Model, config: EvaluationConfig) -> None:
        self.model, self.config = model, config

    def __call__(self, tokens_BT: Tensor, targets_BT: Tensor, /, *, recurrent: int, scored: int) -> Tensor:
        """Cross-entropy of the last `scored` targets of each row, (B, S), in nats and float32."""
        hidden_BTD = self.model.hidden(tokens_BT, recurrent)
        seen = targets_BT.size(1) - scored
        added_D = torch.zeros(hidden_BTD.size(-1), device=hidden_BTD.device, requires_grad=True)
        if seen:
            self._fit(added_D, hidden_BTD[:, :seen], targets_BT[:, :seen])
        return self.model.leave(self._moved(hidden_BTD[:, -scored:], added_D.detach()), targets_BT[:, -scored:])

    @torch.enable_grad()
    def _fit(self, added_D: Tensor, hidden_BSD: Tensor, targets_BS: Tensor) -> None:
        optimizer = torch.optim.AdamW([added_D], lr=self.config.slot_lr)
        for _ in range(self.config.slot_steps):
            loss = self.model.leave(self._moved(hidden_BSD, added_D), targets_BS).mean()
            (added_D.grad,) = torch.autograd.grad(loss, [added_D])
            optimizer.step()

    @staticmethod
    def _moved(hidden_BSD: Tensor, added_D: Tensor) -> Tensor:
        return (hidden_BSD + added_D).to(hidden_BSD.dtype).contiguous()
