"""Checkpoints: training between two steps, kept by an attempt that has to leave for the next attempt of the same run.

What follows from the spec is made again and not stored: the order of the data is drawn anew up to the step, and training
draws no other random number. The file is NumPy's .npz without pickles; its members carry checksums.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.distributed import World
from trainer.errors import StorageError
from trainer.model import Model
from trainer.optim import Optimizers, WeightAverage
from trainer.protocol import CHECKPOINT, KEPT, RESTORED, WARNING, AttemptDir, EventLog, RunDir, write_bytes_atomically

REACHED = "reached"
"""Name of the file's member that holds everything but tensors, as JSON."""


class Reached(NamedTuple):
    """How far training has come; stored as a list in this order."""

    step: int
    recurrent: int
    seconds: dict[str, float]
    """Training seconds by attempt."""

    step_seconds: list[float]
    """Of the latest steps."""

    loss: float
    run_id: str
    processes: int


class State:
    """The tensors that training moves, in one order: those that every process holds alike, and those that are dealt out."""

    def __init__(self, model: Model, optimizers: Optimizers, average: WeightAverage, world: World) -> None:
        self.model, self.optimizers, self.average, self.world = model, optimizers, average, world

    def alike(self) -> list[Tensor]:
        """Weights, their averages and AdamW's moments."""
        adam = self.optimizers.adam
        moments = [t for group in adam.param_groups for p in group["params"] for t in adam.state[p].values()]
        return [*self.model.parameters(), *self.average.averaged, *moments]

    def gathered(self) -> list[Tensor]:
        """Everything, what is dealt out put together. All processes must take part."""
        dealt = [self.world.begin_gather(buffer).arrived() for buffer in self.optimizers.muon.buffers]
        return [*self.alike(), *dealt]

    @torch.no_grad()
    def put_back(self, tensors: Sequence[Tensor]) -> None:
        """Take what `gathered` gave in a process of the same rank."""
        self.optimizers.adam.step()  # makes the moments' tensors; what it does to them and to the weights is overwritten
        live, buffers = self.alike(), self.optimizers.muon.buffers
        mine = [whole.chunk(self.world.size)[self.world.rank] for whole in tensors[len(live) :]]
        for place, tensor in zip([*live, *buffers], [*tensors[: len(live)], *mine], strict=True):
            place.copy_(tensor)


class Checkpoint:
    """The checkpoint of a run, as one of its attempts sees it."""

    def __init__(self, run: RunDir, attempt: AttemptDir, world: World, log: EventLog) -> None:
        self.run, self.attempt, self.world, self.log = run, attempt, world, log
        self.earlier: dict[str, float] = {}
        """Training seconds of the attempts that this one continues."""

    def restored(self, state: State) -> Reached | None:
        """Put training back to where an earlier attempt left it; None, with a warning, where that is not possible."""
        if self.attempt.number == 1:
            return None
        reached, reason = None, "another process could not read the checkpoint"
        try:
            found, tensors = read_checkpoint(self.run.checkpoint)
            if (found.run_id, found.processes) == (self.run.run_id, self.world.size):
                reached = found
            else:
                reason = f"the checkpoint is of run {found.run_id} on {found.processes} processes"
        except Exception as error:  # a damaged file makes its reader raise whatever
            reason = f"the checkpoint cannot be read: {error!r}"
        if self.world.largest(float(reached is None)) or reached is None:  # what one process lacks, all do without
            self.log.emit(WARNING, name="restarted", reason=reason)
            return None
        state.put_back(tensors)
        self.earlier.update(reached.seconds)
        self.log.emit(
            CHECKPOINT, state=RESTORED, step=reached.step, train_seconds=sum(self.earlier.values()),
            attempts=list(self.earlier),
        )  # fmt: skip
        return reached

    def keep(
        self,
        state: State,
        *,
        step: int,
        recurrent: int,
        train_seconds: float,
        step_seconds: Sequence[float],
        loss: float,
    ) -> None:
        """Write it, unless a study asked for the stop, or a later attempt owns the run. All processes must take part."""
        tensors = state.gathered()
        if not self.world.is_first or self.attempt.stop.exists() or not self.run.is_newest(self.attempt):
            return
        own = train_seconds - sum(self.earlier.values())
        reached = Reached(
            step=step, recurrent=recurrent, seconds={**self.earlier, str(self.attempt.number): own},
            step_seconds=list(step_seconds), loss=loss, run_id=self.run.run_id, processes=self.world.size,
        )  # fmt: skip
        try:
            write_checkpoint(self.run.checkpoint, reached, tensors)
        except StorageError as error:  # the next attempt begins anew; this one may yet come to its end
            self.log.emit(WARNING, name="no_checkpoint", reason=str(error))
        else:
            self.log.emit(CHECKPOINT, state=KEPT, step=step, train_seconds=train_seconds)


def write_checkpoint(path: Path, reached: Reached, tensors: Sequence[Tensor]) -> None:
    """Write a checkpoint whole. Raises StorageError."""
    arrays: dict[str, Any] = {str(number): tensor.detach().cpu().numpy() for number, tensor in enumerate(tensors)}
    arrays[REACHED] = np.frombuffer(json.dumps(reached).encode(), np.uint8)
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_bytes_atomically(path, content.getvalue())


def read_checkpoint(path: Path) -> tuple[Reached, list[Tensor]]:
    """A checkpoint's content. Raises FileNotFoundError, and anything for a damaged file."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        reached = Reached(*json.loads(arrays[REACHED].tobytes()))
        return reached, [torch.from_numpy(arrays[str(number)]) for number in range(len(arrays) - 1)]
