"""The processes of a run: which one this is, on which device, and the few things they agree on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import RuntimeConfig
from trainer.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among those of the run, as `torchrun` started them."""

    rank: int
    size: int
    device: torch.device
    control: Any = None
    """Process group on the CPU for small decisions, which must not wait for the GPU's queue."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add `tensor` up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_all(self, tensors: Iterable[Tensor]) -> None:
        """Add tensors up over all processes, in place, in one exchange."""
        tensors = list(tensors)
        if self.size > 1 and tensors:
            flat = self.sum(torch.cat([tensor.reshape(-1) for tensor in tensors]))
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def agree(self, *numbers: float) -> tuple[float, ...]:
        """The first process's numbers, on every process, so that clocks and signals decide the same everywhere."""
        if self.size == 1:
            return numbers
        shared = torch.tensor(numbers, dtype=torch.float64)
        dist.broadcast(shared, src=0, group=self.control)
        return tuple(shared.tolist())

    def autocast(self, runtime: RuntimeConfig) -> AbstractContextManager[Any]:
        """The precision of matrix products."""
        wants_bfloat16 = runtime.precision == "bfloat16" or (runtime.precision == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if wants_bfloat16 else nullcontext()

    def synchronize(self) -> None:
        """Wait until the device has done what it was given, so that a clock tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def start_world(runtime: RuntimeConfig) -> World:
    """Join the processes that `torchrun` started (or stay alone) and take this one's device. Raises ConfigError."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    has_gpu = torch.cuda.is_available()
    if runtime.device == "cuda" and not has_gpu:
        raise ConfigError(
            "runtime.device is 'cuda', but torch sees no GPU", hint="set runtime.device to 'auto' or 'cpu'"
        )
    use_gpu = has_gpu and runtime.device != "cpu"
    if use_gpu and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this host has no GPU of its own: torch sees {torch.cuda.device_count()}"
        )
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    elif runtime.cpu_threads:
        torch.set_num_threads(runtime.cpu_threads)
    control = None
    if size > 1:
        dist.init_process_group("nccl" if use_gpu else "gloo")
        control = dist.new_group(backend="gloo")
    return World(rank=rank, size=size, device=device, control=control)
