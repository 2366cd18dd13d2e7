"""Interleaved comparison: a preset and a candidate by turns on one node, seed by seed, in the order ABBA.

A node is not the same from hour to hour, nor two nodes at any time. Runs side by side in time share what the node is then;
a block whose two runs were not equally fast did not, and is left out of the comparison.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.cells import ABSENT, Cell, Link, Table, bpb, probability, signed
from orchestrator.claims import read_claim
from orchestrator.evidence import Evidence, RunEvidence
from orchestrator.footing import throughput
from orchestrator.home import Home
from orchestrator.ledger import BEST_ARM, PRESET_ARM
from orchestrator.statistics import CONFIDENCE, Adjusted, PairedDifference, adjusted_for, paired_difference
from orchestrator.study import EQUAL, InterleavePlan
from trainer.protocol import AttemptDir


@dataclass(frozen=True, kw_only=True)
class Block:
    """One seed of both, one after the other."""

    seed: int
    first: str
    """Arm that ran first; empty where it is not known."""

    node: str
    """Where both ran; empty where they did not run on one, or it is not known."""

    scores: tuple[float, float] | None
    """Bits per byte of preset and candidate; None where either has none."""

    steps_per_second: tuple[float, float] | None
    """Of the two in training."""

    rejected: str
    """Why it is left out; empty for one that counts."""

    sources: tuple[str, str] = ("", "")
    """Path of each one's result under CADDIE_HOME."""

    @property
    def ratio(self) -> float | None:
        """Steps per second of the candidate over those of the preset."""
        return self.steps_per_second[1] / self.steps_per_second[0] if self.steps_per_second else None

    @property
    def difference(self) -> float | None:
        """Candidate minus preset, in bits per byte."""
        return self.scores[1] - self.scores[0] if self.scores else None


def blocks(home: Home, evidence: Evidence) -> tuple[Block, ...]:
    """A study's blocks, each with what speaks against it; none for a study that is not interleaved."""
    plan, preset, candidate = evidence.study.interleave, evidence.arm(PRESET_ARM), evidence.arm(BEST_ARM)
    if plan is None or preset is None or candidate is None:
        return ()
    others = {run.seed: run for run in candidate.runs}
    found = [_block(home, evidence, run, others[run.seed]) for run in preset.runs if run.seed in others]
    ratios = [block.ratio for block in found if block.ratio is not None and not block.rejected]
    expected = 1.0 if plan.throughput == EQUAL or not ratios else statistics.median(ratios)
    return tuple(_judged(block, plan, expected) for block in found)


def _block(home: Home, evidence: Evidence, preset: RunEvidence, candidate: RunEvidence) -> Block:
    pair = (preset, candidate)
    scores = [run.bpb(evidence.objective) for run in pair]
    speeds = [found.steps / found.seconds if (found := throughput(run)) else None for run in pair]
    nodes = [_node(home, run) for run in pair]
    rejected = ""
    if None in scores:
        rejected = "a run has no score"
    elif None not in nodes and nodes[0] != nodes[1]:
        rejected = f"the runs were on different nodes: {nodes[0]}, {nodes[1]}"
    elif None in speeds:
        rejected = "the speed of a run is not known"
    begins = [_submitted(evidence, run) for run in pair]
    return Block(
        seed=preset.seed, first="" if None in begins else min(zip(begins, (PRESET_ARM, BEST_ARM), strict=True))[1],
        node=nodes[0] or "" if nodes[0] == nodes[1] else "", scores=_both(scores), steps_per_second=_both(speeds),
        rejected=rejected, sources=(preset.source, candidate.source),
    )  # fmt: skip


def _both(values: Sequence[float | None]) -> tuple[float, float] | None:
    first, second = values
    return None if first is None or second is None else (first, second)


def _judged(block: Block, plan: InterleavePlan, expected: float) -> Block:
    """The block, rejected where its runs were not as fast as they should be beside one another."""
    if block.rejected or block.ratio is None:
        return block
    gap = block.ratio / expected - 1.0
    if abs(gap) <= plan.max_gap:
        return block
    beside = "" if plan.throughput == EQUAL else f" against {expected:.3f} in the median"
    return dataclasses.replace(
        block,
        rejected=f"the candidate's steps per second were {block.ratio:.3f} of the preset's{beside}, "
        f"more than {plan.max_gap:.1%} off",
    )


def _node(home: Home, run: RunEvidence) -> str | None:
    """The machine that a run was on, since its boot; None where its worker did not say."""
    claim = read_claim(AttemptDir(Path(home.root / run.source).parent)) if run.source else None
    return None if claim is None else claim.node or claim.host


def _submitted(evidence: Evidence, run: RunEvidence) -> float | None:
    times = [attempt.submitted for attempt in evidence.state.attempts_of(run.run_id)]
    return times[-1] if times else None


# ── what follows ────────────────────────────────────────────────────────────────────────────────────────────────────


def kept(found: Sequence[Block]) -> list[Block]:
    """The blocks that count."""
    return [block for block in found if not block.rejected and block.scores is not None]


