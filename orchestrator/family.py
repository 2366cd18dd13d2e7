"""Families: every run of one configuration on one data set that a home has, whoever asked for it and however it ended.

A record shows some of them. The others were started too, and a reader must see them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import CaddieError
from orchestrator.evidence import UNREADABLE
from orchestrator.home import Home
from orchestrator.runs import PLANNED, QUEUED, RUNNING, RunStore, without_resuming
from trainer import protocol
from trainer.protocol import COMPLETE, Result, Spec


@dataclass(frozen=True, kw_only=True)
class Relative:
    """One run of a family."""

    run_id: str
    family: str
    study: str
    """Study that asked first."""

    seed: int
    replicate: int
    state: str
    attempts: int
    result: Result | None
    source: str
    """Path of the deciding result under CADDIE_HOME; empty without one."""

    problem: str = ""
    """What of its files could not be read."""

    def bpb(self, stage: str) -> float | None:
        """Bits per byte of one stage of a complete run."""
        if self.result is None or self.result.status != COMPLETE or stage not in self.result.scores:
            return None
        return self.result.scores[stage].bpb

    @property
    def has_ended(self) -> bool:
        """Whether it can be known what it scores, or that it scores nothing."""
        return self.state not in (PLANNED, QUEUED, RUNNING)


def families(home: Home, run_ids: Collection[str]) -> tuple[list[Relative], list[str]]:
    """Every run of the same configuration and data as one of those asked for, and what could not be read.

    A damaged spec belongs to no family that can be known: it is only named.
    """
    store, problems, specs = RunStore(home), [], {}
    for run_id in store.ids():
        try:
            specs[run_id] = protocol.read_spec(home.run(run_id).spec)
        except CaddieError as error:
            problems.append(str(error))
    wanted = {family_of(specs[run_id]) for run_id in run_ids if run_id in specs}
    found = [_relative(home, store, spec) for spec in specs.values() if family_of(spec) in wanted]
    return sorted(found, key=lambda run: (run.family, run.seed, run.replicate, run.study)), problems


def family_of(spec: Spec) -> str:
    """What runs share that differ in the seed alone, or in the trainer's bundle: configuration, data, what is not made anew.

    A lower rung's run on another number of GPUs is none of the family.

    Each seed may score a model of its own, which the same configuration made.
    """
    identity: list[object] = [without_resuming(spec.config), spec.manifest_sha256]
    identity.append(spec.source_part if spec.source else "")
    identity += [spec.gpus] if spec.gpus else []
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _relative(home: Home, store: RunStore, spec: Spec) -> Relative:
    fields: dict[str, Any] = {
        "run_id": spec.run_id, "family": family_of(spec), "study": spec.study, "seed": spec.seed,
        "replicate": spec.replicate, "attempts": len(home.run(spec.run_id).attempts()),
    }  # fmt: skip
    try:
        attempt = store.deciding_attempt(spec.run_id)
        source = attempt.result.relative_to(home.root).as_posix() if attempt and attempt.result.exists() else ""
        return Relative(**fields, state=store.state(spec.run_id), result=store.result(spec.run_id), source=source)
    except CaddieError as error:
        return Relative(**fields, state=UNREADABLE, result=None, source="", problem=str(error))
