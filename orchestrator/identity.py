"""A study's identity: hashes of what must stay the same for its trials to be comparable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

from orchestrator import ledger
from orchestrator.errors import ConfigError
from orchestrator.ledger import StudyState
from orchestrator.study import Study
from trainer import protocol
from trainer.config import to_mapping


def identity_of(study: Study, *, manifest_sha256: str, bundle_sha256: str) -> dict[str, str]:
    """Hash of each part of the question, by the word that an error would use."""
    space = {knob: [type(r).__name__, dataclasses.asdict(r)] for knob, r in sorted(study.space.items())}
    parts = {
        "configuration": to_mapping(study.config),
        "space": space,
        "objective": study.search.objective,
        "seeds": () if study.cells else study.search.seeds,  # a design has no trials; its arms' seeds may grow
        "limits": [sorted(study.limits.items()), study.search.also_minimize],
    }
    if study.script is not None:
        parts["variables"] = dict(study.script.env)
    if study.cells:
        parts["cells"] = [[cell.name, cell.params, cell.replicate] for cell in study.cells]
    if study.candidate is not None:
        parts["candidate"] = to_mapping(study.candidate)
    hashes = {what: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] for what, value in parts.items()}
    return {**hashes, "data": manifest_sha256[:16], "trainer": bundle_sha256[:16]}


def require_same(name: str, state: StudyState, identity: Mapping[str, str]) -> None:
    """Raise ConfigError where new runs could not be compared with those that the study asked for."""
    changed = [what for what, digest in state.identity.items() if identity.get(what) != digest]
    if changed and _has_results(state):
        raise ConfigError(
            f"{name}: the {' and the '.join(changed)} changed since the study was opened; "
            f"new runs could not be compared with the {len(state.run_ids)} that it asked for",
            hint="give the study a new name, or undo the change; trials, slots, timeouts and [confirm] may change",
        )


def _has_results(state: StudyState) -> bool:
    """Whether there is, or may come, anything to compare with: not where every trial and every attempt failed."""
    is_trial_left = any(trial.state != ledger.FAILED for trial in state.trials.values())
    return is_trial_left or any(attempt.status != protocol.FAILED for attempt in state.attempts.values())
