"""What rounding costs a trained model, in bits per byte and in bytes: every quantiser on the same weights.

    python -m benchmarks.quantization RUN [--data DIR] [--positions N] [--sizes 1,0.8,0.65]

RUN is a run directory with its final weights. Each way of choosing the grid is fitted to the same sizes (parts of the file
of the configuration's own quantiser) and scored in flat windows on the same validation text; the gap is against the
unquantised weights. Prints a page in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from trainer import artifact, protocol
from trainer.attention import fastest_kernels
from trainer.calibration import Calibration, calibrate
from trainer.config import Config, QuantConfig, from_mapping, with_knobs
from trainer.data import Dataset
from trainer.distributed import World, start_world
from trainer.evaluate import Stream, evaluate, plan_windows
from trainer.fit import Fitted, fit
from trainer.graphs import Recorded
from trainer.main import build_model
from trainer.model import Model
from trainer.quantize import corrected
from trainer.train import order_seed

SINGLE = (  # on their own grids, whatever their size
    ("round to nearest, quantiles", {"method": "rtn", "grid": "quantile"}),
    ("GPTQ, quantiles", {"grid": "quantile"}),
    ("round to nearest, quantiles over a floor of 1: #549", {"method": "rtn", "grid": "quantile", "clip_floor": 1.0}),
    ("GPTQ, quantiles over a floor of 1: #1326", {"grid": "quantile", "clip_floor": 1.0}),
    ("GPTQ, quantiles by the outputs' error", {"grid": "quantile", "clip_criterion": "output"}),
    ("GPTQ, quantiles, int5 MLPs", {"grid": "quantile", "mlp_bits": 5}),
    ("the same, three corrections of rank 4", {"grid": "quantile", "mlp_bits": 5, "low_rank_tensors": 3}),
    ("GPTQ, deviations, the head too: #1394", {"grid": "std", "embedding_method": "gptq"}),
)  # fmt: skip
FITTED = (  # to one size
    ("round to nearest, quantiles", {"method": "rtn", "grid": "quantile", "fit": "coarsen"}),
    ("GPTQ, quantiles over a floor of 1, pruned: #1334", {"grid": "quantile", "clip_floor": 1.0, "fit": "prune"}),
    ("GPTQ, quantiles", {"grid": "quantile", "fit": "coarsen"}),
    ("GPTQ, quantiles over a floor of 1", {"grid": "quantile", "clip_floor": 1.0, "fit": "fill"}),
    ("GPTQ, deviations", {"grid": "std", "fit": "fill"}),
    ("GPTQ, deviations, the head too, 7 bits", {"grid": "std", "fit": "fill", "embedding_method": "gptq", "embedding_bits": 7, "embedding_clip_std": 15.0}),
    ("GPTQ, deviations by importance: #1412", {"grid": "std", "fit": "fill", "clip_importance": 0.175}),
    ("round to nearest, Fisher", {"grid": "fisher", "fit": "fill", "method": "rtn"}),
    ("GPTQ, Fisher", {"grid": "fisher", "fit": "fill"}),
    ("GPTQ, Fisher, the head too, float16 vectors", {"grid": "fisher", "fit": "fill", "embedding_method": "gptq", "half_vectors": True}),
)  # fmt: skip
UNLIMITED = 10**12


class Bench:
    """A trained model, what is known of it, and text to score it on."""

    def __init__(self, run: protocol.RunDir, data: Path | None, positions: int) -> None:
        spec, stored = protocol.read_spec(run.spec), artifact.decode(run.weights.read_bytes(), str(run.weights))
        self.config: Config = with_knobs(from_mapping(spec.config), {"runtime.compile": False})
        self.recurrent, self.state = int(stored.meta["recurrent"]), stored.state()
        self.world: World = start_world(self.config.runtime)
        self.dataset = Dataset.open(data or Path(spec.data_dir), self.config.model.vocab_size)
        tokens_N = self.dataset.validation_tokens()[: positions + 1]
        target_bytes = self.dataset.byte_counts().bytes_of_targets(tokens_N[:-1], tokens_N[1:])
        self.stream = Stream(tokens_N.to(self.world.device), target_bytes.to(self.world.device))
        self.model = self.model_of(self.state)
        self.bpb = self.score(self.model)

    def model_of(self, state: dict[str, torch.Tensor]) -> Model:
        model = build_model(self.config, self.world)
        model.load_state_dict(state)
        return model.to(self.world.device)

    def score(self, model: Model) -> float:
        """Bits per byte in flat windows."""
        length = self.config.evaluation.sequence_length
        windows = plan_windows(self.stream.positions, length=length, stride=length)
        return evaluate(
            Recorded(model.eval().nats, is_pure=True), self.stream, windows, config=self.config.evaluation,
            recurrent=self.recurrent, world=self.world, chunk_tokens=self.stream.positions,
        ).score.bpb  # fmt: skip

    def calibrated(self) -> tuple[Calibration, float]:
        """Moments and information for every quantiser, and the seconds that they took."""
        config = with_knobs(self.config, {"quant.method": "gptq", "quant.grid": "fisher"})
        self.world.synchronize()
        started = time.perf_counter()
        found = calibrate(
            self.model, self.dataset, config=config, order_seed=order_seed(config, 0), recurrent=self.recurrent,
            world=self.world,
        )  # fmt: skip
        self.world.synchronize()
        return found, time.perf_counter() - started

    def fitted(self, found: Calibration, config: QuantConfig, cap_bytes: int) -> tuple[Fitted, dict[str, float]]:
        """The file, and the seconds of its phases."""
        seconds: dict[str, float] = {}

        @contextlib.contextmanager
        def phase(name: str) -> Iterator[None]:
            started = time.perf_counter()
            yield
            self.world.synchronize()
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

        known = found if config.method == "gptq" else Calibration({}, found.information)
        return fit(self.model, known, {}, cap_bytes=cap_bytes, config=config, phase=phase), seconds

    def row(self, title: str, found: Calibration, config: QuantConfig, cap_bytes: int) -> str:
        """A line of a table."""
        result, seconds = self.fitted(found, config, cap_bytes)
        size = len(result.packed)
        if size > cap_bytes:
            return f"| {title} | does not fit: {size:,} | | | | |"
        model = self.model_of(corrected(artifact.load(result.packed, title).state()))
        gap = 1e3 * (self.score(model) - self.bpb)
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"| {title} | {size:,} | {8 * size / weights:.3f} | {gap:+.2f} | {result.factor:.2f} | {result.pruned:,} "
            f"| {seconds['quantize']:.1f} + {seconds['pack']:.1f} |"
        )


HEAD_LINES = """| quantiser | bytes | bits a parameter | gap, mBPB | grid factor | pruned | seconds: quantise + pack |
|---|---|---|---|---|---|---|"""


def page(bench: Bench, sizes: list[float]) -> Iterator[str]:
    found, seconds = bench.calibrated()
    parameters = sum(parameter.numel() for parameter in bench.model.parameters())
    yield (
        f"{parameters:,} parameters, {bench.stream.positions:,} targets; unquantised {bench.bpb:.5f} BPB; calibration, "
        f"moments and information, {seconds:.1f} s."
    )
    own = dataclasses.replace(bench.config.quant, clip_floor=0.0, coder="entropy", margin_bytes=200)
    yield f"\n## On their own grids\n\n{HEAD_LINES}"
    for title, knobs in SINGLE:
        yield bench.row(title, found, dataclasses.replace(own, **knobs), UNLIMITED)
    whole, _ = bench.fitted(found, dataclasses.replace(own, grid="quantile"), UNLIMITED)
    for part in sizes:
        cap = int(part * len(whole.packed))
        yield f"\n## At most {cap:,} bytes, {part:g} of GPTQ with quantiles\n\n{HEAD_LINES}"
        for title, knobs in FITTED:
            yield bench.row(title, found, dataclasses.replace(own, **knobs), cap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, help="data set; default the run's own")
    parser.add_argument("--positions", type=int, default=10**9, help="validation targets to score, at most")
    parser.add_argument("--sizes", default="1,0.8,0.65", help="sizes to fit, as parts of the configuration's own file")
    options = parser.parse_args()
    with fastest_kernels():
        bench = Bench(protocol.RunDir(options.run), options.data, options.positions)
        for line in page(bench, [float(part) for part in options.sizes.split(",")]):
            print(line, flush=True)


if __name__ == "__main__":
    main()
