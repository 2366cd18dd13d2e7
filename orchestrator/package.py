"""The submission folder of a record: made from its runs alone, refused where the set is incomplete or mixed, and reviewed.

README.md, submission.json, train_gpt.py, requirements.txt
train_seedN.log       a seed's log, in the form that parsers of public records read
spec_seedN.json       what the script is asked to do for that seed, so that it runs from the folder
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import __version__, presets
from orchestrator.acceptance import objections
from orchestrator.cells import as_markdown, params_text
from orchestrator.checks import FAILED
from orchestrator.disagreements import LIMITS, README
from orchestrator.errors import ConfigError
from orchestrator.evidence import ArmEvidence, RunEvidence, gather
from orchestrator.family import Relative, families
from orchestrator.home import Home
from orchestrator.ledger import BEST_ARM
from orchestrator.log_text import decimals, log_text
from orchestrator.review import REQUIREMENTS, SEEDS, Evaluated, Review, review, without_hardware
from orchestrator.runs import PLANNED, RunStore
from orchestrator.source_run import differences
from orchestrator.statistics import STD_CONVENTION, mean, sample_std
from orchestrator.tables import record_table
from trainer import protocol
from trainer.config import Config, from_mapping, knob_value
from trainer.protocol import COMPLETE, Result, RunDir, Spec, read_json, read_spec, sha256_of, write_bytes_atomically

RECORD_TRACK, OPEN_TRACK = TRACKS = ("10min_16mb", "non_record_16mb")
RECORD_DEVICE, RECORD_GPUS = "H100", 8
DATA_FOLDER = "data"  # of the shipped specs: where the reader puts the data set
NEEDED = ("torch", "numpy", "sentencepiece", "brotli", "constriction")
"""Packages that a bundle imports; triton comes with torch."""


@dataclass(frozen=True, kw_only=True)
class Submitter:
    """Who submits, and what they say of it."""

    author: str
    github_id: str
    name: str = ""
    """Of the record; made from its preset and knobs where empty."""

    blurb: str = ""
    track: str = ""
    """One of TRACKS; by the hardware of the runs where empty."""

    date: str = ""
    """Day of the submission; today where empty."""


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """One seed of the set, with everything that the folder is made from."""

    evidence: RunEvidence
    run: RunDir
    spec: Spec
    config: Config
    result: Result
    environment: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.evidence.seed

    @property
    def scored(self) -> protocol.Score:
        """The submitted score: the last stage's."""
        return self.result.scores[self.stage]

    @property
    def stage(self) -> str:
        return [stage for stage in protocol.STAGES if stage in self.result.scores][-1]

    @property
    def eval_seconds(self) -> float:
        """Seconds of every scored evaluation of the stored model."""
        return sum(score.seconds for stage, score in self.result.scores.items() if stage != protocol.POST_EMA)


@dataclass(frozen=True, kw_only=True)
class RecordSet:
    """A record that can be packaged."""

    study_name: str
    arm: ArmEvidence
    question: str
    objective: str
    seeds: tuple[SeedRun, ...]
    others: tuple[Relative, ...]
    """Runs of the same configuration that were started and are not in the set."""

    @property
    def first(self) -> SeedRun:
        return self.seeds[0]

    @property
    def values(self) -> list[float]:
        return [seed.scored.bpb for seed in self.seeds]


# ── the set ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def collect(home: Home, text: str) -> RecordSet:
    """The record that a text like `STUDY` or `STUDY:arm` names. Raises ConfigError with everything that speaks against it."""
    study_name, _, wanted = text.partition(":")
    evidence = gather(home, study_name)
    arms = {arm.name: arm for arm in evidence.arms}
    if not arms:
        raise ConfigError(
            f"study {study_name!r} has no runs on confirmation seeds", hint="end it first: caddie study run FILE"
        )
    name = wanted or (BEST_ARM if BEST_ARM in arms else next(iter(arms)))
    if name not in arms:
        raise ConfigError(f"study {study_name!r} has no arm {name!r}", hint=f"it has: {', '.join(arms)}")
    arm = arms[name]
    seeds = [_seed_run(home, run) for run in arm.runs if run.result is not None and run.result.status == COMPLETE]
    relatives, _ = families(home, [run.run_id for run in arm.runs])
    shown = {run.run_id for run in arm.runs}
    found = RecordSet(
        study_name=study_name, arm=arm, question=evidence.study.question, objective=evidence.objective, seeds=tuple(seeds),
        others=tuple(run for run in relatives if run.run_id not in shown and run.state != PLANNED),
    )  # fmt: skip
    if problems := list(obstacles(found)):
        more = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(
            f"{text} cannot be packaged:{more}", hint="a submission is one complete set of one configuration"
        )
    return found


