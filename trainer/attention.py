"""Attention of the #1326 lineage: grouped queries, partial rotation, normalised queries and keys, learned gain, XSA."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.config import ModelConfig
from trainer.kernels import prepare_heads, without_own_value
from trainer.lora import Terms

# Dimensions: B batch, T tokens, S scored tokens (the last ones; all of them in training), D model width, H query heads,
# G key/value heads, K head width, R rotated dimensions.


def fastest_kernels() -> AbstractContextManager[None]:
    """While this is open, attention takes the first of these that can do it: on an H200 cuDNN's needed 0.69 of Flash 2's time."""
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(backends, set_priority=True)


def rotary_tables(
    length: int, config: ModelConfig, *, train_length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (length, R / 2), in float32.

    Positions and frequencies never pass through bfloat16: it holds 8 significant bits, so of 2,048 positions only 641
    would stay distinct, and eager and compiled code would round them differently. Beyond the training length the base
    grows by (length / train_length)^(R / (R - 2)).
    """
    base, dims = config.rope_base, config.rope_dims
    if length > train_length and dims > 2:
        base *= (length / train_length) ** (dims / (dims - 2))
    frequencies = base ** (-torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return angles.cos(), angles.sin()


def causal_attention(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """What the last S positions read from all T up to themselves, (B, S, H, K)."""
    q, k, v = q_BSHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2)
    scored, length = q.size(2), k.size(2)
    if scored == length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    # The queries of one group stand one below the other: a mask and grouped heads together have no fast kernel.
    groups = k.size(1)
    mask = torch.ones(scored, length, dtype=torch.bool, device=q.device).tril(length - scored)
    mask = mask.repeat(q.size(1) // groups, 1)
    y = F.scaled_dot_product_attention(q.unflatten(1, (groups, -1)).flatten(2, 3), k, v, attn_mask=mask)
    return y.unflatten(2, (-1, scored)).flatten(1, 2).transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention between its first product and its last, which the block makes."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        width, kv_width = config.width, config.kv_heads * config.head_dim
        self.config = config
        self.has_xsa = layer >= config.layers - config.xsa_layers
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_width, bias=False)
        self.value = nn.Linear(width, kv_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gain = nn.Parameter(torch.full((config.heads,), config.qk_gain)) if config.qk_gain else None

    def forward(
        self, x_BTD: Tensor, qkv_ND: Tensor, rotary: tuple[Tensor, Tensor] | None, value_embedding: Tensor | None,
        *, scored: int, terms: Terms | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T, D) to (B, S, D), with the three matrices one below the other in `qkv`."""
        config = self.config
        heads, groups, length = config.heads, config.kv_heads, x_BTD.size(1)
        is_whole = scored == length
        split = heads * config.head_dim * (not is_whole)  # rows of a product of its own, for fewer queries than keys
        last = F.linear(x_BTD, qkv_ND[split:])
        if terms:
            sizes = [heads * config.head_dim, groups * config.head_dim, groups * config.head_dim][not is_whole :]
            parts = zip("qkv"[not is_whole :], last.split(sizes, dim=-1), strict=True)
            last = torch.cat([terms.add(target, part, x_BTD) for target, part in parts], dim=-1)
        last = last.unflatten(-1, (-1, config.head_dim))
        gain = self.gain if is_whole or self.gain is None else self.gain[:0]
        added = None if value_embedding is None else value_embedding.unflatten(-1, (groups, config.head_dim))
        q, k, v, own = prepare_heads(last, gain, rotary, added, groups=groups, normalizes=config.qk_norm)
        if not is_whole:
            first = F.linear(x_BTD[:, -scored:], qkv_ND[:split])
            if terms:
                first = terms.add("q", first, x_BTD[:, -scored:])
            first = first.unflatten(-1, (-1, config.head_dim))
            tables = rotary and (rotary[0][-scored:], rotary[1][-scored:])
            q, *_ = prepare_heads(first, self.gain, tables, groups=0, normalizes=config.qk_norm)
        y = causal_attention(q, k, v)
        return (without_own_value(y, own[:, -scored:]) if self.has_xsa else y).flatten(2)
