"""Gates: named rules that say whether a result beats another, applied to seeds' scores with what is still missing.

The rules are data with source and date (`gates.toml`); a home may have more of its own. A gate is met where each of its
conditions is; one that cannot be decided (too few seeds for the test, an unknown split) says why.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.evidence import ScoredArm
from orchestrator.home import Home
from orchestrator.power import MOST_SEEDS, Plan, more_seeds, plan
from orchestrator.statistics import (
    Difference,
    Summary,
    bonferroni,
    known_spread,
    lower_by,
    one_sample,
    summary_of,
    welch,
)
from orchestrator.units import Split
from trainer.config import nearest

SHIPPED = Path(__file__).with_name("gates.toml")
WELCH, ONE_SAMPLE, Z = TESTS = ("welch", "one_sample", "z")
BPB, NATS = UNITS = ("bpb", "nats")
LIMIT_NAMES = {
    "artifact_bytes": ("largest artifact", "bytes"),
    "train_seconds": ("longest training", "s"),
    "eval_seconds": ("longest evaluation", "s"),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a record must keep besides its score, in each of its runs."""

    name: str
    artifact_bytes: int
    train_seconds: float
    eval_seconds: float
    source: str
    url: str = ""
    date: str = ""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One rule."""

    name: str
    title: str
    test: str
    """How p is computed: one of TESTS."""

    unit: str
    """Of margin, target and std: one of UNITS."""

    alpha: float
    """p must be below it."""

    seeds: int
    """Runs of one configuration that are needed."""

    source: str
    date: str
    url: str = ""
    note: str = ""
    default: bool = True
    """Whether it is applied where no gate is asked for by name."""

    margin: float = 0.0
    """The candidate must be lower than the baseline by more than this."""

    target: float | None = None
    """A number that the candidate must be below, instead of a baseline."""

    std: float | None = None
    """Spread of one run, where the test takes it as known."""

    limits: Limits | None = None

    def __post_init__(self) -> None:
        for place, value, known in (("test", self.test, TESTS), ("unit", self.unit, UNITS)):
            if value not in known:
                raise ConfigError(f"{place} must be one of {', '.join(known)}, got {value!r}")
        if not 0.0 < self.alpha < 1.0:
            raise ConfigError(f"alpha must lie between 0 and 1, got {self.alpha}")
        if self.seeds < 1 or self.margin < 0.0:
            raise ConfigError(f"seeds must be at least 1 and margin at least 0, got {self.seeds} and {self.margin}")
        if (self.test == Z) != (self.std is not None):
            raise ConfigError(f"std belongs to the test {Z!r} and to no other, got test {self.test!r}, std {self.std}")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One thing that a gate asks for."""

    name: str
    required: str
    found: str
    is_met: bool | None
    """None where it cannot be decided."""

    missing: str = ""
    """What is missing, or why it cannot be decided; empty where it is met."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A gate, applied."""

    gate: Gate
    difference: Difference
    """Candidate minus baseline, or minus the target, in bits per byte; p for more than the margin."""

    margin_bpb: float | None
    """The gate's margin in bits per byte; None where the split is not known."""

    adjusted_p: float | None
    """p times the number of equal chances that were started for the claim (Bonferroni)."""

    slack_bpb: float | None
    """By how much lower the candidate's mean is than it had to be for p, its spread and seeds as they are; below zero it
    must still fall by that much. None where there is no test."""

    more_seeds: int | None
    """Seeds that the candidate still needs, were its mean and spread to stay as they are; None where no number helps."""

    plan: Plan
    conditions: tuple[Condition, ...]

    @property
    def is_met(self) -> bool | None:
        """None where nothing speaks against it, and something cannot be decided."""
        states = {condition.is_met for condition in self.conditions}
        return False if False in states else None if None in states else True

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(condition.missing for condition in self.conditions if not condition.is_met)


# ── the rules ───────────────────────────────────────────────────────────────────────────────────────────────────────


def load_gates(home: Home | None = None) -> dict[str, Gate]:
    """Every gate by name: the shipped ones, then the home's own. Raises ConfigError with the file and the table."""
    own = home.gates if home is not None and home.gates.is_file() else None
    return {**_read(SHIPPED), **(_read(own) if own else {})}


def find_gates(home: Home, names: list[str]) -> list[Gate]:
    """The named gates, or those that are applied unasked. Raises ConfigError with the nearest name."""
    known = load_gates(home)
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no gate {name!r}", hint=nearest(name, known))
    return [known[name] for name in names] if names else [gate for gate in known.values() if gate.default]


