"""The run store: run directories by id, and their state read off their files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.home import Home
from trainer import protocol
from trainer.config import Config, to_mapping
from trainer.protocol import AttemptDir, Result, RunDir, Spec

PLANNED, QUEUED, RUNNING = "planned", "queued", "running"
"""States of a run without a result; with one, the state is the result's status."""

RESUMABLE = "runtime.resumable"
"""Knob that a search sets for its trials: it decides how a run may be cut off, and nothing that the run computes."""

VALIDATIONS = "schedule.validations"
"""Knob that is off in every arm: no record looks at validation text while it trains."""


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What decides a run's identity, and who asked for it."""

    preset: str
    config: Config
    seed: int
    replicate: int = 0
    data_dir: str
    manifest_sha256: str
    source: str = ""
    """Run whose model is scored again instead of training; empty for a run that trains."""

    source_sha256: str = ""
    source_part: str = protocol.ARTIFACT
    """Which file of it: ARTIFACT or WEIGHTS."""

    script: str = ""
    """Name of the program of somebody else's that is run; empty for our trainer."""

    script_values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What such a program is given, in place of `config`."""

    gpus: int = 0
    """GPUs, where their number tells the run from another of the same configuration; see protocol.Spec."""

    study: str = ""
    trial: int | None = None

    @property
    def values(self) -> dict[str, dict[str, Any]]:
        """The configuration as the spec keeps it."""
        return (
            {name: dict(part) for name, part in self.script_values.items()} if self.script else to_mapping(self.config)
        )


def run_id_of(request: RunRequest, bundle_sha256: str) -> str:
    """The same question has the same id: a hash of config, seed, replicate, data manifest, bundle and source."""
    identity = [request.values, request.seed, request.replicate, request.manifest_sha256, bundle_sha256]
    if request.source_sha256:
        identity.append(request.source_sha256)
    if request.gpus:
        identity.append({"gpus": request.gpus})
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class RunStore:
    """Makes run directories and reads them."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._complete: set[str] = set()
        """Runs that were seen to be complete: they stay so."""

    def plan(self, request: RunRequest, *, bundle: bytes, code: dict[str, str]) -> RunDir:
        """Write the spec, the bundle and the source of a run, unless it was asked for before. Raises StorageError."""
        bundle_sha256 = hashlib.sha256(bundle).hexdigest()
        run = self.home.run(run_id_of(request, bundle_sha256))
        if not run.spec.exists():
            protocol.write_bytes_atomically(run.bundle, bundle)
            if request.source:
                _share(part_of(self.home.run(request.source), request.source_part), run.source)
            protocol.write_spec(
                run.spec,
                Spec(
                    run_id=run.run_id, seed=request.seed, replicate=request.replicate, preset=request.preset,
                    config=request.values, data_dir=request.data_dir,
                    manifest_sha256=request.manifest_sha256, bundle_sha256=bundle_sha256, code=code,
                    source=request.source, source_sha256=request.source_sha256,
                    source_part=request.source_part, script=request.script, gpus=request.gpus, study=request.study,
                    trial=request.trial,
                ),
            )  # fmt: skip
        return run

    def ids(self) -> list[str]:
        """Every run in the store."""
        return sorted(path.parent.name for path in self.home.runs.glob(f"*/{RunDir(self.home.runs).spec.name}"))

    def result(self, run_id: str) -> Result | None:
        """The run's latest result, or None; a complete one wins over a later attempt's."""
        results = [
            protocol.read_result(attempt.result)
            for attempt in self.home.run(run_id).attempts()
            if attempt.result.exists()
        ]
        complete = [result for result in results if result.status == protocol.COMPLETE]
        found = complete or results
        return found[-1] if found else None

    def is_complete(self, run_id: str) -> bool:
        """Whether the run has a complete result, which is read once."""
        if run_id not in self._complete:
            result = self.result(run_id)
            if result is None or result.status != protocol.COMPLETE:
                return False
            self._complete.add(run_id)
        return True

    def state(self, run_id: str) -> str:
        """planned, queued, running, or the status of the result."""
        attempts = self.home.run(run_id).attempts()
        result = self.result(run_id)
        if result is not None and (result.status == protocol.COMPLETE or attempts[-1].result.exists()):
            return result.status
        if not attempts:
            return PLANNED
        return RUNNING if attempts[-1].events.exists() else QUEUED

    def events(self, attempt: AttemptDir, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (offset after it, event) from byte `offset`; raises ProtocolError for a damaged line."""
        return protocol.read_lines(attempt.events, offset)

    def curve(self, attempt: AttemptDir) -> Iterator[dict[str, Any]]:
        """Yield an attempt's events, with the metrics of those that its training continues, up to where it took over.

        Raises ProtocolError for a damaged line.
        """
        for _, event in self.events(attempt):
            if event.get("kind") == protocol.CHECKPOINT and event.get("state") == protocol.RESTORED:
                earlier = AttemptDir(attempt.root.with_name(event["attempts"][-1]))
                yield from (
                    before
                    for before in self.curve(earlier)
                    if before.get("kind") == protocol.METRIC and before["step"] <= event["step"]
                )
            yield event

    def deciding_attempt(self, run_id: str) -> AttemptDir | None:
        """The attempt whose curve and result stand for the run: the complete one, else the latest."""
        attempts = self.home.run(run_id).attempts()
        for attempt in attempts:
            if attempt.result.exists() and protocol.read_result(attempt.result).status == protocol.COMPLETE:
                return attempt
        return attempts[-1] if attempts else None


def part_of(run: RunDir, part: str) -> Path:
    """The file of a run that another run may take."""
    return run.weights if part == protocol.WEIGHTS else run.artifact


def _share(path: Path, other: Path) -> None:
    """Give a file a second name, or a copy where the file system has none for it; raises StorageError.

    Nothing that is shared is ever written in place, and its SHA-256 is compared before it is read.
    """
    try:
        other.unlink(missing_ok=True)  # of a controller that was killed before the spec was written
        os.link(path, other)
    except OSError:
        protocol.write_bytes_atomically(other, path.read_bytes())


def without_resuming(config: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """A spec's configuration without RESUMABLE, for comparisons of what runs compute."""
    return {
        section: {key: value for key, value in entries.items() if f"{section}.{key}" != RESUMABLE}
        for section, entries in config.items()
    }


def find_run(home: Home, text: str) -> RunDir:
    """A run by its directory, its id or the beginning of its id. Raises ConfigError with the runs that there are."""
    folder = Path(text).expanduser()
    if folder.is_dir() and (RunDir(folder).spec.exists() or RunDir(folder).bundle.exists()):
        return RunDir(folder.resolve())
    ids = sorted(path.name for path in home.runs.glob("*") if path.is_dir())
    found = [run_id for run_id in ids if run_id == text] or [
        run_id for run_id in ids if text and run_id.startswith(text)
    ]
    if len(found) == 1:
        return home.run(found[0])
    if found:
        raise ConfigError(f"{text!r} is the beginning of {len(found)} runs", hint=f"there are: {', '.join(found)}")
    latest = sorted(ids, key=lambda run_id: home.run(run_id).root.stat().st_mtime)[-5:]
    there_are = f"the latest are: {', '.join(latest)}" if latest else "there are none yet"
    raise ConfigError(f"there is no run {text!r} in {home.runs}, and no such directory", hint=there_are)
