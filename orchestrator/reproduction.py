"""Reproductions: a public record's numbers beside those of runs of ours, and whether the claim holds.

The difference is judged by the spread of single runs, pooled over both sides and, where these are few, over the published
records. Scores on other validation data are told as not comparable, whatever they are.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import imports, record_folder
from orchestrator.cells import ABSENT, Table, as_markdown, as_text, bpb, seconds, signed, whole
from orchestrator.errors import ConfigError
from orchestrator.evidence import ArmEvidence, RunEvidence, gather
from orchestrator.grammar import RATIO_TOLERANCE, TOKENS_PER_BYTE
from orchestrator.home import Home
from orchestrator.imports import ImportedRecord
from orchestrator.ledger import BEST_ARM
from orchestrator.public_record import PublicRecord, RecordedSeed
from orchestrator.published import published_records
from orchestrator.runs import RunStore
from orchestrator.statistics import Difference, Summary, known_spread, mean, pooled_std, summarize
from orchestrator.tables import STAGE_NAMES
from trainer import protocol
from trainer.config import nearest
from trainer.protocol import (
    COMPLETE,
    METRIC,
    STAGES,
    START,
    TRAIN_LOSS,
    VAL_LOSS,
    DataDir,
    Spec,
    write_bytes_atomically,
)

FEWEST_DEGREES = 4  # of freedom of the two sides' own spread: two arms of three seeds
NOISE = 1.96  # standard errors within which 95 of 100 faithful repetitions fall
SAME_DATA = 1e-5  # relative difference of tokens per byte, far above rounding and far below another tokenizer's
POINTS = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Parts of the common stretch of training at which the curves are compared."""

TORCH = re.compile(r"^(?:Running PyTorch|  ?torch(?:_version)?:) ?(\S+)", re.MULTILINE)
GPU = re.compile(r"NVIDIA ((?:GH?|H|A|B|L|V|RTX )\d+\w*(?: [\w-]+)*?)(?:  | On\b| \|)")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One evaluation of one seed."""

    bpb: float
    loss: float
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One logged step."""

    step: int
    seconds: float | None
    train_loss: float | None = None
    val_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class SeedFigures:
    """What is known of one seed, of ours or of the record."""

    seed: int | None
    stages: Mapping[str, Stage]
    figures: Mapping[str, float]
    """steps, train_seconds, code_bytes, model_bytes, total_bytes, parameters, world_size, val_tokens, batch_tokens, ..."""

    settings: Mapping[str, str]
    """Hyper-parameters as a script's log prints them; empty for our own trainer."""

    curve: tuple[Point, ...]
    source: str


@dataclass(frozen=True, kw_only=True)
class Side:
    """One arm: runs of ours, or a public record."""

    name: str
    seeds: tuple[SeedFigures, ...]
    facts: Mapping[str, str]
    """Data, versions and machine, in words."""

    problems: tuple[str, ...] = ()

    def values(self, stage: str) -> dict[int | None, float]:
        return {seed.seed: seed.stages[stage].bpb for seed in self.seeds if stage in seed.stages}

    def summary(self, stage: str) -> Summary:
        return summarize([seed.stages[stage].bpb for seed in self.seeds if stage in seed.stages])

    def figure(self, name: str) -> float | None:
        """Mean over the seeds that have it."""
        return mean([seed.figures[name] for seed in self.seeds if seed.figures.get(name)])


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """A record's numbers beside ours."""

    ours: Side
    theirs: Side
    stage: str
    """Stage that is compared; empty where the sides share none."""

    difference: Difference | None
    """Ours minus theirs; its statistic is z."""

    sigma: float | None
    degrees_of_freedom: int
    sigma_from: str
    differing: tuple[tuple[str, str, str], ...]
    """(what, ours, theirs) of all that is not the same."""

    is_comparable: bool
    tables: tuple[Table, ...]
    verdict: str
    problems: tuple[str, ...]


# ── the record ──────────────────────────────────────────────────────────────────────────────────────────────────────


def find_record(home: Home, text: str) -> ImportedRecord:
    """A record by its folder, which is imported, or by the name of an imported one. Raises ConfigError."""
    folder = Path(text).expanduser()
    if folder.is_dir():
        found = record_folder.find_records(folder)
        if len(found) > 1:
            raise ConfigError(
                f"{folder} holds {len(found)} records, a run is compared with one",
                hint=nearest(folder.name, [path.name for path in found]),
            )
        return imports.keep(home, found[0])
    return imports.find(home, text)


