"""The plots of a report, as plotly figures without colours of their own ground: the page lends them its theme."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.offline
from plotly.graph_objects import Figure as Figure  # the page speaks of figures, and only this module of plotly

from orchestrator import ledger
from orchestrator.evidence import BEST_ARM, PRESET_ARM, ArmEvidence, Curve, Evidence
from orchestrator.statistics import CONFIDENCE
from orchestrator.tables import STAGE_NAMES, params_text
from trainer import protocol

BLUE, ORANGE, GREY, RED = "#3b82d6", "#e07a1f", "#8b929c", "#d64545"
"""Readable on white and on near-black; blue and orange are told apart by most colour-blind readers."""

COLORS = {BEST_ARM: BLUE, PRESET_ARM: ORANGE}
MOST_POINTS = 400
"""Points of one line: enough for a screen's width, and a page of hundreds of runs still opens."""

MOST_SCROLLED_LABELS = 18
HEIGHT = 380


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One or more figures with their heading and the sentence that says how to read it."""

    name: str
    title: str
    note: str
    figures: tuple[Figure, ...]
    """Side by side where the screen is wide enough."""


def plotly_javascript() -> str:
    """The library's source, to be put into the page."""
    source: str = plotly.offline.get_plotlyjs()
    return source


def figure_json(figure: Figure) -> str:
    """A figure as JSON that may stand inside a script element."""
    return json.dumps(json.loads(figure.to_json()), separators=(",", ":")).replace("<", "\\u003c")


def charts(evidence: Evidence, curves: Sequence[Curve], importance: dict[str, float]) -> list[Chart]:
    """Every plot that there are numbers for, in the report's order."""
    found = [seeds_chart(evidence), trials_chart(evidence), knobs_chart(evidence), importance_chart(importance)]
    found += [stages_chart(evidence), loss_chart(curves, by="step"), loss_chart(curves, by="seconds")]
    return [chart for chart in found if chart is not None]


def _figure(x_title: str, y_title: str) -> Figure:
    figure = Figure()
    return _styled(figure).update_xaxes(title_text=x_title).update_yaxes(title_text=y_title)


def _styled(figure: Figure) -> Figure:
    return figure.update_layout(
        template="none", height=HEIGHT, margin={"l": 64, "r": 16, "t": 16, "b": 52}, hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    ).update_xaxes(automargin=True).update_yaxes(automargin=True, title_standoff=12)  # fmt: skip


