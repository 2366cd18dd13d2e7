"""Imported records in MLflow: an experiment a track, nested runs record → seed, with curves, stages and the logs themselves."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

from orchestrator import mlflow_entries as entries
from orchestrator import mlflow_views as views
from orchestrator.imports import ImportedRecord, track_of
from orchestrator.mlflow_entries import Point, milliseconds
from orchestrator.mlflow_views import record_views
from orchestrator.public_log import LoggedRun
from orchestrator.public_record import PublicRecord, RecordedSeed
from orchestrator.statistics import mean
from orchestrator.tracking import MlflowRun, MlflowStore
from trainer import protocol

PREFIX = "records "
"""Before the track's name: no study can be called so, names of studies have no blanks."""

IMPORT = "caddie.import"
SUBMITTED, SPREAD = "final/bpb", "final/bpb_std"
COLUMNS = (
    SUBMITTED, SPREAD, *(f"final/{stage}_bpb" for stage in reversed(protocol.STAGES)), "final/artifact_bytes", "final/steps",
)  # fmt: skip


def sync(store: MlflowStore, imported: ImportedRecord) -> None:
    """Mirror one record; nothing changes where it is there already. The caller holds the store."""
    track, record = track_of(imported), imported.record
    experiment = store.named_experiment(PREFIX + track, _experiment_tags(track))
    key = f"import/{record.name}"
    found = store.run_of(experiment, key)
    if found is not None and found.is_whole:
        return
    if found is None:
        tags = {views.LEVEL: "record", IMPORT: record.name, **{f"record.{k}": v for k, v in record.about.items()}}
        found = store.create(experiment, key, name=record.name, started=_day(record), tags=tags)
    for number, seed in enumerate(record.seeds):
        _sync_seed(store, experiment, found, imported, seed, key=f"{key}/{number}")
    _finish_record(store, found, imported)


def _experiment_tags(track: str) -> dict[str, str]:
    return {
        entries.NOTE: f"Records of others in {track}, read from their own logs. Means are recomputed; `caddie import` says why "
        "each line is the score.",
        "mlflow.experimentKind": "custom_model_development", entries.STUDY: PREFIX + track,
        **record_views(SUBMITTED, COLUMNS),
    }  # fmt: skip


def _day(record: PublicRecord) -> float:
    """Unix time of the record's day; 0 where none is known."""
    try:
        return datetime.datetime.fromisoformat(record.date).replace(tzinfo=datetime.UTC).timestamp()
    except ValueError:
        return 0.0


# ── seeds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _sync_seed(
    store: MlflowStore, experiment: str, parent: MlflowRun, imported: ImportedRecord, seed: RecordedSeed, *, key: str
) -> None:
    found = store.run_of(experiment, key)
    if found is not None and found.is_whole:
        return
    record, started = imported.record, _day(imported.record)
    name = f"{record.name} · seed {'unknown' if seed.seed is None else seed.seed}"
    tags = {views.LEVEL: "seed", entries.PARENT: parent.mlflow_id, IMPORT: record.name, entries.SEED: str(seed.seed)}
    found = found or store.create(experiment, key, name=name, started=started, tags=tags)
    if seed.run is not None:
        store.log_params(found, {"seed": seed.seed, **seed.run.settings, **_figures(seed.run)})
        store.log_metrics(found, curve_points(seed.run, started))
        for file in dict.fromkeys(log.file for log in (seed.run, seed.scored) if log):
            store.log_file(found, imported.folder.files / file, "logs")
    ended = started + (seed.run.seconds("train_seconds") or 0.0 if seed.run else 0.0)
    store.log_metrics(found, entries.final_points(final_values(seed), ended))
    status = protocol.COMPLETE if seed.score else "refused"
    note = f"{'The score stands at `' + seed.place + '`: ' if seed.score else 'Refused: '}{seed.why}."
    store.set_tags(found, {views.STATUS: status, entries.NOTE: note, entries.MIRRORED: "whole"})
    store.finish(found, "FINISHED" if seed.score else "FAILED", ended)
    found.is_whole = True


