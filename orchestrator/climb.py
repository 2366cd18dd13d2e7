"""The climb: where each rung of a ladder stands, what the next one will cost, and whether it is to be begun at all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import agreement, ladder, ledger, lock, plan
from orchestrator.agreement import Agreement
from orchestrator.errors import ConfigError
from orchestrator.evidence import read_study
from orchestrator.home import Home
from orchestrator.identity import identity_of, require_same
from orchestrator.ladder import Promoted
from orchestrator.ledger import Ledger, StudyState
from orchestrator.plan import Plan
from orchestrator.progress import duration_text
from orchestrator.purse import Purse, run_cost
from orchestrator.study import Study
from orchestrator.study_file import parse_study
from trainer.config import nearest
from trainer.protocol import read_lines, storage_error

NOT_BEGUN = "not begun"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where one rung stands."""

    rung: str
    study: str
    state: str
    """NOT_BEGUN, `running`, `left`, or why it closed."""

    trials: int
    """Those that have been asked."""

    trials_planned: int
    best_value: float | None
    gpu_hours: float
    """What its runs took."""


@dataclass(frozen=True, kw_only=True)
class Approach:
    """What is known before a rung begins."""

    study: Study
    promoted: tuple[Promoted, ...]
    agreements: tuple[Agreement, ...]
    """Of the neighbouring rungs below, the lowest first."""

    plan: Plan
    refusal: str
    """Why the rung is not begun; empty where it is."""

    is_begun: bool = False


@dataclass(frozen=True, kw_only=True)
class End:
    """Where a climb ended."""

    study: Study
    notes: tuple[str, ...]
    """What is known of the rung that was not begun; empty after the last, and where a person stopped it."""


Run = Callable[[Study, Sequence[str]], StudyState]
"""Runs or continues a rung to its end, telling people the notes first; returns its state. Raises what a controller does."""


def climb(home: Home, rungs: Sequence[Study], *, last: int, run: Run) -> End:
    """Run the rungs one after another, without those that have ended; the one of number `last` is always looked at again.

    Ends below it where a person stopped a rung, or the next one is not to be begun. Killed at any moment, the same climb
    goes on.
    """
    stop = home.study(rungs[-1].name).stop
    if not any(lock.holder(home.study(study.name)) for study in rungs):
        _forget(stop)
    for number, study in enumerate(rungs[: last + 1]):
        state = states_of(home, [study])[0]
        if number < last and ladder.is_finished(study, state) and not home.study(study.name).retry.exists():
            _require_same(study, state)
            continue
        told = approach(home, rungs, number) if number else None
        if told and told.refusal:
            return End(study=rungs[number - 1], notes=tuple(lines(told)))
        if number and stop.exists():
            return End(study=rungs[number - 1], notes=(f"stopped before rung {study.rung_name}",))
        if number:
            ladder.promote(home, rungs[number - 1], study)
        if run(study, lines(told) if told and told.plan.runs else ()).closed == ledger.HALTED:
            return End(study=study, notes=())
    is_top = last + 1 == len(rungs)
    return End(study=rungs[last], notes=() if is_top else tuple(lines(approach(home, rungs, last + 1))))


def _require_same(study: Study, state: StudyState) -> None:
    """Raise ConfigError where a rung that has ended asked another question than it would now, by the parts that its file decides.

    Whether data and trainer are the same still, the next rung's controller finds for its own runs.
    """
    ours = identity_of(study, manifest_sha256="", bundle_sha256="")
    require_same(study.name, state, {**ours, **{what: state.identity.get(what, "") for what in ("data", "trainer")}})


def _forget(stop: Path) -> None:
    """Remove a stop that was meant for an earlier climb. Raises StorageError."""
    try:
        stop.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, stop) from error


def number_of(rungs: Sequence[Study], name: str) -> int:
    """Place of the rung of that name, of the last one where none is named; raises ConfigError."""
    names = [study.rung.name for study in rungs if study.rung]
    if name and not names:
        raise ConfigError(f"--until {name}: {rungs[-1].name} is no ladder", hint="leave --until out")
    if name and name not in names:
        raise ConfigError(f"--until: {rungs[-1].name} has no rung {name!r}", hint=nearest(name, names))
    return names.index(name) if name else len(rungs) - 1


