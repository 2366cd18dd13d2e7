"""The cases of the fused kernels: each beside its plain form, which takes the same in float32. On a GPU or interpreted."""

from __future__ import annotations

import torch

from trainer import kernels
from trainer.attention import rotary_tables
from trainer.config import Config, with_knobs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDING = 0.008  # bfloat16 keeps 2^-9; values are rounded once or twice, and sums of them as often again

# The published model's shapes, on a number of positions that fills no tile.
BATCH, TOKENS, WIDTH, HIDDEN, HEADS, GROUPS, HEAD, VOCABULARY = 2, 150, 512, 2048, 8, 4, 64, 4096


def numbers(*shape, size=1.0, precision=torch.bfloat16, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * size
    return values.to(DEVICE, precision).requires_grad_()


def stream(seed=0):
    return numbers(BATCH, TOKENS, WIDTH, seed=seed)


def vectors(*shape):
    return numbers(*shape, precision=torch.float32)


def rotary():
    config = with_knobs(Config(), {"model.width": WIDTH, "model.heads": HEADS, "model.kv_heads": GROUPS}).model
    return rotary_tables(TOKENS, config, train_length=TOKENS, device=DEVICE)


def nats(cap):
    targets = torch.arange(BATCH * TOKENS, device=DEVICE).view(BATCH, TOKENS)
    return lambda hidden, table: kernels.cross_entropy(hidden, table, targets, cap)


def relative_error(x, reference):
    return ((x.float() - reference).norm() / reference.norm().clamp_min(1e-9)).item()


KERNELS = {
    "two parts": lambda: (lambda x, y, f: kernels.combine((x, y), f)[0], stream(), stream(1), vectors(2, WIDTH)),
    "two parts, normalised": lambda: (
        lambda x, y, f: kernels.combine((x, y), f, 0.7), stream(), stream(1), vectors(2, WIDTH),
    ),
    "three parts, normalised": lambda: (
        lambda x, y, w, f: kernels.combine((x, y, w), f, 0.7), stream(), stream(1), stream(2), vectors(3, WIDTH),
    ),
    "normalised": lambda: (lambda x: kernels.normalize_beside(x, 0.5), stream()),
    "product": lambda: (kernels.add_product, stream(), numbers(BATCH, TOKENS, 64), numbers(WIDTH, 64)),
    "mlp": lambda: (
        lambda *tensors: kernels.add_mlp(*tensors, 0.5), stream(), stream(1),
        numbers(HIDDEN, WIDTH, size=WIDTH**-0.5), numbers(WIDTH, HIDDEN, size=HIDDEN**-0.5),
    ),
    "heads": lambda: (
        lambda x, gain: kernels.prepare_heads(x, gain, rotary(), groups=GROUPS),
        numbers(BATCH, TOKENS, HEADS + 2 * GROUPS, HEAD), vectors(HEADS),
    ),
    "heads, values added to": lambda: (
        lambda x, gain, value: kernels.prepare_heads(x, gain, rotary(), value, groups=GROUPS),
        numbers(BATCH, TOKENS, HEADS + 2 * GROUPS, HEAD), vectors(HEADS), numbers(BATCH, TOKENS, GROUPS, HEAD),
    ),
    "heads, queries alone": lambda: (
        lambda x, gain: kernels.prepare_heads(x, gain, rotary(), groups=0)[0], numbers(BATCH, TOKENS, HEADS, HEAD), vectors(HEADS),
    ),
    "heads, keys and values alone": lambda: (
        lambda x: kernels.prepare_heads(x, torch.ones(0, device=DEVICE), rotary(), groups=GROUPS)[1:],
        numbers(BATCH, TOKENS, 2 * GROUPS, HEAD),
    ),
    "own value": lambda: (
        kernels.without_own_value, numbers(BATCH, TOKENS, HEADS, HEAD), numbers(BATCH, TOKENS, GROUPS, HEAD),
    ),
    "nats": lambda: (nats(0.0), stream(), numbers(VOCABULARY, WIDTH, size=WIDTH**-0.5)),
    "nats, soft-capped": lambda: (nats(3.0), stream(), numbers(VOCABULARY, WIDTH, size=WIDTH**-0.5)),
}  # fmt: skip
"""By name, a function and what it is given; in bfloat16 it takes its kernel, in float32 its plain form."""


def errors(name):
    """By output and gradient of the case, how far the kernel is from the plain form, as a share of its length."""
    function, *inputs = KERNELS[name]()
    plain = [x.detach().float().requires_grad_() for x in inputs]
    outputs, expected = (function(*(x.clone() for x in tensors)) for tensors in (inputs, plain))  # may be written into
    if isinstance(outputs, torch.Tensor):
        outputs, expected = (outputs,), (expected,)
    pairs = [(x, y) for x, y in zip(outputs, expected, strict=True) if x is not None and x.numel()]
    incoming = [numbers(*y.shape, seed=place).detach() for place, (_, y) in enumerate(pairs)]
    torch.autograd.backward(
        [x for x, _ in pairs], [grad.to(x.dtype) for grad, (x, _) in zip(incoming, pairs, strict=True)]
    )
    torch.autograd.backward([y for _, y in pairs], [grad.float() for grad in incoming])
    found = {f"output {place}": relative_error(x, y) for place, (x, y) in enumerate(pairs)}
    return found | {
        f"gradient {place}": relative_error(x.grad, y.grad)
        for place, (x, y) in enumerate(zip(inputs, plain, strict=True))
    }
