"""The report of a study: one claim in one sentence, and every number behind it with the file that it came from."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.charts import charts
from orchestrator.checks import FAILED
from orchestrator.evidence import BEST_ARM, PRESET_ARM, ArmEvidence, Evidence, RunEvidence, gather, read_curves
from orchestrator.home import Home, StudyDir
from orchestrator.page import render_page
from orchestrator.statistics import CONFIDENCE, STD_CONVENTION, Difference, PairedDifference
from orchestrator.tables import (
    STAGE_NAMES,
    as_markdown,
    as_text,
    bpb,
    params_table,
    params_text,
    record_frame,
    record_table,
    signed,
    tables,
)
from trainer import protocol
from trainer.protocol import write_bytes_atomically


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written, and what it says."""

    evidence: Evidence
    claim: str
    weaknesses: tuple[str, ...]
    """What weakens the result."""

    damage: tuple[str, ...]
    """Files that could not be read, each with its place; the numbers that they hold are missing."""

    page: Path
    text: Path
    data: Path
    record_csv: Path

    @property
    def problems(self) -> tuple[str, ...]:
        """All that a reader must know before he believes a number."""
        return self.weaknesses + self.damage


def write_report(home: Home, study_name: str) -> Report:
    """Write the report of a study, finished or not; raises ConfigError for an unknown one, StorageError."""
    evidence = gather(home, study_name)
    curves, unreadable = read_curves(home, evidence)
    damage = tuple(dict.fromkeys([*evidence.problems, *unreadable]))
    folder = home.study(study_name)
    report = Report(
        evidence=evidence, claim=claim(evidence), weaknesses=tuple(warnings(evidence)), damage=damage,
        page=folder.report_page, text=folder.report_text, data=folder.report_data, record_csv=folder.record_csv,
    )  # fmt: skip
    plots = charts(evidence, curves, _importance(evidence))
    page = render_page(
        title=study_name, question=evidence.study.question, claim=report.claim, problems=report.problems,
        tables=tables(evidence), charts=plots, footer=_footer(evidence, folder),
    )  # fmt: skip
    write_bytes_atomically(report.page, page.encode())
    write_bytes_atomically(report.text, render_markdown(report).encode())
    write_bytes_atomically(report.data, (json.dumps(as_record(report), indent=1, allow_nan=False) + "\n").encode())
    write_bytes_atomically(report.record_csv, record_frame(evidence.arms).to_csv(index=False).encode())
    return report


def _importance(evidence: Evidence) -> dict[str, float]:
    """Importance of each knob; nothing for a study that searched nothing."""
    if not evidence.study.space or not evidence.trials:
        return {}
    from orchestrator.search import knob_importance  # Optuna is loaded only where there is something to ask it

    return knob_importance(evidence.study, evidence.state)


# ── the claim ───────────────────────────────────────────────────────────────────────────────────────────────────────


def claim(evidence: Evidence) -> str:
    """What the study shows, in one sentence that says "within noise" where it is."""
    improvement, stage = evidence.improvement, STAGE_NAMES[evidence.objective]
    best, preset = evidence.arm(BEST_ARM), evidence.arm(PRESET_ARM)
    if improvement is not None and best is not None and preset is not None and improvement.value is not None:
        comparison = _comparison(best, preset, evidence.objective, improvement)
        return " ".join(filter(None, (comparison, _pairing(evidence.paired_improvement))))
    scored = [arm for arm in evidence.arms if arm.values(evidence.objective)]
    if scored and not evidence.trials:
        return " ".join(_mean_sentence(arm, evidence.objective) for arm in scored)
    if scored and evidence.state.best is not None and evidence.state.best.number == 0:
        return f"No trial was better than the preset. {_mean_sentence(scored[0], evidence.objective)}"
    found = evidence.state.best
    if found is None:
        return f"There is no {stage} yet: no run has ended with a score that keeps the limits."
    done = sum(item.trial.value is not None for item in evidence.trials)
    return (
        f"Not confirmed: the best of {done} scored trials is trial {found.number} with {stage} {bpb(found.value)} "
        f"({params_text(found.params)}), chosen for that value, so other seeds will probably give a higher one."
    )


def _comparison(best: ArmEvidence, preset: ArmEvidence, stage: str, found: Difference) -> str:
    """Best against preset, with the interval and what it means."""
    means = best.summary(stage), preset.summary(stage)
    head = (
        f"The best point ({params_text(best.params)}) has {STAGE_NAMES[stage]} {bpb(means[0].mean)} against {bpb(means[1].mean)} "
        f"of the preset, a difference of {signed(found.value)}"
    )
    seeds = f"{means[0].count} and {means[1].count} seeds"
    if found.low is None or found.high is None or found.p_one_sided is None:
        return f"{head} on {seeds}: too few seeds, or no spread, for an interval, so nothing follows."
    interval = f"{CONFIDENCE:.0%} Welch interval {signed(found.low)} to {signed(found.high)}, one-sided p = {found.p_one_sided:.2g}, {seeds}"
    if found.contains_zero:
        return f"{head} ({interval}): within noise, the interval contains zero."
    direction = "better" if found.high < 0 else "worse"
    return f"{head} ({interval}): {direction} than the preset, the interval excludes zero."


def _pairing(paired: PairedDifference | None) -> str:
    """The difference seed by seed, with the correlation that says what pairing is worth; empty where there is none."""
    if paired is None or paired.correlation is None:
        return ""
    found = paired.difference
    if found.low is None or found.high is None or found.p_one_sided is None:
        return ""
    return (
        f"Paired by seed, since both arms ran on the same {paired.count} seeds and their scores correlate by "
        f"{paired.correlation:.2f}: {signed(found.value)} ({CONFIDENCE:.0%} interval {signed(found.low)} to "
        f"{signed(found.high)}, one-sided p = {found.p_one_sided:.2g})."
    )


