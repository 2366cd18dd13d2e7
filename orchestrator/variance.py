"""The noise of one configuration by its sources: initialisation, order of the data, and what differs between equal runs.

Balanced two-way random effects: initialisations (the runs' seeds) cross orders of the data, and each pair is run several times.
Components follow from mean squares; their intervals, but for the machine's, which is exact, are Satterthwaite's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.cells import ABSENT, Table, bpb, probability
from orchestrator.evidence import Evidence
from orchestrator.factors import ORDER_KNOB
from orchestrator.statistics import CONFIDENCE, ratio_p, variance_interval

INITIALISATION, ORDER, BOTH, MACHINE = "initialisation", "order of the data", "both together", "machine and rounding"
TOTAL = "all together"

Scores = Mapping[tuple[int, int], Sequence[float]]
"""Bits per byte of the replicates by (seed of the initialisation, seed of the order)."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One source of variance."""

    source: str
    variance: float
    """Estimated, never below 0."""

    low: float
    """Lower end of the interval of the variance."""

    high: float | None
    """Upper end; None where nothing is known of it."""

    degrees_of_freedom: float
    p: float | None = None
    """Of a mean square this large if the source added nothing; None for the machine and the total, where none is asked."""

    @property
    def std(self) -> float:
        """In bits per byte."""
        return math.sqrt(self.variance)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Every component, and what it was taken from."""

    components: tuple[Component, ...]
    initialisations: int
    orders: int
    replicates: int
    mean: float

    @property
    def total(self) -> Component:
        """Of a run with a seed of its own, as a record's runs have."""
        return self.components[-1]


@dataclass(frozen=True)
class _Square:
    """A mean square."""

    value: float
    freedom: int


def noise(scores: Scores) -> Noise | None:
    """The components, from the initialisations that have every order and replicate; None below two of each."""
    seeds = sorted({seed for seed, _ in scores})
    orders = sorted({order for _, order in scores})
    replicates = max((len(values) for values in scores.values()), default=0)
    whole = [seed for seed in seeds if all(len(scores.get((seed, order), ())) == replicates for order in orders)]
    if min(len(whole), len(orders), replicates) < 2:
        return None
    values = [[list(scores[seed, order]) for order in orders] for seed in whole]
    return _components(values)


def _components(values: Sequence[Sequence[Sequence[float]]]) -> Noise:
    """Of values by initialisation, order and replicate."""
    a, b, n = len(values), len(values[0]), len(values[0][0])
    shift = values[0][0][0]  # differences of what is near equal keep their digits
    cells = [[_mean([value - shift for value in cell]) for cell in row] for row in values]
    rows, columns = [_mean(row) for row in cells], [_mean([row[j] for row in cells]) for j in range(b)]
    grand = _mean(rows)
    within = math.fsum(
        (value - shift - cells[i][j]) ** 2
        for i, row in enumerate(values)
        for j, cell in enumerate(row)
        for value in cell
    )
    both = n * math.fsum((cells[i][j] - rows[i] - columns[j] + grand) ** 2 for i in range(a) for j in range(b))
    of_a = _Square(b * n * math.fsum((row - grand) ** 2 for row in rows) / (a - 1), a - 1)
    of_b = _Square(a * n * math.fsum((column - grand) ** 2 for column in columns) / (b - 1), b - 1)
    of_ab = _Square(both / ((a - 1) * (b - 1)), (a - 1) * (b - 1))
    of_e = _Square(within / (a * b * (n - 1)), a * b * (n - 1))
    parts = (
        _component(INITIALISATION, [(1 / (b * n), of_a), (-1 / (b * n), of_ab)], p=_p(of_a, of_ab)),
        _component(ORDER, [(1 / (a * n), of_b), (-1 / (a * n), of_ab)], p=_p(of_b, of_ab)),
        _component(BOTH, [(1 / n, of_ab), (-1 / n, of_e)], p=_p(of_ab, of_e)),
        _component(MACHINE, [(1.0, of_e)]),
    )
    of_both = 1 / n - 1 / (b * n) - 1 / (a * n)
    total = _component(TOTAL, [(1 / (b * n), of_a), (1 / (a * n), of_b), (of_both, of_ab), (1 - 1 / n, of_e)])
    return Noise(components=(*parts, total), initialisations=a, orders=b, replicates=n, mean=shift + grand)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _component(source: str, shares: Sequence[tuple[float, _Square]], *, p: float | None = None) -> Component:
    """A sum of shares of mean squares as a variance, with Satterthwaite's degrees of freedom."""
    variance = math.fsum(share * square.value for share, square in shares)
    spread = math.fsum((share * square.value) ** 2 / square.freedom for share, square in shares)
    freedom = variance**2 / spread if spread else 0.0
    if variance <= 0 or not freedom:
        return Component(source=source, variance=0.0, low=0.0, high=0.0, degrees_of_freedom=0.0, p=p)
    low, high = variance_interval(variance, freedom)
    return Component(source=source, variance=variance, low=low, high=high, degrees_of_freedom=freedom, p=p)


