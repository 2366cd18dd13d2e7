"""Whether a preset is the network and the optimiser of a public script: the script's own classes beside ours.

    python -m benchmarks.fidelity PATH/train_gpt.py PRESET [--env NAME=VALUE...] [--knob NAME=VALUE...] [--tokens N] [--steps N]

The script is imported, not run (what stands outside of its functions runs, so take one that you would run): its
`Hyperparameters`, `GPT` and `Optimizers` are used as they stand, with the environment variables of `--env`, on the processor and
in float32. A `GPT` that takes values by name gets the settings of these names. Both networks get the script's initial weights,
then the same with noise on all of them (so that the zeros at the start hide nothing), then the same batches. What is printed is
which weights begin otherwise, by how much losses, gradients and weights differ, and by how much the script differs from itself
where only the rounding changes. It knows the names of weights that the scripts from #493 on share, and says which it does not
know; what the script alone has stays as it begins. `--knob` sets ours otherwise, to see what a difference is worth.

The scripts rotate queries and keys the other way round than ours do. That is the same network with the sign of some of their rows
turned, and the weights are compared so.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import inspect
import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orchestrator.presets import load_preset
from trainer.config import Config, parse_value, with_knobs
from trainer.distributed import World
from trainer.errors import CaddieError
from trainer.model import Model, begin_passes
from trainer.optim import Optimizers
from trainer.schedule import muon_momentum
from trainer.train import Network, depths

SHIMS = Path(__file__).parents[1] / "shims" / "flash_attention"
NAMES = (  # of a weight in a script, by pattern, and in ours
    (r"tok_emb\.(.*)", r"embedding.\1"),
    (r"lm_head\.(.*)", r"head.\1"),
    (r"(blocks\.\d+)\.attn\.c_q\.(.*)", r"\1.attention.query.\2"),
    (r"(blocks\.\d+)\.attn\.c_k\.(.*)", r"\1.attention.key.\2"),
    (r"(blocks\.\d+)\.attn\.c_v\.(.*)", r"\1.attention.value.\2"),
    (r"(blocks\.\d+)\.attn\.proj\.(.*)", r"\1.attention.out.\2"),
    (r"(blocks\.\d+)\.attn\.q_gain", r"\1.attention.gain"),
    (r"(blocks\.\d+)\.mlp\.fc\.(.*)", r"\1.mlp.up.\2"),
    (r"(blocks\.\d+)\.mlp\.proj\.(.*)", r"\1.mlp.down.\2"),
    (r"(blocks\.\d+)\.attn_scale", r"\1.attention_scale"),
    (r"(blocks\.\d+)\.mlp_scale", r"\1.mlp_scale"),
    (r"(blocks\.\d+)\.resid_mix", r"\1.mix"),
    (r"ve_shared\.embed\.(.*)", r"value_embedding.table.\1"),
    (r"ve_shared\.proj\.(.*)", r"value_embedding.projection.\1"),
    (r"ve_shared\.scale", r"value_embedding.scale"),
    (r"ve_layer_scales\.(\d+)", r"value_embedding.layer_scales.\1"),
    (r"bigram\.embed\.(.*)", r"bigrams.table.\1"),
    (r"bigram\.proj\.(.*)", r"bigrams.widen.\1"),
    (r"bigram\.scale", r"bigrams.scale"),
    (r"smear\.gate", r"smear_gate"),
    (r"repeat_mlp\.(\d+)\.fc\.(.*)", r"repeats.\1.up.\2"),
    (r"repeat_mlp\.(\d+)\.proj\.(.*)", r"repeats.\1.down.\2"),
    (r"(skip_weights|skip_gates|lane_merge)", r"\1"),
)
BANKS = {  # weights of a script that hold one kind of ours after the other, each of all layers
    "qo_bank": ("attention.query.weight", "attention.out.weight"),
    "kv_bank": ("attention.key.weight", "attention.value.weight"),
    "mlp_up_bank": ("mlp.up.weight",),
    "mlp_down_bank": ("mlp.down.weight",),
    "parallel_post_lambdas": ("routes",),
    "parallel_resid_lambdas": ("residuals",),
}
NOISE = 0.02  # added to every weight: a table's entries start at 0.005, a matrix's at about 0.04
STARTS_APART = 0.15  # of their size, more than two draws of some hundred numbers differ by
PLATEAU = 1.0  # factor of the learning rate before the warm-down


def imported(script: Path, variables: dict[str, str]) -> ModuleType:
    """The script as a module that read these variables; PyTorch's attention stands in for FlashAttention."""
    if not script.is_file():
        sys.exit(f"error: {script}: there is no such file")
    os.environ.update(variables)
    sys.path.insert(0, str(SHIMS))
    spec = importlib.util.spec_from_file_location("public_script", script)
    if spec is None or spec.loader is None:
        sys.exit(f"error: {script}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("Hyperparameters", "GPT"):
        if not hasattr(module, name):
            sys.exit(f"error: {script}: it has no class {name}")
    return module


def our_name(name: str) -> str | None:
    """What a script's weight is called here; None where nobody knows."""
    for pattern, replacement in NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return None


class Match(NamedTuple):
    """A weight of ours and where a script keeps it."""

    name: str
    theirs: nn.Parameter
    part: int | None
    """The place in theirs, where that holds several of ours."""

    ours: nn.Parameter
    place: int | None
    """The place in ours, where that holds several of theirs."""


class Pair:
    """A script's network and a preset's, weight by weight."""

    def __init__(self, theirs: nn.Module, ours: Model) -> None:
        self.theirs, self.ours = theirs, ours
        half, head = ours.config.rope_dims // 2, torch.ones(ours.config.head_dim, 1)
        head[half : 2 * half] = -1
        self._turned = head
        """Sign of each row of one head's queries and keys."""

        self.matches: list[Match] = []
        self.unknown: list[str] = []
        for name, weight in theirs.named_parameters():
            found = list(self._banked(name, weight) if name in BANKS else self._single(name, weight))
            self.matches += found
            places = len(BANKS[name]) * ours.config.layers if name in BANKS else 1
            if len(found) < places:
                self.unknown.append(f"{name} ({places - len(found)} of {places})" if found else name)
        self.missing = sorted(dict(ours.named_parameters()).keys() - {match.name for match in self.matches})

    def _banked(self, name: str, weight: nn.Parameter) -> Iterator[Match]:
        own, layers = dict(self.ours.named_parameters()), self.ours.config.layers
        for index, (kind, layer) in enumerate(itertools.product(BANKS[name], range(layers))):
            mine = f"blocks.{layer}.{kind}"
            if mine in own and index < len(weight) and own[mine].shape == weight.shape[1:]:
                yield Match(mine, weight, index, own[mine], None)

    def _single(self, name: str, weight: nn.Parameter) -> Iterator[Match]:
        own, mine, place = dict(self.ours.named_parameters()), our_name(name) or "", None
        if mine not in own and (found := re.fullmatch(r"(.*)\.(\d+)", mine)):
            mine, place = found[1], int(found[2])
        if mine in own and (own[mine] if place is None else own[mine][place]).numel() == weight.numel():
            yield Match(mine, weight, None, own[mine], place)

    @torch.no_grad()
    def align(self, noise: float = 0.0) -> None:
        """Give ours their weights, both with the same noise."""
        for match in self.matches:
            weight, target = at(match.theirs, match.part), at(match.ours, match.place)
            weight.add_(torch.randn_like(weight), alpha=noise)
            target.copy_(self._as_ours(match.name, weight).view_as(target))

    def _as_ours(self, name: str, weight: Tensor) -> Tensor:
        if not name.endswith((".query.weight", ".key.weight")):
            return weight
        return (weight.unflatten(0, (-1, len(self._turned))) * self._turned).flatten(0, 1)

    def starts(self) -> dict[str, tuple[float, float]]:
        """Weights whose size differs where each network has made its own: root mean square of theirs and of ours."""
        sizes = {}
        for match in self.matches:
            both = (at(match.theirs, match.part), at(match.ours, match.place))
            found, expected = (float(one.detach().square().mean().sqrt()) for one in both)
            if abs(found - expected) > STARTS_APART * max(found, expected):
                sizes[match.name] = (found, expected)
        return sizes

    def worst(self, what: str) -> str:
        """In which weight (`data`) or gradient (`grad`) ours is farthest from theirs, and how far."""
        name, apart = max(self._apart(what), key=lambda found: found[1])
        return f"{apart:.1e} ({name})"

    def _apart(self, what: str) -> Iterator[tuple[str, float]]:
        for name, theirs, part, ours, place in self.matches:
            expected, found = (given(one, what).detach() for one in (theirs, ours))
            expected, found = self._as_ours(name, at(expected, part)), at(found, place)
            yield name, relative(found.view_as(expected), expected)


def at(weight: Tensor, place: int | None) -> Tensor:
    return weight if place is None else weight[place]


def given(weight: nn.Parameter, what: str) -> Tensor:
    """A weight's `data` or `grad`; zero where nothing has used it."""
    found: Tensor | None = getattr(weight, what)
    return torch.zeros_like(weight) if found is None else found


def relative(found: Tensor, expected: Tensor) -> float:
    """Length of the difference, as a share of the expected length; the found length where that is zero."""
    norm = float(expected.norm())
    return float((found - expected).norm()) / norm if norm else float(found.norm())


def built(module: ModuleType) -> tuple[Any, nn.Module]:
    """Its settings and its network."""
    settings = module.Hyperparameters()
    torch.manual_seed(int(getattr(settings, "seed", 42)))
    return settings, module.GPT(**arguments(module.GPT, settings)).float()


def arguments(network: type, settings: Any) -> dict[str, Any]:
    """What to make the network with: all settings as one value, or those that it takes by name."""
    wanted = inspect.signature(network).parameters
    if len(wanted) == 1:
        return dict.fromkeys(wanted, settings)
    if lacking := [name for name, one in wanted.items() if one.default is one.empty and not hasattr(settings, name)]:
        sys.exit(f"error: GPT takes {', '.join(lacking)}, which Hyperparameters lacks")
    return {name: getattr(settings, name) for name in wanted if hasattr(settings, name)}


def compare(module: ModuleType, config: Config, *, tokens: int, rows: int, steps: int) -> Iterator[str]:
    """Lines of the page."""
    settings, theirs = built(module)
    pair = Pair(theirs, Model(config.model, train_length=config.data.sequence_length))
    counts = [sum(p.numel() for p in one.parameters()) for one in (pair.theirs, pair.ours)]
    yield f"Parameters: {counts[0]:,} in the script, {counts[1]:,} here."
    if pair.unknown or pair.missing:
        yield f"\nWithout a counterpart: {pair.unknown or 'none'} of the script, {pair.missing or 'none'} of ours."
    if pair.missing:
        return
    for name, (expected, found) in pair.starts().items():
        yield f"\nBegins otherwise: {name}, of size {expected:.4f} in the script, {found:.4f} here."
    start = copy.deepcopy(theirs.state_dict())
    batches = torch.randint(config.model.vocab_size, (steps, rows, tokens + 1))
    yield "\n| weights | layers | loss of the script | ours − script | largest difference of a gradient |\n|---|---|---|---|---|"
    for title, noise in (("initial", 0.0), (f"with noise of {NOISE}", NOISE)):
        pair.align(noise)
        for passes in depths(config):
            yield f"| {title} | {len(pair.ours.layer_order(passes))} | {felt(pair, batches[0], passes)} |"
    if hasattr(module, "Optimizers"):
        theirs.load_state_dict(start)
        pair.align()
        yield from stepped(module, settings, pair, config, batches)


def felt(pair: Pair, batch: Tensor, passes: int) -> str:
    """Cells of the table: both losses of a batch, and the gradient in which the two differ most."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    turn(pair, passes)
    losses = []
    for network, arguments in ((pair.theirs, (inputs, targets)), (pair.ours, (inputs, targets, passes))):
        network.zero_grad(set_to_none=True)
        loss = network(*arguments)
        loss.backward()
        losses.append(loss.item())
    return f"{losses[0]:.6f} | {losses[1] - losses[0]:+.1e} | {pair.worst('grad')}"


def stepped(module: ModuleType, settings: Any, pair: Pair, config: Config, batches: Tensor) -> Iterator[str]:
    """Both trained on the same batches by their own optimisers, in their greatest depth.

    Beside them the script once more, which reads the rows of each batch in the other order: the same mathematics, rounded
    otherwise. Where ours differs no more than that, it differs by rounding.
    """
    passes, world = depths(config)[-1], World(rank=0, size=1, device=torch.device("cpu"))
    turn(pair, passes)
    networks = (pair.theirs, copy.deepcopy(pair.theirs))
    optimizers = [module.Optimizers(settings, network) for network in networks]
    for one in optimizers:
        one.zero_grad_all()
    network = Network(pair.ours, config, world)
    ours = Optimizers(pair.ours, config.optim, world, network.gradients)
    yield "\n| step | loss of the script | ours − script | script, rows turned − script | largest difference of a weight | of the turned one |\n|---|---|---|---|---|---|"
    for step, batch in enumerate(batches):
        momentum = muon_momentum(step, config.optim)
        first, again = (
            trained(theirs, own, rows, momentum, settings.grad_clip_norm)
            for theirs, own, rows in zip(networks, optimizers, (batch, batch.flip(0)), strict=True)
        )
        own = network.backward(batch, passes).item()
        ours.step(lr_scale=PLATEAU, momentum=momentum)
        turned = max(
            relative(one.detach(), other.detach())
            for one, other in zip(networks[1].parameters(), networks[0].parameters(), strict=True)
        )
        yield f"| {step + 1} | {first:.6f} | {own - first:+.1e} | {again - first:+.1e} | {pair.worst('data')} | {turned:.1e} |"


def trained(theirs: nn.Module, optimizers: Any, batch: Tensor, momentum: float, clip_norm: float) -> float:
    """One step of the script's own optimisers, as its training loop makes it; the loss before it."""
    loss = theirs(batch[:, :-1], batch[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = PLATEAU * group["base_lr"]
            if "momentum" in group:
                group["momentum"] = momentum
    optimizers.step()
    return float(loss.detach())


def turn(pair: Pair, passes: int) -> None:
    """Switch the recurrence of both, from off to on whatever it was.

    Then MLPs of the extra pass take the weights of those that they stand beside.
    """
    for wanted in (0, passes):
        switch(pair.theirs, wanted)
    if passes and pair.ours.config.untied_mlps:
        begin_passes(pair.ours)


def switch(theirs: nn.Module, passes: int) -> None:
    """Switch a script's recurrence to so many extra passes, by one of the ways that these scripts have."""
    if hasattr(theirs, "activate_looping"):  # its phases are the numbers of extra passes: #1412
        theirs.activate_looping(passes)  # type: ignore[operator]
    elif hasattr(theirs, "looping_active"):
        theirs.looping_active = passes > 0  # type: ignore[assignment]
    elif hasattr(theirs, "set_recurrence_active"):
        theirs.set_recurrence_active(passes > 0)  # type: ignore[operator]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    parser.add_argument("preset")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="what the script reads")
    parser.add_argument(
        "--knob", action="append", default=[], metavar="NAME=VALUE", help="what the preset has otherwise"
    )
    parser.add_argument("--tokens", type=int, default=256, help="of a sequence")
    parser.add_argument("--rows", type=int, default=4, help="sequences of a batch")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    if wrong := [one for one in (*options.env, *options.knob) if "=" not in one]:
        parser.error(f"{wrong[0]}: must be NAME=VALUE")
    knobs = dict(one.split("=", 1) for one in options.knob)
    try:
        config = load_preset(options.preset)
        config = with_knobs(config, {name: parse_value(name, text) for name, text in knobs.items()})
    except CaddieError as error:
        parser.error(f"{error}; {error.hint}")
    module = imported(options.script, dict(one.split("=", 1) for one in options.env))
    for line in compare(module, config, tokens=options.tokens, rows=options.rows, steps=options.steps):
        print(line, flush=True)


if __name__ == "__main__":
    main()
