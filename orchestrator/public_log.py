"""Reads a public training log by the grammar: the runs in it, and each of their figures with the line it stands on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from orchestrator import grammar
from orchestrator.grammar import COLON, FAMILIES, FORMS, LABELS, SHORT, SLASH, STAGE_RANKS, Form, Label, Value
from trainer.protocol import ROUNDTRIP, SLIDING, TTT


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A value and where it stands."""

    value: Value
    line: int
    """From 1."""


@dataclass(frozen=True, kw_only=True)
class ScoreLine:
    """One finished evaluation."""

    label: str
    stage: str
    rank: int
    loss: float
    """Nats per token."""

    bpb: float
    digits: int
    """Decimals in which the bits per byte are printed."""

    seconds: float | None
    line: int
    why_stage: str = ""
    """Why the stage is not the one that the label says; empty where it is."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A step's losses; the one that the line does not have is None."""

    step: int
    train_seconds: float | None
    line: int
    train_loss: float | None = None
    val_loss: float | None = None
    val_bpb: float | None = None


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """One run as its log tells it."""

    file: str
    family: str
    first_line: int
    last_line: int
    figures: dict[str, Figure]
    """By name: seed, parameters, steps, train_seconds, code_bytes, model_bytes, total_bytes, val_tokens, ..."""

    settings: dict[str, str]
    """Hyper-parameters that the log prints, as text."""

    curve: tuple[CurvePoint, ...]
    scores: tuple[ScoreLine, ...]
    """Finished evaluations without repetitions, in the order of the log."""

    phases: dict[str, float]
    unknown: tuple[tuple[int, str], ...]
    """Lines that look like a score under a label that the grammar does not know: line and label."""

    notes: tuple[str, ...] = ()

    def number(self, name: str) -> int | None:
        """A whole figure, where the log has it."""
        found = self.figures.get(name)
        return int(found.value) if found is not None else None

    def seconds(self, name: str) -> float | None:
        found = self.figures.get(name)
        return float(found.value) if found is not None else None

    @property
    def has_trained(self) -> bool:
        """Whether it is more than an evaluation of a stored model."""
        return bool(self.curve) or "train_seconds" in self.figures

    @property
    def submitted(self) -> ScoreLine | None:
        """The line that the order of stages takes for the submission's: the last of the highest rank; None without any."""
        own = [score for score in self.scores if score.rank > 0]
        return max(own, key=lambda score: (score.rank, score.line), default=None)

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """The same in every copy of one log, whatever its file is called."""
        return self.number("seed"), tuple((p.step, p.train_loss, p.val_bpb) for p in self.curve), tuple(
            (score.stage, score.bpb, score.seconds) for score in self.scores
        )  # fmt: skip

    @property
    def chosen(self) -> dict[str, str]:
        """The settings that a person chose: neither paths nor what differs from process to process."""
        return {k: v for k, v in self.settings.items() if k not in grammar.SET_BY_THE_RUN and "/" not in v}

    @property
    def configuration(self) -> tuple[object, ...]:
        """The same for all seeds of one configuration, as far as a log tells it."""
        names = ("parameters", "val_tokens", "batch_tokens", "planned_steps", "world_size", "limit_seconds")
        return self.family, *(self.seconds(name) for name in names)


def read_log(text: str, file: str) -> tuple[LoggedRun, ...]:
    """The runs of one log; none where it is no training log. Nothing is guessed: what the grammar lacks is in `unknown`."""
    lines = [grammar.STAMP.sub("", line.rstrip("\r"), count=1) for line in text.split("\n")]
    said = [(number, *found) for number, line in enumerate(lines, start=1) if (found := _said(line))]
    family = _family(lines, [form for _, form, _ in said])
    if not family:
        return ()
    said = [(number, form, values) for number, form, values in said if family in form.families]
    runs = [_run(lines, file, family, first, last, said) for first, last in _spans(said, len(lines))]
    return tuple(run for run in runs if run.has_trained or run.scores or run.unknown)


@cache
def _patterns() -> tuple[tuple[Form, re.Pattern[str]], ...]:
    return tuple((form, re.compile(form.pattern)) for form in FORMS)


