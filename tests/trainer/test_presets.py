"""The shipped presets: what they are, by the numbers that are published of them. That each can be run from its bundle is in
tests/end_to_end/test_presets.py.
"""

import re

import pytest
import torch

from orchestrator.home import SHIPPED_STUDIES
from orchestrator.presets import load_preset, not_accepted
from tests.trainer.make_data import VOCAB_SIZE
from tests.trainer.published import FACTS
from tests.trainer.tiny import ALONE
from trainer.config import knob_value, with_knobs
from trainer.model import Model, begin_passes
from trainer.optim import Optimizers, parameter_groups
from trainer.train import Network, depths, random_batch

FOLDER = SHIPPED_STUDIES / "presets"
NAMES = sorted(path.stem for path in FOLDER.glob("pr*.toml") if path.stem != "pr1326-fisher")


@pytest.fixture(scope="module", params=NAMES)
def preset(request):
    return request.param, load_preset(request.param)


def test_there_is_a_preset_for_every_system_that_1326_builds_on_or_is_compared_with():
    assert sorted(FACTS) == NAMES


def test_each_says_what_is_exact_approximated_and_unknown(preset):
    text = (FOLDER / f"{preset[0]}.toml").read_text()
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert comments.startswith(f"# PR openai/parameter-golf#{preset[0].removeprefix('pr')}: ")
    for word in ("Exact", "Approximated", "Unknown"):
        assert re.search(rf"^# {word}: \S", comments, re.MULTILINE), word


def test_each_has_the_published_parameters_layers_and_groups(preset, monkeypatch):
    name, config = preset
    monkeypatch.setattr(Model, "_initialize", lambda _: None)  # only shapes matter
    model = Model(config.model, train_length=2048)
    parameters, order = FACTS[name]
    assert parameters in (None, sum(parameter.numel() for parameter in model.parameters()))
    assert model.layer_order(depths(config)[-1]) == order
    groups = {group: len(members) for group, members in parameter_groups(model).items()}
    tables = 1 + (config.model.value_embedding_dim > 0) + (config.model.bigram_buckets > 0)
    assert groups["embedding"] == tables and groups["head"] == 0
    blocks = 6 * config.model.layers + 2 * len(config.model.recurrence_layers) * config.model.untied_mlps
    assert len(list(model.matrices())) == blocks
    assert groups["matrix"] == blocks + tables - 1  # the projections of the smaller tables


TINY = {
    "model.vocab_size": VOCAB_SIZE, "model.width": 64, "model.rope_dims": 4, "model.value_embedding_dim": 8,
    "model.bigram_buckets": 50, "model.bigram_dim": 8, "data.sequence_length": 16, "data.tokens_per_step": 64,
}  # fmt: skip


def tiny(config):
    """The same techniques, small; what is off stays off."""
    return with_knobs(config, {knob: value for knob, value in TINY.items() if knob_value(config, knob)})


def test_a_step_at_each_depth_moves_every_weight_that_is_used_and_lowers_the_loss(preset):
    config = tiny(preset[1])
    torch.manual_seed(0)
    model = Model(config.model, train_length=config.data.sequence_length)
    network = Network(model, config, ALONE)
    optimizers = Optimizers(model, config.optim, ALONE, network.gradients)
    batch, losses = random_batch(config, ALONE), []
    for passes in depths(config):
        if passes and config.model.untied_mlps:
            begin_passes(model)
        for _ in range(20):
            losses.append(network.backward(batch, passes).item())
            optimizers.step(lr_scale=1.0, momentum=config.optim.muon_momentum)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert losses[-1] < 0.9 * losses[0]


def test_slot_alone_is_not_accepted():
    assert {name for name in NAMES if not_accepted(name)} == {"pr1217"}
    assert {name for name in NAMES if load_preset(name).evaluation.slot_steps} == {"pr1217"}
    assert "SLOT" in not_accepted("pr1217")
