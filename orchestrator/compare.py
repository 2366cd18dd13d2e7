"""Compare: one arm against another, by every rule that is known: which is met, by how much, and what is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.arms import find_arm
from orchestrator.errors import ConfigError
from orchestrator.evidence import ScoredArm
from orchestrator.gates import LIMIT_NAMES, Condition, Gate, Verdict, find_gates, judge, looks_of
from orchestrator.home import Home
from orchestrator.power import MOST_SEEDS, POWER
from orchestrator.published import known_split, published_split
from orchestrator.statistics import (
    CONFIDENCE,
    STD_CONVENTION,
    Difference,
    PairedDifference,
    Summary,
    bonferroni,
    one_sample,
    paired_difference,
    paired_permutation_p,
    permutation_p,
    student,
    welch,
)
from orchestrator.units import SAME_SPLIT, Split, split_of

NOT_MET = 10
"""Exit code where a gate that was asked for is not met."""

STATES = {True: "met", False: "not met", None: "open"}
"""Of a gate, in a word; open where it cannot be decided."""

LIMIT_WORDS = frozenset(words for words, _ in LIMIT_NAMES.values())


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that follows from two arms' scores."""

    candidate: ScoredArm
    baseline: ScoredArm
    split: Split | None
    """Turns bits per byte into nats; the candidate's, where both are known."""

    welch: Difference
    student: Difference
    one_sample: Difference
    """Against the baseline's mean, taken as exact."""

    permutation_p: float | None
    paired: PairedDifference | None
    """None where the arms' seeds do not pair."""

    paired_permutation_p: float | None
    verdicts: tuple[Verdict, ...]
    warnings: tuple[str, ...]

    @property
    def adjusted_p(self) -> float | None:
        """Welch's p times the equal chances that the candidate's configuration had."""
        return bonferroni(self.welch.p_one_sided, looks_of(self.candidate))


def compare(
    home: Home,
    candidate: str,
    baseline: str,
    *,
    gates: Sequence[str] = (),
    paired: bool | None = None,
    split: str | None = None,
    stage: str | None = None,
) -> Comparison:
    """Compare two arms by name. `paired` None pairs where both are ours. Raises ConfigError, ProtocolError."""
    ours, theirs = find_arm(home, candidate, stage=stage), find_arm(home, baseline, stage=stage)
    units = known_split(split) if split else _known_split(ours, candidate) or _known_split(theirs, baseline)
    return compare_arms(ours, theirs, find_gates(home, list(gates)), paired=paired, split=units)


def _known_split(arm: ScoredArm, text: str) -> Split | None:
    """The split by the arm's own losses, else the one that its record is known to be scored on."""
    return split_of(arm.scores) or published_split(text)


def compare_arms(
    candidate: ScoredArm,
    baseline: ScoredArm,
    gates: Sequence[Gate],
    *,
    paired: bool | None = None,
    split: Split | None = None,
) -> Comparison:
    """Compare two arms. Raises ConfigError where pairing is asked for and the arms share no seed."""
    ours, theirs = candidate.summary, baseline.summary
    pairs = _pairs(candidate, baseline, paired)
    units = split or split_of(candidate.scores) or split_of(baseline.scores)
    return Comparison(
        candidate=candidate, baseline=baseline, split=units, welch=welch(ours, theirs), student=student(ours, theirs),
        one_sample=welch(ours, theirs) if theirs.mean is None else one_sample(ours, theirs.mean),
        permutation_p=permutation_p(candidate.values, baseline.values), paired=pairs,
        paired_permutation_p=paired_permutation_p(candidate.by_seed, baseline.by_seed) if pairs else None,
        verdicts=tuple(judge(gate, candidate, baseline, split=units) for gate in gates),
        warnings=tuple(_warnings(candidate, baseline, pairs)),
    )  # fmt: skip


def _pairs(candidate: ScoredArm, baseline: ScoredArm, paired: bool | None) -> PairedDifference | None:
    shared = set(candidate.by_seed) & set(baseline.by_seed)
    if paired and not shared:
        raise ConfigError(
            f"--paired needs seeds that both arms have; {candidate.name} has {_seeds(candidate)}, "
            f"{baseline.name} {_seeds(baseline)}",
            hint="leave --paired out: Welch's test needs no common seeds",
        )
    wants = paired if paired is not None else candidate.is_ours and baseline.is_ours and len(shared) > 1
    return paired_difference(candidate.by_seed, baseline.by_seed) if wants else None


