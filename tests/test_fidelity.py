"""The benchmark that lays a public script's classes beside a preset: with a script of our own, and with ones that differ."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

from benchmarks.fidelity import BANKS, NAMES, compare, imported, our_name, switch
from tests.trainer.tiny import CONFIG
from trainer.config import with_knobs
from trainer.model import Model

SCRIPT = """
import os
import torch
from torch import nn
from flash_attn_interface import flash_attn_func  # such scripts cannot be imported without
from tests.test_fidelity import as_script, run
from tests.trainer.tiny import ALONE, CONFIG
from trainer.optim import parameter_groups

class Hyperparameters:
    grad_clip_norm = float(os.environ.get("CLIP", CONFIG.optim.grad_clip_norm))
    decay = float(os.environ.get("DECAY", CONFIG.optim.muon_weight_decay))

class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        as_script(self)
        self.looping_active = False

    def forward(self, inputs, targets):
        return run(self, inputs, targets, int(self.looping_active))

class Optimizers(list):
    def __init__(self, h, network):
        optim = CONFIG.optim
        groups = {}
        for name, parameter in network.named_parameters():
            is_table, is_vector = "emb" in name, parameter.ndim < 2 or "resid_mix" in name or "skip" in name
            groups.setdefault("table" if is_table else "vector" if is_vector else "matrix", []).append(parameter)
        adam = dict(betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps)
        rates = {"table": optim.embedding_lr, "vector": optim.scalar_lr, "matrix": optim.matrix_lr}
        decays = {"table": optim.embedding_weight_decay, "vector": optim.scalar_weight_decay}
        self += [torch.optim.AdamW(groups[one], weight_decay=decays[one], **adam) for one in decays]
        self.append(Matrices(groups["matrix"], h.decay))
        for one, optimizer in zip(("table", "vector", "matrix"), self, strict=True):
            for group in optimizer.param_groups:
                group["base_lr"] = rates[one]

    def zero_grad_all(self):
        for optimizer in self:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self:
            optimizer.step()
        self.zero_grad_all()

class Matrices(torch.optim.Optimizer):
    def __init__(self, matrices, decay):
        super().__init__(matrices, {"lr": 0.0, "momentum": 0.0, "decay": decay})
        self.buffers = [torch.zeros_like(one) for one in matrices]

    @torch.no_grad()
    def step(self):
        from trainer.muon import muon_update
        (group,) = self.param_groups
        for matrix, buffer in zip(group["params"], self.buffers, strict=True):
            update = muon_update(
                matrix.grad[None], buffer[None], momentum=group["momentum"], steps=CONFIG.optim.newton_schulz_steps,
                row_normalize=True,
            )
            factor = max(1.0, matrix.size(0) / matrix.size(1)) ** 0.5
            matrix.mul_(1 - group["lr"] * group["decay"]).add_(update[0].float(), alpha=-group["lr"] * factor)
"""


BANKED = """
import os
import torch
from torch import nn
from tests.test_fidelity import ROUTED, as_banked, run
from trainer.model import begin_passes

class Hyperparameters:
    layers = ROUTED.model.layers

class GPT(nn.Module):
    def __init__(self, layers, pairs=float(os.environ.get("PAIRS", 1))):
        super().__init__()
        as_banked(self)
        self.bigram.scale.data *= pairs
        self.is_active = False

    @torch.no_grad()
    def set_recurrence_active(self, on):
        if on and not self.is_active:
            for number, layer in enumerate(ROUTED.model.recurrence_layers):
                getattr(self.repeat_mlp, str(number)).fc.weight.copy_(self.mlp_up_bank[layer])
                getattr(self.repeat_mlp, str(number)).proj.weight.copy_(self.mlp_down_bank[layer])
        self.is_active = on

    def forward(self, inputs, targets):
        return run(self, inputs, targets, int(self.is_active))
