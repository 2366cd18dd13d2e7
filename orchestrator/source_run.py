"""The runs whose models other runs score again, so that a study of test-time training or rounding costs evaluation alone.

Where only knobs of evaluation differ the stored model file is taken; where knobs of the quantiser do, the trained weights are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.home import Home
from orchestrator.ledger import BEST_ARM, Ledger
from orchestrator.presets import load_preset
from orchestrator.runs import RESUMABLE, RunStore, find_run, part_of
from orchestrator.study import PACKING, TAKEN, TAKEN_WORDS, Study
from orchestrator.study_rules import on_seeds
from trainer.config import Config, from_mapping, knob_value, knobs, nearest
from trainer.protocol import ARTIFACT, WEIGHTS, RunDir, Spec, read_spec, sha256_of


@dataclass(frozen=True, kw_only=True)
class SourceRun:
    """A run that has left a whole model file."""

    run: RunDir
    spec: Spec
    config: Config
    artifact_sha256: str

    def part_for(self, config: Config) -> str:
        """What a run of this configuration takes: the model file as it is, or the weights from which to make another."""
        return WEIGHTS if any(knob.startswith(PACKING) for knob in differences(self.config, config)) else ARTIFACT

    def sha256_of(self, part: str) -> str:
        """Hash of the file; raises ConfigError where the run has no such file."""
        return self.artifact_sha256 if part == ARTIFACT else self._weights_sha256

    @functools.cached_property
    def _weights_sha256(self) -> str:
        path = part_of(self.run, WEIGHTS)
        if not path.is_file():
            trained = (
                f"it took them from run {self.spec.source}: name that one" if self.spec.source else "train it again"
            )
            raise ConfigError(
                f"run {self.spec.run_id} has no trained weights that could be quantised anew: {path} is missing",
                hint=trained,
            )
        return sha256_of(path)


@dataclass(frozen=True)
class Sources:
    """The runs that a study takes over: a lone one for every seed, or one a seed."""

    runs: tuple[SourceRun, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(source.spec.seed for source in self.runs)

    @property
    def identity(self) -> dict[str, str]:
        """What must stay, by the word that an error would use: a lone source, or that of each seed. More seeds may come."""
        if len(self.runs) == 1:
            return {"source": self.runs[0].artifact_sha256[:16]}
        return {f"source of seed {source.spec.seed}": source.artifact_sha256[:16] for source in self.runs}

    def of(self, seed: int) -> SourceRun:
        """The run that the runs of a seed take."""
        return self.runs[0] if len(self.runs) == 1 else next(run for run in self.runs if run.spec.seed == seed)

    def taken(self, config: Config, seed: int) -> dict[str, str]:
        """Fields of the request of a run that trains nothing. Raises ConfigError where its source lacks the file."""
        source = self.of(seed)
        part = source.part_for(config)
        return {"source": source.spec.run_id, "source_part": part, "source_sha256": source.sha256_of(part)}


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
    return SourceRun(run=run, spec=spec, config=from_mapping(spec.config), artifact_sha256=found)


def find_all(home: Home, names: Sequence[str]) -> Sources:
    """The runs of these names, each a run or a study for the runs of its best or only arm (`STUDY:ARM` for another).

    Raises ConfigError for an unknown one, for two of one seed, and what `find` does.
    """
    ids = [run_id for name in names for run_id in _run_ids(home, name)]
    runs = tuple(find(home, run_id) for run_id in ids)
    by_seed: dict[int, SourceRun] = {}
    for source in runs:
        other = by_seed.setdefault(source.spec.seed, source)
        if other is not source:
            raise ConfigError(
                f"from: runs {other.spec.run_id} and {source.spec.run_id} are both of seed {source.spec.seed}",
                hint="name one run a seed",
            )
    return Sources(runs)


def _run_ids(home: Home, name: str) -> list[str]:
    """The run that is named, or those of a study's arm."""
    study_name, _, arm = name.partition(":")
    if study_name not in home.study_names():
        try:
            return [find_run(home, name).run_id]
        except ConfigError as error:
            studies = ", ".join(home.study_names()) or "none has been run yet"
            raise ConfigError(
                f"from: {error}, nor a study of that name", hint=f"studies: {studies}; runs: {error.hint}"
            ) from error
    arms = Ledger(home.study(study_name).ledger).state().arms
    if not arms:
        raise ConfigError(f"from: study {study_name!r} has confirmed nothing yet", hint="run it to its end first")
    chosen = arm or (BEST_ARM if BEST_ARM in arms else next(iter(arms)))
    if chosen not in arms:
        raise ConfigError(f"from: study {study_name!r} has no arm {arm!r}", hint=nearest(arm, arms))
    return list(arms[chosen].runs.values())


