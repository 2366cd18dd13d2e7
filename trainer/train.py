"""The training loop: undone warm-up, wall-clock or step schedule, recurrence switched on under way, calibration."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config import Config
from trainer.data import Dataset, TrainLoader
from trainer.distributed import World
from trainer.errors import CaddieError, ConfigError
from trainer.gptq import second_moments
from trainer.model import Model
from trainer.optim import Optimizers, WeightAverage
from trainer.protocol import PHASE, EventLog
from trainer.schedule import elapsed_fraction, is_recurrent, lr_multiplier, muon_momentum

# Dimensions: B sequences, T tokens of a sequence.

FIRST_STEPS = 10  # always logged: a broken run shows here, before it has cost anything
STEP_TAIL = 32  # steps whose slowest one must still fit into the budget
CALIBRATION_SEED = 1  # added to the order's seed: calibration reads training data in an order of its own


class NotFiniteError(CaddieError):
    """The loss became infinite or not a number."""


@dataclass(frozen=True)
class Outcome:
    """How training ended."""

    steps: int
    tokens: int
    train_seconds: float
    final_train_loss: float
    is_recurrent: bool
    """Whether the repeated layers were on at the end: the model is scored as it was trained."""

    was_stopped: bool


class TrainClock:
    """Seconds in the training loop. Follows the GPU one step behind, so that reading it does not empty the GPU's queue."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.pending: torch.cuda.Event | None = None
        self.step_seconds: deque[float] = deque(maxlen=STEP_TAIL)
        world.synchronize()
        self.started = self.last = time.perf_counter()

    def tick(self) -> None:
        """Mark the end of a step."""
        if self.world.device.type == "cuda":
            if self.pending is not None:
                self.pending.synchronize()
            self.pending = torch.cuda.Event()
            self.pending.record()
        now = time.perf_counter()
        self.step_seconds.append(now - self.last)
        self.last = now

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def next_step_end(self) -> float:
        """When a step as slow as the slowest recent one would end."""
        return self.seconds() + max(self.step_seconds, default=0.0)


class Network(nn.Module):
    """The model as training calls it: compiled, and with gradients averaged over the processes."""

    def __init__(self, model: Model, config: Config, world: World) -> None:
        super().__init__()
        self.config, self.world = config, world
        forward = cast(nn.Module, torch.compile(model, dynamic=False)) if config.runtime.compile else model
        devices = [world.device.index] if world.device.type == "cuda" else None
        self.forward_pass = DistributedDataParallel(forward, device_ids=devices) if world.size > 1 else forward

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, recurrent: bool) -> Tensor:
        with self.world.autocast(self.config.runtime):
            loss: Tensor = self.forward_pass(tokens_BT, targets_BT, recurrent)
        return loss

    def backward(self, batch_BT: Tensor, recurrent: bool) -> Tensor:
        """Accumulate the gradients of this process's sequences in micro-batches; returns their mean loss."""
        parts = batch_BT.tensor_split(math.ceil(len(batch_BT) / self.config.data.micro_batch_sequences))
        total = torch.zeros((), device=self.world.device)
        for number, part in enumerate(parts, start=1):
            if isinstance(self.forward_pass, DistributedDataParallel):
                self.forward_pass.require_backward_grad_sync = number == len(parts)
            loss = self(part[:, :-1], part[:, 1:], recurrent) * (len(part) / len(batch_BT))
            loss.backward()
            total += loss.detach()
        return total


def sequences_per_process(config: Config, world: World) -> int:
    """Sequences of one step that fall to each process; raises ConfigError where they do not divide."""
    sequences = config.data.tokens_per_step // config.data.sequence_length
    if sequences % world.size:
        raise ConfigError(
            f"data.tokens_per_step holds {sequences} sequences, which {world.size} processes cannot share equally",
            hint="take a number of GPUs that divides it",
        )
    return sequences // world.size


