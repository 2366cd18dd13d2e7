"""What quantisation must know of a trained model: what its matrices read, and how much the loss feels each of their rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.config import Config
from trainer.data import BOS, Dataset, TrainLoader
from trainer.distributed import World
from trainer.gptq import SecondMoments
from trainer.model import HEAD, Model
from trainer.optim import parameter_groups

# Dimensions: B sequences, T tokens of a sequence, M rows and N columns of a matrix.

SEED = 1  # added to the order's seed: calibration reads training data in an order of its own
ROW_STEP = 256  # of the lengths of rows while the model writes: each is compiled once
MARGIN = 1.2  # over the measured time of its parts: data has to be read, and sums to be exchanged


@dataclass(frozen=True)
class Calibration:
    """Averages over training data; empty where the configuration does not ask for them."""

    moments: dict[str, Tensor] = field(default_factory=dict)
    """Second moments (N, N) of what each matrix and the output head read, a position, by the matrix's name."""

    information: dict[str, Tensor] = field(default_factory=dict)
    """Of each row (M) of each matrix and table, by the parameter's name: the mean over its columns of the squared gradient
    of the loss, in nats² a position and unit of weight². The empirical Fisher information.
    """


def calibrate(
    model: Model, dataset: Dataset, *, config: Config, order_seed: int, recurrent: int, world: World
) -> Calibration:
    """Calibrate over all processes. What reads training data belongs to the training budget.

    Matrices that share an input share one tensor of moments.
    """
    loader = TrainLoader(dataset, sequence_length=config.data.sequence_length, seed=order_seed + SEED)

    def batch(sequences: int) -> Tensor:
        return world.moved(loader.next(sequences, world.rank, world.size))

    found = Calibration()
    if config.quant.method == "gptq":
        heard, sequences = SecondMoments(), config.data.tokens_per_step // config.data.sequence_length
        if config.quant.calibration == "generated":
            written = generate(model, config, recurrent, world)
            batches: Iterable[Tensor] = [written]
            positions = len(written) * world.size * config.data.sequence_length
        else:
            batches = (batch(sequences) for _ in range(config.quant.calibration_steps))
            positions = config.quant.calibration_steps * config.data.tokens_per_step
        for whole in batches:
            for part in whole.split(config.data.micro_batch_sequences):
                hear(model, part, recurrent, heard)
        for moment in heard.sums.values():
            world.sum(moment).div_(positions)
        found.moments[HEAD] = heard.sums[HEAD]
        found.moments.update({name: heard.sums[shared] for name, _, shared in model.matrices()})
    for _ in range(information_sequences(config, world)):
        feel(model, batch(world.size), recurrent, found.information)
    for squares in found.information.values():
        world.sum(squares).div_(information_sequences(config, world) * world.size * config.data.sequence_length)
    return found


@torch.no_grad()
def generate(model: Model, config: Config, recurrent: int, world: World) -> Tensor:
    """This process's share of the sequences that the model writes, each from a BOS on: (B, T + 1). #1019.

    The network reads rows of a few lengths only, filled up behind what is written: what comes later changes nothing.
    """
    length, rows = config.data.sequence_length, math.ceil(config.quant.generated_sequences / world.size)
    generator = torch.Generator(world.device).manual_seed(SEED + world.rank)
    written = torch.full((rows, length + 1), BOS, device=world.device)
    for place in range(1, length + 1):
        seen = min(length, math.ceil(place / ROW_STEP) * ROW_STEP)
        for part in written.split(config.data.micro_batch_sequences):
            hidden = model.hidden(part[:, :seen], recurrent)[:, place - 1 : place]
            chances = (model.logits(hidden)[:, 0] / config.quant.generated_temperature).softmax(-1)
            part[:, place] = chances.multinomial(1, generator=generator)[:, 0]
    return written


def information_sequences(config: Config, world: World) -> int:
    """Sequences whose gradients each process takes."""
    return math.ceil(config.quant.information_sequences / world.size) if config.quant.grid == "fisher" else 0


def hear(model: Model, part_BT: Tensor, recurrent: int, heard: SecondMoments) -> None:
    """Let `heard` hear what the matrices read."""
    with torch.no_grad():
        model.hidden(part_BT[:, :-1], recurrent, observe=heard)


def feel(model: Model, sequence_1T: Tensor, recurrent: int, squares: dict[str, Tensor]) -> None:
    """Add the squared gradient of one sequence's summed loss, the mean over columns, to `squares`.

    One sequence at a time: gradients of positions of a long batch would cancel, and what is left would be their mean.
    """
    vectors = {id(parameter) for parameter in parameter_groups(model)["scalar"]}
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if id(p) not in vectors), strict=True)
    loss = model(sequence_1T[:, :-1], sequence_1T[:, 1:], recurrent) * (sequence_1T.size(1) - 1)
    for name, gradient in zip(names, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True):
        square = gradient.float().square().mean(1)
        squares[name] = squares[name].add_(square) if name in squares else square


def calibration_seconds(model: Model, batch_BT: Tensor, config: Config, world: World) -> float:
    """Seconds that calibration will take, from a micro-batch of the run's shape, the slowest process's."""
    seconds, recurrent = 0.0, config.model.recurrence_passes
    if config.quant.method == "gptq" and config.quant.calibration == "training":
        sequences = config.data.tokens_per_step // config.data.sequence_length // world.size
        parts = math.ceil(sequences / len(batch_BT)) * config.quant.calibration_steps
        seconds += parts * _second_time(lambda: hear(model, batch_BT, recurrent, SecondMoments()), world)
    if config.quant.grid == "fisher":
        sequences = information_sequences(config, world)
        seconds += sequences * _second_time(lambda: feel(model, batch_BT[:1], recurrent, {}), world)
    return world.largest(seconds) * MARGIN


def _second_time(action: Callable[[], None], world: World) -> float:
    for _ in range(2):
        world.synchronize()
        started = time.perf_counter()
        action()
        world.synchronize()
    return time.perf_counter() - started
