"""The leaderboard of published records, recomputed from their logs: means, spreads, and the gates against the row before."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.cells import ABSENT, Table, bpb, signed, whole
from orchestrator.errors import ConfigError
from orchestrator.gates import Gate, Verdict, judge
from orchestrator.public_record import Conflict, PublicRecord, RecordedSeed, scored_arm
from orchestrator.statistics import STD_CONVENTION, difference
from orchestrator.units import split_of

GATES = ("pg-leaderboard", "pg-readme")
"""The challenge's two rules, the applied one and the written one."""

UNRANKED = "non_record"
"""In the name of a track without a leaderboard: rows are listed, and gates are not asked."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A record, and how it stands against the best one before it."""

    record: PublicRecord
    track: str
    before: str
    """The best record of the track until that day; empty for the first, and where nothing is ranked."""

    difference: float | None
    """Bits per byte against it; below zero is better."""

    verdicts: tuple[Verdict, ...]

    @property
    def mean(self) -> float | None:
        return self.record.summary.mean


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """Every record that was read, by track, the best first; those without a score last."""

    rows: tuple[Row, ...]

    @property
    def tracks(self) -> list[str]:
        return sorted({row.track for row in self.rows}, key=lambda track: (UNRANKED in track, track))

    def of(self, track: str) -> list[Row]:
        return [row for row in self.rows if row.track == track]


def rank(records: Sequence[tuple[PublicRecord, str]], gates: Sequence[Gate]) -> Leaderboard:
    """Rank records, each with its track, by mean; a row is judged against the best one of an earlier day, or of the same."""
    rows: list[Row] = []
    for track in sorted({track for _, track in records}):
        found = [record for record, name in records if name == track]
        rows += _ranked(found, track, gates if UNRANKED not in track else ())
    return Leaderboard(rows=tuple(rows))


def _ranked(records: list[PublicRecord], track: str, gates: Sequence[Gate]) -> list[Row]:
    """One track's rows: chronologically against the frontier, then by score."""
    frontier: PublicRecord | None = None
    rows = []
    for record in sorted(records, key=lambda record: (record.date, -(record.summary.mean or 0.0))):
        rows.append(_row(record, track, frontier if gates else None, gates))
        center, best = record.summary.mean, frontier.summary.mean if frontier else None
        if center is not None and (best is None or center < best):
            frontier = record
    return sorted(rows, key=lambda row: (row.mean is None, row.mean or 0.0, row.record.name))


def _row(record: PublicRecord, track: str, before: PublicRecord | None, gates: Sequence[Gate]) -> Row:
    if before is None or record.summary.mean is None:
        return Row(record=record, track=track, before="", difference=None, verdicts=())
    ours, theirs = scored_arm(record), scored_arm(before)
    # the rules are about a single comparison; how many runs were started is told in a column of its own
    ours = replace(ours, started=None)
    split = split_of(ours.scores)
    return Row(
        record=record, track=track, before=before.name, difference=difference(ours.values, theirs.values).value,
        verdicts=tuple(judge(gate, ours, theirs, split=split) for gate in gates),
    )  # fmt: skip


def chosen_gates(known: dict[str, Gate]) -> list[Gate]:
    """The challenge's rules. Raises ConfigError where the data lack one."""
    missing = [name for name in GATES if name not in known]
    if missing:
        raise ConfigError(f"there is no gate {missing[0]!r}", hint="gates.toml of this installation is damaged")
    return [known[name] for name in GATES]


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_record(board: Leaderboard) -> dict[str, Any]:
    """The leaderboard as plain JSON values, in full precision."""
    return {
        "std_convention": STD_CONVENTION,
        "tracks": {track: [row_record(row) for row in board.of(track)] for track in board.tracks},
    }


def row_record(row: Row) -> dict[str, Any]:
    found = row.record
    summary = found.summary
    return {
        "name": found.name, "folder": found.folder, "date": found.date, **{f"about_{k}": v for k, v in found.about.items()},
        "track": row.track, "stage": found.stage, "seeds": summary.count, "refused": len(found.refused),
        "mean_bpb": summary.mean, "std_bpb": summary.std, "low": summary.low, "high": summary.high,
        "claimed": _headline(found), "artifact_bytes_max": found.most_bytes,
        "before": row.before, "difference_bpb": row.difference,
        "gates": {
            verdict.gate.name: {
                "is_met": verdict.is_met, "p": verdict.difference.p_one_sided, "missing": list(verdict.missing),
            }
            for verdict in row.verdicts
        },
        "scores": [seed_record(seed) for seed in found.seeds],
        "other_runs": [f"{log.file}:{log.first_line}" for log in found.others],
        "disclosed": [{"seed": seed, "bpb": str(claim.value)} for seed, claim in found.disclosed],
        "conflicts": list(map(_conflict_record, found.conflicts)), "doubts": list(map(_conflict_record, found.doubts)),
        "notes": list(found.notes),
    }  # fmt: skip


