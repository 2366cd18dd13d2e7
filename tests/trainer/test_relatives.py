"""The techniques of #1326's relatives in the network, each against the same written plainly."""

import pytest
import torch
import torch.nn.functional as F

from orchestrator.presets import load_preset
from tests.trainer.tiny import CONFIG, LENGTH, random_model, random_tokens
from trainer.attention import rotary_tables
from trainer.config import ConfigError, EvaluationConfig, with_knobs
from trainer.kernels import normalize
from trainer.model import BIGRAM_SCALE, ROUTED_RESIDUAL, Model, begin_passes
from trainer.optim import parameter_groups
from trainer.slot import Slot

RELATIVES = {
    "stream": {"parallel": "stream"},
    "routed": {"parallel": "routed"},
    "routed_all": {"parallel": "routed", "parallel_start_layer": 0},
    "untied": {"untied_mlps": True},
    "twice": {"recurrence_passes": 2, "skip_count": 4},
    "bigrams": {"bigram_buckets": 50, "bigram_dim": 8, "smear": True},
    "no_attention": {"first_attention_layer": 2},
    "all": {
        "parallel": "routed", "untied_mlps": True, "bigram_buckets": 50, "bigram_dim": 8, "smear": True,
        "first_attention_layer": 1, "skip_count": 4,
    },
}  # fmt: skip


def nats(model, tokens, passes, scored=LENGTH):
    return model.nats(tokens[:, :-1], tokens[:, 1:], recurrent=passes, scored=scored)


@pytest.mark.parametrize("knobs", RELATIVES.values(), ids=list(RELATIVES))
@pytest.mark.parametrize("passes", [0, 1])
def test_scoring_the_last_positions_alone_gives_the_same_nats(knobs, passes):
    model, tokens = random_model(**knobs), random_tokens(length=LENGTH + 1)
    everything = nats(model, tokens, passes)
    for scored in (1, 3, LENGTH - 1):
        torch.testing.assert_close(nats(model, tokens, passes, scored), everything[:, -scored:])


@pytest.mark.parametrize("knobs", RELATIVES.values(), ids=list(RELATIVES))
def test_no_score_depends_on_its_target_or_a_later_token(knobs):
    model, tokens = random_model(**knobs), random_tokens(rows=1, length=LENGTH + 1)
    before, changed = nats(model, tokens, 1), tokens.clone()
    changed[0, 9:] = (changed[0, 9:] + 7) % CONFIG.model.vocab_size
    after = nats(model, changed, 1)
    assert torch.equal(before[0, :8], after[0, :8]) and not torch.equal(before[0, 8:], after[0, 8:])