# ── curves ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def loss_chart(curves: Sequence[Curve], *, by: str) -> Chart | None:
    """Training loss, one line a run, by "step" or by "seconds" of training; the arms lie over the search's runs."""
    if not curves:
        return None
    titles = {"step": "optimiser step", "seconds": "training seconds"}
    figure = _figure(titles[by], "training loss, nats per token")
    named: set[str] = set()
    for curve in sorted(curves, key=lambda curve: curve.run.owner in COLORS):
        group = curve.run.owner if curve.run.owner in COLORS else "search"
        every = max(1, len(curve.steps) // MOST_POINTS)
        x = (curve.steps if by == "step" else curve.train_seconds)[::every]
        figure.add_scatter(
            x=x, y=curve.losses[::every], mode="lines", name=group, legendgroup=group, showlegend=group not in named,
            line={"color": COLORS.get(group, GREY), "width": 2 if group in COLORS else 1},
            opacity=0.95 if group in COLORS else 0.55,
            hovertemplate=f"{curve.run.owner}, seed {curve.run.seed}<br>%{{x}}: %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
        named.add(group)
    figure.update_yaxes(range=_loss_range(curves))
    return Chart(
        name=f"loss-by-{by}",
        title=f"Loss by {by}",
        note="One line a run; hover for its owner and seed.",
        figures=(figure,),
    )


def _loss_range(curves: Sequence[Curve]) -> list[float] | None:
    """Leaves out the first steps' height, which would flatten all that follows."""
    finite = [[loss for loss in curve.losses if math.isfinite(loss)] for curve in curves]
    late = [loss for losses in finite for loss in losses[len(losses) // 10 :]]
    if not late:
        return None
    low, high = min(late), max(late)
    margin = 0.05 * (high - low or 1.0)
    return [low - margin, high + margin]


# ── scores ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def seeds_chart(evidence: Evidence) -> Chart | None:
    """Every seed's score and each arm's mean with its interval."""
    stage = evidence.objective
    arms = [arm for arm in evidence.arms if arm.values(stage)]
    if not arms:
        return None
    figure = _figure(STAGE_NAMES[stage], "")
    for arm in arms:
        _add_seeds(figure, arm, stage)
    figure.update_yaxes(type="category", range=[-0.5, len(arms) - 0.5]).update_layout(
        height=110 + 60 * len(arms), showlegend=False
    )
    note = (
        f"Dots: seeds. Diamond: mean with its {CONFIDENCE:.0%} t interval; the test of the difference is in the claim."
    )
    return Chart(name="seeds", title="Seeds", note=note, figures=(figure,))


def _add_seeds(figure: Figure, arm: ArmEvidence, stage: str) -> None:
    color = COLORS.get(arm.name, BLUE)
    scored = [run for run in arm.runs if run.bpb(stage) is not None]
    figure.add_scatter(
        x=[run.bpb(stage) for run in scored], y=[arm.name] * len(scored), mode="markers", text=[f"seed {run.seed}" for run in scored],
        marker={"color": color, "size": 9, "opacity": 0.6}, hovertemplate="%{text}: %{x:.5f}<extra></extra>",
    )  # fmt: skip
    summary = arm.summary(stage)
    half = None if summary.high is None or summary.mean is None else summary.high - summary.mean
    figure.add_scatter(
        x=[summary.mean], y=[arm.name], mode="markers", marker={"color": color, "size": 13, "symbol": "diamond"},
        error_x={"type": "data", "array": [half], "color": color, "thickness": 2, "width": 8} if half is not None else None,
        hovertemplate=f"mean of {summary.count}: %{{x:.5f}}<extra></extra>",
    )  # fmt: skip


def stages_chart(evidence: Evidence) -> Chart | None:
    """Bits per byte from the averaged weights to the last stage, one line a run."""
    runs = [run for run in evidence.runs if any(run.bpb(stage) is not None for stage in protocol.STAGES)]
    if not runs:
        return None
    figure = _figure("", "bits per byte")
    named: set[str] = set()
    for run in sorted(runs, key=lambda run: run.owner in COLORS):
        group = run.owner if run.owner in COLORS else "search"
        figure.add_scatter(
            x=[name.removesuffix(" BPB") for name in STAGE_NAMES.values()], y=[run.bpb(stage) for stage in protocol.STAGES],
            mode="lines+markers", name=group, legendgroup=group, showlegend=group not in named,
            line={"color": COLORS.get(group, GREY), "width": 2 if group in COLORS else 1},
            opacity=0.9 if group in COLORS else 0.45,
            hovertemplate=f"{run.owner}, seed {run.seed}<br>%{{x}}: %{{y:.5f}}<extra></extra>",
        )  # fmt: skip
        named.add(group)
    note = "Round trip: the stored model, read back. A rise there is the cost of quantisation, a fall at TTT its gain."
    return Chart(name="stages", title="Bits per byte by stage", note=note, figures=(figure,))


# ── search ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def trials_chart(evidence: Evidence) -> Chart | None:
    """Every trial's value in its order, and the best so far."""
    done = [found.trial for found in evidence.trials if found.trial.value is not None]
    if not done:
        return None
    figure = _figure("trial", STAGE_NAMES[evidence.objective])
    for name, is_shown, color, symbol in (
        ("complete", True, BLUE, "circle"), ("violates a constraint", False, RED, "x"),
    ):  # fmt: skip
        shown = [trial for trial in done if trial.is_feasible == is_shown]
        if shown:
            figure.add_scatter(
                x=[trial.number for trial in shown], y=[trial.value for trial in shown], mode="markers", name=name,
                marker={"color": color, "size": 9, "symbol": symbol}, text=[params_text(trial.params).replace(", ", "<br>") for trial in shown],
                hovertemplate="trial %{x}: %{y:.5f}<br>%{text}<extra></extra>",
            )  # fmt: skip
    numbers, bests = _best_so_far(done)
    figure.add_scatter(
        x=numbers,
        y=bests,
        mode="lines",
        name="best so far",
        line={"color": GREY, "width": 2, "shape": "hv"},
        hoverinfo="skip",
    )
    figure.update_xaxes(dtick=1 if len(evidence.trials) <= MOST_SCROLLED_LABELS else None)
    lost = sorted(
        found.trial.number for found in evidence.trials if found.trial.state in (ledger.FAILED, ledger.PRUNED)
    )
    note = "Trial 0 is the preset. " + (
        f"Without a value (failed or stopped early): {', '.join(map(str, lost))}." if lost else ""
    )
    return Chart(name="trials", title="Trials and best so far", note=note.strip(), figures=(figure,))


def _best_so_far(trials: Sequence[ledger.Trial]) -> tuple[list[int], list[float]]:
    """Numbers and the lowest feasible value up to each."""
    numbers: list[int] = []
    bests: list[float] = []
    for trial in sorted(trials, key=lambda trial: trial.number):
        if trial.value is not None and trial.is_feasible:
            numbers.append(trial.number)
            bests.append(min([trial.value, *bests[-1:]]))
    if numbers and numbers[-1] < trials[-1].number:
        numbers, bests = [*numbers, trials[-1].number], [*bests, bests[-1]]
    return numbers, bests


def knobs_chart(evidence: Evidence) -> Chart | None:
    """The value over each knob, a panel a knob."""
    done = [found.trial for found in evidence.trials if found.trial.value is not None]
    if len(done) < 2 or not evidence.study.space:
        return None
    figures = tuple(_knob_panel(evidence, knob, done) for knob in evidence.study.space)
    return Chart(name="knobs", title="Value by knob", note="Orange: the preset.", figures=figures)


def _knob_panel(evidence: Evidence, knob: str, trials: Sequence[ledger.Trial]) -> Figure:
    figure = _figure(knob, STAGE_NAMES[evidence.objective])
    values = [trial.params[knob] for trial in trials]
    figure.add_scatter(
        x=[value if isinstance(value, (int, float)) else str(value) for value in values], y=[trial.value for trial in trials],
        mode="markers", text=[f"trial {trial.number}" for trial in trials], hovertemplate="%{text}<br>%{x}: %{y:.5f}<extra></extra>",
        marker={"size": 9, "color": [ORANGE if trial.number == 0 else BLUE for trial in trials], "opacity": 0.85},
    )  # fmt: skip
    if getattr(evidence.study.space[knob], "log", False):
        ticks = log_ticks(min(values), max(values))
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    elif not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        figure.update_xaxes(type="category")
    return figure.update_layout(height=280, showlegend=False)


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade that the values reach; only the decades where that would crowd the axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    leading = (1, 2, 5) if len(decades) <= 3 else (1,)
    return [float(f"{digit}e{decade}") for decade in decades for digit in leading]


def importance_chart(importance: dict[str, float]) -> Chart | None:
    """How much of the search's differences each knob explains."""
    if not importance:
        return None
    ranked = sorted(importance.items(), key=lambda item: item[1])
    figure = _figure("share of importance", "")
    figure.add_bar(
        x=[share for _, share in ranked], y=[knob for knob, _ in ranked], orientation="h", marker={"color": BLUE}, width=0.55,
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(height=110 + 44 * len(ranked), showlegend=False).update_xaxes(rangemode="tozero")
    note = "Estimated from the trials alone (PED-ANOVA); with few trials it is a hint, not a finding."
    return Chart(name="importance", title="Knob importance", note=note, figures=(figure,))