def _mean_sentence(arm: ArmEvidence, stage: str) -> str:
    summary = arm.summary(stage)
    spread = f" ± {bpb(summary.std)} (n−1)" if summary.std is not None else ""
    return f"{arm.name} has {STAGE_NAMES[stage]} {bpb(summary.mean)}{spread} over {summary.count} seed{'s' if summary.count != 1 else ''}."


def warnings(evidence: Evidence) -> list[str]:
    """What a sceptical reader must know before the numbers."""
    found = list(evidence.study.warnings())
    if evidence.state.closed != "finished":
        found.append(
            f"The study {'was ' + evidence.state.closed if evidence.state.closed else 'is not finished'}: this is its state so far."
        )
    for arm in evidence.arms:
        for run in arm.missing:
            found.append(
                f"{arm.name}, seed {run.seed} has no score ({run.state}{': ' + run.reason if run.reason else ''})."
            )
        over = [run.seed for run in arm.runs if _is_over_cap(run)]
        if over:
            found.append(f"{arm.name}: the artifact is over the cap on seeds {', '.join(map(str, over))}.")
        found += [
            f"{arm.name}, seed {run.seed} failed its clean-room check ({run.verification}): caddie verify {run.run_id}"
            for run in arm.runs
            if run.verified == FAILED
        ]
        found += [
            f"{arm.name}, seed {run.seed} failed its audit ({run.auditing}): caddie audit {run.run_id}"
            for run in arm.runs
            if run.audited == FAILED
        ]
        found += [
            f"{arm.name}, seed {run.seed}: the trainer warned of {text}." for run in arm.runs for text in run.warned
        ]
    return found


def _is_over_cap(run: RunEvidence) -> bool:
    return run.result is not None and 0 < run.result.cap_bytes < run.result.artifact_bytes


def _footer(evidence: Evidence, folder: StudyDir) -> str:
    return (
        f"Links lead to the result files under CADDIE_HOME ({folder.root.parent.parent}). std: {STD_CONVENTION}. Intervals: Student's t; "
        f"differences: Welch. {evidence.gpu_seconds:,.0f} GPU-seconds and {evidence.cpu_run_seconds:,.0f} seconds of runs without a GPU."
    )


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def render_text(report: Report) -> str:
    """The record tables and the claim, for a terminal."""
    evidence = report.evidence
    parts = [as_text(record_table(arm, has_sources=False)) for arm in evidence.arms]
    if evidence.study.space:
        parts.append(as_text(params_table(evidence)))
    return "\n\n".join([*parts, report.claim, *(f"warning: {weakness}" for weakness in report.weaknesses)])


def render_markdown(report: Report) -> str:
    """The whole report without its plots."""
    evidence = report.evidence
    head = [f"# {evidence.study.name}", "", evidence.study.question, "", f"> {report.claim}", ""]
    problems = [*(f"- {problem}" for problem in report.problems), ""] if report.problems else []
    return "\n".join([*head, *problems, "\n\n".join(as_markdown(table) for table in tables(evidence)), ""])


def as_record(report: Report) -> dict[str, Any]:
    """The report as plain JSON values, in full precision."""
    evidence = report.evidence
    return {
        "study": evidence.study.name,
        "question": evidence.study.question,
        "preset": evidence.study.preset,
        "objective": evidence.objective,
        "closed": evidence.state.closed,
        "claim": report.claim,
        "problems": list(report.problems),
        "std_convention": STD_CONVENTION,
        "confidence": CONFIDENCE,
        "improvement": dataclasses.asdict(evidence.improvement) if evidence.improvement else None,
        "paired_improvement": dataclasses.asdict(evidence.paired_improvement) if evidence.paired_improvement else None,
        "arms": [_arm_record(arm) for arm in evidence.arms],
        "trials": [
            {
                **dataclasses.asdict(found.trial),
                "is_feasible": found.trial.is_feasible,
                "runs": [_run_record(run) for run in found.runs],
            }
            for found in evidence.trials
        ],
        "attempts": [dataclasses.asdict(attempt) for attempt in evidence.attempts],
        "gpu_seconds": evidence.gpu_seconds,
        "cpu_run_seconds": evidence.cpu_run_seconds,
    }


def _arm_record(arm: ArmEvidence) -> dict[str, Any]:
    summaries = {stage: dataclasses.asdict(arm.summary(stage)) for stage in protocol.STAGES}
    runs = [_run_record(run) for run in arm.runs]
    return {"arm": arm.name, "trial": arm.trial, "params": arm.params, "bpb": summaries, "runs": runs}


def _run_record(run: RunEvidence) -> dict[str, Any]:
    result = run.result
    return {
        "seed": run.seed,
        "run_id": run.run_id,
        "state": run.state,
        "reason": run.reason,
        "source": run.source,
        "verified": run.verified,
        "verification": run.verification,
        "audited": run.audited,
        "auditing": run.auditing,
        "steps": result.steps if result else None,
        "bpb": {stage: run.bpb(stage) for stage in protocol.STAGES},
        "ttt_gain": run.ttt_gain,
        "quantization_gap": run.quantization_gap,
        "phases": result.phases if result else {},
        "bytes": {
            part: getattr(result, f"{part}_bytes") if result else None
            for part in ("bundle", "model", "artifact", "cap")
        },
    }
