"""The optimisers of a model side by side: Muon for matrices, AdamW for tables and for vectors, and the weight average."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config import OptimConfig
from trainer.distributed import World
from trainer.model import Model
from trainer.muon import Muon


def parameter_groups(model: Model) -> dict[str, list[nn.Parameter]]:
    """Every parameter in exactly one group: `matrix`, `embedding`, `head` or `scalar`."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not model.head}
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


class Optimizers:
    """Steps all groups with one learning-rate factor."""

    def __init__(self, model: Model, config: OptimConfig, world: World) -> None:
        groups = parameter_groups(model)
        self.config = config
        self.muon = Muon(
            groups["matrix"], weight_decay=config.muon_weight_decay, steps=config.newton_schulz_steps,
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
        self.parameters = [parameter for group in groups.values() for parameter in group]

    def step(self, *, lr_scale: float, momentum: float) -> None:
        """Clip the gradients' global norm, step every group, drop the gradients."""
        if self.config.grad_clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip_norm)
        self.muon.step(lr_scale * self.config.matrix_lr, momentum)
        for group in self.adam.param_groups:
            group["lr"] = lr_scale * group["base_lr"]
        self.adam.step()
        for parameter in self.parameters:
            parameter.grad = None


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
