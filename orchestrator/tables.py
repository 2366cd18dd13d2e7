"""The tables of a report, as text cells, and their three forms: terminal, Markdown, HTML.

A number is formatted here and nowhere else, so the three forms cannot disagree.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from orchestrator.evidence import ArmEvidence, Evidence, RunEvidence
from orchestrator.statistics import STD_CONVENTION, mean, sample_std
from trainer import protocol
from trainer.protocol import COMPLETE

ABSENT = "–"
LINK_ROOT = "../../../"
"""From a study's report folder up to CADDIE_HOME, for links to the files that numbers come from."""

STAGE_NAMES = {
    protocol.POST_EMA: "Post-EMA BPB",
    protocol.ROUNDTRIP: "Round-trip BPB",
    protocol.SLIDING: "Sliding BPB",
    protocol.TTT: "TTT BPB",
}
RECORD_COLUMNS = ("Seed", "Steps", "Sliding BPB", "TTT BPB", "TTT gain", "Artifact bytes")
"""The form in which the challenge's authors give a record."""


@dataclass(frozen=True)
class Link:
    """A cell that names a file under CADDIE_HOME."""

    path: str
    text: str = ""
    """What is shown, where it is not the path."""

    def __str__(self) -> str:
        return self.text or self.path or ABSENT


Cell = str | Link


@dataclass(frozen=True, kw_only=True)
class Table:
    """A heading, columns and text cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    """What a reader must know to read it: conventions, units."""

    summary_rows: int = 0
    """Last rows that summarise those above."""


def bpb(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.5f}"


def signed(value: float | None) -> str:
    """A difference in bits per byte, with a true minus sign."""
    return ABSENT if value is None else f"{value:+.5f}".replace("-", "−")


def whole(value: float | None) -> str:
    """A count or a number of bytes, with thousands separators."""
    return ABSENT if value is None else f"{round(value):,}"


def seconds(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.1f}"


def knob_text(value: Any) -> str:
    """A knob's value, to four significant digits where it is a float."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def params_text(params: dict[str, Any]) -> str:
    return ", ".join(f"{knob} = {knob_text(value)}" for knob, value in params.items()) or "unchanged"


# ── the record ──────────────────────────────────────────────────────────────────────────────────────────────────────


def record_frame(arms: Sequence[ArmEvidence]) -> pd.DataFrame:
    """One row a seed of every arm, full precision, seeds without a result included with their reason."""
    rows = [
        {
            "arm": arm.name,
            "seed": run.seed,
            "state": run.state,
            "reason": run.reason,
            "steps": run.result.steps if run.result else None,
            **{f"{stage}_bpb": run.bpb(stage) for stage in protocol.STAGES},
            "ttt_gain": run.ttt_gain,
            "artifact_bytes": _artifact_bytes(run),
            "verified": run.verified,
            "audited": run.audited,
            "run_id": run.run_id,
            "source": run.source,
        }
        for arm in arms
        for run in arm.runs
    ]
    columns = ["arm", "seed", "state", "reason", "steps", *(f"{stage}_bpb" for stage in protocol.STAGES)]
    frame = pd.DataFrame(
        rows, columns=[*columns, "ttt_gain", "artifact_bytes", "verified", "audited", "run_id", "source"]
    )
    return frame.astype({"seed": "Int64", "steps": "Int64", "artifact_bytes": "Int64"})


def record_table(arm: ArmEvidence, *, has_sources: bool = True) -> Table:
    """The record of one arm: a row a seed, mean, standard deviation; a seed without a result keeps its row and reason."""
    extra = _extra_columns(arm, has_sources=has_sources)
    columns = (*RECORD_COLUMNS, *extra)
    rows = [_record_row(run, extra) for run in arm.runs]
    complete = [run for run in arm.runs if run.result is not None and run.result.status == COMPLETE]
    padding = ("",) * len(extra)
    rows.append((f"mean of {len(complete)}", *_record_numbers(complete, mean), *padding))
    rows.append(("std (n−1)", *_record_numbers(complete, sample_std), *padding))
    return Table(
        title=f"Record: {arm.name}",
        columns=columns,
        rows=tuple(rows),
        note=f"{params_text(arm.params)}. BPB: bits per byte, lower is better. std: {STD_CONVENTION}.",
        summary_rows=2,
    )


def _extra_columns(arm: ArmEvidence, *, has_sources: bool) -> tuple[str, ...]:
    """Columns beside the authors', where there is something to put into them."""
    verified = ("Verified",) if any(run.verified for run in arm.runs) else ()
    audited = ("Audited",) if any(run.audited for run in arm.runs) else ()
    return (*verified, *audited, *(("Note",) if arm.missing else ()), *(("Source",) if has_sources else ()))