def _seeds(arm: ScoredArm) -> str:
    return ", ".join(map(str, arm.by_seed)) or "none"


def _warnings(candidate: ScoredArm, baseline: ScoredArm, pairs: PairedDifference | None) -> list[str]:
    """What weakens the comparison."""
    found = [warning for arm in (candidate, baseline) for warning in arm_warnings(arm)]
    found += [f"{arm.name}: no score of {missing}" for arm in (candidate, baseline) for missing in arm.missing]
    if candidate.stage and baseline.stage and candidate.stage != baseline.stage:
        found.append(f"the arms are scored at different stages: {candidate.stage} and {baseline.stage}")
    splits = split_of(candidate.scores), split_of(baseline.scores)
    if splits[0] and splits[1] and abs(splits[0].tokens_per_byte / splits[1].tokens_per_byte - 1) > SAME_SPLIT:
        found.append(
            "the arms have different tokens: only bits per byte compare, and margins in nats are the candidate's"
        )
    if pairs and not (candidate.is_ours and baseline.is_ours):
        found.append(
            "paired with a record of others: what a seed decides there is not known, and public records' scores correlate by 0.08"
        )
    return found


def arm_warnings(arm: ScoredArm) -> list[str]:
    """What weakens an arm by itself: its problems, and that more runs of its configuration were started than it shows."""
    shown, problems = arm.summary.count, [f"{arm.name}: {problem}" for problem in arm.problems]
    if not arm.started or arm.started <= shown:
        return problems
    chances = looks_of(arm)
    return [
        *problems,
        f"{arm.name}: {arm.started} runs of the configuration were started, {shown} are compared"
        + (f"; its claims are adjusted for {chances} equal chances" if chances > 1 else ""),
    ]


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def exit_code(comparison: Comparison, *, asked: bool) -> int:
    """0; NOT_MET where gates were asked for by name and one of them is not met, or cannot be decided."""
    return NOT_MET if asked and not all(verdict.is_met for verdict in comparison.verdicts) else 0


def as_text(comparison: Comparison) -> str:
    """For a terminal: the arms, their difference by each test, the gates, what is missing."""
    parts = [
        *_arm_lines("candidate", comparison.candidate), *_arm_lines("baseline", comparison.baseline), "",
        difference_line(comparison), *_test_lines(comparison), "",
        *(line for verdict in comparison.verdicts for line in verdict_lines(verdict)),
    ]  # fmt: skip
    return "\n".join(parts).rstrip()


def _arm_lines(role: str, arm: ScoredArm) -> list[str]:
    summary = arm.summary
    seeds = ", ".join(
        f"{score.seed}: {score.bpb:.5f}" if score.seed is not None else f"{score.bpb:.5f}" for score in arm.scores
    )
    stage = f", {arm.stage}" if arm.stage else ""
    shown = f" ({seeds})" if seeds and summary.count > 1 else ""
    return [f"{role:9}  {arm.name}{stage}: {_mean_text(summary)}{shown}"]


def _mean_text(summary: Summary) -> str:
    if summary.mean is None:
        return "no score"
    spread = f" ± {summary.std:.5f} (n−1)" if summary.std is not None else ""
    return f"{summary.mean:.5f}{spread}, n = {summary.count}"


def difference_line(comparison: Comparison) -> str:
    """The difference in both units, with its interval, in one sentence."""
    found, split = comparison.welch, comparison.split
    if found.value is None:
        return "no difference: an arm has no score."
    nats = f" ({_signed(split.nats(found.value))} nats per token)" if split else ""
    if found.low is None or found.high is None:
        return f"difference {_signed(found.value)} bits per byte{nats}: too few seeds, or no spread, for an interval."
    word = "contains" if found.contains_zero else "excludes"
    return (
        f"difference {_signed(found.value)} bits per byte{nats}, {CONFIDENCE:.0%} interval {_signed(found.low)} to "
        f"{_signed(found.high)}: {word} zero."
    )


def test_rows(comparison: Comparison) -> list[tuple[str, Difference, str]]:
    """Each test with its difference and what it assumes."""
    rows = [
        ("Welch", comparison.welch, "two samples, spreads apart"),
        ("Student", comparison.student, "two samples, one pooled spread"),
        ("one-sample", comparison.one_sample, "the baseline's mean taken as exact"),
    ]
    if comparison.paired is not None:
        correlation = comparison.paired.correlation
        known = "no spread to correlate" if correlation is None else f"correlation {correlation:.2f}"
        rows.append(("paired", comparison.paired.difference, f"{comparison.paired.count} common seeds, {known}"))
    return rows