def _figures(run: LoggedRun) -> dict[str, object]:
    """What the log says of the run besides its settings."""
    names = ("parameters", "world_size", "val_tokens", "train_shards", "batch_tokens", "planned_steps", "format")
    return {name: run.figures[name].value for name in names if name in run.figures and name not in run.settings}


def curve_points(run: LoggedRun, started: float) -> Iterator[Point]:
    """Losses by step, and by milliseconds of training where the log has the time."""
    for point in run.curve:
        values = {"train_loss": point.train_loss, "val_loss": point.val_loss, "val_bpb": point.val_bpb}
        at = milliseconds(started + (point.train_seconds or 0.0))
        for name, value in values.items():
            if value is None:
                continue
            yield Point(name, value, at, point.step)
            if point.train_seconds is not None:
                yield Point(f"by_ms/{name}", value, at, milliseconds(point.train_seconds))


def final_values(seed: RecordedSeed) -> dict[str, float]:
    """The submitted score, every stage, sizes and seconds by the names that runs of ours have."""
    values: dict[str, float | None] = {SUBMITTED: seed.score.bpb if seed.score else None}
    for stage in reversed(protocol.STAGES):
        line = seed.stage(stage)
        values |= {f"final/{stage}_{name}": getattr(line, name) for name in ("bpb", "loss", "seconds")} if line else {}
    if seed.run is not None:
        values |= {
            "final/artifact_bytes": seed.total_bytes, "final/model_bytes": seed.run.number("model_bytes"),
            "final/bundle_bytes": seed.run.number("code_bytes"), "final/steps": seed.steps,
            "final/train_seconds": seed.run.seconds("train_seconds"), "final/parameters": seed.run.number("parameters"),
            "final/peak_memory_bytes": seed.run.number("peak_memory_bytes"),
        }  # fmt: skip
        values |= {f"phase_seconds/{name}": seconds for name, seconds in seed.run.phases.items()}
    return {name: float(value) for name, value in values.items() if value is not None}


# ── the record ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _finish_record(store: MlflowStore, found: MlflowRun, imported: ImportedRecord) -> None:
    record, summary = imported.record, imported.record.summary
    values = {SUBMITTED: summary.mean, SPREAD: summary.std, "final/artifact_bytes": record.most_bytes}
    for stage in reversed(protocol.STAGES):
        values[f"final/{stage}_bpb"] = mean(
            [line.bpb for seed in record.seeds if seed.score and (line := seed.stage(stage))]
        )
    known = {name: float(value) for name, value in values.items() if value is not None}
    store.log_metrics(found, entries.final_points(known, _day(record)))
    for path in sorted(imported.folder.files.iterdir()):
        if path.suffix in (".md", ".json"):
            store.log_file(found, path, "record")
    store.log_file(found, imported.folder.provenance)
    store.set_tags(
        found,
        {
            views.STATUS: protocol.COMPLETE if record.scores else "refused", entries.NOTE: note(imported),
            entries.MIRRORED: "whole",
        },
    )  # fmt: skip
    store.finish(found, "FINISHED" if record.scores else "FAILED", _day(record))
    found.is_whole = True


def note(imported: ImportedRecord) -> str:
    """The record in Markdown: its people, its scores with their places, what disagrees, where it came from."""
    record, summary = imported.record, imported.record.summary
    head = " · ".join(record.about[name] for name in ("name", "author", "date") if record.about.get(name))
    lines = [f"**{head or record.name}**"]
    if summary.mean is not None:
        spread = f", std {summary.std:.5f} (n−1)" if summary.std is not None else ""
        lines.append(f"{record.stage} BPB {summary.mean:.5f}{spread} over {summary.count} of {len(record.seeds)} seeds")
    lines += [
        f"- seed {seed.seed}: {f'{seed.score.bpb:.8f} at `{seed.place}`' if seed.score else 'refused: ' + seed.why}"
        for seed in record.seeds
    ]
    lines += ["", "Disagreements:", *(f"- {conflict}" for conflict in record.conflicts)] if record.conflicts else []
    lines += ["", "Doubts:", *(f"- {doubt}" for doubt in record.doubts)] if record.doubts else []
    lines += ["", f"Copied from `{Path(imported.provenance.source)}` to `{imported.folder.root}`."]
    return "\n".join(lines)
