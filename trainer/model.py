"""The language model of PR #1326: depth recurrence, U-Net skips, parallel residual lanes, tied soft-capped head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention import Attention, rotary_tables
from trainer.config import ModelConfig

# Dimensions: B batch, T tokens, S scored tokens, D model width, V vocabulary, E width of value embeddings.

VALUE_EMBEDDING_STD = 0.01
VALUE_EMBEDDING_SCALE = 0.1  # initial value of the scale that all its layers share: techniques of #1218
SMALLEST_ORTHOGONAL = 64  # narrower matrices keep torch's own start: source of #1218


def normalize(x_BTD: Tensor) -> Tensor:
    """RMS normalisation without learned weights."""
    return F.rms_norm(x_BTD, x_BTD.shape[-1:])


class MLP(nn.Module):
    """(B, T, D) to (B, T, D): down(leaky_relu(up(x))²)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.slope = config.leaky_slope
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x_BTD), self.slope).square())


class Block(nn.Module):
    """One physical layer: attention and MLP with learned output scales, on one stream or on two lanes."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer=layer)
        self.mlp = MLP(config)
        self.attention_scale = nn.Parameter(torch.ones(config.width))
        self.mlp_scale = nn.Parameter(torch.ones(config.width))
        self.mix = (
            nn.Parameter(torch.stack((torch.ones(config.width), torch.zeros(config.width))))
            if config.residual_mix
            else None
        )
        self.input_scale = (layer + 1) ** -0.5 if config.ln_scale else 1.0

    def attend(self, x: Tensor, x0: Tensor, rotary: tuple[Tensor, Tensor], value_embedding: Tensor | None) -> Tensor:
        """The stream (or the attention lane) after attention."""
        if self.mix is not None:
            x = self.mix[0] * x + self.mix[1] * x0
        return x + self.attention_scale * self.attention(normalize(x) * self.input_scale, rotary, value_embedding)

    def think(self, x: Tensor) -> Tensor:
        """The stream (or the MLP lane) after the MLP."""
        return x + self.mlp_scale * self.mlp(normalize(x) * self.input_scale)


class ValueEmbedding(nn.Module):
    """Adds a projection of a second token table to the values of chosen layers; one scale a layer and one for all."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = config.value_embedding_layers
        self.table = nn.Embedding(config.vocab_size, config.value_embedding_dim)
        self.projection = nn.Linear(config.value_embedding_dim, config.kv_heads * config.head_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(VALUE_EMBEDDING_SCALE))
        self.layer_scales = nn.Parameter(torch.ones(len(self.layers)))

    def forward(self, tokens_BT: Tensor) -> dict[int, Tensor]:
        """By physical layer, what is added to its values: (B, T, key/value heads × head width)."""
        shared = self.projection(self.table(tokens_BT)) * self.scale
        return {layer: shared * self.layer_scales[i] for i, layer in enumerate(self.layers)}


