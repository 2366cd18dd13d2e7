"""Whether somebody's script divides by the bytes that are there.

Two of its numbers, nats a token and bits a byte, imply the bytes of the text that it scored. The trainer counts the bytes of
the same targets on its own. A script that counts too many has a lower score for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import data_view
from orchestrator.cells import Link, Table, bpb, whole
from orchestrator.datasets import ask_trainer
from orchestrator.errors import CaddieError
from orchestrator.evidence import Evidence, RunEvidence
from orchestrator.home import Home
from orchestrator.tables import STAGE_NAMES
from trainer import protocol
from trainer.protocol import Score

TITLE = "Bytes behind the scores"
NEGLIGIBLE = 1e-5  # part of a score, a hundredth of a thousandth of a bit: a script that leaves out a window's end, say


@dataclass(frozen=True, kw_only=True)
class ByteCount:
    """The bytes that one score implies, beside those of the text."""

    arm: str
    seed: int
    stage: str
    score: Score
    counted: int
    """Bytes of the text behind as many targets, or behind the whole split where the score's are its."""

    targets: int
    """Targets that `counted` is of."""

    source: str
    """Path of the result under CADDIE_HOME."""

    @property
    def implied(self) -> float:
        """Bytes behind `targets` by the score's two values."""
        return implied_bytes(self.score, self.targets)

    @property
    def excess(self) -> float:
        """Part by which the score implies more bytes than there are."""
        return self.implied / self.counted - 1

    @property
    def is_equal(self) -> bool:
        """Whether the two are the same as far as the script's decimals tell."""
        return abs(self.excess) <= precision(self.score) + 1 / self.counted

    @property
    def problem(self) -> str:
        """What is wrong with the score, in a sentence; empty where nothing is that a comparison would notice."""
        if self.is_equal or abs(self.excess) <= NEGLIGIBLE:
            return ""
        return (
            f"{self.arm}, seed {self.seed}: the script divides by {self.implied:,.0f} bytes for its "
            f"{STAGE_NAMES[self.stage]} {bpb(self.score.bpb)}, the text behind its {self.targets:,} targets has "
            f"{self.counted:,} ({_share(self.excess)}): by these it is {bpb(self.score.bpb * (1 + self.excess))}."
        )


def implied_bytes(score: Score, targets: int) -> float:
    """Bytes behind so many targets, from nats a token and bits a byte."""
    return targets * score.loss / (math.log(2) * score.bpb)


def precision(score: Score) -> float:
    """The part by which the implied bytes may be off, since both values are printed with so many decimals."""
    return sum(0.5 * 10.0 ** -_decimals(value) / value for value in (score.loss, score.bpb))


def _decimals(value: float) -> int:
    text = repr(value)
    return 0 if "e" in text else len(text.partition(".")[2])


def byte_counts(home: Home, evidence: Evidence) -> list[ByteCount]:
    """Of every score of the arms' runs of a script; those that nothing can be said of are left out.

    That is where a log does not say how many tokens it scored, the data are gone or of several sets, the tokenizer is no
    SentencePiece model, or there is no trainer here to count.
    """
    if evidence.study.script is None:
        return []
    runs = [(arm.name, run) for arm in evidence.arms for run in arm.runs if run.result and any(_scores(run))]
    folders: dict[str, list[tuple[str, RunEvidence]]] = {}
    for name, run in runs:
        folders.setdefault(protocol.read_spec(home.run(run.run_id).spec).data_dir, []).append((name, run))
    return [
        count for folder, asking in folders.items()
        for count in _counted(asking, _ask(Path(folder), {s.tokens for _, run in asking for _, s in _scores(run)}))
    ]  # fmt: skip


def _scores(run: RunEvidence) -> list[tuple[str, Score]]:
    found = run.result.scores.items() if run.result else ()
    return [(stage, score) for stage, score in found if score.tokens and score.bpb > 0 and score.loss > 0]


def _ask(folder: Path, targets: Iterable[int]) -> Mapping[str, Any]:
    """The trainer's count; empty where it cannot be had."""
    try:
        files = data_view.validation_files(folder)
        if files is None:
            return {}
        shards, tokenizer = files
        wanted = [str(number) for number in sorted(targets)]
        return ask_trainer(["target-bytes", *map(str, shards), "--tokenizer", str(tokenizer), "--targets", *wanted])
    except (CaddieError, OSError):
        return {}


def _counted(asking: Sequence[tuple[str, RunEvidence]], found: Mapping[str, Any]) -> list[ByteCount]:
    """Of what a log's number of tokens can mean, whole windows or the split, the one that is nearer."""
    whole_split = [(int(found["targets"]), int(found["bytes"]))] if found else []
    first = {int(number): int(size) for number, size in found.get("first", {}).items()}
    counts = []
    for name, run in asking:
        for stage, score in _scores(run):
            is_split = found and score.tokens == found["targets"] + 1  # its first token counted, which is no target
            meant = [(score.tokens, first[score.tokens])] if score.tokens in first else []
            options = [
                ByteCount(
                    arm=name, seed=run.seed, stage=stage, score=score, counted=size, targets=number, source=run.source
                )
                for number, size in (*meant, *(whole_split if meant or is_split else ()))
                if size
            ]
            counts += [min(options, key=lambda option: abs(option.excess))] if options else []
    return counts


def table(counts: Sequence[ByteCount], *, has_sources: bool = True) -> Table:
    """What each score was divided by, beside the text."""
    columns = ("Run of", "Seed", "Score", "Targets", "By the score", "Of the text", "Difference")
    return Table(
        title=TITLE,
        columns=(*columns, "Source") if has_sources else columns,
        rows=tuple(
            (
                one.arm, str(one.seed), STAGE_NAMES[one.stage], whole(one.targets), whole(round(one.implied)),
                whole(one.counted), "none" if one.is_equal else _share(one.excess),
                *((Link(one.source),) if has_sources else ()),
            )
            for one in counts
        ),
        note="The bytes that nats per token and bits per byte of one score imply, and those that our trainer counts behind the "
        "same targets by the tokenizer: UTF-8 of the normalised text. none: equal within the decimals that are printed.",
    )  # fmt: skip


def as_record(counts: Sequence[ByteCount]) -> list[dict[str, Any]]:
    """The same as plain JSON values, in full precision."""
    return [
        {
            "arm": one.arm, "seed": one.seed, "stage": one.stage, "targets": one.targets, "implied_bytes": one.implied,
            "counted_bytes": one.counted, "excess": one.excess, "is_equal": one.is_equal, "source": one.source,
        }
        for one in counts
    ]  # fmt: skip


def _share(excess: float) -> str:
    return f"{excess:+.4%}".replace("-", "−")
