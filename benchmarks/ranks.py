"""What several GPUs of one host make of a configuration: time and efficiency of a step, its exchanges, equal weights.

    torchrun --standalone --nproc_per_node=N -m benchmarks.ranks [--preset pr1326] [--set KNOB=VALUE ...] [--repeats 5]

Every process takes part in the steps; the first one then makes the same step alone, while the others wait: efficiency is
its time over N times theirs, on the same host in the same call. Exchanges are timed alone, with all gradients ready, so they
are what a step would pay if nothing hid them. Then the processes adapt to random chunks, and the SHA-256 of all weights after
each must be the same everywhere. Prints a page in Markdown. Without GPUs it runs on processors, through gloo.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from benchmarks.trainer import ceilings, depth
from orchestrator.assignments import parse_settings
from orchestrator.presets import load_preset
from trainer.attention import fastest_kernels
from trainer.config import Config, with_knobs
from trainer.distributed import World, start_world
from trainer.errors import CaddieError
from trainer.evaluate import Stream
from trainer.main import build_model
from trainer.model import Model
from trainer.muon import muon_update
from trainer.optim import Optimizers, WeightAverage
from trainer.train import Network, depths, random_batch, sequences_per_process
from trainer.ttt import ChunkAdapter

LR_SCALE = 1e-6  # the weights stay where they are, nearly
MOMENTUM = 0.95
STEPS_A_SAMPLE = 3  # one after the other, as in a run
CHUNKS = 3  # to adapt to


@dataclass(frozen=True)
class Timer:
    """Median milliseconds of what all processes of a world do together, from a common start to the last one's end."""

    world: World
    repeats: int

    def __call__(self, action: Callable[[], object], *, times: int = 1) -> float:
        found = []
        for number in range(self.repeats + 1):  # the first one warms up
            self.world.synchronize()
            self.world.largest(0.0)  # a barrier on the CPU
            started = time.perf_counter()
            for _ in range(times):
                action()
            self.world.synchronize()
            took = self.world.largest(time.perf_counter() - started)
            if number:
                found.append(took / times)
        return 1e3 * statistics.median(found)


class Steps:
    """A model, ready to make whole steps in a world."""

    def __init__(self, config: Config, world: World) -> None:
        torch.manual_seed(42)
        self.model = build_model(config, world)
        self.batch = random_batch(config, world)
        self.network = Network(self.model, config, world)
        self.network.prepare()
        self.optimizers = Optimizers(self.model, config.optim, world, self.network.gradients)
        self.average = WeightAverage(self.model, config.optim.ema_decay)

    def step(self, recurrent: int) -> None:
        self.network.backward(self.batch, recurrent)
        self.optimizers.step(lr_scale=LR_SCALE, momentum=MOMENTUM)
        self.average.update()

    def times(self, timer: Timer) -> dict[int, float]:
        """Milliseconds of a step, by `recurrent`."""
        recurrents = depths(self.network.config)
        return {value: timer(functools.partial(self.step, value), times=STEPS_A_SAMPLE) for value in recurrents}


