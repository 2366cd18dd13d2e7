"""What the cells of a factorial study show: each level against its factor's first one, and how factors act on one another.

A contrast is computed seed by seed, since the cells of a seed share all that the seed decides (a stored model, where the study
takes some), and gets the t interval of its mean over the seeds that have every cell it needs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.acceptance import objections
from orchestrator.cells import ABSENT, Table, bpb, probability, signed
from orchestrator.evidence import Evidence
from orchestrator.factors import BETWEEN, Factor
from orchestrator.statistics import CONFIDENCE, STD_CONVENTION, Difference, bonferroni, one_sample, summarize, two_sided

MAIN, SIMPLE, INTERACTION = KINDS = ("main effect", "simple effect", "interaction")
SHOWN = 3  # contrasts that the claim names

Levels = tuple[str, ...]
Scores = Mapping[Levels, Mapping[int, float]]
"""Bits per byte by cell and seed."""

Weights = Mapping[Levels, float]
"""What each cell counts in a contrast; they sum to zero."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A difference between cells, or between differences."""

    kind: str
    title: str
    difference: Difference
    """Over the seeds; below zero what the title names first has the lower score."""

    seeds: int
    """That have every cell of it."""

    adjusted_p: float | None = None
    """Two-sided p times the number of contrasts of its kind (Bonferroni)."""

    @property
    def verdict(self) -> str:
        """What follows, in a word or two."""
        if self.difference.contains_zero is None or self.difference.high is None:
            return "no interval"
        if self.difference.contains_zero:
            return "within noise"
        return "lower" if self.difference.high < 0 else "higher"


# ── the contrasts ───────────────────────────────────────────────────────────────────────────────────────────────────


def contrasts(factors: Sequence[Factor], scores: Scores) -> list[Contrast]:
    """Every contrast of a design: of each kind, those that its number of factors has."""
    named = [
        *((MAIN, title, weights) for title, weights in _main(factors)),
        *((SIMPLE, title, weights) for title, weights in _simple(factors)),
        *((INTERACTION, title, weights) for title, weights in _interactions(factors)),
    ]
    found = [_contrast(kind, title, weights, scores) for kind, title, weights in named]
    counts = {kind: sum(contrast.kind == kind for contrast in found) for kind in KINDS}
    return [
        dataclasses.replace(contrast, adjusted_p=bonferroni(two_sided(contrast.difference), counts[contrast.kind]))
        for contrast in found
    ]


def _contrast(kind: str, title: str, weights: Weights, scores: Scores) -> Contrast:
    seeds = [
        seed for seed in next(iter(scores.values()), {}) if all(seed in scores.get(levels, {}) for levels in weights)
    ]
    values = [sum(weight * scores[levels][seed] for levels, weight in weights.items()) for seed in seeds]
    return Contrast(kind=kind, title=title, difference=one_sample(summarize(values), 0.0), seeds=len(seeds))


def _others(factors: Sequence[Factor], left_out: Sequence[int]) -> list[dict[int, str]]:
    """Every combination of levels of the factors that are not left out, by the factor's place."""
    places = [place for place in range(len(factors)) if place not in left_out]
    combined = itertools.product(*(factors[place].levels for place in places))
    return [dict(zip(places, levels, strict=True)) for levels in combined]


def _weights(
    count: int, others: Sequence[Mapping[int, str]], own: Sequence[tuple[Mapping[int, str], float]]
) -> Weights:
    """Weights of the cells that have one of the `own` levels, averaged over the others."""
    return {
        tuple({**other, **levels}[place] for place in range(count)): sign / len(others)
        for other in others
        for levels, sign in own
    }


def _main(factors: Sequence[Factor]) -> Iterator[tuple[str, Weights]]:
    """Each level against its factor's first, averaged over all other factors' levels."""
    for place, factor in enumerate(factors):
        first, *rest = factor.levels
        for level in rest:
            own = [({place: level}, 1.0), ({place: first}, -1.0)]
            yield f"{factor.name}: {level} − {first}", _weights(len(factors), _others(factors, [place]), own)


