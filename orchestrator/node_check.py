"""The check of a node before a run's clock starts: whether it is what was asked for, and whether it is sound.

It runs in the job, on each of its nodes, from what the orchestrator left beside the attempt; without that there is none.
A node that is found wanting is refused: the run has not begun, and begins elsewhere. Standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator import compile_cache, data_view
from orchestrator.compile_cache import Found
from trainer import protocol
from trainer.errors import CaddieError, DataError, StorageError
from trainer.protocol import VALIDATION, AttemptDir, DataDir, RunDir, Shard, Spec

PASSED, FAILED, UNDECIDED = "passed", "failed", "undecided"  # status of a check

HASH_SECONDS = 1.5  # for shards that this node has not yet hashed; those that are left come with the next run
# A run keeps its artifact (at most the cap), the averaged weights in float32 (of which the artifact is a sixth to a
# quarter) and a copy of the small files in MLflow.
RUN_BYTES_PER_CAP_BYTE = 7
NODE_BYTES = 1_000_000_000  # the same in the node's own temporary directory, for what is compiled
BUSY_BYTES = 2**30  # more of a GPU's memory in use than a context and a display take is somebody else's job
REDUCE_SECONDS = 180.0  # for the all-reduce with the start of its processes; a sound node takes a tenth
REDUCE_AGAIN_SECONDS = 3600.0  # within which a node need not show it again
SMI_SECONDS = 30.0
NOMINAL_SHARE = 0.97  # of the memory that a GPU is sold with is what its driver reports at least
PACE_STEP = 10  # step at which a run's speed is compared: the trainer logs its first ten
SLOWEST_SHARE = 0.8  # of the median of earlier runs; sound nodes differ by a few hundredths

MEND = "put the file back; caddie data verify tells all that is wrong"
STATE_FILE = "checked.json"
QUERY = {
    "name": str, "memory.total": float, "memory.used": float, "clocks.max.sm": float,
    "ecc.errors.uncorrected.volatile.total": float, "clocks_throttle_reasons.hw_slowdown": str,
    "clocks_throttle_reasons.hw_thermal_slowdown": str,
}  # fmt: skip
"""What is asked of nvidia-smi, and what kind of answer there is; sizes in MiB, clocks in MHz."""

BASIC = tuple(QUERY)[:3]
"""Fields that every driver knows, the first ones."""

ALL_REDUCE = """
import os, time, torch, torch.distributed as dist
rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
size = dist.get_world_size()
ones = torch.ones(2**25, device="cuda", dtype=torch.bfloat16)
for turn in range(6):
    if turn == 1:
        torch.cuda.synchronize(); started = time.perf_counter()
    values = ones * (rank + 1); dist.all_reduce(values)
torch.cuda.synchronize(); seconds = (time.perf_counter() - started) / 5
expected = size * (size + 1) / 2
if not bool((values == expected).all()):
    raise SystemExit(f"rank {rank}: the sum over {size} GPUs is wrong: {values.unique().tolist()[:4]}, not {expected}")
if rank == 0:
    print(f"{2 * (size - 1) / size * values.numel() * 2 / seconds / 1e9:.1f} GB/s")
dist.destroy_process_group()
"""


class NodeRefused(CaddieError):
    """The node is not what was asked for, or not sound; says nothing of the run."""

    exit_code = 8


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What a node must offer; written by the orchestrator beside the attempt."""

    gpus: int = 0
    gpu_model: str = ""
    """Part of its name; empty for any."""

    gpu_memory_gib: float = 0.0
    tokens_per_second: float = 0.0
    """Median of the study's earlier runs at PACE_STEP; 0 where there are none."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: str
    found: str
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Node:
    """The node's part of an attempt: what is checked, and with what."""

    run: RunDir
    files: AttemptDir
    spec: Spec
    name: str
    gpus: str
    """Value of CUDA_VISIBLE_DEVICES; empty for the CPU."""

    number: int = 0
    """Of the node within the job."""

    python: str = sys.executable
    """The trainer's interpreter."""

    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    """The trainer's; whoever starts it ends what is left of a check by its tag."""

    compiled: Found | None = None
    """What was found of what earlier runs compiled."""


def read_demands(files: AttemptDir) -> Demands | None:
    """What is asked of the nodes of an attempt; None where nothing is. Raises ProtocolError."""
    if not files.demands.exists():
        return None
    record = protocol.read_json(files.demands)
    known = {f.name for f in dataclasses.fields(Demands)}
    return Demands(**{key: value for key, value in record.items() if key in known})


