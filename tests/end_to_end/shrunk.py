"""A preset in small: its own bundle and every technique as published, sizes that one core trains in seconds; and a
second look at what its run has left, by the readable source.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator import bundle, worker
from orchestrator.home import Home
from orchestrator.presets import load_preset
from orchestrator.runs import RunRequest, RunStore
from tests.trainer.make_data import VOCAB_SIZE
from tests.trainer.tiny import ALONE
from trainer import artifact
from trainer.artifact import ModelFile
from trainer.calibration import Calibration, calibrate
from trainer.config import Config, from_mapping, knob_value, with_knobs
from trainer.data import Dataset
from trainer.evaluate import Adapter, Scorer, Stream, evaluate, plan_windows
from trainer.gptq import Quantized
from trainer.main import build_model
from trainer.model import Model
from trainer.protocol import WEIGHTS, AttemptDir, DataDir, Result, RunDir, read_lines, read_result, read_spec, sha256_of
from trainer.quantize import fisher_steps
from trainer.slot import Slot
from trainer.train import order_seed
from trainer.ttt import ChunkAdapter

TIMEOUT_SECONDS = 500.0
ROWS = 32  # sequences in which single tokens are compared

SIZES: dict[str, Any] = {
    "model.vocab_size": VOCAB_SIZE, "model.width": 64, "model.rope_dims": 4, "model.value_embedding_dim": 8,
    "model.bigram_buckets": 50, "model.bigram_dim": 8,
    "data.tokens_per_step": 512, "data.sequence_length": 32, "data.micro_batch_sequences": 16,
    "schedule.recurrence_start_step": 2, "schedule.warmup_steps": 1, "schedule.log_every": 1,
    "optim.muon_momentum_ramp_steps": 10, "optim.ema_decay": 0.5,
    "quant.calibration_steps": 2, "quant.generated_sequences": 8, "quant.information_sequences": 8,
    "quant.brotli_quality": 5,
    "evaluation.sequence_length": 32, "evaluation.stride": 16, "ttt.chunk_tokens": 512, "ttt.batch_sequences": 8,
    "limits.train_seconds": 8.0, "limits.reserve_seconds": 0.2,
}  # fmt: skip
"""Sizes and lengths; no knob of a technique, but for how many steps its average and its ramp reach over."""

STEPS = {"schedule.steps": 24, "limits.train_seconds": 120.0}
"""Of a schedule that follows steps."""

CAPS = {("coarsen", "quantile"): 130_000, ("coarsen", "std"): 250_000, ("fill", "fisher"): 60_000}
"""By fit and grid: caps for which the grid has to be changed. Pruning takes off too little for one that all runs were over."""


def shrunk(config: Config) -> Config:
    """The configuration in small; what is off stays off."""
    cap = CAPS.get((config.quant.fit, config.quant.grid), config.limits.artifact_bytes)
    sizes = {**SIZES, **(STEPS if config.schedule.clock == "step" else {}), "limits.artifact_bytes": cap}
    return with_knobs(config, {knob: value for knob, value in sizes.items() if knob_value(config, knob)})


@dataclass(frozen=True)
class Finished:
    """A preset's run that has ended."""

    published: Config
    packed: bytes
    """The bundle of the published configuration."""

    run: RunDir
    attempt: AttemptDir

    @cached_property
    def config(self) -> Config:
        return from_mapping(read_spec(self.run.spec).config)

    @cached_property
    def result(self) -> Result:
        assert self.attempt.result.exists(), self.attempt.stderr.read_text()[-3000:]
        return read_result(self.attempt.result)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        return [event for _, event in read_lines(self.attempt.events)]

    def named(self, name: str) -> list[dict[str, Any]]:
        """Phases and warnings of a name."""
        return [event for event in self.events if event.get("name") == name]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The metric events that have a value of this name."""
        return [event for event in self.events if name in event.get("values", {})]

    @cached_property
    def file(self) -> ModelFile:
        return artifact.load(self.run.artifact.read_bytes(), str(self.run.artifact))

    @cached_property
    def quantized(self) -> dict[str, Quantized]:
        return {name: tensor for name, tensor in self.file.tensors.items() if isinstance(tensor, Quantized)}

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """What was quantised, in float32."""
        return artifact.decode(self.run.weights.read_bytes(), str(self.run.weights)).state()

    @property
    def recurrent(self) -> int:
        """Extra passes at the end of training."""
        return int(self.file.meta["recurrent"])

    @property
    def grid_factor(self) -> float:
        """How many times coarser the matrices' grid became, to the digits that are logged."""
        return next((float(event["grid_factor"]) for event in self.named("fitted")), 1.0)

    @cached_property
    def dataset(self) -> Dataset:
        spec = read_spec(self.run.spec)
        return Dataset.open(Path(spec.data_dir), self.config.model.vocab_size, spec.manifest_sha256)

    @cached_property
    def stream(self) -> Stream:
        tokens = self.dataset.validation_tokens()
        return Stream(tokens, self.dataset.byte_counts().bytes_of_targets(tokens[:-1], tokens[1:]))

    @cached_property
    def calibration(self) -> Calibration:
        """What quantisation knew of the weights, by the readable source."""
        config = self.config
        return calibrate(
            self.model(self.weights), self.dataset, config=config, order_seed=order_seed(config, self.result.seed),
            recurrent=self.recurrent, world=ALONE,
        )  # fmt: skip

    @cached_property
    def fisher_steps(self) -> dict[str, Tensor]:
        """Steps of the rows at which each weight adds the same loss, before the file was fitted."""
        return fisher_steps(self.model(self.weights), self.calibration, self.config.quant)

    def model(self, state: dict[str, Tensor], **changes: Any) -> Model:
        """A model of these weights, by the readable source; with knobs of its section changed, weights that it lacks are left."""
        config = with_knobs(self.config, {f"model.{name}": value for name, value in changes.items()})
        model = Model(config.model, train_length=config.data.sequence_length)
        left = model.load_state_dict(state, strict=not changes)
        assert not left.missing_keys
        return model.eval()

    def loss(self, state: dict[str, Tensor], *, stride: int, has_slot: bool = False) -> float:
        """Nats per token of the validation split by a model of these weights."""
        model = self.model(state)
        scorer = Slot(model, self.config.evaluation) if has_slot else model.nats
        return self._loss(scorer, stride=stride, chunk_tokens=self.stream.positions)

    def adapted_loss(self) -> float:
        """The same by the stored weights, which learn from each chunk after its score.

        Compiled as the run's were, on one core as it had: learning by SGD may amplify the rounding of other sums a thousandfold.
        """
        config, model = self.config, build_model(self.config, ALONE)
        model.load_state_dict(self.file.state())
        model.eval()
        adapter = ChunkAdapter(
            model, self.stream, config=config.ttt, length=config.evaluation.sequence_length, recurrent=self.recurrent,
            world=ALONE,
        )  # fmt: skip
        stride, chunk_tokens = config.evaluation.stride, config.ttt.chunk_tokens
        return self._loss(model.nats, stride=stride, chunk_tokens=chunk_tokens, adapter=adapter)

    def _loss(self, scorer: Scorer, *, stride: int, chunk_tokens: int, adapter: Adapter | None = None) -> float:
        config = self.config.evaluation
        return evaluate(
            scorer, self.stream, plan_windows(self.stream.positions, length=config.sequence_length, stride=stride),
            config=config, recurrent=self.recurrent, world=ALONE, chunk_tokens=chunk_tokens, adapter=adapter,
        ).score.loss  # fmt: skip

    @torch.no_grad()
    def nats(self, *, recurrent: int | None = None, **changes: Any) -> Tensor:
        """Nats of the first tokens of the validation split, by the trained model with some of it changed."""
        length = self.config.evaluation.sequence_length
        tokens, targets = self.stream.rows(torch.arange(ROWS * length).view(ROWS, length))
        passes = self.recurrent if recurrent is None else recurrent
        return self.model(self.weights, **changes).nats(tokens, targets, recurrent=passes, scored=length)


