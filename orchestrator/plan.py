"""The plan: what a study will run, how long that takes on its slots and what it costs, before anything is submitted."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

from orchestrator import ledger
from orchestrator.errors import CaddieError, ConfigError, MachineError
from orchestrator.evidence import read_study
from orchestrator.home import Home
from orchestrator.ledger import StudyState
from orchestrator.purse import Purse, confirmation_cost, run_cost
from orchestrator.slots import machine_slots
from orchestrator.study import SLURM, Study
from trainer.protocol import COMPLETE

OVERHEAD_SECONDS = 300.0
"""Beyond training and the scored evaluation: start, compilation, quantisation and the evaluations that do not count.

A run of the challenge takes about 25 minutes for its 20 of training and evaluation.
"""

SCORING_OVERHEAD_SECONDS = 120.0
"""The same for a run that only scores a stored model."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How long one run takes."""

    seconds: float
    basis: str
    """Where that is known from, for people."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is left of a study to do."""

    study: str
    is_scoring_only: bool
    """Whether its runs only score a stored model: they cost evaluation alone."""

    trials: int
    """Still to be asked; those of the total."""

    trial_runs: int
    confirmation_runs: int
    """At most; of a race at least `confirmation_runs_at_least`."""

    confirmation_runs_at_least: int
    slots: int
    gpus_per_run: int
    run: Estimate
    gpu_hours: float
    """At most."""

    gpu_hours_at_least: float
    """Where the race is decided at its first look; trials that are stopped early are not counted on."""

    price: float | None
    makespan_seconds: float
    """From now to the end, with every slot free at once and no cap of a day."""

    finish: float
    """Unix seconds of the end, the caps of days included."""

    affordable_trial_runs: int | None
    """Runs of trials that the study's cap lets begin, were each as long as the estimate; None without a cap."""

    notes: tuple[str, ...]

    @property
    def runs(self) -> int:
        return self.trial_runs + self.confirmation_runs


def plan(study: Study, home: Home, *, slots: int | None = None, now: float | None = None) -> Plan:
    """Plan what a study, begun or not, has still to do. `slots`: runs at a time, where it is known. Raises ProtocolError."""
    now = time.time() if now is None else now
    state = ledger.Ledger(home.study(study.name).ledger).state()
    trials = max(0, study.search.trials - len(state.trials))
    trial_runs = trials * len(study.search.seeds) + _unfinished(state)
    most, least = _confirmation_runs(study, state)
    at_once = slots or study.resources.slots
    run = estimate(study, home)
    gpus = study.resources.gpus_of_run
    hours, hours_at_least = ((trial_runs + count) * run.seconds * gpus / 3600 for count in (most, least))
    makespan = _makespan(study, trial_runs, most, at_once, run.seconds)
    finish, notes = _finish(study, home, makespan, hours, now)
    affordable = _affordable(study, home, run.seconds * gpus)
    if affordable is not None and affordable < trial_runs:
        notes.append(f"the study's cap ends the search after about {affordable} of {trial_runs} runs of trials")
    if study.stop_early is not None:
        notes.append("trials that are stopped early cost less; the plan counts every one as whole")
    return Plan(
        study=study.name, is_scoring_only=bool(study.from_runs), trials=trials, trial_runs=trial_runs,
        confirmation_runs=most, confirmation_runs_at_least=least, slots=at_once, gpus_per_run=gpus, run=run, gpu_hours=hours,
        gpu_hours_at_least=hours_at_least, price=hours * study.budget.price_per_gpu_hour or None, makespan_seconds=makespan,
        finish=finish, affordable_trial_runs=affordable, notes=tuple(notes),
    )  # fmt: skip


def _unfinished(state: StudyState) -> int:
    """Runs of trials that were asked and have not completed."""
    running = [trial for trial in state.trials.values() if trial.state == ledger.RUNNING]
    runs = {run_id for trial in running for run_id in trial.runs.values()}
    done = {attempt.run_id for attempt in state.attempts.values() if attempt.status == COMPLETE}
    return len(runs - done)


def _confirmation_runs(study: Study, state: StudyState) -> tuple[int, int]:
    """Most and fewest runs of the confirmation that are still to be made."""
    if study.confirm is None:
        return 0, 0
    arms = 1 if study.confirm.against or not (study.search.trials or study.candidate) else 2
    arms = len(study.cells) or arms
    done = {attempt.run_id for attempt in state.attempts.values() if attempt.status == COMPLETE}
    made = sum(run_id in done for arm in state.arms.values() for run_id in arm.runs.values())
    least = study.confirm.first if study.confirm.sequential else len(study.confirm.seeds)
    return max(0, arms * len(study.confirm.seeds) - made), max(0, arms * least - made)


def estimate(study: Study, home: Home) -> Estimate:
    """How long one run takes: as the complete ones of this study took, of others like it, or by its budgets."""
    own: list[float] = []
    others: list[float] = []
    for name in home.study_names():
        try:
            other, state = read_study(home, name)
        except CaddieError:  # a damaged ledger is no reason to plan nothing
            continue
        seconds = [a.seconds for a in state.attempts.values() if a.status == COMPLETE and a.seconds]
        if name == study.name:
            own += seconds
        elif _is_like(other, study):
            others += seconds
    for found, words in ((own, "of this study"), (others, f"of other studies of {study.preset} on as many GPUs")):
        if found:
            return Estimate(seconds=statistics.median(found), basis=f"median of {len(found)} complete runs {words}")
    limits = study.config.limits
    if study.from_runs:
        return Estimate(
            seconds=limits.eval_seconds + SCORING_OVERHEAD_SECONDS,
            basis="its evaluation budget and a start; no run like it has completed here",
        )
    return Estimate(
        seconds=limits.train_seconds + limits.eval_seconds + OVERHEAD_SECONDS,
        basis="its budgets of training and evaluation and 5 minutes; no run like it has completed here",
    )


