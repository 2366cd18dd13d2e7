"""Work spread over processes: tasks go out as they are wanted, results come back in the tasks' order."""

from __future__ import annotations

import collections
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from trainer.errors import CaddieError

TASKS_AHEAD = 3  # a process has one in hand and two waiting: none idles, and memory stays bounded
PRELOADED = ["trainer.verification"]  # once for all processes: torch takes a second to load

Task = TypeVar("Task")
Result = TypeVar("Result")

_work: Callable[[Any], Any]
"""What this process does, where it is one of several."""


def usable_processes() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(work: Callable[[Task], Result], tasks: Iterable[Task], processes: int) -> Iterator[tuple[Task, Result]]:
    """Yield each task with its result, in order, whatever the number of processes; `work` is sent to each of them once.

    One process works here. Raises what `work` raises, and CaddieError where a process dies.
    """
    if processes == 1:
        for task in tasks:
            yield task, work(task)
        return
    context = multiprocessing.get_context("forkserver")  # a fork of this process would copy the threads' locks
    context.set_forkserver_preload(PRELOADED)
    executor = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(work,))
    try:
        waiting: collections.deque[tuple[Task, Future[Any]]] = collections.deque()
        for task in tasks:
            waiting.append((task, executor.submit(_do, task)))
            if len(waiting) >= TASKS_AHEAD * processes:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    except BrokenProcessPool as error:
        raise CaddieError(
            f"one of {processes} processes was killed, as the system does where memory runs out",
            hint="run the command again with fewer --processes",
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work


def _do(task: Any) -> Any:
    return _work(task)
