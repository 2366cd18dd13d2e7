"""What each state of a Slurm job means for the attempt that it runs; one table, which nothing else repeats."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.protocol import INFRASTRUCTURE, NODE, OUT_OF_MEMORY, PREEMPTED

QUEUED, RUNNING, ENDED = "queued", "running", "ended"
"""Whether a job waits and holds nothing, has its nodes, or will not run any more."""


@dataclass(frozen=True)
class Meaning:
    """Where a job stands, and why its attempt, of which nothing is heard and which left no result, has failed."""

    standing: str
    kind: str = ""
    words: str = ""


_WAITS, _RUNS = Meaning(QUEUED), Meaning(RUNNING)
_STANDS_STILL = Meaning(RUNNING, PREEMPTED, "the job was suspended, and training by the clock cannot wait")

STATES = {
    "PENDING": _WAITS,
    "REQUEUED": _WAITS,
    "REQUEUE_FED": _WAITS,
    "REQUEUE_HOLD": _WAITS,
    "RESV_DEL_HOLD": _WAITS,
    "SPECIAL_EXIT": _WAITS,
    "EXPEDITING": _WAITS,
    "CONFIGURING": _RUNS,
    "POWER_UP_NODE": _RUNS,
    "RUNNING": _RUNS,
    "RESIZING": _RUNS,
    "SIGNALING": _RUNS,
    "STAGE_OUT": _RUNS,
    "STOPPED": _STANDS_STILL,
    "SUSPENDED": _STANDS_STILL,
    "UPDATE_DB": _RUNS,
    "COMPLETING": _RUNS,
    "COMPLETED": Meaning(ENDED, INFRASTRUCTURE, "the job ended as if all were well, and its worker wrote no result"),
    "FAILED": Meaning(ENDED, INFRASTRUCTURE, "the job failed, and its worker was killed or could not start"),
    "CANCELLED": Meaning(ENDED, INFRASTRUCTURE, "the job was cancelled, and no study asked for it"),
    "DEADLINE": Meaning(ENDED, INFRASTRUCTURE, "the job could not end before its deadline"),
    "TIMEOUT": Meaning(ENDED, INFRASTRUCTURE, "the job reached its time limit before its worker gave it up"),
    "PREEMPTED": Meaning(ENDED, PREEMPTED, "a job of higher priority took its nodes"),
    "REVOKED": Meaning(ENDED, INFRASTRUCTURE, "the job was revoked: another cluster of the federation has it"),
    "BOOT_FAIL": Meaning(ENDED, NODE, "its node did not boot"),
    "LAUNCH_FAILED": Meaning(ENDED, NODE, "it could not be started on its node"),
    "NODE_FAIL": Meaning(ENDED, NODE, "a node of the job failed"),
    "RECONFIG_FAIL": Meaning(ENDED, NODE, "its node could not be reconfigured"),
    "OUT_OF_MEMORY": Meaning(ENDED, OUT_OF_MEMORY, "the job used more memory than Slurm gave it"),
}

UNKNOWN = _RUNS
"""A state of a later Slurm: nobody is given up on account of a word that is not understood."""

NEVER_STARTED = ("launch failed", "JobHoldMaxRequeue", "BootFailure")
"""Beginnings of the reasons with which a job waits that Slurm could not start and will not try again."""


def meaning_of(state: str) -> Meaning:
    """The meaning of a state as squeue and sacct write it: `CANCELLED by 1000` and `RUNNING+` too."""
    word = state.split()[0].rstrip("+") if state.strip() else ""
    return STATES.get(word.upper(), UNKNOWN)
