"""A record folder as others publish it: its logs, submission.json and README read together, and what they disagree on.

Which line of which log is the submitted score is never guessed. The order of stages (`grammar.LABELS`) proposes a line; what
submission.json claims must be that line, or say which other one it is. Where neither holds, the score is refused and the
reason says what was found instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from orchestrator import grammar, submission
from orchestrator.errors import ConfigError, ProtocolError
from orchestrator.evidence import ScoredArm, SeedScore
from orchestrator.places import lines_of
from orchestrator.public_log import LoggedRun, ScoreLine, read_log
from orchestrator.statistics import Summary, mean, summarize
from orchestrator.submission import Claim, Submission
from trainer.config import Config
from trainer.protocol import ROUNDTRIP, SLIDING, TTT

LOG_SUFFIXES = (".log", ".txt")
README = "README.md"
MOST_LOG_BYTES = 20_000_000
"""A larger file is no log of one run; the largest in merged records has a tenth of it."""

SLIP_BPB = 2e-4
"""A claim as near as this to one line, and to no other, means that line and was written down wrongly: less than the spread
of seeds, and far less than the distance of two stages.
"""

UNMISTAKABLE_BPB = Decimal("0.00001")
"""Last place of a claim that a log of another seed does not meet by chance: seeds differ by a hundred of these."""

LIMITS = Config().limits
CLOCK_SLACK_SECONDS = 0.5  # the loop's clock stops training after the step in which it passes the limit

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


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_record(folder: Path) -> bool:
    """Whether a folder is one record: it has a submission file, or a log of its own, at its top."""
    if any(folder.glob(submission.PATTERN)):
        return True
    return (folder / README).is_file() and any(path.suffix in LOG_SUFFIXES for path in folder.iterdir())


def find_records(folder: Path) -> list[Path]:
    """The record folders in a tree, or the folder itself. Raises ConfigError where there is none."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder", hint="name a record's folder, or a tree of them")
    if is_record(folder):
        return [folder]
    found: list[Path] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_dir()):
        if not any(path.is_relative_to(parent) for parent in found) and is_record(path):
            found.append(path)
    if not found:
        raise ConfigError(
            f"{folder}: no record is in it: no folder with a {submission.PATTERN}, or a {README} beside a log",
            hint="name a record's folder, or the records/ tree",
        )
    return found


def read_record(folder: Path, *, name: str = "") -> PublicRecord:
    """Read one record folder; what cannot be read is a note, and no reason to refuse the rest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".ipynb_checkpoints" not in path.parts)
    notes: list[str] = []
    claimed = _read_claims(folder, files, notes)
    logs = _distinct(list(_read_logs(folder, files, notes)), notes)
    seeds, conflicts = assign(logs, claimed)
    used = [log for seed in seeds for log in (seed.run, seed.scored) if log]
    others = tuple(log for log in logs if log not in used and (log.scores or log.has_trained))
    readme = _text(folder / README) if (folder / README).is_file() else ""
    notes += [] if readme else [f"there is no {README}"]
    record = PublicRecord(
        name=name or folder.resolve().name, folder=str(folder), about=claimed.about if claimed else {}, submission=claimed,
        seeds=tuple(seeds), others=others, disclosed=_disclosed(claimed, logs), conflicts=(), doubts=tuple(doubts_of(seeds)), notes=tuple(notes),
    )  # fmt: skip
    found = [*conflicts, *seed_conflicts(record), *record_conflicts(record), *readme_conflicts(record, readme)]
    return replace(record, conflicts=tuple(_with_lines(found, folder, claimed)))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _read_claims(folder: Path, files: list[Path], notes: list[str]) -> Submission | None:
    path = submission.find_submission([path for path in files if path.parent == folder])
    if path is None:
        notes.append(f"there is no {submission.PATTERN}")
        return None
    try:
        return submission.read_submission(path, path.name)
    except ProtocolError as error:
        notes.append(str(error))
        return None


def _read_logs(folder: Path, files: list[Path], notes: list[str]) -> Iterator[LoggedRun]:
    for path in files:
        if path.suffix not in LOG_SUFFIXES or path.stat().st_size > MOST_LOG_BYTES:
            continue
        found = read_log(_text(path), path.relative_to(folder).as_posix())
        if len(found) > 1:
            notes.append(
                f"{found[0].file} has {len(found)} runs, from lines {', '.join(str(r.first_line) for r in found)}"
            )
        yield from found


def _distinct(logs: list[LoggedRun], notes: list[str]) -> list[LoggedRun]:
    """The runs without copies; of two the one whose file names its seed."""
    kept: dict[tuple[object, ...], LoggedRun] = {}
    for log in logs:
        known = kept.get(log.fingerprint)
        if known is None:
            kept[log.fingerprint] = log
            continue
        first, copy = (
            (log, known) if file_seed(log.file) is not None and file_seed(known.file) is None else (known, log)
        )
        kept[log.fingerprint] = first
        notes.append(f"{copy.file} has the same run as {first.file}")
    return list(kept.values())


def file_seed(file: str) -> int | None:
    """Seed that a log's name tells; None without one."""
    found = list(FILE_SEED.finditer(Path(file).stem))
    return int(found[-1][1] or found[-1][2]) if found else None


