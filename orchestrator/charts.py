"""The plots of a report, as plotly figures without colours of their own ground: the page lends them its theme."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import plotly.offline
from plotly.graph_objects import Figure as Figure  # the page speaks of figures, and only this module of plotly

from orchestrator import ledger
from orchestrator.cells import params_text
from orchestrator.evidence import ArmEvidence, Curve, Evidence, RunEvidence
from orchestrator.ledger import BEST_ARM, PRESET_ARM
from orchestrator.statistics import CONFIDENCE
from orchestrator.tables import STAGE_NAMES
from trainer import protocol

T = TypeVar("T")

BLUE, ORANGE, GREY, RED = "#3b82d6", "#e07a1f", "#8b929c", "#d64545"
"""Readable on white and on near-black; blue and orange are told apart by most colour-blind readers."""

COLORS = {BEST_ARM: BLUE, PRESET_ARM: ORANGE}
SEARCH, OTHERS = "search", "other arms"
"""Groups of runs without a colour of their own: a search's trials, and arms by other names, such as a design's cells."""

MOST_POINTS = 400
"""Points of one line: enough for a screen's width, and a page of hundreds of runs still opens."""

MOST_LINES = 60
"""Lines of the search's runs that one plot draws, spread over all of them: more are a grey cloud, and a slow page."""

MANY_DOTS = 200
MOST_SCROLLED_LABELS = 18
STEP, SECONDS, TOKENS = "step", "seconds", "tokens"
LOSS_TITLES = {STEP: "optimiser step", SECONDS: "training seconds", TOKENS: "training tokens"}
"""What a loss curve may run over, with the axis's title."""

GROUP_COLORS = ("#3b82d6", "#e07a1f", "#3aa675", "#8b6fd1", "#c95b8c", "#a89a35", "#5b6b7d")
"""Of stacked parts, the code first."""

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


def charts(
    evidence: Evidence,
    curves: Sequence[Curve],
    importance: dict[str, float],
    sizes: Mapping[str, Mapping[str, int]] | None = None,
) -> list[Chart]:
    """Every plot that there are numbers for, in the report's order; `sizes` are model files' bytes by group and run."""
    found = [seeds_chart(evidence), stages_chart(evidence), *(loss_chart(curves, by=by) for by in LOSS_TITLES)]
    found += [trials_chart(evidence), front_chart(evidence), knobs_chart(evidence), importance_chart(importance)]
    found += [bytes_chart(evidence, sizes or {})]
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
    """Training loss, one line a run, by one of LOSS_TITLES; the arms lie over the search's runs."""
    curves = [curve for curve in curves if by != TOKENS or curve.tokens_per_step]
    if not curves:
        return None
    drawn = _thinned(curves, [curve.run for curve in curves])
    figure = _figure(LOSS_TITLES[by], "training loss, nats per token")
    named: set[str] = set()
    for curve in sorted(drawn, key=lambda curve: curve.run.owner in COLORS):
        group = _group(curve.run)
        every = max(1, len(curve.steps) // MOST_POINTS)
        x = _xs(curve, by)[::every]
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
        note=f"One line a run; hover for its owner and seed.{_left_out(curves, drawn)}",
        figures=(figure,),
    )


def _group(run: RunEvidence) -> str:
    """The name under which a run is shown."""
    if run.owner in COLORS:
        return run.owner
    return SEARCH if run.is_of_trial else OTHERS


def _thinned(lines: Sequence[T], runs: Sequence[RunEvidence]) -> list[T]:
    """All lines of the arms, and of the search's at most MOST_LINES, evenly spread; `runs` are the lines' own."""
    search = [index for index, run in enumerate(runs) if run.owner not in COLORS]
    every = len(search) / MOST_LINES
    if every > 1:
        search = [search[int(i * every)] for i in range(MOST_LINES)]
    kept = set(search)
    return [line for index, line in enumerate(lines) if index in kept or runs[index].owner in COLORS]


def _left_out(lines: Sequence[T], drawn: Sequence[T]) -> str:
    return f" {len(drawn):,} of {len(lines):,} runs are drawn." if len(drawn) < len(lines) else ""


def _xs(curve: Curve, by: str) -> Sequence[float]:
    if by == TOKENS:
        return [step * curve.tokens_per_step for step in curve.steps]
    return curve.steps if by == STEP else curve.train_seconds


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
    arms = [arm for arm in evidence.arms if arm.values(evidence.stage_of(arm))]
    if not arms:
        return None
    stages = {evidence.stage_of(arm) for arm in arms}
    figure = _figure(STAGE_NAMES[evidence.objective] if len(stages) == 1 else "bits per byte", "")
    for arm in arms:
        _add_seeds(figure, arm, evidence.stage_of(arm))
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
    drawn = _thinned(runs, runs)
    for run in sorted(drawn, key=lambda run: run.owner in COLORS):
        group = _group(run)
        figure.add_scatter(
            x=[name.removesuffix(" BPB") for name in STAGE_NAMES.values()], y=[run.bpb(stage) for stage in protocol.STAGES],
            mode="lines+markers", name=group, legendgroup=group, showlegend=group not in named,
            line={"color": COLORS.get(group, GREY), "width": 2 if group in COLORS else 1},
            opacity=0.9 if group in COLORS else 0.45,
            hovertemplate=f"{run.owner}, seed {run.seed}<br>%{{x}}: %{{y:.5f}}<extra></extra>",
        )  # fmt: skip
        named.add(group)
    note = "Round trip: the stored model, read back. A rise there is the cost of quantisation, a fall at TTT its gain."
    note += _left_out(runs, drawn)
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
                marker={"color": color, "size": _dot(len(done)), "symbol": symbol, "opacity": 0.85}, text=[params_text(trial.params).replace(", ", "<br>") for trial in shown],
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


