"""A ladder's tables: what its rungs will take and took, how they agree, and what became of the points that went up."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator import agreement, ladder, ledger
from orchestrator.agreement import Agreement
from orchestrator.cells import ABSENT, Cell, Table, bpb, params_text
from orchestrator.climb import Standing
from orchestrator.ledger import BEST_ARM, StudyState, Trial
from orchestrator.plan import Plan
from orchestrator.progress import duration_text
from orchestrator.rungs import in_words
from orchestrator.study import Study

TITLE, AGREEMENT, POINTS = "Ladder", "Agreement of the rungs", "Points that went up"


def plan_table(rungs: Sequence[Study], plans: Sequence[Plan]) -> Table:
    """What each rung has still to do, and all of them together."""
    rows = [_plan_row(study, one) for study, one in zip(rungs, plans, strict=True)]
    prices = [one.price for one in plans if one.price is not None]
    total = (
        "all", "", "", "", str(sum(one.trials for one in plans)), str(sum(one.runs for one in plans)),
        f"{sum(one.gpu_hours for one in plans):,.2f}", _price(sum(prices) if prices else None),
        duration_text(sum(one.makespan_seconds for one in plans)),
    )  # fmt: skip
    stays = rungs[-1].not_transferring
    return Table(
        title=TITLE,
        columns=("Rung", "Study", "GPUs", "Train s", "Trials", "Runs", "GPU-hours", "Price", "Time"),
        rows=(*rows, total), summary_rows=1,
        note="What is left to do, at most." + (f" Not taken up with a point: {', '.join(stays)}." if stays else ""),
    )  # fmt: skip


def _plan_row(study: Study, found: Plan) -> tuple[Cell, ...]:
    return (
        study.rung_name, study.name, str(found.gpus_per_run), f"{study.config.limits.train_seconds:g}", str(found.trials),
        str(found.runs), f"{found.gpu_hours:,.2f}", _price(found.price), duration_text(found.makespan_seconds),
    )  # fmt: skip


def _price(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.2f}"


def standing_table(rungs: Sequence[Study], standings: Sequence[Standing]) -> Table:
    """Where each rung stands."""
    rows = tuple(
        (
            one.rung, one.study, str(study.resources.gpus_of_run), in_words(study.rung) if study.rung else "",
            str(study.rung.promote) if study.rung and study.rung.promote else ABSENT, f"{one.trials} of {one.trials_planned}",
            one.state, bpb(one.best_value), f"{one.gpu_hours:,.2f}",
        )
        for study, one in zip(rungs, standings, strict=True)
    )  # fmt: skip
    stays = rungs[-1].not_transferring
    return Table(
        title=TITLE,
        columns=("Rung", "Study", "GPUs", "Its own", "Promoted", "Trials", "State", "Best BPB", "GPU-hours"), rows=rows,
        note=f"A point goes up with the preset's value of {', '.join(stays)}." if stays else "",
    )  # fmt: skip


def state_table(standings: Sequence[Standing]) -> Table:
    """The same in short, for a terminal."""
    rows = tuple(
        (one.rung, one.study, one.state, f"{one.trials} of {one.trials_planned}", bpb(one.best_value), f"{one.gpu_hours:,.2f}")
        for one in standings
    )  # fmt: skip
    return Table(title=TITLE, columns=("Rung", "Study", "State", "Trials", "Best BPB", "GPU-hours"), rows=rows)


def agreement_table(found: Sequence[Agreement]) -> Table:
    """How well each rung says what the next one finds."""
    return Table(
        title=AGREEMENT,
        columns=("Rungs", "Points", "Spearman", "Kendall", "Residual σ, BPB", "Best alike", "in resamples"),
        rows=tuple(map(_agreement_row, found)),
        note=f"Over the points that both rungs scored, the preset's included. {agreement.CAVEAT} {agreement.INTERVALS}; residual σ: "
        "about the line of the upper rung's scores through the lower one's. Best alike: whether the lower rung's best of these "
        "points is the upper one's, and how often in resamples of them.",
    )  # fmt: skip


def _agreement_row(found: Agreement) -> tuple[Cell, ...]:
    rungs, count = f"{found.lower} → {found.upper}", str(len(found.pairs))
    if not found.is_told:
        return rungs, count, "too few", "too few", ABSENT, ABSENT, ABSENT
    share = f"{found.best_alike_share:.0%}" if found.best_alike_share is not None else ABSENT
    return (
        rungs, count, agreement.correlation_text(found.spearman), agreement.correlation_text(found.kendall),
        bpb(found.residual_std), "yes" if found.is_best_alike else "no", share,
    )  # fmt: skip


def points_table(rungs: Sequence[Study], states: Sequence[StudyState]) -> Table:
    """Every point that went up, rung by rung, and what became of it."""
    rows = [
        row
        for number in range(1, len(rungs))
        for row in _points(rungs[number - 1], states[number - 1], rungs[number], states[number])
    ]
    return Table(
        title=POINTS, columns=("From", "Point", "BPB there", "Place there", "To", "BPB", "Place", "What became of it"),
        rows=tuple(rows), note="Places are among a rung's complete trials within their limits, its preset included.",
    )  # fmt: skip


def _points(lower: Study, below: StudyState, upper: Study, above: StudyState) -> list[tuple[Cell, ...]]:
    if below.closed not in ladder.ENDED:
        return []
    rows: list[tuple[Cell, ...]] = []
    for point in ladder.chosen(upper, below):
        found = next((trial for trial in above.trials.values() if trial.number and trial.params == point.params), None)
        rows.append((
            f"{lower.rung_name}, trial {point.trial}", params_text(point.params), bpb(point.value), _place(below, point.trial),
            f"{upper.rung_name}, trial {found.number}" if found else upper.rung_name, bpb(found.value if found else None),
            _place(above, found.number) if found else ABSENT, _fate(upper, above, found),
        ))  # fmt: skip
    return rows


def _place(state: StudyState, number: int) -> str:
    ranked = [trial.number for trial in ladder.ranked(state)]
    return f"{ranked.index(number) + 1} of {len(ranked)}" if number in ranked else ABSENT


def _fate(study: Study, state: StudyState, trial: Trial | None) -> str:
    if trial is None:
        return "waits" if state.closed not in ladder.ENDED else "not run"
    if trial.state != ledger.COMPLETE:
        return trial.state + (f": {trial.reason}" if trial.reason else "")
    if not trial.is_feasible:
        return "over a limit"
    if state.best is None or state.best.number != trial.number:
        return "complete"
    is_confirmed = study.confirm is not None and BEST_ARM in state.arms and state.arms[BEST_ARM].trial == trial.number
    return "the best, confirmed on more seeds" if is_confirmed else "the best of its rung"


def report_tables(rungs: Sequence[Study], states: Sequence[StudyState], standings: Sequence[Standing], agreed: Sequence[Agreement]) -> tuple[Table, ...]:  # fmt: skip
    """The section of a report; tables without rows are left out."""
    found = (standing_table(rungs, standings), agreement_table(agreed), points_table(rungs, states))
    return tuple(table for table in found if table.rows)