def _seed_run(home: Home, evidence: RunEvidence) -> SeedRun:
    run = home.run(evidence.run_id)
    spec = read_spec(run.spec)
    attempt = RunStore(home).deciding_attempt(evidence.run_id)
    assert attempt is not None, "it is complete"
    assert evidence.result is not None, "it is complete"
    environment = read_json(attempt.env) if attempt.env.is_file() else {}
    return SeedRun(
        evidence=evidence,
        run=run,
        spec=spec,
        config=_config(run, spec),
        result=evidence.result,
        environment=environment,
    )


def _config(run: RunDir, spec: Spec) -> Config:
    if spec.script:
        raise ConfigError(
            f"{run.spec}: the run is of somebody else's script, {spec.script}: its folder is made by its author",
            hint=f"what it was run from is in {run.root}, its logs are in {run.attempt(1).work.parent}",
        )
    try:
        return from_mapping(spec.config)
    except ConfigError as error:
        raise ConfigError(
            f"{run.spec}: this version of caddie cannot read the run's configuration: {error}",
            hint=f"package it with the version that planned it: {spec.code.get('git_sha', 'unknown commit')}",
        ) from error


def obstacles(found: RecordSet) -> Iterator[str]:
    """Everything that makes a set incomplete, mixed or not acceptable."""
    for run in found.arm.missing:
        yield f"seed {run.seed} has no complete result ({run.state}{': ' + run.reason if run.reason else ''})"
    if not found.seeds:
        return
    for words, values in (
        ("bundles", {seed.spec.bundle_sha256 for seed in found.seeds}),
        ("configurations", {json.dumps(seed.spec.config, sort_keys=True) for seed in found.seeds}),
        ("data sets", {seed.spec.manifest_sha256 for seed in found.seeds}),
        ("stages of the submitted score", {seed.stage for seed in found.seeds}),
        ("numbers of processes", {seed.result.world_size for seed in found.seeds}),
    ):  # fmt: skip
        if len(values) > 1:
            yield f"its seeds are of {len(values)} {words}"
    for seed in found.seeds:
        yield from _seed_obstacles(seed)
    yield from objections(found.first.config)
    if why := _not_accepted(found.first.spec.preset):
        yield f"preset {found.first.spec.preset} is not accepted in submissions: {why}"


def _seed_obstacles(seed: SeedRun) -> Iterator[str]:
    place, result = f"seed {seed.seed} ({seed.run.run_id})", seed.result
    if not seed.run.bundle.is_file() or sha256_of(seed.run.bundle) != seed.spec.bundle_sha256:
        yield f"{place}: its {seed.run.bundle.name} is not the one that it ran"
    if seed.run.artifact.is_file() and sha256_of(seed.run.artifact) != result.artifact_sha256:
        yield f"{place}: its model file is not the one that it wrote"
    if result.artifact_bytes > LIMITS.artifact_bytes:
        yield f"{place}: {result.artifact_bytes:,} bytes, the cap is {LIMITS.artifact_bytes:,}"
    if result.resumed_from:
        yield f"{place}: training was resumed, a record run is uninterrupted"
    if seed.spec.source:
        yield f"{place}: it scores another run's model and trains nothing"
    for verdict, what in ((seed.evidence.verified, "clean-room check"), (seed.evidence.audited, "audit")):
        if verdict == FAILED:
            yield f"{place}: it failed its {what}"


def _not_accepted(preset: str) -> str:
    try:
        return presets.not_accepted(preset)
    except ConfigError:  # the preset's file is gone; the configuration is in the spec
        return ""


# ── the folder ──────────────────────────────────────────────────────────────────────────────────────────────────────


