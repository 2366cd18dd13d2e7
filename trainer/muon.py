"""MuonEq-R: momentum, rows set to unit length, orthogonalised by Newton–Schulz. Matrices are dealt out over the processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.distributed import World

# Dimensions: M, N a matrix's rows and columns.

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic, steepest at zero: kellerjordan.github.io/posts/muon
EPS = 1e-7  # lets a zero row stay zero; arXiv 2603.28254 uses the same floor


def newton_schulz(matrix_MN: Tensor, steps: int) -> Tensor:
    """A nearby semi-orthogonal matrix (or batch of them), in the precision of its input.

    The coefficients trade exactness for speed: singular values end around 1, not at 1, and very small ones stay below
    (same source as the coefficients).
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix_MN.size(-2) > matrix_MN.size(-1)
    x = matrix_MN.mT if is_tall else matrix_MN  # the Gram matrix below is then the small one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPS)  # the iteration needs a spectral norm of at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def with_unit_rows(matrix_MN: Tensor) -> Tensor:
    """Divide each row by its Euclidean length: the R of MuonEq-R, arXiv 2603.28254."""
    return matrix_MN / matrix_MN.norm(dim=-1, keepdim=True).clamp_min(EPS)


def muon_update(grad_MN: Tensor, buffer_MN: Tensor, *, momentum: float, steps: int, row_normalize: bool) -> Tensor:
    """The step for one matrix, before the learning rate; moves `buffer_MN` on by Nesterov momentum."""
    buffer_MN.mul_(momentum).add_(grad_MN)
    direction = grad_MN.add(buffer_MN, alpha=momentum)
    if row_normalize:
        direction = with_unit_rows(direction)
    rows, columns = grad_MN.shape[-2:]
    return newton_schulz(direction.bfloat16(), steps).float() * max(1.0, rows / columns) ** 0.5


class Muon:
    """Optimiser of the matrices; each process updates its share and all add their updates up in one exchange."""

    def __init__(
        self, matrices: Iterable[Tensor], *, weight_decay: float, steps: int, row_normalize: bool, world: World
    ) -> None:
        self.matrices = list(matrices)
        self.weight_decay, self.steps, self.row_normalize, self.world = weight_decay, steps, row_normalize, world
        self.mine = range(world.rank, len(self.matrices), world.size)
        self.buffers = {i: torch.zeros_like(self.matrices[i]) for i in self.mine}

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        """Decay each matrix by 1 - lr · weight_decay, then move it by lr times its update."""
        updates = [torch.zeros_like(matrix) for matrix in self.matrices] if self.world.size > 1 else list(self.matrices)
        for i in self.mine:
            grad = self.matrices[i].grad
            assert grad is not None, "every matrix takes part in the loss"
            updates[i] = muon_update(
                grad, self.buffers[i], momentum=momentum, steps=self.steps, row_normalize=self.row_normalize
            )
        self.world.sum_all(updates)
        for matrix, update in zip(self.matrices, updates, strict=True):
            matrix.mul_(1 - lr * self.weight_decay).add_(update, alpha=-lr)