"""
ROUTED = with_knobs(
    CONFIG,
    {
        "model.parallel": "routed", "model.untied_mlps": True, "model.bigram_buckets": 50, "model.bigram_dim": 8,
        "model.smear": True,
    },
)  # fmt: skip
HELD = {  # by a bank's name, what it holds of all layers, one kind behind the other
    "qo_bank": "attention.query.weight attention.out.weight", "kv_bank": "attention.key.weight attention.value.weight",
    "mlp_up_bank": "mlp.up.weight", "mlp_down_bank": "mlp.down.weight", "parallel_post_lambdas": "routes",
    "parallel_resid_lambdas": "residuals",
}  # fmt: skip


def held(bank: str) -> list[str]:
    """Our names of what a bank holds, those of layers that have no such weight among them."""
    kinds = itertools.product(HELD[bank].split(), range(CONFIG.model.layers))
    return [f"blocks.{layer}.{kind}" for kind, layer in kinds]


def as_banked(network: torch.nn.Module) -> None:
    """Give the network our weights, those of one kind in one."""
    inner = Model(ROUTED.model, train_length=16)
    own = dict(inner.named_parameters())
    banks = {}
    for bank in HELD:
        found = [own.get(name) for name in held(bank)]
        filler = torch.ones_like(next(weight for weight in found if weight is not None))
        banks[bank] = torch.stack([filler if weight is None else weight for weight in found])
    matrices = re.compile(r"blocks.*\.weight|lane_merge")
    named = [*(name for name in SCRIPT_NAMES if not matrices.fullmatch(name)), *BANKED_NAMES]
    register(network, inner, banks | {name: own[str(our_name(name))] for name in named})


def as_script(network: torch.nn.Module) -> None:
    """Give the network our weights under a script's names."""
    inner = Model(CONFIG.model, train_length=16)
    own = dict(inner.named_parameters())
    register(network, inner, {name: own[str(our_name(name))] for name in SCRIPT_NAMES})


def register(network: torch.nn.Module, inner: Model, weights: dict[str, torch.Tensor]) -> None:
    object.__setattr__(network, "inner", inner)  # no module of it: its own weights are not used
    scales = inner.value_embedding.layer_scales
    weights |= {f"ve_layer_scales.{n}": scale[None] for n, scale in enumerate(scales)}
    for name, weight in weights.items():
        *path, last = name.split(".")
        place = network
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.register_parameter(last, torch.nn.Parameter(weight.detach().clone()))


def run(network: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor, recurrent: int) -> torch.Tensor:
    """Our network, whose queries and keys are turned the other way round."""
    weights: dict[str, torch.Tensor] = {}
    scales = []
    config = CONFIG.model
    turned = torch.ones(config.head_dim, 1)
    turned[config.rope_dims // 2 : config.rope_dims] = -1
    for name, parameter in network.named_parameters():
        own = our_name(name) or ""
        if own.startswith("value_embedding.layer_scales"):
            scales.append(parameter)
        else:
            weights |= dict(zip(held(name), parameter, strict=True)) if name in HELD else {own: parameter}
    known = dict(network.inner.named_parameters())
    weights = {name: weight for name, weight in weights.items() if name in known}
    for own in weights:
        if own.endswith((".query.weight", ".key.weight")):
            weights[own] = (weights[own].unflatten(0, (-1, config.head_dim)) * turned).flatten(0, 1)
    weights["value_embedding.layer_scales"] = torch.cat(scales)
    loss: torch.Tensor = torch.func.functional_call(network.inner, weights, (inputs, targets, recurrent))
    return loss


LAYER = (
    "attn.c_q.weight", "attn.c_k.weight", "attn.c_v.weight", "attn.proj.weight", "attn.q_gain", "mlp.fc.weight",
    "mlp.proj.weight", "attn_scale", "mlp_scale", "resid_mix",
)  # fmt: skip
SCRIPT_NAMES = (
    *(f"blocks.{layer}.{name}" for layer in range(CONFIG.model.layers) for name in LAYER),
    "tok_emb.weight", "skip_weights", "skip_gates", "lane_merge", "ve_shared.embed.weight", "ve_shared.proj.weight",
    "ve_shared.scale",
)  # fmt: skip
BANKED_NAMES = (
    *(f"repeat_mlp.{n}.{name}.weight" for n in range(len(ROUTED.model.recurrence_layers)) for name in ("fc", "proj")),
    "bigram.embed.weight", "bigram.proj.weight", "bigram.scale", "smear.gate",
)  # fmt: skip


@pytest.fixture
def banked(tmp_path: Path) -> Path:
    path = tmp_path / "train_gpt.py"
    path.write_text(BANKED, encoding="utf-8")
    return path


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train_gpt.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def page(script: Path, monkeypatch: pytest.MonkeyPatch, config=CONFIG, **variables: str) -> str:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)  # and is unset after the test
    return "\n".join(compare(imported(script, {}), config, tokens=8, rows=3, steps=3))


def numbers(text: str, column: int) -> list[float]:
    """A column of both tables, without their heads."""
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| (initial|with|\d)", line)]
    return [abs(float(row[column].split()[0])) for row in rows if len(row) > column + 1]


