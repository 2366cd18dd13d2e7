"""A model small enough for a property in milliseconds, with every technique on."""

import torch

from trainer.calibration import Calibration, feel, hear
from trainer.config import Config, ModelConfig, QuantConfig, RuntimeConfig, with_knobs
from trainer.distributed import World
from trainer.gptq import Grid, Quantized, SecondMoments, quantize_matrices
from trainer.model import HEAD, Model

LENGTH = 16
ALONE = World(rank=0, size=1, device=torch.device("cpu"))
RUNTIME = RuntimeConfig(device="cpu", compile=False)

CONFIG = Config(
    model=ModelConfig(
        vocab_size=64, layers=6, width=32, heads=4, kv_heads=2, mlp_ratio=2.0, rope_dims=4, xsa_layers=6,
        value_embedding_dim=8, value_embedding_layers=(4, 5), recurrence_layers=(2, 3), parallel_start_layer=4,
        lane_skips=True,
    ),
    runtime=RUNTIME,
)  # fmt: skip


def random_model(seed: int = 0, **knobs: object) -> Model:
    """A model whose every weight matters: zero starts are replaced by noise."""
    torch.manual_seed(seed)
    config = with_knobs(CONFIG, {f"model.{name}": value for name, value in knobs.items()}).model
    model = Model(config, train_length=LENGTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_tokens(rows: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(CONFIG.model.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def rounded(
    weight: torch.Tensor, moments: torch.Tensor | None = None, *, bits: int = 6, config: QuantConfig | None = None
) -> Quantized:
    """One matrix, quantised: by GPTQ where its inputs' second moments are given."""
    own_moments = None if moments is None else moments[None]
    found, _ = quantize_matrices(weight[None], own_moments, Grid(bits, 0.0), config or QuantConfig(block_columns=16))
    return found[0]


def calibrated(model: Model, *, batches: int = 32, rows: int = 2) -> Calibration:
    """What calibration finds on random tokens: moments of all rows, information from the first of each batch."""
    heard, information = SecondMoments(), dict[str, torch.Tensor]()
    for seed in range(batches):
        part = random_tokens(rows, LENGTH + 1, seed)
        hear(model, part, True, heard)
        feel(model, part[:1], True, information)
    moments = {name: heard.sums[shared] for name, _, shared in model.matrices()}
    squares = {name: square / (batches * LENGTH) for name, square in information.items()}
    return Calibration({HEAD: heard.sums[HEAD], **moments}, squares)