@pytest.mark.parametrize("knobs", RELATIVES.values(), ids=list(RELATIVES))
def test_every_weight_is_in_one_group_and_learns_unless_nothing_uses_it(knobs):
    model, tokens = random_model(**knobs), random_tokens(length=LENGTH + 1)
    grouped = [id(parameter) for group in parameter_groups(model).values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    nats(model, tokens, model.config.recurrence_passes).mean().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    dead = {f"blocks.{layer}.attention" for layer in range(model.config.first_attention_layer)}
    assert all(name.startswith((*dead, "blocks.0.attention_scale", "blocks.1.attention_scale")) for name in idle)
    assert bool(idle) == bool(dead)


def attend(model, layer, x, x0, rotary, values):
    block = model.blocks[layer]
    attention = block.attention
    mixed = block.mix[0] * x + block.mix[1] * x0
    matrices = torch.cat((attention.query.weight, attention.key.weight, attention.value.weight))
    inputs = normalize(mixed) * block.input_scale
    y = attention(inputs, matrices, rotary, values.get(layer), scored=LENGTH)
    return mixed, inputs, block.attention_scale * attention.out(y)


def think(model, layer, inputs):
    block = model.blocks[layer]
    hidden = F.leaky_relu(block.mlp.up(inputs), CONFIG.model.leaky_slope).square()
    return block.mlp_scale * block.mlp.down(hidden)


def start(model, tokens):
    rotary = rotary_tables(LENGTH, CONFIG.model, train_length=LENGTH, device=tokens.device)
    return *model.enter(tokens), rotary


def test_in_one_stream_attention_and_mlp_read_the_same_and_are_added():
    model = random_model(parallel="stream", parallel_start_layer=0, skips="off")
    tokens = random_tokens()
    x0, values, rotary = start(model, tokens)
    x = x0
    for layer in range(6):
        mixed, inputs, attended = attend(model, layer, x, x0, rotary, values)
        x = mixed + attended + think(model, layer, inputs)
    torch.testing.assert_close(model.hidden(tokens, 0), normalize(x))
    assert model.lane_merge is None


def test_routed_lanes_read_one_each_and_write_into_both():
    model = random_model(parallel="routed", parallel_start_layer=3, skips="gated")
    tokens = random_tokens()
    x0, values, rotary = start(model, tokens)
    x, states = x0, []
    for layer in range(3):
        x, _, attended = attend(model, layer, x, x0, rotary, values)
        x = x + attended
        x = x + think(model, layer, normalize(x) * model.blocks[layer].input_scale)
        states.append(x)
    lanes = [x, x]
    for layer in range(3, 6):
        gate, weight = torch.sigmoid(model.skip_gates[layer - 3]), model.skip_weights[layer - 3]
        lanes = [gate * lane + (1 - gate) * weight * states[-1] for lane in lanes]
        states.pop()
        block = model.blocks[layer]
        _, _, written = attend(model, layer, lanes[0], x0, rotary, values)
        lanes = [block.residuals[0] * lane + block.routes[0, i] * written for i, lane in enumerate(lanes)]
        read = block.mix[0] * lanes[1] + block.mix[1] * x0
        written = think(model, layer, normalize(read) * block.input_scale)
        lanes = [block.residuals[1] * lane + block.routes[1, i] * written for i, lane in enumerate(lanes)]
    torch.testing.assert_close(model.hidden(tokens, 0), normalize((lanes[0] + lanes[1]) / 2))


def test_routes_begin_open_and_cost_six_numbers_a_layer():
    model = Model(with_knobs(CONFIG, {"model.parallel": "routed"}).model, train_length=LENGTH)
    routed = [block for block in model.blocks if hasattr(block, "routes")]
    assert [block.layer for block in routed] == [4, 5]
    assert routed[0].routes.tolist() == [[1, 1], [1, 1]]
    assert routed[0].residuals.tolist() == pytest.approx([ROUTED_RESIDUAL] * 2)


def test_the_extra_pass_s_own_mlps_begin_as_those_beside_them_and_go_their_own_way():
    tied, untied, tokens = random_model(), random_model(untied_mlps=True), random_tokens()
    untied.load_state_dict(tied.state_dict(), strict=False)
    assert torch.equal(untied.hidden(tokens, 0), tied.hidden(tokens, 0))
    begin_passes(untied)
    assert torch.equal(untied.hidden(tokens, 1), tied.hidden(tokens, 1))
    with torch.no_grad():
        untied.repeats[0].down.weight.mul_(2)
    assert torch.equal(untied.hidden(tokens, 0), tied.hidden(tokens, 0))
    assert not torch.allclose(untied.hidden(tokens, 1), tied.hidden(tokens, 1))


def test_calibration_hears_the_extra_pass_s_own_mlps_under_their_names():
    model, heard = random_model(untied_mlps=True), []
    model.hidden(random_tokens(), 1, observe=lambda name, _: heard.append(name))
    shared = {place for _, _, place in model.matrices()}
    assert set(heard) - {"head"} == shared and "repeats.1.down" in shared
    assert heard.count("blocks.2.mlp.up") == 1 and heard.count("blocks.2.attention.query") == 2


def test_a_pair_of_tokens_adds_the_row_of_its_hash_and_the_first_token_the_last_row():
    model = random_model(bigram_buckets=11, bigram_dim=8)
    tokens = torch.tensor([[5, 7, 5]])
    pairs, most = model.bigrams, 10
    rows = [most, (36313 * 7 ^ 27191 * 5) % most, (36313 * 5 ^ 27191 * 7) % most]
    expected = pairs.scale * pairs.table.weight[rows] @ pairs.widen.weight.T
    torch.testing.assert_close(pairs(tokens)[0], expected)
    x, _ = model.enter(tokens)
    torch.testing.assert_close(x, normalize(model.embedding(tokens) + pairs(tokens)))


def test_pairs_of_tokens_begin_without_effect_and_can_learn():
    torch.manual_seed(0)
    model = Model(with_knobs(CONFIG, {"model.bigram_buckets": 11, "model.bigram_dim": 8}).model, train_length=LENGTH)
    pairs = model.bigrams
    assert pairs(random_tokens()).abs().max() == 0 and pairs.scale.item() == pytest.approx(BIGRAM_SCALE)
    pairs(random_tokens()).sum().backward()
    assert pairs.table.weight.grad.abs().max() > 0


def test_a_smeared_embedding_holds_a_part_of_the_one_before():
    model, tokens = random_model(smear=True), random_tokens(rows=1)
    x, _ = model.enter(tokens)
    plain, gate = normalize(model.embedding(tokens)), torch.sigmoid(model.smear_gate)
    torch.testing.assert_close(x[:, 1:], (1 - gate) * plain[:, 1:] + gate * plain[:, :-1])
    torch.testing.assert_close(x[:, 0], (1 - gate) * plain[:, 0])


def test_layers_without_attention_see_their_own_position_alone():
    model = random_model(first_attention_layer=6)
    tokens = random_tokens(rows=1)
    changed = tokens.clone()
    changed[0, 3] = (tokens[0, 3] + 1) % CONFIG.model.vocab_size
    before, after = model.hidden(tokens, 1)[0], model.hidden(changed, 1)[0]
    same = (before == after).all(-1)
    assert same.sum() == LENGTH - 1 and not same[3]


def test_more_skips_than_states_are_left_unused():
    few, many = random_model(), random_model(skip_count=7)
    weights = {**many.state_dict(), **{n: w for n, w in few.state_dict().items() if "skip" not in n}}
    weights["skip_weights"][:3], weights["skip_gates"][:3] = few.skip_weights, few.skip_gates
    many.load_state_dict(weights)
    assert torch.equal(many.hidden(random_tokens(), 0), few.hidden(random_tokens(), 0))
    assert not torch.allclose(many.hidden(random_tokens(), 1), few.hidden(random_tokens(), 1))  # a fourth state


def test_a_second_extra_pass_with_mlps_of_its_own_is_refused():
    with pytest.raises(ConfigError, match="untied_mlps needs recurrence_passes 1, got 2"):
        random_model(untied_mlps=True, recurrence_passes=2)


# ---- SLOT ----------------------------------------------------------------------------------------------------------


def test_slot_fits_its_vector_to_the_context_alone():
    model, tokens = random_model(), random_tokens(rows=3, length=LENGTH + 1)
    slot = Slot(model, EvaluationConfig(slot_steps=8, slot_lr=0.05))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    plain = model.nats(inputs, targets, recurrent=1, scored=LENGTH)
    assert torch.equal(slot(inputs, targets, recurrent=1, scored=LENGTH), plain)  # no context, nothing to fit
    with torch.no_grad():
        fitted = slot(inputs, targets, recurrent=1, scored=4)
        others = targets.clone()
        others[:, -4:] = (others[:, -4:] + 1) % CONFIG.model.vocab_size
        again = slot(inputs, others, recurrent=1, scored=4)
    assert not torch.allclose(fitted, plain[:, -4:])
    same = slot(inputs, others, recurrent=1, scored=4)
    assert torch.equal(again, same)  # each call begins at zero
    assert all(parameter.grad is None for parameter in model.parameters())


def test_slot_without_steps_is_the_plain_score():
    model, tokens = random_model(), random_tokens(length=LENGTH + 1)
    slot = Slot(model, EvaluationConfig(slot_steps=0))
    expected = model.nats(tokens[:, :-1], tokens[:, 1:], recurrent=0, scored=4)
    torch.testing.assert_close(slot(tokens[:, :-1], tokens[:, 1:], recurrent=0, scored=4), expected)


def test_slot_and_test_time_training_exclude_one_another():
    with pytest.raises(ConfigError, match="slot_steps 8 changes the score") as caught:
        with_knobs(load_preset("smoke"), {"evaluation.slot_steps": 8})
    assert caught.value.hint == 'set ttt.method to "off"'


def test_coarser_matrices_without_gptq_are_refused():
    with pytest.raises(ConfigError, match="goes by what GPTQ measures"):
        with_knobs(load_preset("smoke"), {"quant.coarse_matrices": 2, "quant.method": "rtn"})