def require(node: Node) -> None:
    """Check a node and keep what was found. Raises NodeRefused, and DataError or StorageError where no node would do."""
    demands = read_demands(node.files)
    if demands is None:
        return
    checks: list[Check] = []
    try:
        for check in _checks(node, demands):
            checks.append(check)
            if check.status == FAILED:
                raise refusal(node.name, f"{check.name}: {check.found}")
    finally:
        _keep(node.files, node.number, node.name, checks)


def refuse(name: str, files: AttemptDir, why: str) -> NodeRefused:
    """The refusal of a node that has begun with the run; it is kept with what was found before."""
    _keep(files, 0, name, [Check(name=why.partition(":")[0], status=FAILED, found=why.partition(": ")[2])])
    return refusal(name, why)


def refusal(name: str, why: str) -> NodeRefused:
    return NodeRefused(
        f"node {name} was refused: {why}",
        hint="the run begins on another node; [resources] preflight = false leaves the check out",
    )


def was_refused(files: AttemptDir, nodes: int) -> bool:
    """Whether any of an attempt's nodes was found wanting."""
    for number in range(nodes):
        with contextlib.suppress(CaddieError, OSError, KeyError, TypeError):
            if any(check["status"] == FAILED for check in protocol.read_json(files.node_check(number))["checks"]):
                return True
    return False


def _keep(files: AttemptDir, number: int, name: str, checks: Sequence[Check]) -> None:
    """Leave a record for people, beside what it has; a disk that takes none is found by whoever needs it."""
    path = files.node_check(number)
    with contextlib.suppress(CaddieError, OSError):
        before = protocol.read_json(path).get("checks", []) if path.exists() else []
        found = [*before, *(dataclasses.asdict(check) for check in checks)]
        protocol.write_json_atomically(path, {"node": name, "time": time.time(), "checks": found})


def _checks(node: Node, demands: Demands) -> Iterator[Check]:
    """The cheap ones first; each is made when it is asked for."""
    yield _timed("disk", lambda: check_disk(node))
    state = State.of_this_node()
    yield _timed("data", lambda: check_data(node, state))
    yield _timed("compile cache", lambda: (PASSED, node.compiled.state if node.compiled else "none"))
    if demands.gpus:
        yield _timed("gpus", lambda: check_gpus(node, demands))
        if len(node.gpus.split(",")) > 1:
            yield _timed("all-reduce", lambda: check_all_reduce(node, state))
    state.write()


def _timed(name: str, look: Callable[[], tuple[str, str]]) -> Check:
    began = time.monotonic()
    status, found = look()
    return Check(name=name, status=status, found=found, seconds=round(time.monotonic() - began, 3))


# ---------------------------------------------------------------------------------------------------- what a node remembers


@dataclass
class State:
    """What this node has shown earlier, in its own temporary directory; losing it costs seconds."""

    path: Path | None
    hashed: dict[str, list[Any]] = field(default_factory=dict)
    """Size, modification time in ns and SHA-256 by path."""

    reduced: dict[str, float] = field(default_factory=dict)
    """Unix time of the last all-reduce by GPUs and boot."""

    @classmethod
    def of_this_node(cls) -> State:
        with contextlib.suppress(OSError, ValueError, TypeError):
            root, _ = compile_cache.private_root(compile_cache.place(os.environ))
            path = root / STATE_FILE
            record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            return cls(path, dict(record.get("hashed", {})), dict(record.get("reduced", {})))
        return cls(None)

    def write(self) -> None:
        if self.path is not None:
            with contextlib.suppress(StorageError):
                protocol.write_json_atomically(self.path, {"hashed": self.hashed, "reduced": self.reduced})


# ---------------------------------------------------------------------------------------------------- the checks


def check_disk(node: Node) -> tuple[str, str]:
    """Room for the run, which no other node has more of, and for what is compiled here. Raises StorageError."""
    free = shutil.disk_usage(node.run.root).free
    if free < RUN_BYTES_PER_CAP_BYTE * node.spec.config["limits"]["artifact_bytes"]:
        raise protocol.storage_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), node.run.root)
    place = compile_cache.place(os.environ)
    place = place if place.exists() else place.parent
    own = shutil.disk_usage(place).free
    status = PASSED if own >= NODE_BYTES else FAILED
    return status, f"{free:,} bytes free for the run, {own:,} in {place}"


