"""Units of a score: nats per token and bits per byte, which a split's own tokens and bytes turn into one another."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.evidence import SeedScore

SAME_SPLIT = 1e-4
"""Relative difference of tokens per byte below which two scores count as of one split: windows and rounding of published
losses move the fourth digit after the first at most, another tokenizer the second."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """What a score was divided by."""

    tokens_per_byte: float
    source: str = ""
    """Where the two counts come from."""

    @property
    def nats_per_bpb(self) -> float:
        """Nats per token in one bit per byte."""
        return math.log(2) / self.tokens_per_byte

    def bpb(self, nats_per_token: float) -> float:
        return nats_per_token / self.nats_per_bpb

    def nats(self, bpb: float) -> float:
        return bpb * self.nats_per_bpb


def split_of(scores: Iterable[SeedScore]) -> Split | None:
    """The split that scores were taken on, by their own losses; None where none has both units, or they disagree."""
    found = [
        (score.bpb * math.log(2) / score.nats_per_token, score)
        for score in scores
        if score.nats_per_token and score.bpb
    ]
    if not found:
        return None
    first, score = found[0]
    if any(abs(ratio / first - 1) > SAME_SPLIT for ratio, _ in found):
        return None
    place = f"{score.source}:{score.line}" if score.line else score.source
    return Split(tokens_per_byte=first, source=place)
