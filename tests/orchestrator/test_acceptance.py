import pytest

from orchestrator.acceptance import objections
from orchestrator.presets import load_preset
from trainer.config import Config, with_knobs


@pytest.mark.parametrize("preset", ["pr1326", "pr549", "smoke"])
def test_nothing_is_said_against_what_is_accepted(preset):
    assert not list(objections(load_preset(preset)))


def test_each_refused_technique_is_named_with_its_value_and_its_reason():
    (slot,) = objections(load_preset("pr1217"))
    assert "evaluation.slot_steps = 8 is not accepted" in slot and "#1336" in slot
    (before,) = objections(with_knobs(Config(), {"ttt.before_quantization": True}))
    assert "ttt.before_quantization = True is not accepted" in before and "condition 3" in before
