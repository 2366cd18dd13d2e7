"""The audit: whether a run's scores mean what they say. Probes, a replay of its log and a watched evaluation; its verdict.

`verify` shows that the files give the scores; here it is shown on what they depend, by measurements on a sample.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import bundle, clean_room, datasets
from orchestrator.budget import check_reach, check_seconds
from orchestrator.checks import (
    DATA,
    FAILED,
    MISSING,
    NOTED,
    PASSED,
    SPEC,
    UNDECIDED,
    Check,
    Claims,
    Rule,
    check_claims,
    check_evaluation,
    check_files,
    hash_of,
    judged,
    noted,
    obstacle,
    read_claims,
    read_data,
)
from orchestrator.clean_room import Evaluation
from orchestrator.conditions import check_conditions, tolerance
from orchestrator.errors import CaddieError, ConfigError, DataError, ProtocolError
from orchestrator.findings import Finding, check_table
from orchestrator.home import home_of
from orchestrator.liveness import check_liveness
from orchestrator.open_rules import note_open_rules
from orchestrator.runs import RunStore
from orchestrator.splits import check_split
from orchestrator.verify import choose_gpus, expectation, tolerance_of
from trainer import protocol
from trainer.config import Config
from trainer.protocol import DataDir, RunDir

PROBES = Rule(
    "probes",
    "the stored model must be fit to be probed",
    "put back the model file that the run wrote; else this version of caddie does not read it: audit with that of `code`",
)
MODEL = "model."  # beginning of the names of checks on the model file
SOURCE = Rule("probes.source", "the probes should run the code that the bundle was packed from", "")
LEFT_OUT = "left out: --no-evaluation"


@dataclass(frozen=True, kw_only=True)
class Audit(Finding):
    """All that was found of one run."""

    measured: dict[str, Any] | None
    """The probes' own numbers, and the sample that they were taken on; None where nothing was probed."""

    evaluation_seconds: float | None
    """Of the watched evaluation, from its start to its end; None without one."""


Pack = Callable[[Config], bytes]
"""Packs the trainer for a configuration."""

Prober = Callable[[RunDir, Path, Sequence[str], int, int], dict[str, Any]]
"""Measures a run on a data set, with these GPUs, a sample's size and its seed."""


def probe(run: RunDir, root: Path, gpus: Sequence[str], sample: int, seed: int) -> dict[str, Any]:
    """What the trainer measures of a run's stored model, in a process of its own, on one GPU or the CPU.

    Raises the trainer's errors; MachineError where it cannot run here.
    """
    options = ["audit", str(run.root), "--data", str(root), "--sample", str(sample), "--seed", str(seed)]
    return datasets.ask_trainer(options, CUDA_VISIBLE_DEVICES=",".join(gpus))


def audit(
    run: RunDir, *, data_dir: Path | None = None, gpus: int | None = None, sample: int, seed: int = 0,
    timeout_seconds: float, evaluates: bool = True, say: Callable[[str], None] = lambda _: None, prober: Prober = probe,
    pack: Pack = bundle.build,
) -> Audit:  # fmt: skip
    """Probe a run, replay its log and watch its evaluation, on its own data set or another copy of it; writes nothing.

    Raises ConfigError, MachineError, and OSError where the disk cannot take the copies.
    """
    if sample < 1:
        raise ConfigError(f"--sample must be at least 1 position, got {sample}", hint="leave it out for the default")
    started, claims = time.monotonic(), read_claims(run)
    visible = choose_gpus(claims, gpus)
    root = data_dir or (Path(claims.spec.data_dir) if claims.spec else None)
    data, data_checks = read_data(claims, root)
    checks = [*check_claims(claims), *check_files(claims), *data_checks]
    why_not = obstacle(claims, checks, data)
    why_not = why_not or next((_told(check) for check in checks if check.status == FAILED and _decides(check)), "")
    measured, evaluation = None, None
    if why_not or data is None or root is None:
        checks.append(dataclasses.replace(judged(PROBES, protocol.COMPLETE, None, run.artifact), note=why_not))
    else:
        say(f"{run.run_id}: probing {run.artifact.name} on {sample:,} positions, seed {seed}")
        try:
            measured = prober(run, root, visible[:1], sample, seed)
        except (DataError, ProtocolError) as error:
            checks.append(judged(PROBES, protocol.COMPLETE, str(error), run.artifact))
        if evaluates:
            say(f"{run.run_id}: scoring {run.artifact.name} alone, watched{expectation(claims)}")
            evaluation = clean_room.evaluate(
                run, DataDir(root), data.manifest, gpus=visible, timeout_seconds=timeout_seconds, is_watched=True
            )
    if measured is not None and root is not None:
        checks.append(check_source(claims, pack))
        checks += check_conditions(claims, measured)
        checks += check_split(measured, root)
        checks += check_liveness(RunStore(home_of(run)), claims, measured)
    checks += check_seconds(claims, evaluation)
    if evaluation is not None:
        checks += check_evaluation(claims, evaluation, tolerance_of(claims, visible)[0])
    checks += check_reach(claims, evaluation, why_not or LEFT_OUT)
    checks += note_open_rules(claims)
    return _concluded(claims, checks, measured, evaluation, root=root, seconds=time.monotonic() - started)