def states_of(home: Home, rungs: Sequence[Study]) -> list[StudyState]:
    """What each rung's ledger says; raises ProtocolError."""
    return [Ledger(home.study(study.name).ledger).state() for study in rungs]


def agreements(rungs: Sequence[Study], states: Sequence[StudyState]) -> list[Agreement]:
    """How the neighbouring rungs agree, for those of which the upper has scored something."""
    neighbours = zip(rungs, states, rungs[1:], states[1:], strict=False)
    found = [agreement.agreement(lower, below, upper, above) for lower, below, upper, above in neighbours]
    return [one for one in found if one.pairs]


def approach(home: Home, rungs: Sequence[Study], number: int) -> Approach:
    """What is known before the rung of that number, not the first, begins. Changes nothing. Raises ProtocolError."""
    study, states = rungs[number], states_of(home, rungs)
    below = agreements(rungs[:number], states[:number])
    refusal = "" if states[number].trials else _distrust(study, rungs[number - 1], below) or _poverty(study, home)
    return Approach(
        study=study, promoted=tuple(ladder.chosen(study, states[number - 1])), agreements=tuple(below),
        plan=plan.plan(study, home, slots=plan.slots_of(study)), refusal=refusal, is_begun=bool(states[number].trials),
    )  # fmt: skip


def _distrust(study: Study, below: Study, measured: Sequence[Agreement]) -> str:
    """Why the rungs below do not agree well enough; empty where they do, or nothing is asked of them."""
    least = study.rung.least_rank_correlation if study.rung else None
    if least is None:
        return ""
    name = below.rung_name
    found = next((one for one in measured if one.upper == name), None)
    if found is None or found.spearman is None:
        return f"how well {name} agrees with the rung below it is not known, and least_rank_correlation = {least:g} asks for it"
    if found.spearman.value < least:
        return (
            f"{found.lower} and {found.upper} agree by a rank correlation of {found.spearman.value:+.2f}, below "
            f"least_rank_correlation = {least:g}"
        )
    return ""


def _poverty(study: Study, home: Home) -> str:
    """Why what is left of the ladder's cap lets the rung not begin; empty where it does."""
    cap = study.budget.study_cap_seconds
    if not math.isfinite(cap) or not run_cost(study):
        return ""
    standing = Purse(home, study.name, study.budget, beside=study.other_rungs).standing()
    left = cap - standing.study_taken - standing.study_reserved
    needed = plan.least_cost(study)
    if needed <= left:
        return ""
    return (
        f"the rungs below left {left / 3600:.2f} GPU-hours of the cap, its first trial and its confirmation may take "
        f"{needed / 3600:.2f}"
    )


def lines(found: Approach) -> list[str]:
    """What people should see before the rung's money is spent."""
    rung = found.study.rung_name
    told = [agreement.in_words(one) for one in found.agreements]
    told += [agreement.CAVEAT, f"{agreement.INTERVALS}."] if any(one.is_told for one in found.agreements) else []
    ups = ", ".join(f"trial {point.trial} ({point.value:.5f})" for point in found.promoted) or "none"
    missing = (found.study.rung.promote if found.study.rung else 0) - len(found.promoted)
    short = f"; {missing} fewer than asked for, the sampler asks in their place" if missing > 0 else ""
    verb = f"is not begun: {found.refusal}" if found.refusal else "goes on" if found.is_begun else "comes next"
    return [*told, f"rung {rung} {verb}", f"  goes up    {ups}{short}", *plan_lines(found.plan)]


def plan_lines(found: Plan) -> list[str]:
    """A rung's plan in short."""
    price = "" if found.price is None else f", price {found.price:,.2f}"
    hours = f"{found.gpu_hours:,.2f} GPU-hours{price}" if found.gpus_per_run else "on the CPU"
    return [f"  will take  {found.runs} runs, {hours}, {duration_text(found.makespan_seconds)} on {found.slots} slots"]


# ── what is known of a ladder by its name ───────────────────────────────────────────────────────────────────────────