def _p(square: _Square, below: _Square) -> float | None:
    return ratio_p(square.value / below.value, (square.freedom, below.freedom)) if below.value else None


# ── a study's ───────────────────────────────────────────────────────────────────────────────────────────────────────


def scores_of(evidence: Evidence) -> dict[tuple[int, int], list[float]]:
    """The study's scores by initialisation and order."""
    found: dict[tuple[int, int], list[float]] = {}
    for cell in evidence.study.cells:
        arm = evidence.arm(cell.name)
        for seed, value in (arm.by_seed(evidence.objective) if arm else {}).items():
            found.setdefault((seed, cell.params[ORDER_KNOB]), []).append(value)
    return found


def table(evidence: Evidence) -> Table | None:
    """The components as standard deviations; None where the study has no [noise], or too few runs yet."""
    found = noise(scores_of(evidence)) if evidence.study.noise else None
    return None if found is None else as_table(found)


def as_table(found: Noise) -> Table:
    total = found.total.variance
    rows = tuple(
        (
            part.source, bpb(part.std), _interval(part), f"{part.variance / total:.0%}" if total else ABSENT,
            f"{part.degrees_of_freedom:.1f}" if part.variance else ABSENT, probability(part.p),
        )
        for part in found.components
    )  # fmt: skip
    return Table(
        title="Variance components",
        columns=("Source", "σ", f"{CONFIDENCE:.0%} interval", "Share of the variance", "df", "p"),
        rows=rows,
        note=f"Bits per byte. {found.initialisations} initialisations × {found.orders} orders of the data × {found.replicates} equal "
        f"runs; mean {bpb(found.mean)}. A component that is estimated below zero is shown as zero. p: of a mean square this "
        f"large if the source added nothing. {TOTAL}: a run with a seed of its own, as a record's.",
        summary_rows=1,
    )


def _interval(part: Component) -> str:
    """The interval of σ."""
    if not part.variance:
        return ABSENT
    low = bpb(math.sqrt(part.low))
    return f"above {low}" if part.high is None else f"{low} to {bpb(math.sqrt(part.high))}"


def claim(evidence: Evidence) -> str:
    """The noise in a sentence."""
    found = noise(scores_of(evidence))
    if found is None:
        return "There are not yet two initialisations with every order of the data and every equal run."
    parts = ", ".join(f"{bpb(part.std)} from {part.source}" for part in found.components[:-1])
    spread = f" ({CONFIDENCE:.0%} interval {_interval(found.total)})" if found.total.variance else ""
    return f"A run's score has σ = {bpb(found.total.std)} bits per byte{spread}: {parts}."


def as_record(evidence: Evidence) -> dict[str, Any] | None:
    """The components as plain JSON values; None without any."""
    found = noise(scores_of(evidence)) if evidence.study.noise else None
    if found is None:
        return None
    return {
        **dataclasses.asdict(found),
        "components": [{**dataclasses.asdict(p), "std": p.std} for p in found.components],
    }
