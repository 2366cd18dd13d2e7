import pytest

from orchestrator.errors import ConfigError
from orchestrator.factors import NoisePlan, cells_of, noise_cells, parse_factors, require_repeatable
from orchestrator.home import Home
from orchestrator.ledger import StudyState
from orchestrator.plan import plan
from orchestrator.preflight import runs_of
from orchestrator.presets import load_preset
from orchestrator.progress import runs_asked
from orchestrator.purse import confirmation_cost, run_cost
from orchestrator.study_file import parse_study
from trainer.config import with_knobs

HEAD = """
name = "cells"
question = "Do rounding and learning act on one another?"
preset = "smoke"
data = "nothing"
"""
FACTORS = """
[factors.quantiser.nearest]
"quant.method" = "rtn"
[factors.quantiser.gptq]
"quant.method" = "gptq"

[factors.learning.none]
"ttt.method" = "off"
[factors.learning.slow]
"ttt.lr" = 0.001
[factors.learning.fast]
"ttt.lr" = 0.01
"""
NOISE = """
[noise]
order_seeds = [1, 2]
replicates = 3
"""
SEARCH = "[space.'ttt.lr']\nlow = 0.1\nhigh = 0.2\n[search]\ntrials = 2\n"


@pytest.fixture(scope="module")
def smoke():
    return load_preset("smoke")


def test_every_combination_of_levels_is_a_cell_with_the_knobs_of_both():
    study = parse_study(HEAD + FACTORS)
    assert [cell.name for cell in study.cells] == [
        "nearest+none", "nearest+slow", "nearest+fast", "gptq+none", "gptq+slow", "gptq+fast",
    ]  # fmt: skip
    assert study.cells[2].params == {"quant.method": "rtn", "ttt.lr": 0.01}
    assert study.plan_text() == "6 cells, 2 quantiser × 3 learning, on seeds 42, 314, 999"
    assert (runs_of(study), study.search.trials) == (18, 0)


def test_a_cell_without_test_time_training_is_compared_by_the_score_before_it():
    study = parse_study(HEAD + FACTORS)
    assert [study.stage_of(cell.params) for cell in study.cells[:3]] == ["sliding", "ttt", "ttt"]
    sliding = parse_study('stage = "sliding"' + HEAD + FACTORS)
    assert {sliding.stage_of(cell.params) for cell in sliding.cells} == {"sliding"}
    before = with_knobs(study.config, {"ttt.before_quantization": True})
    assert not before.ttt.is_scored


def test_a_level_may_be_as_the_preset_has_it(smoke):
    factors = parse_factors({"rate": {"as-it-is": {}, "high": {"ttt.lr": 0.1}}}, smoke)
    assert [cell.params for cell in cells_of(factors)] == [{}, {"ttt.lr": 0.1}]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"\[factors\] must hold tables"),
        ({"rate": {"one": {"ttt.lr": 0.1}}}, r"\[factors.rate\] needs at least two levels"),
        ({"rate": 3}, r"\[factors.rate\] needs at least two levels, each a table of knobs, got 3"),
        ({"rate": {"one": 1, "two": 2}}, r"\[factors.rate.one\] must be a table of knobs, got 1"),
        ({"rate": {"sgd-0": {"002": {"ttt.lr": 0.1}}, "two": {}}}, r"\[factors.rate.sgd-0\] must hold knobs, got a table '002'"),
        ({"rate": {"one+": {}, "two": {}}}, r"names must be lower-case letters, .* got 'one\+'"),
        ({"rate": {"one": {"ttt.lrr": 1}, "two": {}}}, "there is no knob 'ttt.lrr'"),
        ({"rate": {"one": {"ttt.lr": -1.0}, "two": {}}}, r"\[factors\] cell one: ttt.lr must be at least 0"),
        ({"rate": {"one": {"ttt.lr": 0.1}, "two": {"ttt.lr": 0.1}}}, "cells one and two are one configuration"),
        (
            {"a": {"x": {"ttt.lr": 0.1}, "y": {}}, "b": {"x": {"ttt.lr": 0.2}, "y": {}}},
            r"\[factors\] a and b both set ttt.lr",
        ),
        (
            {"a": {f"l{n}": {"ttt.lr": 0.1 + n} for n in range(17)}, "b": {f"l{n}": {"ttt.epochs": n} for n in range(16)}},
            "make 272 cells, at most 256",
        ),
    ],
)  # fmt: skip
def test_factors_that_make_no_sense_are_refused_with_their_place(smoke, table, message):
    with pytest.raises(ConfigError, match=message):
        parse_factors(table, smoke)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FACTORS + SEARCH, r"\[factors\] and \[space\] exclude one another"),
        (FACTORS + NOISE, r"\[factors\] and \[noise\] exclude one another"),
        (NOISE + "[interleave]\nagainst = 'pr1326'", r"\[noise\] and \[interleave\] exclude one another"),
        (FACTORS + "[confirm]\nsequential = true", r"\[confirm\] sequential does not go with \[factors\]"),
        (NOISE.replace("[1, 2]", "[1]"), "order_seeds must be two or more"),
        (NOISE.replace("[1, 2]", "[0, 2]"), "each at least 1"),
        (NOISE.replace("= 3", "= 1"), "replicates must be at least 2, got 1"),
        (NOISE + "[set]\n'data.order_seed' = 4", r"\[noise\] sets data.order_seed itself"),
    ],
)
def test_designs_that_cannot_be_run_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_study(HEAD + text)