def side_of_record(imported: ImportedRecord) -> Side:
    """A record as it was published."""
    record = imported.record
    return Side(
        name=record.name, seeds=tuple(_recorded(seed) for seed in record.seeds if seed.run or seed.score),
        facts={
            **_data_of(record), **_facts_of_logs([imported.folder.files / seed.run.file for seed in record.seeds if seed.run]),
        },
        problems=tuple(f"seed {seed.seed} of the record has no score: {seed.why}" for seed in record.refused),
    )  # fmt: skip


def _data_of(record: PublicRecord) -> dict[str, str]:
    """The data by what its losses and scores imply, of the tokenizers that are known."""
    scores = [seed.score for seed in record.seeds if seed.score and seed.score.loss and seed.score.digits > 5]
    ratios = {score.bpb * math.log(2) / score.loss for score in scores}
    known = {name for ratio in ratios for near, name in TOKENS_PER_BYTE.items() if abs(ratio - near) <= RATIO_TOLERANCE}
    return {"data": f"{', '.join(sorted(known))}, by its tokens per byte"} if known else {}


def _recorded(seed: RecordedSeed) -> SeedFigures:
    run = seed.run or seed.scored
    assert run is not None, "it has a log"
    stages = {
        name: Stage(bpb=line.bpb, loss=line.loss, seconds=line.seconds) for name in STAGES if (line := seed.stage(name))
    }
    if seed.score:  # the submitted line may not be the last of its stage
        stages[seed.score.stage] = Stage(bpb=seed.score.bpb, loss=seed.score.loss, seconds=seed.score.seconds)
    return SeedFigures(
        seed=seed.seed, stages=stages, settings=run.chosen, source=seed.place or run.file,
        figures={name: float(f.value) for name, f in run.figures.items() if isinstance(f.value, (int, float))},
        curve=tuple(
            Point(step=p.step, seconds=p.train_seconds, train_loss=p.train_loss, val_loss=p.val_loss) for p in run.curve
        ),
    )  # fmt: skip


def _facts_of_logs(paths: Sequence[Path]) -> dict[str, str]:
    """Versions and machine, where the logs say them."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()]
    versions = sorted({found[1] for text in texts if (found := TORCH.search(text))})
    gpus = sorted({found[1].strip() for text in texts if (found := GPU.search(text))})
    facts = {"torch": ", ".join(versions), "device": ", ".join(f"NVIDIA {gpu}" for gpu in gpus)}
    return {name: text for name, text in facts.items() if text}


# ── ours ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def side_of_study(home: Home, study_name: str) -> tuple[Side, str]:
    """Our study's best point, or its only arm, and the stage that it is judged by. Raises ConfigError without any run."""
    evidence = gather(home, study_name)
    arm = evidence.arm(BEST_ARM) or next(iter(evidence.arms), None)
    if arm is None:
        raise ConfigError(f"study {study_name!r} has no confirmed runs yet", hint="run it first")
    complete = [run for run in arm.runs if run.result and run.result.status == COMPLETE]
    side = Side(
        name=f"{study_name}:{arm.name}", seeds=tuple(_own(home, run) for run in complete), facts=_own_facts(home, complete),
        problems=_missing(arm),
    )  # fmt: skip
    return side, evidence.objective


def _missing(arm: ArmEvidence) -> tuple[str, ...]:
    return tuple(
        f"seed {run.seed} of ours has no score: {run.state}{': ' + run.reason if run.reason else ''}"
        for run in arm.missing
    )


def _own(home: Home, run: RunEvidence) -> SeedFigures:
    result = run.result
    assert result is not None, "it is complete"
    scores = result.scores
    spec = protocol.read_spec(home.run(run.run_id).spec)
    values = {
        "steps": result.steps, "train_seconds": result.train_seconds, "code_bytes": result.bundle_bytes,
        "model_bytes": result.model_bytes, "total_bytes": result.artifact_bytes, "parameters": result.parameters,
        "world_size": result.world_size, "peak_memory_bytes": result.peak_memory_bytes,
        "val_tokens": max((score.tokens for score in scores.values()), default=0),
        "batch_tokens": spec.config.get("data", {}).get("tokens_per_step", 0),
    }  # fmt: skip
    return SeedFigures(
        seed=run.seed, figures={name: float(value) for name, value in values.items() if value},
        stages={name: Stage(bpb=s.bpb, loss=s.loss, seconds=s.seconds) for name, s in scores.items()},
        settings=_own_settings(spec), curve=tuple(_own_curve(home, run)), source=run.source,
    )  # fmt: skip


