"""MLflow's views as a sweep needs them: columns, filters and charts that are there when the page opens.

A view is a tag of the experiment, in the form in which MLflow's own pages share theirs; `?viewStateShareKey=` opens it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from orchestrator.study import Study
from trainer import protocol

TABLE, CURVES = "caddie", "caddie-curves"
"""Names of an experiment's views: its trials (records) by score, and the curves of its runs."""

SHARED = "mlflow.sharedViewState."
LEVEL, STATUS = "caddie.level", "caddie.status"
COLUMN_PIXELS = 150
"""Width of a column: a score with its digits, a knob with its name."""

TRAINING_PAGES = "workflowType=machine_learning"
"""Of a link: without it MLflow shows its pages for conversations."""

GENERATED = ("final", "by_ms", "phase_seconds", "constraint", "Model metrics", "System metrics")
"""Sections into which the page puts a chart of every other metric, by the beginning of its name: closed below ours."""

MOST_KNOBS = 12
"""Knobs with a chart of their own; the chart of all of them together has every one."""

MOST_RUNS = 100
"""Of a chart with a point a run."""


def path_of(experiment_id: str, view: str, *, has_charts: bool = False) -> str:
    """Path of a view within MLflow's UI."""
    mode = "&compareRunsMode=CHART" if has_charts else ""
    return f"/#/experiments/{experiment_id}/runs?viewStateShareKey={view}{mode}&{TRAINING_PAGES}"


def run_path(experiment_id: str, mlflow_id: str, artifact: str = "") -> str:
    """Link to a run's page, or to one of its artifacts, from a page of the same UI."""
    place = f"/artifacts/{artifact}" if artifact else ""
    return f"#/experiments/{experiment_id}/runs/{mlflow_id}{place}?{TRAINING_PAGES}"


def study_views(study: Study) -> dict[str, str]:
    """Tags of a study's views."""
    stages, objective = list(reversed(protocol.STAGES)), f"final/{study.search.objective}_bpb"
    scores = [f"final/{stage}_bpb" for stage in stages]
    columns = [*scores, "final/artifact_bytes"]
    table = _view(
        columns, knobs=list(study.space), order_by=objective, filter_by=f"tags.`{LEVEL}` != 'seed' AND tags.`{LEVEL}` != 'study'",
        charts=_trial_charts(list(study.space), objective),
    )  # fmt: skip
    return _tags({TABLE: table, CURVES: _curves(columns, list(study.space), objective)})


def record_views(score: str, columns: Sequence[str]) -> dict[str, str]:
    """Tags of the views of an experiment of imported records; `score` is the metric that ranks them."""
    table = _view(
        columns, knobs=[], order_by=score, filter_by=f"tags.`{LEVEL}` = 'record'", charts=_record_charts(score)
    )
    return _tags({TABLE: table, CURVES: _curves(columns, [], score)})


def _tags(views: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {f"{SHARED}{name}": json.dumps(view) for name, view in views.items()}


def _view(
    metrics: Sequence[str], *, knobs: Sequence[str], order_by: str, filter_by: str, charts: list[dict[str, Any]]
) -> dict[str, Any]:
    columns = [*(f"metrics.`{name}`" for name in metrics), *(f"params.`{knob}`" for knob in knobs), f"tags.`{STATUS}`"]
    sections = list(dict.fromkeys(chart["metricSectionId"] for chart in charts))
    return {
        "selectedColumns": columns, "columnOrder": columns, "columnWidths": dict.fromkeys(columns, COLUMN_PIXELS),
        "orderByKey": f"metrics.`{order_by}`", "orderByAsc": True, "searchFilter": filter_by,
        "compareRunCharts": charts,
        "compareRunSections": [_section(name, is_open=name in sections) for name in (*sections, *GENERATED)],
        "isAccordionReordered": True, "hideEmptyCharts": True,  # in this order, not by the alphabet
    }  # fmt: skip


def _section(name: str, *, is_open: bool) -> dict[str, Any]:
    return {
        "uuid": name,
        "name": name,
        "display": is_open,
        "isReordered": False,
        "deleted": False,
        "isGenerated": False,
    }


def _curves(metrics: Sequence[str], knobs: Sequence[str], order_by: str) -> dict[str, Any]:
    """Every run with a seed, the best first; the page draws the first ten until others are chosen."""
    charts = [
        _line("Training", "train_loss", "Training loss by step"),
        _line("Training", "by_ms/train_loss", "Training loss by milliseconds of training"),
        _line("Training", "val_bpb", "Validation bits per byte by step"),
        _line("Training", "tokens_per_second", "Tokens per second by step"),
        _line("Test-time training", "ttt_bpb", "Running bits per byte by chunk"),
        *(_bar("Scores", f"final/{stage}_bpb") for stage in reversed(protocol.STAGES)),
        _bar("Sizes and times", "final/artifact_bytes"), _bar("Sizes and times", "final/train_seconds"),
    ]  # fmt: skip
    return _view(metrics, knobs=knobs, order_by=order_by, filter_by=f"tags.`{LEVEL}` = 'seed'", charts=charts)


def _trial_charts(knobs: Sequence[str], objective: str) -> list[dict[str, Any]]:
    """Trials against their knobs, all together and one by one."""
    together = _chart(
        "PARALLEL",
        "Trials",
        "Knobs and score",
        selectedParams=list(knobs),
        selectedMetrics=[objective],
        showAllRuns=True,
    )
    return [
        *([together] if knobs else []), _bar("Trials", objective), _bar("Trials", "final/artifact_bytes"),
        *(_scatter("Knobs", knob, "PARAM", objective) for knob in knobs[:MOST_KNOBS]),
    ]  # fmt: skip


def _record_charts(score: str) -> list[dict[str, Any]]:
    return [
        _bar("Records", score), _scatter("Records", "final/artifact_bytes", "METRIC", score),
        *(_bar("Stages", f"final/{stage}_bpb") for stage in reversed(protocol.STAGES)),
    ]  # fmt: skip


def _chart(kind: str, section: str, name: str, **fields: Any) -> dict[str, Any]:
    return {
        "type": kind, "uuid": f"{section}: {name}", "metricSectionId": section, "displayName": name, "deleted": False,
        "isGenerated": False, "runsCountToCompare": MOST_RUNS, **fields,
    }  # fmt: skip


def _bar(section: str, metric: str) -> dict[str, Any]:
    return _chart("BAR", section, metric, metricKey=metric)


def _scatter(section: str, key: str, kind: str, metric: str) -> dict[str, Any]:
    return _chart(
        "SCATTER",
        section,
        f"{metric} by {key}",
        xaxis={"key": key, "type": kind},
        yaxis={"key": metric, "type": "METRIC"},
    )


def _line(section: str, metric: str, name: str) -> dict[str, Any]:
    return _chart(
        "LINE", section, name, metricKey=metric, selectedMetricKeys=[metric], lineSmoothness=0, xAxisKey="step",
        xAxisScaleType="linear", scaleType="linear", range={}, selectedXAxisMetricKey="", yAxisKey="metric", yAxisExpressions=[],
        ignoreOutliers=False, useGlobalXaxisKey=False, useGlobalLineSmoothing=True,
    )  # fmt: skip
