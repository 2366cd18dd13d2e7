"""What the nodes of an attempt must offer, as the study asks for it and as its earlier runs have shown it."""

from __future__ import annotations

import dataclasses
import statistics

from orchestrator import compile_cache, node_check
from orchestrator.errors import CaddieError
from orchestrator.home import Home
from orchestrator.ledger import Attempt, StudyState
from orchestrator.node_check import PACE_STEP, Demands
from orchestrator.study import Study
from trainer import protocol
from trainer.protocol import AttemptDir

LATEST = 20  # attempts whose median is taken: a cluster changes
FEWEST = 3  # below, a median says little


class DemandBook:
    """Writes the demands of each attempt; remembers the speeds that it has read."""

    def __init__(self, study: Study, home: Home) -> None:
        self.study = study
        self.home = home
        self._speeds: dict[tuple[str, int], float | None] = {}
        self._shapes: dict[str, str] = {}

    def write(self, run_id: str, number: int, state: StudyState) -> None:
        """Leave the demands beside an attempt that is about to be submitted; none where the study has switched them off.

        Raises StorageError.
        """
        resources = self.study.resources
        if not resources.preflight:
            return
        demands = Demands(
            gpus=resources.gpus_of_node, gpu_model=resources.gpu_model, gpu_memory_gib=resources.gpu_memory_gib,
            tokens_per_second=self.median(run_id, state) if resources.gpus_of_node else 0.0,
        )  # fmt: skip
        protocol.write_json_atomically(self._files(run_id, number).demands, dataclasses.asdict(demands))

    def median(self, run_id: str, state: StudyState) -> float:
        """Median speed of the study's complete runs that compute alike, in tokens per second; 0 with too few of them."""
        alike = [
            attempt
            for attempt in state.attempts.values()
            if attempt.status == protocol.COMPLETE and self._shape(attempt.run_id) == self._shape(run_id)
        ]
        speeds = [speed for attempt in alike[-LATEST:] if (speed := self._speed(attempt)) is not None]
        return statistics.median(speeds) if len(speeds) >= FEWEST else 0.0

    def _speed(self, attempt: Attempt) -> float | None:
        key = attempt.run_id, attempt.number
        if key not in self._speeds:
            self._speeds[key] = node_check.speed_at(self._files(*key), PACE_STEP)
        return self._speeds[key]

    def _shape(self, run_id: str) -> str:
        """What decides about a run's speed, as far as its configuration does."""
        if run_id not in self._shapes:
            try:
                spec = protocol.read_spec(self.home.run(run_id).spec)
                self._shapes[run_id] = repr(sorted(compile_cache.shaping_knobs(spec.config).items()))
            except (CaddieError, OSError):
                return f"unknown: {run_id}"
        return self._shapes[run_id]

    def _files(self, run_id: str, number: int) -> AttemptDir:
        return self.home.run(run_id).attempt(number)
