"""Test-time training by quantiser: what each way of learning wins on models rounded in different ways, and what it costs.

    python -m benchmarks.adaptation RUN [RUN...] [--data DIR] [--positions N] [--roundings nearest,...] [--ways sgd,...]

Each RUN is a run directory with its final weights, usually one a seed. Every quantiser rounds the same weights, on its own
quantile grid and without a cap; every way of learning starts from the same rounded model and is scored by the configuration's
protocol, each chunk before it is learned from. `before` learns from the validation text *before* rounding, against the
rules of the challenge (condition 3): it is here because a public table has it. Prints a page in Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.quantization import UNLIMITED, Bench
from trainer import artifact, protocol
from trainer.attention import fastest_kernels
from trainer.by_document import Documents, evaluate_documents
from trainer.config import Config, TTTConfig, with_knobs
from trainer.data import BOS
from trainer.evaluate import Evaluation, plan_windows
from trainer.evaluate import evaluate as judge
from trainer.graphs import Recorded
from trainer.main import build_model
from trainer.model import Model
from trainer.quantize import corrected
from trainer.ttt import ChunkAdapter, DocumentAdapter

ROUNDINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "nearest": ("round to nearest, int6", {"method": "rtn"}),
    "gptq": ("GPTQ, int6", {"method": "gptq"}),
    "gptq5": ("GPTQ, int5", {"method": "gptq", "attention_bits": 5, "mlp_bits": 5}),
}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD 0.002", {"method": "sgd", "lr": 0.002}),
    "sgd5": ("SGD 0.005", {"method": "sgd", "lr": 0.005}),
    "lora": ("LoRA r8 on q and v, AdamW 0.001", {"method": "lora", "lora_unit": "chunk", "lr": 0.001}),
    "adamw": ("AdamW 0.001", {"method": "adamw", "lr": 0.001}),
    "document": (
        "LoRA r8 on q and v a document, AdamW 0.001",
        {"method": "lora", "lora_unit": "document", "lr": 0.001, "adam_beta1": 0.0, "adam_eps": 1e-10},
    ),
    "before": ("SGD 0.002 before rounding (breaks condition 3)", {"method": "sgd", "lr": 0.002}),
}


class Learner(Bench):
    """A trained model that is rounded, and then learns from the text that it is scored on."""

    def __init__(self, run: protocol.RunDir, data: Path | None, positions: int) -> None:
        super().__init__(run, data, positions)
        self.seed = protocol.read_spec(run.spec).seed
        self.compiled: Config = with_knobs(self.config, {"runtime.compile": True})

    def fresh(self, state: dict[str, torch.Tensor], *, compiles: bool = True) -> Model:
        model = build_model(self.compiled, self.world, compiles=compiles)
        model.load_state_dict(state)
        return model.eval()

    def judged(self, model: Model, ttt: TTTConfig | None = None) -> Evaluation:
        """The score in sliding windows; with `ttt`, learning after each chunk."""
        config = self.config.evaluation
        adapter = None
        if ttt is not None:
            adapter = ChunkAdapter(
                model,
                self.stream,
                config=ttt,
                length=config.sequence_length,
                recurrent=self.recurrent,
                world=self.world,
            )
        return judge(
            Recorded(model.nats, is_pure=True), self.stream,
            plan_windows(self.stream.positions, length=config.sequence_length, stride=config.stride), config=config,
            recurrent=self.recurrent, world=self.world, chunk_tokens=self.config.ttt.chunk_tokens, adapter=adapter,
        )  # fmt: skip

    def by_document(self, state: dict[str, torch.Tensor], ttt: TTTConfig) -> tuple[float, float]:
        """Bits per byte, document by document, without learning and with it."""
        model, length = self.fresh(state, compiles=False), self.config.evaluation.sequence_length
        documents = Documents(
            self.stream,
            self.stream.documents(BOS),
            config=ttt,
            length=length,
            recurrent=self.recurrent,
            world=self.world,
        )
        plain = evaluate_documents(Recorded(model.nats, is_pure=True), documents).bpb
        adapter = DocumentAdapter(model, config=ttt, recurrent=self.recurrent, world=self.world)
        return plain, evaluate_documents(Recorded(model.nats, is_pure=True), documents, adapter=adapter).bpb

    def rounded(self, state: dict[str, torch.Tensor], knobs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What a reader of the model file has of these weights."""
        self.model.load_state_dict(state)
        found, _ = self.calibrated()
        quant = dataclasses.replace(self.config.quant, grid="quantile", **knobs)
        result, _ = self.fitted(found, quant, UNLIMITED)
        return corrected(artifact.load(result.packed, str(knobs)).state())

    def learned(self, ttt: TTTConfig) -> dict[str, torch.Tensor]:
        """The weights after learning from the whole split, before any rounding."""
        model = self.fresh(self.state)
        self.judged(model, ttt)
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


HEAD = """| seed | rounding | learning | BPB | gain, mBPB | seconds |
|---|---|---|---|---|---|"""


def rows(
    bench: Learner, roundings: list[str], ways: list[str], gains: dict[tuple[str, str], list[float]]
) -> Iterator[str]:
    """A line for every rounding and way of learning; the gains go into `gains`."""
    for rounding in roundings:
        name, knobs = ROUNDINGS[rounding]
        state = bench.rounded(bench.state, knobs)
        plain = bench.judged(bench.fresh(state))
        yield f"| {bench.seed} | {name} | none | {plain.score.bpb:.5f} | | {plain.score.seconds:.1f} |"
        for way in ways:
            title, changes = WAYS[way]
            ttt, against = dataclasses.replace(bench.config.ttt, **changes), plain.score.bpb
            started = time.perf_counter()
            if way == "before":
                found = bench.judged(bench.fresh(bench.rounded(bench.learned(ttt), knobs))).score.bpb
            elif way == "document":
                against, found = bench.by_document(state, ttt)
            else:
                found = bench.judged(bench.fresh(state), ttt).score.bpb
            took, gain = time.perf_counter() - started, 1e3 * (found - against)
            gains.setdefault((rounding, way), []).append(gain)
            yield f"| {bench.seed} | {name} | {title} | {found:.5f} | {gain:+.2f} | {took:.1f} |"


def summary(gains: dict[tuple[str, str], list[float]]) -> Iterator[str]:
    """The mean gain of each cell over the seeds."""
    yield "\n| rounding | learning | seeds | gain, mBPB | std |\n|---|---|---|---|---|"
    for (rounding, way), values in gains.items():
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "–"
        yield f"| {ROUNDINGS[rounding][0]} | {WAYS[way][0]} | {len(values)} | {statistics.fmean(values):+.2f} | {spread} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, help="data set; default the run's own")
    parser.add_argument("--positions", type=int, default=10**9, help="validation targets to score, at most")
    parser.add_argument("--roundings", default=",".join(ROUNDINGS))
    parser.add_argument("--ways", default=",".join(WAYS))
    options = parser.parse_args()
    gains: dict[tuple[str, str], list[float]] = {}
    with fastest_kernels():
        print(HEAD)
        for run in options.runs:
            bench = Learner(protocol.RunDir(run), options.data, options.positions)
            for line in rows(bench, options.roundings.split(","), options.ways.split(","), gains):
                print(line, flush=True)
        print("\n".join(summary(gains)))


if __name__ == "__main__":
    main()
