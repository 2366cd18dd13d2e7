"""Speed of the record configuration on one GPU, beside the plain path and the ceilings of the same call.

    python -m benchmarks.trainer [--data DIR] [--steps N] [--parts ceilings,speed,plain,scoring,curve]

Prints a page in Markdown. With `--data` (SP4096), `curve` trains both paths on the same batches from the same weights, and
the fused one from another seed, to show what their losses have in common. A full run's phases are in its own result.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.plain import PlainTrainer
from trainer.attention import fastest_kernels
from trainer.config import Config
from trainer.data import Dataset, TrainLoader
from trainer.distributed import World
from trainer.graphs import Recorded
from trainer.model import Model
from trainer.optim import Optimizers, WeightAverage
from trainer.schedule import muon_momentum
from trainer.train import Network, random_batch

GB, TERA = 1e9, 1e12
PARTS = ("ceilings", "speed", "plain", "scoring", "curve")
KINDS = (  # of kernels, by what their names hold, the first that fits
    ("attention", ("sdpa", "fmha", "flash", "dot_do_o", "convert_dq")),
    ("fused MLP products", ("_product_kernel",)),
    ("products", ("nvjet", "gemm", "cutlass", "splitK")),
    ("element-wise, Triton", ("_combine", "_turn", "_own", "_nats", "triton_")),
)
PRODUCTS = ((98_304, 512, 2_048), (98_304, 2_048, 512), (98_304, 512, 1_024), (8_192, 8_192, 8_192))
PLATEAU_LR, CURVE_MARKS = 0.02, (1, 2, 5, 10, 20, 50, 100, 150, 200, 250, 300)


def milliseconds(action: Callable[[], object], *, repeats: int = 5, warm: int = 2, times: int = 1) -> float:
    """Median time of an action, `times` of it one after the other without waiting for the device in between."""
    found = []
    for number in range(warm + repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(times):
            action()
        torch.cuda.synchronize()
        if number >= warm:
            found.append((time.perf_counter() - started) / times)
    return 1e3 * statistics.median(found)


def kernels(action: Callable[[], object]) -> dict[str, float]:
    """Milliseconds on the GPU by kind of kernel."""
    action()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        action()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profile.key_averages():
        kind = next((kind for kind, words in KINDS if any(word in event.key for word in words)), "other")
        found[kind] = found.get(kind, 0.0) + event.device_time_total / 1e3
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def fresh_model(config: Config, world: World, *, seed: int = 42) -> Model:
    torch.manual_seed(seed)
    model = Model(config.model, train_length=config.data.sequence_length, precision=torch.bfloat16)
    return model.to(world.device)


def ceilings() -> Iterator[str]:
    """What this card gives in this call."""
    yield "## Ceilings of this call\n\n| what | rate |\n|---|---|"
    for rows, inner, columns in PRODUCTS:
        x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(columns, inner, device="cuda", dtype=torch.bfloat16)
        took = milliseconds(lambda x=x, weight=weight: F.linear(x, weight), times=10)  # type: ignore[misc]
        yield f"| {rows:,} × {inner:,} × {columns:,} in bfloat16 | {2 * rows * inner * columns / took * 1e3 / TERA:.0f} TFLOP/s |"
    source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source))
    yield f"| copy on the device, read and written | {2 * source.numel() / took * 1e3 / TERA:.2f} TB/s |"


def depth(config: Config, recurrent: bool) -> int:
    """Layers that run, repeated ones counted each time."""
    return config.model.layers + recurrent * len(config.model.recurrence_layers) * config.model.recurrence_passes


def flops_of_step(config: Config, *, recurrent: bool) -> float:
    """Floating-point operations of one step's products and attention, forward and backward (twice forward)."""
    model, layers = config.model, depth(config, recurrent)
    matrices = layers * model.width * (2 * model.width + 2 * model.kv_heads * model.head_dim + 2 * model.hidden)
    matrices += model.width * model.vocab_size
    attention = layers * model.width * config.data.sequence_length  # both products, half of them masked
    return 6.0 * config.data.tokens_per_step * (matrices + attention)