def _own_settings(spec: Spec) -> dict[str, str]:
    return {name: str(value) for name, value in spec.config.get("env", {}).items()} if spec.script else {}


def _own_curve(home: Home, run: RunEvidence) -> Iterator[Point]:
    store = RunStore(home)
    attempt = store.deciding_attempt(run.run_id)
    for event in store.curve(attempt) if attempt else ():
        if event.get("kind") == METRIC and {TRAIN_LOSS, VAL_LOSS} & set(event["values"]):
            losses = event["values"]
            yield Point(
                step=event["step"], seconds=event["train_seconds"] or None, train_loss=losses.get(TRAIN_LOSS),
                val_loss=losses.get(VAL_LOSS),
            )  # fmt: skip


def _own_facts(home: Home, runs: Sequence[RunEvidence]) -> dict[str, str]:
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, text in _facts_of_run(home, run):
            if text:
                found.setdefault(name, {})[text] = None
    return {name: ", ".join(texts) for name, texts in found.items()}


def _facts_of_run(home: Home, run: RunEvidence) -> Iterator[tuple[str, str]]:
    spec = protocol.read_spec(home.run(run.run_id).spec)
    manifest = DataDir(Path(spec.data_dir)).manifest
    source = protocol.read_manifest(manifest).source if manifest.is_file() else spec.data_dir
    yield "data", f"{source} (manifest {spec.manifest_sha256[:12]})"
    yield "code", f"{spec.script or spec.preset}, SHA-256 {spec.bundle_sha256[:12]}"
    yield "device", run.result.device if run.result else ""
    attempt = RunStore(home).deciding_attempt(run.run_id)
    if attempt is not None:
        started = (event for _, event in protocol.read_lines(attempt.events) if event.get("kind") == START)
        yield "torch", str(next(started, {}).get("torch", ""))
    for warning in run.warned:
        yield "warned", warning


# ── the comparison ──────────────────────────────────────────────────────────────────────────────────────────────────


def reproduce(home: Home, study_name: str, imported: ImportedRecord) -> Reproduction:
    """Put a record beside a study's runs and write both forms of the report. Raises ConfigError, StorageError."""
    ours, objective = side_of_study(home, study_name)
    theirs = side_of_record(imported)
    found = compare(ours, theirs, _common_stage(ours, theirs, imported.record.stage or objective))
    files = home.study(study_name)
    write_bytes_atomically(files.reproduction_text, as_report(found).encode())
    content = json.dumps(as_record(found), indent=1, allow_nan=False) + "\n"
    write_bytes_atomically(files.reproduction_data, content.encode())
    return found


def _common_stage(ours: Side, theirs: Side, wanted: str) -> str:
    """The record's own stage, else the last that both have; empty where there is none."""
    common = [stage for stage in STAGES if ours.values(stage) and theirs.values(stage)]
    return wanted if wanted in common else common[-1] if common else ""


def compare(ours: Side, theirs: Side, stage: str) -> Reproduction:
    """The two sides at one stage."""
    spread = _sigma(ours, theirs, stage) if stage else None
    difference = None
    if stage and spread:
        difference = known_spread(ours.summary(stage), theirs.summary(stage), std=spread[0])
    is_comparable, differing = _is_same_data(ours, theirs, stage), tuple(_differing(ours, theirs))
    problems = [*ours.problems, *theirs.problems, *_seed_problems(ours)]
    if not is_comparable and stage:
        problems.append("the two sides were scored on other data: their bits per byte are not of the same bytes")
    return Reproduction(
        ours=ours, theirs=theirs, stage=stage, difference=difference, sigma=spread[0] if spread else None,
        degrees_of_freedom=spread[1] if spread else 0, sigma_from=spread[2] if spread else "", differing=differing,
        is_comparable=is_comparable, tables=tuple(_tables(ours, theirs, stage, differing)),
        verdict=_verdict(ours, theirs, stage, difference, spread, is_comparable=is_comparable), problems=tuple(problems),
    )  # fmt: skip