def improvement(found: Sequence[Block]) -> PairedDifference:
    """Candidate minus preset over the blocks that count, pair by pair."""
    pairs = {block.seed: block.scores for block in kept(found) if block.scores}
    return paired_difference(
        {seed: scores[1] for seed, scores in pairs.items()}, {seed: scores[0] for seed, scores in pairs.items()}
    )


def at_equal_speed(found: Sequence[Block]) -> Adjusted | None:
    """The difference with what steps per second explain taken off; None where nothing can tell."""
    counted = [block for block in kept(found) if block.steps_per_second and block.scores]

    def of(arm: int) -> tuple[list[float], list[float]]:
        scores = [block.scores[arm] for block in counted if block.scores]
        return scores, [block.steps_per_second[arm] for block in counted if block.steps_per_second]

    return adjusted_for(of(1), of(0))


def claim(evidence: Evidence, found: Sequence[Block]) -> str:
    """What the blocks show, in one sentence that says "within noise" where it is."""
    counted, plan = kept(found), evidence.study.interleave
    against = plan.against if plan and plan.against else "the candidate"
    if not counted:
        return f"No block of {evidence.study.preset} and {against} counts, so nothing follows."
    paired = improvement(found)
    gap = paired.difference
    head = (
        f"Over {len(counted)} of {len(found)} blocks {against} scores {signed(gap.value)} bits per byte beside "
        f"{evidence.study.preset}, pair by pair on one node"
    )
    if gap.low is None or gap.high is None or gap.p_one_sided is None:
        return f"{head}: too few blocks, or no spread, for an interval, so nothing follows."
    interval = f"{CONFIDENCE:.0%} interval {signed(gap.low)} to {signed(gap.high)}, one-sided p = {gap.p_one_sided:.2g}"
    if gap.contains_zero:
        return f"{head} ({interval}): within noise, the interval contains zero."
    return f"{head} ({interval}): {'better' if gap.high < 0 else 'worse'}, the interval excludes zero."


def warnings(evidence: Evidence, found: Sequence[Block]) -> list[str]:
    """What speaks against the comparison."""
    plan = evidence.study.interleave
    told = [f"Block of seed {block.seed} is left out: {block.rejected}." for block in found if block.rejected]
    by_speed = [block for block in found if block.ratio is not None and "steps per second" in block.rejected]
    if plan is not None and plan.throughput == EQUAL and len(by_speed) > 1 and len(by_speed) == len(found):
        told.append(
            "No block was of equal speed: if the candidate itself is slower or faster, "
            'throughput = "median" in [interleave] compares blocks with one another instead.'
        )
    return told


def table(evidence: Evidence, found: Sequence[Block]) -> Table:
    """A row a block, and the comparison of those that count."""
    rows: list[tuple[Cell, ...]] = [
        (
            str(block.seed), block.first or ABSENT, block.node or ABSENT, *_cells(block), block.rejected or "counts",
            Link(block.sources[0]), Link(block.sources[1]),
        )
        for block in found
    ]  # fmt: skip
    return Table(
        title="Blocks",
        columns=(
            "Seed", "First", "Node", "Preset", "Candidate", "Difference", "Steps/s preset", "Steps/s candidate", "Ratio",
            "Verdict", "Source preset", "Source candidate",
        ),
        rows=tuple(rows),
        note=" ".join(["Bits per byte; below zero the candidate is better.", *_notes(evidence, found)]),
    )  # fmt: skip


def _cells(block: Block) -> tuple[str, ...]:
    scores, speeds = block.scores or (None, None), block.steps_per_second or (None, None)
    return (
        *map(bpb, scores),
        signed(block.difference),
        *(ABSENT if speed is None else f"{speed:.3f}" for speed in speeds),
        ABSENT if block.ratio is None else f"{block.ratio:.3f}",
    )


def _notes(evidence: Evidence, found: Sequence[Block]) -> list[str]:
    """The paired difference, and the one that is left at equal speed."""
    plan, gap, adjusted = evidence.study.interleave, improvement(found).difference, at_equal_speed(found)
    notes = []
    if gap.low is not None:
        notes.append(
            f"Paired: {signed(gap.value)} ({CONFIDENCE:.0%} interval {signed(gap.low)} to {signed(gap.high)}, "
            f"one-sided p {probability(gap.p_one_sided)})."
        )
    if adjusted is not None:
        notes.append(
            f"Steps per second as covariate: {signed(adjusted.value)} at equal speed ({adjusted.slope:+.3g} bits per byte for "
            f"each step per second, correlation {adjusted.correlation:.2f})."
        )
    if plan is not None:
        notes.append(f"A block whose speeds differ by more than {plan.max_gap:.1%} is left out.")
    return notes


def as_record(found: Sequence[Block]) -> list[dict[str, Any]]:
    """The blocks as plain JSON values."""
    return [{**dataclasses.asdict(block), "ratio": block.ratio, "difference": block.difference} for block in found]