def warm_up(model: Model, network: Network, config: Config, world: World) -> None:
    """Run steps on random tokens through both graphs and undo them: weights as before, optimiser state dropped."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizers = Optimizers(model, config.optim, world)
    generator = torch.Generator().manual_seed(0)
    shape = (sequences_per_process(config, world), config.data.sequence_length + 1)
    for recurrent in (False, True) if config.model.has_recurrence else (False,):
        for _ in range(config.schedule.warmup_steps):
            batch = torch.randint(config.model.vocab_size, shape, generator=generator).to(world.device)
            network.backward(batch, recurrent)
            optimizers.step(lr_scale=1.0, momentum=config.optim.muon_momentum_start)
    with torch.no_grad():
        for parameter, saved in zip(model.parameters(), before, strict=True):
            parameter.copy_(saved)


def order_seed(config: Config, seed: int) -> int:
    """Seed of the order of the training data."""
    return seed if config.data.order_seed < 0 else config.data.order_seed


def train(
    model: Model, network: Network, dataset: Dataset, *, config: Config, seed: int, world: World, log: EventLog,
    stop_asked: Callable[[], bool],
) -> Outcome:  # fmt: skip
    """Train until the budget, the last step or a stop; leaves the averaged weights in the model. Raises NotFiniteError."""
    schedule = config.schedule
    loader = TrainLoader(dataset, sequence_length=config.data.sequence_length, seed=order_seed(config, seed))
    sequences = sequences_per_process(config, world) * world.size
    optimizers = Optimizers(model, config.optim, world)
    average = WeightAverage(model, config.optim.ema_decay)
    budget_seconds = config.limits.train_seconds - config.limits.reserve_seconds
    step, recurrent, was_stopped, loss = 0, False, False, torch.tensor(math.nan)
    clock = TrainClock(world)

    while step < schedule.steps:
        # The first process's clock and signals decide for all.
        seconds, step_end, wants_stop = world.agree(clock.seconds(), clock.next_step_end(), float(stop_asked()))
        was_stopped = bool(wants_stop)
        if was_stopped or (schedule.clock == "time" and step and step_end > budget_seconds):
            break
        frac = elapsed_fraction(step, seconds, schedule=schedule, budget_seconds=budget_seconds)
        lr_scale = lr_multiplier(frac, warmdown_frac=schedule.warmdown_frac, floor=schedule.lr_floor)
        momentum = muon_momentum(step, config.optim)
        if config.model.has_recurrence and not recurrent and is_recurrent(step, frac, schedule):
            recurrent = True
            log.emit(
                PHASE,
                name="recurrence",
                state="on",
                step=step,
                train_seconds=round(seconds, 4),
                layers=model.layer_order(True),
            )

        batch = loader.next(sequences, world.rank, world.size)
        loss = network.backward(batch.to(world.device, non_blocking=True), recurrent)
        optimizers.step(lr_scale=lr_scale, momentum=momentum)
        average.update()
        step += 1
        clock.tick()

        if step <= FIRST_STEPS or step % schedule.log_every == 0 or step == schedule.steps:
            train_loss = float(world.sum(loss.clone())) / world.size
            seconds = clock.seconds()
            frac = elapsed_fraction(step, seconds, schedule=schedule, budget_seconds=budget_seconds)
            log.metrics(
                step, seconds, train_loss=train_loss, elapsed_frac=frac, lr_scale=lr_scale, muon_momentum=momentum,
                tokens_per_second=step * config.data.tokens_per_step / seconds,
            )  # fmt: skip
            if not math.isfinite(train_loss):
                raise NotFiniteError(
                    f"training loss is {train_loss} at step {step}", hint="lower optim.matrix_lr or optim.embedding_lr"
                )

    world.synchronize()
    train_seconds = clock.seconds()
    final_train_loss = float(world.sum(loss.to(world.device).clone())) / world.size
    average.apply()
    return Outcome(
        steps=step, tokens=step * config.data.tokens_per_step, train_seconds=train_seconds,
        final_train_loss=final_train_loss, is_recurrent=recurrent, was_stopped=was_stopped,
    )  # fmt: skip


def calibrate(
    model: Model, dataset: Dataset, *, config: Config, seed: int, recurrent: bool, world: World
) -> dict[str, Tensor]:
    """Second moments of the inputs of every quantised matrix, by matrix name, per position, over all processes.

    Matrices that share an input share one tensor. Reads training data, so its time belongs to the training budget.
    """
    loader = TrainLoader(
        dataset, sequence_length=config.data.sequence_length, seed=order_seed(config, seed) + CALIBRATION_SEED
    )
    source = {name: shared for name, _, shared in model.matrices()}
    modules: dict[str, Any] = {name: module for name, module, shared in model.matrices() if name == shared}
    sequences = sequences_per_process(config, world) * world.size
    with second_moments(modules) as moments, torch.no_grad(), world.autocast(config.runtime):
        for _ in range(config.quant.calibration_steps):
            batch = loader.next(sequences, world.rank, world.size).to(world.device)
            for part in batch.split(config.data.micro_batch_sequences):
                model.hidden(part[:, :-1], recurrent)
    positions = config.quant.calibration_steps * config.data.tokens_per_step
    for moment in moments.values():
        world.sum(moment).div_(positions)
    return {name: moments[shared] for name, shared in source.items()}
