"""What is known of published records without their folders: scores by seed, and the splits that scores divide by."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError
from orchestrator.evidence import ScoredArm, SeedScore
from orchestrator.statistics import summary_of
from orchestrator.units import Split
from trainer.config import nearest

SHIPPED = Path(__file__).with_name("published.toml")
PREFIXES = ("pr", "#")
"""How people write a pull request's number."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """One record, as somebody published it."""

    number: str
    """Of its pull request, with a suffix where it has several sets of runs."""

    title: str
    split: str
    date: str
    source: str
    arm: ScoredArm


def find_published(text: str) -> Published | None:
    """The record that a text like pr1493 or #1493 names; None for another kind of text. Raises ConfigError."""
    prefix = next((prefix for prefix in PREFIXES if text.lower().startswith(prefix)), "")
    number = text[len(prefix) :].lower()
    if not prefix or not number[:1].isdigit():
        return None
    known = published_records()
    if number not in known:
        raise ConfigError(
            f"no scores are known of pull request {number}", hint=f"{nearest(number, known)}; or import its folder"
        )
    return known[number]


def known_split(name: str) -> Split:
    """A published validation split. Raises ConfigError with the nearest name."""
    tables = _tables()["split"]
    if name not in tables:
        raise ConfigError(f"no tokens and bytes are known of a split {name!r}", hint=nearest(name, tables))
    table = tables[name]
    return Split(tokens_per_byte=table["tokens"] / table["bytes"], source=f"{name}: {table['source']}")


def published_split(text: str) -> Split | None:
    """The split that the record named by a text is known to be scored on; None for another text."""
    found = find_published(text)
    return known_split(found.split) if found else None


@cache
def published_records() -> dict[str, Published]:
    """Every known record by its number."""
    return {number: _record(number, table) for number, table in _tables()["record"].items()}


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(SHIPPED.read_text(encoding="utf-8"))


def _record(number: str, table: dict[str, Any]) -> Published:
    nats, stated = table.get("nats", {}), table.get("stated")
    scores = tuple(
        SeedScore(seed=int(seed), bpb=bpb, nats_per_token=nats.get(seed), source=table["source"])
        for seed, bpb in table.get("scores", {}).items()
    )
    arm = ScoredArm(
        name=f"#{number}", scores=scores, stage=table["stage"], started=table.get("started"),
        stated=summary_of(stated["count"], stated["mean"], stated.get("std")) if stated else None,
        problems=(f"the values by seed are not known, only their mean: {table['source']}",) if stated else (),
    )  # fmt: skip
    fields = {name: table[name] for name in ("title", "split", "date", "source")}
    return Published(number=number, arm=arm, **fields)