@cache
def _any_pattern() -> re.Pattern[str]:
    """Matches what any form does: most lines of a log are its script's, and match none."""
    return re.compile("|".join(f"(?:{form.pattern})" for form in FORMS))


def _said(line: str) -> tuple[Form, dict[str, Value]] | None:
    """What a line says, in the units of its fields' names."""
    if not _any_pattern().match(line):
        return None
    for form, pattern in _patterns():
        found = pattern.match(line)
        if found:
            groups = zip(form.fields, found.groups(), strict=True)
            return form, {name: grammar.UNITS[unit](text) for (name, unit), text in groups if text is not None}
    return None


def _family(lines: list[str], forms: Iterable[Form]) -> str:
    """The family that has most lines of its own; empty for a text that is no log of a training or an evaluation."""
    own = [form for form in forms if len(form.families) == 1]
    counts = {family: sum(form.families == family for form in own) for family in FAMILIES}
    if any(counts.values()):
        return max(counts, key=lambda family: counts[family])
    return COLON if any(grammar.SCORE.match(line) for line in lines) else ""


def _spans(said: list[tuple[int, Form, dict[str, Value]]], end: int) -> Iterator[tuple[int, int]]:
    """First and last line of each run: another begins where a line comes again that begins one."""
    first, seen = 1, set[str]()
    for number, form, _ in said:
        if form.says in seen:
            yield first, number - 1
            first, seen = number, set[str]()
        if form.says in grammar.STARTS:
            seen.add(form.says)
    yield first, end


def _run(
    lines: list[str], file: str, family: str, first: int, last: int, said: list[tuple[int, Form, dict[str, Value]]]
) -> LoggedRun:
    own = [(number, form, values) for number, form, values in said if first <= number <= last]
    figures: dict[str, Figure] = {}
    for number, form, values in own:
        if form.says == grammar.UNLABELLED:
            values = {"unlabelled_total_bytes": values["total_bytes"]}
        figures |= {_figure_name(name): Figure(value=value, line=number) for name, value in values.items()
                    if name not in ("train_loss", "val_loss", "val_bpb", "phase", "seconds", "tokens_per_second")}  # fmt: skip
    stops = [(n, values) for n, form, values in own if form.says == grammar.STOP]
    for number, values in stops:  # a step's own time comes before what the stop says
        figures |= {_figure_name(name): Figure(value=value, line=number) for name, value in values.items()}
    sliding_from = next((number for number, form, _ in own if form.says == grammar.SLIDING_MODE), last + 1)
    scores, unknown = _scores(lines, first, last, sliding_from)
    return LoggedRun(
        file=file, family=family, first_line=first, last_line=last, figures=figures,
        settings=_settings(lines, family, first, last), curve=_curve(own, figures), scores=scores, unknown=unknown,
        phases={str(v["phase"]): float(v["seconds"]) for _, form, v in own if form.says == grammar.PHASE},
        notes=tuple(_notes(own)),
    )  # fmt: skip


def _figure_name(name: str) -> str:
    return "steps" if name == "step" else name


def _notes(own: list[tuple[int, Form, dict[str, Value]]]) -> Iterator[str]:
    for number, form, values in own:
        if form.says == grammar.SUBSET:
            name, value = next(iter(values.items()))
            yield f"line {number}: only a part of the validation split was scored, {name} {value}"


def _curve(own: list[tuple[int, Form, dict[str, Value]]], figures: dict[str, Figure]) -> tuple[CurvePoint, ...]:
    """Losses by step. Family B prints minutes with one decimal: its cumulative tokens per second give the time exactly."""
    batch_tokens = figures.get("batch_tokens")
    points = []
    for number, form, values in own:
        if form.says not in (grammar.TRAIN_STEP, grammar.VAL_STEP):
            continue
        seconds, rate = values.get("train_seconds"), values.get("tokens_per_second")
        if rate and batch_tokens is not None:
            seconds = int(values["step"]) * int(batch_tokens.value) / int(rate)
        losses = {name: float(values[name]) for name in ("train_loss", "val_loss", "val_bpb") if name in values}
        points.append(
            CurvePoint(
                step=int(values["step"]), train_seconds=None if seconds is None else float(seconds), line=number, **losses
            )
        )  # fmt: skip
    return tuple(points)