def _disclosed(claimed: Submission | None, logs: list[LoggedRun]) -> tuple[tuple[int, Claim], ...]:
    if claimed is None:
        return ()
    scores = [score.bpb for log in logs for score in log.scores]
    submitted = {
        (seed, claim[submission.BPB].value) for seed, claim in claimed.seeds.items() if submission.BPB in claim
    }
    return tuple(
        (seed, claim) for seed, claim in claimed.elsewhere
        if (seed, claim.value) not in submitted and not any(claim.is_met_by(score) for score in scores)
    )  # fmt: skip


# ── which line is the score ─────────────────────────────────────────────────────────────────────────────────────────


def assign(logs: Sequence[LoggedRun], claimed: Submission | None) -> tuple[list[RecordedSeed], list[Conflict]]:
    """Every seed of the record with its score, or the reason for none; and where sources disagree on which it is."""
    by_seed = (
        {s: fields[submission.BPB] for s, fields in claimed.seeds.items() if submission.BPB in fields}
        if claimed
        else {}
    )
    if by_seed:
        return _assign_claimed(logs, by_seed, claimed.file if claimed else "")
    seeds, conflicts = _assign_headline(logs, claimed)
    named, known = claimed.named_seeds if claimed else (), {seed.seed for seed in seeds}
    if named and known == {None}:  # the record is refused as a whole: each seed that it names, for the same reason
        return [_refused(seed, seeds[0].why) for seed in named], conflicts
    missing = [_refused(seed, f"no log of seed {seed} is in the folder") for seed in named if seed not in known]
    return [*seeds, *missing], conflicts


def _assign_claimed(
    logs: Sequence[LoggedRun], by_seed: dict[int, Claim], file: str
) -> tuple[list[RecordedSeed], list[Conflict]]:
    seeds, conflicts = [], []
    for seed, claim in by_seed.items():
        own = [log for log in logs if seed in (log.number("seed"), file_seed(log.file))]
        found, conflict = _identify(own, claim, file)
        if found is None:
            found, conflict = _elsewhere(logs, own, claim, file)
        if found is None:
            seeds.append(_refused(seed, _why_refused(seed, own, claim, file)))
        else:
            log, score, why = found
            seeds.append(RecordedSeed(seed=seed, run=_training(log, own), scored=log, score=score, why=why))
        conflicts += [conflict] if conflict else []
    return seeds, conflicts


Found = tuple[LoggedRun, ScoreLine, str]


