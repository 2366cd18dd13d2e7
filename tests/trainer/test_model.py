import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from benchmarks.plain import PlainNetwork
from tests.trainer.tiny import CONFIG, LENGTH, random_model, random_tokens
from trainer.attention import rotary_tables
from trainer.config import Config
from trainer.kernels import normalize
from trainer.model import HEAD, Model
from trainer.optim import parameter_groups

TECHNIQUES_OFF = {
    "qk_norm": False, "qk_gain": 0.0, "xsa_layers": 0, "value_embedding_dim": 0, "ln_scale": False, "residual_mix": False,
    "skips": "off", "logit_softcap": 0.0, "recurrence_passes": 0, "parallel_start_layer": -1, "leaky_slope": 0.0, "rope_dims": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def pr1326():
    with torch.device("meta"):
        return Model(Config().model, train_length=2048)


def test_pr1326_has_the_published_number_of_parameters(pr1326):
    assert sum(parameter.numel() for parameter in pr1326.parameters()) == 34_401_372


def test_pr1326_runs_the_published_layer_orders(pr1326):
    assert pr1326.layer_order(False) == list(range(11))
    assert pr1326.layer_order(True) == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10]


def test_pr1326_has_66_quantised_matrices_and_67_for_muon(pr1326):
    groups = parameter_groups(pr1326)
    assert len(list(pr1326.matrices())) == 66
    assert {name: len(group) for name, group in groups.items()} == {
        "matrix": 67,
        "embedding": 2,
        "head": 0,
        "scalar": 49,
    }


