"""Measures: what a run takes beside its score, by the names that constraints, further objectives and reports use."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.protocol import Result

ARTIFACT_BYTES, TRAIN_SECONDS, EVAL_SECONDS, PEAK_MEMORY_BYTES, TOKENS_PER_SECOND = MEASURES = (
    "artifact_bytes", "train_seconds", "eval_seconds", "peak_memory_bytes", "tokens_per_second",
)  # fmt: skip
MINIMIZABLE = (ARTIFACT_BYTES, TRAIN_SECONDS, EVAL_SECONDS, PEAK_MEMORY_BYTES)
LEAST = frozenset({TOKENS_PER_SECOND})
"""Measures of which a limit is the least that is allowed."""

UNITS = {
    ARTIFACT_BYTES: "bytes", TRAIN_SECONDS: "s", EVAL_SECONDS: "s", PEAK_MEMORY_BYTES: "bytes",
    TOKENS_PER_SECOND: "tokens/s",
}  # fmt: skip


def measures_of(results: Sequence[Result], objective: str) -> dict[str, float]:
    """The measures of one configuration: of its seeds the worst, since a limit holds for each of them.

    `eval_seconds` are those of the objective's stage. What no seed has measured is left out, as the memory of a run on
    the CPU.
    """
    columns = {
        ARTIFACT_BYTES: [float(result.artifact_bytes) for result in results if result.artifact_bytes],
        TRAIN_SECONDS: [result.train_seconds for result in results],
        EVAL_SECONDS: [result.scores[objective].seconds for result in results if objective in result.scores],
        PEAK_MEMORY_BYTES: [float(result.peak_memory_bytes) for result in results if result.peak_memory_bytes],
        TOKENS_PER_SECOND: [r.tokens / r.train_seconds for r in results if r.tokens and r.train_seconds],
    }
    worst = {name: min if name in LEAST else max for name in columns}
    return {name: worst[name](values) for name, values in columns.items() if values}


def excess(name: str, value: float, limit: float) -> float:
    """By how much a measure breaks its limit, in its own unit; at most 0 where it keeps it."""
    return limit - value if name in LEAST else value - limit
