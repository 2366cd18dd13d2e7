"""What stands between the network's matrix products, as one pass over memory each.

On a GPU these passes cost as much as the products themselves, so each has a fused kernel; each function says by its plain
form, which everything but bfloat16 on a GPU takes, what its kernel computes. Numbers are rounded when they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no GPU here
    triton = None

# Dimensions: M positions, D model width, H query heads, G key/value heads, K head width, R rotated dimensions, N outputs
# of a product. B and T, where a tensor has them, are sequences and tokens.

NORM_EPS = torch.finfo(torch.float32).eps  # whatever the precision of what is normalised
OWN_EPS = 1e-12  # floor of a value vector's length
TILE_ELEMENTS = 2048  # of an element-wise kernel's tile
PROGRAMS = 8  # of a kernel that sums over positions, for each multiprocessor
LARGEST_ROW = 16_384  # logits that one program holds
WIDEST_TILE = 256  # columns of the fused product's tiles
KERNELS_ON = "cuda"  # type of the device whose tensors take the kernels; Triton's interpreter takes a CPU's


def is_fused(x: Tensor, width: int) -> bool:
    """Whether the kernels take these tensors; `width` is what must be a power of two."""
    return triton is not None and x.device.type == KERNELS_ON and x.dtype == torch.bfloat16 and width & (width - 1) == 0


def normalize(x: Tensor) -> Tensor:
    """RMS normalisation of the last dimension, without learned weights, in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS)