def check_data(node: Node, state: State) -> tuple[str, str]:
    """The data set as the manifest has it: every size, and the content of as many files as there is time for.

    Raises DataError where a file is another than it should be: it is so for every node.
    """
    data = DataDir(Path(node.spec.data_dir))
    if node.spec.script and data_view.is_laid_out(data.root):
        return UNDECIDED, f"{data.root}: others prepared it, and no manifest says what belongs to it"
    if not data.manifest.exists():
        return FAILED, f"{data.manifest}: not there, as from a file system that is not mounted"
    manifest = protocol.read_manifest(data.manifest)
    if protocol.sha256_of(data.manifest) != node.spec.manifest_sha256:
        raise DataError(f"{data.manifest}: its SHA-256 is not the spec's", hint="put the data set back as it was")
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    for shard in shards:
        problem = _unreadable(data.root / shard.file, shard)
        if problem:
            return FAILED, problem
    hashed = 0
    deadline = time.monotonic() + HASH_SECONDS
    for shard in _in_order(manifest.splits[VALIDATION].shards, shards, node.spec.run_id):
        if not _is_known(data.root / shard.file, shard, state):
            if time.monotonic() > deadline:
                break
            _require_content(data.root / shard.file, shard, state)
            hashed += 1
    known = sum(_is_known(data.root / shard.file, shard, state) for shard in shards)
    return PASSED, f"{len(shards)} shards of the right size, {hashed} hashed now, {known} on this node so far"


def _in_order(validation: tuple[Shard, ...], shards: list[Shard], run_id: str) -> list[Shard]:
    """Validation first, which every score rests on; then each run takes the others in an order of its own."""
    others = [shard for shard in shards if shard not in validation]
    random.Random(run_id).shuffle(others)
    return [*validation, *others]


def _unreadable(path: Path, shard: Shard) -> str:
    """Why this node cannot read a file; empty where it can. Raises DataError where it is missing or of another size."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(f"{path}: the shard is missing", hint=MEND) from error
    except OSError as error:
        return f"{path}: {error.strerror}"
    if size != shard.bytes:
        raise DataError(f"{path}: {size:,} bytes, the manifest says {shard.bytes:,}", hint=MEND)
    return ""


def _is_known(path: Path, shard: Shard, state: State) -> bool:
    """Whether this node has hashed the file as it is now."""
    found = path.stat()
    return state.hashed.get(str(path)) == [found.st_size, found.st_mtime_ns, shard.sha256]


def _require_content(path: Path, shard: Shard, state: State) -> None:
    found = path.stat()
    if protocol.sha256_of(path) != shard.sha256:
        raise DataError(f"{path}: changed bytes: its sha256 is not the manifest's", hint=MEND)
    state.hashed[str(path)] = [found.st_size, found.st_mtime_ns, shard.sha256]


def check_gpus(node: Node, demands: Demands) -> tuple[str, str]:
    """The GPUs by number, model and memory, all alike, unused, at their full clocks and without memory errors."""
    visible = [gpu for gpu in node.gpus.split(",") if gpu]
    if len(visible) != demands.gpus:
        return FAILED, f"{len(visible)} GPUs are visible ({node.gpus or 'none'}), {demands.gpus} were asked for"
    try:
        answer = _ask_driver(node.gpus, QUERY)
        if answer.returncode:  # a driver that does not know one of the fields answers nothing
            answer = _ask_driver(node.gpus, BASIC)
    except FileNotFoundError:
        return UNDECIDED, "there is no nvidia-smi here"
    except subprocess.TimeoutExpired:
        return FAILED, f"nvidia-smi did not answer within {SMI_SECONDS:g} s"
    if answer.returncode:
        words = (answer.stdout + answer.stderr).strip().splitlines() or [f"it ended with {answer.returncode}"]
        return FAILED, f"nvidia-smi: {words[-1]}"
    gpus = [_parsed(line) for line in answer.stdout.splitlines() if line.strip()]
    problem = gpu_problem(gpus, demands)
    models = ", ".join(sorted({str(gpu["name"]) for gpu in gpus}))
    return (
        (FAILED, problem)
        if problem
        else (PASSED, f"{len(gpus)} × {models} at up to {gpus[0].get('clocks.max.sm')} MHz")
    )


def _ask_driver(gpus: str, fields: Iterable[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", f"--id={gpus}"],
        capture_output=True, text=True, timeout=SMI_SECONDS, check=False,
    )  # fmt: skip


def _parsed(line: str) -> dict[str, Any]:
    """One GPU's answers; None for what a driver does not know."""
    values: dict[str, Any] = {}
    for (name, kind), text in zip(QUERY.items(), line.split(","), strict=False):
        try:
            values[name] = kind(text.strip())
        except ValueError:
            values[name] = None
    return values