def _sigma(ours: Side, theirs: Side, stage: str) -> tuple[float, int, str] | None:
    """Standard deviation of one run, its degrees of freedom and where it is from; None where nothing tells it."""
    own = [ours.summary(stage), theirs.summary(stage)]
    found = pooled_std(own)
    if found and found[0] and found[1] >= FEWEST_DEGREES:
        return *found, "both sides' seeds"
    published = [record.arm.summary for record in published_records().values()]
    known = [summary for summary in published if summary.std]
    found = pooled_std([*own, *known])
    return (*found, f"both sides' seeds and those of {len(known)} published records") if found and found[0] else None


def _ratio(side: Side, stage: str) -> float | None:
    """Tokens per byte that a side's losses and scores imply."""
    values = [seed.stages[stage] for seed in side.seeds if stage in seed.stages]
    return mean([value.bpb * math.log(2) / value.loss for value in values if value.loss])


def _is_same_data(ours: Side, theirs: Side, stage: str) -> bool:
    """Whether both sides count the same bytes for the same tokens, as far as is known."""
    a, b = (_ratio(side, stage) for side in (ours, theirs)) if stage else (None, None)
    tokens = [side.figure("val_tokens") for side in (ours, theirs)]
    has_same_tokens = None in tokens or math.isclose(tokens[0] or 0, tokens[1] or 0, rel_tol=1e-3)
    return has_same_tokens and (a is None or b is None or math.isclose(a, b, rel_tol=SAME_DATA))


def _seed_problems(ours: Side) -> Iterator[str]:
    """Seeds that change nothing: their first losses are one and the same."""
    first = {
        seed.seed: (point.step, point.train_loss)
        for seed in ours.seeds
        if (point := next((p for p in seed.curve if p.train_loss is not None), None))
    }
    if len(first) > 1 and len(set(first.values())) == 1:
        step, loss = next(iter(first.values()))
        yield f"all {len(first)} seeds of ours have the loss {loss} at step {step}: the seed reaches nothing"


def _verdict(
    ours: Side, theirs: Side, stage: str, found: Difference | None, spread: tuple[float, int, str] | None, *,
    is_comparable: bool,
) -> str:  # fmt: skip
    """One sentence that says whether the claim holds."""
    if not stage:
        return f"Nothing can be said: {ours.name} and {theirs.name} have no score of the same stage."
    a, b = ours.summary(stage), theirs.summary(stage)
    head = (
        f"{ours.name} has {STAGE_NAMES[stage]} {bpb(a.mean)} over {a.count} seed{'s' if a.count != 1 else ''}, "
        f"{theirs.name} claims {bpb(b.mean)} over {b.count}"
    )
    if not is_comparable:
        return f"{head}: not comparable, the validation data differ."
    if found is None or found.value is None or found.statistic is None or spread is None:
        return f"{head}: no spread is known, so nothing follows."
    sigma, freedom, source = spread
    figures = f"{signed(found.value)}, z = {found.statistic:+.2f} by σ {sigma:.5f} of one run ({source}, {freedom} degrees of freedom)"
    if abs(found.statistic) <= NOISE:
        return f"{head}: {figures}. Within noise, the claim holds."
    return f"{head}: {figures}. Our runs are {'better' if found.value < 0 else 'worse'} than the claim, beyond noise."


# ── what differs ────────────────────────────────────────────────────────────────────────────────────────────────────

COMPARED = {
    "parameters": "parameters", "batch_tokens": "tokens of a step", "world_size": "processes", "val_tokens": "validation tokens",
    "train_shards": "training shards", "limit_seconds": "limit of training, s", "planned_steps": "planned steps",
}  # fmt: skip