def test_every_parameter_is_in_exactly_one_group():
    model = random_model(tie_embeddings=False)
    grouped = [id(parameter) for group in parameter_groups(model).values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert len(set(grouped)) == len(grouped)


def test_starts_are_those_of_1218():
    torch.manual_seed(0)
    model = Model(Config().model, train_length=2048)
    block = model.blocks[3]
    assert block.attention.out.weight.abs().max() == block.mlp.down.weight.abs().max() == 0
    query = block.attention.query.weight
    torch.testing.assert_close(query @ query.T, torch.eye(512), atol=1e-5, rtol=0)
    projection = model.value_embedding.projection.weight
    torch.testing.assert_close(projection.T @ projection, torch.eye(128), atol=1e-5, rtol=0)
    assert model.embedding.weight.std().item() == pytest.approx(0.005, rel=0.01)
    assert block.attention.gain.tolist() == [5.0] * 8
    assert block.mix.tolist() == [[1.0] * 512, [0.0] * 512]
    assert model.lane_merge.item() == 0.5
    assert block.input_scale == pytest.approx(1 / math.sqrt(4))
    loss = model(random_tokens(length=8), random_tokens(length=8, seed=1), False)
    assert loss.item() == pytest.approx(math.log(4096), abs=0.1)


@pytest.mark.parametrize("recurrent", [False, True])
def test_no_position_depends_on_a_later_token_by_gradients(recurrent):
    model = random_model()
    embedded = []
    model.embedding.register_forward_hook(lambda _m, _i, out: embedded.append(out.requires_grad_()) or out)
    tables = model.value_embedding.table
    tables.register_forward_hook(lambda _m, _i, out: embedded.append(out.requires_grad_()) or out)
    hidden = model.hidden(random_tokens(rows=1), recurrent)
    for position in (0, 5, LENGTH - 2):
        for grad in torch.autograd.grad(hidden[0, position].square().sum(), embedded, retain_graph=True):
            assert grad[0, : position + 1].abs().sum() > 0
            assert grad[0, position + 1 :].abs().max() == 0


@pytest.mark.parametrize("recurrent", [False, True])
def test_no_score_depends_on_its_target_or_a_later_token_by_perturbation(recurrent):
    model, tokens = random_model(), random_tokens(rows=1, length=LENGTH + 1)
    before = model.nats(tokens[:, :-1], tokens[:, 1:], recurrent=recurrent, scored=LENGTH)
    changed = tokens.clone()
    changed[0, 9:] = (changed[0, 9:] + 7) % CONFIG.model.vocab_size
    after = model.nats(changed[:, :-1], changed[:, 1:], recurrent=recurrent, scored=LENGTH)
    assert torch.equal(before[0, :8], after[0, :8])  # positions 0 ... 7 predict tokens 1 ... 8, which did not change
    assert not torch.equal(before[0, 8:], after[0, 8:])


def test_recurrence_equals_the_same_network_written_out():
    model = random_model()
    tokens = random_tokens()
    # By hand: layers 0 1 2 | 3 2 3 4 5 has 8 steps, so the halves are 4 and 4; three skips in reverse order.
    order = [0, 1, 2, 3, 2, 3, 4, 5]
    assert model.layer_order(True) == order
    rotary = rotary_tables(LENGTH, CONFIG.model, train_length=LENGTH, device=tokens.device)
    x = x0 = normalize(model.embedding(tokens))
    tables = model.value_embedding
    values = {
        layer: tables.projection(tables.table(tokens)) * tables.scale * tables.layer_scales[i]
        for i, layer in enumerate(CONFIG.model.value_embedding_layers)
    }

    def attend(layer, x):
        block = model.blocks[layer]
        attention = block.attention
        x = block.mix[0] * x + block.mix[1] * x0
        matrices = torch.cat((attention.query.weight, attention.key.weight, attention.value.weight))
        y = attention(normalize(x) * block.input_scale, matrices, rotary, values.get(layer), scored=LENGTH)
        return x + block.attention_scale * attention.out(y)

    def think(layer, x):
        block = model.blocks[layer]
        hidden = F.leaky_relu(block.mlp.up(normalize(x) * block.input_scale), CONFIG.model.leaky_slope).square()
        return x + block.mlp_scale * block.mlp.down(hidden)

    states = []
    for layer in order[:4]:
        x = think(layer, attend(layer, x))
        states.append(x)

    def fused(x, index):
        gate = torch.sigmoid(model.skip_gates[index])
        return gate * x + (1 - gate) * model.skip_weights[index] * states[3 - index]

    for index, layer in enumerate((2, 3)):
        x = think(layer, attend(layer, fused(x, index)))
    lane0 = lane1 = fused(x, 2)  # the split at layer 4
    for layer in (4, 5):
        lane0, lane1 = attend(layer, lane0), think(layer, lane1)
    merged = model.lane_merge * lane0 + (1 - model.lane_merge) * lane1
    torch.testing.assert_close(model.hidden(tokens, True), normalize(merged))  # products in another order


def test_without_extra_passes_recurrence_changes_nothing():
    model, tokens = random_model(recurrence_passes=0), random_tokens()
    assert torch.equal(model.hidden(tokens, True), model.hidden(tokens, False))


def test_lanes_do_not_hear_each_other_until_they_merge():
    model, tokens = random_model(), random_tokens()
    with torch.no_grad():
        model.lane_merge.fill_(1.0)  # only the attention lane is heard
    before = model.hidden(tokens, False)
    with torch.no_grad():
        for block in model.blocks[4:]:
            block.mlp.down.weight.mul_(3)
    assert torch.equal(model.hidden(tokens, False), before)


@pytest.mark.parametrize("is_used", [False, True])
def test_a_skip_behind_the_lane_split_is_left_out_unless_it_is_asked_for(is_used):
    model, tokens = random_model(parallel_start_layer=3, lane_skips=is_used), random_tokens()
    before = model.hidden(tokens, False)
    with torch.no_grad():
        model.skip_weights[2] += 1.0  # lands on layer 5
    assert torch.equal(model.hidden(tokens, False), before) is not is_used


@pytest.mark.parametrize(("knob", "value"), TECHNIQUES_OFF.items())
def test_each_technique_can_be_switched_off_and_matters(knob, value):
    tokens = random_tokens()
    on, off = random_model(), random_model(**{knob: value})
    off.load_state_dict(on.state_dict(), strict=False)
    logits = [model.logits(model.hidden(tokens, True)) for model in (on, off)]
    assert not torch.allclose(*logits)


def test_with_everything_off_the_model_still_learns_nothing_from_the_future():
    model = random_model(**TECHNIQUES_OFF)
    tokens = random_tokens(rows=1)
    changed = tokens.clone()
    changed[0, 10:] = 0
    assert torch.equal(model.hidden(tokens, False)[0, :10], model.hidden(changed, False)[0, :10])


def test_scores_are_a_full_normalised_distribution_under_the_soft_cap():
    model = random_model()
    logits = model.logits(model.hidden(random_tokens(), False))
    assert logits.dtype == torch.float32
    assert logits.abs().max() <= CONFIG.model.logit_softcap
    torch.testing.assert_close(logits.softmax(-1).sum(-1), torch.ones(2, LENGTH))


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("lanes_from", [-1, 0, 4, 5])
@pytest.mark.parametrize("changes", [{}, {"skips": "off", "residual_mix": False}, {"tie_embeddings": False}])
def test_scoring_the_last_positions_alone_gives_the_same_nats(recurrent, lanes_from, changes):
    model = random_model(parallel_start_layer=lanes_from, **changes)
    tokens = random_tokens(length=LENGTH + 1)
    everything = model.nats(tokens[:, :-1], tokens[:, 1:], recurrent=recurrent, scored=LENGTH)
    for scored in (1, 3, LENGTH - 1):
        last = model.nats(tokens[:, :-1], tokens[:, 1:], recurrent=recurrent, scored=scored)
        torch.testing.assert_close(last, everything[:, -scored:])  # products of fewer rows
    torch.testing.assert_close(everything.mean(), model(tokens[:, :-1], tokens[:, 1:], recurrent))


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize(("lanes_from", "lane_skips"), [(-1, True), (3, True), (3, False)])
def test_loss_and_gradients_are_those_of_the_network_written_plainly(recurrent, lanes_from, lane_skips):
    model, reference = (random_model(parallel_start_layer=lanes_from, lane_skips=lane_skips) for _ in range(2))
    tokens = random_tokens(rows=3, length=LENGTH + 1)
    tables = rotary_tables(LENGTH, model.config, train_length=LENGTH, device=tokens.device)
    loss = model(tokens[:, :-1], tokens[:, 1:], recurrent)
    plain = PlainNetwork(reference)(tokens[:, :-1], tokens[:, 1:], *tables, recurrent)
    loss.backward()
    plain.backward()
    torch.testing.assert_close(loss, plain)
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        # Sums over all positions in another order: 1e-5 of the gradient's own size.
        if other.grad is None:
            assert parameter.grad is None and not lane_skips and name.startswith("skip_"), name  # all of them left out
        else:
            assert (parameter.grad - other.grad).norm() <= 1e-5 * other.grad.norm() + 1e-8, name


def test_calibration_hears_every_quantised_matrix_once_each_time_it_is_used():
    model, heard = random_model(), Counter()
    model.hidden(random_tokens(), True, observe=lambda name, _inputs: heard.update([name]))
    times = Counter(model.layer_order(True))
    blocks = {shared: times[int(shared.split(".")[1])] for _, _, shared in model.matrices()}
    assert heard == {HEAD: 1, **blocks}


def test_listening_changes_nothing():
    model, tokens = random_model(), random_tokens()
    assert torch.equal(model.hidden(tokens, True, observe=lambda _name, _inputs: None), model.hidden(tokens, True))
