"""The tables of a study's report: the record in its authors' form first, then every number behind it with its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import pandas as pd

from orchestrator.cells import (
    ABSENT,
    Cell,
    Link,
    Table,
    bpb,
    knob_text,
    params_text,
    probability,
    seconds,
    signed,
    whole,
)
from orchestrator.compare import STATES, Comparison, permutations, test_rows
from orchestrator.evidence import ArmEvidence, Curve, Evidence, RunEvidence
from orchestrator.family import Relative
from orchestrator.footing import WAYS, WINDOW, adjusted_for_steps, footing, throughput
from orchestrator.gates import Verdict
from orchestrator.replicates import WITHIN_NOISE, differences, spread_of
from orchestrator.statistics import CONFIDENCE, STD_CONVENTION, Difference, mean, sample_std
from trainer import protocol
from trainer.protocol import COMPLETE

STAGE_NAMES = {
    protocol.POST_EMA: "Post-EMA BPB",
    protocol.ROUNDTRIP: "Round-trip BPB",
    protocol.SLIDING: "Sliding BPB",
    protocol.TTT: "TTT BPB",
}
RECORD_COLUMNS = ("Seed", "Steps", "Sliding BPB", "TTT BPB", "TTT gain", "Artifact bytes")
"""The form in which the challenge's authors give a record."""

LONG_ROWS = 24
"""A list of more rows is folded on the page until a reader wants it."""

MOST_DETAILED = 100
"""Runs of the search whose stages, bytes, phases and speed a report shows, the best trials' first; the CSV has all."""

CITED = {
    "steps": "/steps",
    "artifact_bytes": "/artifact_bytes",
    "bundle_bytes": "/bundle_bytes",
    "model_bytes": "/model_bytes",
    "train_seconds": "/train_seconds",
    **{f"{stage}_bpb": f"/scores/{stage}/bpb" for stage in protocol.STAGES},
}
"""Numbers of a record's run and their JSON pointers in its result."""


def at(run: RunEvidence, pointer: str, text: str) -> Cell:
    """A number of a run's result, with the line that it was read from."""
    line = run.lines.get(pointer, 0)
    return Link(run.source, text, line, pointer) if line and text != ABSENT else text


def cited(run: RunEvidence, stage: str) -> Cell:
    """A stage's bits per byte, with its line."""
    return at(run, f"/scores/{stage}/bpb", bpb(run.bpb(stage)))


# ── the record ──────────────────────────────────────────────────────────────────────────────────────────────────────


def record_frame(arms: Sequence[ArmEvidence]) -> pd.DataFrame:
    """One row a seed of every arm, full precision with the line of each number; seeds without a result with their reason."""
    return runs_frame([run for arm in arms for run in arm.runs]).rename(columns={"owner": "arm"})


def runs_frame(runs: Sequence[RunEvidence]) -> pd.DataFrame:
    """The same, a row a run, of whatever owner."""
    rows = [
        {
            "owner": run.owner, "seed": run.seed, "state": run.state, "reason": run.reason, **_record_values(run),
            "ttt_gain": run.ttt_gain, "verified": run.verified, "audited": run.audited, "run_id": run.run_id,
            "source": run.source, **{f"{name}_line": run.lines.get(pointer) for name, pointer in CITED.items()},
        }
        for run in runs
    ]  # fmt: skip
    lines = [f"{name}_line" for name in CITED]
    columns = [
        "owner",
        "seed",
        "state",
        "reason",
        *CITED,
        "ttt_gain",
        "verified",
        "audited",
        "run_id",
        "source",
        *lines,
    ]
    counts = [name for name in CITED if name == "steps" or name.endswith("_bytes")]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(["seed", *counts, *lines], "Int64"))


def _record_values(run: RunEvidence) -> dict[str, float | int | None]:
    """The cited numbers of a run; sizes only of an artifact that there is, scores only of a complete run."""
    result = run.result
    sizes = {name: getattr(result, name) or None if result else None for name in CITED if name.endswith("_bytes")}
    scores = {f"{stage}_bpb": run.bpb(stage) for stage in protocol.STAGES}
    return {
        "steps": result.steps if result else None, "train_seconds": result.train_seconds if result else None,
        **sizes, **scores,
    }  # fmt: skip


EARLY_SCORE = "Round-trip BPB"
"""Column of a record whose runs end with this score, as somebody else's script may."""


