"""What MLflow is told of a study, a trial and a run: names, parameters, metric points, tags, notes and the view.

    experiment = study;  runs nest by mlflow.parentRunId: study → trial or arm → seed
    metrics        train_loss, ...            step = optimiser step (TTT: chunk), time = start + t
                   by_ms/train_loss, ...      the same points, step = milliseconds of training
                   final/ttt_bpb, ...         scores of their own names: MLflow shows a name's highest step as its value
                   phase_seconds/train, ...

Pure functions; `tracking` writes what they give.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from orchestrator import ledger
from orchestrator.ledger import Arm, StudyState, Trial
from orchestrator.mlflow_views import STATUS, study_views
from orchestrator.statistics import mean, sample_std
from orchestrator.study import Study
from trainer import protocol
from trainer.protocol import AttemptDir, Result, Spec

KEY, STUDY, TRIAL, ARM, SEED, RUN_ID, ATTEMPT, MIRRORED, REPORT, PROBLEM = (
    "caddie.key", "caddie.study", "caddie.trial", "caddie.arm", "caddie.seed", "caddie.run_id", "caddie.attempt",
    "caddie.mirrored", "caddie.report", "caddie.problem",
)  # fmt: skip
PARENT, NOTE, GIT_COMMIT = "mlflow.parentRunId", "mlflow.note.content", "mlflow.source.git.commit"
CHUNK = "ttt_chunk"
"""Value of a metric event that says to which chunk of test-time training the others belong."""

RUN_STATUS = {protocol.COMPLETE: "FINISHED", protocol.FAILED: "FAILED", protocol.STOPPED: "KILLED"}
TRIAL_STATUS = {ledger.COMPLETE: "FINISHED", ledger.FAILED: "FAILED", ledger.PRUNED: "KILLED"}
STUDY_STATUS = {ledger.FINISHED: "FINISHED", ledger.BROKEN: "FAILED", ledger.HALTED: "KILLED"}


class Point(NamedTuple):
    """One value of a metric."""

    name: str
    value: float
    timestamp: int
    """Milliseconds since 1970."""

    step: int


# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def final_values(result: Result) -> dict[str, float]:
    """Scores, sizes and seconds of a result by their names in MLflow."""
    last_first = reversed(protocol.STAGES)  # MLflow's comparison begins with the first name that a run has
    values = {f"final/{stage}_bpb": result.scores[stage].bpb for stage in last_first if stage in result.scores}
    values |= {f"final/{stage}_loss": score.loss for stage, score in result.scores.items()}
    values |= {f"final/{stage}_seconds": score.seconds for stage, score in result.scores.items()}
    values |= {f"phase_seconds/{name}": seconds for name, seconds in result.phases.items()}
    measured: dict[str, float | None] = {
        "final/parity_nats": result.parity_nats,
        "final/train_loss": result.final_train_loss,
        # Zero means that the run ended before it was measured.
        "final/artifact_bytes": result.artifact_bytes or None,
        "final/model_bytes": result.model_bytes or None,
        "final/bundle_bytes": result.bundle_bytes or None,
        "final/peak_memory_bytes": result.peak_memory_bytes or None,
        "final/parameters": result.parameters or None,
        "final/steps": result.steps or None,
        "final/tokens": result.tokens or None,
        "final/train_seconds": result.train_seconds or None,
    }
    values |= {name: float(value) for name, value in measured.items() if value is not None}
    return {_metric_name(name): value for name, value in values.items()}


def mean_values(results: list[Result], objective: str) -> dict[str, float]:
    """Means over seeds, and the spread of the objective."""
    by_name: dict[str, list[float]] = {}
    for result in results:
        for name, value in final_values(result).items():
            by_name.setdefault(name, []).append(value)
    means = {name: average for name, values in by_name.items() if (average := mean(values)) is not None}
    spread = sample_std(by_name.get(f"final/{objective}_bpb", []))
    return means if spread is None else means | {f"final/{objective}_bpb_std": spread}


def points_of(event: Mapping[str, Any], started: float) -> Iterator[Point]:
    """The metric points of one event, by step and by milliseconds of training; in TTT, by chunk."""
    values, timestamp = event["values"], milliseconds(started + event["t"])
    chunk = values.get(CHUNK)
    for name, value in values.items():
        if name == CHUNK:
            continue
        step = event["step"] if chunk is None else int(chunk)
        yield Point(_metric_name(name), _number(value), timestamp, step)
        if chunk is None:
            yield Point(f"by_ms/{_metric_name(name)}", _number(value), timestamp, milliseconds(event["train_seconds"]))


def final_points(values: Mapping[str, float], ended: float) -> list[Point]:
    return [Point(name, _number(value), milliseconds(ended), 0) for name, value in values.items()]


def system_points(record: Mapping[str, Any], node: int, step: int) -> Iterator[Point]:
    """What a node's GPUs did, under the names that MLflow's page of system metrics shows."""
    place = "" if node == 0 else f"node_{node}_"
    for gpu, counters in record["gpus"].items():
        for name, value in counters.items():
            yield Point(f"system/{place}gpu_{gpu}_{name}", _number(value), milliseconds(record["time"]), step)


def search_points(trials: Iterable[Trial], opened_at: float) -> Iterator[Point]:
    """Every trial's value and the best so far, by trial number. The ledger keeps no time for it: the number orders them."""
    best = math.inf
    for trial in sorted(trials, key=lambda trial: trial.number):
        if trial.value is None:
            continue
        yield Point("trial_bpb", trial.value, milliseconds(opened_at), trial.number)
        if trial.is_feasible:
            best = min(best, trial.value)
        if math.isfinite(best):
            yield Point("best_bpb", best, milliseconds(opened_at), trial.number)


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _number(value: Any) -> float:
    """A metric's value; MLflow stores infinity as the largest float, which no chart survives."""
    number = float(value)
    return number if math.isfinite(number) else math.nan