def find(home: Home, name: str) -> tuple[Study, ...]:
    """The rungs of the ladder of that name, as it was last opened; empty where none was, and for a lower rung's own name.

    Raises ProtocolError.
    """
    begun = [found for found in home.study_names() if found == name or _is_rung_of(home, found, name)]
    if not begun:
        return ()
    latest = max(begun, key=lambda found: home.study(found).ledger.stat().st_mtime)
    rungs = ladder.rungs_of(read_study(home, latest)[0])
    return rungs if rungs[-1].rungs and rungs[-1].name == name else ()


def _is_rung_of(home: Home, study: str, name: str) -> bool:
    """Whether a study is a lower rung of the ladder: by the first text that its ledger has."""
    if not study.startswith(f"{name}-"):
        return False
    _, first = next(read_lines(home.study(study).ledger), (0, {}))
    try:
        return parse_study(str(first.get("source", ""))).ladder == name
    except ConfigError:  # another study whose preset has gone, say
        return False


def current(home: Home, rungs: Sequence[Study]) -> Study:
    """The rung that a controller works on, else the highest that was begun, else the first."""
    held = [study for study in rungs if lock.holder(home.study(study.name)) is not None]
    begun = [study for study in rungs if home.study(study.name).ledger.exists()]
    return (held or begun or [rungs[0]])[-1]


def standings(home: Home, rungs: Sequence[Study]) -> list[Standing]:
    """Where each rung stands; raises ProtocolError."""
    return [_standing(home, study, state) for study, state in zip(rungs, states_of(home, rungs), strict=True)]


def _standing(home: Home, study: Study, state: StudyState) -> Standing:
    is_held = lock.holder(home.study(study.name)) is not None
    best = state.best
    return Standing(
        rung=study.rung_name, study=study.name,
        state="running" if is_held else (state.closed or "left") if state.source else NOT_BEGUN, trials=len(state.trials),
        trials_planned=study.search.trials, best_value=best.value if best else None, gpu_hours=state.gpu_seconds / 3600,
    )  # fmt: skip


# ── the whole ladder's plan ─────────────────────────────────────────────────────────────────────────────────────────


def plans(home: Home, rungs: Sequence[Study]) -> list[Plan]:
    """What each rung has still to do; raises ProtocolError."""
    return [plan.plan(study, home, slots=plan.slots_of(study)) for study in rungs]


def cap_notes(home: Home, rungs: Sequence[Study], found: Sequence[Plan]) -> list[str]:
    """Where the cap, which is the whole ladder's, will end it as far as is known."""
    cap = rungs[-1].budget.study_cap_seconds / 3600
    standing = Purse(home, rungs[-1].name, rungs[-1].budget, beside=rungs[-1].other_rungs).standing()
    hours = standing.study_taken / 3600
    for study, one in zip(rungs, found, strict=True):
        hours += one.gpu_hours
        if hours > cap:
            rung = study.rung_name
            return [
                f"the ladder's cap of {cap:,.2f} GPU-hours ends it in rung {rung}, {hours:,.2f} are planned up to there"
            ]
    return []


def as_record(home: Home, rungs: Sequence[Study]) -> dict[str, Any]:
    """Plan and standing of a ladder as plain JSON values."""
    found = plans(home, rungs)
    return {
        "rungs": [
            {
                **dataclasses.asdict(standing), "set": study.rung.set if study.rung else {},
                "promote": study.rung.promote if study.rung else 0, "gpus_per_run": one.gpus_per_run,
                "train_seconds": study.config.limits.train_seconds, "plan": plan.as_record(one),
            }
            for study, one, standing in zip(rungs, found, standings(home, rungs), strict=True)
        ],
        "not_transferring": list(rungs[-1].not_transferring),
        "gpu_hours": sum(one.gpu_hours for one in found),
        "price": sum(one.price for one in found if one.price is not None) or None,
        "makespan_seconds": sum(one.makespan_seconds for one in found),
        "agreements": [dataclasses.asdict(one) for one in agreements(rungs, states_of(home, rungs))],
        "notes": cap_notes(home, rungs, found),
    }  # fmt: skip
