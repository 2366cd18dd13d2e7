"""The smallest real study: the smoke preset, smaller still, on a small data set; a run takes some seconds of one core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from orchestrator import ledger
from orchestrator.home import Home
from orchestrator.ledger import Ledger, StudyState
from tests.trainer.make_data import VOCAB_SIZE
from tests.trainer.make_run import MICRO
from trainer.protocol import START, read_lines

REPOSITORY = Path(__file__).parents[2]
NAME = "micro"
DATA = "small"
KNOB = "optim.muon_weight_decay"
TRIALS = 3

STUDY = f"""
name = "{NAME}"
question = "Does the machinery hold?"
preset = "smoke"
data = "{DATA}"

[set]
{"".join(f'"{knob}" = {json.dumps(value)}{chr(10)}' for knob, value in MICRO.items())}
[space."{KNOB}"]
low = 0.01
high = 0.3
log = true

[search]
trials = {TRIALS}
startup_trials = 1

[confirm]
seeds = [42]

[resources]
slots = 2
timeout_minutes = 5
"""

ONE_AT_A_TIME = STUDY.replace("slots = 2", "slots = 1")
"""What the sampler knows when it is asked does not depend on which of two runs ends first."""

assert MICRO["model.vocab_size"] == VOCAB_SIZE


def environment(**changes: str) -> dict[str, str]:
    """This process's environment as a user's shell has it: no CADDIE_HOME, and the code wherever one stands."""
    kept = {name: value for name, value in os.environ.items() if name != "CADDIE_HOME"}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **changes}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)]


def caddie(*arguments: str | Path, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def start(*arguments: str | Path, cwd: Path, log: Path, **changes: str) -> subprocess.Popen[bytes]:
    """Start a command, in a process group of its own, whose output goes to a file."""
    with log.open("ab") as out:
        return subprocess.Popen(
            command(*arguments), cwd=cwd, env=environment(**changes), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            process_group=0,
        )  # fmt: skip


def until(condition: Callable[[], Any], *, seconds: float = 120.0, what: str = "") -> Any:
    """Poll until the condition holds, and return what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"it did not come about: {what}"
        time.sleep(0.02)
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command that a test has left running; not its jobs, which are to outlive it."""
    if process.poll() is None:
        process.kill()
    process.wait()


def write_study(folder: Path, text: str = STUDY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAME}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def records(home: Home, kind: str) -> list[dict[str, Any]]:
    """The study's decisions of one kind."""
    return [record for _, record in read_lines(home.study(NAME).ledger) if record["kind"] == kind]


def state(home: Home) -> StudyState:
    return Ledger(home.study(NAME).ledger).state()


def starts(home: Home) -> Counter[str]:
    """How often a trainer began each run."""
    return Counter(
        run_id
        for run_id in state(home).run_ids
        for attempt in home.run(run_id).attempts()
        for _, event in read_lines(attempt.events)
        if event["kind"] == START
    )


def twice(values: Iterable[Any]) -> list[Any]:
    """Values that occur more than once."""
    return [value for value, count in Counter(map(repr, values)).items() if count > 1]


def require_decided_once(home: Home) -> None:
    """Every decision stands in the ledger once, and every attempt that was begun has ended."""
    assert twice(record["trial"] for record in records(home, ledger.TRIAL_ASKED)) == []
    assert twice(record["trial"] for record in records(home, ledger.TRIAL_TOLD)) == []
    assert twice(record["arm"] for record in records(home, ledger.ARM_ASKED)) == []
    for kind in (ledger.SUBMITTING, ledger.SUBMITTED, ledger.ENDED):
        assert twice((record["run_id"], record["attempt"]) for record in records(home, kind)) == [], kind
    assert all(attempt.status is not None for attempt in state(home).attempts.values())
