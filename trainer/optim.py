"""The optimisers of a model side by side: Muon for matrices, AdamW for tables and for vectors, and the weight average."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from trainer.config import OptimConfig
from trainer.distributed import World
from trainer.model import Model
from trainer.muon import Muon

CLIP_EPS = 1e-6  # as torch's own clipping has it
PROJECTIONS = ("bigrams.widen", "value_embedding.projection")  # of the tables narrower than the stream


def parameter_groups(model: Model, projections: str = "muon") -> dict[str, list[nn.Parameter]]:
    """Every parameter in exactly one group: `matrix`, `embedding`, `head` or `scalar`; where projections are, that decides."""
    small = PROJECTIONS if projections == "adamw" else ()
    linear = {
        id(m.weight)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not model.head and not name.endswith(small)
    }
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "embedding": [], "head": [], "scalar": []}
    for parameter in model.parameters():
        if id(parameter) in linear:
            groups["matrix"].append(parameter)
        elif id(parameter) in tables:
            groups["embedding"].append(parameter)
        elif model.head is not None and parameter is model.head.weight:
            groups["head"].append(parameter)
        else:
            groups["scalar"].append(parameter)
    return groups


def by_shape(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Matrices of one shape together: they are orthogonalised in one batch."""
    shapes: dict[torch.Size, list[nn.Parameter]] = {}
    for parameter in parameters:
        shapes.setdefault(parameter.shape, []).append(parameter)
    return list(shapes.values())


class Gradients:
    """All gradients in one buffer that keeps its address: matrices of one shape together, then everything else.

    The shapes are padded, so that their matrices can be dealt out equally over the processes.
    """

    def __init__(self, shapes: Sequence[Sequence[nn.Parameter]], others: Sequence[nn.Parameter], world: World) -> None:
        self.world = world
        padded = [-(-len(members) // world.size) * world.size for members in shapes]
        sizes = [count * members[0].numel() for count, members in zip(padded, shapes, strict=True)]
        sizes.append(sum(parameter.numel() for parameter in others))
        self.all = torch.zeros(sum(sizes), device=world.device)
        *stacks, self.others = self.all.split(sizes)
        self.stacks = [flat.view(-1, *members[0].shape) for flat, members in zip(stacks, shapes, strict=True)]
        for stack, members in zip(self.stacks, shapes, strict=True):
            for parameter, grad in zip(members, stack, strict=False):
                parameter.grad = grad
        for parameter, flat in zip(others, self.others.split([p.numel() for p in others]), strict=True):
            parameter.grad = flat.view_as(parameter)

    def summed(self, clip_norm: float) -> list[Tensor]:
        """Add up over the processes, clip the global norm (0: leave it); this process's share of each shape's matrices."""
        waiting = [*(self.world.begin_scatter(stack) for stack in self.stacks), self.world.begin_sum(self.others)]
        *shares, others = [sum_.arrived() for sum_ in waiting]
        if clip_norm:
            square = self.world.sum(sum((share.square().sum() for share in shares), others.new_zeros(())))
            norm = (square + others.square().sum()).sqrt()
            torch._foreach_mul_([*shares, others], (clip_norm / (norm + CLIP_EPS)).clamp(max=1.0))
        return shares


class Optimizers:
    """Steps all groups with one learning-rate factor."""

    def __init__(self, model: Model, config: OptimConfig, world: World, gradients: Gradients) -> None:
        groups = parameter_groups(model, config.projections)
        self.config, self.gradients = config, gradients
        self.muon = Muon(
            by_shape(groups["matrix"]), weight_decay=config.muon_weight_decay, steps=config.newton_schulz_steps,
            row_normalize=config.muon_row_normalize, world=world,
        )  # fmt: skip
        adam_groups = (
            ("embedding", config.embedding_lr, config.embedding_weight_decay),
            ("head", config.head_lr, 0.0),
            ("scalar", config.scalar_lr, config.scalar_weight_decay),
        )
        self.adam = torch.optim.AdamW(
            [
                {"params": groups[name], "lr": lr, "base_lr": lr, "weight_decay": decay}
                for name, lr, decay in adam_groups
                if groups[name]
            ],
            betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps, fused=world.device.type == "cuda",
        )  # fmt: skip

    def step(self, *, lr_scale: float, momentum: float) -> None:
        """Sum and clip the gradients, step every group, and begin the gradients anew."""
        shares = self.gradients.summed(self.config.grad_clip_norm)
        self.muon.step(shares, lr_scale * self.config.matrix_lr, momentum)
        for group in self.adam.param_groups:
            group["lr"] = lr_scale * group["base_lr"]
        self.adam.step()
        if self.config.embedding_precision == "bfloat16":
            coarsen(self.adam)
        self.gradients.all.zero_()


@torch.no_grad()
def coarsen(adam: torch.optim.AdamW) -> None:
    """Round the tables, which are its first group, and their moments to bfloat16: as if it had computed in float32 and stored that."""
    for table in adam.param_groups[0]["params"]:
        for stored in (table, adam.state[table]["exp_avg"], adam.state[table]["exp_avg_sq"]):
            stored.copy_(stored.bfloat16())


def gradients_of(model: Model, config: OptimConfig, world: World) -> Gradients:
    """The gradients of a whole model, for `Optimizers`."""
    groups = parameter_groups(model, config.projections)
    others = [parameter for name, members in groups.items() if name != "matrix" for parameter in members]
    return Gradients(by_shape(groups["matrix"]), others, world)


class WeightAverage:
    """Exponential moving average of all weights in float32, from the first step on, without bias correction."""

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.live = list(model.parameters())
        self.averaged: list[Tensor] = [parameter.detach().clone() for parameter in self.live] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        if self.decay:
            torch._foreach_lerp_(self.averaged, [parameter.detach() for parameter in self.live], 1 - self.decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average in the weights' place."""
        for parameter, average in zip(self.live, self.averaged, strict=False):
            parameter.copy_(average)
