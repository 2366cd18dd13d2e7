"""What is checked before anything is submitted: the data set, its files and vocabulary, the home, the disk."""

from __future__ import annotations

import shutil

from orchestrator import datasets, plan, script_check, source_run
from orchestrator.datasets import PreparedData
from orchestrator.errors import StorageError
from orchestrator.home import Home
from orchestrator.node_check import RUN_BYTES_PER_CAP_BYTE
from orchestrator.study import Study

COMMON_BYTES = 200_000_000  # ledger, logs, reports, MLflow's database


def runs_of(study: Study) -> int:
    """Most runs that a study makes: its trials by their seeds, and two confirmed configurations or a design's cells."""
    confirmed = len(study.confirm.seeds) if study.confirm else 0
    arms = len(study.cells) or (2 if study.search.trials or study.candidate is not None else 1)
    return study.search.trials * len(study.search.seeds) + confirmed * arms


def require_disk(study: Study, home: Home) -> None:
    """Raise StorageError where the study's files would not fit."""
    needed = COMMON_BYTES + runs_of(study) * study.config.limits.artifact_bytes * RUN_BYTES_PER_CAP_BYTE
    free = shutil.disk_usage(home.root).free
    if free < needed:
        raise StorageError(
            f"{home.root}: {free:,} bytes are free, {runs_of(study)} runs of {study.name} may take {needed:,}",
            hint="free some space, or set CADDIE_HOME to a larger disk",
        )


def check(study: Study, home: Home) -> PreparedData:
    """Everything that can be known beforehand; returns the study's data set.

    Raises StorageError, DataError, ProtocolError; ConfigError where a cap lets nothing begin, the data set's vocabulary is not the model's, or
    the study scores a run's model again that it has not, or otherwise than it was made.
    """
    home.require_writable()
    plan.require_caps(study)
    if study.script:
        data = script_check.check(study, home)
        require_disk(study, home)
        return data
    data = datasets.find(home, study.data)
    datasets.require_sound(data)
    for config in (study.config, study.candidate or study.config):
        datasets.require_vocabulary(data, config.model.vocab_size)
    sources = source_run.sources_of(home, study)
    if sources:
        source_run.require_takeable(sources, study, data.manifest_sha256)
    require_disk(study, home)
    return data