def _identify(
    logs: Sequence[LoggedRun], claim: Claim, file: str
) -> tuple[Found | None, Conflict | None]:  # fmt: skip
    """The one line that a claim means: the order's line, else another final one, else one that it misses by a slip."""
    proposed = [(log, log.submitted) for log in logs if log.submitted]
    place = f"{file}{claim.place}"
    met = _single([(log, score) for log, score in proposed if claim.is_met_by(score.bpb)])
    if met:
        return (*met, f"last {met[1].stage} line, and {place} claims it"), None
    final = [(log, score) for log in logs for score in log.scores if score.rank > 0]
    met = _single([(log, score) for log, score in final if claim.is_met_by(score.bpb)])
    if met:
        log, score = met
        rule = log.submitted
        assert rule is not None, "the log has a line of a rank above 0"
        conflict = Conflict(
            what="the submitted score is not the last stage of its log",
            said=((place, str(claim.value)), (f"{log.file}:{score.line}", _told(score)), (f"{log.file}:{rule.line}", _told(rule))),
        )  # fmt: skip
        return (
            log,
            score,
            f"{place} claims this {score.stage} line, not the log's last stage ({_told(rule)})",
        ), conflict
    met = _single([(log, score) for log, score in proposed if abs(score.bpb - float(claim.value)) <= SLIP_BPB])
    if met:
        log, score = met
        conflict = Conflict(
            what="the score was written down otherwise than it was logged",
            said=((place, str(claim.value)), (f"{log.file}:{score.line}", _told(score))),
        )  # fmt: skip
        return (log, score, f"last {score.stage} line; {place} claims {claim.value}, which no line has"), conflict
    return None, None


def _elsewhere(
    logs: Sequence[LoggedRun], own: Sequence[LoggedRun], claim: Claim, file: str
) -> tuple[Found | None, Conflict | None]:
    """A log that names another seed, or none, and has the very digits: only where they are too many for chance."""
    if claim.unit_in_last_place > UNMISTAKABLE_BPB:
        return None, None
    met = [
        (log, log.submitted) for log in logs if log not in own and log.submitted and claim.is_met_by(log.submitted.bpb)
    ]
    exact = _single(met)
    if exact is None:
        return None, None
    log, score = exact
    return (
        log,
        score,
        f"last {score.stage} line with the digits of {file}{claim.place}; the log names another seed",
    ), None


def _single(found: Sequence[tuple[LoggedRun, ScoreLine]]) -> tuple[LoggedRun, ScoreLine] | None:
    """The one found, also where several give exactly the same value; None where they differ."""
    return found[0] if found and len({score.bpb for _, score in found}) == 1 else None


def _told(score: ScoreLine) -> str:
    return f"{score.label} {score.bpb:.{score.digits}f}"


def _training(log: LoggedRun, own: Sequence[LoggedRun]) -> LoggedRun:
    """The training whose model an evaluation of its own scored: the one log of that seed with steps."""
    trained = [other for other in own if other.has_trained]
    return trained[0] if not log.has_trained and len(trained) == 1 else log


def _refused(seed: int | None, why: str) -> RecordedSeed:
    return RecordedSeed(seed=seed, run=None, scored=None, score=None, why=why)


def _why_refused(seed: int, own: Sequence[LoggedRun], claim: Claim, file: str) -> str:
    head = f"{file}{claim.place} claims {claim.value}"
    if not own:
        return f"{head}, and no log of seed {seed} is in the folder"
    lines = [f"{log.file}:{score.line} {_told(score)}" for log in own for score in log.scores if score.rank > 0]
    if not lines:
        return f"{head}, and {', '.join(log.file for log in own)} ends without a line of a final score{_unknown(own)}"
    return f"{head}, which no log of the seed says: {'; '.join(lines)}{_unknown(own)}"


def _unknown(logs: Iterable[LoggedRun]) -> str:
    """Score lines under labels that are not known, for a reason of refusal."""
    found = [f"{log.file}:{line} {label!r}" for log in logs for line, label in log.unknown]
    return f" (labels that are not known: {', '.join(found)})" if found else ""


# ── without scores by seed ──────────────────────────────────────────────────────────────────────────────────────────


def _assign_headline(
    logs: Sequence[LoggedRun], claimed: Submission | None
) -> tuple[list[RecordedSeed], list[Conflict]]:
    """The configuration and the stage that the headline is of; without a headline the order of stages alone."""
    scored = [log for log in logs if log.submitted]
    if not scored:
        told = ", ".join(log.file for log in logs)
        why = (
            f"{told} ends without a line of a final score{_unknown(logs)}" if logs else "there is no log in the folder"
        )
        return [_refused(_seed(logs[0]) if len(logs) == 1 else None, why)], []
    claim = _headline(claimed)
    if claimed is None or claim is None:
        return _by_order(scored, "nothing claims a score"), []
    for stage, slip in ((None, 0.0), (TTT, 0.0), (SLIDING, 0.0), (ROUNDTRIP, 0.0), (None, SLIP_BPB)):
        for groups in (_groups(scored, by_settings=True), _groups(scored)):
            found = _configurations(groups, stage, claim, slip)
            if len(found) == 1:
                seeds, conflicts = _accept(found[0], stage, claimed, claim)
                return [*seeds, *_unfinished(logs, [log for log, _ in found[0]])], conflicts
    lines = "; ".join(f"{log.file}:{log.submitted.line} {_told(log.submitted)}" for log in scored if log.submitted)
    why = f"{claimed.file}{claim.place} claims {claim.value}, which is neither a log's score nor their mean: {lines}"
    return [_refused(None, why + _unknown(logs))], []


