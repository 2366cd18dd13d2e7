"""The claim: which process works on an attempt, and whether it still does."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from orchestrator.allocation import Allocation
from orchestrator.processes import boot_id, started_ticks
from orchestrator.pulse import BEAT_SECONDS
from trainer import protocol
from trainer.errors import ProtocolError
from trainer.protocol import AttemptDir


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Which process works on an attempt; a pid alone would be mistaken for a later process of the same number."""

    host: str
    boot: str
    pid: int
    started: int
    """Clock ticks from the host's boot to the process's start."""

    node: str = ""
    """The host's name in the cluster; empty outside one."""

    job: str = ""
    restarts: int = 0
    """How often the scheduler had started the job over: a second life of the same job is not the claim's holder."""

    began: float = 0.0
    """Unix seconds."""

    rendezvous: str = ""
    """`host:port` where the processes of several nodes meet; empty on one."""


def claim_of(pid: int) -> Claim:
    """The claim that a live process of this host would make."""
    return Claim(host=platform.node(), boot=boot_id(), pid=pid, started=started_ticks(pid) or 0)


def claim_for(allocation: Allocation) -> Claim:
    """The claim of this process, in its place in a job."""
    return dataclasses.replace(
        claim_of(os.getpid()), node=allocation.name, job=allocation.job, restarts=allocation.restarts, began=time.time(),
        rendezvous=allocation.rendezvous() if allocation.nodes > 1 else "",
    )  # fmt: skip


def began_by_now(claim: Claim) -> float:
    """Unix seconds at which the claim's process began, by the clock as it is now; what the claim says, on another host."""
    if claim.boot and claim.boot == boot_id() and claim.started:
        uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
        return time.time() - uptime + claim.started / os.sysconf("SC_CLK_TCK")
    return claim.began


def is_live(claim: Claim) -> bool:
    """Whether the very process that made the claim still runs, on this host."""
    return (claim.host, claim.boot) == (platform.node(), boot_id()) and started_ticks(claim.pid) == claim.started


def is_elsewhere(claim: Claim) -> bool:
    """Whether the process that made the claim can only be on another host, where this one cannot look."""
    return claim.host != platform.node()


def read_claim(attempt: AttemptDir) -> Claim | None:
    """The attempt's claim; None where there is none, or not yet a whole one."""
    try:
        return Claim(**protocol.read_json(attempt.claim))
    except (FileNotFoundError, ProtocolError, TypeError):
        return None


def make_claim(attempt: AttemptDir, claim: Claim | None = None) -> bool:
    """Claim an attempt for this process; False where somebody has done so before. Raises StorageError."""
    try:
        attempt.root.mkdir(parents=True, exist_ok=True)
        with attempt.claim.open("x", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(claim or claim_for(Allocation()))) + "\n")
    except FileExistsError:
        return False
    except OSError as error:
        raise protocol.storage_error(error, attempt.claim) from error
    return True


@contextmanager
def beating(attempt: AttemptDir) -> Iterator[None]:
    """Touch the claim within the block for as long as this process lives, for those who cannot look for processes here."""
    closing = threading.Event()

    def beat() -> None:
        while not closing.wait(BEAT_SECONDS):
            with suppress(OSError):  # heard again with the next beat, if the directory comes back
                os.utime(attempt.claim)

    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join(BEAT_SECONDS)
