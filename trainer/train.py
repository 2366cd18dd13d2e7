"""The training loop: undone warm-up, wall-clock or step schedule, recurrence switched on under way."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.calibration import calibration_seconds
from trainer.checkpoint import Checkpoint, State
from trainer.config import Config
from trainer.data import Dataset, TrainLoader
from trainer.distributed import World
from trainer.errors import CaddieError, ConfigError
from trainer.graphs import Recorded, compilations
from trainer.model import Model, begin_passes
from trainer.optim import Optimizers, WeightAverage, gradients_of
from trainer.protocol import PHASE, WARNING, EventLog
from trainer.schedule import elapsed_fraction, extra_passes, lr_multiplier, muon_momentum

# Dimensions: B sequences, T tokens of a sequence.

FIRST_STEPS = 10  # always logged: a broken run shows here, before it has cost anything
STEP_TAIL = 32  # steps whose slowest one must still fit into the budget


class NotFiniteError(CaddieError):
    """The loss became infinite or not a number."""


@dataclass(frozen=True)
class Outcome:
    """How training ended."""

    steps: int
    tokens: int
    train_seconds: float
    final_train_loss: float
    recurrent: int
    """Extra passes through the repeated layers at the end: the model is scored as it was trained."""

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

    def go_on(self, seconds: float, step_seconds: Iterable[float]) -> None:
        """Count on from what earlier attempts took, in all and for their latest steps."""
        self.step_seconds.extend(step_seconds)
        self.last = time.perf_counter()
        self.started = self.last - seconds

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def next_step_end(self) -> float:
        """When one more step would end if it, and the step that is still under way, took as long as the slowest recent one."""
        return self.seconds() + (1 + (self.pending is not None)) * max(self.step_seconds, default=0.0)


class Network:
    """The model as training calls it: in micro-batches, each a replay of one recording, into gradients that stay in place."""

    def __init__(self, model: Model, config: Config, world: World) -> None:
        self.model, self.config, self.world = model, config, world
        self.gradients = gradients_of(model, config.optim, world)
        self.accumulate = Recorded(self._accumulate, is_pure=False)

    def _accumulate(self, tokens_BT: Tensor, weight: Tensor, *, recurrent: int) -> Tensor:
        """Add the gradient of `weight` times the mean loss of these sequences to the gradients; the mean loss."""
        loss: Tensor = self.model(tokens_BT[:, :-1], tokens_BT[:, 1:], recurrent)
        loss.backward(weight)
        return loss.detach()

    def parts(self, batch_BT: Tensor) -> list[tuple[Tensor, float]]:
        """Micro-batches, and the share of the batch that each is."""
        parts = batch_BT.tensor_split(math.ceil(len(batch_BT) / self.config.data.micro_batch_sequences))
        return [(part, len(part) / len(batch_BT)) for part in parts]

    def prepare(self) -> None:
        """Compile and record what the steps need, in both depths; leaves the gradients at zero."""
        sizes = {len(part): part for part, _ in self.parts(random_batch(self.config, self.world))}
        for recurrent in depths(self.config):
            for part in sizes.values():
                self.accumulate.record(part, torch.ones((), device=part.device), recurrent=recurrent)
        self.gradients.all.zero_()

    def backward(self, batch_BT: Tensor, recurrent: int) -> Tensor:
        """Accumulate this process's share of the gradient of the step's mean loss; returns its sequences' mean loss."""
        total = torch.zeros((), device=self.world.device)
        for part, share in self.parts(batch_BT):
            weight = torch.full((), share / self.world.size, device=self.world.device)
            total += share * self.accumulate(part, weight, recurrent=recurrent)
        return total

    def surprises(self) -> int:
        """What was compiled, or had to run without a recording, so far: none of it belongs into a timed step."""
        return compilations() + self.accumulate.misses


def sequences_per_process(config: Config, world: World) -> int:
    """Sequences of one step that fall to each process; raises ConfigError where they do not divide."""
    sequences = config.data.tokens_per_step // config.data.sequence_length
    if sequences % world.size:
        raise ConfigError(
            f"data.tokens_per_step holds {sequences} sequences, which {world.size} processes cannot share equally",
            hint="take a number of GPUs that divides it",
        )
    return sequences // world.size


def depths(config: Config) -> list[int]:
    """Values of `recurrent` that a run goes through."""
    if not config.model.has_recurrence:
        return [0]
    most = config.model.recurrence_passes
    return [0, most] if not config.schedule.recurrence_full_frac or most == 1 else [0, 1, most]


def random_batch(config: Config, world: World) -> Tensor:
    """Random tokens in the shape of this process's share of a step."""
    shape = (sequences_per_process(config, world), config.data.sequence_length + 1)
    return torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(world.device)