def _headline(claimed: Submission | None) -> Claim | None:
    """The record's score; some wrote it where the loss belongs."""
    if claimed is None:
        return None
    return claimed.headline or claimed.loss


def _by_order(logs: list[LoggedRun], because: str) -> list[RecordedSeed]:
    """The order of stages alone; refused where the logs are of several configurations."""
    groups = _groups(logs)
    if len(groups) > 1:
        files = "; ".join(", ".join(log.file for log in group) for group in groups)
        return [_refused(None, f"{because}, and the logs are of {len(groups)} configurations: {files}")]
    group = groups[0]
    return [
        _recorded(log, log.submitted, f"last {log.submitted.stage} line; {because}") for log in group if log.submitted
    ]


def _unfinished(logs: Iterable[LoggedRun], accepted: list[LoggedRun]) -> list[RecordedSeed]:
    """Runs of the accepted configuration, in files of their own, whose log ends before a final score."""
    files = {log.file for log in accepted}
    return [
        replace(_refused(_seed(log), f"{log.file} ends without a line of a final score{_unknown([log])}"), run=log)
        for log in logs
        if log.file not in files
        and log.has_trained
        and not log.submitted
        and log.configuration == accepted[0].configuration
    ]


def _recorded(log: LoggedRun, score: ScoreLine | None, why: str) -> RecordedSeed:
    return RecordedSeed(seed=_seed(log), run=log, scored=log, score=score, why=why)


def _seed(log: LoggedRun) -> int | None:
    """The printed seed, else the file name's."""
    printed = log.number("seed")
    return file_seed(log.file) if printed is None else printed


def _groups(logs: Iterable[LoggedRun], *, by_settings: bool = False) -> list[list[LoggedRun]]:
    """The logs by configuration, of each file the last run: earlier ones in it were replaced.

    By every setting that is printed, seeds of one configuration may fall apart where a log also prints what its machine was
    like; without, an ablation may fall together with what it ablates.
    """
    last = {log.file: log for log in logs}
    groups: dict[tuple[object, ...], list[LoggedRun]] = {}
    for log in last.values():
        settings = tuple(sorted(log.chosen.items())) if by_settings else ()
        groups.setdefault((log.configuration, settings), []).append(log)
    return list(groups.values())


def _configurations(
    groups: Sequence[Sequence[LoggedRun]], stage: str | None, claim: Claim, slip: float
) -> list[list[tuple[LoggedRun, ScoreLine]]]:
    """Configurations of which the claim is the mean, or one run's score; `stage` None is the order's line of each run."""
    found = []
    for group in groups:
        lines = [(log, line) for log in group if (line := _line(log, stage))]
        values = [line.bpb for _, line in lines]
        candidates = [*values, *([center] if (center := mean(values)) is not None else [])]
        if any(claim.is_met_by(value) or abs(value - float(claim.value)) <= slip for value in candidates):
            found.append(lines)
    return found


def _line(log: LoggedRun, stage: str | None) -> ScoreLine | None:
    if stage is None:
        return log.submitted
    return next((score for score in reversed(log.scores) if score.stage == stage and score.rank > 0), None)