def _dot(count: int) -> int:
    """Size of a dot in pixels: many dots are small ones."""
    return 9 if count <= MANY_DOTS else 5


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
    note = "A slice a knob: each dot is a trial, the other knobs as they were. Orange: the preset."
    return Chart(name="knobs", title="Value by knob", note=note, figures=figures)


def _knob_panel(evidence: Evidence, knob: str, trials: Sequence[ledger.Trial]) -> Figure:
    figure = _figure(knob, STAGE_NAMES[evidence.objective])
    values = [trial.params[knob] for trial in trials]
    figure.add_scatter(
        x=[value if isinstance(value, (int, float)) else str(value) for value in values], y=[trial.value for trial in trials],
        mode="markers", text=[f"trial {trial.number}" for trial in trials], hovertemplate="%{text}<br>%{x}: %{y:.5f}<extra></extra>",
        marker={"size": _dot(len(trials)), "color": [ORANGE if trial.number == 0 else BLUE for trial in trials], "opacity": 0.85},
    )  # fmt: skip
    if getattr(evidence.study.space[knob], "log", False):
        ticks = log_ticks(min(values), max(values))
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    elif not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        figure.update_xaxes(type="category")
    return figure.update_layout(height=280, showlegend=False)


def front_chart(evidence: Evidence) -> Chart | None:
    """Bits per byte over the artifact's bytes, a dot a run, and those that no other beats in both."""
    stage = evidence.objective
    runs = [run for run in evidence.runs if run.bpb(stage) is not None and run.result and run.result.artifact_bytes]
    if len(runs) < 2:
        return None
    figure = _figure("artifact bytes", STAGE_NAMES[stage])
    for group in (SEARCH, OTHERS, PRESET_ARM, BEST_ARM):
        shown = [run for run in runs if _group(run) == group]
        if shown:
            figure.add_scatter(
                x=[_size(run) for run in shown], y=[run.bpb(stage) for run in shown], mode="markers", name=group,
                marker={"size": 9 if group in COLORS else _dot(len(shown)), "color": COLORS.get(group, GREY), "opacity": 0.75},
                text=[f"{run.owner}, seed {run.seed}" for run in shown], hovertemplate="%{text}<br>%{x:,} bytes: %{y:.5f}<extra></extra>",
            )  # fmt: skip
    front = pareto_front([(_size(run), run.bpb(stage) or math.inf) for run in runs])
    figure.add_scatter(
        x=[size for size, _ in front], y=[score for _, score in front], mode="lines", name="Pareto front",
        line={"color": GREY, "width": 2, "shape": "hv", "dash": "dot"}, hoverinfo="skip",
    )  # fmt: skip
    caps = {run.result.cap_bytes for run in runs if run.result}
    low, high = min(_size(run) for run in runs), max(_size(run) for run in runs)
    for cap in caps:
        if cap <= high + (high - low):  # a cap far away would flatten the rest
            figure.add_vline(x=cap, line={"color": RED, "width": 1}, annotation_text="cap")
    note = "Fewer bytes leave room for more model. On the front no other run is both smaller and better."
    return Chart(name="front", title="Score and size", note=note, figures=(figure,))


def _size(run: RunEvidence) -> int:
    assert run.result is not None, "only runs with an artifact are shown"
    return run.result.artifact_bytes


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is at or below in both coordinates, by the first."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def bytes_chart(evidence: Evidence, sizes: Mapping[str, Mapping[str, int]]) -> Chart | None:
    """What the artifact's bytes hold, a bar a run of the arms: code, then the model by group where its file can be read."""
    runs = [run for arm in evidence.arms for run in arm.runs if run.result and run.result.artifact_bytes]
    if not runs:
        return None
    parts = {run.run_id: _parts(run, sizes) for run in runs}
    names = list(dict.fromkeys(name for found in parts.values() for name in found))
    figure = _figure("bytes", "")
    labels = [f"{run.owner}, {run.seed}" for run in runs]
    for name, color in zip(names, _cycle(GROUP_COLORS, len(names)), strict=True):
        figure.add_bar(
            x=[parts[run.run_id].get(name, 0) for run in runs], y=labels, orientation="h", name=name,
            marker={"color": color}, hovertemplate=f"{name}: %{{x:,}} bytes<extra>%{{y}}</extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack", height=150 + 30 * len(runs)).update_yaxes(autorange="reversed")
    note = (
        "Group: by the tensors' names; the matrices share one coded stream, whose bytes fall to them by their entropy."
    )
    return Chart(name="bytes", title="Bytes by group", note=note, figures=(figure,))


def _parts(run: RunEvidence, sizes: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    assert run.result is not None, "only runs with an artifact are shown"
    model = sizes.get(run.run_id) or {"model": run.result.model_bytes}
    return {"code": run.result.bundle_bytes, **model}


def _cycle(colors: Sequence[str], count: int) -> list[str]:
    return [colors[i % len(colors)] for i in range(count)]


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
