import pytest
import torch

from tests.trainer.tiny import ALONE
from trainer.muon import NEWTON_SCHULZ, Muon, muon_update, newton_schulz, with_unit_rows

SHAPES = [(64, 64), (32, 96), (96, 32)]


def reference_orthogonalize(matrix, steps):
    """The same quintic applied to the singular values, in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / matrix.double().norm()
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ s.diag() @ vh


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_in_a_band_around_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(newton_schulz(matrix.bfloat16()[None], 5).float())
    # The quintic's fixed band is 0.68 ... 1.13 for singular values that reach it; bfloat16 adds a few per cent.
    assert singular.max() < 1.25
    assert singular.median() > 0.65


@pytest.mark.parametrize("shape", SHAPES)
def test_the_iteration_is_the_quintic_on_the_singular_values(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # the floor under the norm moves the result by about 1e-8
    torch.testing.assert_close(newton_schulz(matrix[None], 5)[0], reference_orthogonalize(matrix, 5), atol=1e-6, rtol=0)


def test_a_batch_is_its_matrices_one_by_one():
    batch = torch.randn(3, 8, 4, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(batch, 5), torch.cat([newton_schulz(matrix[None], 5) for matrix in batch]))


@pytest.mark.parametrize("shape", SHAPES)
def test_muoneq_r_follows_float64_to_the_precision_of_bfloat16(shape):
    generator = torch.Generator().manual_seed(0)
    grad, buffer = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    moved = 0.9 * buffer.double() + grad.double()
    direction = grad.double() + 0.9 * moved
    direction = direction / direction.norm(dim=1, keepdim=True)
    expected = reference_orthogonalize(direction, 5)
    update = muon_update(grad[None], buffer[None], momentum=0.9, steps=5, row_normalize=True)[0]
    torch.testing.assert_close(buffer.double(), moved, atol=1e-6, rtol=1e-6)
    # bfloat16 keeps 8 bits (2^-9), and the quintic's slope at zero, 3.44, amplifies an error of a small singular value
    # in each of its first iterations: a few per cent in all.
    assert (update.double() - expected).norm() / expected.norm() < 0.06


def test_rows_get_unit_length_and_a_zero_row_stays_zero():
    matrix = torch.randn(5, 7)
    matrix[2] = 0
    lengths = with_unit_rows(matrix).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))


def test_row_lengths_do_not_matter_with_row_normalisation_and_do_without():
    grad, scale = torch.randn(16, 32), torch.rand(16, 1) + 0.5

    def update(g, row_normalize):
        return muon_update(g[None], torch.zeros(1, *g.shape), momentum=0.0, steps=5, row_normalize=row_normalize)

    torch.testing.assert_close(
        update(grad, True), update(grad * scale, True), atol=0.02, rtol=0.05
    )  # bfloat16 rounding
    assert not torch.allclose(update(grad, False), update(grad * scale, False), atol=0.05)


def test_a_zero_gradient_moves_nothing():
    zeros = torch.zeros(1, 8, 4)
    assert muon_update(zeros, zeros.clone(), momentum=0.9, steps=5, row_normalize=True).abs().max() == 0


def test_decay_is_decoupled_from_the_update():
    matrix = torch.nn.Parameter(torch.randn(8, 8))
    before = matrix.detach().clone()
    muon = Muon([[matrix]], weight_decay=0.1, steps=5, row_normalize=True, world=ALONE)
    muon.step([torch.zeros(1, 8, 8)], lr=0.5, momentum=0.9)
    torch.testing.assert_close(matrix.detach(), before * (1 - 0.5 * 0.1))


@pytest.mark.parametrize(("shape", "factor"), [((8, 8), 1.0), ((8, 32), 1.0), ((32, 8), 2.0)])
def test_a_tall_matrix_moves_by_the_root_of_its_aspect_more(shape, factor):
    matrix, grad = torch.nn.Parameter(torch.zeros(shape)), torch.randn(1, *shape)
    Muon([[matrix]], weight_decay=0.0, steps=5, row_normalize=True, world=ALONE).step([grad], lr=0.5, momentum=0.9)
    update = muon_update(grad, torch.zeros(1, *shape), momentum=0.9, steps=5, row_normalize=True)[0]
    torch.testing.assert_close(matrix.detach(), -0.5 * factor * update.float())


def moved_matrices(world, counts=(3, 1, 4)):
    """Three shapes after three steps, as lists; the gradients are the same for any number of processes."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shapes = [
        [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(count)]
        for count, shape in zip(counts, SHAPES, strict=True)
    ]
    muon = Muon(shapes, weight_decay=0.1, steps=5, row_normalize=True, world=world)
    for _ in range(3):
        shares = []
        for members in shapes:
            padded = torch.zeros(-(-len(members) // world.size) * world.size, *members[0].shape)
            padded[: len(members)] = torch.randn(len(members), *members[0].shape, generator=generator)
            shares.append(padded.chunk(world.size)[world.rank])
        muon.step(shares, lr=0.1, momentum=0.9)
    return [matrix.tolist() for members in shapes for matrix in members]


def test_two_processes_move_every_matrix_as_one_does_padded_shapes_included(pair):
    alone = moved_matrices(ALONE)
    assert pair(moved_matrices) == [alone, alone]