def _accept(
    lines: list[tuple[LoggedRun, ScoreLine]], stage: str | None, claimed: Submission, claim: Claim
) -> tuple[list[RecordedSeed], list[Conflict]]:
    """The runs of the configuration that the headline is of, and what is wrong with the headline."""
    place = f"{claimed.file}{claim.place}"
    values = [score.bpb for _, score in lines]
    center = mean(values)
    is_mean = center is not None and claim.is_met_by(center)
    singles = [f"{log.file}:{score.line}" for log, score in lines if claim.is_met_by(score.bpb)]
    whose = (
        "it"
        if is_mean and len(lines) == 1
        else "their mean"
        if is_mean
        else f"that of {singles[0]}"
        if singles
        else "nearly it"
    )
    order = "last {stage} line" if stage is None else "{stage} line, not the last stage of the log,"
    seeds = [
        _recorded(log, score, f"{order.format(stage=score.stage)} and {place} claims {whose}") for log, score in lines
    ]
    conflicts = []
    if stage is not None:
        said = [(place, str(claim.value))]
        said += [(f"{log.file}:{log.submitted.line}", _told(log.submitted)) for log, _ in lines if log.submitted]
        conflicts.append(Conflict(what="the submitted score is not the last stage of the logs", said=tuple(said)))
    if claimed.headline is None:
        conflicts.append(
            Conflict(
                what="no key has the score in bits per byte, it stands under another", said=((place, str(claim.value)),)
            )
        )
    return seeds, conflicts


# ── conflicts ───────────────────────────────────────────────────────────────────────────────────────────────────────


def doubts_of(seeds: Iterable[RecordedSeed]) -> Iterator[Conflict]:
    """What speaks against each seed's score by its own log."""
    for seed in seeds:
        logs = [] if seed.run is None else [seed.run] if seed.scored in (None, seed.run) else [seed.run, seed.scored]
        yield from (Conflict(what="the score", said=((log.file, note),)) for log in logs if log for note in log.notes)
        if seed.run is not None:
            yield from _limits(seed.run)
            if seed.scored and seed.score:
                yield from _byte_count(seed.scored, seed.run, seed.score)


def seed_conflicts(record: PublicRecord) -> Iterator[Conflict]:
    """Where a seed's log, its name and the claims disagree."""
    for seed in record.seeds:
        if seed.run is None:
            continue
        yield from _seed_names(seed, seed.run)
        yield from _sizes(seed.run)
        if record.submission and seed.seed is not None:
            yield from _claims(seed, record.submission)


def _seed_names(seed: RecordedSeed, run: LoggedRun) -> Iterator[Conflict]:
    figure, named = run.figures.get("seed"), file_seed(run.file)
    said = [(f"{run.file}:{figure.line}", str(figure.value))] if figure else []
    said += [(f"the name {run.file}", str(named))] if named is not None else []
    said += [("the record", str(seed.seed))] if seed.seed is not None else []
    if len({text for _, text in said}) > 1:
        yield Conflict(what="the seed", said=tuple(said))


def _sizes(run: LoggedRun) -> Iterator[Conflict]:
    """The labelled total must be code and compressed model."""
    code, model, total = (run.figures.get(f"{part}_bytes") for part in ("code", "model", "total"))
    if code and model and total and int(code.value) + int(model.value) != int(total.value):
        said = tuple((f"{run.file}:{figure.line}", f"{int(figure.value):,}") for figure in (code, model, total))
        yield Conflict(what="code and model bytes are not the total", said=said)


def _limits(run: LoggedRun) -> Iterator[Conflict]:
    """The cap, and the clock of training."""
    total, seconds, limit = run.figures.get("total_bytes"), run.figures.get("train_seconds"), LIMITS.train_seconds
    if total is None and run.has_trained:
        yield Conflict(what="no labelled total of code and model is logged", said=((run.file, "no such line"),))
    if total is not None and int(total.value) > LIMITS.artifact_bytes:
        most = ("the challenge", f"{LIMITS.artifact_bytes:,} at most")
        yield Conflict(
            what="the artifact is over the cap", said=((f"{run.file}:{total.line}", f"{int(total.value):,}"), most)
        )
    if seconds is not None and float(seconds.value) > limit + CLOCK_SLACK_SECONDS:
        said = (
            (f"{run.file}:{seconds.line}", f"{float(seconds.value):.1f} s"),
            ("the challenge", f"{limit:.0f} s at most"),
        )
        yield Conflict(what="training took longer than the limit", said=said)


