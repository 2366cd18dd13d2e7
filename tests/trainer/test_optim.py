import math

import pytest
import torch

from tests.trainer.tiny import ALONE, random_model, random_tokens
from trainer.config import OptimConfig
from trainer.distributed import World
from trainer.optim import CLIP_EPS, Gradients, Optimizers, WeightAverage, by_shape, gradients_of, parameter_groups

CLIP = 0.5


def filled(world):
    """A model with gradients that add up to the same over one process and over two."""
    model = random_model()
    gradients = gradients_of(model, OptimConfig(), world)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parts = torch.randn((2, *parameter.shape), generator=generator)
        parameter.grad.copy_(parts.sum(0) if world.size == 1 else parts[world.rank])
    return model, gradients


def clipped(world, clip_norm):
    """Squared norm of this process's share of the matrices, and the other gradients, after clipping."""
    _, gradients = filled(world)
    shares = gradients.summed(clip_norm)
    return sum(share.square().sum().item() for share in shares), gradients.others.tolist()


def stepped(world, clip_norm):
    """All weights after three equal steps."""
    config = OptimConfig(grad_clip_norm=clip_norm)
    model, gradients = filled(world)
    optimizers = Optimizers(model, config, world, gradients)
    kept = gradients.all.clone()
    for _ in range(3):
        optimizers.step(lr_scale=0.5, momentum=0.9)
        assert gradients.all.abs().max() == 0
        gradients.all.copy_(kept)
    return [parameter.tolist() for parameter in model.parameters()]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_gradient_is_a_view_of_one_place_in_the_buffer(size):
    model = random_model()
    gradients = gradients_of(model, OptimConfig(), World(rank=0, size=size, device=ALONE.device))
    gradients.all.copy_(torch.arange(gradients.all.numel()))
    places = [int(place) for p in model.parameters() for place in p.grad.flatten().tolist()]
    assert len(set(places)) == len(places) == sum(p.numel() for p in model.parameters())
    shapes = by_shape(parameter_groups(model)["matrix"])
    padding = sum((-len(members) % size) * members[0].numel() for members in shapes)
    assert gradients.all.numel() == len(places) + padding
    assert all(len(stack) % size == 0 for stack in gradients.stacks)


def test_a_backward_pass_adds_to_the_buffer_in_place():
    model, tokens = random_model(), random_tokens(length=17)
    gradients = gradients_of(model, OptimConfig(), ALONE)
    addresses = [p.grad.data_ptr() for p in model.parameters()]
    model(tokens[:, :-1], tokens[:, 1:], True).backward()
    once = gradients.all.clone()
    model(tokens[:, :-1], tokens[:, 1:], True).backward()
    torch.testing.assert_close(gradients.all, 2 * once)
    assert [p.grad.data_ptr() for p in model.parameters()] == addresses
    assert once.norm() > 0


def test_clipping_brings_the_global_norm_to_its_limit():
    for scale in (1.0, 1e-6):
        _, gradients = filled(ALONE)
        gradients.all.mul_(scale)
        before = gradients.all.clone()
        gradients.summed(CLIP)
        expected = before * min(1.0, CLIP / (before.norm() + CLIP_EPS).item())
        torch.testing.assert_close(gradients.all, expected)


def test_without_a_limit_gradients_are_left_alone():
    _, gradients = filled(ALONE)
    before = gradients.all.clone()
    gradients.summed(0.0)
    assert torch.equal(gradients.all, before)


@pytest.mark.parametrize("clip_norm", [0.0, CLIP])
def test_two_processes_clip_what_both_have_by_the_norm_of_all(pair, clip_norm):
    square, others = clipped(ALONE, clip_norm)
    (first, others_first), (second, others_second) = pair(clipped, clip_norm)
    assert first + second == pytest.approx(square, rel=1e-5)  # a sum in another order
    assert others_first == others_second == pytest.approx(others, rel=1e-5, abs=1e-9)
    if clip_norm:
        assert math.sqrt(first + second + sum(x * x for x in others)) == pytest.approx(clip_norm, rel=1e-4)


def test_two_processes_take_the_step_of_one(pair):
    alone = stepped(ALONE, CLIP)
    first, second = pair(stepped, CLIP)
    assert first == second
    before = random_model()
    for (name, parameter), one, two in zip(before.named_parameters(), alone, first, strict=True):
        moved, other = (torch.tensor(x) - parameter.detach() for x in (one, two))
        # The norm is summed in another order: some values fall to the other side in bfloat16, 2^-9 apart.
        assert (moved - other).norm() <= 0.01 * moved.norm(), name


