"""The report of a study: one claim in one sentence, the rules that it meets, and every number behind it with its place."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import byte_counts, compare, contest, costs, interactions, interleave, repeat, replicates, variance
from orchestrator.arms import find_arm, study_arm
from orchestrator.byte_counts import ByteCount
from orchestrator.cells import Table, as_markdown, as_text, bpb, params_text, probability, signed
from orchestrator.charts import Chart, charts
from orchestrator.checks import FAILED
from orchestrator.compare import STATES, Comparison, compare_arms
from orchestrator.contest import Contest
from orchestrator.costs import Costs
from orchestrator.datasets import ask_trainer
from orchestrator.errors import CaddieError
from orchestrator.evidence import ArmEvidence, Curve, Evidence, RunEvidence, gather, read_curves
from orchestrator.family import Relative, families
from orchestrator.footing import throughput
from orchestrator.front import front, front_table, measured
from orchestrator.gates import Verdict, find_gates
from orchestrator.home import Home, StudyDir
from orchestrator.interleave import Block
from orchestrator.ledger import BEST_ARM, PRESET_ARM, Arm
from orchestrator.page import GateLine, Listing, Section, render_page
from orchestrator.published import published_split
from orchestrator.retries import failed_runs
from orchestrator.statistics import CONFIDENCE, STD_CONVENTION, Difference, PairedDifference
from orchestrator.tables import (
    CITED,
    STAGE_NAMES,
    attempts_table,
    bytes_table,
    comparison_tables,
    family_table,
    footing_table,
    groups_table,
    lines_table,
    params_table,
    phases_table,
    record_frame,
    record_table,
    runs_frame,
    stages_table,
    throughput_table,
    trials_table,
)
from trainer import protocol
from trainer.protocol import write_bytes_atomically

EVIDENCE_FIRST = ("seeds", "stages")
"""Plots that stand before the tests; the others follow them."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written, and what it says."""

    evidence: Evidence
    comparison: Comparison | None
    """The best point against the preset, or the record against what was asked for; None where there are no two arms."""

    claim: str
    weaknesses: tuple[str, ...]
    """What weakens the result."""

    damage: tuple[str, ...]
    """Files that could not be read, each with its place; the numbers that they hold are missing."""

    blocks: tuple[Block, ...]
    """Of a comparison by turns on one node; empty for every other study."""

    design: tuple[Table, ...]
    """What the cells of a design show; empty for every other study."""

    contest: Contest | None
    """Of a sequential confirmation; None for every other study."""

    costs: Costs
    counts: tuple[ByteCount, ...]
    """Of the scores of somebody else's script; empty for every other study."""

    ladder: Ladder | None
    """The rungs that the study is one of; None for every other study."""

    family: tuple[Relative, ...]
    """Every run of the arms' configurations."""

    tables: tuple[Table, ...]
    """Every table that has rows, in the report's order."""

    repeat: Listing
    page: Path
    text: Path
    data: Path
    record_csv: Path

    @property
    def problems(self) -> tuple[str, ...]:
        """All that a reader must know before he believes a number."""
        return self.weaknesses + self.damage