def run_preset(home: Home, name: str, data: Path) -> Finished:
    """Run a preset in small to its end, as a job would, from the bundle that is packed for its published configuration."""
    published = load_preset(name)
    request = RunRequest(
        preset=name, config=shrunk(published), seed=42, data_dir=str(data),
        manifest_sha256=sha256_of(DataDir(data).manifest),
    )  # fmt: skip
    return _run(home, request, published, bundle.build(published))


def run_again(finished: Finished, home: Home, **knobs: Any) -> Finished:
    """Quantise and score a finished run's weights again, with knobs changed, their dots written as `__`."""
    spec = read_spec(finished.run.spec)
    changed = with_knobs(finished.config, {knob.replace("__", "."): value for knob, value in knobs.items()})
    request = RunRequest(
        preset=spec.preset, config=changed, seed=spec.seed, data_dir=spec.data_dir, manifest_sha256=spec.manifest_sha256,
        source=finished.run.run_id, source_part=WEIGHTS, source_sha256=sha256_of(finished.run.weights),
    )  # fmt: skip
    return _run(home, request, finished.published, finished.packed)


def _run(home: Home, request: RunRequest, published: Config, packed: bytes) -> Finished:
    run = RunStore(home).plan(request, bundle=packed, code={})
    worker.run_attempt(str(run.root), 1, 1, "", TIMEOUT_SECONDS)
    return Finished(published, packed, run, run.attempt(1))