def report_step(config: Config, name: str, recurrent: bool, took: float) -> str:
    rate = config.data.tokens_per_step / took * 1e3
    flops = flops_of_step(config, recurrent=recurrent) / took * 1e3 / TERA
    return f"| {name}, {depth(config, recurrent)} layers | {took:.1f} | {rate / 1e6:.3f} | {flops:.0f} |"


def speed(config: Config, world: World, found: dict[tuple[str, bool], float]) -> Iterator[str]:
    """Whole steps of our own path: micro-batches, optimisers, weight average."""
    model, batch = fresh_model(config, world), random_batch(config, world)
    model.compile_parts()
    torch.cuda.reset_peak_memory_stats()
    network = Network(model, config, world)
    started = time.perf_counter()
    network.prepare()
    torch.cuda.synchronize()
    ready = time.perf_counter() - started
    optimizers = Optimizers(model, config.optim, world, network.gradients)
    average = WeightAverage(model, config.optim.ema_decay)

    def step(recurrent: bool) -> None:
        network.backward(batch, recurrent)
        optimizers.step(lr_scale=1e-6, momentum=0.95)
        average.update()

    yield "\n## Steps of 786,432 tokens\n\n| path | ms | million tokens/s | TFLOP/s in products and attention |\n|---|---|---|---|"
    for recurrent in (False, True):
        found["fused", recurrent] = milliseconds(lambda recurrent=recurrent: step(recurrent), warm=1, times=3)  # type: ignore[misc]
        yield report_step(config, "fused", recurrent, found["fused", recurrent])
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
    yield f"\nFused: peak {peak / 2**30:.1f} GiB ({reserved / 2**30:.1f} GiB reserved); compiled and recorded in {ready:.1f} s.\n"
    tokens = batch[: config.data.micro_batch_sequences]
    weight = torch.ones((), device=world.device)
    yield "| part, fused, 11 layers | ms |\n|---|---|"
    parts = kernels(lambda: network.accumulate(tokens, weight, recurrent=False))
    yield from (f"| one micro-batch: {kind} | {took:.2f} |" for kind, took in parts.items())
    yield f"| optimisers of one step | {milliseconds(lambda: optimizers.step(lr_scale=1e-6, momentum=0.95)):.2f} |"
    yield f"| weight average | {milliseconds(average.update):.2f} |"


def plain(config: Config, world: World, found: dict[tuple[str, bool], float]) -> Iterator[str]:
    """The same steps by the plain path, and how the two compare."""
    trainer, batch = plain_trainer(config, world, lr=1e-7), random_batch(config, world)
    parts = batch.split(config.data.micro_batch_sequences)

    def step(recurrent: bool) -> None:
        for part in parts:
            trainer.accumulate(part, recurrent, 1 / len(parts))
        trainer.update()

    yield "\n| path | ms | million tokens/s | TFLOP/s in products and attention |\n|---|---|---|---|"
    torch.cuda.reset_peak_memory_stats()
    for recurrent in (False, True):
        found["plain", recurrent] = milliseconds(lambda recurrent=recurrent: step(recurrent), warm=1, times=3)  # type: ignore[misc]
        yield report_step(config, "plain", recurrent, found["plain", recurrent])
    yield f"\nPlain: peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB.\n"
    parts_ms = kernels(lambda: trainer.accumulate(parts[0], False, 1.0))
    yield "| part, plain, 11 layers | ms |\n|---|---|"
    yield from (f"| one micro-batch: {kind} | {took:.2f} |" for kind, took in parts_ms.items())
    for recurrent in (False, True):
        if ("fused", recurrent) in found:
            ratio = found["plain", recurrent] / found["fused", recurrent]
            yield f"\nFused over plain, {depth(config, recurrent)} layers: **{ratio:.3f}**"


def plain_trainer(config: Config, world: World, *, lr: float = PLATEAU_LR) -> PlainTrainer:
    return PlainTrainer(
        fresh_model(config, world), momentum=config.optim.muon_momentum_start, lr=lr,
        weight_decay=config.optim.muon_weight_decay, ema_decay=config.optim.ema_decay,
    )  # fmt: skip