def write_report(home: Home, study_name: str, *, against: str | None = None, gates: Sequence[str] = ()) -> Report:
    """Write the report of a study, finished or not, compared with another arm where one is named by `against`.

    Raises ConfigError for an unknown study, arm or gate, StorageError.
    """
    evidence = gather(home, study_name)
    curves, unreadable = read_curves(home, evidence)
    family, misfits = families(home, [run.run_id for arm in evidence.arms for run in arm.runs])
    comparison = comparison_of(home, evidence, family, against=against, gates=gates)
    sizes, blocks = sizes_of(home, evidence), interleave.blocks(home, evidence)
    counts = byte_counts.byte_counts(home, evidence)
    folder = home.study(study_name)
    weaknesses = [*warnings(evidence), *interleave.warnings(evidence, blocks)]
    weaknesses += _family_warnings(home, evidence, family, comparison)
    weaknesses += [count.problem for count in counts if count.problem]
    own_claim = interleave.claim(evidence, blocks) if blocks else claim(evidence)
    race, spent = contest.contest(home, evidence), costs.costs_of(home, evidence)
    own_claim = _with_race(own_claim, race, evidence)
    design, rungs = design_tables(evidence), ladder_of(home, evidence)
    report = Report(
        evidence=evidence, comparison=comparison, blocks=blocks, contest=race, costs=spent, counts=tuple(counts),
        ladder=rungs, family=tuple(family),
        claim=" ".join([own_claim, *_against(comparison, against)]),
        weaknesses=tuple(dict.fromkeys(weaknesses)),
        damage=tuple(dict.fromkeys([*evidence.problems, *unreadable, *misfits])),
        tables=(
            *((interleave.table(evidence, blocks),) if blocks else ()), *((contest.table(race),) if race else ()), *design,
            *all_tables(
                home, evidence, curves, comparison, family, sizes, ladder=rungs.tables if rungs else (),
                counts=byte_counts.table(counts),
            ),
            *costs_tables(spent),
        ), design=design, repeat=repeat.listing(home, evidence),
        page=folder.report_page, text=folder.report_text, data=folder.report_data, record_csv=folder.record_csv,
    )  # fmt: skip
    plots = charts(evidence, curves, _importance(evidence), sizes)
    page = render_page(
        title=study_name, question=evidence.study.question, claim=report.claim, gates=gate_lines(comparison),
        problems=report.problems, sections=sections(report, plots), footer=_footer(evidence, folder),
    )  # fmt: skip
    write_bytes_atomically(report.page, page.encode())
    write_bytes_atomically(report.text, render_markdown(report).encode())
    write_bytes_atomically(report.data, (json.dumps(as_record(report), indent=1, allow_nan=False) + "\n").encode())
    write_bytes_atomically(report.record_csv, record_frame(evidence.arms).to_csv(index=False).encode())
    write_bytes_atomically(folder.runs_csv, runs_frame(evidence.runs).to_csv(index=False).encode())
    return report


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """What a report says of the rungs."""

    tables: tuple[Table, ...]
    record: dict[str, Any]


def ladder_of(home: Home, evidence: Evidence) -> Ladder | None:
    """The rungs that the study is one of, as they stand; None for every other study."""
    if not evidence.study.rungs:
        return None
    from orchestrator import climb, ladder_tables  # they load what plans need
    from orchestrator.ladder import rungs_of

    rungs = rungs_of(evidence.study)
    states, standings = climb.states_of(home, rungs), climb.standings(home, rungs)
    agreed = climb.agreements(rungs, states)
    points = ladder_tables.points_table(rungs, states)
    record = {
        "rungs": [dataclasses.asdict(one) for one in standings], "agreements": [dataclasses.asdict(one) for one in agreed],
        "points": [dict(zip(points.columns, map(str, row), strict=True)) for row in points.rows],
    }  # fmt: skip
    return Ladder(tables=ladder_tables.report_tables(rungs, states, standings, agreed), record=record)


def _importance(evidence: Evidence) -> dict[str, float]:
    """Importance of each knob; nothing for a study that searched nothing."""
    if not evidence.study.space or not evidence.trials:
        return {}
    from orchestrator.search import knob_importance  # Optuna is loaded only where there is something to ask it

    return knob_importance(evidence.study, evidence.state)


def sizes_of(home: Home, evidence: Evidence) -> dict[str, dict[str, int]]:
    """Bytes by group of the arms' model files, by run; nothing where there are none, or no trainer to read them.

    Runs that hold the same file, as those of a design do that score one model in several ways, have it read once.
    """
    runs = [run for arm in evidence.arms for run in arm.runs if run.result and home.run(run.run_id).artifact.is_file()]
    hashes = {run.run_id: run.result.artifact_sha256 or run.run_id for run in runs if run.result}
    readers = {sha256: run_id for run_id, sha256 in reversed(hashes.items())}
    if not readers:
        return {}
    try:
        found = ask_trainer(["sizes", *(str(home.run(run_id).root) for run_id in readers.values())])["sizes"]
    except CaddieError:  # a machine without torch: the report shows code and model
        return {}
    return {run_id: found[readers[sha256]] for run_id, sha256 in hashes.items() if readers[sha256] in found}


# ── what is compared ────────────────────────────────────────────────────────────────────────────────────────────────