def package(home: Home, found: RecordSet, out: Path, who: Submitter) -> Review:
    """Write the folder, whole or not at all, and review it. Raises ConfigError where it exists or the set is too small."""
    track = who.track or track_of(found)
    needed = SEEDS if track == RECORD_TRACK else 1
    if len(found.seeds) < needed:
        raise ConfigError(
            f"{found.study_name} has {len(found.seeds)} seeds, {track} needs {needed}",
            hint=f"run more of them, or take --track {OPEN_TRACK}",
        )
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise ConfigError(f"{out}: this is not an empty folder", hint="name a new one with --out DIR")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, content in files(home, found, dataclasses.replace(who, track=track), partial):
        write_bytes_atomically(partial / name, content)
    if out.is_dir():
        out.rmdir()
    partial.replace(out)
    return reviewed(out, found, track)


def reviewed(folder: Path, found: RecordSet, track: str) -> Review:
    """What a reviewer finds in the folder, with the runs' clean-room checks as evidence."""
    seen = review(folder, evaluated=list(evaluations(found)), seeds=SEEDS if track == RECORD_TRACK else 1)
    return seen if track == RECORD_TRACK else without_hardware(seen)


def evaluations(found: RecordSet) -> Iterator[Evaluated]:
    """The verdicts of clean-room checks that the runs have."""
    for seed in found.seeds:
        if seed.run.verify.is_file():
            record = read_json(seed.run.verify)
            yield Evaluated(
                seed.seed, str(record.get("verdict", "")), str(record.get("bundle_sha256", "")), str(seed.run.verify)
            )


def track_of(found: RecordSet) -> str:
    """The record track for runs on its hardware, else the open one."""
    is_record = all(
        RECORD_DEVICE in seed.result.device and seed.result.world_size == RECORD_GPUS for seed in found.seeds
    )
    return RECORD_TRACK if is_record else OPEN_TRACK


