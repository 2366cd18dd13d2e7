"""Attribution: which line of which log is the score that a record submits. Never guessed.

The order of stages (`grammar.LABELS`) proposes a line; what submission.json claims must be that line, or say which other one
it is. Where neither holds, the score is refused and the reason says what was found instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from decimal import Decimal

from orchestrator import submission
from orchestrator.public_log import LoggedRun, ScoreLine
from orchestrator.public_record import Conflict, RecordedSeed, file_seed, told
from orchestrator.statistics import mean
from orchestrator.submission import Claim, Submission
from trainer.protocol import ROUNDTRIP, SLIDING, TTT

SLIP_BPB = 2e-4
"""A claim as near as this to one line, and to no other, means that line and was written down wrongly: less than the spread
of seeds, and far less than the distance of two stages.
"""

UNMISTAKABLE_BPB = Decimal("0.00001")
"""Last place of a claim that a log of another seed does not meet by chance: seeds differ by a hundred of these."""


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
            said=((place, str(claim.value)), (f"{log.file}:{score.line}", told(score)), (f"{log.file}:{rule.line}", told(rule))),
        )  # fmt: skip
        return (
            log,
            score,
            f"{place} claims this {score.stage} line, not the log's last stage ({told(rule)})",
        ), conflict
    met = _single([(log, score) for log, score in proposed if abs(score.bpb - float(claim.value)) <= SLIP_BPB])
    if met:
        log, score = met
        conflict = Conflict(
            what="the score was written down otherwise than it was logged",
            said=((place, str(claim.value)), (f"{log.file}:{score.line}", told(score))),
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
    lines = [f"{log.file}:{score.line} {told(score)}" for log in own for score in log.scores if score.rank > 0]
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
        files = ", ".join(log.file for log in logs)
        why = (
            f"{files} ends without a line of a final score{_unknown(logs)}" if logs else "there is no log in the folder"
        )
        return [_refused(_seed(logs[0]) if len(logs) == 1 else None, why)], []
    claim = submission.headline_of(claimed)
    if claimed is None or claim is None:
        return _by_order(scored, "nothing claims a score"), []
    for stage, slip in ((None, 0.0), (TTT, 0.0), (SLIDING, 0.0), (ROUNDTRIP, 0.0), (None, SLIP_BPB)):
        for groups in (_groups(scored, by_settings=True), _groups(scored)):
            found = _configurations(groups, stage, claim, slip)
            if len(found) == 1:
                seeds, conflicts = _accept(found[0], stage, claimed, claim)
                return [*seeds, *_unfinished(logs, [log for log, _ in found[0]])], conflicts
    lines = "; ".join(f"{log.file}:{log.submitted.line} {told(log.submitted)}" for log in scored if log.submitted)
    why = f"{claimed.file}{claim.place} claims {claim.value}, which is neither a log's score nor their mean: {lines}"
    return [_refused(None, why + _unknown(logs))], []


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
        said += [(f"{log.file}:{log.submitted.line}", told(log.submitted)) for log, _ in lines if log.submitted]
        conflicts.append(Conflict(what="the submitted score is not the last stage of the logs", said=tuple(said)))
    if claimed.headline is None:
        conflicts.append(
            Conflict(
                what="no key has the score in bits per byte, it stands under another", said=((place, str(claim.value)),)
            )
        )
    return seeds, conflicts
