"""Environment variables as knobs of a study."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_scripts import write_script

from orchestrator import variables
from orchestrator.errors import ConfigError
from orchestrator.script import Script, read_script
from orchestrator.space import Choice, NumberRange


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return read_script(write_script(tmp_path, "A"))


def test_a_point_is_the_texts_that_the_script_is_given(script: Script) -> None:
    plan = variables.plan(script, {"env.ITERATIONS": 300, "env.TIE_EMBEDDINGS": False})
    values = plan.values_of({"env.WEIGHT_DECAY": 0.1})
    assert values["env"] == {"ITERATIONS": "300", "TIE_EMBEDDINGS": "0", "WEIGHT_DECAY": "0.1"}
    assert values["data"] == {"tokens_per_step": 8192}, "the script's own default"


def test_the_limits_are_those_that_the_script_is_given(script: Script) -> None:
    own, set_ = (
        variables.plan(script, {}),
        variables.plan(script, {"env.MAX_WALLCLOCK_SECONDS": 60, "limits.eval_seconds": 30.0}),
    )
    assert own.config.limits.train_seconds == pytest.approx(600.5), "it looks at its clock after the step"
    assert set_.config.limits.train_seconds == pytest.approx(60.5)
    assert set_.config.limits.eval_seconds == 30
    assert own.config.schedule.steps == 200


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("env.WEIGHT_DECAI", 0.1, "would change nothing: .* never looks at WEIGHT_DECAI"),
        ("env.SEED", 1, "cannot be set: the study's seeds give it"),
        ("env.RUN_ID", "a", "cannot be set: it is the run's own id"),
        ("env.ITERATIONS", 0.5, "must be of type int, as line .* reads it; got 0.5"),
        ("env.WEIGHT_DECAY", "much", "must be of type float"),
        ("optim.muon_weight_decay", 0.1, "is a knob of the shared trainer"),
        ("limits.no_such", 1, "no knob 'limits.no_such'"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(script: Script, knob: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        variables.plan(script, {knob: value})


def test_the_nearest_name_is_told(script: Script) -> None:
    with pytest.raises(ConfigError) as error:
        variables.plan(script, {"env.WEIGHT_DECAI": 0.1})
    assert error.value.hint == "did you mean 'WEIGHT_DECAY'?"


def test_a_variable_that_the_script_overwrites_is_refused(tmp_path: Path) -> None:
    path = write_script(tmp_path, "C", changes={"count_tokens(data_path)": 'E["WD"] = "0.1"'})
    with pytest.raises(ConfigError, match=r"would change nothing: .* sets WD itself"):
        variables.plan(read_script(path), {"env.WD": 0.2})


def test_an_opaque_script_may_look_at_any_variable(tmp_path: Path) -> None:
    (tmp_path / "train_gpt.py").write_text("exec(open('inner.py').read())")
    plan = variables.plan(read_script(tmp_path), {"env.WHATEVER": 1})
    assert plan.env == {"WHATEVER": "1"}


def test_the_unchanged_script_is_a_point_of_the_space(script: Script) -> None:
    plan = variables.plan(script, {"env.STEP_SECONDS": 0.5})
    numbers = NumberRange(low=0.0, high=1.0)
    assert plan.preset_value("env.WEIGHT_DECAY", numbers) == 0.04, "its default"
    assert plan.preset_value("env.STEP_SECONDS", numbers) == 0.5, "what the study sets"
    assert plan.preset_value("env.TIE_EMBEDDINGS", Choice(values=(False, True))) is True


def test_a_default_that_only_the_script_knows_must_be_named(tmp_path: Path) -> None:
    path = write_script(tmp_path, "C", changes={'get("WD", 0.04)': 'get("WD", len(os.listdir(".")))'})
    plan = variables.plan(read_script(path), {})
    with pytest.raises(ConfigError, match="what WD is without the study is not known") as error:
        plan.preset_value("env.WD", NumberRange(low=0.0, high=1.0))
    assert '[set] "env.WD" = ...' in (error.value.hint or "")


def test_a_range_has_the_type_that_the_script_reads(script: Script) -> None:
    steps = variables.range_of(script, "env.ITERATIONS", {"low": 100, "high": 400, "step": 100})
    decay = variables.range_of(script, "env.WEIGHT_DECAY", {"low": 0, "high": 1})
    assert isinstance(steps, NumberRange) and steps.is_integer
    assert isinstance(decay, NumberRange) and not decay.is_integer


@pytest.mark.parametrize(
    ("knob", "table", "message"),
    [
        ("env.NO_SUCH", {"low": 0.0, "high": 1.0}, "reaches a value that cannot be run: .* never looks at NO_SUCH"),
        ("env.ITERATIONS", {"choices": [100, 0.5]}, "must be of type int"),
        ("schedule.steps", {"low": 1, "high": 2}, "is a knob of the shared trainer"),
    ],
)
def test_a_range_that_cannot_be_meant_is_refused(script: Script, knob: str, table: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        variables.range_of(script, knob, table)