def _record_row(run: RunEvidence, extra: Sequence[str]) -> tuple[Cell, ...]:
    steps = whole(run.result.steps) if run.result else ABSENT
    cells: tuple[Cell, ...] = (
        str(run.seed), steps, bpb(run.bpb(protocol.SLIDING)), bpb(run.bpb(protocol.TTT)), signed(run.ttt_gain),
        whole(_artifact_bytes(run)),
    )  # fmt: skip
    note = "" if run.state == COMPLETE else f"{run.state}: {run.reason}".rstrip(": ")
    beside: dict[str, Cell] = {
        "Verified": Link(run.verification, run.verified),
        "Audited": Link(run.auditing, run.audited),
        "Note": note,
        "Source": Link(run.source),
    }
    return (*cells, *(beside[column] for column in extra))


def _record_numbers(runs: Sequence[RunEvidence], reduce: Callable[[Sequence[float]], float | None]) -> tuple[str, ...]:
    """The summary of each numeric column over the complete seeds."""

    def over(values: Iterable[float | None]) -> float | None:
        return reduce([float(value) for value in values if value is not None])

    return (
        whole(over(run.result.steps if run.result else None for run in runs)),
        bpb(over(run.bpb(protocol.SLIDING) for run in runs)),
        bpb(over(run.bpb(protocol.TTT) for run in runs)),
        # the spread of a gain has no sign
        (signed if reduce is mean else bpb)(over(run.ttt_gain for run in runs)),
        whole(over(_artifact_bytes(run) for run in runs)),
    )


def _artifact_bytes(run: RunEvidence) -> int | None:
    return run.result.artifact_bytes if run.result and run.result.artifact_bytes else None


# ── the rest of a report ────────────────────────────────────────────────────────────────────────────────────────────


def tables(evidence: Evidence) -> list[Table]:
    """Every table of the report, in its order; those without rows are left out."""
    found = [
        *(record_table(arm) for arm in evidence.arms),
        params_table(evidence),
        stages_table(evidence),
        bytes_table(evidence),
        phases_table(evidence),
        trials_table(evidence),
        attempts_table(evidence),
    ]
    return [table for table in found if table.rows]


def params_table(evidence: Evidence) -> Table:
    """The best point beside the preset."""
    preset, best = evidence.study.preset_params(), evidence.state.best
    rows = tuple(
        (knob, knob_text(preset[knob]), knob_text(best.params[knob]) if best else ABSENT)
        for knob in evidence.study.space
    )
    heading = f"Best (trial {best.number})" if best else "Best"
    return Table(title="Knobs", columns=("Knob", f"Preset {evidence.study.preset}", heading), rows=rows)


def _scored(evidence: Evidence) -> list[RunEvidence]:
    return [run for run in evidence.runs if run.result is not None and run.result.scores]


def parity(run: RunEvidence) -> str:
    """How far the two scoring paths are apart before anything is adapted."""
    found = run.result.parity_nats if run.result else None
    return ABSENT if found is None else f"{found:.1e}"


def stages_table(evidence: Evidence) -> Table:
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            run.owner, str(run.seed), *(bpb(run.bpb(stage)) for stage in protocol.STAGES),
            signed(run.quantization_gap), signed(run.ttt_gain), parity(run), Link(run.source),
        )
        for run in _scored(evidence)
    )  # fmt: skip
    return Table(
        title="Stages",
        columns=("Run of", "Seed", *STAGE_NAMES.values(), "Quantisation gap", "TTT gain", "Parity", "Source"),
        rows=rows,
        note="Quantisation gap: round trip − post-EMA, what the stored model loses. TTT gain: sliding − TTT. "
        "Parity: the first TTT chunk before any update − the sliding score of the same tokens, in nats per token; the "
        "trainer fails a run whose two paths differ. Each score is scores.<stage>.bpb of its source.",
    )


def bytes_table(evidence: Evidence) -> Table:
    """Bytes by part, and what is left under the cap."""
    rows: list[tuple[Cell, ...]] = []
    for run in evidence.runs:
        result = run.result
        if result is not None and result.artifact_bytes:
            headroom = result.cap_bytes - result.artifact_bytes
            sizes = (result.bundle_bytes, result.model_bytes, result.artifact_bytes, result.cap_bytes)
            left = f"{headroom:,}".replace("-", "−") + (" over the cap" if headroom < 0 else "")
            rows.append((run.owner, str(run.seed), *map(whole, sizes), left, Link(run.source)))
    columns = ("Run of", "Seed", "Bundle", "Model", "Artifact", "Cap", "Headroom", "Source")
    return Table(title="Bytes", columns=columns, rows=tuple(rows), note="Decimal bytes of the files that are shipped.")


def phases_table(evidence: Evidence) -> Table:
    runs = [run for run in evidence.runs if run.result is not None and run.result.phases]
    names = list(dict.fromkeys(name for run in runs if run.result for name in run.result.phases))
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (run.owner, str(run.seed), *(seconds(run.result.phases.get(name)) for name in names), Link(run.source))
        for run in runs
        if run.result is not None
    )
    note = "Seconds, on one clock from the start of the process."
    return Table(title="Phases", columns=("Run of", "Seed", *names, "Source"), rows=rows, note=note)