class Model(nn.Module):
    """The network. `recurrent` says whether the repeated layers are run again; each state is a graph of its own."""

    def __init__(self, config: ModelConfig, *, train_length: int) -> None:
        super().__init__()
        self.config, self.train_length = config, train_length
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks: list[Block] = nn.ModuleList(Block(config, layer) for layer in range(config.layers))  # type: ignore[assignment]  # a list to its readers
        has_values = config.value_embedding_dim > 0 and config.value_embedding_layers
        self.value_embedding = ValueEmbedding(config) if has_values else None
        skip_shape = (config.layers // 2, config.width)
        self.skip_weights = nn.Parameter(torch.ones(skip_shape)) if config.skips != "off" else None
        self.skip_gates = nn.Parameter(torch.zeros(skip_shape)) if config.skips == "gated" else None
        self.lane_merge = nn.Parameter(torch.tensor(0.5)) if config.parallel_start_layer >= 0 else None
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        """Orthogonal matrices, zero outputs, narrow normal tables, from torch's global generator: #1218's start."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith((".out", ".down", ".projection")) or name == "head":
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= SMALLEST_ORTHOGONAL:
                    nn.init.orthogonal_(module.weight)
        nn.init.normal_(self.embedding.weight, std=self.config.embedding_std)
        if self.value_embedding is not None:
            nn.init.normal_(self.value_embedding.table.weight, std=VALUE_EMBEDDING_STD)

    def layer_order(self, recurrent: bool) -> list[int]:
        """Physical layers in the order of execution; the first half feeds the skips of the second."""
        order = list(range(self.config.layers))
        if recurrent and self.config.has_recurrence:
            loop = list(self.config.recurrence_layers)
            order[loop[-1] + 1 : loop[-1] + 1] = loop * self.config.recurrence_passes
        return order

    def matrices(self) -> Iterator[tuple[str, nn.Linear, str]]:
        """The block matrices that are quantised: name, module, and the name of the matrix whose input they share."""
        for layer, block in enumerate(self.blocks):
            attention, mlp = f"blocks.{layer}.attention", f"blocks.{layer}.mlp"
            for name in ("query", "key", "value"):
                yield f"{attention}.{name}", getattr(block.attention, name), f"{attention}.query"
            yield f"{attention}.out", block.attention.out, f"{attention}.out"
            yield f"{mlp}.up", block.mlp.up, f"{mlp}.up"
            yield f"{mlp}.down", block.mlp.down, f"{mlp}.down"

    def hidden(self, tokens_BT: Tensor, recurrent: bool) -> Tensor:
        """Normalised final states, (B, T, D)."""
        config = self.config
        rotary = rotary_tables(tokens_BT.size(1), config, train_length=self.train_length, device=tokens_BT.device)
        values = self.value_embedding(tokens_BT) if self.value_embedding is not None else {}
        x = x0 = normalize(self.embedding(tokens_BT))
        mlp_lane: Tensor | None = None
        order = self.layer_order(recurrent)
        first_half = len(order) // 2
        skips: list[Tensor] = []
        for position, layer in enumerate(order):
            block = self.blocks[layer]
            if position >= first_half:
                x = self._fuse_skip(x, skips, position - first_half)
            if mlp_lane is None and 0 <= config.parallel_start_layer <= layer:
                mlp_lane = x
            x = block.attend(x, x0, rotary, values.get(layer))
            if mlp_lane is None:
                x = block.think(x)
            else:
                mlp_lane = block.think(mlp_lane)
            if position < first_half:
                skips.append(x)
        if mlp_lane is not None and self.lane_merge is not None:
            x = self.lane_merge * x + (1 - self.lane_merge) * mlp_lane
        return normalize(x)

    def _fuse_skip(self, x: Tensor, skips: list[Tensor], index: int) -> Tensor:
        """Mix the latest unused state of the first half into the stream; after the lane split, into the attention lane."""
        if self.skip_weights is None or index >= self.skip_weights.size(0):
            return x
        skip = self.skip_weights[index] * skips.pop()
        if self.skip_gates is None:
            return x + skip
        gate = torch.sigmoid(self.skip_gates[index])
        return gate * x + (1 - gate) * skip

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Scores of the next token, (B, S, V), soft-capped, in float32."""
        table = self.embedding.weight if self.head is None else self.head.weight
        logits = F.linear(hidden_BSD, table).float()
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def nats(self, tokens_BT: Tensor, targets_BT: Tensor, *, recurrent: bool, scored: int) -> Tensor:
        """Cross-entropy of the last `scored` targets of each row, (B, S), in nats and float32."""
        logits = self.logits(self.hidden(tokens_BT, recurrent)[:, -scored:])
        return F.cross_entropy(logits.flatten(0, 1), targets_BT[:, -scored:].flatten(), reduction="none").view(
            -1, scored
        )

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, recurrent: bool) -> Tensor:
        """Mean cross-entropy of all targets, in nats."""
        logits = self.logits(self.hidden(tokens_BT, recurrent))
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())