def _simple(factors: Sequence[Factor]) -> Iterator[tuple[str, Weights]]:
    """Each level of the last factor against its first, with the other factors at one level each."""
    place = len(factors) - 1
    first, *rest = factors[place].levels
    for other in _others(factors, [place]) if place else []:
        for level in rest:
            own = [({place: level}, 1.0), ({place: first}, -1.0)]
            yield f"{BETWEEN.join(other.values())}: {level} − {first}", _weights(len(factors), [other], own)


def _interactions(factors: Sequence[Factor]) -> Iterator[tuple[str, Weights]]:
    """For two factors: by how much a level of one changes what a level of the other does, against both first levels."""
    for (i, one), (j, two) in itertools.combinations(enumerate(factors), 2):
        (first, *levels), (base, *others) = one.levels, two.levels
        for level, other in itertools.product(levels, others):
            own = [
                ({i: level, j: other}, 1.0),
                ({i: level, j: base}, -1.0),
                ({i: first, j: other}, -1.0),
                ({i: first, j: base}, 1.0),
            ]
            title = f"({other} − {base}) with {level} − with {first}"
            yield title, _weights(len(factors), _others(factors, [i, j]), own)


# ── a study's ───────────────────────────────────────────────────────────────────────────────────────────────────────


def scores_of(evidence: Evidence) -> dict[Levels, dict[int, float]]:
    """Scores of the study's cells, each at the stage at which it is compared; a cell without any has no seeds."""
    found = {}
    for cell in evidence.study.cells:
        arm = evidence.arm(cell.name)
        found[cell.levels] = arm.by_seed(evidence.study.stage_of(cell.params)) if arm else {}
    return found


def tables(evidence: Evidence) -> list[Table]:
    """The cells, and a table for each kind of contrast; nothing for a study that has no factors."""
    factors = evidence.study.factors
    if not factors:
        return []
    scores = scores_of(evidence)
    found = contrasts(factors, scores)
    return [
        cells_table(factors, scores),
        *(contrasts_table(kind, found) for kind in KINDS if any(c.kind == kind for c in found)),
    ]


def cells_table(factors: Sequence[Factor], scores: Scores) -> Table:
    """Mean and spread of every cell, and its difference from the first one."""
    first = next(iter(scores))
    rows = []
    for levels, values in scores.items():
        found = summarize(list(values.values()))
        gap = _contrast(SIMPLE, "", {levels: 1.0, first: -1.0}, scores).difference if levels != first else None
        rows.append((*levels, bpb(found.mean), bpb(found.std), str(found.count), signed(gap.value) if gap else ABSENT))
    return Table(
        title="Cells",
        columns=(*(factor.name for factor in factors), "BPB", "std (n−1)", "Seeds", f"− {BETWEEN.join(first)}"),
        rows=tuple(rows),
        note="Bits per byte with test-time training where a cell has it, else without; lower is better. "
        f"std: {STD_CONVENTION}. Differences: over the seeds that both cells have.",
    )


def contrasts_table(kind: str, found: Sequence[Contrast]) -> Table:
    """All contrasts of one kind."""
    shown = [contrast for contrast in found if contrast.kind == kind]
    notes = {
        MAIN: "Mean over all levels of the other factors: one that ruins a cell is in it.",
        SIMPLE: "With the other factors at one level each.",
        INTERACTION: "By how much the gain differs between two levels of the other factor; zero where the two only add up.",
    }
    return Table(
        title=f"{kind.capitalize()}s",
        columns=(
            "Contrast",
            "Difference",
            f"{CONFIDENCE:.0%} interval",
            "Two-sided p",
            "Adjusted p",
            "Seeds",
            "Verdict",
        ),
        rows=tuple(_row(contrast) for contrast in shown),
        note=f"{notes[kind]} Bits per byte, below zero is a gain; paired over seeds, Student's t. Adjusted p: times the "
        f"{len(shown)} contrasts of the table (Bonferroni); of that many about {(1 - CONFIDENCE) * len(shown):.1f} exclude zero by chance.",
    )