def record_table(arm: ArmEvidence, *, has_sources: bool = True) -> Table:
    """The record of one arm: a row a seed, mean, standard deviation; a seed without a result keeps its row and reason."""
    extra = _extra_columns(arm, has_sources=has_sources)
    columns = (*RECORD_COLUMNS, *extra)
    rows = [_record_row(run, extra) for run in arm.runs]
    complete = [run for run in arm.runs if run.result is not None and run.result.status == COMPLETE]
    rows.append((f"mean of {len(complete)}", *_record_numbers(complete, mean), *_extra_numbers(complete, extra, mean)))
    rows.append(("std (n−1)", *_record_numbers(complete, sample_std), *_extra_numbers(complete, extra, sample_std)))
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
    is_early = arm.values(protocol.ROUNDTRIP) and not arm.values(protocol.SLIDING) and not arm.values(protocol.TTT)
    score = (EARLY_SCORE,) if is_early else ()
    return (*score, *verified, *audited, *(("Note",) if arm.missing else ()), *(("Source",) if has_sources else ()))


def _extra_numbers(
    runs: Sequence[RunEvidence], extra: Sequence[str], reduce: Callable[[Sequence[float]], float | None]
) -> tuple[str, ...]:
    """The summary of those of the further columns that hold a number."""
    values = [value for run in runs if (value := run.bpb(protocol.ROUNDTRIP)) is not None]
    return tuple(bpb(reduce(values)) if column == EARLY_SCORE else "" for column in extra)


def _record_row(run: RunEvidence, extra: Sequence[str]) -> tuple[Cell, ...]:
    cells: tuple[Cell, ...] = (
        str(run.seed), at(run, "/steps", whole(run.result.steps) if run.result else ABSENT),
        cited(run, protocol.SLIDING), cited(run, protocol.TTT), signed(run.ttt_gain),
        at(run, "/artifact_bytes", whole(_artifact_bytes(run))),
    )  # fmt: skip
    note = "" if run.state == COMPLETE else f"{run.state}: {run.reason}".rstrip(": ")
    beside: dict[str, Cell] = {
        EARLY_SCORE: cited(run, protocol.ROUNDTRIP),
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


# ── the comparison ──────────────────────────────────────────────────────────────────────────────────────────────────


def comparison_tables(comparison: Comparison | None) -> list[Table]:
    """The gates, and every test of the two arms; nothing where nothing is compared."""
    if comparison is None:
        return []
    return [table for table in (gates_table(comparison), tests_table(comparison)) if table.rows]


def gates_table(comparison: Comparison) -> Table:
    """A row a gate: whether it is met, and by how much; what is missing stands with the claim."""
    sources = " ".join(f"{v.gate.name}: {v.gate.date}, {v.gate.source}." for v in comparison.verdicts)
    return Table(
        title="Gates",
        columns=("Gate", "State", "Margin", "Gain", "p", "p needed", "Adjusted p", "p to spare", "More seeds"),
        rows=tuple(_gate_row(verdict) for verdict in comparison.verdicts),
        note=f"{comparison.candidate.name} against {comparison.baseline.name}, in bits per byte. p to spare: by how many the "
        "mean is lower than p needs, below zero by how many it must still fall. More seeds: for p, with this mean and spread. "
        "Adjusted p: times the equal chances that were started for the claim (Bonferroni). open: nothing speaks against it, "
        f"and something cannot be decided. Sources: {sources}",
    )


def _gate_row(verdict: Verdict) -> tuple[Cell, ...]:
    gate, p = verdict.gate, verdict.difference.p_one_sided
    gain = None if verdict.difference.value is None else -verdict.difference.value
    return (
        gate.name, STATES[verdict.is_met], bpb(verdict.margin_bpb), signed(gain), probability(p), f"< {gate.alpha:g}",
        probability(verdict.adjusted_p), signed(verdict.slack_bpb), whole(verdict.more_seeds),
    )  # fmt: skip


def tests_table(comparison: Comparison) -> Table:
    rows = [
        (
            name, signed(found.value), _interval(found), probability(found.p_one_sided), _number(found.statistic),
            _number(found.degrees_of_freedom), words,
        )
        for name, found, words in test_rows(comparison)
    ]  # fmt: skip
    rows += [
        (name, ABSENT, ABSENT, probability(p), ABSENT, ABSENT, words) for name, p, words in permutations(comparison)
    ]
    return Table(
        title="Tests",
        columns=(
            "Test",
            "Difference",
            f"{CONFIDENCE:.0%} interval",
            "One-sided p",
            "Statistic",
            "df",
            "Takes for granted",
        ),
        rows=tuple(rows),
        note=f"{comparison.candidate.name} − {comparison.baseline.name} in bits per byte; below zero the first is better. "
        "p: of a difference this low or lower, were there none.",
    )


def _interval(found: Difference) -> str:
    return ABSENT if found.low is None else f"{signed(found.low)} to {signed(found.high)}"


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}".replace("-", "−")


