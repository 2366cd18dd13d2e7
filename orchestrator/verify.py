"""Verification: a run checked against its own files and in a clean room, its verdict, and where that is kept."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator import __version__, clean_room
from orchestrator.checks import (
    DATA,
    EVALUATION,
    FAILED,
    MISSING,
    MODEL_HASH,
    PASSED,
    UNDECIDED,
    Check,
    Claims,
    Value,
    check_claims,
    check_evaluation,
    check_files,
    exit_code,
    hash_of,
    judged,
    obstacle,
    read_claims,
    read_data,
    seconds_of,
    undecided,
)
from orchestrator.clean_room import Evaluation
from orchestrator.errors import ConfigError, DataError, MachineError, ProtocolError
from orchestrator.home import Home
from orchestrator.slots import machine_gpus
from trainer import protocol
from trainer.protocol import DataDir, Failure, RunDir, sha256_of

CPU = "cpu"  # a result's device where there was no GPU

CPU_TOLERANCE_BPB = 1e-6
CPU_REASON = "float32 on the CPU: only the order of sums differs, by threads and instruction set"
GPU_TOLERANCE_BPB = 2e-5
GPU_REASON = (
    "a GPU took part: bfloat16 products and atomic sums differ between kernels and numbers of processes, and test-time "
    "training carries that on; two in the fifth decimal, in which records are given"
)


@dataclass(frozen=True, kw_only=True)
class Verification:
    """All that a clean-room check of one run found."""

    run_id: str
    verdict: str
    """passed, or failed."""

    checks: tuple[Check, ...]
    bundle_sha256: str | None
    """Of the file that was found, as the next; None where there was none."""

    artifact_sha256: str | None
    result_sha256: str | None
    """Of the result file whose claims were checked: an edited one is no longer verified."""

    data_dir: str
    tolerance_bpb: float
    tolerance_reason: str
    network: str
    """off, on, or not needed where nothing was run."""

    device: str
    world_size: int
    wall_seconds: float
    stage_seconds: dict[str, float]
    failure: Failure | None
    """Why the bundle gave no scores, with the end of its log."""

    environment: dict[str, object]
    time: float
    """Unix time at the end of the check."""

    caddie: str = __version__

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == FAILED)

    @property
    def exit_code(self) -> int:
        return exit_code(self.checks)


# ── the run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def find_run(home: Home, text: str) -> RunDir:
    """A run by its directory, its id or the beginning of its id. Raises ConfigError with the runs that there are."""
    folder = Path(text).expanduser()
    if folder.is_dir() and (RunDir(folder).spec.exists() or RunDir(folder).bundle.exists()):
        return RunDir(folder.resolve())
    ids = sorted(path.name for path in home.runs.glob("*") if path.is_dir())
    found = [run_id for run_id in ids if run_id == text] or [
        run_id for run_id in ids if text and run_id.startswith(text)
    ]
    if len(found) == 1:
        return home.run(found[0])
    if found:
        raise ConfigError(f"{text!r} is the beginning of {len(found)} runs", hint=f"there are: {', '.join(found)}")
    latest = sorted(ids, key=lambda run_id: home.run(run_id).root.stat().st_mtime)[-5:]
    there_are = f"the latest are: {', '.join(latest)}" if latest else "there are none yet"
    raise ConfigError(f"there is no run {text!r} in {home.runs}, and no such directory", hint=there_are)


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


def write(run: RunDir, found: Verification) -> None:
    """Write `verify.json`, whole; raises StorageError."""
    protocol.write_json_atomically(run.verify, dataclasses.asdict(found))


def recorded_verdict(path: Path, result_file: Path, command: str) -> str:
    """The verdict in a record that `command` wrote; empty without one of this very result. Raises ProtocolError."""
    if not path.exists() or not result_file.exists():
        return ""
    record = protocol.read_json(path)
    verdict = record.get("verdict")
    if verdict not in (PASSED, FAILED) or "result_sha256" not in record:
        raise ProtocolError(
            f"{path}: this is no verdict on a run: its verdict is {verdict!r}", hint=f"make it again: {command}"
        )
    return str(verdict) if record["result_sha256"] == sha256_of(result_file) else ""


# ── as text ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SHOWN_HASH = 12  # characters of a hash that tell two apart by eye
SHOWN_TEXT = 40


def shown(value: Value, check: Check) -> str:
    """A value in one column."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if isinstance(value, float):
        return f"{value:.7f}" if check.tolerance else f"{value:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    is_hash = len(value) == 64 and " " not in value
    return value[:SHOWN_HASH] + "…" if is_hash else value if len(value) <= SHOWN_TEXT else value[: SHOWN_TEXT - 1] + "…"


def as_text(found: Verification) -> str:
    """The table of all checks, and under what conditions they were made."""
    return "\n".join([*check_table(found.checks), "", *_conditions(found), "", summary(found)])


def check_table(checks: Sequence[Check], *, has_notes: bool = False) -> list[str]:
    """The lines of a table with a row a check; with its note, where that tells what was measured."""
    rows = [("Check", "Status", "Expected", "Found", "Tolerance", *(["Measured"] if has_notes else []))]
    for check in checks:
        tolerance = f"{check.tolerance:g}" if check.tolerance else ""
        values = ("≤ " * check.is_limit + shown(check.expected, check), shown(check.found, check), tolerance)
        rows.append((check.name, check.status, *values, *([check.note] if has_notes else [])))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "─" * max(map(len, lines)), *lines[1:]]


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


def failure_lines(found: Verification) -> list[str]:
    """Every failure in full, then what could not be decided and why."""
    return lines_on(found.checks, found.failure)


def lines_on(checks: Sequence[Check], failure: Failure | None) -> list[str]:
    """The same of any checks, and of the bundle's own failure where it was run."""
    lines = []
    for check in checks:
        if check.status != FAILED:
            continue
        within = f" within {check.tolerance:g}" if check.tolerance else ""
        most = "at most " if check.is_limit else ""
        values = f"expected {most}{_full(check.expected)}{within}, found {_full(check.found)}"
        values += f"; {check.note}" if check.note else ""
        lines += [f"error: {check.name}: {check.rule}: {values} ({check.place})", f"hint: {check.remedy}"]
    if failure and failure.log:
        lines += ["the bundle's last words:", *(f"  {line}" for line in failure.log.splitlines())]
    undecided_checks = [check for check in checks if check.status == UNDECIDED]
    for note in dict.fromkeys(check.note for check in undecided_checks):
        names = ", ".join(check.name for check in undecided_checks if check.note == note)
        lines.append(f"note: undecided: {names}: {note}")
    return lines


def _full(value: Value) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
