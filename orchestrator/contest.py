"""The contest that a study's sequential confirmation is: who races whom, how it stands, and what it saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.arms import find_arm
from orchestrator.cells import ABSENT, Cell, Table, bpb, signed
from orchestrator.evidence import Evidence
from orchestrator.home import Home
from orchestrator.ledger import BEST_ARM, PRESET_ARM
from orchestrator.racing import BETTER, HOPELESS, NOT_BETTER, OPEN, Look, Race, Rules, race, scores_at, seeds_of_looks
from orchestrator.statistics import Summary
from orchestrator.study import ConfirmPlan

Fixed = Summary | float
"""A baseline that is not run: a published arm's mean and spread, or a number that is taken as exact."""

Arm = Mapping[int, float]
"""Bits per byte by seed."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A study's race, with what it is about."""

    race: Race
    candidate: str
    baseline: str
    saved_runs: int
    """Runs that the longest race would have made, and this one did not need."""

    saved_gpu_hours: float
    """The same in GPU-hours, each run as long as the mean of those that were made."""


def baseline_of(home: Home, plan: ConfirmPlan | None) -> Fixed | None:
    """What the race is against where that is not the preset. Raises ConfigError, ProtocolError.

    A published mean without its spread is taken as exact.
    """
    if plan is None or not plan.against:
        return None
    arm = find_arm(home, plan.against)
    found = arm.summary
    if found.mean is not None and (arm.constant or found.std is None):
        return found.mean
    return found


def race_of(plan: ConfirmPlan, candidate: Arm, baseline: Arm | Fixed, *, ended: int) -> Race:
    """The race after the plan's first `ended` seeds have ended; seeds without a score have failed."""
    looks = seeds_of_looks(first=plan.first, step=plan.step, most=len(plan.seeds))
    done = [count for count in looks if count <= ended]
    theirs = 0 if isinstance(baseline, float) else baseline.count if isinstance(baseline, Summary) else None
    return race(
        [scores_at(candidate, plan.seeds, count) for count in done],
        [scores_at(baseline, plan.seeds, count) for count in done] if isinstance(baseline, Mapping) else baseline,
        planned=[(count, count if theirs is None else theirs) for count in looks],
        rules=Rules(alpha=plan.alpha, margin=plan.margin),
    )


# ── in a report ─────────────────────────────────────────────────────────────────────────────────────────────────────


def contest(home: Home, evidence: Evidence) -> Contest | None:
    """How a study's race stands; None where it has none, or its arms have not begun."""
    plan = evidence.study.confirm
    if plan is None or not plan.sequential:
        return None
    fixed, best, preset = baseline_of(home, plan), evidence.arm(BEST_ARM), evidence.arm(PRESET_ARM)
    ours = best or preset
    theirs = preset if fixed is None else None
    if ours is None or (fixed is None and (theirs is None or theirs is ours)):
        return None
    runs = [run for arm in (ours, theirs) if arm is not None for run in arm.runs]
    ended = 0
    while ended < len(plan.seeds) and _has_ended(plan.seeds[ended], [arm for arm in (ours, theirs) if arm], evidence):
        ended += 1
    baseline = fixed if theirs is None else theirs.by_seed(evidence.objective)
    assert baseline is not None, "there is one or the other"
    found = race_of(plan, ours.by_seed(evidence.objective), baseline, ended=ended)
    ids = {run.run_id for run in runs}
    hours = sum(attempt.seconds * attempt.gpus for attempt in evidence.attempts if attempt.run_id in ids) / 3600
    made = len(runs)
    unneeded = len(plan.seeds) * (made // ended) - made if ended and found.is_over else 0
    return Contest(
        race=found, candidate=ours.name, baseline=plan.against or PRESET_ARM, saved_runs=max(0, unneeded),
        saved_gpu_hours=max(0, unneeded) * hours / made if made else 0.0,
    )  # fmt: skip


def _has_ended(seed: int, arms: list[Any], evidence: Evidence) -> bool:
    """Whether every arm's run of a seed has come to its end."""
    for arm in arms:
        run = next((run for run in arm.runs if run.seed == seed), None)
        attempts = evidence.state.attempts_of(run.run_id) if run else []
        if run is None or run.result is None or any(attempt.status is None for attempt in attempts):
            return False
    return True


def claim(found: Contest) -> str:
    """The verdict in one sentence."""
    rules, looks = found.race.rules, found.race.looks
    if not looks or looks[-1].difference is None:
        return f"The race of {found.candidate} against {found.baseline} is open: it has too few scores."
    last = looks[-1]
    by = f" by more than {rules.margin:g} bits per byte" if rules.margin else ""
    error = f"the chance of a wrong claim is at most {rules.alpha:g} over all looks together"
    head = f"After {last.seeds} of {found.race.planned} seeds ({signed(last.difference)})"
    sentences = {
        BETTER: f"{head}, {found.candidate} is better than {found.baseline}{by}: {error}.",
        NOT_BETTER: f"{head}, {found.candidate} is not better than {found.baseline}{by}: {error}.",
        HOPELESS: f"{head}, it is within noise whether {found.candidate} is better than {found.baseline}{by}, and further "
        f"seeds would probably not show it (chance {last.chance or 0:.0%}).",
        OPEN: f"{head}, it is open whether {found.candidate} is better than {found.baseline}{by}: within noise.",
    }
    saved = f" That saved {found.saved_runs} runs and {found.saved_gpu_hours:.2f} GPU-hours against all {found.race.planned} seeds."
    return sentences[last.verdict] + (saved if found.saved_runs else "")


def table(found: Contest) -> Table:
    """A row a look."""
    rules = found.race.rules
    return Table(
        title="Sequential test",
        columns=("Look", "Seeds", "Scores", "Difference", "Pooled std", "Statistic", "Boundary", "Chance of better", "Verdict"),
        rows=tuple(_row(number, look) for number, look in enumerate(found.race.looks, start=1)),
        note=f"{found.candidate} − {found.baseline} in bits per byte; better by more than {rules.margin:g} where the "
        "statistic is at or below minus the boundary, not better where it is at or above it. The boundaries bound the error "
        f"over all looks by {rules.alpha:g} (Lan–DeMets spending, Pocock's kind, for t statistics by simulation). Chance of "
        "better: that a further look finds it so, by what has been seen; giving up on it raises no error. "
        f"Saved: {found.saved_runs} runs, {found.saved_gpu_hours:.2f} GPU-hours.",
    )  # fmt: skip


def _row(number: int, look: Look) -> tuple[Cell, ...]:
    ours, theirs = look.counts
    return (
        str(number), str(look.seeds), f"{ours} and {theirs}" if theirs else str(ours), signed(look.difference), bpb(look.std),
        _number(look.statistic), _number(look.boundary), ABSENT if look.chance is None else f"{look.chance:.0%}", look.verdict,
    )  # fmt: skip


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3g}".replace("-", "−")


def as_record(found: Contest | None) -> dict[str, Any] | None:
    """The contest as plain JSON values; None where there is none. A statistic without a spread is infinite, and left out."""
    if found is None:
        return None
    record = dataclasses.asdict(found)
    for look in record["race"]["looks"]:
        look["statistic"] = None if abs(look["statistic"] or 0.0) == float("inf") else look["statistic"]
    return {**record, "verdict": found.race.verdict, "claim": claim(found)}