def footing_table(evidence: Evidence, curves: Sequence[Curve], arms: tuple[str, str]) -> Table:
    """Both arms at equal steps and at equal seconds, and the score with the steps as covariate."""
    first, second = (evidence.arm(name) for name in arms)
    rows = []
    for way in WAYS:
        found = footing(curves, *arms, way=way)
        if found is not None:
            gap = found.difference
            losses = (mean(list(found.candidate.values())), mean(list(found.baseline.values())))
            rows.append(
                (
                    f"training loss at equal {way}", f"{found.point:,.6g}", *map(bpb, losses), signed(gap.value),
                    _interval(gap), probability(gap.p_one_sided),
                )
            )  # fmt: skip
    adjusted = adjusted_for_steps(first, second, evidence.objective) if first and second else None
    if adjusted is not None and first and second:
        means = (first.summary(evidence.objective).mean, second.summary(evidence.objective).mean)
        rows.append(
            (
                f"{STAGE_NAMES[evidence.objective]} less what steps explain", ABSENT, *map(bpb, means),
                signed(adjusted.value), ABSENT, ABSENT,
            )
        )  # fmt: skip
    slope = f" {adjusted.slope:+.3g} bits per byte a step (correlation {adjusted.correlation:.2f})." if adjusted else ""
    return Table(
        title="At equal steps and equal time",
        columns=("What", "At", *arms, "Difference", f"{CONFIDENCE:.0%} interval", "One-sided p"),
        rows=tuple(rows),
        note=f"Training loss: nats per token, mean over the last {WINDOW:.0%} before the last point that every complete run reached. "
        "A schedule that follows the clock is further on at equal steps where steps are slow. Steps as covariate: one line "
        f"through both arms' seeds.{slope}",
    )


# ── the runs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def params_table(evidence: Evidence) -> Table:
    """The best point beside the preset."""
    preset, best = evidence.study.preset_params(), evidence.state.best
    rows = tuple(
        (knob, knob_text(preset[knob]), knob_text(best.params[knob]) if best else ABSENT)
        for knob in evidence.study.space
    )
    heading = f"Best (trial {best.number})" if best else "Best"
    return Table(title="Knobs", columns=("Knob", f"Preset {evidence.study.preset}", heading), rows=rows)


def detailed(evidence: Evidence) -> list[RunEvidence]:
    """The arms' runs and those of the best trials, in their order."""
    ranked = sorted(evidence.trials, key=lambda found: (found.trial.value is None, found.trial.value or 0.0))
    shown = {run.run_id for found in ranked for run in found.runs}
    if len(shown) > MOST_DETAILED:
        shown = {run.run_id for found in ranked[:MOST_DETAILED] for run in found.runs}
    arms = {run.run_id for arm in evidence.arms for run in arm.runs}
    return [run for run in evidence.runs if run.run_id in shown or run.run_id in arms]


def _undetailed(evidence: Evidence) -> str:
    """Says how many runs a table leaves to the CSV."""
    left = len(evidence.runs) - len(detailed(evidence))
    return f" {left:,} runs of trials that are not among the best {MOST_DETAILED} stand in runs.csv." if left else ""


def _scored(evidence: Evidence) -> list[RunEvidence]:
    return [run for run in detailed(evidence) if run.result is not None and run.result.scores]


def parity(run: RunEvidence) -> str:
    """How far the two scoring paths are apart before anything is adapted."""
    found = run.result.parity_nats if run.result else None
    return ABSENT if found is None else f"{found:.1e}"


def _loss(run: RunEvidence, stage: str) -> Cell:
    """A stage's loss in nats per token, with its line."""
    found = run.result.scores.get(stage) if run.result else None
    return at(run, f"/scores/{stage}/loss", bpb(found.loss if found else None))


def stages_table(evidence: Evidence) -> Table:
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            run.owner, str(run.seed), *(cited(run, stage) for stage in protocol.STAGES), _loss(run, evidence.objective),
            signed(run.quantization_gap), signed(run.ttt_gain), at(run, "/parity_nats", parity(run)), Link(run.source),
        )
        for run in _scored(evidence)
    )  # fmt: skip
    loss = f"{STAGE_NAMES[evidence.objective].removesuffix(' BPB')} nats"
    return Table(
        title="Stages",
        columns=("Run of", "Seed", *STAGE_NAMES.values(), loss, "Quantisation gap", "TTT gain", "Parity", "Source"),
        rows=rows,
        note="Quantisation gap: round trip − post-EMA, what the stored model loses. TTT gain: sliding − TTT. "
        "nats: per token. Parity: the first TTT chunk before any update − the sliding score of the same tokens, in nats "
        "per token; the trainer fails a run whose two paths differ. Each score is scores.<stage>.bpb of its source."
        + _undetailed(evidence),
        is_long=len(rows) > LONG_ROWS,
    )


