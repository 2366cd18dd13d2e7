"""MuonEq-R: momentum, rows set to unit length, orthogonalised by Newton–Schulz. Matrices are dealt out over the processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.distributed import World

# Dimensions: P matrices of one shape; M, N a matrix's rows and columns.

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic, steepest at zero: kellerjordan.github.io/posts/muon
EPS = 1e-7  # lets a zero row stay zero; arXiv 2603.28254 uses the same floor


def newton_schulz(matrix_PMN: Tensor, steps: int) -> Tensor:
    """Nearby semi-orthogonal matrices, in the precision of the input. A batch costs far less than its matrices one by one.

    The coefficients trade exactness for speed: singular values end around 1, not at 1, and very small ones stay below
    (same source as the coefficients).
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix_PMN.size(-2) > matrix_PMN.size(-1)
    x = matrix_PMN.mT if is_tall else matrix_PMN  # the Gram matrix below is then the small one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPS)  # the iteration needs a spectral norm of at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def with_unit_rows(matrix_PMN: Tensor) -> Tensor:
    """Divide each row by its Euclidean length: the R of MuonEq-R, arXiv 2603.28254."""
    return matrix_PMN / matrix_PMN.norm(dim=-1, keepdim=True).clamp_min(EPS)


def muon_update(grad_PMN: Tensor, buffer_PMN: Tensor, *, momentum: float, steps: int, row_normalize: bool) -> Tensor:
    """The step of each matrix before the learning rate, in bfloat16; moves the buffer on by Nesterov momentum."""
    buffer_PMN.mul_(momentum).add_(grad_PMN)
    direction = grad_PMN.add(buffer_PMN, alpha=momentum)
    if row_normalize:
        direction = with_unit_rows(direction)
    return newton_schulz(direction.bfloat16(), steps)


class Muon:
    """Optimiser of the matrices, given by shape; each process moves its share of each shape, padded at the end.

    Processes exchange updates, in the precision in which they were made: they come out the same however many take part.
    """

    def __init__(
        self, shapes: Sequence[Sequence[Tensor]], *, weight_decay: float, steps: int, row_normalize: bool, world: World
    ) -> None:
        self.shapes, self.weight_decay = [list(matrices) for matrices in shapes], weight_decay
        self.steps, self.row_normalize, self.world = steps, row_normalize, world
        self.buffers = [
            matrices[0].new_zeros(-(-len(matrices) // world.size), *matrices[0].shape) for matrices in shapes
        ]

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], lr: float, momentum: float) -> None:
        """Decay each matrix by 1 - lr · weight_decay, then move it by lr times its update.

        `grads` are those of this process's share, by shape. The updates of one shape travel while those of the next are made.
        """
        under_way = [
            self.world.begin_gather(
                muon_update(grad, buffer, momentum=momentum, steps=self.steps, row_normalize=self.row_normalize)
            )
            for grad, buffer in zip(grads, self.buffers, strict=True)
        ]
        for matrices, updates in zip(self.shapes, under_way, strict=True):
            rows, columns = matrices[0].shape
            moves = updates.arrived()[: len(matrices)].float().unbind()
            torch._foreach_mul_(matrices, 1 - lr * self.weight_decay)
            torch._foreach_add_(matrices, moves, alpha=-lr * max(1.0, rows / columns) ** 0.5)