def sources_of(home: Home, study: Study) -> Sources | None:
    """The runs that a study takes over; None where it trains. Raises ConfigError, ProtocolError."""
    return find_all(home, study.from_runs) if study.from_runs else None


def bound(home: Home, study: Study) -> Study:
    """The study on the seeds of the runs that it takes. Raises ConfigError where it names one that none of them has."""
    sources = sources_of(home, study)
    if sources is None:
        return study
    named = {*study.search.seeds, *(study.confirm.seeds if study.confirm else ())}
    if len(sources.runs) > 1 and (unknown := sorted(named - set(sources.seeds))):
        raise ConfigError(
            f"{study.name}: seeds {unknown} are of none of the runs in `from`, whose seeds are {list(sources.seeds)}",
            hint="leave seeds out: they are those of the runs",
        )
    return on_seeds(study, sources.seeds)


def knobs_set(source: SourceRun) -> dict[str, Any]:
    """What the run's configuration sets otherwise than its preset. Raises ConfigError where there is none of that name."""
    return differences(source.config, load_preset(source.spec.preset))


def differences(config: Config, other: Config) -> dict[str, Any]:
    """Knobs of `config` that `other` has otherwise, but for what a search sets by itself."""
    compared = [knob for knob in knobs() if knob != RESUMABLE]
    return {knob: value for knob in compared if (value := knob_value(config, knob)) != knob_value(other, knob)}


def require_takeable(sources: Sources, study: Study, manifest_sha256: str) -> None:
    """Raise ConfigError where the study's runs could not be made of these."""
    for source in sources.runs:
        for config in study.configs:
            require_scorable(source, config, manifest_sha256)
            source.sha256_of(source.part_for(config))
        if any(knob.startswith(PACKING) for knob in study.space):
            source.sha256_of(WEIGHTS)


def require_scorable(source: SourceRun, config: Config, manifest_sha256: str) -> None:
    """Raise ConfigError where this configuration is not the run's, but for what is made anew, or other data are."""
    made = {knob: value for knob, value in differences(source.config, config).items() if not knob.startswith(TAKEN)}
    if made:
        raise ConfigError(
            f"run {source.spec.run_id} is scored again, not trained again: only {TAKEN_WORDS} may differ; "
            f"{_changes(made, config)}",
            hint="leave these knobs as the run has them, or train: without `from`",
        )
    if source.config.ttt.before_quantization:
        raise ConfigError(
            f"run {source.spec.run_id} learned the validation split before it was quantised: nothing follows from its model",
            hint="name the run that trained the weights",
        )
    if manifest_sha256 != source.spec.manifest_sha256:
        raise ConfigError(
            f"run {source.spec.run_id} was made with another data set: manifest {source.spec.manifest_sha256[:16]}, "
            f"here {manifest_sha256[:16]}",
            hint=f"its own lay in {source.spec.data_dir}",
        )


def _changes(made: Mapping[str, Any], config: Config) -> str:
    return ", ".join(f"{knob} is {knob_value(config, knob)!r}, there {value!r}" for knob, value in made.items())