def _row(contrast: Contrast) -> tuple[str, ...]:
    found = contrast.difference
    interval = ABSENT if found.low is None else f"{signed(found.low)} to {signed(found.high)}"
    return (
        contrast.title, signed(found.value), interval, probability(two_sided(found)), probability(contrast.adjusted_p),
        str(contrast.seeds), contrast.verdict,
    )  # fmt: skip


def claim(evidence: Evidence) -> str:
    """What the cells show, in sentences that say "within noise" where it is."""
    factors, scores = evidence.study.factors, scores_of(evidence)
    if not any(scores.values()):
        return "No cell has a score yet."
    found = contrasts(factors, scores)
    kinds = (INTERACTION, SIMPLE if len(factors) > 1 else MAIN)
    return " ".join(filter(None, (_lowest(evidence, scores), *(_sentence(kind, found) for kind in kinds))))


def _lowest(evidence: Evidence, scores: Scores) -> str:
    """The cell with the lowest mean, of those whose score means what a record's does."""
    accepted = [
        cell.levels for cell in evidence.study.cells if not any(objections(evidence.study.config_of(cell.params)))
    ]
    scored = {levels: summarize(list(scores[levels].values())) for levels in accepted if scores[levels]}
    if not scored:
        return "No cell that could be submitted has a score yet."
    best = min(scored, key=lambda levels: scored[levels].mean or 0.0)
    left_out = len(scores) - len(accepted)
    others = f" ({left_out} cells whose technique is not accepted are left out)" if left_out else ""
    return (
        f"Of {len(scored)} cells {BETWEEN.join(best)} has the lowest mean, {bpb(scored[best].mean)} over "
        f"{_seeds(scored[best].count)}{others}."
    )


def _sentence(kind: str, found: Sequence[Contrast]) -> str:
    """How many contrasts of a kind exclude zero, and the surest of them."""
    known = [contrast for contrast in found if contrast.kind == kind and contrast.difference.contains_zero is not None]
    if not known:
        return (
            f"No {kind} has an interval: that takes two seeds, and a spread."
            if any(c.kind == kind for c in found)
            else ""
        )
    clear = sorted(
        (c for c in known if not c.difference.contains_zero), key=lambda c: two_sided(c.difference) or 0.0
    )  # fmt: skip
    if not clear:
        return f"The one {kind} is within noise." if len(known) == 1 else f"All {len(known)} {kind}s are within noise."
    named = "; ".join(
        f"{c.title} {signed(c.difference.value)} ({signed(c.difference.low)} to {signed(c.difference.high)}, "
        f"adjusted p {probability(c.adjusted_p)})"
        for c in clear[:SHOWN]
    )  # fmt: skip
    surest = "" if len(clear) <= SHOWN else ", the surest"
    left = len(known) - len(clear)
    return f"{len(clear)} of {len(known)} {kind}s exclude zero{surest}: {named}" + (
        f"; {left} are within noise." if left else "."
    )


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count != 1 else ''}"


def as_record(evidence: Evidence) -> dict[str, Any] | None:
    """Cells and contrasts as plain JSON values; None for a study that has no factors."""
    factors = evidence.study.factors
    if not factors:
        return None
    scores = scores_of(evidence)
    cells = [
        {"levels": list(levels), "bpb": {str(seed): value for seed, value in values.items()}, **_summary(values)}
        for levels, values in scores.items()
    ]
    found = [{**dataclasses.asdict(contrast), "verdict": contrast.verdict} for contrast in contrasts(factors, scores)]
    return {"factors": {factor.name: factor.levels for factor in factors}, "cells": cells, "contrasts": found}


def _summary(values: Mapping[int, float]) -> dict[str, Any]:
    found = summarize(list(values.values()))
    return {"mean": found.mean, "std": found.std, "count": found.count}