def combine(
    parts: Sequence[Tensor], factors_PD: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """z = Σ factor · part over two or three parts, each (B, T, D); z normalised times `scale`, if any; the second part.

    Use only the second part that is returned: its gradients, from here and from later uses, are then added up in one pass.
    """
    if is_fused(parts[0], parts[0].size(-1)):
        return Combine.apply(scale, factors_PD, *parts)
    z = sum(factor_D * part for factor_D, part in zip(factors_PD, parts, strict=True)).to(parts[0].dtype)
    return z, None if scale is None else (normalize(z) * scale).to(z.dtype), parts[1]


def normalize_beside(x_BTD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """x, and x normalised times `scale`. Use only the x that is returned: both gradients come back in one pass."""
    if is_fused(x_BTD, x_BTD.size(-1)):
        return Combine.apply(scale, None, x_BTD)[:2]
    return x_BTD, (normalize(x_BTD) * scale).to(x_BTD.dtype)


def add_product(x_BTD: Tensor, y_BTN: Tensor, weight_DN: Tensor) -> Tensor:
    """x + y Wᵀ. May write into x: use only what is returned."""
    if is_fused(x_BTD, 1):
        return AddProduct.apply(x_BTD, y_BTN, weight_DN)
    return x_BTD + F.linear(y_BTN, weight_DN)


def add_mlp(x_BTD: Tensor, inputs_BTD: Tensor, up_ND: Tensor, down_DN: Tensor, slope: float) -> Tensor:
    """x + down(leaky_relu(up(inputs))²). May write into x: use only what is returned."""
    if is_fused(x_BTD, 1) and up_ND.size(0) % WIDEST_TILE == up_ND.size(1) % 64 == 0:
        return AddMLP.apply(x_BTD, inputs_BTD, up_ND, down_DN, slope)
    return x_BTD + F.linear(F.leaky_relu(F.linear(inputs_BTD, up_ND), slope).square(), down_DN)


def rotate(x_BTHK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the leading dimensions of each head by its position; the first half pairs with the second."""
    half = cos_TR.size(-1)
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    first, second, rest = x_BTHK[..., :half], x_BTHK[..., half : 2 * half], x_BTHK[..., 2 * half :]
    return torch.cat((first * cos - second * sin, first * sin + second * cos, rest), dim=-1)


def prepare_heads(
    qkv_BTHK: Tensor, gain_H: Tensor | None, rotary: tuple[Tensor, Tensor] | None, value_BTGK: Tensor | None = None,
    *, groups: int, normalizes: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries and keys normalised and rotated, queries times their gain, and twice the values with `value` added.

    Heads stand in this order; `groups` are keys and as many values, the rest queries. The second copy of the values is for
    a second reader, so that both gradients come back together.
    """
    heads = qkv_BTHK.size(2) - 2 * groups
    is_usual = normalizes and is_fused(qkv_BTHK, qkv_BTHK.size(-1))
    if is_usual and gain_H is not None and rotary is not None and is_fused(qkv_BTHK, rotary[0].size(-1)):
        return PrepareHeads.apply(qkv_BTHK, gain_H, *rotary, value_BTGK, groups)
    q, k, v = qkv_BTHK.split((heads, groups, groups), dim=2)
    v = v if value_BTGK is None else v + value_BTGK
    q, k = (normalize(part) if normalizes else part.float() for part in (q, k))
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    if gain_H is not None:
        q = q * gain_H[:, None]
    return q.to(v.dtype), k.to(v.dtype), v, v


def without_own_value(y_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """XSA: take from each head's output its component along the position's own (shared) value vector. PR #265, #478."""
    if is_fused(y_BTHK, y_BTHK.size(-1)) and is_fused(y_BTHK, v_BTGK.size(2)):
        return WithoutOwnValue.apply(y_BTHK, v_BTGK)
    y = y_BTHK.unflatten(2, (v_BTGK.size(2), -1)).float()
    v = v_BTGK[:, :, :, None].float()
    share = (y * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True).clamp_min(OWN_EPS**2)
    return (y - share * v).view_as(y_BTHK).to(y_BTHK.dtype)


def cross_entropy(hidden_BSD: Tensor, table_VD: Tensor, targets_BS: Tensor, softcap: float) -> Tensor:
    """-log p(target), (B, S), in nats and float32, of logits c · tanh(x / c) (0: of x), x = hidden tableᵀ."""
    if is_fused(hidden_BSD, 1) and table_VD.size(0) <= LARGEST_ROW:
        return CrossEntropy.apply(hidden_BSD, table_VD, targets_BS, softcap)
    logits = soft_capped(F.linear(hidden_BSD, table_VD).float(), softcap)
    return F.cross_entropy(logits.flatten(0, 1), targets_BS.flatten(), reduction="none").view_as(targets_BS)


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """c · tanh(x / c), which a sigmoid gives in fewer instructions."""
    return cap * (2 * torch.sigmoid(logits * (2 / cap)) - 1) if cap else logits


def _programs(x: Tensor) -> int:
    return PROGRAMS * torch.cuda.get_device_properties(x.device).multi_processor_count


class Combine(torch.autograd.Function):
    """`combine`, and `normalize_beside` for one part; keeps what was normalised and not what it was made from."""

    @staticmethod
    def forward(ctx: Any, scale: float | None, factors_PD: Any, *parts: Tensor) -> tuple[Tensor, Any, Any]:
        ctx.set_materialize_grads(False)
        parts = tuple(part.contiguous() for part in parts)
        x, width = parts[0], parts[0].size(-1)
        rows, tile = x.numel() // width, max(1, TILE_ELEMENTS // width)
        z = x if len(parts) == 1 else torch.empty_like(x)
        unit = None if scale is None else torch.empty_like(x)
        inverse_M = x.new_empty(rows, dtype=torch.float32)
        _combine_kernel[(triton.cdiv(rows, tile),)](
            *_three(parts), factors_PD, z, unit, inverse_M, rows, scale or 1.0, NORM_EPS,
            PARTS=len(parts), NORMS=scale is not None, D=width, TILE=tile,
        )  # fmt: skip
        ctx.scale = scale
        if len(parts) == 1:
            ctx.mark_dirty(x)
            ctx.save_for_backward(unit, inverse_M)
            return z, unit, None
        ctx.save_for_backward(unit, inverse_M, factors_PD, *parts)
        return z, unit, parts[1].view_as(parts[1])

    @staticmethod
    def backward(ctx: Any, grad_z: Any, grad_unit: Any, grad_second: Any) -> tuple[Any, ...]:
        unit, inverse_M, *saved = ctx.saved_tensors
        factors_PD, parts = (saved[0], saved[1:]) if saved else (None, [])
        given = grad_z if grad_unit is None else grad_unit
        width, programs = given.size(-1), _programs(given)
        grads = [torch.empty_like(given, memory_format=torch.contiguous_format) for _ in parts or (given,)]
        sums = given.new_empty(len(parts), programs, width, dtype=torch.float32)
        incoming = [None if grad is None else grad.contiguous() for grad in (grad_z, grad_unit, grad_second)]
        _combine_grad_kernel[(programs,)](
            *incoming, unit, inverse_M, *_three(parts), factors_PD, *_three(grads), sums, given.numel() // width,
            ctx.scale or 1.0, PARTS=len(grads), D=width, TILE=max(1, TILE_ELEMENTS // width),
        )  # fmt: skip
        return None, sums.sum(1) if parts else None, *grads


def _three(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [*tensors, None, None, None][:3]


class AddProduct(torch.autograd.Function):
    """`add_product`, added up inside the product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight_DN: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(y, weight_DN)
        x.view(-1, x.size(-1)).addmm_(y.flatten(0, -2), weight_DN.T)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, weight_DN = ctx.saved_tensors
        return grad, grad @ weight_DN, grad.flatten(0, -2).T @ y.flatten(0, -2)


class AddMLP(torch.autograd.Function):
    """`add_mlp`: the activation happens where the first product leaves the matrix unit, its derivative where the second
    product's gradient does. Keeps the leaky ReLU and its square.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, inputs: Tensor, up_ND: Tensor, down_DN: Tensor, slope: float) -> Tensor:
        ctx.mark_dirty(x)
        inputs_MD = inputs.flatten(0, -2)
        keeps = any(ctx.needs_input_grad)
        leaky_MN = inputs.new_empty(inputs_MD.size(0) if keeps else 1, up_ND.size(0))
        squared_MN = _product(inputs_MD, up_ND, leaky_MN, slope, int(keeps))
        ctx.save_for_backward(inputs_MD, up_ND, down_DN, leaky_MN, squared_MN)
        ctx.slope = slope
        x.view(-1, x.size(-1)).addmm_(squared_MN, down_DN.T)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs_MD, up_ND, down_DN, leaky_MN, squared_MN = ctx.saved_tensors
        grad_MD = grad.flatten(0, -2).contiguous()
        grad_MN = _product(grad_MD, down_DN.T.contiguous(), leaky_MN, ctx.slope, 2)
        grad_inputs = (grad_MN @ up_ND).view_as(grad)
        return grad, grad_inputs, grad_MN.T @ inputs_MD, grad_MD.T @ squared_MN, None


def _product(a_MK: Tensor, b_NK: Tensor, leaky_MN: Tensor, slope: float, mode: int) -> Tensor:
    """The fused product; its modes stand at the kernel. Tiles as measured on an H200 for 98,304 × 512 × 2,048."""
    out_MN = a_MK.new_empty(a_MK.size(0), b_NK.size(0))
    # Where much is stored, one wide tile whose stores run beside the next tile's sums; where much is read, two narrow ones.
    columns, parts, warps, stages, each = (128, 2, 4, 3, 2) if mode == 2 else (WIDEST_TILE, 4, 8, 4, 1)
    tiles = ((a_MK, 128, 64), (b_NK, columns, 64), (leaky_MN, 128, columns // parts), (out_MN, 128, columns // parts))
    _product_kernel[(each * _programs(a_MK) // PROGRAMS,)](
        *(TensorDescriptor.from_tensor(tensor, list(tile)) for tensor, *tile in tiles), *out_MN.shape, a_MK.size(1),
        slope, MODE=mode, TILE_M=128, TILE_N=columns, TILE_K=64, PARTS=parts, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out_MN


class PrepareHeads(torch.autograd.Function):
    """`prepare_heads`."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, gain_H: Tensor, cos_TR: Tensor, sin_TR: Tensor, value: Any, groups: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.split = (qkv.size(2) - 2 * groups, groups, groups)
        qkv = qkv.contiguous()
        ctx.save_for_backward(qkv, gain_H, cos_TR, sin_TR)
        q, k, v = qkv.split(ctx.split, dim=2)
        turned = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in (q, k)]
        for part, gain, out in zip((q, k), (gain_H, None), turned, strict=True):
            _turn(_turn_kernel, part, gain, cos_TR, sin_TR, out)
        ctx.has_value = value is not None
        v = v if value is None else v + value
        return *turned, v, v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        qkv, gain_H, cos_TR, sin_TR = ctx.saved_tensors
        # Nobody reads the queries, or the keys and values, that a call has none of: they have no gradient.
        grads = tuple(given if given is None else given.contiguous() for given in grads)
        grad = torch.empty_like(qkv)
        q, k, v = grad.split(ctx.split, dim=2)
        sums = gain_H.new_empty(_programs(qkv), triton.next_power_of_2(gain_H.size(0)))
        in_q, in_k, _ = qkv.split(ctx.split, dim=2)
        _turn(_turn_grad_kernel, in_q, gain_H, cos_TR, sin_TR, q, grads[0], None, None, sums)
        _turn(_turn_grad_kernel, in_k, None, cos_TR, sin_TR, k, *grads[1:], None)
        return grad, sums.sum(0)[: gain_H.size(0)], None, None, v if ctx.has_value else None, None


def _turn(kernel: Any, x: Tensor, gain_H: Tensor | None, cos: Tensor, sin: Tensor, out: Tensor, *grads: Any) -> None:
    """Launch a kernel over the heads of one kind, which may be a slice of all heads."""
    heads, width = x.shape[2:]
    if not x.numel():
        return
    every, rows = triton.next_power_of_2(heads), x.size(0) * x.size(1)
    tile = max(1, TILE_ELEMENTS // (every * width))
    kernel[(_programs(x) if grads else triton.cdiv(rows, tile),)](
        x, x.stride(1), gain_H, cos, sin, out, *grads, rows, x.size(1), NORM_EPS,
        H=heads, HEADS=every, K=width, HALF=cos.size(-1), TILE=tile,
    )  # fmt: skip


class WithoutOwnValue(torch.autograd.Function):
    """`without_own_value`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, v: Tensor) -> Tensor:
        y, out = y.contiguous(), torch.empty_like(y, memory_format=torch.contiguous_format)
        ctx.save_for_backward(y, v)
        WithoutOwnValue.launch(_own_kernel, y, v, out)
        return out

    @staticmethod
    def launch(kernel: Any, y: Tensor, v: Tensor, *others: Tensor) -> None:
        rows, (heads, width), groups = y.size(0) * y.size(1), y.shape[2:], v.size(2)
        tile = max(1, TILE_ELEMENTS // (heads * width))
        kernel[(triton.cdiv(rows, tile),)](
            y, v, *others, rows, v.stride(1), OWN_EPS**2, G=groups, SHARE=heads // groups, K=width, TILE=tile
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        y, v = ctx.saved_tensors
        grad_y, grad_v = torch.empty_like(y), v.new_empty(v.shape)
        WithoutOwnValue.launch(_own_grad_kernel, y, v, grad.contiguous(), grad_y, grad_v)
        return grad_y, grad_v


class CrossEntropy(torch.autograd.Function):
    """`cross_entropy`: one pass over the logits, which leaves their gradient in their place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table_VD: Tensor, targets: Tensor, softcap: float) -> Tensor:
        hidden_MD = hidden.flatten(0, -2)
        logits_MV = F.linear(hidden_MD, table_VD)
        nats = torch.empty(targets.shape, device=hidden.device)
        size = table_VD.size(0)
        _nats_kernel[(hidden_MD.size(0),)](
            logits_MV, targets.contiguous(), nats, size, softcap or 1.0, CAPS=bool(softcap),
            KEEPS=any(ctx.needs_input_grad), BLOCK=triton.next_power_of_2(size), num_warps=8,
        )  # fmt: skip
        ctx.save_for_backward(hidden_MD, table_VD, logits_MV)
        return nats

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden_MD, table_VD, grad_MV = ctx.saved_tensors
        weight_M1 = grad.reshape(-1, 1)
        grad_hidden = (grad_MV @ table_VD).mul_(weight_M1).view(*grad.shape, -1)
        weighted_MD = torch.mul(hidden_MD, weight_M1, out=torch.empty_like(hidden_MD))
        return grad_hidden, grad_MV.T @ weighted_MD, None, None


if triton is not None:

    @triton.jit
    def _combine_kernel(
        x, y, w, factors, z, unit, inverse, rows, scale, eps,
        PARTS: tl.constexpr, NORMS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * TILE + tl.arange(0, TILE)
        column = tl.arange(0, D)
        at = row[:, None].to(tl.int64) * D + column
        inside = row[:, None] < rows
        sums = tl.load(x + at, inside, 0).to(tl.float32)
        if PARTS > 1:
            sums = tl.load(factors + column) * sums
            sums += tl.load(factors + D + column) * tl.load(y + at, inside, 0).to(tl.float32)
            if PARTS > 2:
                sums += tl.load(factors + 2 * D + column) * tl.load(w + at, inside, 0).to(tl.float32)
            tl.store(z + at, sums.to(tl.bfloat16), inside)
            sums = sums.to(tl.bfloat16).to(tl.float32)
        if NORMS:
            factor = tl.rsqrt(tl.sum(sums * sums, 1) / D + eps)
            tl.store(inverse + row, factor, row < rows)
            tl.store(unit + at, (sums * (factor * scale)[:, None]).to(tl.bfloat16), inside)

    @triton.jit
    def _combine_grad_kernel(
        grad_z, grad_unit, grad_second, unit, inverse, x, y, w, factors, grad_x, grad_y, grad_w, sums, rows, scale,
        PARTS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        column = tl.arange(0, D)
        sum_x = tl.zeros((TILE, D), tl.float32)
        sum_y = tl.zeros((TILE, D), tl.float32)
        sum_w = tl.zeros((TILE, D), tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(rows, TILE), tl.num_programs(0)):
            row = tile * TILE + tl.arange(0, TILE)
            at = row[:, None].to(tl.int64) * D + column
            inside = row[:, None] < rows
            grad = tl.zeros((TILE, D), tl.float32)
            if grad_z is not None:
                grad = tl.load(grad_z + at, inside, 0).to(tl.float32)
            if grad_unit is not None:
                slope = tl.load(grad_unit + at, inside, 0).to(tl.float32) * scale
                normal = tl.load(unit + at, inside, 0).to(tl.float32) / scale
                along = tl.sum(slope * normal, 1) / D
                grad += tl.load(inverse + row, row < rows, 0)[:, None] * (slope - normal * along[:, None])
            if PARTS > 1:
                sum_x += grad * tl.load(x + at, inside, 0).to(tl.float32)
                sum_y += grad * tl.load(y + at, inside, 0).to(tl.float32)
                second = tl.load(factors + D + column) * grad
                if grad_second is not None:
                    second += tl.load(grad_second + at, inside, 0).to(tl.float32)
                tl.store(grad_y + at, second.to(tl.bfloat16), inside)
                if PARTS > 2:
                    sum_w += grad * tl.load(w + at, inside, 0).to(tl.float32)
                    tl.store(grad_w + at, (tl.load(factors + 2 * D + column) * grad).to(tl.bfloat16), inside)
                grad = tl.load(factors + column) * grad
            tl.store(grad_x + at, grad.to(tl.bfloat16), inside)
        if PARTS > 1:
            place = sums + tl.program_id(0) * D + column
            tl.store(place, tl.sum(sum_x, 0))
            tl.store(place + tl.num_programs(0) * D, tl.sum(sum_y, 0))
            if PARTS > 2:
                tl.store(place + 2 * tl.num_programs(0) * D, tl.sum(sum_w, 0))

    @triton.jit
    def _product_kernel(
        a, b, leaky, out, rows, columns, inner, slope,
        MODE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """out = act(a bᵀ): MODE 0 squares the leaky ReLU, 1 keeps the leaky ReLU too, 2 multiplies by the derivative."""
        across = tl.cdiv(columns, TILE_N)
        last = tl.cdiv(rows, TILE_M) * across
        for tile in tl.range(tl.program_id(0), last, tl.num_programs(0), flatten=MODE != 2):
            m, n = tile // across * TILE_M, tile % across * TILE_N
            sums = tl.zeros((TILE_M, TILE_N), tl.float32)
            for k in range(0, inner, TILE_K):
                sums = tl.dot(a.load([m, k]), b.load([n, k]).T, sums)
            halves = tl.permute(tl.reshape(sums, (TILE_M, 2, TILE_N // 2)), (0, 2, 1)).split()
            for half in tl.static_range(2):
                at = n + half * (TILE_N // 2)
                if PARTS == 4:
                    quarters = tl.permute(tl.reshape(halves[half], (TILE_M, 2, TILE_N // 4)), (0, 2, 1)).split()
                    for quarter in tl.static_range(2):
                        _activate(quarters[quarter], leaky, out, m, at + quarter * (TILE_N // 4), slope, MODE)
                else:
                    _activate(halves[half], leaky, out, m, at, slope, MODE)

    @triton.jit
    def _activate(x, leaky, out, m, n, slope, MODE: tl.constexpr):
        if MODE == 2:
            kept = leaky.load([m, n]).to(tl.float32)
            x = x * 2 * tl.where(kept > 0, kept, slope * kept)
        else:
            x = tl.where(x > 0, x, slope * x)
            if MODE == 1:
                leaky.store([m, n], x.to(tl.bfloat16))
            x = x * x
        out.store([m, n], x.to(tl.bfloat16))

    @triton.jit
    def _turn_kernel(
        x, stride, gain, cos, sin, out, rows, tokens, eps,
        H: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * TILE + tl.arange(0, TILE)
        head, k, h = tl.arange(0, HEADS), tl.arange(0, K)[None, None, :], tl.arange(0, HALF)[None, None, :]
        inside = (row < rows)[:, None, None] & (head < H)[None, :, None]
        line = row[:, None, None].to(tl.int64)
        start = x + line * stride + head[None, :, None] * K
        place = out + (line * H + head[None, :, None]) * K
        whole = tl.load(start + k, inside, 0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(whole * whole, 2) / K + eps)
        if gain is not None:
            factor *= tl.load(gain + head, head < H, 0)[None, :]
        factor = factor[:, :, None]
        tl.store(place + k, (whole * factor).to(tl.bfloat16), inside & (k >= 2 * HALF))
        angle = (row % tokens)[:, None, None] * HALF + h
        c, s = tl.load(cos + angle), tl.load(sin + angle)
        first = tl.load(start + h, inside, 0).to(tl.float32) * factor
        second = tl.load(start + HALF + h, inside, 0).to(tl.float32) * factor
        tl.store(place + h, (first * c - second * s).to(tl.bfloat16), inside)
        tl.store(place + HALF + h, (first * s + second * c).to(tl.bfloat16), inside)

    @triton.jit
    def _turn_grad_kernel(
        x, stride, gain, cos, sin, out, grad, value, own, sums, rows, tokens, eps,
        H: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        head, k, h = tl.arange(0, HEADS), tl.arange(0, K)[None, None, :], tl.arange(0, HALF)[None, None, :]
        total = tl.zeros((TILE, HEADS), tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(rows, TILE), tl.num_programs(0)):
            row = tile * TILE + tl.arange(0, TILE)
            inside = (row < rows)[:, None, None] & (head < H)[None, :, None]
            line = row[:, None, None].to(tl.int64)
            start = x + line * stride + head[None, :, None] * K
            given = grad + (line * H + head[None, :, None]) * K
            place = out + line * stride + head[None, :, None] * K
            whole = tl.load(start + k, inside, 0).to(tl.float32)
            back = tl.load(given + k, inside & (k >= 2 * HALF), 0).to(tl.float32)
            angle = (row % tokens)[:, None, None] * HALF + h
            c, s = tl.load(cos + angle), tl.load(sin + angle)
            first = tl.load(start + h, inside, 0).to(tl.float32)
            second = tl.load(start + HALF + h, inside, 0).to(tl.float32)
            one = tl.load(given + h, inside, 0).to(tl.float32)
            two = tl.load(given + HALF + h, inside, 0).to(tl.float32)
            back_one, back_two = one * c + two * s, two * c - one * s
            along = tl.sum(back * whole, 2) + tl.sum(back_one * first + back_two * second, 2)
            factor = tl.rsqrt(tl.sum(whole * whole, 2) / K + eps)
            total += along * factor
            shrink = (factor * factor * along / K)[:, :, None]
            if gain is not None:
                factor *= tl.load(gain + head, head < H, 0)[None, :]
            factor = factor[:, :, None]
            tl.store(place + k, (factor * (back - shrink * whole)).to(tl.bfloat16), inside & (k >= 2 * HALF))
            tl.store(place + h, (factor * (back_one - shrink * first)).to(tl.bfloat16), inside)
            tl.store(place + HALF + h, (factor * (back_two - shrink * second)).to(tl.bfloat16), inside)
            at = (line * H + head[None, :, None]) * K + k
            if value is not None:  # the values' heads follow the keys', and are as many
                total_v = tl.load(value + at, inside, 0).to(tl.float32)
                if own is not None:
                    total_v += tl.load(own + at, inside, 0).to(tl.float32)
                tl.store(place + H * K + k, total_v.to(tl.bfloat16), inside)
        if gain is not None:
            tl.store(sums + tl.program_id(0) * HEADS + head, tl.sum(total, 0))

    @triton.jit
    def _nats_kernel(logits, targets, nats, size, cap, CAPS: tl.constexpr, KEEPS: tl.constexpr, BLOCK: tl.constexpr):
        row, v = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        at = logits + row * size + v
        x = tl.load(at, v < size, 0).to(tl.float32)
        if CAPS:
            capped = 2 * tl.sigmoid(x * (2 / cap)) - 1
            x = cap * capped
        x = tl.where(v < size, x, float("-inf"))
        is_target = v == tl.load(targets + row)
        largest = tl.max(x, 0)
        powers = tl.exp(x - largest)
        total = tl.sum(powers, 0)
        tl.store(nats + row, tl.log(total) + largest - tl.sum(tl.where(is_target, x, 0), 0))
        if KEEPS:
            grad = powers * (1 / total) - tl.where(is_target, 1.0, 0.0)
            if CAPS:
                grad *= 1 - capped * capped
            tl.store(at, grad.to(tl.bfloat16), v < size)

    @triton.jit
    def _own_kernel(
        y, v, out, rows, stride, floor,
        G: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        row = (tl.program_id(0) * TILE + tl.arange(0, TILE))[:, None, None].to(tl.int64)
        group, k = tl.arange(0, G)[None, :, None], tl.arange(0, K)[None, None, :]
        inside = (row < rows) & (group < G) & (k < K)
        own = tl.load(v + row * stride + group * K + k, inside, 0).to(tl.float32)
        norm = tl.maximum(tl.sum(own * own, 2), floor)
        for head in tl.static_range(SHARE):
            at = ((row * G + group) * SHARE + head) * K + k
            told = tl.load(y + at, inside, 0).to(tl.float32)
            share = tl.sum(told * own, 2) / norm
            tl.store(out + at, (told - share[:, :, None] * own).to(tl.bfloat16), inside)

    @triton.jit
    def _own_grad_kernel(
        y, v, grad, grad_y, grad_v, rows, stride, floor,
        G: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        row = (tl.program_id(0) * TILE + tl.arange(0, TILE))[:, None, None].to(tl.int64)
        group, k = tl.arange(0, G)[None, :, None], tl.arange(0, K)[None, None, :]
        inside = (row < rows) & (group < G) & (k < K)
        own = tl.load(v + row * stride + group * K + k, inside, 0).to(tl.float32)
        norm = tl.maximum(tl.sum(own * own, 2), floor)
        sums = tl.zeros((TILE, G, K), tl.float32)
        for head in tl.static_range(SHARE):
            at = ((row * G + group) * SHARE + head) * K + k
            told = tl.load(y + at, inside, 0).to(tl.float32)
            given = tl.load(grad + at, inside, 0).to(tl.float32)
            share = (tl.sum(told * own, 2) / norm)[:, :, None]
            along = (tl.sum(given * own, 2) / norm)[:, :, None]
            tl.store(grad_y + at, (given - along * own).to(tl.bfloat16), inside)
            sums += 2 * share * along * own - share * given - along * told
        tl.store(grad_v + (row * G + group) * K + k, sums.to(tl.bfloat16), inside)
