"""Arms: what people name when they compare, as the scores of one configuration.

wd-qk-ttt-smoke            a study: its best point, or its only arm;  wd-qk-ttt-smoke:preset, :best, :trial-3
3f2a,9b1c                  runs, by id or the beginning of one
pr1493, #1493              a published record whose scores are known
2026-04-09_A2_Muon097      an imported record, by its name; imports/Muon097, by a part of it that no other has
records/2026-04-09_A2      the folder of a public record, as it lies
1.0810                     one number, taken as exact;  1.0808,1.0810,1.0812 the scores of seeds
1.060755±0.000933x6        mean, standard deviation (n - 1) and number of seeds
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from orchestrator import imports, record_folder
from orchestrator.errors import ConfigError
from orchestrator.evidence import Evidence, RunEvidence, ScoredArm, SeedScore, gather, run_evidence
from orchestrator.family import Relative, families, family_of
from orchestrator.home import Home
from orchestrator.ledger import BEST_ARM
from orchestrator.public_record import scored_arm as scored_arm_of
from orchestrator.published import find_published
from orchestrator.runs import find_run
from orchestrator.statistics import summary_of
from trainer import protocol
from trainer.config import nearest
from trainer.protocol import COMPLETE, STAGES, TTT

IMPORTS = "imports/"

NUMBER = r"\d+\.\d+(?:[eE][-+]?\d+)?"
NUMBERS = re.compile(rf"{NUMBER}(?:,{NUMBER})*")
STATED = re.compile(rf"({NUMBER})(?:±|\+-)({NUMBER})[x×](\d+)")


def find_arm(home: Home, text: str, *, stage: str | None = None) -> ScoredArm:
    """The arm that a text names, scored at `stage` (default: the last that all its runs have).

    Raises ConfigError with what there is; ProtocolError for damaged files.
    """
    if found := _literal(text):
        return found
    if found_record := find_published(text):
        return found_record.arm
    if text.startswith(IMPORTS) or text in home.import_names():
        return imports.arm_of(home, imports.find(home, text.removeprefix(IMPORTS)))
    name, _, arm = text.partition(":")
    if name in home.study_names():
        return study_arm(home, gather(home, name), arm, stage=stage)
    folder = Path(text).expanduser()
    if folder.is_dir() and record_folder.is_record(folder):
        return scored_arm_of(record_folder.read_record(folder), prefix=f"{folder}/")
    return _runs(home, text, stage)


def _literal(text: str) -> ScoredArm | None:
    """Numbers that stand for themselves."""
    if stated := STATED.fullmatch(text):
        summary = summary_of(int(stated[3]), float(stated[1]), float(stated[2]))
        return ScoredArm(name=text, scores=(), stated=summary)
    if not NUMBERS.fullmatch(text):
        return None
    values = [float(value) for value in text.split(",")]
    scores = tuple(SeedScore(seed=None, bpb=value, source="the command line") for value in values)
    return ScoredArm(name=text, scores=scores, constant=len(values) == 1)


# ── ours ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def study_arm(
    home: Home, evidence: Evidence, arm: str = "", *, stage: str | None = None, family: Sequence[Relative] | None = None
) -> ScoredArm:  # fmt: skip
    """An arm of a study by its name, or a trial's runs: by default the best point, else the only arm.

    `family` are the runs of its configurations, where they have been looked for. Raises ConfigError for an unknown arm.
    """
    owners = {found.name: found.runs for found in evidence.arms}
    searched = {f"trial-{found.trial.number}": found.runs for found in evidence.trials}
    owners |= searched
    if not owners:
        raise ConfigError(f"study {evidence.study.name!r} has no runs yet", hint="run it first: caddie study run FILE")
    chosen = arm or (BEST_ARM if BEST_ARM in owners else next(iter(owners)))
    if chosen not in owners:
        raise ConfigError(f"study {evidence.study.name!r} has no arm {arm!r}", hint=nearest(arm, owners))
    others = {} if chosen in searched else {name: runs for name, runs in owners.items() if name != chosen}
    apart = {run.run_id for runs in others.values() for run in runs} - {run.run_id for run in owners[chosen]}
    name = f"{evidence.study.name}:{chosen}"
    runs = owners[chosen]
    relatives = families(home, [run.run_id for run in runs])[0] if family is None else family
    cell = evidence.arm(chosen)
    stage = stage or (evidence.stage_of(cell) if cell else evidence.objective)
    return scored_arm(name, runs, relatives, stage=stage, apart=apart)


def scored_arm(
    name: str, runs: Sequence[RunEvidence], relatives: Sequence[Relative], *, stage: str, apart: Collection[str] = ()
) -> ScoredArm:  # fmt: skip
    """Runs of ours as an arm; what else ended of their configuration counts, but for runs set `apart` beforehand.

    Those of a search are: their seeds are not the record's, and were never to be shown as it.
    """
    shown = {run.run_id for run in runs}
    own = {run.family for run in relatives if run.run_id in shown}
    counted = [run for run in relatives if run.family in own and run.has_ended and run.run_id not in apart]
    complete = [run for run in runs if run.bpb(stage) is not None]
    return ScoredArm(
        name=name, stage=stage, scores=tuple(_score(run, stage) for run in complete), is_ours=True,
        missing=tuple(_missing(run) for run in runs if run.bpb(stage) is None), started=len(counted),
        problems=tuple(_unshown(run, stage) for run in counted if run.run_id not in shown),
    )  # fmt: skip


def _score(run: RunEvidence, stage: str) -> SeedScore:
    result = run.result
    assert result is not None, "it has a score"
    score = result.scores[stage]
    return SeedScore(
        seed=run.seed, bpb=score.bpb, nats_per_token=score.loss, steps=result.steps or None,
        train_seconds=result.train_seconds, eval_seconds=score.seconds, artifact_bytes=result.artifact_bytes or None,
        source=run.source, line=run.lines.get(f"/scores/{stage}/bpb", 0),
    )  # fmt: skip


def _missing(run: RunEvidence) -> str:
    return f"seed {run.seed}: {run.state}{': ' + run.reason if run.reason else ''} ({run.run_id})"


def _unshown(run: Relative, stage: str) -> str:
    """A run of the same configuration that the arm does not show."""
    bpb = run.bpb(stage)
    score = f", {bpb:.5f}" if bpb is not None else ""
    return (
        f"not shown: run {run.run_id} of the same configuration, seed {run.seed}, study {run.study}: {run.state}{score}"
    )


def _runs(home: Home, text: str, stage: str | None) -> ScoredArm:
    """Runs by id, which must be of one configuration."""
    try:
        found = [find_run(home, part) for part in text.split(",")]
    except ConfigError as error:
        known = ", ".join(home.study_names()) or "none yet"
        raise ConfigError(
            f"{text!r} names no study, run, imported or published record, and is no number",
            hint=f"studies: {known}; {error.hint}",
        ) from error
    kinds = {family_of(protocol.read_spec(run.spec)) for run in found}
    if len(kinds) > 1:
        raise ConfigError(
            f"{text}: the {len(found)} runs are of {len(kinds)} configurations, an arm has one",
            hint="compare them with one another, or name runs that differ in the seed alone",
        )
    runs = [run_evidence(home, run.run_id) for run in found]
    relatives, _ = families(home, [run.run_id for run in runs])
    return scored_arm(text, runs, relatives, stage=stage or last_stage(runs))


def last_stage(runs: Sequence[RunEvidence]) -> str:
    """The last stage of evaluation that every complete run has."""
    complete = [run for run in runs if run.result is not None and run.result.status == COMPLETE]
    common = [
        stage for stage in STAGES if complete and all(math.isfinite(run.bpb(stage) or math.nan) for run in complete)
    ]
    return common[-1] if common else TTT
