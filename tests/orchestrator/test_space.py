import pytest

from orchestrator.errors import ConfigError
from orchestrator.presets import load_preset
from orchestrator.space import Choice, NumberRange, parse_range

SMOKE = load_preset("smoke")


def test_a_range_keeps_its_bounds_its_scale_and_its_type():
    assert parse_range("ttt.lr", {"low": 0.001, "high": 1, "log": True}, SMOKE) == NumberRange(
        low=0.001, high=1, log=True
    )
    found = parse_range("ttt.epochs", {"low": 1, "high": 5, "step": 2}, SMOKE)
    assert found == NumberRange(low=1, high=5, step=2, is_integer=True)


def test_choices_may_be_lists_and_words():
    found = parse_range("model.recurrence_layers", {"choices": [[2, 3], []]}, SMOKE)
    assert found == Choice(values=((2, 3), ()))
    assert parse_range("quant.method", {"choices": ["gptq", "rtn"]}, SMOKE) == Choice(values=("gptq", "rtn"))


@pytest.mark.parametrize(
    ("knob", "table", "message", "hint"),
    [
        ("optim.muon_weight_decai", {}, "no knob 'optim.muon_weight_decai'", "muon_weight_decay"),
        ("ttt.lr", 0.1, "must be a table with low and high", None),
        ("ttt.lr", {"low": 0.1, "hihg": 1}, "has no key 'hihg'", "high"),
        ("ttt.lr", {"choices": [0.1, 0.2], "low": 1}, "has no key 'low'", "choices"),
        ("ttt.lr", {"choices": [0.1]}, "at least two values", None),
        ("ttt.lr", {"choices": [0.1, 0.2, 0.1]}, "names a value twice", None),
        ("ttt.lr", {"choices": [0.1, -1.0]}, "reaches a value that cannot be run: ttt.lr must be at least 0", None),
        ("quant.method", {"low": 1, "high": 2}, "is of type str", "choices = "),
        ("model.recurrence_layers", {"low": 1, "high": 2}, "is of type tuple", "choices = "),
        ("ttt.lr", {"low": "a", "high": 2}, "needs a number low, got 'a'", None),
        ("ttt.lr", {"low": 1.0}, "needs a number high, got None", None),
        ("ttt.lr", {"low": True, "high": 2}, "needs a number low, got True", None),
        ("ttt.lr", {"low": 2.0, "high": 1.0}, "low 2.0 must be below high 1.0", None),
        ("ttt.lr", {"low": 0.1, "high": 1.0, "log": 1}, "log must be true or false, got 1", None),
        ("ttt.lr", {"low": 0.0, "high": 1.0, "log": True}, "log needs low above 0, got 0.0", None),
        ("ttt.lr", {"low": 0.1, "high": 1.0, "step": 0}, "step must be a number above 0", None),
        ("ttt.lr", {"low": 0.1, "high": 1.0, "step": 5.0}, "at most high - low, got 5.0", None),
        ("ttt.epochs", {"low": 1, "high": 3, "step": 0.5}, "takes whole numbers, and so must step", None),
        ("ttt.lr", {"low": 0.1, "high": 1.0, "log": True, "step": 0.1}, "cannot be combined", None),
        ("ttt.lr", {"low": 0.1, "high": float("nan")}, "must be finite", None),
        ("ttt.epochs", {"low": 1.5, "high": 3}, "must be of type int, got 1.5", None),
        ("ttt.momentum", {"low": 0.5, "high": 1.5}, "ttt.momentum must be in", None),
    ],
)
def test_a_bad_range_names_its_table_its_value_and_its_rule(knob, table, message, hint):
    with pytest.raises(ConfigError) as caught:
        parse_range(knob, table, SMOKE)
    assert message in str(caught.value)
    assert hint is None or hint in caught.value.hint