# ── scores ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _scores(
    lines: list[str], first: int, last: int, sliding_from: int
) -> tuple[tuple[ScoreLine, ...], tuple[tuple[int, str], ...]]:
    """Finished evaluations, and lines of a label that is not known. `sliding_from`: line that announces sliding windows."""
    found: list[ScoreLine] = []
    unknown: list[tuple[int, str]] = []
    for number in range(first, last + 1):
        match = grammar.SCORE.match(lines[number - 1])
        label = _label(match["label"]) if match else None
        if match and label is None:
            unknown.append((number, match["label"]))
        elif match and label is not None:
            found = _with(found, _score(match, label, number, is_announced=number > sliding_from))
    return tuple(found), tuple(unknown)


@cache
def _label(text: str) -> Label | None:
    return next((label for label in LABELS if re.fullmatch(label.pattern, text)), None)


def _score(match: re.Match[str], label: Label, line: int, *, is_announced: bool) -> ScoreLine:
    seconds = grammar.EVAL_SECONDS.search(match["rest"])
    stage, why = label.stage, ""
    if grammar.ONLINE_TTT in match["rest"]:
        stage, why = TTT, f"the line says {grammar.ONLINE_TTT}"
    elif match["sliding"] and stage == ROUNDTRIP:
        stage, why = SLIDING, "the line says that its values are of sliding windows"
    elif is_announced and stage == ROUNDTRIP:
        stage, why = SLIDING, "a line before it announces sliding windows"
    return ScoreLine(
        label=match["label"], stage=stage, rank=STAGE_RANKS[stage] if why else label.rank, loss=float(match["loss"]),
        bpb=float(match["bpb"]), digits=len(match["bpb"].partition(".")[2]),
        seconds=int(seconds[1]) / 1000 if seconds else None, line=line, why_stage=why,
    )  # fmt: skip


def _with(found: list[ScoreLine], score: ScoreLine) -> list[ScoreLine]:
    """The evaluations with one more line: a repetition changes nothing, and of twins the one with more digits stays."""
    for index, known in enumerate(found):
        if known.bpb == score.bpb and known.loss == score.loss:
            return [*found[:index], replace(known, seconds=known.seconds or score.seconds), *found[index + 1 :]]
        if _is_twin(known, score):
            full = known if known.digits > score.digits else score
            told = next((line for line in (known, score) if line.why_stage), full)  # either may say which stage it is
            both = replace(full, stage=told.stage, rank=told.rank, why_stage=told.why_stage)
            return [*found[:index], *found[index + 1 :], replace(both, seconds=known.seconds or score.seconds)]
    return [*found, score]


def _is_twin(known: ScoreLine, score: ScoreLine) -> bool:
    """Whether two lines are one evaluation, printed with fewer decimals and its time, and with all of them."""
    is_kin = known.stage == score.stage or known.label.removesuffix("_exact") == score.label.removesuffix("_exact")
    return is_kin and (_is_rounded(known, score) or _is_rounded(score, known))


def _is_rounded(short: ScoreLine, full: ScoreLine) -> bool:
    """Whether one line gives the other's values with fewer decimals."""
    return short.digits < full.digits and all(
        abs(a - b) <= 0.5000001 * 10**-short.digits for a, b in ((short.bpb, full.bpb), (short.loss, full.loss))
    )


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _settings(lines: list[str], family: str, first: int, last: int) -> dict[str, str]:
    """What the log prints of its configuration before it trains."""
    pattern = grammar.HYPERPARAMETER[family]
    return dict(pair for line in _setting_lines(lines[first - 1 : last], family) for pair in pattern.findall(line))


def _setting_lines(lines: list[str], family: str) -> Iterator[str]:
    if family == SLASH:
        start = next((i for i, line in enumerate(lines) if line == "Hyperparameters:"), len(lines))
        for line in lines[start + 1 :]:
            if not grammar.HYPERPARAMETER[SLASH].match(line):
                return
            yield line
    elif family == SHORT:
        yield from (line for line in lines if re.match(r"\w+=\S+ \w+=\S+ \w+=\S+", line))
    else:
        for line in lines:
            if line.startswith(("warmup_step:", "step:")):
                return
            if re.fullmatch(r"[a-z]\w*:\S+(?: [a-z]\w*:\S+)*", line) and "{" not in line:
                yield line
