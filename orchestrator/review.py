"""The review of a submission folder: what somebody who received it would check, by the folder alone.

What runs of ours add to that (a clean-room evaluation of the very script that is shipped) comes in as evidence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.checks import FAILED, PASSED, UNDECIDED, Check, Rule, Value, is_at_most, judged, undecided
from orchestrator.disagreements import LIMITS, README
from orchestrator.errors import ProtocolError
from orchestrator.findings import check_table, failed_lines, undecided_lines
from orchestrator.log_text import SOURCE_HASH
from orchestrator.public_log import LoggedRun
from orchestrator.public_record import PublicRecord, RecordedSeed
from orchestrator.record_folder import read_record
from trainer.protocol import RunDir, sha256_of

SEEDS = 3  # of one configuration, for a row of the leaderboard (#2124)
REQUIREMENTS = "requirements.txt"

MAKE_AGAIN = "make the folder again: caddie package; nothing in it is written by hand"
FILES = Rule("files", "README.md, submission.json, the script and a log a seed must be there", MAKE_AGAIN)
COMPILES = Rule("script.compiles", "the script must compile", MAKE_AGAIN)
NEEDS = Rule("script.requirements", "a script that imports packages must come with their list", f"add {REQUIREMENTS}")
COUNT = Rule(
    "seeds.count", "a record needs three seeds of one configuration", "run more seeds: caddie run PRESET --seeds"
)
SCORED = Rule(
    "seeds.scored", "every seed that is claimed must have its score in a log", "add the logs, or claim what they say"
)
SOURCE = Rule(
    "seeds.source",
    "every log must name the hash of the shipped script",
    "the logs are of another script, or do not say: package the runs of this one",
)
CODE_BYTES = Rule("size.code", "a log must count the bytes of the script that is shipped", MAKE_AGAIN)
TOTAL = Rule("size.total", "script and model must be the log's total", MAKE_AGAIN)
CAP = Rule(
    "size.cap",
    "the largest artifact must not exceed the cap",
    "it cannot be submitted: free bytes (quant.*), and run its seeds again",
)
CLAIMED_SIZE = Rule("size.claimed", "submission.json must give the largest artifact", MAKE_AGAIN)
HEADLINE = Rule("score.headline", "submission.json must give the mean of the logs", MAKE_AGAIN)
TRAINING = Rule(
    "limits.training", "training must keep its limit", "run it with limits.train_seconds as the challenge has it"
)
SCORING = Rule("limits.evaluation", "evaluation must keep its limit", "raise evaluation.stride, or lower ttt.epochs")
CONFLICTS = Rule("conflicts", "logs, submission.json and README must say the same", MAKE_AGAIN)
RAN = Rule(
    "evaluation.ran",
    "the shipped script must have scored the model file on its own",
    "caddie package RECORD --verify scores each seed in an empty directory",
)

IMPORT = re.compile(
    r"^\s*(?:import|from)\s+(torch|numpy|sentencepiece|brotli|constriction|triton|flash_attn)\b", re.MULTILINE
)


@dataclass(frozen=True)
class Evaluated:
    """Evidence that a seed's model file was scored by a script: the verdict, and the hash of the script."""

    seed: int
    verdict: str
    source_sha256: str
    path: str
    """Of the verdict's file."""


@dataclass(frozen=True, kw_only=True)
class Review:
    """All that was found of one folder."""

    folder: Path
    record: PublicRecord
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == FAILED)

    @property
    def exit_code(self) -> int:
        return ProtocolError.exit_code if self.failed else 0


def review(folder: Path, *, evaluated: Sequence[Evaluated] = (), seeds: int = SEEDS) -> Review:
    """Check a folder; `seeds` is how many it needs. Raises nothing for what is wrong with it: that is a check that failed."""
    record = read_record(folder)
    checks = [
        *_files(folder, record), *_script(folder), *_seeds(folder, record, seeds), *_sizes(folder, record),
        *_claims(folder, record), *_limits(folder, record), *_evaluations(folder, record, evaluated),
    ]  # fmt: skip
    return Review(folder=folder, record=record, checks=tuple(checks))


def _files(folder: Path, record: PublicRecord) -> Iterator[Check]:
    expected = [README, *([record.submission.file] if record.submission else ["submission.json"]), script(folder).name]
    missing = [name for name in expected if not (folder / name).is_file()]
    missing += [] if any(seed.run for seed in record.seeds) else ["a log"]
    yield judged(FILES, "all", ", ".join(missing) + " missing" if missing else "all", folder)


def script(folder: Path) -> Path:
    """The script of a folder."""
    return RunDir(folder).bundle


def _script(folder: Path) -> Iterator[Check]:
    path = script(folder)
    if not path.is_file():
        return
    source = path.read_bytes()
    try:
        compile(source, str(path), "exec")
        found: Value = "compiles"
    except (SyntaxError, ValueError) as error:
        found = f"line {getattr(error, 'lineno', 0)}: {error}"
    yield judged(COMPILES, "compiles", found, path)
    needs = bool(IMPORT.search(source.decode("utf-8", errors="replace"))) or b"lzma" in source
    if needs:
        yield judged(NEEDS, "a list", "a list" if (folder / REQUIREMENTS).is_file() else "none", folder / REQUIREMENTS)


