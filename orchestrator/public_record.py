"""A published record as it was read: its seeds with their scores and places, and what speaks against them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from orchestrator.evidence import ScoredArm, SeedScore
from orchestrator.public_log import LoggedRun, ScoreLine
from orchestrator.statistics import Summary, summarize
from orchestrator.submission import Claim, Submission

FILE_SEED = re.compile(r"(?:seed|_s)[_-]?(\d+)(?=\D|$)|_(\d+)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Places that say different things, or one that says what cannot be."""

    what: str
    said: tuple[tuple[str, str], ...]
    """Place (file, and line or JSON pointer) and what stands there."""

    def __str__(self) -> str:
        return f"{self.what}: " + "; ".join(f"{place} says {text}" for place, text in self.said)


@dataclass(frozen=True, kw_only=True)
class RecordedSeed:
    """One seed of a record: its score with the line and the reason, or why there is none."""

    seed: int | None
    """As the record counts it; None where nothing names it."""

    run: LoggedRun | None
    """The log of its training, or of the evaluation where there is no other."""

    scored: LoggedRun | None
    """The log that has the score: of an evaluation of its own, or the same."""

    score: ScoreLine | None
    why: str
    """Why this line is the score; without a score, why it is refused."""

    @property
    def place(self) -> str:
        """File and line of the score; empty without one."""
        return f"{self.scored.file}:{self.score.line}" if self.scored and self.score else ""

    @property
    def steps(self) -> int | None:
        return self.run.number("steps") if self.run else None

    @property
    def total_bytes(self) -> int | None:
        """Bytes of code and model by the log's labelled total."""
        return self.run.number("total_bytes") if self.run else None

    def stage(self, name: str) -> ScoreLine | None:
        """The last line of a stage, in the log of the score first."""
        logs = [log for log in (self.scored, self.run) if log]
        return next((score for log in logs for score in reversed(log.scores) if score.stage == name), None)


@dataclass(frozen=True, kw_only=True)
class PublicRecord:
    """A record folder, read."""

    name: str
    folder: str
    """Where it was read from."""

    about: dict[str, str]
    """author, github_id, name, date and track, where submission.json has them."""

    submission: Submission | None
    seeds: tuple[RecordedSeed, ...]
    others: tuple[LoggedRun, ...]
    """Runs in the folder that the record does not submit."""

    disclosed: tuple[tuple[int, Claim], ...]
    """Scores that submission.json tells of and does not submit, and for which there is no log."""

    conflicts: tuple[Conflict, ...]
    """Where two places disagree."""

    doubts: tuple[Conflict, ...]
    """What speaks against a score although nothing contradicts it: limits, parts of the split, byte counts."""

    notes: tuple[str, ...]

    @property
    def scores(self) -> list[float]:
        """Bits per byte of the seeds that have a score, in full precision."""
        return [seed.score.bpb for seed in self.seeds if seed.score]

    @property
    def summary(self) -> Summary:
        return summarize(self.scores)

    @property
    def stage(self) -> str:
        """Stage that was submitted; `mixed` where seeds differ, empty without a score."""
        stages = {seed.score.stage for seed in self.seeds if seed.score}
        return next(iter(stages)) if len(stages) == 1 else "mixed" if stages else ""

    @property
    def refused(self) -> tuple[RecordedSeed, ...]:
        return tuple(seed for seed in self.seeds if seed.score is None)

    @property
    def most_bytes(self) -> int | None:
        """The largest labelled total of its seeds."""
        return max((size for seed in self.seeds if (size := seed.total_bytes) is not None), default=None)

    @property
    def date(self) -> str:
        """Day of the submission: the file's, else the folder's; empty without one."""
        found = re.match(r"\d{4}-\d{2}-\d{2}", self.about.get("date", "")) or re.match(r"\d{4}-\d{2}-\d{2}", self.name)
        return found[0] if found else ""


def file_seed(file: str) -> int | None:
    """Seed that a log's name tells; None without one."""
    found = list(FILE_SEED.finditer(Path(file).stem))
    return int(found[-1][1] or found[-1][2]) if found else None


def told(score: ScoreLine) -> str:
    return f"{score.label} {score.bpb:.{score.digits}f}"


def scored_arm(record: PublicRecord, *, prefix: str = "") -> ScoredArm:
    """The record as a comparison sees it; `prefix` is the folder of its files under CADDIE_HOME."""
    scores = tuple(
        SeedScore(
            seed=seed.seed, bpb=seed.score.bpb, nats_per_token=seed.score.loss, steps=seed.steps,
            train_seconds=seed.run.seconds("train_seconds") if seed.run else None, eval_seconds=seed.score.seconds,
            artifact_bytes=seed.total_bytes, source=f"{prefix}{seed.scored.file}", line=seed.score.line,
        )
        for seed in record.seeds if seed.score and seed.scored
    )  # fmt: skip
    missing = tuple(f"seed {seed.seed}: {seed.why}" for seed in record.refused)
    started = len(record.seeds) + len({seed for seed, _ in record.disclosed}) + len(unsubmitted(record))
    return ScoredArm(
        name=record.name, scores=scores, stage=record.stage, missing=missing, started=started,
        problems=tuple(str(found) for found in (*record.conflicts, *record.doubts)),
    )  # fmt: skip


def unsubmitted(record: PublicRecord) -> list[LoggedRun]:
    """Runs in the folder of the very configuration that was submitted, which are not among its seeds."""
    runs = [seed.run for seed in record.seeds if seed.run and seed.score]
    return [
        log for log in record.others
        if log.has_trained and any(log.configuration == run.configuration and log.chosen == run.chosen for run in runs)
    ]  # fmt: skip