def _read(path: Path) -> dict[str, Gate]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as gates: {error}") from error
    found = {}
    limits = {
        name: _table(Limits, {**table, "name": name}, f"{path}: [limits.{name}]")
        for name, table in tables.get("limits", {}).items()
    }
    for name, table in tables.get("gate", {}).items():
        place = f"{path}: [gate.{name}]"
        values = {**table, "name": name}
        if "limits" in table:
            if table["limits"] not in limits:
                raise ConfigError(f"{place} limits: there is no [limits.{table['limits']}]")
            values["limits"] = limits[table["limits"]]
        found[name] = _table(Gate, values, place)
    return found


def _table(cls: type[Any], values: Mapping[str, Any], place: str) -> Any:
    """A table's dataclass; raises ConfigError with its place."""
    try:
        return cls(**values)
    except (TypeError, ConfigError) as error:
        text = str(error).replace(f"{cls.__name__}.__init__() ", "")
        raise ConfigError(f"{place}: {text}", hint=f"the shipped gates are an example: {SHIPPED}") from error


# ── applied ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def judge(gate: Gate, candidate: ScoredArm, baseline: ScoredArm | None, *, split: Split | None) -> Verdict:
    """Apply a gate to the candidate's scores; `split` turns the gate's nats into the scores' bits per byte."""
    in_bpb = _in_bpb(gate, split)
    if in_bpb is None:
        missing = f"the split's tokens per byte, to turn {gate.name}'s nats into bits per byte: --split NAME"
        return _undecided(gate, candidate, baseline, missing)
    if gate.target is None and baseline is None:
        return _undecided(gate, candidate, baseline, "a baseline to compare with")
    ours, theirs = candidate.summary, _opponent(in_bpb, baseline)
    found = _test(in_bpb, ours, theirs)
    more = more_seeds(lambda more_of_ours: _test(in_bpb, more_of_ours, theirs), ours, alpha=gate.alpha)
    return Verdict(
        gate=gate, difference=found, margin_bpb=in_bpb.margin, adjusted_p=bonferroni(found.p_one_sided, looks_of(candidate)),
        slack_bpb=_negative(lower_by(found, gate.alpha)), more_seeds=more,
        plan=_plan(in_bpb, ours, theirs, found),
        conditions=(
            _seeds_condition(gate, candidate), _gain_condition(gate, in_bpb, found, split),
            _p_condition(gate, found, more, ours, theirs), *_limit_conditions(gate, candidate),
        ),
    )  # fmt: skip


def looks_of(arm: ScoredArm) -> int:
    """Equal chances that the configuration had: sets of as many runs as are shown, out of those that were started."""
    shown = arm.summary.count
    return math.ceil(arm.started / shown) if arm.started and shown else 1


def _in_bpb(gate: Gate, split: Split | None) -> Gate | None:
    """The gate with its numbers in bits per byte; None where they are nats of an unknown split."""
    is_free = not gate.margin and gate.target is None and gate.std is None
    if gate.unit == BPB or is_free:
        return gate
    if split is None:
        return None
    target = None if gate.target is None else split.bpb(gate.target)
    std = None if gate.std is None else split.bpb(gate.std)
    return replace(gate, unit=BPB, margin=split.bpb(gate.margin), target=target, std=std)


def _opponent(gate: Gate, baseline: ScoredArm | None) -> Summary | float:
    """What the candidate is compared with: an exact number, or an arm's mean and spread."""
    if gate.target is not None:
        return gate.target
    assert baseline is not None
    summary = baseline.summary
    is_exact = gate.test == ONE_SAMPLE or (gate.test == Z and baseline.constant)
    return summary.mean if is_exact and summary.mean is not None else summary


def _test(gate: Gate, ours: Summary, theirs: Summary | float) -> Difference:
    if gate.test == Z:
        assert gate.std is not None
        return known_spread(ours, theirs, std=gate.std, margin=gate.margin)
    if isinstance(theirs, float):
        return one_sample(ours, theirs, margin=gate.margin)
    if gate.test == ONE_SAMPLE:  # the baseline has no value
        return welch(ours, summary_of(0, None, None), margin=gate.margin)
    return welch(ours, theirs, margin=gate.margin)


def _plan(gate: Gate, ours: Summary, theirs: Summary | float, found: Difference) -> Plan:
    effect = None if found.value is None else -found.value - gate.margin
    other = None if isinstance(theirs, float) else theirs
    return plan(ours, other, alpha=gate.alpha, effect=effect, std=gate.std)


def _undecided(gate: Gate, candidate: ScoredArm, baseline: ScoredArm | None, missing: str) -> Verdict:
    ours, theirs = candidate.summary, baseline.summary if baseline else summary_of(0, None, None)
    found = welch(ours, theirs)
    known = replace(found, p_one_sided=None, statistic=None)
    condition = Condition(name="p", required=f"< {gate.alpha:g}", found="–", is_met=None, missing=missing)
    return Verdict(
        gate=gate, difference=known, margin_bpb=None, adjusted_p=None, slack_bpb=None, more_seeds=None,
        plan=plan(ours, theirs if baseline else None, alpha=gate.alpha, effect=None, std=None),
        conditions=(_seeds_condition(gate, candidate), condition, *_limit_conditions(gate, candidate)),
    )  # fmt: skip


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