def files(home: Home, found: RecordSet, who: Submitter, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file."""
    described = submission(found, who)
    yield RunDir(folder).bundle.name, found.first.run.bundle.read_bytes()
    for seed in found.seeds:
        attempt = RunStore(home).deciding_attempt(seed.run.run_id)
        events = [event for _, event in protocol.read_lines(attempt.events)] if attempt else []
        yield log_name(seed.seed), log_text(seed.spec, seed.config, seed.result, events).encode()
        shipped = dataclasses.replace(seed.spec, data_dir=DATA_FOLDER)
        yield spec_name(folder, seed.seed), (json.dumps(dataclasses.asdict(shipped), indent=1) + "\n").encode()
    yield REQUIREMENTS, requirements(found).encode()
    yield "submission.json", (json.dumps(described, indent=2, ensure_ascii=False) + "\n").encode()
    yield README, readme(found, who, described, folder).encode()


def log_name(seed: int) -> str:
    return f"train_seed{seed}.log"


def spec_name(folder: Path, seed: int) -> str:
    """Name of a seed's spec in the folder."""
    spec = RunDir(folder).spec
    return f"{spec.stem}_seed{seed}{spec.suffix}"


def requirements(found: RecordSet) -> str:
    """Packages that the script needs, as the first seed's machine had them."""
    installed = found.first.environment.get("packages", {})
    versions = {name: installed.get(name) for name in NEEDED}
    return "".join(
        f"{name}=={re.sub(r'[+].*', '', version)}\n" if version else f"{name}\n" for name, version in versions.items()
    )


def changed_knobs(found: RecordSet) -> dict[str, Any]:
    """Knobs that differ from the trainer's defaults."""
    config = found.first.config
    return {knob: knob_value(config, knob) for knob in differences(config, Config())}


# ── submission.json ─────────────────────────────────────────────────────────────────────────────────────────────────


def submission(found: RecordSet, who: Submitter) -> dict[str, Any]:
    """The fields that public records have; every number is from the results."""
    seeds, losses = found.seeds, [seed.scored.loss for seed in found.seeds]
    artifacts = [seed.result.artifact_bytes for seed in seeds]
    installed = found.first.environment.get("packages", {})
    record = {
        "author": who.author, "github_id": who.github_id, "name": who.name or _name(found),
        "blurb": who.blurb or found.question, "date": who.date or time.strftime("%Y-%m-%d", time.gmtime()), "track": who.track,
        "val_loss": _rounded(mean(losses)), "val_bpb": _rounded(mean(found.values)),
        "val_loss_std": _rounded(sample_std(losses)), "val_bpb_std": _rounded(sample_std(found.values)),
        "std_convention": STD_CONVENTION, "submitted_stage": found.first.stage,
        "seeds": [seed.seed for seed in seeds],
        "seed_results": {str(seed.seed): _seed_result(seed) for seed in seeds},
        "artifact_bytes_mean": round(sum(artifacts) / len(artifacts)), "artifact_bytes_max": max(artifacts),
        "bytes_total": max(artifacts), "bytes_code": found.first.result.bundle_bytes,
        "train_time_s_mean": _rounded(mean([seed.result.train_seconds for seed in seeds]), 3),
        "eval_time_s_mean": _rounded(mean([seed.eval_seconds for seed in seeds]), 3),
        "hardware": _hardware(found), "pytorch_version": installed.get("torch"),
        "technique_summary": _summary(found), "compliance": compliance(found),
        "source_sha256": found.first.spec.bundle_sha256, "manifest_sha256": found.first.spec.manifest_sha256,
        "other_runs_of_this_configuration": [_other(run, found.first.stage) for run in found.others],
        "caddie": __version__,
    }  # fmt: skip
    return {name: value for name, value in record.items() if value is not None}


def _rounded(value: float | None, digits: int = 8) -> float | None:
    return None if value is None else round(value, digits)


def _seed_result(seed: SeedRun) -> dict[str, Any]:
    """In the precision of the log's line, which is all of it."""
    return {
        "val_loss": float(decimals(seed.scored.loss)), "val_bpb": float(decimals(seed.scored.bpb)),
        "artifact_bytes": seed.result.artifact_bytes, "steps": seed.result.steps,
        "train_time_s": round(seed.result.train_seconds, 3), "eval_time_s": round(seed.scored.seconds, 3),
        "run_id": seed.run.run_id,
    }  # fmt: skip


def _name(found: RecordSet) -> str:
    return f"{Path(found.first.spec.preset).stem}: {params_text(found.arm.params)}"


def _hardware(found: RecordSet) -> str:
    result, gpus = found.first.result, found.first.environment.get("gpus", [])
    described = gpus[0].split(",")[0].strip() if gpus else result.device or "unknown"
    return f"{result.world_size}x {described}"


def _summary(found: RecordSet) -> str:
    """The techniques that the configuration names by its choices."""
    changed = {knob: value for knob, value in changed_knobs(found).items() if isinstance(value, (str, bool))}
    listed = ", ".join(f"{knob} = {value}" for knob, value in changed.items())
    return f"Caddie's trainer, preset {Path(found.first.spec.preset).stem}{'; ' + listed if listed else ''}"


def compliance(found: RecordSet) -> dict[str, bool]:
    """The block that records carry, each from numbers; what only an audit shows stands there where it passed."""
    results = [seed.result for seed in found.seeds]
    shown = {
        "train_under_600s": all(result.train_seconds <= LIMITS.train_seconds for result in results),
        "artifact_under_16mb": all(result.artifact_bytes <= LIMITS.artifact_bytes for result in results),
        "eval_under_600s": all(seed.eval_seconds <= LIMITS.eval_seconds for seed in found.seeds),
        "three_seeds": len(found.seeds) >= SEEDS,
    }
    is_audited = all(seed.evidence.audited == "passed" for seed in found.seeds)
    return shown | ({"score_first_ttt": True} if is_audited and found.first.config.ttt.method != "off" else {})


def _other(run: Relative, stage: str) -> dict[str, Any]:
    return {"seed": run.seed, "run_id": run.run_id, "state": run.state, "val_bpb": run.bpb(stage)}


# ── README.md ───────────────────────────────────────────────────────────────────────────────────────────────────────


def readme(found: RecordSet, who: Submitter, described: dict[str, Any], folder: Path) -> str:
    """What it is, its numbers with their places, how to repeat it, and what else was run."""
    parts: Iterable[str] = (
        f"# {described['name']}", described["blurb"],
        f"**val_bpb {described['val_bpb']:.5f}**{_spread(described)}, {len(found.seeds)} seeds, at most "
        f"{described['bytes_total']:,} bytes of script and model.",
        _record_text(found), _stages(found), _repeat(found, folder), _settings(found), _evidence(found), _others(found),
    )  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _spread(described: dict[str, Any]) -> str:
    std = described.get("val_bpb_std")
    return "" if std is None else f" (std {std:.5f}, n−1)"


def _record_text(found: RecordSet) -> str:
    """The table in the challenge's form, each seed linked to its log."""
    table = record_table(found.arm, has_sources=False)
    plain = [tuple(str(cell) for cell in row) for row in table.rows]
    linked = [(f"[{row[0]}]({log_name(int(row[0]))})", *row[1:]) if row[0].isdecimal() else row for row in plain]
    return as_markdown(dataclasses.replace(table, title="Record", rows=tuple(linked)))


def _stages(found: RecordSet) -> str:
    """Every stage of every seed, with the line of the log that it stands on being the label of the stage."""
    stages = [stage for stage in protocol.STAGES if stage in found.first.result.scores]
    rows = [
        f"| {seed.seed} | " + " | ".join(f"{seed.result.scores[stage].bpb:.8f}" for stage in stages)
        + f" | {seed.result.train_seconds:,.1f} | {seed.eval_seconds:,.1f} |"
        for seed in found.seeds
    ]  # fmt: skip
    head = f"| Seed | {' | '.join(stages)} | train s | eval s |\n|---:|{'---:|' * (len(stages) + 2)}"
    return "\n".join(
        ["## Stages", "", head, *rows, "", f"The submitted score is the last stage's, `{found.first.stage}`."]
    )


def _repeat(found: RecordSet, folder: Path) -> str:
    run, first = RunDir(folder), found.first
    python = (
        "python"
        if first.result.world_size == 1
        else f"torchrun --standalone --nproc_per_node={first.result.world_size}"
    )
    commands = [
        f"pip install -r {REQUIREMENTS}",
        f"ln -s /where/the/data/set/is {DATA_FOLDER}   # its manifest has SHA-256 {first.spec.manifest_sha256[:16]}…",
        f"cp {spec_name(folder, first.seed)} {run.spec.name}   # or another seed's",
        f"{python} {run.bundle.name} . --attempt 1",
    ]
    listing = "\n".join(f"    {command}" for command in commands)
    return (
        f"## How to repeat it\n\nIn this folder; {run.bundle.name} is all of the code and is what was run "
        f"(SHA-256 `{first.spec.bundle_sha256}`):\n\n{listing}"
    )


def _settings(found: RecordSet) -> str:
    knobs = changed_knobs(found)
    lines = [f"- `{knob}` = {value}" for knob, value in knobs.items()] or ["- none"]
    return "\n".join(["## Settings that differ from the trainer's defaults", "", *lines])


def _evidence(found: RecordSet) -> str:
    lines = [
        f"- seed {seed.seed}: clean-room evaluation {seed.evidence.verified or 'not made'}, audit {seed.evidence.audited or 'not made'}, "
        f"run `{seed.run.run_id}`"
        for seed in found.seeds
    ]  # fmt: skip
    return "\n".join(["## Evidence", "", *lines])


def _others(found: RecordSet) -> str:
    if not found.others:
        return "No other run of this configuration was started."
    rows = [
        f"- seed {run.seed}, run `{run.run_id}`: {run.state}"
        + (f", {bpb:.8f}" if (bpb := run.bpb(found.first.stage)) is not None else "")
        for run in found.others
    ]  # fmt: skip
    return "\n".join(["## Other runs of this configuration", "", *rows])


# ── verification ────────────────────────────────────────────────────────────────────────────────────────────────────


def verify_seeds(
    found: RecordSet, *, data_dir: Path | None, gpus: int | None, timeout_seconds: float, say: Callable[[str], None]
) -> None:
    """Score each seed's model file with its bundle in an empty directory, and keep the verdicts, good or bad.

    Raises ConfigError, MachineError where that cannot be done here.
    """
    from orchestrator import findings, verify

    for seed in found.seeds:
        verdict = verify.verify(seed.run, data_dir=data_dir, gpus=gpus, timeout_seconds=timeout_seconds, say=say)
        findings.write(seed.run.verify, verdict)
        say(f"{seed.run.run_id}: {verdict.verdict}")
