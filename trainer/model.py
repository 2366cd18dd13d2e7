"""The language models of PR #1326 and its relatives: depth recurrence, U-Net skips, parallel residuals, soft-capped head."""

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
BIGRAM_SCALE = 0.05  # initial value of the scale of the pairs' table: source of #1204
BIGRAM_PRIMES = (36313, 27191)  # of a pair's hash, for the token and the one before: source of #1204
ROUTED_RESIDUAL = 1.1**0.5  # initial factor of a lane before something is written into it: source of #1204
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
        self.config, self.layer, self.slope = config, layer, config.leaky_slope
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
        self.is_parallel = 0 <= config.parallel_start_layer <= layer
        if config.parallel == "routed" and self.is_parallel:
            self.routes = nn.Parameter(torch.ones(2, 2))
            """By attention and MLP: what each writes into attention's lane and into the MLP's."""

            self.residuals = nn.Parameter(torch.full((2,), ROUTED_RESIDUAL))
        self.input_scale = (layer + 1) ** -0.5 if config.ln_scale else 1.0

    def matrices(self, precision: torch.dtype, mlp: MLP) -> Matrices:
        attention = self.attention
        linears = (attention.query, attention.key, attention.value, attention.out, mlp.up, mlp.down)
        return self.fold(*(linear.weight for linear in linears), self.attention_scale, self.mlp_scale, precision)

    def forward(
        self, x: Tensor, lane: Tensor | None, x0: Tensor, skip: Skip | None, rotary: tuple[Tensor, Tensor] | None,
        value_embedding: Tensor | None, *, kept: int, scored: int, observe: Observe | None = None,
        terms: Terms | None = None, again: Again | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        """The stream (or the attention's lane) of the last `kept` positions, the MLP's lane of the last `scored`, and x0."""
        matrices = self.matrices(x.dtype, again.mlp if self.config.untied_mlps and again else self.mlp)
        if self.config.parallel == "routed" and self.is_parallel:
            return route(self, x, lane, x0, skip, matrices, rotary, value_embedding, kept, observe, terms)
        if self.config.parallel == "lanes" and self.is_parallel and lane is None:
            if skip is not None:
                x, skip = with_skip(x, skip), None
            lane = x[:, -scored:].clone()
        x, inputs, x0 = self.entry(x, x0, skip)
        x, y = last(x, kept), self.attend(inputs, matrices, rotary, value_embedding, kept, observe, terms)
        if not self.config.first_attention_layer or self.layer >= self.config.first_attention_layer:
            x = add_product(x, y, matrices.out_DD)
            if terms:
                x = terms.add("out", x, y, self.attention_scale)
        if lane is not None:
            return x, self.think(lane, matrices, observe, terms), x0
        if self.config.parallel == "stream" and self.is_parallel:
            return self.think(x, matrices, observe, terms, last(inputs, kept)), None, x0
        return self.think(x, matrices, observe, terms, again=again), None, x0

    def attend(
        self, inputs: Tensor, matrices: Matrices, rotary: tuple[Tensor, Tensor] | None, value_embedding: Tensor | None,
        kept: int, observe: Observe | None, terms: Terms | None,
    ) -> Tensor:  # fmt: skip
        """What attention's last product reads, of the last `kept` positions; zeros where there is none."""
        if self.config.first_attention_layer and self.layer < self.config.first_attention_layer:
            # So calibration finds that nothing reads these matrices, and stores zeros.
            y = inputs = torch.zeros_like(inputs)
        else:
            y = self.attention(inputs, matrices.qkv_ND, rotary, value_embedding, scored=kept, terms=terms)
        if observe:
            observe(f"blocks.{self.layer}.attention.query", inputs)
            observe(f"blocks.{self.layer}.attention.out", y)
        return y

    def entry(self, x: Tensor, x0: Tensor, skip: Skip | None) -> tuple[Tensor, Tensor, Tensor]:
        """The stream with the skip and the embedding mixed in, the same normalised, and x0."""
        ones = torch.ones_like(self.attention_scale)
        own, embedded = (ones, 0 * ones) if self.mix is None else self.mix.unbind()
        parts, factors = [x, x0], [own, embedded]
        if skip is not None:
            parts, factors = [x, x0, skip.state_BTD], [own * skip.own_D, embedded, own * skip.weight_D]
        x, inputs, x0 = combine(parts, torch.stack(factors), self.input_scale)
        assert inputs is not None, "a scale was given"
        return x, inputs, x0

    def think(
        self, x: Tensor, matrices: Matrices, observe: Observe | None, terms: Terms | None, inputs: Tensor | None = None,
        again: Again | None = None,
    ) -> Tensor:  # fmt: skip
        """The stream (or the MLP's lane) after the MLP, which reads the stream unless other inputs are given."""
        if inputs is None:
            x, inputs = normalize_beside(x, self.input_scale)
        if observe:
            place = again.place if self.config.untied_mlps and again else f"blocks.{self.layer}.mlp"
            observe(f"{place}.up", inputs)
            hidden = F.leaky_relu(F.linear(inputs, matrices.up_HD), self.slope).square()
            observe(f"{place}.down", hidden)
        if terms and {"up", "down"} & {*terms.pairs}:  # inside what is fused
            hidden = F.leaky_relu(terms.add("up", F.linear(inputs, matrices.up_HD), inputs), self.slope).square()
            x = terms.add("down", add_product(x, hidden, matrices.down_DH), hidden, self.mlp_scale)
        else:
            x = add_mlp(x, inputs, matrices.up_HD, matrices.down_DH, self.slope)
        return terms.add("mlp", x, inputs, self.mlp_scale) if terms else x


class Again(NamedTuple):
    """The MLP that a layer takes when it is run again, and the beginning of its matrices' names."""

    mlp: MLP
    place: str


def last(x_BTD: Tensor, kept: int) -> Tensor:
    """The last positions; all as they are, where all are kept."""
    return x_BTD if kept == x_BTD.size(1) else x_BTD[:, -kept:].contiguous()


def with_skip(x: Tensor, skip: Skip) -> Tensor:
    return combine((x, skip.state_BTD), torch.stack((skip.own_D, skip.weight_D)))[0]


def route(
    block: Block, x: Tensor, lane: Tensor | None, x0: Tensor, skip: Skip | None, matrices: Matrices,
    rotary: tuple[Tensor, Tensor] | None, value_embedding: Tensor | None, kept: int, observe: Observe | None,
    terms: Terms | None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """#1204's block: attention reads one lane and the MLP the other, each with x0, and both write into both."""
    routes, residuals = block.routes, block.residuals
    if skip is not None:
        x, lane = with_skip(x, skip), lane if lane is None else with_skip(lane, skip)
    lane = x if lane is None else lane
    _, inputs, _ = block.entry(x, x0, None)
    y = block.attend(inputs, matrices, rotary, value_embedding, kept, observe, terms)
    written = F.linear(y, matrices.out_DD)
    written = terms.add("out", written, y, block.attention_scale) if terms else written
    x = residuals[0] * last(x, kept) + routes[0, 0] * written
    lane = residuals[0] * last(lane, kept) + routes[0, 1] * written
    _, inputs, _ = block.entry(lane, last(x0, kept), None)
    written = block.think(torch.zeros_like(inputs), matrices, observe, terms, inputs)
    return residuals[1] * x + routes[1, 0] * written, residuals[1] * lane + routes[1, 1] * written, x0


class Bigrams(nn.Module):
    """A table of pairs of tokens by their hash; the first position has a row of its own. Zero at the start."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.bigram_buckets, config.bigram_dim)
        self.widen = nn.Linear(config.bigram_dim, config.width, bias=False)
        self.scale = nn.Parameter(torch.tensor(BIGRAM_SCALE))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """What is added to the embedding, (B, T, D), in float32."""
        own, before = BIGRAM_PRIMES
        most = self.table.num_embeddings - 1
        pairs = (own * tokens_BT[:, 1:] ^ before * tokens_BT[:, :-1]) % most
        added: Tensor = self.widen(self.table(F.pad(pairs, (1, 0), value=most)))
        return self.scale * added


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
    """The network. `recurrent` says how often the repeated layers are run again.

    Weights are float32; `precision` is that of the stream and of the matrix products.
    """

    def __init__(self, config: ModelConfig, *, train_length: int, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.train_length, self.precision = config, train_length, precision
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks: list[Block] = nn.ModuleList(Block(config, layer) for layer in range(config.layers))  # type: ignore[assignment]  # a list to its readers
        has_values = config.value_embedding_dim > 0 and config.value_embedding_layers
        self.value_embedding = ValueEmbedding(config) if has_values else None
        self.bigrams = Bigrams(config) if config.bigram_buckets else None
        self.smear_gate = nn.Parameter(torch.zeros(config.width)) if config.smear else None
        if config.untied_mlps:
            repeats = nn.ModuleList(MLP(config) for _ in config.recurrence_layers)
            self.repeats: list[MLP] = repeats  # type: ignore[assignment]  # a list to its readers
        skip_shape = (config.skip_count or config.layers // 2, config.width)
        self.skip_weights = nn.Parameter(torch.ones(skip_shape)) if config.skips != "off" else None
        self.skip_gates = nn.Parameter(torch.zeros(skip_shape)) if config.skips == "gated" else None
        has_lanes = config.parallel == "lanes" and config.parallel_start_layer >= 0
        self.lane_merge = nn.Parameter(torch.tensor(0.5)) if has_lanes else None
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
                if name.endswith((".out", ".down")) or name == "head":
                    nn.init.zeros_(module.weight)
                elif min(module.weight.shape) >= SMALLEST_ORTHOGONAL:
                    nn.init.orthogonal_(module.weight)
        nn.init.normal_(self.embedding.weight, std=self.config.embedding_std)
        if self.value_embedding is not None:
            nn.init.normal_(self.value_embedding.table.weight, std=VALUE_EMBEDDING_STD)
        if self.bigrams is not None:
            nn.init.zeros_(self.bigrams.table.weight)
        if self.config.untied_mlps:
            for mlp in self.repeats:
                nn.init.zeros_(mlp.up.weight)

    def layer_order(self, recurrent: int) -> list[int]:
        """Physical layers in the order of execution; the first half feeds the skips of the second."""
        order = list(range(self.config.layers))
        if self.config.has_recurrence:
            loop = list(self.config.recurrence_layers)
            order[loop[-1] + 1 : loop[-1] + 1] = loop * recurrent
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
        if self.config.untied_mlps:
            for number, repeat in enumerate(self.repeats):
                for name in ("up", "down"):
                    yield f"repeats.{number}.{name}", getattr(repeat, name), f"repeats.{number}.{name}"

    def enter(self, tokens_BT: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The embedding's stream, (B, T, D), and what is added to the values of some layers."""
        values = self.value_embedding(tokens_BT, self.precision) if self.value_embedding is not None else {}
        embedded = self.embedding(tokens_BT)
        if self.bigrams is not None:
            embedded = embedded + self.bigrams(tokens_BT)
        x = normalize(embedded).to(self.precision)
        if self.smear_gate is not None:
            gate_D = torch.sigmoid(self.smear_gate).to(x.dtype)
            x = (1 - gate_D) * x + gate_D * F.pad(x[:, :-1], (0, 0, 1, 0))
        return x, values

    def hidden(
        self, tokens_BT: Tensor, recurrent: int, *, scored: int | None = None, observe: Observe | None = None
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
                again=again_of(self, order, position) if config.untied_mlps else None,
            )  # fmt: skip
            if position < first_half:
                states.append(x)
        final = self._final(x, lane)
        if observe:
            observe(HEAD, final)
        return final

    def _final(self, x: Tensor, lane: Tensor | None) -> Tensor:
        """The stream, merged with the MLP's lane where there is one, normalised."""
        if lane is None:
            return normalize_beside(x, 1.0)[1]
        ones = torch.ones(self.config.width, device=x.device)
        own = 0.5 if self.lane_merge is None else self.lane_merge
        unit = combine((x, lane), torch.stack((own * ones, (1 - own) * ones)), 1.0)[1]
        assert unit is not None, "a scale was given"
        return unit

    def _skip(self, states: list[Tensor], index: int) -> Skip | None:
        """The latest unused state of the first half; after the lane split it goes into the attention's lane."""
        if self.skip_weights is None or index >= self.skip_weights.size(0) or not states:
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

    def nats(self, tokens_BT: Tensor, targets_BT: Tensor, *, recurrent: int, scored: int) -> Tensor:
        """Cross-entropy of the last `scored` targets of each row, (B, S), in nats and float32."""
        return self.leave(self.hidden(tokens_BT, recurrent, scored=scored), targets_BT[:, -scored:])

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, recurrent: int) -> Tensor:
        """Mean cross-entropy of all targets, in nats."""
        return self.leave(self.hidden(tokens_BT, recurrent), targets_BT).mean()


def again_of(model: Model, order: list[int], position: int) -> Again | None:
    """The MLP of the extra pass, where a layer is run again."""
    layer = order[position]
    if layer not in order[:position]:
        return None
    number = model.config.recurrence_layers.index(layer)
    return Again(model.repeats[number], f"repeats.{number}")


@torch.no_grad()
def begin_passes(model: Model) -> None:
    """Give the extra pass's own MLPs the weights of those that they stand beside."""
    for layer, mlp in zip(model.config.recurrence_layers, model.repeats, strict=True):
        mlp.up.weight.copy_(model.blocks[layer].mlp.up.weight)
        mlp.down.weight.copy_(model.blocks[layer].mlp.down.weight)
