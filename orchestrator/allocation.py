"""The allocation: what Slurm gave a job, as each of its workers reads it off its environment. Standard library only."""

from __future__ import annotations

import os
import platform
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

_GROUP = re.compile(r"(?:[^,\[]|\[[^\]]*\])+")  # commas within brackets separate numbers, the others nodes


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A worker's place in a job. Outside Slurm: the one node of a job without an id."""

    job: str = ""
    restarts: int = 0
    """How often Slurm has started the job over."""

    node: int = 0
    """Number of this node; the first one speaks for the run."""

    names: tuple[str, ...] = ()
    """Of the job's nodes, as Slurm calls them."""

    gpus: str = ""
    """This node's, as CUDA_VISIBLE_DEVICES takes them."""

    @property
    def nodes(self) -> int:
        return max(1, len(self.names))

    @property
    def name(self) -> str:
        """Of this node; empty outside Slurm."""
        return self.names[self.node] if self.node < len(self.names) else ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Allocation:
        """What the variables of a task say; raises ValueError for a list of nodes that is none."""
        return cls(
            job=environment.get("SLURM_JOB_ID", ""),
            restarts=int(environment.get("SLURM_RESTART_COUNT") or 0),
            node=int(environment.get("SLURM_NODEID") or 0),
            names=expand_nodes(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")),
            gpus=_gpus(environment),
        )

    def rendezvous(self) -> str:
        """`host:port` at which the nodes' processes can meet on this node; the port was free a moment ago."""
        return f"{_reachable(self.name)}:{_free_port()}"


def _gpus(environment: Mapping[str, str]) -> str:
    """The GPUs that Slurm names; where it only counts them, as many as it has counted."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    counted = environment.get("SLURM_GPUS_ON_NODE") or "0"
    if named is None or named == "NoDevFiles":
        return ",".join(map(str, range(int(counted)))) if counted.isdecimal() else ""
    return named


def expand_nodes(text: str) -> tuple[str, ...]:
    """Names of a list of nodes as Slurm writes it: `a[01-02,7],b` is a01, a02, a7, b. Raises ValueError."""
    groups: list[str] = _GROUP.findall(text.strip())
    if ",".join(groups) != text.strip():
        raise ValueError(f"not a list of nodes: {text!r}")
    return tuple(name for group in groups for name in _expand(group))


def _expand(group: str) -> list[str]:
    begin, bracket, after = group.partition("[")
    if not bracket:
        return [group]
    ranges, _, rest = after.partition("]")
    return [f"{begin}{number}{tail}" for number in _numbers(ranges) for tail in _expand(rest)]


def _numbers(ranges: str) -> list[str]:
    """`01-03,7` is 01, 02, 03, 7."""
    numbers: list[str] = []
    for part in ranges.split(","):
        low, dash, high = part.partition("-")
        numbers += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)] if dash else [low]
    return numbers


def _reachable(node: str) -> str:
    """The node's name in Slurm where it is a host's too, else this host's."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        return platform.node()
    return node or platform.node()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
