"""Disagreements: where log, file name, submission.json and README of a record say different things, and what is doubtful.

Nothing is smoothed: each is told with its places.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

from orchestrator import grammar, submission
from orchestrator.public_log import LoggedRun, ScoreLine
from orchestrator.public_record import Conflict, PublicRecord, RecordedSeed, file_seed, told
from orchestrator.statistics import mean
from orchestrator.submission import Submission
from trainer.config import Config

README = "README.md"
LIMITS = Config().limits
CLOCK_SLACK_SECONDS = 0.5  # the loop's clock stops training after the step in which it passes the limit


def conflicts_of(record: PublicRecord, readme: str) -> Iterator[Conflict]:
    """Everything on which two places disagree; `readme` is the README's text, empty without one."""
    yield from seed_conflicts(record)
    yield from record_conflicts(record)
    yield from readme_conflicts(record, readme)


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
    claim, scores = submission.headline_of(record.submission), record.scores
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
                said=((f"{README}:{number}", ", ".join(written)), (seed.place, told(seed.score) if seed.score else "")),
            )  # fmt: skip
    claim = submission.headline_of(record.submission)
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