def bytes_table(evidence: Evidence) -> Table:
    """Bytes by part, and what is left under the cap."""
    rows: list[tuple[Cell, ...]] = []
    for run in detailed(evidence):
        result = run.result
        if result is not None and result.artifact_bytes:
            headroom = result.cap_bytes - result.artifact_bytes
            parts = ("bundle_bytes", "model_bytes", "artifact_bytes", "cap_bytes")
            sizes = (at(run, f"/{name}", whole(getattr(result, name))) for name in parts)
            left = f"{headroom:,}".replace("-", "−") + (" over the cap" if headroom < 0 else "")
            rows.append((run.owner, str(run.seed), *sizes, left, Link(run.source)))
    columns = ("Run of", "Seed", "Bundle", "Model", "Artifact", "Cap", "Headroom", "Source")
    return Table(
        title="Bytes", columns=columns, rows=tuple(rows), note="Decimal bytes of the files that are shipped." + _undetailed(evidence),
        is_long=len(rows) > LONG_ROWS,
    )  # fmt: skip


def groups_table(evidence: Evidence, sizes: Mapping[str, Mapping[str, int]]) -> Table:
    """Bytes of the model files by group of tensors, of the arms' runs whose files can be read."""
    runs = [run for arm in evidence.arms for run in arm.runs if run.run_id in sizes and run.result]
    groups = list(dict.fromkeys(group for run in runs for group in sizes[run.run_id]))
    rows = tuple(
        (
            run.owner, str(run.seed), whole(run.result.bundle_bytes),
            *(whole(sizes[run.run_id].get(group)) for group in groups),
            whole(run.result.bundle_bytes + sum(sizes[run.run_id].values())),
        )
        for run in runs
        if run.result
    )  # fmt: skip
    note = "Measured on each run's model file. The matrices share one coded stream: its bytes fall to them by their entropy."
    return Table(
        title="Bytes of each group", columns=("Run of", "Seed", "code", *groups, "Total"), rows=rows, note=note
    )


def phases_table(evidence: Evidence) -> Table:
    runs = [run for run in detailed(evidence) if run.result is not None and run.result.phases]
    names = list(dict.fromkeys(name for run in runs if run.result for name in run.result.phases))
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            run.owner, str(run.seed),
            *(at(run, f"/phases/{name}", seconds(run.result.phases.get(name))) for name in names), Link(run.source),
        )
        for run in runs
        if run.result is not None
    )  # fmt: skip
    clock = "as the script's log tells them" if evidence.study.script else "on one clock from the start of the process"
    note = f"Seconds, {clock}." + _undetailed(evidence)
    return Table(
        title="Phases",
        columns=("Run of", "Seed", *names, "Source"),
        rows=rows,
        note=note,
        is_long=len(rows) > LONG_ROWS,
    )


def throughput_table(evidence: Evidence) -> Table:
    """How fast each run trained, and on what."""
    rows: list[tuple[Cell, ...]] = []
    for run in detailed(evidence):
        found, result = throughput(run), run.result
        if found is not None and result is not None:
            memory = f"{result.peak_memory_bytes / 2**20:,.0f}" if result.peak_memory_bytes else ABSENT
            rows.append(
                (
                    run.owner, str(run.seed), at(run, "/steps", whole(found.steps)), at(run, "/tokens", whole(found.tokens)),
                    at(run, "/train_seconds", seconds(result.train_seconds)), f"{found.ms_per_step:,.2f}",
                    whole(found.tokens_per_second), at(run, "/device", result.device), str(result.world_size),
                    at(run, "/peak_memory_bytes", memory), Link(run.source),
                )
            )  # fmt: skip
    return Table(
        title="Throughput",
        columns=(
            "Run of", "Seed", "Steps", "Tokens", "Training s", "ms per step", "Tokens per s", "Device", "Processes",
            "Peak MiB", "Source",
        ),
        rows=tuple(rows),
        note="Training s: as it counts, calibration included. ms per step and tokens per s: of the training loop alone."
        + _undetailed(evidence),
        is_long=len(rows) > LONG_ROWS,
    )  # fmt: skip