def warm_up(model: Model, network: Network, config: Config, world: World) -> float:
    """Take steps on random tokens in both depths, and one calibration, and undo them: weights as before, no optimiser state.

    Returns the seconds that the run's calibration will take.
    """
    before = [parameter.detach().clone() for parameter in model.parameters()]
    micro_batch, _ = network.parts(random_batch(config, world))[0]
    optimizers = Optimizers(model, config.optim, world, network.gradients)
    for recurrent in depths(config):
        for _ in range(config.schedule.warmup_steps):
            network.backward(micro_batch, recurrent)
            optimizers.step(lr_scale=1.0, momentum=config.optim.muon_momentum_start)
    with torch.no_grad():
        for parameter, saved in zip(model.parameters(), before, strict=True):
            parameter.copy_(saved)
    return calibration_seconds(model, micro_batch, config, world)


def reserve_seconds(config: Config, calibration_seconds: float) -> float:
    """Seconds of a timed budget that training leaves to calibration; raises ConfigError where nothing would be left."""
    limits = config.limits
    reserve = max(limits.reserve_seconds, calibration_seconds)
    if config.schedule.clock == "time" and reserve >= limits.train_seconds:
        raise ConfigError(
            f"calibration would take {calibration_seconds:.1f} s, limits.train_seconds is {limits.train_seconds:g}",
            hint="lower quant.calibration_steps, or raise limits.train_seconds",
        )
    return reserve


def order_seed(config: Config, seed: int) -> int:
    """Seed of the order of the training data."""
    return seed if config.data.order_seed < 0 else config.data.order_seed


def train(
    model: Model, network: Network, dataset: Dataset, *, config: Config, seed: int, world: World, log: EventLog,
    reserve: float, stop_asked: Callable[[], bool], checkpoint: Checkpoint | None = None,
    validate: Callable[[int], float] | None = None,
) -> Outcome:  # fmt: skip
    """Train until the budget less the reserve (in seconds), the last step or a stop; leaves the averaged weights in the model.

    With a checkpoint it goes on from there, and keeps another where it ends: what follows may be cut off too. `validate`
    gives the present weights' loss on validation text, asked for as often as the schedule says, with the clock stopped.
    Raises NotFiniteError.
    """
    schedule = config.schedule
    loader = TrainLoader(dataset, sequence_length=config.data.sequence_length, seed=order_seed(config, seed))
    sequences = sequences_per_process(config, world) * world.size
    optimizers = Optimizers(model, config.optim, world, network.gradients)
    average = WeightAverage(model, config.optim.ema_decay)
    budget_seconds = config.limits.train_seconds - reserve
    step, recurrent, was_stopped, loss, validated = 0, 0, False, torch.tensor(math.nan), 0
    surprises = network.surprises()
    state = State(model, optimizers, average, world) if checkpoint else None
    reached = checkpoint.restored(state) if checkpoint and state else None
    if reached:
        loader.skip(reached.step, sequences)
        step, recurrent, loss = reached.step, reached.recurrent, torch.tensor(reached.loss)
    clock = TrainClock(world)
    if reached:
        clock.go_on(sum(reached.seconds.values()), reached.step_seconds)

    while step < schedule.steps:
        # The first process's clock and signals decide for all.
        seconds, step_end, wants_stop = world.agree(clock.seconds(), clock.next_step_end(), float(stop_asked()))
        was_stopped = bool(wants_stop)
        if was_stopped or (schedule.clock == "time" and step and step_end > budget_seconds):
            break
        frac = elapsed_fraction(step, seconds, schedule=schedule, budget_seconds=budget_seconds)
        lr_scale = lr_multiplier(frac, warmdown_frac=schedule.warmdown_frac, floor=schedule.lr_floor)
        momentum = muon_momentum(step, config.optim)
        if config.model.has_recurrence and extra_passes(step, frac, config) > recurrent:
            recurrent = extra_passes(step, frac, config)
            if config.model.untied_mlps:
                begin_passes(model)
            log.emit(
                PHASE,
                name="recurrence",
                state="on",
                step=step,
                train_seconds=round(seconds, 4),
                layers=model.layer_order(recurrent),
            )

        if config.schedule.validations and validate and int(frac * (schedule.validations + 1)) > validated:
            validated, began = int(frac * (schedule.validations + 1)), clock.seconds()
            log.metrics(step, seconds, val_loss=validate(recurrent), elapsed_frac=frac)
            clock.go_on(began, ())
            surprises = network.surprises()

        batch = world.moved(loader.next(sequences, world.rank, world.size))
        loss = network.backward(batch, recurrent)
        optimizers.step(lr_scale=lr_scale, momentum=momentum)
        average.update()
        step += 1
        clock.tick()
        if network.surprises() > surprises:
            surprises = network.surprises()
            log.emit(WARNING, name="recompiled", step=step, seconds=clock.step_seconds[-1])

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
    if checkpoint and state and step:
        checkpoint.keep(
            state, step=step, recurrent=recurrent, train_seconds=train_seconds, step_seconds=clock.step_seconds,
            loss=final_train_loss,
        )  # fmt: skip
    average.apply()
    return Outcome(
        steps=step, tokens=step * config.data.tokens_per_step, train_seconds=train_seconds,
        final_train_loss=final_train_loss, recurrent=recurrent, was_stopped=was_stopped,
    )  # fmt: skip