def _decides(check: Check) -> bool:
    """Whether nothing that is measured would be the run's: other files than its own, or none that can be read."""
    return check.name == SPEC.name or check.name.startswith((MODEL, DATA))


def _told(check: Check) -> str:
    return f"not probed: {check.name} failed"


def check_source(claims: Claims, pack: Pack) -> Check:
    """Whether the code that was probed is the bundle's own; else only the scores tie the two together."""
    assert claims.spec, "something was probed"
    assert claims.config, "something was probed"
    try:
        packed = hashlib.sha256(pack(claims.config)).hexdigest()
    except CaddieError as error:
        packed = str(error)
    planned, place = claims.spec.bundle_sha256, claims.run.bundle
    if packed == planned:
        return dataclasses.replace(judged(SOURCE, planned, packed, place), note="this source packs to the very bundle")
    tied = "another version's: c3.first_chunk and the watched evaluation show whether it scores alike"
    return noted(SOURCE, packed, place, f"{tied}; its code: {claims.spec.code.get('git_sha', 'unknown')}")


def _concluded(
    claims: Claims, checks: Sequence[Check], measured: dict[str, Any] | None, evaluation: Evaluation | None, *,
    root: Path | None, seconds: float,
) -> Audit:  # fmt: skip
    """The checks with all that is needed to repeat them."""
    run = claims.run
    hashes = [
        None if (found := hash_of(path)) == MISSING else found
        for path in (run.bundle, run.artifact, claims.result_file)
    ]
    return Audit(
        run_id=run.run_id, verdict=FAILED if any(check.status == FAILED for check in checks) else PASSED,
        checks=tuple(checks), measured=measured, bundle_sha256=hashes[0], artifact_sha256=hashes[1],
        result_sha256=hashes[2], data_dir=str(root or ""),
        evaluation_seconds=evaluation.wall_seconds if evaluation else None,
        failure=evaluation.failure if evaluation else None, wall_seconds=round(seconds, 2), time=time.time(),
    )  # fmt: skip


# ── as text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_text(found: Audit) -> str:
    """The table of all checks with what was measured, and on what sample."""
    return "\n".join([*check_table(found.checks, has_notes=True), "", *_conditions(found), "", summary(found)])


def _conditions(found: Audit) -> list[str]:
    """How the numbers came about."""
    lines = [f"data       {found.data_dir}"]
    if found.measured is not None:
        sample, device = found.measured["sample"], found.measured["device"]
        nats, reason = tolerance(device)
        whole = sample["last"] - sample["first"] == sample["positions"]
        places = "all of them" if whole else f"{sample['first']:,} to {sample['last'] - 1:,}"
        lines = [
            f"sample     {sample['last'] - sample['first']:,} of {sample['positions']:,} positions, {places}, seed {sample['seed']}; "
            f"rows of {sample['length']:,}, the last {sample['stride']:,} scored, chunks of {sample['chunk_tokens']:,}",
            f"tolerance  {nats:g} nats on {device}: {reason}",
            *lines,
        ]
    counts = Counter(check.status for check in found.checks)
    kinds = ", ".join(f"{counts[status]} {status}" for status in (PASSED, FAILED, UNDECIDED, NOTED) if counts[status])
    return [*lines, f"checks     {kinds}; {found.wall_seconds:.1f} s"]


def summary(found: Audit) -> str:
    """The verdict in one sentence."""
    failed, count = len(found.failed), sum(check.status != NOTED for check in found.checks)
    if not failed:
        passed = sum(check.status == PASSED for check in found.checks)
        return f"{found.run_id}: audited, {passed} of {count} checks passed"
    if found.exit_code == DataError.exit_code:
        return f"{found.run_id}: not audited, the data at hand are not the run's"
    return f"{found.run_id}: AUDIT FAILED, {failed} of {count} checks failed"
