"""The language model of PR #1326: depth recurrence, U-Net skips, parallel residual lanes, tied soft-capped head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention import Attention, rotary_tables
from trainer.config import ModelConfig
from trainer.kernels import add_mlp, add_product, combine, cross_entropy, normalize, normalize_beside, soft_capped
from trainer.lora import HEAD_TARGET, LoRA, Terms

# Dimensions: B batch, T tokens, S scored tokens (the last ones; all of them in training), D model width, H hidden width
# of the MLP, N outputs of queries, keys and values together, V vocabulary.

VALUE_EMBEDDING_STD = 0.01
VALUE_EMBEDDING_SCALE = 0.1  # initial value of the scale that all its layers share: techniques of #1218
SMALLEST_ORTHOGONAL = 64  # narrower matrices keep torch's own start: source of #1218
LARGEST_VARIETY = 32  # graphs of one compiled part: a few shapes, with and without gradients

HEAD = "head"
"""Name under which `observe` hears what the output head reads."""

Observe = Callable[[str, Tensor], None]
"""Hears what each quantised matrix reads, by the matrix's name: calibration listens."""


class MLP(nn.Module):
    """The matrices of down(leaky_relu(up(x))²)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)


class Skip(NamedTuple):
    """A state of the first half on its way into the second: #1326's gated U-Net skip."""

    state_BTD: Tensor
    own_D: Tensor
    """Factor of the stream that it is mixed into."""

    weight_D: Tensor


class Matrices(NamedTuple):
    """A block's matrices in the precision of the products, with the scales of what they give folded in."""

    qkv_ND: Tensor
    out_DD: Tensor
    up_HD: Tensor
    down_DH: Tensor


def fold(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, up: Tensor, down: Tensor, attention_scale_D: Tensor,
    mlp_scale_D: Tensor, precision: torch.dtype,
) -> Matrices:  # fmt: skip
    """The matrices that the products read. A scale of a product's outputs scales the matrix's rows: fewer, and once."""
    out, down = attention_scale_D[:, None] * out, mlp_scale_D[:, None] * down
    return Matrices(
        torch.cat((query, key, value)).to(precision), out.to(precision), up.to(precision), down.to(precision)
    )