def gpu_problem(gpus: list[dict[str, Any]], demands: Demands) -> str:
    """What is wrong with a node's GPUs, in words; empty where nothing is."""
    if len(gpus) != demands.gpus:
        return f"nvidia-smi lists {len(gpus)} of {demands.gpus} GPUs"
    for kind in ("name", "memory.total", "clocks.max.sm"):
        if len({gpu.get(kind) for gpu in gpus}) > 1:
            return f"the GPUs are not alike: {kind} is {', '.join(str(gpu.get(kind)) for gpu in gpus)}"
    for number, gpu in enumerate(gpus):
        if demands.gpu_model.lower() not in str(gpu["name"]).lower():
            return f"GPU {number} is {gpu['name']}, {demands.gpu_model} was asked for"
        if gpu["memory.total"] is not None and gpu["memory.total"] < NOMINAL_SHARE * 1024 * demands.gpu_memory_gib:
            return f"GPU {number} has {gpu['memory.total'] / 1024:.0f} GiB, {demands.gpu_memory_gib:g} were asked for"
        if (gpu["memory.used"] or 0) * 2**20 > BUSY_BYTES:
            return f"GPU {number} is in use: {gpu['memory.used']:.0f} MiB of its memory are taken"
        if gpu.get("ecc.errors.uncorrected.volatile.total"):
            return f"GPU {number} had {gpu['ecc.errors.uncorrected.volatile.total']:.0f} uncorrectable memory errors"
        for reason in ("hw_slowdown", "hw_thermal_slowdown"):
            if gpu.get(f"clocks_throttle_reasons.{reason}") == "Active":
                return f"GPU {number} is throttled: {reason}"
    return ""


def check_all_reduce(node: Node, state: State) -> tuple[str, str]:
    """A sum over the node's GPUs, right to the last element; a node that has just shown it is believed."""
    if shutil.which("nvidia-smi") is None:
        return UNDECIDED, "there is no nvidia-smi here"
    key = f"{node.gpus} {_boot_id()}"
    if 0 <= time.time() - state.reduced.get(key, 0.0) < REDUCE_AGAIN_SECONDS:
        return PASSED, "shown within the last hour"
    count = len(node.gpus.split(","))
    command = [node.python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    script = node.files.scheduler / f"all_reduce{node.number}.py"
    protocol.write_bytes_atomically(script, ALL_REDUCE.encode())
    try:
        done = subprocess.run(
            [*command, str(script)], capture_output=True, text=True, timeout=REDUCE_SECONDS, check=False,
            env={**node.environment, "CUDA_VISIBLE_DEVICES": node.gpus, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return FAILED, f"the sum over {count} GPUs did not come within {REDUCE_SECONDS:g} s"
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if "rror" in line or "rank" in line]
        return FAILED, f"the sum over {count} GPUs failed: {(words or done.stderr.splitlines() or ['no words'])[-1]}"
    state.reduced[key] = time.time()
    return PASSED, f"{count} GPUs, {done.stdout.strip()}"


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


# ---------------------------------------------------------------------------------------------------- the first steps


class Pace:
    """The speed of a run's first steps beside that of earlier runs: what no look at a node can tell."""

    def __init__(self, files: AttemptDir, *, is_alone: bool) -> None:
        """`is_alone`: the run has one node, so that it is known which one is slow."""
        self.files = files
        demands = read_demands(files) if is_alone else None
        self.median = demands.tokens_per_second if demands is not None and demands.gpus else 0.0
        self._is_decided = not self.median
        self._problem = ""

    def problem(self) -> str:
        """That the first steps were far slower than those of the study's earlier runs, in words; else empty."""
        speed = None if self._is_decided else speed_at(self.files, PACE_STEP)
        if speed is not None:
            self._is_decided = True
            if speed < SLOWEST_SHARE * self.median:
                self._problem = f"pace: {speed:,.0f} tokens/s over {PACE_STEP} steps; earlier runs of the study had {self.median:,.0f}"
        return self._problem


def speed_at(files: AttemptDir, step: int) -> float | None:
    """Tokens per second that a run had made by this step of its training; None before it."""
    try:
        for _, event in protocol.read_lines(files.events):
            speed = protocol.values_of(event, protocol.TOKENS_PER_SECOND)
            if speed and event.get("step", 0) >= step:
                return speed[0] if event["step"] == step else None
    except CaddieError:
        return None
    return None