def _differing(ours: Side, theirs: Side) -> Iterator[tuple[str, str, str]]:
    """(what, ours, theirs) of what both say and say differently, and of what one alone says of data and machine."""
    for name, words in COMPARED.items():
        a, b = ours.figure(name), theirs.figure(name)
        if a is not None and b is not None and a != b:
            yield words, f"{a:,.10g}", f"{b:,.10g}"
    for name in dict.fromkeys((*ours.facts, *theirs.facts)):
        a_text, b_text = ours.facts.get(name, ""), theirs.facts.get(name, "")
        if a_text != b_text:
            yield name, a_text or "not known", b_text or "not known"
    for name in sorted({name for seed in ours.seeds for name in seed.settings}):
        values = sorted({seed.settings[name] for seed in ours.seeds if name in seed.settings})
        own = sorted({seed.settings[key] for seed in theirs.seeds for key in seed.settings if key.upper() == name})
        if values != own:
            yield f"env.{name}", ", ".join(values), ", ".join(own) or "as the script has it"


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tables(ours: Side, theirs: Side, stage: str, differing: Sequence[tuple[str, str, str]]) -> Iterator[Table]:
    found = [
        _seeds_table(ours, theirs, stage), _stages_table(ours, theirs), _sizes_table(ours, theirs),
        _curves_table(ours, theirs), Table(title="What differs", columns=("What", "Ours", "Record"), rows=tuple(differing)),
    ]  # fmt: skip
    yield from (table for table in found if table.rows)


def _seeds_table(ours: Side, theirs: Side, stage: str) -> Table:
    a, b = ours.values(stage), theirs.values(stage)
    rows = [
        (
            str(seed) if seed is not None else ABSENT,
            bpb(a.get(seed)),
            bpb(b.get(seed)),
            signed(_minus(a.get(seed), b.get(seed))),
        )
        for seed in dict.fromkeys((*a, *b))
    ]
    means = mean(list(a.values())), mean(list(b.values()))
    if rows:
        rows.append(("mean", bpb(means[0]), bpb(means[1]), signed(_minus(*means))))
        rows.append(("std (n−1)", bpb(ours.summary(stage).std), bpb(theirs.summary(stage).std), ""))
    return Table(
        title=f"By seed, {STAGE_NAMES.get(stage, 'no common stage')}", columns=("Seed", "Ours", "Record", "Difference"),
        rows=tuple(rows), summary_rows=2 if rows else 0,
    )  # fmt: skip


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _stages_table(ours: Side, theirs: Side) -> Table:
    rows = []
    for stage in STAGES:
        a, b = (mean(list(side.values(stage).values())) for side in (ours, theirs))
        if a is not None or b is not None:
            times = [_stage_seconds(side, stage) for side in (ours, theirs)]
            rows.append(
                (STAGE_NAMES[stage], bpb(a), bpb(b), signed(_minus(a, b)), seconds(times[0]), seconds(times[1]))
            )
    return Table(
        title="By stage", columns=("Stage", "Ours", "Record", "Difference", "Ours, s", "Record, s"), rows=tuple(rows),
        note="Means over the seeds that have the stage.",
    )  # fmt: skip


def _stage_seconds(side: Side, stage: str) -> float | None:
    return mean([s for seed in side.seeds if stage in seed.stages and (s := seed.stages[stage].seconds)])


def _sizes_table(ours: Side, theirs: Side) -> Table:
    """Bytes, steps and speed."""

    def speed(side: Side) -> float | None:
        steps, time = side.figure("steps"), side.figure("train_seconds")
        return 1000 * time / steps if steps and time else None

    def tokens(side: Side) -> float | None:
        step, batch = speed(side), side.figure("batch_tokens")
        return 1000 * batch / step if step and batch else None

    def named(name: str) -> Callable[[Side], float | None]:
        return lambda side: side.figure(name)

    wanted: tuple[tuple[str, Callable[[Side], float | None], Callable[[float | None], str]], ...] = (
        ("Code bytes", named("code_bytes"), whole), ("Model bytes", named("model_bytes"), whole),
        ("Artifact bytes", named("total_bytes"), whole), ("Parameters", named("parameters"), whole),
        ("Steps", named("steps"), whole), ("Training seconds", named("train_seconds"), seconds),
        ("ms a step", speed, seconds), ("Tokens a second", tokens, whole), ("Peak memory, bytes", named("peak_memory_bytes"), whole),
    )  # fmt: skip
    rows = []
    for label, of, text in wanted:
        a, b = of(ours), of(theirs)
        if a is not None or b is not None:
            share = f"{a / b:.3f}" if a is not None and b else ABSENT
            rows.append((label, text(a), text(b), share))
    return Table(title="Bytes, steps and speed", columns=("What", "Ours", "Record", "Ours ÷ record"), rows=tuple(rows))