def permutations(comparison: Comparison) -> list[tuple[str, float, str]]:
    """The p of the permutation tests that are defined."""
    found = (
        ("permutation", comparison.permutation_p, "values assigned to the arms every other way"),
        ("sign flips", comparison.paired_permutation_p, "arms swapped within a seed"),
    )
    return [(name, p, words) for name, p, words in found if p is not None]


def _test_lines(comparison: Comparison) -> list[str]:
    lines = []
    for name, found, words in test_rows(comparison):
        if found.p_one_sided is not None:
            freedom = f", df = {found.degrees_of_freedom:.4g}" if found.degrees_of_freedom is not None else ""
            lines.append(f"  {name:11} p = {found.p_one_sided:<9.4g} t = {found.statistic:.2f}{freedom}; {words}")
    lines += [f"  {name:11} p = {p:<9.4g} {words}" for name, p, words in permutations(comparison)]
    looks = looks_of(comparison.candidate)
    if looks > 1 and comparison.adjusted_p is not None:
        lines.append(
            f"  adjusted    p = {comparison.adjusted_p:<9.4g} Welch's, times {looks} equal chances that were started (Bonferroni)"
        )
    return lines


def verdict_lines(verdict: Verdict) -> list[str]:
    """A gate in a few lines: met or not, its conditions, and what further seeds would do."""
    gate = verdict.gate
    lines = [f"{STATES[verdict.is_met]:8} {gate.name}: {gate.title}"]
    lines += [f"           {text}" for text in _condition_texts(verdict.conditions)]
    if verdict.slack_bpb is not None and verdict.slack_bpb > 0:
        lines.append(f"           p has {verdict.slack_bpb:.5f} bits per byte to spare")
    if plan := plan_text(verdict):
        lines.append(f"           {plan}")
    return [*lines, f"           {gate.date}: {gate.source}"]


def _condition_texts(conditions: Sequence[Condition]) -> list[str]:
    """A line a condition; limits of which a record says nothing share one."""
    silent = [condition for condition in conditions if condition.is_met is None and condition.name in LIMIT_WORDS]
    lines = [_condition_text(condition) for condition in conditions if condition not in silent]
    if silent:
        lines.append(f"?   {', '.join(condition.name for condition in silent)}: the record does not say of every seed")
    return lines


def _condition_text(condition: Condition) -> str:
    mark = {True: "yes", False: "no ", None: "?  "}[condition.is_met]
    missing = f"; missing: {condition.missing}" if condition.missing else ""
    return f"{mark} {condition.name} {condition.required}: {condition.found}{missing}"


def plan_text(verdict: Verdict) -> str:
    """What seeds like these can show, in one sentence; empty where no spread is known."""
    plan = verdict.plan
    if plan.std is None or plan.detectable is None:
        return ""
    margin = f" beyond the margin of {verdict.margin_bpb:.5f}" if verdict.margin_bpb else ""
    found = f"power: these seeds find {plan.detectable:.5f}{margin} {POWER:.0%} of the time (spread of a run {plan.std:.5f})"
    is_better = verdict.difference.value is not None and -verdict.difference.value > (verdict.margin_bpb or 0.0)
    if plan.power_now is not None and is_better:
        found += f"; the present difference, if it is the true one, {plan.power_now:.0%} of the time"
        if plan.power_now < POWER:
            seeds = f"{plan.seeds_needed} seeds" if plan.seeds_needed else f"more than {MOST_SEEDS} seeds"
            found += f", {seeds} of the candidate {POWER:.0%}"
    return found


def _signed(value: float) -> str:
    return f"{value:+.5f}".replace("-", "−")


def as_record(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON values, in full precision."""
    found = dataclasses.asdict(comparison)
    found["candidate"] = _arm_record(comparison.candidate)
    found["baseline"] = _arm_record(comparison.baseline)
    found["verdicts"] = [verdict_record(verdict) for verdict in comparison.verdicts]
    found["adjusted_p"] = comparison.adjusted_p
    found["std_convention"], found["confidence"] = STD_CONVENTION, CONFIDENCE
    return found


def _arm_record(arm: ScoredArm) -> dict[str, Any]:
    return {**dataclasses.asdict(arm), "summary": dataclasses.asdict(arm.summary)}


def verdict_record(verdict: Verdict) -> dict[str, Any]:
    """A gate's verdict as plain JSON values."""
    return {**dataclasses.asdict(verdict), "is_met": verdict.is_met, "missing": list(verdict.missing)}
