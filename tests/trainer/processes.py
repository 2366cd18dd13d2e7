"""Two processes that stand ready for a whole test session, as two GPUs of a run would, on a CPU."""

from __future__ import annotations

import datetime
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed import World

PROCESSES = 2
PATIENCE = datetime.timedelta(seconds=60)


def join(rank: int, meeting: Path) -> None:
    """Become process `rank`; the file at `meeting` is where they find each other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES, timeout=PATIENCE)


def call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    control = dist.group.WORLD
    world = World(rank=dist.get_rank(), size=PROCESSES, device=torch.device("cpu"), control=control)
    return function(world, *arguments)


class Pair:
    """Calls a module's function on both processes, with their World first; gives what each returns, by rank."""

    def __init__(self, meeting: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes = [
            ProcessPoolExecutor(1, context, initializer=join, initargs=(rank, meeting)) for rank in range(PROCESSES)
        ]

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        under_way = [process.submit(call, function, arguments) for process in self.processes]
        return [one.result(timeout=2 * PATIENCE.total_seconds()) for one in under_way]

    def close(self) -> None:
        for process in self.processes:
            process.shutdown(cancel_futures=True)