def comparison_of(
    home: Home, evidence: Evidence, family: Sequence[Relative], *, against: str | None = None, gates: Sequence[str] = ()
) -> Comparison | None:
    """The study's best arm against another, or against its preset; None where there are no two arms.

    Raises ConfigError for an unknown arm or gate.
    """
    arms = [arm for arm in evidence.arms if arm.runs]
    wanted = find_gates(home, list(gates))
    if not arms or (against is None and {BEST_ARM, PRESET_ARM} - {arm.name for arm in arms}):
        return None
    candidate = study_arm(home, evidence, family=family)
    baseline = find_arm(home, against) if against else study_arm(home, evidence, PRESET_ARM, family=family)
    return compare_arms(candidate, baseline, wanted, split=published_split(against) if against else None)


def _against(comparison: Comparison | None, against: str | None) -> list[str]:
    """The difference from what was asked for, which the study's own claim knows nothing of."""
    if comparison is None or against is None:
        return []
    name, line = comparison.candidate.name, compare.difference_line(comparison)
    return [f"{name} against {comparison.baseline.name}: {line}"]


def gate_lines(comparison: Comparison | None) -> list[GateLine]:
    """Each rule's outcome in a sentence."""
    if comparison is None:
        return []
    return [GateLine(state=STATES[verdict.is_met], text=_gate_sentence(verdict)) for verdict in comparison.verdicts]


def _gate_sentence(verdict: Verdict) -> str:
    gate, p = verdict.gate, verdict.difference.p_one_sided
    found = f" p = {probability(p)}." if p is not None else ""
    missing = f" Missing: {'; '.join(verdict.missing)}." if verdict.missing else ""
    return f"{gate.name}, {gate.title}.{found}{missing}"


def _family_warnings(
    home: Home, evidence: Evidence, family: Sequence[Relative], comparison: Comparison | None
) -> list[str]:  # fmt: skip
    """What is known of runs that the arms do not show; seeds without a score are told elsewhere."""
    if comparison is None:
        arms = [study_arm(home, evidence, arm.name, family=family) for arm in evidence.arms if arm.runs]
        return [warning for arm in arms for warning in compare.arm_warnings(arm)]
    missing = {
        f"{arm.name}: no score of {text}" for arm in (comparison.candidate, comparison.baseline) for text in arm.missing
    }
    return [warning for warning in comparison.warnings if warning not in missing]


# ── its parts ───────────────────────────────────────────────────────────────────────────────────────────────────────


def all_tables(
    home: Home, evidence: Evidence, curves: Sequence[Curve], comparison: Comparison | None, family: Sequence[Relative],
    sizes: Mapping[str, Mapping[str, int]], *, counts: Table, ladder: Sequence[Table] = (),
) -> list[Table]:  # fmt: skip
    """Every table of the report, in its order; those without rows are left out."""
    gates_and_tests = comparison_tables(comparison)
    found = [
        *gates_and_tests[:1],
        *(record_table(arm) for arm in evidence.arms if not evidence.study.cells),
        *gates_and_tests[1:],
        footing_table(evidence, curves, (BEST_ARM, PRESET_ARM)),
        *ladder,
        params_table(evidence),
        stages_table(evidence),
        counts,
        bytes_table(evidence),
        groups_table(evidence, sizes),
        phases_table(evidence),
        throughput_table(evidence),
        front_table(evidence),
        trials_table(evidence),
        attempts_table(evidence),
        family_table(evidence, family),
        lines_table(evidence),
        repeat.table(home, evidence),
    ]
    return [table for table in found if table.rows]


def costs_tables(spent: Costs) -> tuple[Table, ...]:
    """What the study cost by phase; none before anything was run."""
    found = costs.phases_table(spent)
    return (found,) if found.rows else ()


def design_tables(evidence: Evidence) -> tuple[Table, ...]:
    """The tables of a factorial study or of one of the noise; none for every other study."""
    components = variance.table(evidence)
    return (*interactions.tables(evidence), *((components,) if components else ()))


def sections(report: Report, plots: Sequence[Chart]) -> list[Section]:
    """Gates and records first, then the plots with the tests, then every number behind them, and how to repeat it."""
    titles = ("Gates", "Blocks", "Sequential test", "Tests", "At equal steps and equal time")
    tables = [table for table in report.tables if table not in report.design]
    records = [*report.design, *(table for table in tables if table.summary_rows)]
    named = {table.title: table for table in tables if table.title in titles}
    others = [table for table in tables if not table.summary_rows and table.title not in titles]
    first = [chart for chart in plots if chart.name in EVIDENCE_FIRST]
    last = [chart for chart in plots if chart.name not in EVIDENCE_FIRST]
    gates, *tests = [named.get(title) for title in titles]
    return [
        *([gates] if gates else []), *records, *first, *(test for test in tests if test), *last, *others, report.repeat,
    ]  # fmt: skip


