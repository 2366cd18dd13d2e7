"""What a `submission.json` claims, whatever shape it has: the headline, the seeds' scores, sizes and seconds.

The file has no schema. The tables name the keys that public records use and the unit of each; a claim keeps the decimals
that were written, because a claim of four decimals cannot be wrong in the fifth.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from orchestrator.errors import ProtocolError

PATTERN = "submission*.json"

HEADLINE = ("val_bpb", "mean_val_bpb", "mean_bpb")
SEED_TABLES = ("seed_results", "seeds")
SEED_LIST, SEED_SCORES, ONE_SEED = "seeds", "seed_scores", "seed"
BPB, LOSS, SIZE, STEPS, TRAIN_SECONDS, EVAL_SECONDS = "bpb", "loss", "bytes", "steps", "train seconds", "eval seconds"

SEED_FIELDS: Mapping[str, tuple[tuple[str, Decimal], ...]] = {
    BPB: (("val_bpb", Decimal(1)),),
    LOSS: (("val_loss", Decimal(1)),),
    SIZE: (("artifact_bytes", Decimal(1)), ("bytes_total", Decimal(1))),
    STEPS: (("steps", Decimal(1)),),
    TRAIN_SECONDS: (("train_time_s", Decimal(1)), ("train_time_ms", Decimal("0.001"))),
    EVAL_SECONDS: (
        ("eval_time_s", Decimal(1)), ("ttt_eval_time_s", Decimal(1)), ("eval_time_ms", Decimal("0.001")),
        ("ttt_time_ms", Decimal("0.001")),
    ),
}  # fmt: skip
"""Fields of one seed: the keys that mean them, with what makes the unit of each."""

RECORD_SIZES = ("artifact_bytes_max", "bytes_total", "artifact_bytes", "artifact_size_bytes")
CODE_SIZES = ("bytes_code", "code_bytes")
PEOPLE = {
    "author": "author",
    "github_id": "github_id",
    "name": "name",
    "run_name": "name",
    "date": "date",
    "track": "track",
}


@dataclass(frozen=True)
class Claim:
    """A number as somebody wrote it."""

    value: Decimal
    place: str
    """JSON pointer, or the place in a text."""

    @property
    def unit_in_last_place(self) -> Decimal:
        return Decimal(1).scaleb(int(self.value.as_tuple().exponent))

    def is_met_by(self, measured: float) -> bool:
        """Whether the measured value, rounded or cut off, could have been written so."""
        return abs(self.value - Decimal(repr(measured))) < self.unit_in_last_place


@dataclass(frozen=True, kw_only=True)
class Submission:
    """All that a record's file says."""

    file: str
    about: dict[str, str]
    """author, github_id, name, date, track: those that it has."""

    headline: Claim | None
    """The score of the record; None where no key of HEADLINE is there."""

    loss: Claim | None
    size: Claim | None
    code_size: Claim | None
    seeds: dict[int, dict[str, Claim]]
    """Fields of each seed, by SEED_FIELDS; empty where the file has no table of seeds."""

    named_seeds: tuple[int, ...]
    """Seeds that it names, with or without results."""

    elsewhere: tuple[tuple[int, Claim], ...]
    """Scores of seeds under other keys: runs that it tells of and does not submit."""


def find_submission(files: list[Path]) -> Path | None:
    """The file that describes the record; None without one."""
    return next((path for path in sorted(files) if path.match(PATTERN)), None)


def read_submission(path: Path, name: str) -> Submission:
    """Read a record's file, called `name` in the answer; raises ProtocolError where it is no JSON object."""
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"), parse_float=Decimal, parse_int=Decimal)
    except (ValueError, OSError) as error:
        raise ProtocolError(f"{path}: not a JSON object: {error}", hint="the record needs a submission.json") from error
    if not isinstance(record, dict):
        raise ProtocolError(f"{path}: not a JSON object but a {type(record).__name__}")
    seeds = _seeds(record)
    return Submission(
        file=name, about={PEOPLE[key]: str(record[key]) for key in PEOPLE if isinstance(record.get(key), str)},
        headline=_first(record, HEADLINE, ""), loss=_first(record, ("val_loss", "mean_val_loss"), ""),
        size=_first(record, RECORD_SIZES, ""), code_size=_first(record, CODE_SIZES, ""), seeds=seeds,
        named_seeds=tuple(dict.fromkeys([*seeds, *_named(record)])), elsewhere=tuple(_elsewhere(record, "")),
    )  # fmt: skip


def headline_of(claimed: Submission | None) -> Claim | None:
    """The record's score; some wrote it where the loss belongs."""
    if claimed is None:
        return None
    return claimed.headline or claimed.loss


def _first(record: Mapping[str, Any], keys: tuple[str, ...], place: str) -> Claim | None:
    return next((Claim(record[k], f"{place}/{k}") for k in keys if isinstance(record.get(k), Decimal)), None)


def _seeds(record: Mapping[str, Any]) -> dict[int, dict[str, Claim]]:
    for key in SEED_TABLES:
        if isinstance(record.get(key), dict):
            return {
                int(seed): _fields(result, f"/{key}/{seed}")
                for seed, result in record[key].items() if seed.isdecimal() and isinstance(result, dict)
            }  # fmt: skip
    listed, scores = record.get(SEED_LIST), record.get(SEED_SCORES)
    if isinstance(listed, list) and isinstance(scores, list) and len(listed) == len(scores):
        return {
            int(seed): {BPB: Claim(score, f"/{SEED_SCORES}/{index}")}
            for index, (seed, score) in enumerate(zip(listed, scores, strict=True)) if isinstance(score, Decimal)
        }  # fmt: skip
    return {}


def _fields(result: Mapping[str, Any], place: str) -> dict[str, Claim]:
    found = {}
    for name, keys in SEED_FIELDS.items():
        for key, factor in keys:
            if name not in found and isinstance(result.get(key), Decimal):
                found[name] = Claim(result[key] * factor, f"{place}/{key}")
    return found


def _named(record: Mapping[str, Any]) -> Iterator[int]:
    listed = record.get(SEED_LIST)
    values = listed if isinstance(listed, list) else [record.get(ONE_SEED)]
    yield from (int(value) for value in values if isinstance(value, Decimal))


def _elsewhere(record: Mapping[str, Any], place: str) -> Iterator[tuple[int, Claim]]:
    """Scores by seed in tables further in."""
    for key, value in record.items():
        if not isinstance(value, dict) or (not place and key in SEED_TABLES):
            continue
        where = f"{place}/{key}"
        if value and place and all(name.isdecimal() for name in value):
            for seed, result in value.items():
                claim = result.get("val_bpb") if isinstance(result, dict) else result
                if isinstance(claim, Decimal):
                    yield int(seed), Claim(claim, f"{where}/{seed}")
        else:
            yield from _elsewhere(value, where)