def test_a_script_of_the_same_mathematics_differs_by_rounding(script, monkeypatch):
    found = page(script, monkeypatch)
    assert re.search(r"Parameters: ([\d,]+) in the script, \1 here\.", found)
    assert max(numbers(found, 4)[:4]) < 1e-5, "losses"
    assert max(numbers(found, 5)[:4]) < 1e-3, "gradients"
    assert max(numbers(found, 3)[4:]) < 1e-3, "losses from step to step"


@pytest.mark.parametrize(("variable", "value"), [("DECAY", "30.0"), ("CLIP", "0.0001")])
def test_another_optimiser_shows_in_the_weights(script, monkeypatch, variable, value):
    assert max(numbers(page(script, monkeypatch, **{variable: value}), 5)[4:]) > 0.05


def test_another_network_shows_in_its_losses(script, monkeypatch):
    other = with_knobs(CONFIG, {"model.logit_softcap": 0.5})
    assert min(numbers(page(script, monkeypatch, other), 4)[2:4]) > 1e-3


def test_weights_that_the_script_alone_has_are_named_and_stay_as_they_begin(script, monkeypatch):
    found = page(script, monkeypatch, with_knobs(CONFIG, {"model.skips": "plain"}))
    assert "Without a counterpart: ['skip_gates'] of the script, none of ours." in found
    assert min(numbers(found, 4)[2:4]) > 1e-4, "gates that are half open are not open"


def test_without_all_weights_of_ours_nothing_is_compared(script, monkeypatch):
    found = page(script, monkeypatch, with_knobs(CONFIG, {"model.smear": True}))
    assert "Without a counterpart: none of the script, ['smear_gate'] of ours." in found and "| initial" not in found


def test_matrices_in_banks_are_compared_one_by_one(banked, monkeypatch):
    found = page(banked, monkeypatch, ROUTED)
    assert "['parallel_post_lambdas (4 of 6)', 'parallel_resid_lambdas (4 of 6)'] of the script, none of ours." in found
    assert max(numbers(found, 4)) < 1e-5 and max(numbers(found, 5)) < 1e-3
    assert len(numbers(found, 4)) == 4 and "Begins otherwise" not in found


def test_a_weight_that_begins_otherwise_is_named(banked, monkeypatch):
    found = page(banked, monkeypatch, ROUTED, PAIRS="1.2")
    assert "Begins otherwise: bigrams.scale, of size 0.0600 in the script, 0.0500 here." in found


def test_a_network_that_takes_what_no_setting_is_is_refused(banked, monkeypatch):
    banked.write_text(BANKED.replace("layers = ", "other = "))
    with pytest.raises(SystemExit, match="GPT takes layers, which Hyperparameters lacks"):
        page(banked, monkeypatch, ROUTED)


def test_a_script_without_the_classes_is_refused(tmp_path):
    path = tmp_path / "train_gpt.py"
    path.write_text("print = None\n")
    with pytest.raises(SystemExit, match="it has no class Hyperparameters"):
        imported(path, {})
    with pytest.raises(SystemExit, match="there is no such file"):
        imported(tmp_path / "other.py", {})


class Phased(torch.nn.Module):
    """A network with phases of recurrence, which also says whether it has any."""

    phase = 0
    looping_active = property(lambda self: self.phase > 0)

    def activate_looping(self, phase: int) -> None:
        self.phase = phase


class Switched(torch.nn.Module):
    is_on = False

    def set_recurrence_active(self, active: bool) -> None:
        self.is_on = active


def test_recurrence_is_switched_in_each_way_that_scripts_have():
    phased, looped, switched = Phased(), torch.nn.Module(), Switched()
    looped.looping_active = True
    for passes in (2, 1, 0):
        for one in (phased, looped, switched, torch.nn.Module()):
            switch(one, passes)
        assert (phased.phase, looped.looping_active, switched.is_on) == (passes, passes > 0, passes > 0)


def test_every_pattern_names_a_weight_of_ours():
    own = dict(Model(CONFIG.model, train_length=16).named_parameters())
    own |= dict(Model(ROUTED.model, train_length=16).named_parameters())
    known = {our_name(name) for name in (*SCRIPT_NAMES, *BANKED_NAMES)}
    assert known <= own.keys() and len(NAMES) == 23
    assert {bank: tuple(kinds.split()) for bank, kinds in HELD.items()} == BANKS
    assert our_name("blocks.0.attn.vpd_log_alpha") is None
