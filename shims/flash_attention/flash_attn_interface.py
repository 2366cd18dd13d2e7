"""FlashAttention-3's functions by PyTorch's own attention, for machines that have only the latter.

The same values up to rounding, and slower. What PyTorch has no counterpart of is refused, never left out.
"""

# Dimensions: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head width, N tokens of all
# documents in a row, C documents, L tokens of the longest.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__version__ = "3.0.0+caddie.sdpa"

ANY_WINDOW = (-1, -1)
MASKED_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""A script may have switched off all but the flash kernel, which takes no mask."""


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, qv: Tensor | None = None,
    q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
    window_size: tuple[int, int] = ANY_WINDOW, attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
    pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """Attention of q (B, T, H, D) to k and v (B, S, G, D), G dividing H; (B, T, H, D).

    With fewer queries than keys the last of both stand together, as in FlashAttention. `return_attn_probs` adds the
    logarithm of each row's sum, (B, H, T).
    """
    _refuse(
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=attention_chunk,
        softcap=softcap,
    )
    mask = _mask(q.size(1), k.size(1), causal=causal, window=tuple(window_size), device=q.device)
    out = _attend(q, k, v, mask=mask, causal=causal and mask is None, scale=softmax_scale)
    return (out, _row_sums(q, k, mask=mask, causal=causal, scale=softmax_scale)) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_q: Tensor | None = None, seqused_k: Tensor | None = None, softmax_scale: float | None = None,
    causal: bool = False, qv: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, window_size: tuple[int, int] = ANY_WINDOW, attention_chunk: int = 0,
    softcap: float = 0.0, num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False,
    sm_margin: int = 0, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """The same within each of C documents that stand in a row: q (N, H, D), k and v (N, G, D); (N, H, D).

    Document c has the rows from `cu_seqlens[c]` to before `cu_seqlens[c + 1]`, and may be empty. Each is padded to the
    longest.
    """
    _refuse(
        qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk, softcap=softcap,
        seqused_q=seqused_q, seqused_k=seqused_k, return_attn_probs=return_attn_probs,
    )  # fmt: skip
    q_CLHD, is_query = _padded(q, cu_seqlens_q, int(max_seqlen_q))
    k_CLGD, is_key = _padded(k, cu_seqlens_k, int(max_seqlen_k))
    v_CLGD, _ = _padded(v, cu_seqlens_k, int(max_seqlen_k))
    if causal and cu_seqlens_q is cu_seqlens_k and tuple(window_size) == ANY_WINDOW:
        out = _attend(q_CLHD, k_CLGD, v_CLGD, mask=None, causal=True, scale=softmax_scale)  # padding stands behind all
    else:
        mask = _document_mask(is_query, is_key, causal=causal, window=tuple(window_size))
        out = _attend(q_CLHD, k_CLGD, v_CLGD, mask=mask, causal=False, scale=softmax_scale)
    document, place = _places(q.size(0), cu_seqlens_q)
    return out[document, place.clamp(max=int(max_seqlen_q) - 1)]


def _attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """PyTorch's attention with heads in FlashAttention's place."""
    q_BHTD, k_BGSD, v_BGSD = (x.transpose(1, 2) for x in (q, k, v))
    options: dict[str, Any] = {"scale": scale, "enable_gqa": q.size(2) != k.size(2)}
    if mask is None:
        out = F.scaled_dot_product_attention(q_BHTD, k_BGSD, v_BGSD, is_causal=causal, **options)
        return out.transpose(1, 2).contiguous()
    with sdpa_kernel(MASKED_BACKENDS):
        out = F.scaled_dot_product_attention(q_BHTD, k_BGSD, v_BGSD, attn_mask=mask, **options)
    return out.nan_to_num().transpose(1, 2).contiguous()  # a row without any key is zero there


def _mask(queries: int, keys: int, *, causal: bool, window: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Which keys a query sees, (T, S); None where PyTorch has the case itself."""
    if window == ANY_WINDOW and (not causal or queries == keys):
        return None
    offset = torch.arange(keys, device=device)[None] - torch.arange(queries, device=device)[:, None] - (keys - queries)
    return _in_window(offset, causal=causal, window=window)


def _in_window(offset: Tensor, *, causal: bool, window: tuple[int, ...]) -> Tensor:
    """Whether a key at this distance from its query, negative before it, is seen."""
    left, right = window
    right = 0 if causal else right
    seen = torch.ones_like(offset, dtype=torch.bool)
    seen = seen & (offset >= -left) if left >= 0 else seen
    return seen & (offset <= right) if right >= 0 else seen


def _padded(x_NHD: Tensor, cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Documents one below the other, (C, L, H, D), and which rows are theirs, (C, L)."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    rows = starts[:, None] + torch.arange(longest, device=x_NHD.device)[None]
    is_own = rows < ends[:, None]
    return x_NHD[rows.clamp(max=x_NHD.size(0) - 1)], is_own


def _places(rows: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Document of each row, and its place in it; rows behind the last document are left with it."""
    row = torch.arange(rows, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.long(), row, right=True).sub(1).clamp(0, cu_seqlens.numel() - 2)
    return document, row - cu_seqlens.long()[document]


def _document_mask(is_query: Tensor, is_key: Tensor, *, causal: bool, window: tuple[int, ...]) -> Tensor:
    """Which keys a query sees in each document, (C, 1, L, L): its own document's, the last of both standing together."""
    queries, keys = (torch.arange(own.size(1), device=own.device) for own in (is_query, is_key))
    shift = is_key.sum(1) - is_query.sum(1)
    offset = keys[None, None, :] - queries[None, :, None] - shift[:, None, None]
    return (_in_window(offset, causal=causal, window=window) & is_key[:, None, :])[:, None]


def _row_sums(q: Tensor, k: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """Logarithm of the sum of each query's exponentials, (B, H, T), in float32."""
    repeats = q.size(2) // k.size(2)
    k_BSHD = k.repeat_interleave(repeats, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k_BSHD.float()) * (scale or q.size(-1) ** -0.5)
    if mask is None and causal:
        mask = torch.ones(q.size(1), k.size(1), dtype=torch.bool, device=q.device).tril()
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).logsumexp(-1)


def _refuse(**options: Any) -> None:
    """Raise NotImplementedError for an option that this stand-in has not."""
    for name, value in options.items():
        if value is not None and value is not False and not (isinstance(value, (int, float)) and value == 0):
            raise NotImplementedError(f"{name} needs FlashAttention-3 itself, this is PyTorch's attention in its place")