def test_a_design_over_a_stored_model_may_vary_evaluation_and_rounding_alone():
    study = parse_study(HEAD + 'from = "base"\n' + FACTORS)
    assert study.from_runs == ("base",) and study.confirm.seeds == ()
    training = FACTORS + '\n[factors.decay.low]\n"optim.muon_weight_decay" = 0.01\n[factors.decay.high]\n'
    with pytest.raises(ConfigError, match=r"\[factors\] optim.muon_weight_decay cannot matter where a stored model"):
        parse_study(HEAD + 'from = "base"\n' + training)
    with pytest.raises(ConfigError, match=r"\[noise\] needs training, `from` leaves none"):
        parse_study(HEAD + 'from = "base"\n' + NOISE)


def test_learning_beforehand_is_warned_of_and_needs_weights_that_learn(smoke):
    before = FACTORS + '\n[factors.learning.before]\n"ttt.before_quantization" = true\n'
    assert any("such scores are for this study alone" in warning for warning in parse_study(HEAD + before).warnings())
    with pytest.raises(ConfigError, match="needs weights that learn themselves, got ttt.method 'lora'"):
        with_knobs(smoke, {"ttt.before_quantization": True, "ttt.method": "lora"})


def test_pure_re_runs_differ_in_order_and_in_number_alone(smoke):
    plan = NoisePlan(order_seeds=(1, 2), replicates=2)
    require_repeatable(plan, smoke)
    assert [(cell.name, cell.params, cell.replicate) for cell in noise_cells(plan)] == [
        ("order-1+run-1", {"data.order_seed": 1}, 0), ("order-1+run-2", {"data.order_seed": 1}, 1),
        ("order-2+run-1", {"data.order_seed": 2}, 0), ("order-2+run-2", {"data.order_seed": 2}, 1),
    ]  # fmt: skip
    study = parse_study(HEAD + NOISE)
    assert study.plan_text() == "6 cells, 2 orders of the data, 3 times each, on seeds 42, 314, 999"
    assert runs_of(study) == 18


def test_the_budget_counts_every_cell_on_every_seed(tmp_path):
    study = parse_study(HEAD + FACTORS + "\n[resources]\ngpus_per_run = 1\n")
    assert confirmation_cost(study) == pytest.approx(6 * 3 * run_cost(study))
    planned = plan(study, Home(tmp_path), slots=2)
    assert (planned.trials, planned.confirmation_runs) == (0, 18)
    assert runs_asked(study, StudyState()) == 18


def test_runs_that_train_nothing_are_given_no_time_to_train():
    resources = '\n[resources]\nlauncher = "slurm"\ngpus_per_run = 1\n'
    whole, scoring = (parse_study(HEAD + source + FACTORS + resources) for source in ("", 'from = "base"\n'))
    assert whole.timeout_minutes - scoring.timeout_minutes == pytest.approx(whole.config.limits.train_seconds / 60)
