"""Functions of fixed shapes, recorded once as CUDA graphs and then replayed: the GPU no longer waits for Python."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PRACTICE_RUNS = 2  # before a recording: they compile kernels and fill the libraries' workspaces


class Recorded:
    """A function of tensors, and of constants by name, that gives a tensor.

    On a GPU what was recorded is replayed, and the next call overwrites its result; everything else is simply called, and
    counted in `misses`. What the function changes must stay at its address. A pure function, which changes nothing, is
    recorded when it is first called.
    """

    def __init__(self, function: Callable[..., Tensor], *, is_pure: bool) -> None:
        self.function, self.is_pure, self.misses = function, is_pure, 0
        self.replays: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.pool: Any = None

    def __call__(self, *tensors: Tensor, **constants: Any) -> Tensor:
        key = self._key(tensors, constants)
        if key not in self.replays and tensors[0].is_cuda:
            if self.is_pure:
                self.record(*tensors, **constants)
            else:
                self.misses += 1
        if key not in self.replays:
            return self.function(*tensors, **constants)
        graph, inputs, output = self.replays[key]
        for place, tensor in zip(inputs, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        return output

    @staticmethod
    def _key(tensors: tuple[Tensor, ...], constants: dict[str, Any]) -> Any:
        return tuple(tensor.shape for tensor in tensors), torch.is_grad_enabled(), tuple(constants.items())

    def record(self, *tensors: Tensor, **constants: Any) -> None:
        """Run the function a few times, with its effects, and on a GPU record it for these shapes and constants."""
        inputs = [tensor.clone() for tensor in tensors]
        if not inputs[0].is_cuda:
            self.function(*inputs, **constants)  # what compiles has compiled
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(PRACTICE_RUNS):
                self.function(*inputs, **constants)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Graphs of one function never run side by side and may share their memory. Other threads (NCCL's) stay free.
        with uncollected(), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = self.function(*inputs, **constants)
        self.pool = graph.pool()
        self.replays[self._key(tensors, constants)] = graph, inputs, output


@contextmanager
def uncollected() -> Iterator[None]:
    """Hold the garbage collector: an older graph that it frees spoils the recording of another (pytorch#161037).

    Recordings refer to their owners and these to them, so only the collector frees them, at any allocation.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def compilations() -> int:
    """Graphs that torch.compile has made so far in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0