def _byte_count(scored: LoggedRun, run: LoggedRun, score: ScoreLine) -> Iterator[Conflict]:
    """Tokens per byte that a loss and a score imply must be a known tokenizer's; fewer decimals tell too little."""
    if score.digits < 6 or not score.loss:
        return
    ratio = score.bpb * math.log(2) / score.loss
    if not any(abs(ratio - known) <= grammar.RATIO_TOLERANCE for known in grammar.TOKENS_PER_BYTE):
        tokens = scored.number("val_tokens") or run.number("val_tokens")
        implied = f", {tokens / ratio:,.0f} bytes" if tokens else ""
        said = ((f"{scored.file}:{score.line}", f"{ratio:.7f} tokens per byte{implied}"),)
        yield Conflict(what="loss and bits per byte imply a byte count that no known tokenizer has", said=said)


def _claims(seed: RecordedSeed, claimed: Submission) -> Iterator[Conflict]:
    """Everything else that submission.json says of a seed."""
    fields = claimed.seeds.get(seed.seed or 0, {}) if seed.seed is not None else {}
    for name, place, measured in _measured(seed):
        claim = fields.get(name)
        if claim is not None and measured is not None and not claim.is_met_by(measured):
            text = (
                f"{measured:,}"
                if isinstance(measured, int)
                else f"{measured:g}"
                if measured > 50
                else f"{measured:.8f}"
            )
            yield Conflict(
                what=f"{name} of seed {seed.seed}",
                said=((f"{claimed.file}{claim.place}", str(claim.value.normalize() if name != submission.LOSS else claim.value)), (place, text)),
            )  # fmt: skip


def _measured(seed: RecordedSeed) -> Iterator[tuple[str, str, float | int | None]]:
    run, scored, score = seed.run, seed.scored, seed.score
    if run is None:
        return
    for name, figure in ((submission.SIZE, "total_bytes"), (submission.STEPS, "steps")):
        found = run.figures.get(figure)
        yield name, f"{run.file}:{found.line if found else 0}", run.number(figure)
    stop = run.figures.get("train_seconds")
    yield submission.TRAIN_SECONDS, f"{run.file}:{stop.line if stop else 0}", run.seconds("train_seconds")
    if scored and score:
        yield submission.LOSS, f"{scored.file}:{score.line}", score.loss
        yield submission.EVAL_SECONDS, f"{scored.file}:{score.line}", score.seconds


def record_conflicts(record: PublicRecord) -> Iterator[Conflict]:
    """What the record as a whole says against its runs."""
    yield from _headline_conflict(record)
    yield from _repeated_seeds(record)
    yield from _mixed(record)
    yield from _size_headline(record)


def _headline_conflict(record: PublicRecord) -> Iterator[Conflict]:
    claim, scores = _headline(record.submission), record.scores
    if claim is None or record.submission is None:
        return
    own = [
        float(fields[submission.BPB].value) for fields in record.submission.seeds.values() if submission.BPB in fields
    ]
    scores, whose = (own, "scores that it gives") if record.refused and own else (scores, "logs")
    center = mean(scores)
    if center is None or claim.is_met_by(center) or (record.refused and not own):
        return
    place = f"{record.submission.file}{claim.place}"
    singles = [seed for seed in record.seeds if seed.score and claim.is_met_by(seed.score.bpb)]
    what = (
        f"the headline is the score of seed {singles[0].seed} alone, not the mean"
        if singles
        else "the headline is not the mean"
    )
    yield Conflict(what=what, said=((place, str(claim.value)), (f"the mean of {len(scores)} {whose}", f"{center:.8f}")))


def _repeated_seeds(record: PublicRecord) -> Iterator[Conflict]:
    by_seed: dict[int, list[str]] = {}
    for seed in record.seeds:
        if seed.run and seed.run.number("seed") is not None:
            by_seed.setdefault(int(seed.run.number("seed") or 0), []).append(seed.run.file)
    for number, files in by_seed.items():
        if len(files) > 1:
            yield Conflict(what="several logs print one seed", said=tuple((file, f"seed {number}") for file in files))


def _mixed(record: PublicRecord) -> Iterator[Conflict]:
    """Seeds of one record must be of one configuration and of one source."""
    runs = [seed.run for seed in record.seeds if seed.run and seed.run.has_trained]
    for name in ("code_bytes", "parameters", "val_tokens", "train_shards", "batch_tokens", "world_size"):
        found = [(run, figure) for run in runs if (figure := run.figures.get(name))]
        if len({figure.value for _, figure in found}) > 1:
            said = tuple((f"{run.file}:{figure.line}", f"{int(figure.value):,}") for run, figure in found)
            yield Conflict(what=f"seeds differ in {name}", said=said)
    yield from _mixed_settings(runs)


