"""The processes of a run: which one this is, on which device, and the few things they agree on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import RuntimeConfig
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Waiting:
    """A tensor that is on its way."""

    tensor: Tensor
    work: Any

    def arrived(self) -> Tensor:
        """The tensor, complete for what is asked of the device next."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


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

    def agree(self, *numbers: float) -> tuple[float, ...]:
        """The first process's numbers, on every process, so that clocks and signals decide the same everywhere."""
        if self.size == 1:
            return numbers
        shared = torch.tensor(numbers, dtype=torch.float64)
        dist.broadcast(shared, src=0, group=self.control)
        return tuple(shared.tolist())

    def begin_sum(self, tensor: Tensor) -> Waiting:
        """Begin to add `tensor` up over all processes, in place."""
        return Waiting(tensor, dist.all_reduce(tensor, async_op=True) if self.size > 1 else None)

    def begin_scatter(self, whole_PMN: Tensor) -> Waiting:
        """Begin to add equal shapes up over all processes; each gets its share of the first dimension."""
        if self.size == 1:
            return Waiting(whole_PMN, None)
        share = whole_PMN.chunk(self.size)[self.rank]
        if self.device.type == "cpu":  # gloo cannot scatter
            return Waiting(share, dist.all_reduce(whole_PMN, async_op=True))
        return Waiting(share, dist.reduce_scatter_tensor(share, whole_PMN, async_op=True))

    def begin_gather(self, share_PMN: Tensor) -> Waiting:
        """Begin to put the shares of all processes one behind the other."""
        if self.size == 1:
            return Waiting(share_PMN, None)
        whole = share_PMN.new_empty(self.size * share_PMN.size(0), *share_PMN.shape[1:])
        return Waiting(whole, dist.all_gather_into_tensor(whole, share_PMN.contiguous(), async_op=True))

    def largest(self, number: float) -> float:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return number
        shared = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.control)
        return float(shared)

    def moved(self, tensor: Tensor) -> Tensor:
        """A tensor of the CPU on this process's device, without waiting for what the device still has to do."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def precision(self, runtime: RuntimeConfig) -> torch.dtype:
        """Of the network's stream and matrix products."""
        wants_bfloat16 = runtime.precision == "bfloat16" or (runtime.precision == "auto" and self.device.type == "cuda")
        return torch.bfloat16 if wants_bfloat16 else torch.float32

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
