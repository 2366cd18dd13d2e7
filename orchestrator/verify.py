"""Verification: a run checked against its own files and in a clean room, its verdict, and where that is kept."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator import clean_room
from orchestrator.checks import (
    DATA,
    EVALUATION,
    FAILED,
    MISSING,
    MODEL_HASH,
    PASSED,
    Check,
    Claims,
    check_claims,
    check_evaluation,
    check_files,
    hash_of,
    judged,
    obstacle,
    read_claims,
    read_data,
    seconds_of,
    undecided,
)
from orchestrator.clean_room import Evaluation
from orchestrator.errors import ConfigError, DataError, MachineError
from orchestrator.findings import Finding, check_table
from orchestrator.slots import machine_gpus
from trainer import protocol
from trainer.protocol import DataDir, RunDir

CPU = "cpu"  # a result's device where there was no GPU

CPU_TOLERANCE_BPB = 1e-6
CPU_REASON = "float32 on the CPU: only the order of sums differs, by threads and instruction set"
GPU_TOLERANCE_BPB = 2e-5
GPU_REASON = (
    "a GPU took part: bfloat16 products and atomic sums differ between kernels and numbers of processes, and test-time "
    "training carries that on; two in the fifth decimal, in which records are given"
)


@dataclass(frozen=True, kw_only=True)
class Verification(Finding):
    """All that a clean-room check of one run found."""

    tolerance_bpb: float
    tolerance_reason: str
    network: str
    """off, on, or not needed where nothing was run."""

    device: str
    world_size: int
    stage_seconds: dict[str, float]
    environment: dict[str, object]


# ── the run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def choose_gpus(claims: Claims, asked: int | None) -> tuple[str, ...]:
    """Ids of as many GPUs as are asked for, else as the run had; none for the CPU. Raises ConfigError, MachineError."""
    if asked is not None and asked < 0:
        raise ConfigError(f"--gpus must be at least 0, got {asked}", hint="--gpus 0 scores on the CPU")
    had = claims.result.world_size if claims.result and claims.result.device not in ("", CPU) else 0
    count, gpus = had if asked is None else asked, machine_gpus() if asked or had else []
    if len(gpus) < count:
        raise MachineError(
            f"{count} GPUs are needed to evaluate as {'the run did' if asked is None else 'asked'}, this machine offers {len(gpus)}",
            hint="verify where the run ran; --gpus N takes another number, and 0 the CPU, which round differently",
        )
    return tuple(gpus[:count])


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────────


def verify(
    run: RunDir, *, data_dir: Path | None = None, gpus: int | None = None, timeout_seconds: float,
    say: Callable[[str], None] = lambda _: None,
) -> Verification:  # fmt: skip
    """Check a run against its own files, on its own data set or another copy of it; writes nothing.

    Raises ConfigError, MachineError, and OSError where the disk cannot take the copies.
    """
    claims = read_claims(run)
    visible = choose_gpus(claims, gpus)
    root = data_dir or (Path(claims.spec.data_dir) if claims.spec else None)
    checks = [*check_claims(claims), *check_files(claims)]
    data, data_checks = read_data(claims, root)
    checks += data_checks
    tolerance, reason = tolerance_of(claims, visible)
    why_not = obstacle(claims, checks, data)
    evaluation = None
    if why_not or data is None or root is None:
        checks.append(dataclasses.replace(judged(EVALUATION, protocol.COMPLETE, None, run.artifact), note=why_not))
    else:
        say(f"{run.run_id}: scoring {run.artifact.name} alone{expectation(claims)}")
        evaluation = clean_room.evaluate(
            run, DataDir(root), data.manifest, gpus=visible, timeout_seconds=timeout_seconds
        )
        checks += weighed(check_evaluation(claims, evaluation, tolerance), checks)
    return verification(claims, checks, evaluation, root=root, tolerance=(tolerance, reason))


def tolerance_of(claims: Claims, gpus: Sequence[str]) -> tuple[float, str]:
    """Bits per byte within which a score must come out again, and why."""
    is_on_gpu = bool(gpus) or claims.claimed("device") not in (None, "", CPU)
    return (GPU_TOLERANCE_BPB, GPU_REASON) if is_on_gpu else (CPU_TOLERANCE_BPB, CPU_REASON)


def weighed(evaluated: Sequence[Check], checks: Sequence[Check]) -> list[Check]:
    """What an evaluation found, less what follows from other data or another model file than the run's."""
    failed = [check.name for check in checks if check.status == FAILED]
    if any(name.startswith(DATA) for name in failed):
        return [undecided(check, "the data are not the run's") for check in evaluated]
    if MODEL_HASH.name in failed:
        other = "the model file is not the run's"
        return [check if check.name == EVALUATION.name else undecided(check, other) for check in evaluated]
    return list(evaluated)


def expectation(claims: Claims) -> str:
    """How long the same took the run, in words."""
    seconds = seconds_of(claims.result) if claims.result else 0.0
    return f"; it took the run {seconds:.0f} s" if seconds else ""


def verification(
    claims: Claims,
    checks: Sequence[Check],
    evaluation: Evaluation | None,
    *,
    root: Path | None,
    tolerance: tuple[float, str],
) -> Verification:
    """The checks with all that is needed to repeat them."""
    run, result = claims.run, evaluation.result if evaluation else None
    hashes = [
        None if (found := hash_of(path)) == MISSING else found
        for path in (run.bundle, run.artifact, claims.result_file)
    ]
    network = "not needed" if evaluation is None else "off" if evaluation.is_offline else "on"
    return Verification(
        run_id=run.run_id, verdict=FAILED if any(check.status == FAILED for check in checks) else PASSED,
        checks=tuple(checks), bundle_sha256=hashes[0], artifact_sha256=hashes[1], result_sha256=hashes[2],
        data_dir=str(root or ""), tolerance_bpb=tolerance[0], tolerance_reason=tolerance[1], network=network,
        device=result.device if result else "", world_size=result.world_size if result else 0,
        wall_seconds=evaluation.wall_seconds if evaluation else 0.0,
        stage_seconds={stage: round(score.seconds, 2) for stage, score in result.scores.items()} if result else {},
        failure=evaluation.failure if evaluation else None,
        environment=evaluation.environment if evaluation else {}, time=time.time(),
    )  # fmt: skip


# ── as text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_text(found: Verification) -> str:
    """The table of all checks, and under what conditions they were made."""
    return "\n".join([*check_table(found.checks), "", *_conditions(found), "", summary(found)])


def _conditions(found: Verification) -> list[str]:
    """How the scores came about."""
    if not found.stage_seconds:
        return [f"data       {found.data_dir}"]
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in found.stage_seconds.items())
    no_namespace = " (this machine lets us make no network namespace)" if found.network == "on" else ""
    return [
        f"device     {found.device}, {found.world_size} process{'es' if found.world_size != 1 else ''}; network {found.network}{no_namespace}",
        f"time       {stages}; {found.wall_seconds:.1f} s from start to end, compilation included",
        f"tolerance  {found.tolerance_bpb:g} BPB: {found.tolerance_reason}",
        f"data       {found.data_dir}",
    ]


def summary(found: Verification) -> str:
    """The verdict in one sentence."""
    failed, count = len(found.failed), len(found.checks)
    if not failed:
        return f"{found.run_id}: verified, {sum(check.status == PASSED for check in found.checks)} of {count} checks passed"
    if found.exit_code == DataError.exit_code:
        return f"{found.run_id}: not verified, the data at hand are not the run's"
    return f"{found.run_id}: NOT VERIFIED, {failed} of {count} checks failed"
