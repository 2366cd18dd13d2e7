"""A run of ours as a text log in the form that parsers of public records read (family B of `grammar`).

Every number is from the run's own events and result. Scores keep all their digits, so that reading the text gives the same
numbers again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trainer import protocol
from trainer.config import Config
from trainer.protocol import METRIC, TRAIN_LOSS, WARNING, Result, Spec

LEAST_DECIMALS = 8
"""Decimals in which public logs of this family give a score."""

SOURCE_HASH = "source_sha256"
"""Hyper-parameter line with the hash of the script that ran: seeds of one record must agree on it."""

LABELS = {
    protocol.POST_EMA: "pre-quantization post-ema",
    protocol.ROUNDTRIP: "quantized",
    protocol.SLIDING: "quantized_sliding_window",
}
BY_CHUNK, BY_DOCUMENT = "quantized_ttt", "quantized_ttt_lora"


def log_text(spec: Spec, config: Config, result: Result, events: Iterable[Mapping[str, Any]]) -> str:
    """The log of one complete run."""
    lines = [
        *_settings(spec, config, result), *_training(config, result, events), *_sizes(config, result), *_scores(config, result),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _settings(spec: Spec, config: Config, result: Result) -> Iterator[str]:
    values: dict[str, object] = {f"{part}_{k}": v for part, entries in spec.config.items() for k, v in entries.items()}
    values |= {
        "seed": result.seed, "world_size": result.world_size, "train_batch_tokens": config.data.tokens_per_step,
        "run_id": spec.run_id, "preset": spec.preset, "manifest_sha256": spec.manifest_sha256, SOURCE_HASH: spec.bundle_sha256,
        "device": result.device or "unknown",
    }  # fmt: skip
    yield "Hyperparameters:"
    yield from (f"  {name}: {_plain(values[name])}" for name in sorted(values))
    tokens = next((score.tokens for score in result.scores.values()), 0)
    yield from (f"val_tokens: {tokens}", f"model_params:{result.parameters}")


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _training(config: Config, result: Result, events: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A line a logged step, and the last step as the result has it."""
    planned, last = config.schedule.steps, 0
    for event in events:
        kind = event.get("kind")
        if kind == METRIC and TRAIN_LOSS in event["values"] and event["step"] < result.steps:
            last = event["step"]
            yield _step(last, planned, event["values"][TRAIN_LOSS], event["train_seconds"], config)
        elif kind == WARNING:
            told = ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("kind", "t"))
            yield f"warning: {told}"
    if result.final_train_loss is not None and last < result.steps:
        yield _step(result.steps, planned, result.final_train_loss, result.train_seconds, config)
    if result.steps < planned:
        yield (
            f"stopping_early: wallclock_cap train_time: {round(1000 * result.train_seconds)}ms step: {result.steps}/{planned}"
        )
    mebibytes = result.peak_memory_bytes // 2**20
    yield f"peak memory allocated: {mebibytes} MiB reserved: {mebibytes} MiB"


def _step(step: int, planned: int, loss: float, seconds: float, config: Config) -> str:
    rate = round(step * config.data.tokens_per_step / seconds) if seconds else 0
    return f"{step}/{planned} train_loss: {loss:.6f} train_time: {seconds / 60:.8f}m tok/s: {rate}"


def _sizes(config: Config, result: Result) -> Iterator[str]:
    form = f"quantized+{config.quant.coder}"
    yield f"Code size: {result.bundle_bytes} bytes"
    yield from (f"phase {name}: {seconds:.1f}s" for name, seconds in result.phases.items())
    yield f"Serialized model {form}: {result.model_bytes} bytes"
    yield f"Total submission size {form}: {result.artifact_bytes} bytes"


def _scores(config: Config, result: Result) -> Iterator[str]:
    labels = {**LABELS, protocol.TTT: BY_DOCUMENT if config.ttt.is_by_document else BY_CHUNK}
    for stage in protocol.STAGES:
        if score := result.scores.get(stage):
            yield (
                f"{labels[stage]} val_loss:{decimals(score.loss)} val_bpb:{decimals(score.bpb)} "
                f"eval_time:{round(1000 * score.seconds)}ms"
            )
    scored = [score.seconds for stage, score in result.scores.items() if stage != protocol.POST_EMA]
    yield f"total_eval_time:{sum(scored):.1f}s"


def decimals(value: float) -> str:
    """A number with every digit that it has, and no fewer decimals than public logs give."""
    text = repr(value)
    return f"{value:.{LEAST_DECIMALS}f}" if "e" in text or len(text.partition(".")[2]) < LEAST_DECIMALS else text