def scoring(config: Config, world: World) -> Iterator[str]:
    """Windows through the recorded scorer, with recurrence on."""
    model, length = fresh_model(config, world).eval(), config.evaluation.sequence_length
    model.compile_parts()
    scorer = Recorded(model.nats, is_pure=True)
    yield "\n## Scoring, 13 layers\n\n| windows at once | positions scored in each | ms | million tokens/s read |\n|---|---|---|---|"
    for windows, scored in ((32, config.evaluation.stride), (32, length)):
        tokens = torch.randint(config.model.vocab_size, (windows, length + 1), device=world.device)
        with torch.no_grad():
            took = milliseconds(lambda t=tokens, s=scored: scorer(t[:, :-1], t[:, 1:], recurrent=True, scored=s))  # type: ignore[misc]
        yield f"| {windows} | {scored} | {took:.2f} | {windows * length / took / 1e3:.2f} |"


def curve(config: Config, world: World, data: Path, steps: int) -> Iterator[str]:
    """Losses of both paths on the same batches, at the schedule's plateau, recurrence on for the second half."""
    dataset = Dataset.open(data, config.model.vocab_size)

    def batches() -> Iterator[tuple[int, torch.Tensor]]:
        loader = TrainLoader(dataset, sequence_length=config.data.sequence_length, seed=42)
        for step in range(steps):
            yield step, world.moved(loader.next(config.data.tokens_per_step // config.data.sequence_length))

    def fused(seed: int) -> list[float]:
        model = fresh_model(config, world, seed=seed)
        model.compile_parts()
        network = Network(model, config, world)
        network.prepare()
        optimizers = Optimizers(model, config.optim, world, network.gradients)
        losses = []
        for step, batch in batches():
            losses.append(network.backward(batch, step >= steps // 2))
            optimizers.step(lr_scale=1.0, momentum=muon_momentum(step, config.optim))
        return [float(loss) for loss in losses]

    def plain_losses() -> list[float]:
        trainer, losses = plain_trainer(config, world), []
        for step, batch in batches():
            trainer.momentum = muon_momentum(step, config.optim)
            parts = batch.split(config.data.micro_batch_sequences)
            told = [trainer.accumulate(part, step >= steps // 2, 1 / len(parts)) for part in parts]
            losses.append(torch.stack(told).mean())
            trainer.update()
        return [float(loss) for loss in losses]

    ours, other, theirs = fused(42), fused(314), plain_losses()
    yield f"\n## The same {steps} batches\n\n| step | fused, seed 42 | plain, seed 42 | fused, seed 314 |\n|---|---|---|---|"
    for mark in (mark for mark in (*CURVE_MARKS, steps) if mark <= steps):
        yield f"| {mark} | {ours[mark - 1]:.4f} | {theirs[mark - 1]:.4f} | {other[mark - 1]:.4f} |"
    tail = slice(steps * 3 // 4, None)

    def apart(first: list[float], second: list[float]) -> float:
        return statistics.fmean(a - b for a, b in zip(first[tail], second[tail], strict=True))

    yield f"\nMean over the last quarter: fused − plain {apart(ours, theirs):+.5f}, seed 42 − seed 314 {apart(ours, other):+.5f} nats."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a prepared data set with a vocabulary of 4,096")
    parser.add_argument("--steps", type=int, default=100, help="of the curve")
    parser.add_argument("--parts", default=",".join(PARTS))
    options = parser.parse_args()
    wanted = options.parts.split(",")
    world = World(rank=0, size=1, device=torch.device("cuda", 0))
    config = Config()
    found: dict[tuple[str, bool], float] = {}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "ceilings": ceilings,
        "speed": lambda: speed(config, world, found),
        "plain": lambda: plain(config, world, found),
        "scoring": lambda: scoring(config, world),
        "curve": lambda: curve(config, world, options.data, options.steps) if options.data else iter(()),
    }
    with fastest_kernels():
        for name, lines in parts.items():
            if name in wanted:
                for line in lines():
                    print(line, flush=True)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