def _mixed_settings(runs: list[LoggedRun]) -> Iterator[Conflict]:
    """Hyper-parameters that the logs print and that differ from seed to seed."""
    full = [run for run in runs if run.family == grammar.SLASH and run.settings]
    for name in sorted({name for run in full for name in run.chosen}):
        values = [(run.file, run.settings.get(name, "nothing")) for run in full]
        if len({value for _, value in values}) > 1:
            yield Conflict(what=f"seeds differ in {name}", said=tuple(values))


def _size_headline(record: PublicRecord) -> Iterator[Conflict]:
    claim, most = record.submission.size if record.submission else None, record.most_bytes
    if claim is not None and most is not None and record.submission and not claim.is_met_by(most):
        said = (
            (f"{record.submission.file}{claim.place}", f"{claim.value:,}"),
            ("largest total of its logs", f"{most:,}"),
        )
        yield Conflict(what="the size is not that of the largest artifact", said=said)


# ── the README ──────────────────────────────────────────────────────────────────────────────────────────────────────

NUMBER = re.compile(r"(?<![\d.,])[0-3]\.\d{3,}(?![\d.]*\d)")
SEED_CELL = re.compile(r"\W*(?:seed\W*)?(\d+)\W*", re.IGNORECASE)


def readme_conflicts(record: PublicRecord, readme: str) -> Iterator[Conflict]:
    """Rows of the README's tables that name a seed and have scores, none of which the log has; a headline that it lacks."""
    scores = {seed.seed: seed for seed in record.seeds if seed.score and seed.seed is not None}
    for number, line in enumerate(readme.splitlines(), start=1):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.strip().startswith("|") else []
        named = SEED_CELL.fullmatch(cells[0]) if cells else None
        seed = scores.get(int(named[1])) if named else None
        written = NUMBER.findall(" ".join(cells[1:]))
        if seed is None or seed.scored is None or not written:
            continue
        known = [score.bpb for log in (seed.scored, seed.run) if log for score in log.scores]
        known += [score.loss for log in (seed.scored, seed.run) if log for score in log.scores]
        if not any(_is_written(value, text) for value in known for text in written):
            yield Conflict(
                what=f"the README's row of seed {seed.seed}",
                said=((f"{README}:{number}", ", ".join(written)), (seed.place, _told(seed.score) if seed.score else "")),
            )  # fmt: skip
    claim = _headline(record.submission)
    if readme and record.submission and claim and not any(_same(claim.value, text) for text in NUMBER.findall(readme)):
        place = f"{record.submission.file}{claim.place}"
        yield Conflict(
            what="the README does not have the headline", said=((place, str(claim.value)), (README, "no such number"))
        )


def _is_written(value: float, text: str) -> bool:
    """Whether a number in a text is the value, rounded or cut off to its decimals."""
    return abs(value - float(text)) < 10.0 ** -len(text.partition(".")[2])


def _same(value: object, text: str) -> bool:
    """Whether two texts of numbers agree in the decimals that both have."""
    decimals = min(len(str(value).partition(".")[2]), len(text.partition(".")[2]))
    return decimals >= 3 and abs(float(str(value)) - float(text)) < 10.0**-decimals


def _with_lines(conflicts: Sequence[Conflict], folder: Path, claimed: Submission | None) -> Iterator[Conflict]:
    """The conflicts with lines of submission.json in place of JSON pointers."""
    lines = lines_of(_text(folder / claimed.file)) if claimed else {}
    for conflict in conflicts:
        said = [(_line_of(place, claimed.file if claimed else "", lines), text) for place, text in conflict.said]
        yield replace(conflict, said=tuple(said))


def _line_of(place: str, file: str, lines: dict[str, int]) -> str:
    pointer = place.removeprefix(file) if file and place.startswith(f"{file}/") else ""
    return f"{file}:{lines[pointer]}" if pointer in lines and pointer else place


# ── as others read it ───────────────────────────────────────────────────────────────────────────────────────────────


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