# ── conditions ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _seeds_condition(gate: Gate, candidate: ScoredArm) -> Condition:
    count = candidate.summary.count
    short = gate.seeds - count
    missing = f"{short} more seed{'s' if short > 1 else ''} of this configuration" if short > 0 else ""
    return Condition(
        name="seeds", required=f"≥ {gate.seeds}", found=str(count), is_met=short <= 0, missing=missing
    )  # fmt: skip


def _gain_condition(gate: Gate, in_bpb: Gate, found: Difference, split: Split | None) -> Condition:
    """The mean itself, whatever its spread: without that no seed helps."""
    over = "target" if gate.target is not None else "baseline"
    required = f"mean below the {over}" + (f" by {in_bpb.margin:.5f}" if gate.margin else "")
    if gate.unit == NATS and gate.margin:
        required += f" (= {gate.margin:g} nats)"
    if found.value is None:
        return Condition(name="gain", required=required, found="–", is_met=None, missing="scores to compare")
    gain = -found.value
    in_nats = f" ({split.nats(gain):+.5f} nats)" if split else ""
    short = in_bpb.margin - gain
    missing = "" if short < 0 else f"the mean must fall by {short:.5f} more; seeds alone do not help"
    return Condition(name="gain", required=required, found=f"{gain:+.5f}{in_nats}", is_met=short < 0, missing=missing)


def _p_condition(
    gate: Gate, found: Difference, more: int | None, ours: Summary, theirs: Summary | float
) -> Condition:  # fmt: skip
    required = f"< {gate.alpha:g}"
    if found.p_one_sided is None:
        return Condition(name="p", required=required, found="–", is_met=None, missing=_why_untested(gate, ours, theirs))
    is_met = found.p_one_sided < gate.alpha
    return Condition(
        name="p", required=required, found=f"{found.p_one_sided:.4g}", is_met=is_met,
        missing="" if is_met else _way_to_p(gate, found, more),
    )  # fmt: skip


def _why_untested(gate: Gate, ours: Summary, theirs: Summary | float) -> str:
    """Why there is no p, and what gives one."""
    if ours.mean is None:
        return "a score of the candidate"
    if not isinstance(theirs, float) and theirs.mean is None:
        return "a score of the baseline"
    if gate.test == WELCH and not isinstance(theirs, float) and theirs.std is None:
        return "the baseline's seeds: its spread counts in Welch's test; pg-readme-constant takes its mean as exact"
    if ours.std is None:
        return "a second seed of the candidate: one has no spread"
    return "spread: every value is the same, so no test of it is defined"


def _way_to_p(gate: Gate, found: Difference, more: int | None) -> str:
    """Two ways to the level, each with the rest as it is."""
    shortfall = lower_by(found, gate.alpha)
    ways = [f"a mean lower by {shortfall:.5f}" if shortfall is not None else ""]
    if more is not None:
        ways.append(f"{more} more seed{'s' if more > 1 else ''} with this mean and spread")
    elif found.value is not None and found.value < -found.margin:
        ways.append(f"more than {MOST_SEEDS} seeds")
    return " or ".join(filter(None, ways))


def _limit_conditions(gate: Gate, candidate: ScoredArm) -> list[Condition]:
    """The limits that the largest value over the seeds must keep; what a record does not say cannot be decided."""
    limits = gate.limits
    if limits is None:
        return []
    return [_limit_condition(name, getattr(limits, name), candidate) for name in LIMIT_NAMES]


def _limit_condition(name: str, limit: float, candidate: ScoredArm) -> Condition:
    (words, unit), most = LIMIT_NAMES[name], f"{limit:,.0f}"
    found = [value for score in candidate.scores if (value := getattr(score, name)) is not None]
    silent = candidate.summary.count - len(found)
    if silent or not found:
        missing = f"{words} of {silent or 'all'} seed{'s' if silent != 1 else ''}: the record does not say"
        return Condition(name=words, required=f"≤ {most} {unit}", found="–", is_met=None, missing=missing)
    over = max(found) - limit
    missing = f"{words}: {over:,.1f} {unit} over".replace(".0 ", " ") if over > 0 else ""
    shown = f"{max(found):,.0f}" if unit == "bytes" else f"{max(found):,.1f}"
    return Condition(
        name=words, required=f"≤ {most} {unit}", found=f"{shown} {unit}", is_met=over <= 0, missing=missing
    )  # fmt: skip