def trials_table(evidence: Evidence) -> Table:
    """Every point that was asked, with what became of it."""
    knobs = tuple(evidence.study.space)
    rows: list[tuple[Cell, ...]] = []
    for found in evidence.trials:
        trial = found.trial
        violation = ", ".join(f"{name} +{knob_text(value)}" for name, value in trial.constraints.items() if value > 0)
        values = (knob_text(trial.params.get(knob, ABSENT)) for knob in knobs)
        source = next((run.source for run in found.runs), "")
        rows.append(
            (
                str(trial.number),
                trial.origin,
                *values,
                bpb(trial.value),
                trial.state,
                trial.reason,
                violation,
                Link(source),
            )
        )
    name = STAGE_NAMES[evidence.objective]
    columns = ("Trial", "Origin", *knobs, name, "State", "Reason", "Constraint violation", "Source")
    searched = ", ".join(map(str, evidence.study.search.seeds))
    return Table(title="Trials", columns=columns, rows=tuple(rows), note=f"{name}: mean over seeds {searched}.")


def attempts_table(evidence: Evidence) -> Table:
    """Everything that was started, failed and stopped runs included."""
    rows = tuple(
        (
            attempt.run_id, str(attempt.number), "; ".join(attempt.owners), attempt.job_id or ABSENT, attempt.status,
            attempt.failure, seconds(attempt.seconds), str(attempt.gpus), Link(attempt.source),
        )
        for attempt in evidence.attempts
    )  # fmt: skip
    return Table(
        title="Started runs",
        columns=("Run", "Attempt", "Asked by", "Job", "Status", "Why", "Seconds", "GPUs", "Source"),
        rows=rows,
        note=f"{whole(evidence.gpu_seconds)} GPU-seconds; {whole(evidence.cpu_run_seconds)} seconds of runs without a GPU.",
    )


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_number(cell: Cell) -> bool:
    """Whether a cell belongs to the right of its column."""
    return isinstance(cell, str) and (
        cell == ABSENT or cell.replace("−", "-").replace(",", "").lstrip("+-").replace(".", "", 1).isdigit()
    )


def _is_numeric_column(table: Table, index: int) -> bool:
    cells = [row[index] for row in table.rows[: len(table.rows) - table.summary_rows]]
    return all(is_number(cell) for cell in cells if cell)


def as_text(table: Table) -> str:
    """Aligned columns for a terminal."""
    grid = [table.columns, *[tuple(str(cell) for cell in row) for row in table.rows]]
    widths = [max(len(row[i]) for row in grid) for i in range(len(table.columns))]
    right = [_is_numeric_column(table, i) for i in range(len(table.columns))]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in grid
    ]
    rule = "─" * max(map(len, lines))
    body = [lines[0], rule, *lines[1:]]
    if table.summary_rows:
        body.insert(len(body) - table.summary_rows, rule)
    return "\n".join([table.title, "", *body, *(["", table.note] if table.note else [])])


def as_markdown(table: Table) -> str:
    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    def cell(value: Cell) -> str:
        return f"[{value}]({LINK_ROOT}{value.path})" if isinstance(value, Link) and value.path else str(value)

    rule = ["---:" if _is_numeric_column(table, i) else ":---" for i in range(len(table.columns))]
    first_summary = len(table.rows) - table.summary_rows
    rows = [
        line(f"**{cell(c)}**" if i >= first_summary and c else cell(c) for c in row) for i, row in enumerate(table.rows)
    ]
    return "\n".join(
        [f"## {table.title}", "", line(table.columns), line(rule), *rows, *(["", table.note] if table.note else [])]
    )


def as_html(table: Table) -> str:
    """A table that scrolls sideways on a narrow screen, its numbers aligned."""
    numeric = [_is_numeric_column(table, i) for i in range(len(table.columns))]

    def cells(values: Iterable[Cell], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if is_right else ''}>{_html_cell(value)}</{tag}>"
            for value, is_right in zip(values, numeric, strict=True)
        )

    first_summary = len(table.rows) - table.summary_rows
    rows = [
        f"<tr{' class=summary' if i >= first_summary else ''}>{cells(row, 'td')}</tr>"
        for i, row in enumerate(table.rows)
    ]
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    head, body = cells(table.columns, "th"), "\n".join(rows)
    return (
        f"<div class=wide tabindex=0><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>{note}"
    )


def _html_cell(value: Cell) -> str:
    if isinstance(value, Link) and value.path:
        return f'<a href="{html.escape(LINK_ROOT + value.path)}">{html.escape(str(value))}</a>'
    return html.escape(str(value))