def trials_table(evidence: Evidence) -> Table:
    """Every point that was asked, with what became of it."""
    knobs, gaps = tuple(evidence.study.space), differences(evidence)
    rows: list[tuple[Cell, ...]] = []
    for found in evidence.trials:
        trial = found.trial
        violation = ", ".join(f"{name} +{knob_text(value)}" for name, value in trial.constraints.items() if value > 0)
        values = (knob_text(trial.params.get(knob, ABSENT)) for knob in knobs)
        source = next((run.source for run in found.runs), "")
        rows.append(
            (
                str(trial.number), trial.origin, *values, bpb(trial.value), _gap(gaps.get(trial.number)), trial.state,
                trial.reason, violation,
                Link(source),
            )
        )  # fmt: skip
    name = STAGE_NAMES[evidence.objective]
    columns = ("Trial", "Origin", *knobs, name, "− preset", "State", "Reason", "Constraint violation", "Source")
    searched, spread = ", ".join(map(str, evidence.study.search.seeds)), spread_of(evidence)
    noise = f" − preset: the difference from trial 0; within noise where {spread} explains it." if spread else ""
    return Table(
        title="Trials", columns=columns, rows=tuple(rows), note=f"{name}: mean over seeds {searched}.{noise}",
        is_long=len(rows) > LONG_ROWS,
    )  # fmt: skip


def _gap(found: tuple[float, bool | None] | None) -> str:
    """A difference, and that it is within noise where it is."""
    if found is None:
        return ABSENT
    return f"{signed(found[0])}, {WITHIN_NOISE}" if found[1] else signed(found[0])


def attempts_table(evidence: Evidence) -> Table:
    """Everything that was started, failed and stopped runs included."""
    rows = tuple(
        (
            attempt.run_id, str(attempt.number), "; ".join(attempt.owners), attempt.job_id or ABSENT, attempt.status,
            "; ".join(filter(None, (attempt.failure, attempt.began))), seconds(attempt.seconds), str(attempt.gpus),
            Link(attempt.source),
        )
        for attempt in evidence.attempts
    )  # fmt: skip
    return Table(
        title="Started runs",
        columns=("Run", "Attempt", "Asked by", "Job", "Status", "Why", "Seconds", "GPUs", "Source"),
        rows=rows,
        note=f"{whole(evidence.gpu_seconds)} GPU-seconds; {whole(evidence.cpu_run_seconds)} seconds of runs without a GPU.",
        is_long=len(rows) > LONG_ROWS,
    )


def family_table(evidence: Evidence, family: Sequence[Relative]) -> Table:
    """Every run of the arms' configurations on their data, of this study and of others."""
    arm_of = {run.run_id: arm.name for arm in evidence.arms for run in arm.runs}
    names = {run.family: arm_of[run.run_id] for run in family if run.run_id in arm_of}
    rows = tuple(
        (
            names.get(run.family, ABSENT), str(run.seed), run.run_id, str(run.replicate), run.study or ABSENT,
            str(run.attempts), run.state, bpb(run.bpb(evidence.objective)), "yes" if run.run_id in arm_of else "no",
            _why(run), Link(run.source),
        )
        for run in family
    )  # fmt: skip
    return Table(
        title="The whole family",
        columns=(
            "Configuration of", "Seed", "Run", "Replicate", "Asked by", "Attempts", "State",
            STAGE_NAMES[evidence.objective], "In the record", "Why", "Source",
        ),
        rows=rows,
        note="Every run here of the same configuration on the same data, whoever asked for it, failed and stopped ones included.",
        is_long=len(rows) > LONG_ROWS,
    )  # fmt: skip


def _why(run: Relative) -> str:
    failure = run.result.failure if run.result else None
    return run.problem or (f"{failure.kind}: {failure.message}" if failure else "")


def lines_table(evidence: Evidence) -> Table:
    """What the record cites, in full digits, with file, line and pointer."""
    rows: list[tuple[Cell, ...]] = []
    for arm in evidence.arms:
        for run in arm.runs:
            values = _record_values(run)
            for name, pointer in CITED.items():
                if run.lines.get(pointer) and values[name] is not None:
                    place = Link(run.source, f"{run.source}:{run.lines[pointer]}", run.lines[pointer], pointer)
                    rows.append((arm.name, str(run.seed), name, repr(values[name]), pointer, place))
    return Table(
        title="Cited lines", columns=("Record", "Seed", "What", "Value", "JSON pointer", "File and line"),
        rows=tuple(rows), note="Files lie under CADDIE_HOME; line numbers count from 1.", is_long=True,
    )  # fmt: skip