def _curves_table(ours: Side, theirs: Side) -> Table:
    """Losses at equal steps and at equal seconds, over the stretch that both sides logged."""
    rows = []
    for kind, label in (("val_loss", "validation"), ("train_loss", "training")):
        for way, unit in (("step", "steps"), ("seconds", "s")):
            for at in _places(ours, theirs, kind, way):
                a, b = (_mean_at(side, kind, way, at) for side in (ours, theirs))
                rows.append((label, f"{at:,.0f} {unit}", _loss(a), _loss(b), _signed_loss(a, b)))
    return Table(
        title="At equal steps and equal time", columns=("Loss", "At", "Ours", "Record", "Difference"), rows=tuple(rows),
        note="Nats per token, between the logged steps on a straight line; a training loss is one batch's.",
    )  # fmt: skip


def _loss(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def _signed_loss(a: float | None, b: float | None) -> str:
    return ABSENT if a is None or b is None else f"{a - b:+.4f}".replace("-", "−")


def _pairs(seed: SeedFigures, kind: str, way: str) -> list[tuple[float, float]]:
    """(step or seconds, loss) of a seed, rising."""
    found = {
        float(x): y for point in seed.curve
        if (x := getattr(point, way)) is not None and (y := getattr(point, kind)) is not None and math.isfinite(y)
    }  # fmt: skip
    return sorted(found.items())


def _places(ours: Side, theirs: Side, kind: str, way: str) -> list[float]:
    """Where both sides have a value."""
    spans = [
        (pairs[0][0], pairs[-1][0])
        for side in (ours, theirs)
        for seed in side.seeds
        if (pairs := _pairs(seed, kind, way))
    ]
    has_both = all(any(_pairs(seed, kind, way) for seed in side.seeds) for side in (ours, theirs))
    if not spans or not has_both:
        return []
    low, high = max(start for start, _ in spans), min(end for _, end in spans)
    return [at for part in POINTS if (at := part * high) >= low and high > 0]


def _mean_at(side: Side, kind: str, way: str, at: float) -> float | None:
    values = [_interpolated(pairs, at) for seed in side.seeds if (pairs := _pairs(seed, kind, way))]
    return mean([value for value in values if value is not None])


def _interpolated(pairs: Sequence[tuple[float, float]], at: float) -> float | None:
    """The value at a place between two points; None outside them."""
    index = bisect_left([x for x, _ in pairs], at)
    if index < len(pairs) and pairs[index][0] == at:
        return pairs[index][1]
    if index in (0, len(pairs)):
        return None
    (x0, y0), (x1, y1) = pairs[index - 1], pairs[index]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_report(found: Reproduction) -> str:
    """The whole of it in Markdown."""
    problems = [f"- {problem}" for problem in found.problems]
    head = [f"# {found.ours.name} beside {found.theirs.name}", "", f"> {found.verdict}", ""]
    return "\n".join([*head, *problems, *([""] if problems else []), "\n\n".join(map(as_markdown, found.tables)), ""])


def as_lines(found: Reproduction) -> str:
    """The same for a terminal."""
    problems = [f"warning: {problem}" for problem in found.problems]
    return "\n\n".join([*map(as_text, found.tables), found.verdict, *problems])


def as_record(found: Reproduction) -> dict[str, Any]:
    """Plain JSON values, in full precision."""
    return {
        "ours": found.ours.name, "record": found.theirs.name, "stage": found.stage, "verdict": found.verdict,
        "is_comparable": found.is_comparable,
        "difference": dataclasses.asdict(found.difference) if found.difference else None,
        "z": found.difference.statistic if found.difference else None,
        "sigma": found.sigma, "degrees_of_freedom": found.degrees_of_freedom, "sigma_from": found.sigma_from,
        "differing": [{"what": what, "ours": a, "record": b} for what, a, b in found.differing],
        "problems": list(found.problems),
        "sides": {word: _side_record(side) for word, side in (("ours", found.ours), ("record", found.theirs))},
        "tables": [
            {"title": table.title, "columns": table.columns, "rows": [[str(cell) for cell in row] for row in table.rows]}
            for table in found.tables
        ],
    }  # fmt: skip


def _side_record(side: Side) -> dict[str, Any]:
    return {
        "name": side.name, "facts": dict(side.facts),
        "seeds": [
            {
                "seed": seed.seed, "source": seed.source, "figures": dict(seed.figures), "settings": dict(seed.settings),
                "stages": {stage: dataclasses.asdict(value) for stage, value in seed.stages.items()},
            }
            for seed in side.seeds
        ],
    }  # fmt: skip