def weights_hash(model: Model) -> str:
    """SHA-256 of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def gathered(world: World, text: str) -> list[str]:
    """A text of every process, by rank."""
    if world.size == 1:
        return [text]
    found: list[str | None] = [None] * world.size
    dist.all_gather_object(found, text, group=world.control)
    return [str(one) for one in found]


def steps(config: Config, world: World, repeats: int) -> Iterator[str]:
    """Whole steps by all, then by the first alone, and what the exchanges take."""
    shared, timer = Steps(config, world), Timer(world, repeats)
    together, peak = shared.times(timer), world.largest(world.peak_memory_bytes())
    exchanges, hashes = list(exchange_lines(shared, config, timer)), gathered(world, weights_hash(shared.model))
    del shared  # the first process needs room for all micro-batches
    alone: dict[int, float] = {}
    if world.is_first:
        single = World(rank=0, size=1, device=world.device)
        alone = Steps(config, single).times(Timer(single, repeats))
    world.largest(0.0)  # the others wait here
    yield f"\n## Steps of {config.data.tokens_per_step:,} tokens\n"
    yield f"| layers | ms on {world.size} | tokens/s | ms on one | efficiency |\n|---|---|---|---|---|"
    for recurrent, took in together.items():
        rate = 1e3 * config.data.tokens_per_step / took
        one = alone.get(recurrent, 0.0)
        yield f"| {depth(config, bool(recurrent))} | {took:.1f} | {rate:,.0f} | {one:.1f} | {one / took / world.size:.1%} |"
    yield f"\nPeak memory of the fullest: {peak / 2**30:.1f} GiB. Weights after these steps: {told(hashes)}."
    yield from exchanges


def exchange_lines(shared: Steps, config: Config, timer: Timer) -> Iterator[str]:
    """Milliseconds of a step's parts, those that exchange something beside the same without others."""
    gradients, muon, world = shared.network.gradients, shared.optimizers.muon, timer.world

    def sums() -> None:
        gradients.summed(config.optim.grad_clip_norm)

    shares = gradients.summed(config.optim.grad_clip_norm)

    def updates() -> list[torch.Tensor]:
        return [
            muon_update(
                grad, buffer, momentum=MOMENTUM, steps=config.optim.newton_schulz_steps,
                row_normalize=config.optim.muon_row_normalize,
            )
            for grad, buffer in zip(shares, muon.buffers, strict=True)
        ]  # fmt: skip

    made = updates()
    numbers, travelling = gradients.all.numel(), sum(update.numel() for update in made) * world.size
    yield "\n| part of a step | ms |\n|---|---|"
    yield f"| gradients summed and clipped, {4 * numbers / 1e6:.1f} MB a process | {timer(sums):.2f} |"
    with torch.no_grad():
        yield f"| updates of a process's share of the matrices | {timer(updates):.2f} |"
        took = timer(lambda: [sent.arrived() for sent in [world.begin_gather(update) for update in made]])
        yield f"| updates exchanged, {made[0].element_size() * travelling / 1e6:.1f} MB in all | {took:.2f} |"
    yield f"| Muon's step: updates, exchange, weights moved | {timer(lambda: muon.step(shares, 0.0, MOMENTUM)):.2f} |"


def adaptation(config: Config, world: World) -> Iterator[str]:
    """Test-time training on random chunks: weights by process after each chunk."""
    ttt = replace(config.ttt, method="sgd")
    torch.manual_seed(42)
    model = build_model(config, world)
    tokens = torch.randint(
        config.model.vocab_size, (CHUNKS * ttt.chunk_tokens + 1,), generator=torch.Generator().manual_seed(1)
    )
    stream = Stream(tokens.int().to(world.device), torch.ones(len(tokens) - 1, dtype=torch.int16).to(world.device))
    recurrent = depths(config)[-1]
    length = min(config.evaluation.sequence_length, ttt.chunk_tokens)
    adapter = ChunkAdapter(model, stream, config=ttt, length=length, recurrent=recurrent, world=world)
    yield f"\n## Adapting to chunks of {ttt.chunk_tokens:,} tokens, the first with its recording\n\n| chunk | ms | weights |\n|---|---|---|"
    for chunk in range(CHUNKS):
        started, first = time.perf_counter(), chunk * ttt.chunk_tokens
        adapter.learn(first, first + ttt.chunk_tokens, chunk=chunk, chunks=CHUNKS + 1)
        world.synchronize()
        took = world.largest(time.perf_counter() - started)
        yield f"| {chunk} | {1e3 * took:.1f} | {told(gathered(world, weights_hash(model)))} |"


def told(hashes: list[str]) -> str:
    """Whether all are one."""
    if len(set(hashes)) == 1:
        return f"equal on {len(hashes)}, {hashes[0][:16]}"
    return "**different**: " + ", ".join(one[:16] for one in hashes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pr1326")
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE", dest="settings")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    try:
        config = with_knobs(load_preset(options.preset), parse_settings(options.settings))
        world = start_world(config.runtime)
        sequences_per_process(config, world)
    except CaddieError as error:
        parser.error(f"{error}; {error.hint}" if error.hint else str(error))
    is_gpu = world.device.type == "cuda"

    def show(line: str) -> None:
        if world.is_first:
            print(line, flush=True)

    device = torch.cuda.get_device_name(world.device) if is_gpu else "processor"
    show(f"{world.size} × {device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    with fastest_kernels():
        if is_gpu:
            for line in ceilings() if world.is_first else ():
                show(line)
            world.largest(0.0)
        for line in itertools.chain(steps(config, world, options.repeats), adaptation(config, world)):
            show(line)
    world.largest(0.0)  # nobody leaves while another still listens
    world.close()


if __name__ == "__main__":
    main()
