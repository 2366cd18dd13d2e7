import dataclasses

import pytest
import torch

from tests.trainer.tiny import LENGTH, random_model, random_tokens
from trainer.config import LORA_TARGETS, TTTConfig
from trainer.lora import LoRA

EVERY = TTTConfig(method="lora", lora_rank=3, lora_targets=LORA_TARGETS, lora_scale=0.7)
MATRICES = {
    "q": "attention.query",
    "k": "attention.key",
    "v": "attention.value",
    "out": "attention.out",
    "up": "mlp.up",
}
MATRICES["down"] = "mlp.down"
ROUNDING = {"atol": 2e-5, "rtol": 1e-4}  # float32 products in another order, through six layers


def with_adapters(model, config=EVERY, *, adapters=1, recurrent=True, noise=0.0):
    """The model with adapters in it, whose B are random where there is noise."""
    order = model.layer_order(recurrent)
    model.lora = LoRA(model.config, order, config, adapters=adapters, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, b in (pair for pair, _ in model.lora.starts):
            b += noise * torch.randn(b.shape, generator=generator)
    return model


def nats(model, *, recurrent=True, scored=LENGTH, tokens=None):
    tokens = random_tokens(length=LENGTH + 1) if tokens is None else tokens
    with torch.no_grad():
        return model.nats(tokens[:, :-1], tokens[:, 1:], recurrent=recurrent, scored=scored)


@pytest.mark.parametrize("targets", [LORA_TARGETS, ("q", "v"), ("q", "k", "v", "out", "mlp", "head")])
@pytest.mark.parametrize("adapters", [1, 2])
def test_fresh_adapters_change_nothing(targets, adapters):
    config = dataclasses.replace(EVERY, lora_targets=targets)
    torch.testing.assert_close(nats(with_adapters(random_model(), config, adapters=adapters)), nats(random_model()))


@pytest.mark.parametrize("scored", [LENGTH, 4])
@pytest.mark.parametrize("target", [*MATRICES, "head"])
def test_an_adapter_is_a_low_rank_change_of_its_matrix(target, scored):
    knobs = {"tie_embeddings": False, "recurrence_layers": ()}
    adapted = with_adapters(
        random_model(**knobs), dataclasses.replace(EVERY, lora_targets=(target,)), recurrent=False, noise=0.2
    )
    changed = random_model(**knobs)
    for layer, terms in enumerate([adapted.lora.head] if target == "head" else adapted.lora.layers):
        a, b = (matrix.detach()[0] for matrix in terms.pairs[target])
        linear = changed.head if target == "head" else changed.blocks[layer].get_submodule(MATRICES[target])
        linear.weight.data += 0.7 * b @ a
    before = nats(random_model(**knobs), recurrent=False, scored=scored)
    found, expected = (nats(model, recurrent=False, scored=scored) for model in (adapted, changed))
    torch.testing.assert_close(found, expected, **ROUNDING)
    assert (found - before).abs().max() > 100 * ROUNDING["atol"]


def test_a_tied_head_is_adapted_and_the_embedding_is_not():
    model = with_adapters(random_model(), dataclasses.replace(EVERY, lora_targets=("head",)), noise=0.3)
    tokens = random_tokens()
    torch.testing.assert_close(model.hidden(tokens, True), random_model().hidden(tokens, True))
    a, b = (matrix.detach()[0] for matrix in model.lora.head.pairs["head"])
    hidden = model.hidden(tokens, True)
    changed = torch.nn.functional.linear(hidden, model.embedding.weight + 0.7 * b @ a)
    cap = model.config.logit_softcap
    torch.testing.assert_close(model.logits(hidden), cap * torch.tanh(changed / cap), **ROUNDING)


def test_mlp_is_a_term_beside_the_whole_mlp():
    knobs = {"recurrence_layers": (), "parallel_start_layer": -1}
    model = with_adapters(
        random_model(**knobs), dataclasses.replace(EVERY, lora_targets=("mlp",)), recurrent=False, noise=0.3
    )
    for terms in model.lora.layers[:-1]:
        terms.pairs["mlp"][1].data.zero_()  # only the last block's
    heard, plain = {}, random_model(**knobs)
    block = plain.blocks[-1]
    with torch.no_grad():
        plain.hidden(random_tokens(), False, observe=lambda name, value: heard.update({name: value}))
        inputs, hidden = heard[f"blocks.{block.layer}.mlp.up"], heard[f"blocks.{block.layer}.mlp.down"]
        a, b = (matrix[0] for matrix in model.lora.layers[-1].pairs["mlp"])
        written = torch.nn.functional.linear(hidden, block.mlp_scale[:, None] * block.mlp.down.weight)
        added = block.mlp_scale * 0.7 * (inputs @ a.T @ b.T)
        outputs = []
        for one in (plain, model):
            one.blocks[-1].register_forward_hook(lambda _m, _i, output: outputs.append(output[0]))
            one.hidden(random_tokens(), False)
    assert written.abs().max() > 0.01
    torch.testing.assert_close(outputs[1] - outputs[0], added, **ROUNDING)


@pytest.mark.parametrize("scored", [LENGTH, 5])
def test_each_row_of_a_batch_has_its_own_adapter(scored):
    tokens = random_tokens(rows=3, length=LENGTH + 1)
    together = with_adapters(random_model(), adapters=3, noise=0.3)
    found = nats(together, tokens=tokens, scored=scored)
    for row in range(3):
        alone = with_adapters(random_model())
        for mine, whole in zip(alone.lora.parameters, together.lora.parameters, strict=True):
            mine.data.copy_(whole.data[row : row + 1])
        torch.testing.assert_close(
            found[row : row + 1], nats(alone, tokens=tokens[row : row + 1], scored=scored), **ROUNDING
        )


def test_a_row_s_loss_gives_no_gradient_to_another_row_s_adapter():
    model, tokens = with_adapters(random_model(), adapters=3, noise=0.3), random_tokens(rows=3, length=LENGTH + 1)
    model.nats(tokens[:, :-1], tokens[:, 1:], recurrent=True, scored=LENGTH)[1].sum().backward()
    for parameter in model.lora.parameters:
        assert parameter.grad[1].abs().max() > 0
        assert parameter.grad[[0, 2]].abs().max() == 0


def test_a_layer_that_is_run_twice_has_two_adapters_and_a_frozen_one_none():
    model = with_adapters(random_model(), dataclasses.replace(EVERY, frozen_blocks=3))
    order = model.layer_order(True)
    assert order == [0, 1, 2, 3, 2, 3, 4, 5]
    assert [bool(terms.pairs) for terms in model.lora.layers] == [layer >= 3 for layer in order]
    twice = [terms.pairs["q"][0] for terms, layer in zip(model.lora.layers, order, strict=True) if layer == 3]
    assert len(twice) == 2 and twice[0] is not twice[1]


def test_adapters_start_alike_by_the_seed_and_go_back_there_at_the_same_addresses():
    model = with_adapters(random_model(), adapters=2)
    starts = [parameter.detach().clone() for parameter in model.lora.parameters]
    a, b = model.lora.layers[0].pairs["down"]
    bound = model.config.hidden**-0.5
    assert torch.equal(a[0], a[1]) and 0.8 * bound < a.abs().max() <= bound and b.abs().max() == 0
    addresses = [parameter.data_ptr() for parameter in model.lora.parameters]
    with torch.no_grad():
        for parameter in model.lora.parameters:
            parameter += 1
    model.lora.reset()
    assert [parameter.data_ptr() for parameter in model.lora.parameters] == addresses
    for parameter, start in zip(model.lora.parameters, starts, strict=True):
        assert torch.equal(parameter, start)
    other = with_adapters(random_model(), dataclasses.replace(EVERY, lora_seed=1))
    assert not torch.equal(other.lora.parameters[0][:1], starts[0][:1])


def test_adapters_are_no_part_of_the_stored_weights():
    plain, adapted = random_model(), with_adapters(random_model())
    assert adapted.state_dict().keys() == plain.state_dict().keys()
    assert sum(p.numel() for p in adapted.parameters()) == sum(p.numel() for p in plain.parameters())