# ── the claim ───────────────────────────────────────────────────────────────────────────────────────────────────────


def claim(evidence: Evidence) -> str:
    """What the study shows, in one sentence that says "within noise" where it is."""
    if evidence.study.cells:
        return variance.claim(evidence) if evidence.study.noise else interactions.claim(evidence)
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


def _with_race(own: str, race: Contest | None, evidence: Evidence) -> str:
    """The claim with the verdict of the race before it, and the spread that every difference is to be held against."""
    has_difference = bool(evidence.trials) or evidence.improvement is not None
    spread = replicates.spread_of(evidence) if has_difference and not evidence.study.cells else None
    noise = [f"Pooled {spread}."] if spread else []
    if race is None:
        return " ".join([own, *noise])
    if evidence.study.confirm is not None and evidence.study.confirm.against:
        return " ".join([contest.claim(race), *noise])
    return " ".join(
        [contest.claim(race), own, "That interval does not count the looks, the verdict before it does.", *noise]
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
    failed = failed_runs(evidence.state, max_attempts=evidence.study.resources.max_attempts, kinds=())
    if any(isinstance(run.owner, Arm) for run in failed):
        found.append(
            f"To attempt failed seeds again, once their cause is mended: caddie study retry {evidence.study.name}"
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
        if not evidence.study.cells:
            found += [f"{arm.name}, seed {run.seed}: {text.rstrip('.')}." for run in arm.runs for text in run.warned]
    return [*found, *_warned_cells(evidence)]


def _warned_cells(evidence: Evidence) -> list[str]:
    """What is to be known of the runs of a design, without its values: each run's own would bury what matters."""
    runs = [run for arm in evidence.arms for run in arm.runs] if evidence.study.cells else []
    counts = Counter(text for run in runs for text in {text.partition(" (")[0] for text in run.warned})
    return [f"In {count} of {len(runs)} runs {text}." for text, count in counts.items()]


def _is_over_cap(run: RunEvidence) -> bool:
    return run.result is not None and 0 < run.result.cap_bytes < run.result.artifact_bytes


def _footer(evidence: Evidence, folder: StudyDir) -> str:
    return (
        f"Links lead to the result files under CADDIE_HOME ({folder.root.parent.parent}). std: {STD_CONVENTION}. Intervals: Student's t; "
        f"differences: Welch. {evidence.gpu_seconds:,.0f} GPU-seconds and {evidence.cpu_run_seconds:,.0f} seconds of runs without a GPU."
    )


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def render_text(report: Report) -> str:
    """The record tables, the claim and its gates, for a terminal."""
    evidence = report.evidence
    parts = [as_text(table) for table in report.design]
    parts += [as_text(record_table(arm, has_sources=False)) for arm in evidence.arms if not evidence.study.cells]
    parts += [as_text(table) for table in report.tables if report.blocks and table.title == "Blocks"]
    parts += [as_text(byte_counts.table(report.counts, has_sources=False))] if report.counts else []
    if evidence.study.space:
        parts.append(as_text(params_table(evidence)))
    gates = [f"{gate.state}: {gate.text}" for gate in gate_lines(report.comparison)]
    warned = [f"warning: {weakness}" for weakness in report.weaknesses]
    return "\n\n".join([*parts, report.claim, *(["\n".join(gates)] if gates else []), *warned])


def render_markdown(report: Report) -> str:
    """The whole report without its plots."""
    evidence = report.evidence
    head = [f"# {evidence.study.name}", "", evidence.study.question, "", f"> {report.claim}", ""]
    gates = [f"- **{gate.state}** {gate.text}" for gate in gate_lines(report.comparison)]
    problems = [f"- {problem}" for problem in report.problems]
    lists = [line for found in (gates, problems) if found for line in (*found, "")]
    bodies = [*map(as_markdown, report.tables), _listing_markdown(report.repeat)]
    return "\n".join([*head, *lists, "\n\n".join(bodies), ""])


def _listing_markdown(listing: Listing) -> str:
    parts = [f"## {listing.title}"]
    for sentence, text in listing.parts:
        parts += [*([sentence] if sentence else []), *([f"```\n{text}\n```"] if text else [])]
    return "\n\n".join(parts)


def as_record(report: Report) -> dict[str, Any]:
    """The report as plain JSON values, in full precision, with the line of every number that the record cites."""
    evidence = report.evidence
    spread = replicates.spread_of(evidence)
    return {
        "study": evidence.study.name,
        "question": evidence.study.question,
        "preset": evidence.study.preset,
        "objective": evidence.objective,
        "closed": evidence.state.closed,
        "claim": report.claim,
        "blocks": interleave.as_record(report.blocks),
        "byte_counts": byte_counts.as_record(report.counts),
        "factorial": interactions.as_record(evidence),
        "noise": variance.as_record(evidence),
        "problems": list(report.problems),
        "std_convention": STD_CONVENTION,
        "confidence": CONFIDENCE,
        "improvement": dataclasses.asdict(evidence.improvement) if evidence.improvement else None,
        "paired_improvement": dataclasses.asdict(evidence.paired_improvement) if evidence.paired_improvement else None,
        "comparison": compare.as_record(report.comparison) if report.comparison else None,
        "arms": [_arm_record(arm) for arm in evidence.arms],
        "family": [_relative_record(run, evidence) for run in report.family],
        "trials": [
            {
                **dataclasses.asdict(found.trial),
                "is_feasible": found.trial.is_feasible,
                "runs": [_run_record(run) for run in found.runs],
            }
            for found in evidence.trials
        ],
        "attempts": [dataclasses.asdict(attempt) for attempt in evidence.attempts],
        "contest": contest.as_record(report.contest),
        "spread": dataclasses.asdict(spread) if spread else None,
        "front": [
            dataclasses.asdict(point) for point in front([found.trial for found in evidence.trials], measured(evidence))
        ],
        "ladder": report.ladder.record if report.ladder else None,
        "costs": {**dataclasses.asdict(report.costs), "price": report.costs.price},
        "gpu_seconds": evidence.gpu_seconds,
        "cpu_run_seconds": evidence.cpu_run_seconds,
        "repeat": [{"what": sentence, "text": text} for sentence, text in report.repeat.parts],
    }


def _arm_record(arm: ArmEvidence) -> dict[str, Any]:
    summaries = {stage: dataclasses.asdict(arm.summary(stage)) for stage in protocol.STAGES}
    runs = [_run_record(run) for run in arm.runs]
    return {"arm": arm.name, "trial": arm.trial, "params": arm.params, "bpb": summaries, "runs": runs}


def _relative_record(run: Relative, evidence: Evidence) -> dict[str, Any]:
    return {
        "run_id": run.run_id, "family": run.family, "study": run.study, "seed": run.seed, "replicate": run.replicate,
        "state": run.state, "attempts": run.attempts, "bpb": run.bpb(evidence.objective), "source": run.source,
        "problem": run.problem,
    }  # fmt: skip


def _run_record(run: RunEvidence) -> dict[str, Any]:
    result = run.result
    found = throughput(run)
    return {
        "seed": run.seed,
        "run_id": run.run_id,
        "state": run.state,
        "reason": run.reason,
        "source": run.source,
        "lines": {name: run.lines[pointer] for name, pointer in CITED.items() if pointer in run.lines},
        "pointers": {name: pointer for name, pointer in CITED.items() if pointer in run.lines},
        "verified": run.verified,
        "verification": run.verification,
        "audited": run.audited,
        "auditing": run.auditing,
        "steps": result.steps if result else None,
        "tokens": result.tokens if result else None,
        "train_seconds": result.train_seconds if result else None,
        "ms_per_step": found.ms_per_step if found else None,
        "tokens_per_second": found.tokens_per_second if found else None,
        "bpb": {stage: run.bpb(stage) for stage in protocol.STAGES},
        "nats_per_token": {stage: _nats(run, stage) for stage in protocol.STAGES},
        "ttt_gain": run.ttt_gain,
        "quantization_gap": run.quantization_gap,
        "phases": result.phases if result else {},
        "bytes": {
            part: getattr(result, f"{part}_bytes") if result else None
            for part in ("bundle", "model", "artifact", "cap")
        },
    }


def _nats(run: RunEvidence, stage: str) -> float | None:
    is_scored = run.bpb(stage) is not None and run.result is not None
    return run.result.scores[stage].loss if is_scored and run.result else None
