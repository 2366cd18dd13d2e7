"""The plain path: the same network, optimiser and loop as public scripts write them, for the benchmark to compare with.

One compiled graph for each depth, a product for each matrix, attention through PyTorch, scales and norms left to the
compiler, one Newton–Schulz a matrix, the weight average tensor by tensor, batches read when they are needed. It takes its
weights from a `Model`, so that both paths can be given the same ones: it is the tests' independent reference, too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention import rotary_tables
from trainer.kernels import NORM_EPS
from trainer.model import Block, Model
from trainer.muon import muon_update
from trainer.optim import parameter_groups

# Dimensions: B sequences, T tokens, D model width, H query heads, G key/value heads, K head width, R rotated dimensions.

EVERYTHING_ON = "the plain path has every technique on"


def normalize(x: Tensor) -> Tensor:
    """RMS normalisation without learned weights, in the precision of its input."""
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)


def rotate(x_BTHK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Partial rotation, halves paired."""
    half = cos_TR.size(-1)
    cos, sin = cos_TR[:, None].to(x_BTHK.dtype), sin_TR[:, None].to(x_BTHK.dtype)
    first, second, rest = x_BTHK[..., :half], x_BTHK[..., half : 2 * half], x_BTHK[..., 2 * half :]
    return torch.cat((first * cos - second * sin, first * sin + second * cos, rest), dim=-1)


def without_own_value(y_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """XSA, heads in groups."""
    y = y_BTHK.unflatten(2, (v_BTGK.size(2), -1))
    own = F.normalize(v_BTGK, dim=-1).unsqueeze(3)
    return (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3)


class PlainNetwork(nn.Module):
    """The network of #1326 over the weights of a `Model` with every technique on; the mean loss, in nats."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, cos_TR: Tensor, sin_TR: Tensor, recurrent: bool) -> Tensor:
        """`cos` and `sin` are the tables of these positions, made once outside the graph."""
        model, config = self.model, self.model.config
        values = {}
        if model.value_embedding is not None:
            embedding = model.value_embedding
            shared = self._linear(embedding.table(tokens_BT).to(model.precision), embedding.projection)
            scales = (embedding.layer_scales * embedding.scale).to(shared.dtype)
            values = {layer: shared * scale for layer, scale in zip(embedding.layers, scales, strict=True)}
        x = x0 = normalize(model.embedding(tokens_BT).to(model.precision))
        lane: Tensor | None = None
        order = model.layer_order(recurrent)
        states: list[Tensor] = []
        half = len(order) // 2
        for position, layer in enumerate(order):
            block = model.blocks[layer]
            if position >= half and position - half < config.layers // 2:
                state = states.pop()
                x = self._fuse(x, state, position - half) if lane is None or config.lane_skips else x
            if lane is None and block.is_parallel:
                lane = x
            x = self._attend(block, x, x0, cos_TR, sin_TR, values.get(layer))
            if lane is None:
                x = self._think(block, x)
            else:
                lane = self._think(block, lane)
            if position < half:
                states.append(x)
        if lane is not None and model.lane_merge is not None:
            merge = model.lane_merge.to(x.dtype)
            x = merge * x + (1 - merge) * lane
        logits = F.linear(normalize(x), model.embedding.weight.to(x.dtype)).float()
        logits = config.logit_softcap * torch.tanh(logits / config.logit_softcap)
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())

    @staticmethod
    def _linear(x: Tensor, linear: nn.Linear) -> Tensor:
        return F.linear(x, linear.weight.to(x.dtype))

    def _fuse(self, x: Tensor, state: Tensor, index: int) -> Tensor:
        model = self.model
        assert model.skip_weights is not None, EVERYTHING_ON
        assert model.skip_gates is not None, EVERYTHING_ON
        gate = torch.sigmoid(model.skip_gates[index]).to(x.dtype)
        return gate * x + (1 - gate) * (model.skip_weights[index].to(x.dtype) * state)

    def _attend(
        self, block: Block, x: Tensor, x0: Tensor, cos_TR: Tensor, sin_TR: Tensor, value: Tensor | None
    ) -> Tensor:
        attention, config = block.attention, self.model.config
        assert block.mix is not None, EVERYTHING_ON
        assert attention.gain is not None, EVERYTHING_ON
        mix = block.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        inputs = normalize(x) * block.input_scale
        q, k, v = (
            self._linear(inputs, linear).unflatten(-1, (-1, config.head_dim))
            for linear in (attention.query, attention.key, attention.value)
        )
        if value is not None:
            v = v + value.view_as(v)
        q, k = rotate(normalize(q), cos_TR, sin_TR), rotate(normalize(k), cos_TR, sin_TR)
        q = q * attention.gain.to(q.dtype)[:, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        y = without_own_value(y, v) if attention.has_xsa else y
        return x + block.attention_scale.to(x.dtype) * self._linear(y.flatten(2), attention.out)

    def _think(self, block: Block, x: Tensor) -> Tensor:
        hidden = F.leaky_relu(self._linear(normalize(x) * block.input_scale, block.mlp.up), block.slope).square()
        return x + block.mlp_scale.to(x.dtype) * self._linear(hidden, block.mlp.down)


class PlainTrainer:
    """Steps as public scripts take them; the schedule is at its plateau."""

    def __init__(self, model: Model, *, momentum: float, lr: float, weight_decay: float, ema_decay: float) -> None:
        self.model, self.momentum, self.lr = model, momentum, lr
        self.weight_decay, self.ema_decay = weight_decay, ema_decay
        self.network = torch.compile(PlainNetwork(model), dynamic=False)
        self.tables = rotary_tables(
            model.train_length, model.config, train_length=model.train_length, device=model.embedding.weight.device
        )
        groups = parameter_groups(model)
        self.matrices = groups["matrix"]
        self.buffers = [torch.zeros_like(matrix) for matrix in self.matrices]
        self.adams = [
            torch.optim.AdamW(groups["embedding"], lr=0.03, betas=(0.9, 0.95), weight_decay=0.09, fused=True),
            torch.optim.AdamW(groups["scalar"], lr=0.02, betas=(0.9, 0.95), weight_decay=0.02, fused=True),
        ]
        self.average = {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}

    def accumulate(self, tokens_BT: Tensor, recurrent: bool, weight: float) -> Tensor:
        """Forward and backward of one micro-batch; the mean loss."""
        loss: Tensor = self.network(tokens_BT[:, :-1], tokens_BT[:, 1:], *self.tables, recurrent)
        (loss * weight).backward()
        return loss.detach()

    @torch.no_grad()
    def update(self) -> None:
        """Clip, Muon matrix by matrix, AdamW twice, the average tensor by tensor."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.3)
        for matrix, buffer in zip(self.matrices, self.buffers, strict=True):
            assert matrix.grad is not None, "every matrix takes part in the loss"
            step = muon_update(matrix.grad[None], buffer[None], momentum=self.momentum, steps=5, row_normalize=True)[0]
            rows, columns = matrix.shape
            lr = self.lr * max(1, rows / columns) ** 0.5
            matrix.mul_(1 - self.lr * self.weight_decay).add_(step.float(), alpha=-lr)
        for adam in self.adams:
            adam.step()
        self.model.zero_grad(set_to_none=True)
        for name, tensor in self.model.state_dict().items():
            self.average[name].mul_(self.ema_decay).add_(tensor.detach().float(), alpha=1 - self.ema_decay)
