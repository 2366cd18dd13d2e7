"""Why an attempt failed: its kind and its words, from exit status, log and exception."""

from __future__ import annotations

import errno
import re
import signal
import tempfile
from pathlib import Path

from orchestrator.node_check import NodeRefused
from trainer import protocol
from trainer.errors import CaddieError, ConfigError, DataError, StorageError
from trainer.protocol import AttemptDir, Failure

TAIL_BYTES = 65_536  # of the log, searched for the cause of a failure
SHOWN_LINES = 20  # of the log, put into the result
PROBE_BYTES = 65_536  # written where it is asked whether there is room: more than a result and a traceback take
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemoryError|MemoryError|DefaultCPUAllocator", re.IGNORECASE)
_DISK = re.compile(r"No space left on device|Disk quota exceeded|ENOSPC")
_NCCL = re.compile(
    r"NCCL error|ncclInternalError|ncclSystemError|ncclRemoteError|ncclUnhandledCudaError|Watchdog caught collective"
)
_HARDWARE = re.compile(
    r"uncorrectable (?:ECC|NVLink) error|CUDA error: (?:initialization error|hardware|device not ready|unknown error|"
    r"no CUDA-capable device|all CUDA-capable devices are busy)|GPU has fallen off the bus|NVML: .*Unknown Error"
)
_RANK_EXIT = re.compile(r"exitcode\s*:\s*(-?\d+)")  # torchrun itself ends with 1, whatever its ranks ended with
_EXCEPTION = re.compile(r"^(?:\[\w+\]:\s*)?((?!.*ChildFailedError)[\w.]*(?:Error|Exception|Exit)\b.*|error: .*)$")
_EXIT_KINDS = {
    ConfigError.exit_code: protocol.CONFIG,
    DataError.exit_code: protocol.DATA,
    StorageError.exit_code: protocol.DISK,
}


def classify(returncode: int, stderr_tail: str, *, timed_out: bool = False) -> str:
    """The kind of failure of a trainer that left no result, from its exit status and the end of its stderr.

    What names its cause comes first: when one rank runs out of memory, the others fail in NCCL.
    """
    ranks = [int(code) for code in _RANK_EXIT.findall(stderr_tail)]
    codes = ranks or [returncode]
    if timed_out:
        return protocol.TIMEOUT
    if _OUT_OF_MEMORY.search(stderr_tail):
        return protocol.OUT_OF_MEMORY
    if _DISK.search(stderr_tail):
        return protocol.DISK
    if _HARDWARE.search(stderr_tail):
        return protocol.NODE
    for code in codes:
        if code in _EXIT_KINDS:
            return _EXIT_KINDS[code]
    if _NCCL.search(stderr_tail) or any(code < 0 for code in codes):
        return protocol.INFRASTRUCTURE
    return protocol.CODE


def kind_of_error(error: CaddieError | OSError) -> str:
    """The kind of failure of a trainer that could not be started."""
    if isinstance(error, OSError):
        return protocol.DISK if error.errno in NO_ROOM else protocol.INFRASTRUCTURE
    if isinstance(error, NodeRefused):
        return protocol.NODE
    return _EXIT_KINDS.get(error.exit_code, protocol.CODE)


def explain(returncode: int, stderr_tail: str) -> str:
    """One line for people: the exception that was raised last, else how the process ended."""
    for line in reversed(stderr_tail.splitlines()):
        named = _EXCEPTION.match(line.strip())
        if named:
            return named[1].removeprefix("error: ")
    if returncode < 0:
        return f"the trainer was ended by {signal.Signals(-returncode).name}"
    return f"the trainer ended with exit code {returncode} and left no result"


def has_room(folder: Path) -> bool:
    """Whether a little can be written there: what free space is, quotas do not tell."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(PROBE_BYTES))
    except OSError as error:
        return error.errno not in NO_ROOM
    return True


def log_tail(path: Path, size: int = TAIL_BYTES) -> str:
    """The end of a log; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def failure_of(kind: str, message: str, log: Path) -> Failure:
    """A failure with the place and the end of its log."""
    lines = log_tail(log).splitlines()[-SHOWN_LINES:]
    return Failure(kind=kind, message=message, log="\n".join([str(log), *lines]))


def failure_of_overdue(attempt: AttemptDir, seconds: float) -> Failure:
    """The failure of an attempt that took longer than its study gives a run."""
    return failure_of(
        protocol.TIMEOUT, f"ended after {seconds:g} s, the study's [resources] timeout_minutes", attempt.stderr
    )


def failure_of_lost(attempt: AttemptDir) -> Failure:
    """The failure of an attempt that nobody is left to speak for; one that never began speaks in the scheduler's log."""
    logs = [attempt.stderr, *sorted(attempt.scheduler.glob("*.err"))]
    log = next((log for log in logs if log_tail(log).strip()), attempt.stderr)
    # On a full disk the log says nothing either.
    is_claim_empty = attempt.claim.exists() and not attempt.claim.stat().st_size
    if is_claim_empty or attempt.no_room.exists() or _DISK.search(log_tail(log)):
        return failure_of(protocol.DISK, "the job ended and left no result: no space was left for one", log)
    message = "the job ended and left no result: its worker was killed, or could not start"
    return failure_of(protocol.INFRASTRUCTURE, message, log)
