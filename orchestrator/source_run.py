"""The run whose stored model another run scores again, so that a search over test-time training costs evaluation alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.home import Home
from orchestrator.runs import RESUMABLE, RunStore, find_run
from orchestrator.study import SCORING, load_preset
from trainer.config import Config, from_mapping, knob_value, knobs
from trainer.protocol import Spec, read_spec, sha256_of


@dataclass(frozen=True, kw_only=True)
class SourceRun:
    """A run that has left a whole model file."""

    spec: Spec
    config: Config
    artifact_sha256: str


def find(home: Home, text: str) -> SourceRun:
    """A run by its id or the beginning of one. Raises ConfigError, ProtocolError where it has no model file of its own."""
    run = find_run(home, text)
    if run.root != home.run(run.run_id).root.resolve():
        raise ConfigError(f"{run.root}: the run must lie in {home.runs}", hint="copy its directory there")
    result = RunStore(home).result(run.run_id)
    found = sha256_of(run.artifact) if run.artifact.is_file() else ""
    if result is None or not found or found != result.artifact_sha256:
        state = RunStore(home).state(run.run_id)
        raise ConfigError(
            f"run {run.run_id} ({state}) has no model file that could be scored again: {run.artifact} "
            + ("is not the one of its result" if found else "is missing"),
            hint="wait for its end, or name a run that has packed its model",
        )
    spec = read_spec(run.spec)
    return SourceRun(spec=spec, config=from_mapping(spec.config), artifact_sha256=found)


def knobs_set(source: SourceRun) -> dict[str, Any]:
    """What the run's configuration sets otherwise than its preset. Raises ConfigError where there is none of that name."""
    return differences(source.config, load_preset(source.spec.preset))


def differences(config: Config, other: Config) -> dict[str, Any]:
    """Knobs of `config` that `other` has otherwise, but for what a search sets by itself."""
    compared = [knob for knob in knobs() if knob != RESUMABLE]
    return {knob: value for knob in compared if (value := knob_value(config, knob)) != knob_value(other, knob)}


def require_scorable(source: SourceRun, config: Config, manifest_sha256: str) -> None:
    """Raise ConfigError where this configuration is not the run's, but for how the model is scored, or other data are."""
    made = {knob: value for knob, value in differences(source.config, config).items() if not knob.startswith(SCORING)}
    if made:
        changes = ", ".join(f"{knob} is {knob_value(config, knob)!r}, there {value!r}" for knob, value in made.items())
        raise ConfigError(
            f"run {source.spec.run_id} is scored again, not made again: only {' and '.join(SCORING)}* may differ; {changes}",
            hint="leave these knobs as the run has them, or train: without `from`",
        )
    if manifest_sha256 != source.spec.manifest_sha256:
        raise ConfigError(
            f"run {source.spec.run_id} was made with another data set: manifest {source.spec.manifest_sha256[:16]}, "
            f"here {manifest_sha256[:16]}",
            hint=f"its own lay in {source.spec.data_dir}",
        )
