import json
import math
from dataclasses import replace

import pytest
from make_study import make_study

from orchestrator.charts import (
    MOST_POINTS,
    bytes_chart,
    charts,
    figure_json,
    importance_chart,
    log_ticks,
    loss_chart,
    pareto_front,
)
from orchestrator.evidence import Curve, gather, read_curves

NAME = "wd-qk-ttt-smoke"


@pytest.fixture
def home(tmp_path):
    return make_study(tmp_path)


def test_a_finished_study_has_every_plot(home):
    evidence = gather(home, NAME)
    found = charts(evidence, read_curves(home, evidence)[0], {"ttt.lr": 0.7, "model.qk_gain": 0.3})
    assert [chart.name for chart in found] == [
        "seeds", "stages", "loss-by-step", "loss-by-seconds", "loss-by-tokens", "trials", "front", "knobs", "importance", "bytes",
    ]  # fmt: skip
    assert len(next(chart for chart in found if chart.name == "knobs").figures) == 3


def test_a_curve_by_tokens_counts_the_tokens_of_its_steps(home):
    evidence = gather(home, NAME)
    curves, _ = read_curves(home, evidence)
    [figure] = loss_chart(curves, by="tokens").figures
    assert max(max(line.x) for line in figure.data) == 120 * curves[0].tokens_per_step
    assert loss_chart([replace(curve, tokens_per_step=0) for curve in curves], by="tokens") is None


def test_the_front_holds_what_no_other_beats_in_both():
    points = [(3, 1.0), (1, 3.0), (2, 2.0), (2, 2.5), (4, 1.0), (3, 1.0)]
    assert pareto_front(points) == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert pareto_front([]) == []


def test_bytes_fall_to_the_groups_where_the_model_file_can_be_read(home):
    evidence = gather(home, NAME)
    first = evidence.arms[0].runs[0]
    [figure] = bytes_chart(evidence, {first.run_id: {"MLP": 7, "attention": 5}}).figures
    assert [bar.name for bar in figure.data] == ["code", "MLP", "attention", "model"]
    assert figure.data[1].x[0] == 7
    assert figure.data[3].x[0] == 0
    assert figure.data[3].x[1] == evidence.arms[0].runs[1].result.model_bytes


def test_the_loss_plot_has_a_line_a_run_and_names_each_group_once(home):
    evidence = gather(home, NAME)
    chart = loss_chart(read_curves(home, evidence)[0], by="step")
    lines = chart.figures[0].data
    assert len(lines) == len(evidence.runs)
    assert sorted(line.name for line in lines if line.showlegend) == ["best", "preset", "search"]


def test_cells_of_a_design_are_not_called_a_search(home):
    curves = read_curves(home, gather(home, NAME))[0]
    cells = [replace(curve, run=replace(curve.run, owner="order-1+run-1")) for curve in curves]
    lines = loss_chart(cells, by="step").figures[0].data
    assert [line.name for line in lines if line.showlegend] == ["other arms"]


def test_a_long_curve_is_thinned_and_a_loss_that_is_not_a_number_does_not_hide_the_rest(home):
    run = gather(home, NAME).runs[0]
    count = 5 * MOST_POINTS
    losses = (*(5.0 - i / count for i in range(count - 1)), math.nan)
    curve = Curve(run=run, steps=tuple(range(count)), train_seconds=tuple(map(float, range(count))), losses=losses)
    [figure] = loss_chart([curve], by="seconds").figures
    assert len(figure.data[0].x) <= MOST_POINTS + 1
    assert all(math.isfinite(end) for end in figure.layout.yaxis.range)


def test_best_so_far_never_rises_and_leaves_out_what_breaks_a_constraint(home):
    evidence = gather(home, NAME)
    trials = next(chart for chart in charts(evidence, [], {}) if chart.name == "trials")
    best = next(trace for trace in trials.figures[0].data if trace.name == "best so far")
    assert list(best.y) == sorted(best.y, reverse=True)
    assert 6 not in best.x
    assert trials.note.endswith("Without a value (failed or stopped early): 3, 5.")


def test_no_importance_means_no_plot_of_it():
    assert importance_chart({}) is None


def test_a_figures_json_can_stand_inside_a_script_element():
    [figure] = importance_chart({"</script>": 1.0}).figures
    assert "</script>" not in figure_json(figure)
    assert json.loads(figure_json(figure))["data"][0]["y"] == ["</script>"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.02, 0.3, [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]), (1e-5, 1.0, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1])],
)
def test_a_logarithmic_axis_is_labelled_by_plain_numbers(low, high, expected):
    assert log_ticks(low, high) == pytest.approx(expected)
