"""Slots: how many runs this machine takes at a time, and which GPUs belong to each.

submitit's local executor starts whatever it is given at once, on the first GPUs; the queue and the allocation are here.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import MachineError

NVIDIA_SMI_SECONDS = 30.0  # a healthy driver answers in one; a hung one must not hang the study
REST_SECONDS = (15.0, 60.0, 300.0, 900.0)  # of a slot after a refusal, and after the next ones in a row


@dataclass(frozen=True, kw_only=True)
class JobResources:
    """What one job is given."""

    slot: int
    gpus: tuple[str, ...] = ()
    """Ids as CUDA_VISIBLE_DEVICES takes them; empty runs on the CPU."""

    processes: int = 1
    """Processes of the run on each node, under torchrun where more than one in all."""

    timeout_seconds: float
    nodes: int = 1
    gpus_per_node: int = 0
    """Where the scheduler chooses which; `gpus` is empty then."""

    exclude: tuple[str, ...] = ()
    """Nodes that it must not run on."""

    beside: int = 1
    """Runs that share the machine's processors, this one counted; 1 where the scheduler shares them out."""

    @property
    def gpu_count(self) -> int:
        return len(self.gpus) or self.nodes * self.gpus_per_node

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> JobResources:
        """Read what a ledger or `job.json` says of a job."""
        return cls(**{**record, "gpus": tuple(record["gpus"]), "exclude": tuple(record.get("exclude", ()))})


class Slots:
    """Groups of GPUs, or places on the CPU, and who holds them. One on which a run was refused rests for a while."""

    def __init__(self, groups: tuple[tuple[str, ...], ...]) -> None:
        self.groups = groups
        self.held: dict[Hashable, tuple[int, frozenset[str]]] = {}
        """Slot number and GPUs by holder."""

        self._rests_until: dict[int, float] = {}
        """By slot number, on the monotonic clock."""

        self._refusals: Counter[int] = Counter()
        """In a row, by slot number."""

    @property
    def free(self) -> list[int]:
        """Numbers of the slots that nobody holds, none of whose GPUs anybody holds, and that do not rest."""
        taken = {slot for slot, _ in self.held.values()}
        taken |= {slot for slot, until in self._rests_until.items() if time.monotonic() < until}
        busy_gpus = {gpu for _, gpus in self.held.values() for gpu in gpus}
        free = [n for n, group in enumerate(self.groups) if n not in taken and not busy_gpus.intersection(group)]
        return free[: max(0, len(self.groups) - len(self.held))]

    def acquire(self, holder: Hashable, *, rather: int | None = None) -> int | None:
        """Give one free slot and return its number: that one if it is free, else the first; None where none is."""
        free = self.free
        if not free:
            return None
        slot = rather if rather is not None and rather in free else free[0]
        self.occupy(holder, slot=slot, gpus=self.groups[slot])
        return slot

    def occupy(self, holder: Hashable, *, slot: int, gpus: tuple[str, ...]) -> None:
        """Note a job that was started earlier, perhaps under another division of the machine."""
        self.held[holder] = slot, frozenset(gpus)

    def release(self, holder: Hashable) -> None:
        """Free what the holder held; nothing where it held nothing."""
        self.held.pop(holder, None)

    def rest(self, slot: int) -> float:
        """Give a slot to nobody for a while, since somebody else is at its GPUs, say; for how many seconds."""
        seconds = REST_SECONDS[min(self._refusals[slot], len(REST_SECONDS) - 1)]
        self._refusals[slot] += 1
        self._rests_until[slot] = time.monotonic() + seconds
        return seconds

    def has_served(self, slot: int) -> None:
        """Note that a run began on a slot: its next rest is a short one again."""
        self._refusals.pop(slot, None)


def machine_slots(*, slots: int, gpus_per_run: int) -> Slots:
    """The slots of this machine: `slots` places on the CPU, or its GPUs in groups. Raises MachineError."""
    if gpus_per_run == 0:
        return Slots(((),) * slots)
    gpus = machine_gpus()
    if len(gpus) < gpus_per_run:
        raise MachineError(
            f"[resources] gpus_per_run is {gpus_per_run}, this machine offers {len(gpus)}",
            hint="lower gpus_per_run, widen CUDA_VISIBLE_DEVICES, or set gpus_per_run = 0 to run on the CPU",
        )
    groups = len(gpus) // gpus_per_run
    return Slots(tuple(tuple(gpus[n * gpus_per_run : (n + 1) * gpus_per_run]) for n in range(groups)))


def machine_gpus() -> list[str]:
    """Ids of the GPUs that may be used: CUDA_VISIBLE_DEVICES where it is set, else what `nvidia-smi` lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    names = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    return [line.removeprefix("GPU ").partition(":")[0] for line in names] if listing.returncode == 0 else []