def _is_like(other: Study, study: Study) -> bool:
    return _kind_of(other) == _kind_of(study)


def _kind_of(study: Study) -> tuple[object, ...]:
    """What decides how long a run takes."""
    config = study.config
    return (
        study.preset, bool(study.from_runs), study.resources.gpus_of_run, config.limits, config.schedule.steps, study.data,
    )  # fmt: skip


def _makespan(study: Study, trial_runs: int, confirmation_runs: int, slots: int, run_seconds: float) -> float:
    """Seconds to the end: a trial's seeds run at once where there is room, and the confirmation follows the last trial."""
    search = math.ceil(trial_runs / slots)
    confirm = study.confirm
    if confirm is None or not confirmation_runs:
        return search * run_seconds
    if not confirm.sequential:
        return (search + math.ceil(confirmation_runs / slots)) * run_seconds
    arms = max(1, confirmation_runs // len(confirm.seeds))
    looks = [confirm.first] + [confirm.step] * math.ceil((len(confirm.seeds) - confirm.first) / confirm.step)
    return (search + sum(math.ceil(arms * seeds / slots) for seeds in looks)) * run_seconds


def _finish(study: Study, home: Home, makespan: float, gpu_hours: float, now: float) -> tuple[float, list[str]]:
    """When it ends, and what the caps of a day have to do with it."""
    cap = study.budget.day_cap_seconds / 3600
    days = math.ceil(gpu_hours / cap) if cap and math.isfinite(cap) else 0
    if days <= 1:
        return now + makespan, []
    by_day = (days - 1) * 86_400.0
    note = f"a day's cap of {cap:,.1f} GPU-hours spreads it over at least {days} days"
    return now + max(makespan, by_day), [note]


def _affordable(study: Study, home: Home, expected: float) -> int | None:
    """Runs of trials that what is left of the study's cap lets begin; None without a cap, or on the CPU.

    Each takes `expected` GPU-seconds, and needs its longest time free at its beginning beside what is kept for the
    confirmation.
    """
    cost = run_cost(study)
    if not cost or not math.isfinite(study.budget.study_cap_seconds):
        return None
    standing = Purse(home, study.name, study.budget, beside=study.other_rungs).standing()
    left = study.budget.study_cap_seconds - standing.study_taken - standing.study_reserved
    beyond = left - confirmation_cost(study) - cost
    return 0 if beyond < 0 else 1 + math.floor(beyond / expected)


def least_cost(study: Study) -> float:
    """GPU-seconds that must be free before the study begins: the longest of its first trial, and what is kept for its confirmation."""
    return (len(study.search.seeds) * run_cost(study) if study.search.trials else 0.0) + confirmation_cost(study)


def require_caps(study: Study) -> None:
    """Raise ConfigError where a cap would not let the study begin."""
    cost, budget, needed = run_cost(study), study.budget, least_cost(study)
    longest = f"a run may take {cost / 3600:.2f} GPU-hours, {study.resources.gpus_of_run} GPUs for {study.timeout_minutes:g} minutes"
    if needed > budget.study_cap_seconds:
        raise ConfigError(
            f"[budget] the study's cap of {budget.study_cap_seconds / 3600:.2f} GPU-hours is below the {needed / 3600:.2f} of its "
            f"first trial and its confirmation: {longest}",
            hint="raise the cap, or lower [resources] timeout_minutes",
        )
    if cost > budget.day_cap_seconds:
        raise ConfigError(
            f"[budget] the day's cap of {budget.day_cap_seconds / 3600:.2f} GPU-hours lets no run begin: {longest}",
            hint="raise the cap, or lower [resources] timeout_minutes",
        )


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_text(found: Plan) -> str:
    """The plan for a terminal."""
    from orchestrator.progress import duration_text

    what = "scorings of a stored model (evaluation alone)" if found.is_scoring_only else "runs"
    at_least = found.confirmation_runs_at_least
    confirmed = (
        f"{found.confirmation_runs}"
        if at_least == found.confirmation_runs
        else f"{at_least} to {found.confirmation_runs}"
    )
    hours = f"{found.gpu_hours:,.2f}"
    if found.gpu_hours_at_least < found.gpu_hours:
        hours = f"{found.gpu_hours_at_least:,.2f} to {hours}"
    lines = [
        f"plan of {found.study}",
        f"  trials     {found.trials} to ask, {found.trial_runs} {what}",
        f"  confirm    {confirmed} runs",
        f"  one run    {duration_text(found.run.seconds)} on {found.gpus_per_run or 'no'} GPUs ({found.run.basis})",
        f"  GPU-hours  {hours}" + ("" if found.gpus_per_run else ": runs on the CPU"),
        *([f"  price      {found.price:,.2f} at most"] if found.price is not None else []),
        f"  time       {duration_text(found.makespan_seconds)} on {found.slots} slots",
        f"  finished   {time.strftime('%Y-%m-%d %H:%M', time.localtime(found.finish))} if it began now",
        *(f"  note       {note}" for note in found.notes),
    ]
    return "\n".join(lines)


def as_record(found: Plan) -> dict[str, Any]:
    """The plan as plain JSON values."""
    return {**dataclasses.asdict(found), "runs": found.runs}


def slots_of(study: Study) -> int | None:
    """Runs at a time on this machine; None where that is not known here: its GPUs may be elsewhere."""
    resources = study.resources
    if resources.launcher == SLURM:
        return resources.slots
    try:
        return len(machine_slots(slots=resources.slots, gpus_per_run=resources.gpus_per_run).groups)
    except MachineError:
        return None
