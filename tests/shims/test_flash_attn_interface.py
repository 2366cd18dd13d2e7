"""FlashAttention-3's functions by PyTorch's own attention, against attention written out row by row."""

# Dimensions: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head width.

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

TOLERANCE = 1e-5  # float32: a few roundings of sums over some dozens of products


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window=(-1, -1), scale: float | None = None
) -> Tensor:
    """One row at a time, with the last queries and keys together, in float64."""
    heads, groups = q.size(2), k.size(2)
    out = torch.zeros(*q.shape[:3], v.size(3), dtype=torch.float64)
    shift = k.size(1) - q.size(1)
    for b in range(q.size(0)):
        for h in range(heads):
            for t in range(q.size(1)):
                at = t + shift
                seen = [
                    s for s in range(k.size(1))
                    if (not causal or s <= at)
                    and (window[0] < 0 or s >= at - window[0])
                    and (window[1] < 0 or causal or s <= at + window[1])
                ]  # fmt: skip
                if seen:
                    g = h * groups // heads
                    scores = k[b, seen, g].double() @ q[b, t, h].double() * (scale or q.size(3) ** -0.5)
                    out[b, t, h] = scores.softmax(0) @ v[b, seen, g].double()
    return out


def tensors(
    queries: int, keys: int, *, heads: int = 4, groups: int = 4, batch: int = 2, width: int = 8
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + 31 * keys + 7 * groups)
    shapes = [(batch, queries, heads, width), (batch, keys, groups, width), (batch, keys, groups, width)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(
    ("queries", "keys", "options"),
    [
        (9, 9, {}),
        (9, 9, {"causal": True}),
        (3, 9, {"causal": True}),
        (9, 9, {"causal": True, "softmax_scale": 0.3}),
        (9, 9, {"causal": True, "window_size": (3, 0)}),
        (9, 9, {"window_size": (2, 1)}),
        (3, 9, {"window_size": (2, -1)}),
    ],
)
def test_it_is_attention_with_grouped_heads(
    flash: ModuleType, groups: int, queries: int, keys: int, options: dict
) -> None:
    q, k, v = tensors(queries, keys, groups=groups)
    expected = attention(
        q, k, v, causal=options.get("causal", False), window=options.get("window_size", (-1, -1)),
        scale=options.get("softmax_scale"),
    )  # fmt: skip
    found = flash.flash_attn_func(q, k, v, **options)
    assert found.shape == q.shape and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE, rtol=0)


def test_it_returns_a_tensor_and_with_the_sums_a_pair(flash: ModuleType) -> None:
    q, k, v = tensors(7, 7, groups=2)
    out = flash.flash_attn_func(q, k, v, causal=True)
    again, sums = flash.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(out, again)
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, dim=2)) * 8**-0.5
    scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), float("-inf"))
    torch.testing.assert_close(sums, scores.logsumexp(-1), atol=TOLERANCE, rtol=0)


def test_gradients_are_attentions_own(flash: ModuleType) -> None:
    leaves = [x.requires_grad_() for x in tensors(6, 6, groups=2)]
    twins = [x.detach().clone().requires_grad_() for x in leaves]
    flash.flash_attn_func(*leaves, causal=True).square().sum().backward()
    q, k, v = (x.transpose(1, 2) for x in twins)
    scores = q @ k.repeat_interleave(2, dim=1).mT * 8**-0.5
    scores = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), float("-inf"))
    (scores.softmax(-1) @ v.repeat_interleave(2, dim=1)).square().sum().backward()
    for one, other in zip(leaves, twins, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=10 * TOLERANCE, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(5, 3, 4), (5, 0, 7), (1, 1), (12,), (4, 4, 0, 0)])
def test_documents_in_a_row_do_not_see_each_other(flash: ModuleType, causal: bool, lengths: tuple[int, ...]) -> None:
    q, k, v = (x[0] for x in tensors(sum(lengths), sum(lengths), groups=2, batch=1))
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    found = flash.flash_attn_varlen_func(q, k, v, ends, ends, max(lengths), max(lengths), causal=causal)
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        expected = attention(q[None, start:end], k[None, start:end], v[None, start:end], causal=causal)[0]
        torch.testing.assert_close(found[start:end].double(), expected, atol=TOLERANCE, rtol=0)


def test_documents_may_have_fewer_queries_than_keys(flash: ModuleType) -> None:
    queries, keys = (2, 3), (5, 4)
    q, _, _ = (x[0] for x in tensors(sum(queries), 1, batch=1))
    _, k, v = (x[0] for x in tensors(1, sum(keys), batch=1))
    ends_q, ends_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys))
    found = flash.flash_attn_varlen_func(q, k, v, ends_q, ends_k, 3, 5, causal=True)
    for i in range(2):
        rows, others = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        expected = attention(q[None, rows], k[None, others], v[None, others], causal=True)[0]
        torch.testing.assert_close(found[rows].double(), expected, atol=TOLERANCE, rtol=0)


def test_it_compiles_into_one_graph(flash: ModuleType) -> None:
    q, k, v = tensors(8, 8, groups=2)
    compiled = torch.compile(lambda *x: flash.flash_attn_func(*x, causal=True), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), flash.flash_attn_func(q, k, v, causal=True))
    ends = torch.tensor([0, 5, 16]).int()
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    packed = torch.compile(
        lambda *x: flash.flash_attn_varlen_func(*x, ends, ends, 11, 11, causal=True), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(
        packed(*rows), flash.flash_attn_varlen_func(*rows, ends, ends, 11, 11, causal=True)
    )  # fmt: skip


@pytest.mark.parametrize("option", [{"softcap": 30.0}, {"attention_chunk": 4}, {"qv": torch.zeros(1)}])
def test_what_has_no_counterpart_is_refused(flash: ModuleType, option: dict) -> None:
    with pytest.raises(NotImplementedError, match=f"{next(iter(option))} needs FlashAttention-3 itself"):
        flash.flash_attn_func(*tensors(4, 4), **option)
