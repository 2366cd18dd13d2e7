"""Costs: what a study's runs took, by phase and by purpose, and what its improvement cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator import contest
from orchestrator.cells import ABSENT, Cell, Table, signed
from orchestrator.errors import CaddieError
from orchestrator.evidence import AttemptEvidence, Evidence, gather
from orchestrator.home import Home
from orchestrator.racing import BETTER
from trainer import protocol
from trainer.protocol import COMPLETE

OTHER = "start and end"
"""What of an attempt no phase of its trainer accounts for: the start of processes, checks, waiting for its end."""

UNTOLD = "without a result"
SEARCH, CONFIRMATION, LOST = "search", "confirmation", "lost"
"""Purposes: a complete run of a trial, or of an arm; what failed or was stopped."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """One study's, in GPU-seconds; of runs without a GPU in seconds, apart."""

    study: str
    gpu_seconds: float
    cpu_seconds: float
    """Seconds of attempts that had no GPU."""

    by_phase: dict[str, float]
    by_purpose: dict[str, float]
    price_per_gpu_hour: float
    """0 where the study names none."""

    improvement: float | None
    """Accepted improvement over the baseline in bits per byte, above 0; None where none was accepted."""

    verdict: str
    """What was found of the confirmed arms."""

    problems: tuple[str, ...] = ()

    @property
    def gpu_hours(self) -> float:
        return self.gpu_seconds / 3600

    @property
    def price(self) -> float | None:
        """In the study's money; None without a price."""
        return self.gpu_hours * self.price_per_gpu_hour if self.price_per_gpu_hour else None


@dataclass(frozen=True, kw_only=True)
class Bill:
    """Several studies' costs, and what an accepted improvement cost on the average, the studies without one included."""

    studies: tuple[Costs, ...]
    problems: tuple[str, ...] = field(default=())

    @property
    def accepted(self) -> int:
        return sum(costs.improvement is not None for costs in self.studies)

    @property
    def gpu_hours(self) -> float:
        return sum(costs.gpu_hours for costs in self.studies)

    @property
    def price(self) -> float | None:
        prices = [costs.price for costs in self.studies if costs.price is not None]
        return sum(prices) if prices else None

    @property
    def gpu_hours_per_improvement(self) -> float | None:
        return self.gpu_hours / self.accepted if self.accepted else None

    @property
    def price_per_improvement(self) -> float | None:
        return self.price / self.accepted if self.accepted and self.price is not None else None


def costs_of(home: Home, evidence: Evidence) -> Costs:
    """Add up a study's attempts."""
    by_phase: dict[str, float] = {}
    by_purpose = dict.fromkeys((SEARCH, CONFIRMATION, LOST), 0.0)
    problems: list[str] = []
    for attempt in evidence.attempts:
        weight = attempt.gpus or 1
        by_purpose[_purpose(attempt)] += weight * attempt.seconds
        try:
            phases = _phases(home, attempt)
        except CaddieError as error:
            phases = {UNTOLD: attempt.seconds}
            problems.append(str(error))
        for name, seconds in phases.items():
            by_phase[name] = by_phase.get(name, 0.0) + weight * seconds
    improvement, verdict = accepted_improvement(home, evidence)
    return Costs(
        study=evidence.study.name, gpu_seconds=evidence.gpu_seconds, cpu_seconds=evidence.cpu_run_seconds, by_phase=by_phase,
        by_purpose=by_purpose, price_per_gpu_hour=evidence.study.budget.price_per_gpu_hour, improvement=improvement,
        verdict=verdict, problems=tuple(problems),
    )  # fmt: skip


def _purpose(attempt: AttemptEvidence) -> str:
    if attempt.status != COMPLETE:
        return LOST
    return SEARCH if any(owner.startswith("trial ") for owner in attempt.owners) else CONFIRMATION


def _phases(home: Home, attempt: AttemptEvidence) -> dict[str, float]:
    """Seconds of one attempt by phase; they add up to what it took. Raises ProtocolError."""
    if not attempt.source:
        return {UNTOLD: attempt.seconds} if attempt.seconds else {}
    phases = dict(protocol.read_result(home.root / attempt.source).phases)
    rest = attempt.seconds - sum(phases.values())
    return {**phases, OTHER: rest} if rest > 0 else phases