def _conflict_record(conflict: Conflict) -> dict[str, Any]:
    return {"what": conflict.what, "said": [{"place": place, "text": text} for place, text in conflict.said]}


def seed_record(seed: RecordedSeed) -> dict[str, Any]:
    """One seed with its score, its place and the reason."""
    score = seed.score
    return {
        "seed": seed.seed, "bpb": score.bpb if score else None, "loss": score.loss if score else None,
        "stage": score.stage if score else None, "label": score.label if score else None, "place": seed.place,
        "why": seed.why, "steps": seed.steps, "artifact_bytes": seed.total_bytes,
        "train_seconds": seed.run.seconds("train_seconds") if seed.run else None,
        "stages": {
            name: {"bpb": line.bpb, "line": line.line} for name in ("post_ema", "roundtrip", "sliding", "ttt")
            if (line := seed.stage(name))
        },
    }  # fmt: skip


def _headline(record: PublicRecord) -> str | None:
    claim = record.submission.headline if record.submission else None
    return str(claim.value) if claim else None


CSV_FIELDS = (
    "track", "name", "date", "seeds", "refused", "stage", "mean_bpb", "std_bpb", "claimed", "artifact_bytes_max", "before",
    "difference_bpb",
)  # fmt: skip


def as_csv(board: Leaderboard) -> str:
    """A line a record; each gate's p and whether it is met; the number of conflicts."""
    names = list(dict.fromkeys(verdict.gate.name for row in board.rows for verdict in row.verdicts))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*CSV_FIELDS, *(f"{name}{end}" for name in names for end in ("_p", "_met")), "conflicts", "doubts"])
    for track in board.tracks:
        for row in board.of(track):
            record = row_record(row)
            judged = [record["gates"].get(name, {}).get(key) for name in names for key in ("p", "is_met")]
            writer.writerow(
                [*(record[field] for field in CSV_FIELDS), *judged, len(record["conflicts"]), len(record["doubts"])]
            )
    return out.getvalue()


def as_tables(board: Leaderboard) -> list[Table]:
    """A table a track."""
    return [_table(track, board.of(track)) for track in board.tracks]


def _table(track: str, rows: list[Row]) -> Table:
    gates = list(dict.fromkeys(verdict.gate.name for row in rows for verdict in row.verdicts))
    columns = (
        "Record",
        "Date",
        "Seeds",
        "Stage",
        "Mean BPB",
        "Std",
        "Claimed",
        "Largest bytes",
        "Against the row before",
        *gates,
    )
    return Table(
        title=track, columns=(*columns, "Conflicts", "Doubts"), rows=tuple(_cells(row, gates) for row in rows),
        note=(
            f"Means from the logs. Std: {STD_CONVENTION}. The row before is the best record until that day. A gate's column "
            "has its one-sided p, and ✓ where all that it asks for is met."
        ),
    )  # fmt: skip


def _cells(row: Row, gates: Sequence[str]) -> tuple[str, ...]:
    found, summary = row.record, row.record.summary
    by_name = {verdict.gate.name: verdict for verdict in row.verdicts}
    seeds = str(summary.count) + (f" of {len(found.seeds)}" if found.refused else "")
    return (
        found.name, found.date, seeds, found.stage or ABSENT, bpb(summary.mean), bpb(summary.std), _headline(found) or ABSENT,
        whole(found.most_bytes), signed(row.difference), *(_judged(by_name.get(name)) for name in gates), str(len(found.conflicts)), str(len(found.doubts)),
    )  # fmt: skip


def _judged(verdict: Verdict | None) -> str:
    if verdict is None:
        return ABSENT
    p = verdict.difference.p_one_sided
    return f"{ABSENT if p is None else f'{p:.3g}'}{' ✓' if verdict.is_met else ''}"


def seed_table(record: PublicRecord) -> Table:
    """One record: its seeds, their scores, where each stands and why it is the one."""
    rows = [
        (
            ABSENT if seed.seed is None else str(seed.seed), whole(seed.steps), bpb(seed.score.bpb if seed.score else None),
            seed.score.stage if seed.score else "refused", whole(seed.total_bytes), seed.place or ABSENT, seed.why,
        )
        for seed in record.seeds
    ]  # fmt: skip
    summary = record.summary
    spread = f", std {bpb(summary.std)} (n−1)" if summary.std is not None else ""
    claimed = _headline(record)
    return Table(
        title=record.name, columns=("Seed", "Steps", "BPB", "Stage", "Artifact bytes", "Place", "Why"), rows=tuple(rows),
        note=(
            f"{summary.count} of {len(record.seeds)} seeds, mean {bpb(summary.mean)}{spread}; submission.json claims {claimed or ABSENT}. "
            f"{len(record.others)} other runs in the folder, {len(record.disclosed)} told of without a log."
        ),
    )  # fmt: skip
