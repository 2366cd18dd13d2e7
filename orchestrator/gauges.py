"""Gauges: what the GPUs of a job do while its trainer runs, sampled beside it by the driver's own tool.

Only the job's GPUs, and every counter by itself: one that a card does not have is left out, and the others stay.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import StorageError
from trainer.protocol import append_line

INTERVAL_SECONDS = 10.0
QUERY_SECONDS = 5.0  # a driver that takes longer has better things to do

COUNTERS = {
    "utilization.gpu": "utilization_percentage", "memory.used": "memory_usage_mebibytes", "power.draw": "power_usage_watts",
    "temperature.gpu": "temperature_celsius", "clocks.sm": "clock_megahertz",
}  # fmt: skip
"""What nvidia-smi is asked for, and the name that carries the unit of its answer."""


def sample(gpus: str) -> dict[str, dict[str, float]]:
    """Counters by GPU, as the driver numbers them; empty where it gives no answer. `gpus`: ids between commas."""
    query = ["nvidia-smi", f"--query-gpu=index,{','.join(COUNTERS)}", "--format=csv,noheader,nounits", f"--id={gpus}"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=QUERY_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [[cell.strip() for cell in line.split(",")] for line in told.splitlines() if line.strip()]
    return {row[0]: counters for row in rows if len(row) == 1 + len(COUNTERS) and (counters := _numbers(row[1:]))}


def _numbers(cells: list[str]) -> dict[str, float]:
    """The counters that have a number: `[N/A]` is none."""
    found = {}
    for name, cell in zip(COUNTERS.values(), cells, strict=True):
        with contextlib.suppress(ValueError):
            found[name] = float(cell)
    return found


@contextlib.contextmanager
def recording(path: Path, gpus: str, *, interval_seconds: float = INTERVAL_SECONDS) -> Iterator[None]:
    """Sample the GPUs into a file while the block runs; nothing that goes wrong with it reaches the block."""
    if not gpus:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_record, args=(path, gpus, done, interval_seconds), name="gauges", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(QUERY_SECONDS)


def _record(path: Path, gpus: str, done: threading.Event, interval_seconds: float) -> None:
    """Until the block ends, or the first sample that the driver or the disk refuses."""
    while True:
        counters = sample(gpus)
        if not counters:
            return
        try:
            append_line(path, {"time": round(time.time(), 3), "gpus": counters})
        except StorageError:
            return
        if done.wait(interval_seconds):
            return
