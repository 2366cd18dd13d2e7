"""The plain forms against direct formulas in float64, values and gradients; the fused ones are in tests/gpu."""

import pytest
import torch
import torch.nn.functional as F

from trainer import kernels
from trainer.kernels import (
    add_mlp,
    add_product,
    combine,
    cross_entropy,
    is_fused,
    normalize,
    normalize_beside,
    prepare_heads,
    rotate,
    soft_capped,
    without_own_value,
)

BATCH, TOKENS, WIDTH, HEADS, GROUPS, HEAD = 2, 5, 12, 4, 2, 6


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).requires_grad_()


def agree(plain, formula, *inputs):
    """Both give the same, and the same gradients, to float32: the formula computes in float64."""
    twins = [x.detach().double().requires_grad_() for x in inputs]
    outputs, expected = plain(*inputs), formula(*twins)
    for place, (output, other) in enumerate(zip(outputs, expected, strict=True)):
        torch.testing.assert_close(output.double(), other, atol=1e-5, rtol=1e-5, msg=lambda m, at=place: f"{at}: {m}")
    incoming = [numbers(*output.shape, seed=place).detach() for place, output in enumerate(outputs)]
    torch.autograd.backward(outputs, incoming)
    torch.autograd.backward(expected, [grad.double() for grad in incoming])
    for place, (x, twin) in enumerate(zip(inputs, twins, strict=True)):
        torch.testing.assert_close(
            x.grad.double(), twin.grad, atol=1e-4, rtol=1e-4, msg=lambda m, at=place: f"{at}: {m}"
        )


def unit(x):
    return x / (x.square().mean(-1, keepdim=True) + kernels.NORM_EPS).sqrt()


def test_kernels_are_for_bfloat16_on_a_gpu_alone():
    assert not is_fused(torch.zeros(2, 8), 8)
    assert not is_fused(torch.zeros(2, 8, dtype=torch.bfloat16), 8)


def test_normalisation_gives_unit_mean_squares_in_float32():
    x = numbers(BATCH, WIDTH)
    assert normalize(x.bfloat16()).dtype == torch.float32
    agree(lambda x: (normalize(x),), lambda x: (unit(x),), x)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("count", [2, 3])
def test_parts_are_weighted_added_up_and_normalised(count, scale):
    parts = [numbers(BATCH, TOKENS, WIDTH, seed=seed) for seed in range(count)]

    def formula(factors, *parts):
        z = sum(factor * part for factor, part in zip(factors, parts, strict=True))
        return z, *(() if scale is None else (unit(z) * scale,)), parts[1]

    def plain(factors, *parts):
        return [x for x in combine(parts, factors, scale) if x is not None]

    agree(plain, formula, numbers(count, WIDTH), *parts)


def test_normalisation_beside_leaves_its_input():
    agree(lambda x: normalize_beside(x, 0.5), lambda x: (x, unit(x) * 0.5), numbers(BATCH, TOKENS, WIDTH))


def test_a_product_is_added_to_the_stream():
    agree(
        lambda x, y, w: (add_product(x, y, w),), lambda x, y, w: (x + y @ w.T,),
        numbers(BATCH, TOKENS, WIDTH), numbers(BATCH, TOKENS, 7), numbers(WIDTH, 7),
    )  # fmt: skip


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_the_mlp_squares_a_leaky_rectifier(slope):
    def formula(x, inputs, up, down):
        hidden = inputs @ up.T
        return (x + torch.where(hidden > 0, hidden, slope * hidden) ** 2 @ down.T,)

    agree(
        lambda *tensors: (add_mlp(*tensors, slope),), formula,
        numbers(BATCH, TOKENS, WIDTH), numbers(BATCH, TOKENS, WIDTH, seed=1), numbers(20, WIDTH), numbers(WIDTH, 20),
    )  # fmt: skip


def test_rotation_is_multiplication_of_pairs_by_a_unit_complex_number():
    angles = torch.outer(torch.arange(TOKENS), torch.tensor([1.0, 0.3]))
    x = numbers(BATCH, TOKENS, HEADS, HEAD).detach()
    turned = torch.complex(x[..., :2], x[..., 2:4]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag, x[..., 4:]), dim=-1)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), expected)


@pytest.mark.parametrize("has_gain", [True, False])
@pytest.mark.parametrize("has_rotation", [True, False])
@pytest.mark.parametrize("normalizes", [True, False])
def test_heads_are_normalised_turned_and_scaled_and_values_added_to(has_gain, has_rotation, normalizes):
    angles = torch.outer(torch.arange(TOKENS), torch.tensor([1.0, 0.3]))
    tables = (angles.cos(), angles.sin()) if has_rotation else None

    def prepared(x):
        x = unit(x) if normalizes else x
        return rotate(x, *(table.double() for table in tables)) if tables else x

    def formula(qkv, value, gain):
        q, k, v = qkv[:, :, :HEADS], qkv[:, :, HEADS : HEADS + GROUPS], qkv[:, :, HEADS + GROUPS :] + value
        return prepared(q) * (gain[:, None] if has_gain else 1 + 0 * gain[:, None]), prepared(k), v, v

    def plain(qkv, value, gain):
        q, *others = prepare_heads(qkv, gain if has_gain else None, tables, value, groups=GROUPS, normalizes=normalizes)
        return q + 0 * gain[:, None], *others

    heads = numbers(BATCH, TOKENS, HEADS + 2 * GROUPS, HEAD)
    agree(plain, formula, heads, numbers(BATCH, TOKENS, GROUPS, HEAD), numbers(HEADS))


def test_without_keys_and_values_there_are_queries_alone():
    x, gain = numbers(BATCH, TOKENS, HEADS, HEAD), numbers(HEADS)
    q, k, v, _ = prepare_heads(x, gain, None, groups=0)
    torch.testing.assert_close(q, unit(x) * gain[:, None])
    assert k.numel() == v.numel() == 0


def test_xsa_projects_each_head_off_the_value_that_it_shares():
    def formula(y, v):
        own = F.normalize(v, dim=-1).repeat_interleave(HEADS // GROUPS, dim=2)
        return (y - (y * own).sum(-1, keepdim=True) * own,)

    y, v = numbers(BATCH, TOKENS, HEADS, HEAD), numbers(BATCH, TOKENS, GROUPS, HEAD)
    agree(lambda y, v: (without_own_value(y, v),), formula, y, v)
    shared = v.repeat_interleave(HEADS // GROUPS, dim=2)
    assert (without_own_value(y, v) * shared).sum(-1).abs().max() < 1e-5  # float32 sums of a few terms of size 1


def test_a_value_of_zero_takes_nothing_away():
    y = numbers(BATCH, TOKENS, HEADS, HEAD)
    torch.testing.assert_close(without_own_value(y, torch.zeros(BATCH, TOKENS, GROUPS, HEAD)), y)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_cross_entropy_is_minus_the_log_of_the_targets_softmax(cap):
    targets = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS)

    def formula(hidden, table):
        logits = hidden @ table.T
        logits = cap * torch.tanh(logits / cap) if cap else logits
        return (-logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1),)

    hidden, table = numbers(BATCH, TOKENS, WIDTH), numbers(16, WIDTH)
    agree(lambda h, t: (cross_entropy(h, t, targets, cap),), formula, hidden, table)


def test_the_soft_cap_is_a_hyperbolic_tangent():
    x = torch.linspace(-200, 200, 401)
    torch.testing.assert_close(soft_capped(x, 30.0), 30 * torch.tanh(x / 30), atol=1e-5, rtol=1e-5)
    assert soft_capped(x, 0.0) is x
