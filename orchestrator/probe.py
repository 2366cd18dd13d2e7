"""Probes: a script is started for a few seconds without a GPU, twice, to see which of a study's variables it heeds.

Most scripts read all their settings in their first second and then miss the GPU. Each of the study's knobs has another value
in the second start; what the script makes of it shows in the settings that its main module holds. The probe ends as soon as
nothing more is looked at.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator import read_trace
from orchestrator.data_view import lay_out
from orchestrator.errors import ConfigError
from orchestrator.lookups import BOOL, INT
from orchestrator.read_trace import Trace
from orchestrator.script import Script
from orchestrator.script_run import FLASH_ATTENTION_SHIM, is_same

PROBE_SECONDS = 120.0  # for one start; importing torch from a network file system takes most of it
QUIET_SECONDS = 3.0  # without a further look, after the first
LEAVE_SECONDS = 5.0  # after SIGTERM, for the settings to be written
POLL_SECONDS = 0.1

LIVE, READ, DEAD, UNKNOWN = "live", "read", "dead", "unknown"
"""A variable changes a setting; is looked at; is never looked at; or the script could not be brought so far."""


@dataclass(frozen=True, kw_only=True)
class Liveness:
    """What two starts showed of one variable."""

    name: str
    status: str
    found: str
    """In words: the setting before and after, or why nothing is known."""


def prove(
    script: Script, pairs: Mapping[str, tuple[str, str]], *, data_dir: Path | None = None, python: str = ""
) -> list[Liveness]:  # fmt: skip
    """Start a script with the first and then with the second text of each variable. Raises StorageError, ProtocolError.

    Some look at nothing before they have found their data.
    """
    with tempfile.TemporaryDirectory(prefix="caddie-probe-") as folder:
        traces = [
            start(
                script,
                {name: texts[turn] for name, texts in pairs.items()},
                Path(folder) / str(turn),
                data_dir=data_dir,
                python=python,
            )
            for turn in (0, 1)
        ]
    return [_judge(script, name, texts, *traces) for name, texts in pairs.items()]


def start(
    script: Script, variables: Mapping[str, str], folder: Path, *, data_dir: Path | None = None, python: str = ""
) -> Trace:  # fmt: skip
    """One start of a script in a folder of its own, ended when it looks at nothing more. Raises ProtocolError."""
    folder.mkdir(parents=True)
    data = lay_out(data_dir, folder) if data_dir else {}
    file = folder / "reads.jsonl"
    paths = [str(read_trace.FOLDER), str(FLASH_ATTENTION_SHIM), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, **data, **variables, **read_trace.variables(file, is_probe=True), "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip
    try:
        process = subprocess.Popen(
            [python or sys.executable, str(script.path)], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    except OSError:
        return Trace(names=frozenset(), settings={})
    try:
        _wait(process, file)
    finally:
        _end(process)
    return read_trace.read_trace(file)


def _wait(process: subprocess.Popen[bytes], file: Path) -> None:
    """Until the script ends, or has looked at something and then at nothing more for a while."""
    deadline, size, changed = time.monotonic() + PROBE_SECONDS, 0, time.monotonic()
    while process.poll() is None and time.monotonic() < deadline:
        now = file.stat().st_size if file.exists() else 0
        if now != size:
            size, changed = now, time.monotonic()
        if size and time.monotonic() - changed > QUIET_SECONDS:
            return
        time.sleep(POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the script to leave, and then end it with all that it started."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(LEAVE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _judge(script: Script, name: str, texts: tuple[str, str], before: Trace, after: Trace) -> Liveness:
    lookup = script.lookup(name)
    changed = {
        setting: (before.settings[setting], after.settings[setting])
        for setting in before.settings
        if setting in after.settings and before.settings[setting] != after.settings[setting]
    }
    own = lookup.setting if lookup and lookup.setting in changed else _setting_with(texts, changed)
    if own:
        return Liveness(name=name, status=LIVE, found=f"{own} is {changed[own][0]!r} and {changed[own][1]!r}")
    if name in before.names & after.names:
        return Liveness(name=name, status=READ, found="looked at; no setting of the main module shows it")
    if before.names and after.names and before.settings and after.settings:
        return Liveness(name=name, status=DEAD, found=f"looked at {len(before.names)} variables, never at this one")
    if lookup is not None:
        return Liveness(
            name=name,
            status=UNKNOWN,
            found=f"line {lookup.line} looks at it; the script did not get there on this machine",
        )
    return Liveness(name=name, status=UNKNOWN, found="the script could not be brought to its settings on this machine")


def _setting_with(texts: tuple[str, str], changed: Mapping[str, tuple[object, object]]) -> str:
    """The setting that has the two values that were given; empty without one."""
    return next(
        (name for name, values in changed.items() if all(map(is_same, texts, map(str, values)))), ""
    )  # fmt: skip


def other_text(script: Script, name: str, text: str) -> str:
    """Another value than this one, of the kind that the script reads."""
    lookup = script.lookup(name)
    kind = lookup.kind if lookup else ""
    try:
        if kind == BOOL:
            return str(1 - int(text))
        return str(int(text) + 1) if kind == INT else repr(float(text) * 1.5 + 0.001)
    except ValueError:
        return f"{text}-other"


def require_alive(found: Sequence[Liveness], script: Script) -> None:
    """Raise ConfigError for a variable that the script was seen to ignore."""
    for one in found:
        if one.status == DEAD:
            raise ConfigError(
                f"env.{one.name} changes nothing: {script.name}, started twice, {one.found}",
                hint="leave it out, or name a variable that the script looks at",
            )