def accepted_improvement(home: Home, evidence: Evidence) -> tuple[float | None, str]:
    """By how much the confirmed best point is better, where its test says that it is, and what the test says."""
    found = contest.contest(home, evidence)
    if found is not None:
        last = found.race.looks[-1] if found.race.looks else None
        is_better = found.race.verdict == BETTER and last is not None and last.difference is not None
        return (-last.difference if is_better and last and last.difference is not None else None), found.race.verdict
    improvement = evidence.improvement
    if improvement is None or improvement.value is None or improvement.high is None:
        return None, "not confirmed"
    if improvement.contains_zero:
        return None, "within noise"
    return (-improvement.value, BETTER) if improvement.high < 0 else (None, "worse")


def bill(home: Home, names: Sequence[str]) -> Bill:
    """The costs of these studies; one that cannot be read is a problem. Raises ConfigError where a name is of none."""
    found: list[Costs] = []
    problems: list[str] = []
    for name in names:
        costs = costs_of(home, gather(home, name))
        found.append(costs)
        problems += costs.problems
    return Bill(studies=tuple(found), problems=tuple(problems))


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def hours(gpu_seconds: float) -> str:
    return f"{gpu_seconds / 3600:,.3f}"


def money(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.2f}"


def studies_table(found: Bill) -> Table:
    """A row a study, and their sum."""
    rows: list[tuple[Cell, ...]] = [
        (
            costs.study, hours(costs.gpu_seconds), hours(costs.cpu_seconds), *(hours(costs.by_purpose[name]) for name in (SEARCH, CONFIRMATION, LOST)),
            money(costs.price), costs.verdict, signed(None if costs.improvement is None else -costs.improvement),
        )
        for costs in found.studies
    ]  # fmt: skip
    rows.append(
        (
            "all of them", hours(3600 * found.gpu_hours), hours(sum(c.cpu_seconds for c in found.studies)),
            *(hours(sum(c.by_purpose[name] for c in found.studies)) for name in (SEARCH, CONFIRMATION, LOST)),
            money(found.price), f"{found.accepted} accepted", "",
        )
    )  # fmt: skip
    each = found.gpu_hours_per_improvement
    per = f" An accepted improvement cost {each:,.2f} GPU-hours" if each is not None else " No improvement was accepted"
    per += f", {money(found.price_per_improvement)} in money" if found.price_per_improvement is not None else ""
    return Table(
        title="Costs",
        columns=("Study", "GPU-hours", "CPU-run hours", "Search", "Confirmation", "Lost", "Price", "Verdict", "Difference"),
        rows=tuple(rows), summary_rows=1,
        note="Search, confirmation and what failed or was stopped: GPU-hours, or hours of runs without a GPU." + per + ".",
    )  # fmt: skip


def phases_table(costs: Costs) -> Table:
    """A row a phase of the runs."""
    whole = sum(costs.by_phase.values())
    ranked = sorted(costs.by_phase.items(), key=lambda item: -item[1])
    rows = tuple((name, hours(seconds), f"{seconds / whole:.1%}") for name, seconds in ranked if whole)
    unit = "GPU-hours" if costs.gpu_seconds else "Hours of runs without a GPU"
    return Table(
        title="Cost by phase", columns=("Phase", unit, "Share"), rows=rows,
        note="All attempts, also those that failed or were stopped.",
    )  # fmt: skip


def as_record(found: Bill) -> dict[str, Any]:
    """The bill as plain JSON values."""
    return {
        "studies": [
            {**dataclasses.asdict(costs), "gpu_hours": costs.gpu_hours, "price": costs.price} for costs in found.studies
        ],
        "gpu_hours": found.gpu_hours, "price": found.price, "accepted": found.accepted,
        "gpu_hours_per_improvement": found.gpu_hours_per_improvement,
        "price_per_improvement": found.price_per_improvement,
    }  # fmt: skip