def test_shapes_keep_matrices_of_one_shape_together_and_each_once():
    matrices = parameter_groups(random_model())["matrix"]
    shapes = by_shape(matrices)
    assert all(len({m.shape for m in members}) == 1 for members in shapes)
    assert len({members[0].shape for members in shapes}) == len(shapes)
    assert sorted(id(m) for members in shapes for m in members) == sorted(id(m) for m in matrices)


def test_gradients_may_have_no_matrices_at_all():
    weight = torch.nn.Parameter(torch.zeros(3))
    gradients = Gradients([], [weight], ALONE)
    weight.grad.add_(2.0)
    assert gradients.summed(1.0) == []
    assert weight.grad.norm().item() == pytest.approx(1.0)


def test_each_group_moves_at_its_own_rate():
    config = OptimConfig(
        matrix_lr=0.0, embedding_lr=0.2, scalar_lr=0.1, head_lr=0.3, embedding_weight_decay=0.0, scalar_weight_decay=0.0
    )
    model = random_model(tie_embeddings=False)
    gradients = gradients_of(model, OptimConfig(), ALONE)
    before = [p.detach().clone() for p in model.parameters()]
    gradients.all.fill_(1e-3)
    Optimizers(model, config, ALONE, gradients).step(lr_scale=0.5, momentum=0.9)
    moves = {id(p): (b - p.detach()) for p, b in zip(model.parameters(), before, strict=True)}
    for group, lr in (("matrix", 0.0), ("embedding", 0.2), ("head", 0.3), ("scalar", 0.1)):
        for parameter in parameter_groups(model)[group]:  # AdamW's first step is the rate, whatever the gradient
            torch.testing.assert_close(moves[id(parameter)], torch.full_like(parameter, 0.5 * lr), atol=1e-5, rtol=1e-3)


def test_projections_of_tables_move_as_matrices_or_as_vectors():
    for projections, group in (("muon", "matrix"), ("adamw", "scalar")):
        config = OptimConfig(projections=projections, scalar_lr=0.1, scalar_weight_decay=0.0)
        model = random_model(bigram_buckets=50, bigram_dim=8)
        small = [model.bigrams.widen.weight, model.value_embedding.projection.weight]
        grouped = [id(parameter) for parameter in parameter_groups(model, projections)[group]]
        assert all(id(weight) in grouped for weight in small)
        gradients = gradients_of(model, config, ALONE)
        before = [weight.detach().clone() for weight in small]
        gradients.all.fill_(1e-3)
        Optimizers(model, config, ALONE, gradients).step(lr_scale=1.0, momentum=0.9)
        for weight, old in zip(small, before, strict=True):
            is_even = torch.allclose(old - weight, torch.full_like(weight, 0.1), atol=1e-5, rtol=1e-3)
            assert is_even == (projections == "adamw")  # AdamW's first step is the rate, whatever the gradient


def test_tables_in_bfloat16_move_as_torch_moves_a_table_that_is_stored_so():
    config = OptimConfig(embedding_precision="bfloat16", grad_clip_norm=0.0)
    model, gradients = filled(ALONE)
    tables = parameter_groups(model)["embedding"]
    with torch.no_grad():
        for table in tables:
            table.copy_(table.bfloat16())  # as it is after any step
    stored = [torch.nn.Parameter(table.detach().bfloat16()) for table in tables]
    optimizers = Optimizers(model, config, ALONE, gradients)
    reference = torch.optim.AdamW(
        stored, lr=config.embedding_lr, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps,
        weight_decay=config.embedding_weight_decay, fused=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for table, theirs in zip(tables, stored, strict=True):
            theirs.grad = torch.randn(table.shape, generator=generator).bfloat16()
            table.grad.copy_(theirs.grad)
        optimizers.step(lr_scale=1.0, momentum=0.9)
        reference.step()
        for table, theirs in zip(tables, stored, strict=True):
            assert torch.equal(table, table.bfloat16().float()), "bfloat16 has every value"
            apart = (table - theirs.float()).abs() > 0
            assert apart.float().mean() < 0.01, "one of the two rounds a product on its way"
            torch.testing.assert_close(table, theirs.float(), rtol=2**-7, atol=0.0)
    scalars = parameter_groups(model)["scalar"]
    assert any(not torch.equal(one, one.bfloat16().float()) for one in scalars), "tables alone are rounded"


def test_the_average_is_exponential_from_the_first_step():
    model = random_model()
    average = WeightAverage(model, 0.9)
    start = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.update(), average.update(), average.apply()
    for parameter, first in zip(model.parameters(), start, strict=True):
        torch.testing.assert_close(parameter.detach(), first + 1 - 0.9**2)


def test_without_a_decay_the_weights_stay_as_they_are():
    model = random_model()
    before = [p.detach().clone() for p in model.parameters()]
    average = WeightAverage(model, 0.0)
    average.update(), average.apply()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