class Block(nn.Module):
    """One physical layer: attention and MLP with learned output scales, on one stream or on two lanes.

    The lanes do not exchange anything, and an MLP sees one position at a time: where only the last positions are scored,
    the MLP's lane needs no others.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.slope = layer, config.leaky_slope
        self.fold: Callable[..., Matrices] = fold
        self.attention = Attention(config, layer=layer)
        self.mlp = MLP(config)
        self.attention_scale = nn.Parameter(torch.ones(config.width))
        self.mlp_scale = nn.Parameter(torch.ones(config.width))
        self.mix = (
            nn.Parameter(torch.stack((torch.ones(config.width), torch.zeros(config.width))))
            if config.residual_mix
            else None
        )
        self.has_lanes = 0 <= config.parallel_start_layer <= layer
        self.input_scale = (layer + 1) ** -0.5 if config.ln_scale else 1.0

    def matrices(self, precision: torch.dtype) -> Matrices:
        attention, mlp = self.attention, self.mlp
        linears = (attention.query, attention.key, attention.value, attention.out, mlp.up, mlp.down)
        return self.fold(*(linear.weight for linear in linears), self.attention_scale, self.mlp_scale, precision)

    def forward(
        self, x: Tensor, lane: Tensor | None, x0: Tensor, skip: Skip | None, rotary: tuple[Tensor, Tensor] | None,
        value_embedding: Tensor | None, *, kept: int, scored: int, observe: Observe | None = None,
        terms: Terms | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        """The stream (or the attention's lane) of the last `kept` positions, the MLP's lane of the last `scored`, and x0."""
        matrices = self.matrices(x.dtype)
        if self.has_lanes and lane is None:
            if skip is not None:
                x, _, _ = combine((x, skip.state_BTD), torch.stack((skip.own_D, skip.weight_D)))
                skip = None
            lane = x[:, -scored:].clone()
        x, inputs, x0 = self._entry(x, x0, skip)
        y = self.attention(inputs, matrices.qkv_ND, rotary, value_embedding, scored=kept, terms=terms)
        if observe:
            observe(f"blocks.{self.layer}.attention.query", inputs)
            observe(f"blocks.{self.layer}.attention.out", y)
        x = x if kept == x.size(1) else x[:, -kept:].contiguous()
        x = add_product(x, y, matrices.out_DD)
        if terms:
            x = terms.add("out", x, y, self.attention_scale)
        if lane is None:
            return self._think(x, matrices, observe, terms), None, x0
        return x, self._think(lane, matrices, observe, terms), x0

    def _entry(self, x: Tensor, x0: Tensor, skip: Skip | None) -> tuple[Tensor, Tensor, Tensor]:
        """The stream with the skip and the embedding mixed in, the same normalised, and x0."""
        ones = torch.ones_like(self.attention_scale)
        own, embedded = (ones, 0 * ones) if self.mix is None else self.mix.unbind()
        parts, factors = [x, x0], [own, embedded]
        if skip is not None:
            parts, factors = [x, x0, skip.state_BTD], [own * skip.own_D, embedded, own * skip.weight_D]
        x, inputs, x0 = combine(parts, torch.stack(factors), self.input_scale)
        assert inputs is not None, "a scale was given"
        return x, inputs, x0

    def _think(self, x: Tensor, matrices: Matrices, observe: Observe | None, terms: Terms | None) -> Tensor:
        """The stream (or the MLP's lane) after the MLP."""
        x, inputs = normalize_beside(x, self.input_scale)
        if observe:
            observe(f"blocks.{self.layer}.mlp.up", inputs)
            hidden = F.leaky_relu(F.linear(inputs, matrices.up_HD), self.slope).square()
            observe(f"blocks.{self.layer}.mlp.down", hidden)
        if terms and {"up", "down"} & {*terms.pairs}:  # inside what is fused
            hidden = F.leaky_relu(terms.add("up", F.linear(inputs, matrices.up_HD), inputs), self.slope).square()
            x = terms.add("down", add_product(x, hidden, matrices.down_DH), hidden, self.mlp_scale)
        else:
            x = add_mlp(x, inputs, matrices.up_HD, matrices.down_DH, self.slope)
        return terms.add("mlp", x, inputs, self.mlp_scale) if terms else x


class ValueEmbedding(nn.Module):
    """Adds a projection of a second token table to the values of chosen layers; one scale a layer and one for all."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = config.value_embedding_layers
        self.table = nn.Embedding(config.vocab_size, config.value_embedding_dim)
        self.projection = nn.Linear(config.value_embedding_dim, config.kv_heads * config.head_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(VALUE_EMBEDDING_SCALE))
        self.layer_scales = nn.Parameter(torch.ones(len(self.layers)))

    def forward(self, tokens_BT: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """By physical layer, what is added to its values: (B, T, key/value heads × head width)."""
        shared = F.linear(self.table(tokens_BT).to(dtype), self.projection.weight.to(dtype))
        return {layer: shared * (self.scale * self.layer_scales[i]) for i, layer in enumerate(self.layers)}


class Model(nn.Module):
    """The network. `recurrent` says whether the repeated layers are run again.

    Weights are float32; `precision` is that of the stream and of the matrix products.
    """

    def __init__(self, config: ModelConfig, *, train_length: int, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.train_length, self.precision = config, train_length, precision
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks: list[Block] = nn.ModuleList(Block(config, layer) for layer in range(config.layers))  # type: ignore[assignment]  # a list to its readers
        has_values = config.value_embedding_dim > 0 and config.value_embedding_layers
        self.value_embedding = ValueEmbedding(config) if has_values else None
        skip_shape = (config.layers // 2, config.width)
        self.skip_weights = nn.Parameter(torch.ones(skip_shape)) if config.skips != "off" else None
        self.skip_gates = nn.Parameter(torch.zeros(skip_shape)) if config.skips == "gated" else None
        self.lane_merge = nn.Parameter(torch.tensor(0.5)) if config.parallel_start_layer >= 0 else None
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self.lora: LoRA | None = None
        """What is added to the products while test-time training adapts the network; no part of its weights."""

        self._initialize()

    def compile_parts(self) -> None:
        """Compile what the fused kernels leave: the folding of the matrices, and the entry."""
        torch._dynamo.config.recompile_limit = LARGEST_VARIETY
        folded = torch.compile(fold, dynamic=False)
        for block in self.blocks:
            block.fold = folded
        self.enter = torch.compile(self.enter, dynamic=False)  # type: ignore[method-assign]

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

    def enter(self, tokens_BT: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The embedding's stream, (B, T, D), and what is added to the values of some layers."""
        values = self.value_embedding(tokens_BT, self.precision) if self.value_embedding is not None else {}
        return normalize(self.embedding(tokens_BT)).to(self.precision), values

    def hidden(
        self, tokens_BT: Tensor, recurrent: bool, *, scored: int | None = None, observe: Observe | None = None
    ) -> Tensor:
        """Normalised final states of the last `scored` positions (of all by default), (B, S, D)."""
        config, length = self.config, tokens_BT.size(1)
        scored = scored or length
        rotary = None
        if config.rope_dims:
            rotary = rotary_tables(length, config, train_length=self.train_length, device=tokens_BT.device)
        x, values = self.enter(tokens_BT)
        x0, lane = x, None
        order = self.layer_order(recurrent)
        first_half = len(order) // 2
        states: list[Tensor] = []
        for position, layer in enumerate(order):
            skip = self._skip(states, position - first_half) if position >= first_half else None
            skip = skip if lane is None or config.lane_skips else None
            x, lane, x0 = self.blocks[layer](
                x, lane, x0, skip, rotary, values.get(layer), scored=scored,
                kept=scored if position == len(order) - 1 else length, observe=observe,
                terms=self.lora.layers[position] if self.lora else None,
            )  # fmt: skip
            if position < first_half:
                states.append(x)
        final = self._final(x, lane)
        if observe:
            observe(HEAD, final)
        return final

    def _final(self, x: Tensor, lane: Tensor | None) -> Tensor:
        """The stream, merged with the MLP's lane where there is one, normalised."""
        if lane is None or self.lane_merge is None:
            return normalize_beside(x, 1.0)[1]
        ones = torch.ones(self.config.width, device=x.device)
        unit = combine((x, lane), torch.stack((self.lane_merge * ones, (1 - self.lane_merge) * ones)), 1.0)[1]
        assert unit is not None, "a scale was given"
        return unit

    def _skip(self, states: list[Tensor], index: int) -> Skip | None:
        """The latest unused state of the first half; after the lane split it goes into the attention's lane."""
        if self.skip_weights is None or index >= self.skip_weights.size(0):
            return None
        weight_D = self.skip_weights[index]
        if self.skip_gates is None:
            return Skip(states.pop(), torch.ones_like(weight_D), weight_D)
        gate_D = torch.sigmoid(self.skip_gates[index])
        return Skip(states.pop(), gate_D, (1 - gate_D) * weight_D)

    def table(self) -> Tensor:
        """The output head's matrix, (V, D), in the precision of the products."""
        return (self.embedding.weight if self.head is None else self.head.weight).to(self.precision)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Scores of the next token, (B, S, V), soft-capped, in float32."""
        products = F.linear(hidden_BSD, self.table())
        if self.lora:
            products = self.lora.head.add(HEAD_TARGET, products, hidden_BSD)
        return soft_capped(products.float(), self.config.logit_softcap)

    def leave(self, hidden_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """Cross-entropy of each target, (B, S), in nats and float32."""
        if self.lora and self.lora.head.pairs:  # inside what is fused
            nats = F.cross_entropy(self.logits(hidden_BSD).flatten(0, 1), targets_BS.flatten(), reduction="none")
            return nats.view_as(targets_BS)
        return cross_entropy(hidden_BSD, self.table(), targets_BS, self.config.logit_softcap)

    def nats(self, tokens_BT: Tensor, targets_BT: Tensor, *, recurrent: bool, scored: int) -> Tensor:
        """Cross-entropy of the last `scored` targets of each row, (B, S), in nats and float32."""
        return self.leave(self.hidden(tokens_BT, recurrent, scored=scored), targets_BT[:, -scored:])

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, recurrent: bool) -> Tensor:
        """Mean cross-entropy of all targets, in nats."""
        return self.leave(self.hidden(tokens_BT, recurrent), targets_BT).mean()
