"""Test-time training by quantiser: what each way of learning wins on models rounded in different ways, and what it costs.

    python -m benchmarks.adaptation RUN [RUN...] [--data DIR] [--positions N] [--roundings nearest,...] [--ways sgd,...]
        [--scores FILE.jsonl]

Each RUN is a run directory with its final weights, usually one a seed. Every quantiser rounds the same weights, on quantile
grids of each row's own or over the floor that the public scripts have, and without a cap; every way of learning starts from the same rounded model and is scored by the configuration's
protocol, each chunk before it is learned from. `before` learns from the validation text *before* rounding, against the
rules of the challenge (condition 3): it is here because a public table has it. Prints a page in Markdown. With `--scores` every
score is appended to that file as well, what it has already is not measured again, and the contrasts at the end are of all
scores in it: seeds and roundings may be measured on several GPUs or side by side on one, one process each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.quantization import Bench
from orchestrator.cells import as_markdown
from orchestrator.factors import Factor
from orchestrator.interactions import KINDS, MAIN, cells_table, contrasts, contrasts_table
from trainer import artifact, protocol
from trainer.attention import fastest_kernels
from trainer.by_document import Documents, evaluate_documents
from trainer.calibration import Calibration, calibrate
from trainer.config import Config, TTTConfig, with_knobs
from trainer.data import BOS
from trainer.evaluate import Evaluation, plan_windows
from trainer.evaluate import evaluate as judge
from trainer.graphs import Recorded
from trainer.main import build_model
from trainer.model import Model
from trainer.quantize import corrected, quantize
from trainer.train import order_seed
from trainer.ttt import ChunkAdapter, DocumentAdapter

ROUNDINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "nearest": ("round to nearest, int6", {"method": "rtn"}),
    "gptq": ("GPTQ, int6", {"method": "gptq"}),
    "gptq5": ("GPTQ, int5", {"method": "gptq", "attention_bits": 5, "mlp_bits": 5}),
    "script": ("round to nearest on the scripts' grid, int6", {"method": "rtn", "clip_floor": 1.0}),
    "script-gptq": ("GPTQ on the scripts' grid, int6", {"method": "gptq", "clip_floor": 1.0}),
    "script-gptq5": (
        "GPTQ on the scripts' grid, int5",
        {"method": "gptq", "attention_bits": 5, "mlp_bits": 5, "clip_floor": 1.0},
    ),
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
        self.kept: dict[TTTConfig, dict[str, torch.Tensor]] = {}
        self.found = self.moments(self.state)

    def moments(self, state: dict[str, torch.Tensor]) -> Calibration:
        """What GPTQ has to know of these weights."""
        self.model.load_state_dict(state)
        config = with_knobs(self.config, {"quant.method": "gptq", "quant.grid": "quantile"})
        order = order_seed(config, self.seed)
        return calibrate(
            self.model, self.dataset, config=config, order_seed=order, recurrent=self.recurrent, world=self.world
        )

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
        """What a reader of the model file has of these weights; the file itself is exact, and is not written."""
        quant = dataclasses.replace(self.config.quant, **{"grid": "quantile", "clip_floor": 0.0, **knobs})
        found = Calibration()
        if quant.method == "gptq":
            found = self.found if state is self.state else self.moments(state)
        self.model.load_state_dict(state)
        return corrected(artifact.ModelFile({}, quantize(self.model, found, quant).tensors).state())

    def learned(self, ttt: TTTConfig) -> dict[str, torch.Tensor]:
        """The weights after learning from the whole split, before any rounding; learned once for all roundings."""
        if ttt not in self.kept:
            model = self.fresh(self.state)
            self.judged(model, ttt)
            self.kept[ttt] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        return self.kept[ttt]


@dataclasses.dataclass(frozen=True)
class Row:
    """What one cell scored on one seed."""

    seed: int
    rounding: str
    way: str
    bpb: float
    against: float
    """Without learning, by the same protocol."""

    seconds: float

    def __str__(self) -> str:
        title = WAYS[self.way][0] if self.way != NONE else NONE
        gain = f"{1e3 * (self.bpb - self.against):+.2f}" if self.way != NONE else ""
        return (
            f"| {self.seed} | {ROUNDINGS[self.rounding][0]} | {title} | {self.bpb:.5f} | {gain} | {self.seconds:.1f} |"
        )


NONE = "none"
HEAD = """| seed | rounding | learning | BPB | gain, mBPB | seconds |
|---|---|---|---|---|---|"""


def rows(bench: Learner, roundings: list[str], ways: list[str], known: Mapping[tuple[str, str], Row]) -> Iterator[Row]:
    """Every rounding, without learning and with every way of it, but for the cells that are known."""
    for rounding in roundings:
        wanted = [way for way in ways if (rounding, way) not in known]
        if not wanted and (rounding, NONE) in known:
            continue
        knobs = ROUNDINGS[rounding][1]
        state = bench.rounded(bench.state, knobs)
        if (rounding, NONE) in known:
            plain = known[rounding, NONE].bpb
        else:
            score = bench.judged(bench.fresh(state)).score
            plain = score.bpb
            yield Row(bench.seed, rounding, NONE, plain, plain, score.seconds)
        for way in wanted:
            ttt, against = dataclasses.replace(bench.config.ttt, **WAYS[way][1]), plain
            started = time.perf_counter()
            if way == "before":
                found = bench.judged(bench.fresh(bench.rounded(bench.learned(ttt), knobs))).score.bpb
            elif way == "document":
                against, found = bench.by_document(state, ttt)
            else:
                found = bench.judged(bench.fresh(state), ttt).score.bpb
            yield Row(bench.seed, rounding, way, found, against, time.perf_counter() - started)


def summary(found: list[Row]) -> Iterator[str]:
    """Cells and contrasts over the seeds. Learning by documents is left out: it is scored by another protocol."""
    kept = [row for row in found if row.way != "document"]
    levels = [
        tuple(level for level in named if any(getattr(row, name) == level for row in kept))
        for name, named in (("rounding", ROUNDINGS), ("way", (NONE, *WAYS)))
    ]
    factors = [
        Factor(name=name, levels={level: {} for level in found})
        for name, found in zip(("rounding", "learning"), levels, strict=True)
    ]
    scores: dict[tuple[str, ...], dict[int, float]] = {(one, two): {} for one in levels[0] for two in levels[1]}
    for row in kept:
        scores[row.rounding, row.way][row.seed] = row.bpb
    shown = contrasts(factors, scores)
    for table in (cells_table(factors, scores), *(contrasts_table(kind, shown) for kind in KINDS if kind != MAIN)):
        yield f"\n{as_markdown(table)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--data", type=Path, help="data set; default the run's own")
    parser.add_argument("--positions", type=int, default=10**9, help="validation targets to score, at most")
    parser.add_argument("--roundings", default=",".join(ROUNDINGS))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--scores", type=Path, metavar="FILE", help="keep every score here, as JSON lines")
    options = parser.parse_args()
    found = scores_in(options.scores)
    if not options.runs and not found:
        parser.error("name a RUN, or --scores FILE with scores of earlier ones")
    with fastest_kernels():
        print(HEAD)
        for run in options.runs:
            bench = Learner(protocol.RunDir(run), options.data, options.positions)
            known = {(row.rounding, row.way): row for row in found if row.seed == bench.seed}
            for row in rows(bench, options.roundings.split(","), options.ways.split(","), known):
                found.append(row)
                print(row, flush=True)
                if options.scores:
                    with options.scores.open("a") as file:
                        file.write(json.dumps(dataclasses.asdict(row)) + "\n")
    print("\n".join(summary(scores_in(options.scores) or found)))


def scores_in(file: Path | None) -> list[Row]:
    """What has been measured so far, by this process and others."""
    return [Row(**json.loads(line)) for line in file.read_text().splitlines()] if file and file.exists() else []


if __name__ == "__main__":
    main()
