"""The chain of scored chunks, replayed: what an attempt's events say against the scores of its result.

Every chunk's sums are fixed in the event log before anything may learn from the chunk, each hashed together with all
before it; the result holds the last hash of each stage. Positions count in the order in which they are scored: the
split's own, or that of its documents by length. Pure functions on what was read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.protocol import COMPLETE, LEARNED, SCORED, TTT, Result, Score, first_link, next_link

UNCHAINED = ("kind", "t", "chain")  # fields of a scored event that its link does not cover
WHOLE = ("chunk", "first", "last", "tokens", "bytes")
LEARNING = (TTT,)
"""Stages in which anything may be learned from what was scored."""


@dataclass
class StageReplay:
    """What one stage's events came to, one after the other."""

    stage: str
    link: str
    end: int = 0
    """Positions that have been scored."""

    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    """First position of each scored chunk, and the one after its last."""

    learned: set[int] = field(default_factory=set)
    nats: list[float] = field(default_factory=list)
    tokens: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)

    def hear(self, event: Mapping[str, Any]) -> None:
        """Take the stage's next event."""
        is_scored = event["kind"] == SCORED
        numbers = WHOLE if is_scored else WHOLE[:3]
        wrong = [name for name in numbers if type(event.get(name)) is not int]
        if is_scored:
            wrong += [name for name in ("nats",) if not isinstance(event.get(name), int | float)]
        if wrong:
            self._tell(event.get("chunk"), f"its {event['kind']} event lacks a number: {', '.join(wrong)}")
        elif is_scored:
            self._score(event)
        else:
            self._learn(event)

    def _score(self, event: Mapping[str, Any]) -> None:
        chunk, first, last = event["chunk"], event["first"], event["last"]
        found, expected = event.get("chain"), self._link_after(event)
        if found != expected:
            self._tell(chunk, f"the chain is broken: its link is {found}, what was logged gives {expected}")
        if chunk != len(self.spans):
            self._tell(chunk, f"it comes as the stage's number {len(self.spans)}")
        if first != self.end:
            fault = "leaves out" if first > self.end else "scores again"
            low, high = sorted((first, self.end))
            self._tell(chunk, f"it {fault} positions {low} to {high - 1}")
        if event["tokens"] != last - first or last <= first:
            self._tell(chunk, f"it counts {event['tokens']} tokens in positions {first} to {last - 1}")
        rounds = event.get("rounds")
        if rounds is not None and _total(rounds) != event["nats"]:
            self._tell(chunk, f"its rounds add up to {_total(rounds)!r} nats, it claims {event['nats']!r}")
        self.spans[chunk], self.end = (first, last), max(self.end, last)
        self.link = found if isinstance(found, str) else expected  # one break is one problem
        self.nats.append(event["nats"])
        self.tokens += event["tokens"]
        self.bytes += event["bytes"]

    def _link_after(self, event: Mapping[str, Any]) -> str:
        return next_link(self.link, {name: value for name, value in event.items() if name not in UNCHAINED})

    def _learn(self, event: Mapping[str, Any]) -> None:
        chunk, span = event["chunk"], (event["first"], event["last"])
        if self.stage not in LEARNING:
            self._tell(chunk, "something learned from it, in a stage that only scores")
        if chunk in self.learned:
            self._tell(chunk, "it was handed over to be learned twice")
        self.learned.add(chunk)
        if chunk not in self.spans:
            self._tell(chunk, f"it was learned before it was scored, positions {span[0]} to {span[1] - 1}")
        elif span != self.spans[chunk]:
            scored = self.spans[chunk]
            self._tell(
                chunk, f"positions {span[0]} to {span[1] - 1} were learned, {scored[0]} to {scored[1] - 1} scored"
            )

    def conclude(self, score: Score, last_link: str | None) -> None:
        """Compare with what the result claims of the stage."""
        if not self.spans:
            self.problems.append(f"{self.stage}: no chunk of it was logged as scored")
            return
        if self.link != last_link:
            self.problems.append(f"{self.stage}: the chain ends in {self.link}, the result holds {last_link}")
        sums = {"nats": _total(self.nats), "tokens": self.tokens, "bytes": self.bytes}
        for name, found in sums.items():
            if found != getattr(score, name):
                self.problems.append(
                    f"{self.stage}: its chunks add up to {found!r} {name}, the result claims {getattr(score, name)!r}"
                )

    def _tell(self, chunk: object, fault: str) -> None:
        self.problems.append(f"{self.stage}, chunk {chunk}: {fault}")


def _total(values: Any) -> float:
    """The sum as the trainer takes it, rounded once; not a number where these are no numbers."""
    try:
        return math.fsum(values)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def problems(events: Iterable[Mapping[str, Any]], result: Result) -> list[str]:
    """What the events of an attempt say against its result, in their order; empty where the evidence is whole.

    It is not whole where a link is not the hash of what was logged or the last one not the result's; where a chunk was
    learned before it was scored, or by a stage that only scores; where positions are left out or scored again; where
    the chunks do not add up to the score, to the last bit; where a stage has a score and no chunk, or, in a complete
    run, chunks and no score.
    """
    replays: dict[str, StageReplay] = {}
    for event in events:
        if event.get("kind") in (SCORED, LEARNED):
            stage = str(event.get("stage"))
            if stage not in replays:
                replays[stage] = StageReplay(stage, first_link(stage, result.artifact_sha256))
            replays[stage].hear(event)
    for stage, score in result.scores.items():
        replay = replays.setdefault(stage, StageReplay(stage, ""))
        replay.conclude(score, result.chains.get(stage))
    unclaimed = [stage for stage in replays if stage not in result.scores] if result.status == COMPLETE else []
    found = [problem for replay in replays.values() for problem in replay.problems]
    return [*found, *(f"{stage}: chunks were scored, the result has no such score" for stage in unclaimed)]
