"""Attention of the #1326 lineage: grouped queries, partial rotation, normalised queries and keys, learned gain, XSA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig

# Dimensions: B batch, T tokens, D model width, H query heads, G key/value heads, K head width, R rotated dimensions.


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


def rotate(x_BTHK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the leading dimensions of each head by its position; the first half pairs with the second."""
    half = cos_TR.size(-1)
    cos, sin = cos_TR[:, None].to(x_BTHK.dtype), sin_TR[:, None].to(x_BTHK.dtype)
    first, second, rest = x_BTHK[..., :half], x_BTHK[..., half : 2 * half], x_BTHK[..., 2 * half :]
    return torch.cat((first * cos - second * sin, first * sin + second * cos, rest), dim=-1)


def without_own_value(y_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """XSA: take from each head's output its component along the position's own (shared) value vector. PR #265, #478."""
    own = F.normalize(v_BTGK, dim=-1).repeat_interleave(y_BTHK.size(2) // v_BTGK.size(2), dim=2)
    return y_BTHK - (y_BTHK * own).sum(-1, keepdim=True) * own


class Attention(nn.Module):
    """Causal self-attention, (B, T, D) to (B, T, D)."""

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

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], value_embedding: Tensor | None) -> Tensor:
        config = self.config
        heads = (*x_BTD.shape[:2], -1, config.head_dim)
        q, k, v = self.query(x_BTD).view(heads), self.key(x_BTD).view(heads), self.value(x_BTD).view(heads)
        if value_embedding is not None:
            v = v + value_embedding.view(heads).to(v.dtype)
        if config.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        if config.rope_dims:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if self.gain is not None:
            q = q * self.gain[:, None].to(q.dtype)
        q, k = q.to(v.dtype), k.to(v.dtype)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        if self.has_xsa:
            y = without_own_value(y, v)
        return self.out(y.reshape(x_BTD.shape))