def _seeds(folder: Path, record: PublicRecord, seeds: int) -> Iterator[Check]:
    yield judged(COUNT, f"at least {seeds}", len(record.seeds), folder, holds=lambda _, found: found >= seeds)
    refused = [f"{seed.seed}: {seed.why}" for seed in record.refused]
    yield judged(SCORED, "every seed", "; ".join(refused) or "every seed", folder)
    path = script(folder)
    if path.is_file():
        for seed in record.seeds:
            if seed.run:
                told = seed.run.settings.get(SOURCE_HASH)
                yield judged(SOURCE, sha256_of(path), told, folder / seed.run.file, name=f"{SOURCE.name}.{seed.seed}")


def _sizes(folder: Path, record: PublicRecord) -> Iterator[Check]:
    path = script(folder)
    shipped = path.stat().st_size if path.is_file() else None
    for seed, run in _runs(record):
        log = folder / run.file
        model, total = run.number("model_bytes"), run.number("total_bytes")
        yield judged(CODE_BYTES, shipped, run.number("code_bytes"), log, name=f"{CODE_BYTES.name}.{seed.seed}")
        together = None if shipped is None or model is None else shipped + model
        yield judged(TOTAL, together, total, log, name=f"{TOTAL.name}.{seed.seed}")
    yield judged(CAP, LIMITS.artifact_bytes, record.most_bytes, folder, holds=is_at_most)
    if record.submission:
        claim = record.submission.size
        claimed = None if claim is None else int(claim.value)
        yield judged(CLAIMED_SIZE, record.most_bytes, claimed, folder / record.submission.file)


def _runs(record: PublicRecord) -> Iterator[tuple[RecordedSeed, LoggedRun]]:
    yield from ((seed, seed.run) for seed in record.seeds if seed.run)


def _claims(folder: Path, record: PublicRecord) -> Iterator[Check]:
    if record.submission is None:
        return
    path, claim, center = folder / record.submission.file, record.submission.headline, record.summary.mean
    yield judged(
        HEADLINE, center, None if claim is None else float(claim.value), path,
        holds=lambda expected, _: claim is not None and claim.is_met_by(expected), tolerance=float(claim.unit_in_last_place) if claim else None,
    )  # fmt: skip
    told = [str(conflict) for conflict in record.conflicts]
    yield judged(CONFLICTS, "nothing", "; ".join(told) or "nothing", folder)


def _limits(folder: Path, record: PublicRecord) -> Iterator[Check]:
    for seed, run in _runs(record):
        log = folder / run.file
        yield judged(
            TRAINING, LIMITS.train_seconds, run.seconds("train_seconds"), log, holds=is_at_most,
            name=f"{TRAINING.name}.{seed.seed}",
        )  # fmt: skip
        scoring = run.seconds("eval_seconds") or (seed.score.seconds if seed.score else None)
        yield judged(SCORING, LIMITS.eval_seconds, scoring, log, holds=is_at_most, name=f"{SCORING.name}.{seed.seed}")


def _evaluations(folder: Path, record: PublicRecord, evaluated: Sequence[Evaluated]) -> Iterator[Check]:
    """Whether each seed's model was scored by the shipped script alone; without evidence nobody knows."""
    by_seed = {found.seed: found for found in evaluated}
    path = script(folder)
    shipped = sha256_of(path) if path.is_file() else ""
    for seed in record.seeds:
        found = by_seed.get(seed.seed) if seed.seed is not None else None
        verdict = found.verdict if found and found.source_sha256 == shipped else None
        check = judged(RAN, PASSED, verdict, Path(found.path) if found else folder, name=f"{RAN.name}.{seed.seed}")
        yield replace(check, note="no verdict on this script is at hand") if check.status == UNDECIDED else check


def without_hardware(found: Review) -> Review:
    """The review of a folder for a track without limits of time: what speaks of them decides nothing there."""
    timed = (TRAINING.name, SCORING.name)
    checks = [
        undecided(check, "this track has no limit of time") if check.name.startswith(timed) else check
        for check in found.checks
    ]
    return replace(found, checks=tuple(checks))


def as_text(found: Review) -> str:
    """The table of all checks, and the verdict in one sentence."""
    failed, count = len(found.failed), len(found.checks)
    passed = sum(check.status == PASSED for check in found.checks)
    verdict = f"NOT READY, {failed} of {count} checks failed" if failed else f"ready, {passed} of {count} checks passed"
    return "\n".join([*check_table(found.checks), "", f"{found.folder}: {verdict}"])


def failures(found: Review) -> list[str]:
    """Every failure in full, and what is open."""
    return failed_lines(found.checks) + undecided_lines(found.checks)