def _metric_name(name: str) -> str:
    """A name that MLflow takes: it refuses brackets among others."""
    return re.sub(r"[^\w./ :-]", "_", name)


def param_text(value: Any) -> str:
    """A parameter in full: a float keeps every digit."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def run_params(spec: Spec) -> dict[str, Any]:
    """The resolved configuration by dotted names, and what else identifies the run."""
    knobs = {f"{section}.{name}": value for section, entries in spec.config.items() for name, value in entries.items()}
    source = {"source_run": spec.source} if spec.source else {}
    return {"seed": spec.seed, "preset": spec.preset, "manifest_sha256": spec.manifest_sha256, **source, **knobs}


# ── names, parameters and tags ───────────────────────────────────────────────────────────────────────────────────────


def owner_name(owner: Trial | Arm) -> str:
    if isinstance(owner, Arm):
        return f"arm {owner.name}"
    return f"trial {owner.number}" + (" (preset)" if owner.number == 0 else "")


def owner_tags(owner: Trial | Arm) -> dict[str, str]:
    return {TRIAL: str(owner.number)} if isinstance(owner, Trial) else {ARM: owner.name, TRIAL: str(owner.trial)}


def seed_tags(spec: Spec, study_name: str, seed: int) -> dict[str, str]:
    tags = {STUDY: study_name, SEED: str(seed), RUN_ID: spec.run_id, STATUS: "running"}
    tags["caddie.bundle_sha256"] = spec.bundle_sha256
    if spec.code.get("git_sha"):
        tags |= {GIT_COMMIT: spec.code["git_sha"], "caddie.git_sha": spec.code["git_sha"]}
    return tags


def study_params(study: Study) -> dict[str, Any]:
    return {
        "preset": study.preset, "data": study.data, "objective": study.search.objective, "sampler": study.search.sampler,
        "trials": study.search.trials, "search_seeds": study.search.seeds,
        "confirm_seeds": study.confirm.seeds if study.confirm else (), "study_digest": study.digest,
    }  # fmt: skip


def study_note(study: Study, state: StudyState, links: Mapping[str, str] | None = None) -> str:
    """The question, the best point and the way to it; `links`: pages of trials and arms by the mirror's key."""
    best, links = state.best, links or {}
    found = f"\n\nBest so far: trial {best.number}, {study.search.objective} BPB {best.value:.5f}" if best else ""
    if best and f"trial/{best.number}" in links:
        found = found.replace(f"trial {best.number}", f"[trial {best.number}]({links[f'trial/{best.number}']})")
    arms = [f"[{arm}]({links[f'arm/{arm}']})" for arm in state.arms if f"arm/{arm}" in links]
    confirmed = f"\n\nConfirmed: {', '.join(arms)}" if arms else ""
    points = "".join(f"\n- `{knob}` = {param_text(value)}" for knob, value in best.params.items()) if best else ""
    report = f"[report]({links['report']})" if "report" in links else "report"
    return (
        f"{study.question}{found}{points}{confirmed}\n\nThe {report} is among the artifacts once it has been written."
    )


def owner_note(owner: Trial | Arm, objective: str, values: Mapping[str, float]) -> str:
    points = "\n".join(f"- `{knob}` = {param_text(value)}" for knob, value in owner.params.items()) or "- unchanged"
    score = values.get(f"final/{objective}_bpb")
    head = (
        f"{objective} BPB {score:.5f}, mean over seeds {', '.join(map(str, owner.runs))}"
        if score is not None
        else "No score."
    )
    reason = f"\n\n{owner.reason}" if isinstance(owner, Trial) and owner.reason else ""
    return f"{head}\n\n{points}{reason}"


def seed_note(
    run_id: str, attempt: AttemptDir, result: Result | None, status: str, links: Mapping[str, str] | None = None
) -> str:
    """Where the run lies, why it failed, and the way to its files; `links`: pages by what they show."""
    lines = [f"Run `{run_id}`, attempt {attempt.number}: {status}."]
    if result is not None and result.failure is not None:
        lines.append(f"**{result.failure.kind}**: {result.failure.message}")
    lines.append(f"Directory: `{attempt.root}`")
    lines += [" · ".join(f"[{name}]({link})" for name, link in links.items())] if links else []
    return "\n\n".join(lines)


def experiment_tags(study: Study) -> dict[str, str]:
    """Description, the kind that makes the UI open on runs, and views with the columns and charts that a sweep needs."""
    return {
        NOTE: study.question,
        "mlflow.experimentKind": "custom_model_development",
        **study_views(study),
        STUDY: study.name,
    }
