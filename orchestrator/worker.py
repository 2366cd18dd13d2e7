"""The worker: runs inside a job and stands between the scheduler and the trainer. Needs the standard library only.

It claims the attempt, starts the trainer from the run directory alone, passes on the signal to stop, and sees to it that
every attempt ends with a result: where the trainer left none, the worker says why.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator import compile_cache
from orchestrator.home import home_of
from trainer import protocol
from trainer.errors import CaddieError, ConfigError, DataError, ProtocolError, StorageError
from trainer.protocol import AttemptDir, Failure, Result, RunDir, Spec

TRAINER_TAG = "CADDIE_TRAINER_TAG"
"""Environment variable that marks every process of one attempt's trainer, whatever group or session it moves to."""

POLL_SECONDS = 0.1
GRACE_SECONDS = 15.0  # for the step in progress to end after SIGTERM, and for a process to leave after its result
TAIL_BYTES = 65_536  # of the log, searched for the cause of a failure
SHOWN_LINES = 20  # of the log, put into the result

PACKAGES = ("torch", "numpy", "sentencepiece", "brotli", "constriction", "triton")
# Named one by one: an environment holds secrets, and env.json is published with a record.
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONHASHSEED", "NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE",
    *compile_cache.VARIABLES, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG",
    "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Which process works on an attempt; a pid alone would be mistaken for a later process of the same number."""

    host: str
    boot: str
    pid: int
    started: int
    """Clock ticks from the host's boot to the process's start."""


def started_ticks(pid: int) -> int | None:
    """When a live process started, in clock ticks after boot; None for a dead one, a zombie included."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(fields[18])


def boot_id() -> str:
    """Identity of the running system since its last boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def claim_of(pid: int) -> Claim:
    """The claim that a live process of this host would make."""
    return Claim(host=platform.node(), boot=boot_id(), pid=pid, started=started_ticks(pid) or 0)


def is_live(claim: Claim) -> bool:
    """Whether the very process that made the claim still runs, on this host."""
    return (claim.host, claim.boot) == (platform.node(), boot_id()) and started_ticks(claim.pid) == claim.started


def read_claim(attempt: AttemptDir) -> Claim | None:
    """The attempt's claim; None where there is none, or not yet a whole one."""
    try:
        return Claim(**protocol.read_json(attempt.claim))
    except (FileNotFoundError, ProtocolError, TypeError):
        return None


def tagged_processes(variable: str, value: str) -> list[int]:
    """Live processes of this user that were started with `variable=value` in their environment, this one left out."""
    entry = f"{variable}={value}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:  # it ended meanwhile, or belongs to somebody else
                continue
            if entry in environment.split(b"\0"):
                found.append(int(folder.name))
    return sorted(found)


def signal_tagged(variable: str, value: str, number: signal.Signals) -> None:
    """Send a signal to every process with the tag."""
    for pid in tagged_processes(variable, value):
        try:
            os.kill(pid, number)
        except ProcessLookupError:  # it ended meanwhile
            continue


# ---------------------------------------------------------------------------------------------------- failures

_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemoryError|MemoryError|DefaultCPUAllocator", re.IGNORECASE)
_DISK = re.compile(r"No space left on device|Disk quota exceeded|ENOSPC")
_NCCL = re.compile(
    r"NCCL error|ncclInternalError|ncclSystemError|ncclRemoteError|ncclUnhandledCudaError|Watchdog caught collective"
)
_RANK_EXIT = re.compile(r"exitcode\s*:\s*(-?\d+)")  # torchrun itself ends with 1, whatever its ranks ended with
_EXCEPTION = re.compile(r"^(?:\[\w+\]:\s*)?((?!.*ChildFailedError)[\w.]*(?:Error|Exception|Exit)\b.*|error: .*)$")
_EXIT_KINDS = {
    ConfigError.exit_code: protocol.CONFIG,
    DataError.exit_code: protocol.DATA,
    StorageError.exit_code: protocol.DISK,
}


def classify(returncode: int, stderr_tail: str, *, timed_out: bool = False) -> str:
    """The kind of failure of a trainer that left no result, from its exit status and the end of its stderr.

    What names its cause comes first: when one rank runs out of memory, the others fail in NCCL.
    """
    ranks = [int(code) for code in _RANK_EXIT.findall(stderr_tail)]
    codes = ranks or [returncode]
    if timed_out:
        return protocol.TIMEOUT
    if _OUT_OF_MEMORY.search(stderr_tail):
        return protocol.OUT_OF_MEMORY
    if _DISK.search(stderr_tail):
        return protocol.DISK
    for code in codes:
        if code in _EXIT_KINDS:
            return _EXIT_KINDS[code]
    if _NCCL.search(stderr_tail) or any(code < 0 for code in codes):
        return protocol.INFRASTRUCTURE
    return protocol.CODE


def kind_of_error(error: CaddieError | OSError) -> str:
    """The kind of failure of a trainer that could not be started."""
    if isinstance(error, OSError):
        return protocol.DISK if error.errno in (errno.ENOSPC, errno.EDQUOT) else protocol.INFRASTRUCTURE
    return _EXIT_KINDS.get(error.exit_code, protocol.CODE)


def explain(returncode: int, stderr_tail: str) -> str:
    """One line for people: the exception that was raised last, else how the process ended."""
    for line in reversed(stderr_tail.splitlines()):
        named = _EXCEPTION.match(line.strip())
        if named:
            return named[1].removeprefix("error: ")
    if returncode < 0:
        return f"the trainer was ended by {signal.Signals(-returncode).name}"
    return f"the trainer ended with exit code {returncode} and left no result"


def log_tail(path: Path, size: int = TAIL_BYTES) -> str:
    """The end of a log; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def failure_of(kind: str, message: str, log: Path) -> Failure:
    """A failure with the place and the end of its log."""
    lines = log_tail(log).splitlines()[-SHOWN_LINES:]
    return Failure(kind=kind, message=message, log="\n".join([str(log), *lines]))


def failure_of_lost(attempt: AttemptDir) -> Failure:
    """The failure of an attempt that nobody is left to speak for; one that never began speaks in the scheduler's log."""
    logs = [attempt.stderr, *sorted(attempt.scheduler.glob("*.err"))]
    log = next((log for log in logs if log_tail(log).strip()), attempt.stderr)
    # On a full disk the log says nothing either.
    is_claim_empty = attempt.claim.exists() and not attempt.claim.stat().st_size
    if is_claim_empty or _DISK.search(log_tail(log)):
        return failure_of(protocol.DISK, "the job ended and left no result: no space was left for one", log)
    message = "the job ended and left no result: its worker was killed, or could not start"
    return failure_of(protocol.INFRASTRUCTURE, message, log)


# ---------------------------------------------------------------------------------------------------- the attempt


def run_attempt(
    run_dir: str,
    attempt: int,
    processes: int,
    gpus: str,
    timeout_seconds: float,
    grace_seconds: float = GRACE_SECONDS,
) -> None:
    """Run one attempt to its result. `gpus` is the value of CUDA_VISIBLE_DEVICES, empty for the CPU.

    A second copy of the same attempt finds the claim and leaves without a trace.
    """
    run = RunDir(Path(run_dir))
    files = run.attempt(attempt)
    if not make_claim(files):
        return
    try:
        result = _attempt(run, files, processes=processes, gpus=gpus, seconds=(timeout_seconds, grace_seconds))
    except (CaddieError, OSError) as error:
        failure = failure_of(kind_of_error(error), str(error), files.stderr)
        result = None if files.result.exists() else _result(run, files, status=protocol.FAILED, failure=failure)
    if result is not None:
        protocol.write_result(files.result, result)


def run_in_own_session(run_dir: str, attempt: int, processes: int, gpus: str, timeout_seconds: float) -> None:
    """`run_attempt` in a session of its own, so that whoever kills the controller's whole process group spares the job."""
    os.setsid()
    run_attempt(run_dir, attempt, processes, gpus, timeout_seconds)


def make_claim(attempt: AttemptDir) -> bool:
    """Take the attempt for this process; False where another process took it. Raises StorageError."""
    try:
        attempt.root.mkdir(parents=True, exist_ok=True)
        with attempt.claim.open("x", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(claim_of(os.getpid()))) + "\n")
    except FileExistsError:
        return False
    except OSError as error:
        raise protocol.storage_error(error, attempt.claim) from error
    return True


def _attempt(
    run: RunDir, attempt: AttemptDir, *, processes: int, gpus: str, seconds: tuple[float, float]
) -> Result | None:
    """Run the trainer; None where it left a result of its own that can stand."""
    spec = protocol.read_spec(run.spec)
    if attempt.stop.exists():
        return _result(run, attempt, status=protocol.STOPPED, spec=spec)
    _require_sha256(run.bundle, spec.bundle_sha256)
    if spec.source:
        _require_sha256(run.source, spec.source_sha256)
    returncode, ended = _run_trainer(run, attempt, spec, processes=processes, gpus=gpus, seconds=seconds)
    too_long = failure_of(
        protocol.TIMEOUT, f"ended after {seconds[0]:g} s, the study's [resources] timeout_minutes", attempt.stderr
    )
    if attempt.result.exists():
        left = protocol.read_result(attempt.result)
        if ended != protocol.TIMEOUT or left.status != protocol.STOPPED:
            return None
        return dataclasses.replace(left, status=protocol.FAILED, failure=too_long)  # it left politely, and too late
    if ended == protocol.STOPPED:
        return _result(run, attempt, status=protocol.STOPPED, spec=spec)
    tail = log_tail(attempt.stderr)
    kind = classify(returncode, tail, timed_out=ended == protocol.TIMEOUT)
    failure = failure_of(kind, explain(returncode, tail), attempt.stderr)
    failure = too_long if kind == protocol.TIMEOUT else failure
    return _result(run, attempt, status=protocol.FAILED, failure=failure, spec=spec)


def _run_trainer(
    run: RunDir, attempt: AttemptDir, spec: Spec, *, processes: int, gpus: str, seconds: tuple[float, float]
) -> tuple[int, str | None]:
    """Start the trainer, with what was compiled before, and see it end: its exit status, and why it had to end."""
    tag = trainer_tag(attempt)
    environment, machine = trainer_environment(gpus, tag), describe_machine(gpus)
    key = compile_cache.key_of(spec, processes=processes, packages=machine.packages, gpus=machine.gpus)
    with compile_cache.lent(key, archive=home_of(run).compiled(key), environment=environment) as cache:
        environment |= cache.variables
        protocol.write_json_atomically(attempt.env, describe_environment(environment, machine, cache.found))
        with attempt.stdout.open("ab") as out, attempt.stderr.open("ab") as err:
            process = subprocess.Popen(
                trainer_command(run, attempt.number, processes),
                cwd=run.root, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0,
            )  # fmt: skip
        ended = _watch(process, attempt, tag=tag, timeout_seconds=seconds[0], grace_seconds=seconds[1])
        if attempt.result.exists() and protocol.read_result(attempt.result).status == protocol.COMPLETE:
            cache.save()
    return process.returncode, ended


def _require_sha256(path: Path, planned: str) -> None:
    """What runs, and what it scores again, must be what the spec names."""
    found = protocol.sha256_of(path) if path.exists() else "missing"
    if found != planned:
        raise ProtocolError(
            f"{path}: its SHA-256 is {found}, the spec says {planned}",
            hint="the file was changed after the run was planned; move the run's directory away and ask again",
        )


def trainer_command(run: RunDir, attempt: int, processes: int) -> list[str]:
    """How the trainer is started: by Python, or by torchrun where it has several processes."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launch, str(run.bundle), str(run.root), "--attempt", str(attempt)]


def trainer_tag(attempt: AttemptDir) -> str:
    """Value of TRAINER_TAG in every process of an attempt's trainer, the same for all who look."""
    return str(attempt.root.resolve())


def trainer_environment(gpus: str, tag: str) -> dict[str, str]:
    """The trainer's environment: this job's, without our own checkout, which the bundle must not see."""
    environment = dict(os.environ)
    checkout = str(Path(protocol.__file__).resolve().parent.parent)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path != checkout]
    environment.pop("PYTHONPATH", None)
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return {**environment, "CUDA_VISIBLE_DEVICES": gpus, "PYTHONUNBUFFERED": "1", TRAINER_TAG: tag}


def _watch(
    process: subprocess.Popen[bytes], attempt: AttemptDir, *, tag: str, timeout_seconds: float, grace_seconds: float
) -> str | None:
    """Wait for the trainer's end: STOPPED where it was asked to stop, TIMEOUT where it took too long, else None."""
    deadline = time.monotonic() + timeout_seconds
    ended: str | None = None
    while process.poll() is None:
        now = time.monotonic()
        if ended is not None and now > deadline:
            break
        if ended is None and attempt.result.exists():  # what is left to do is to exit
            ended, deadline = protocol.COMPLETE, now + grace_seconds
        elif ended is None and (attempt.stop.exists() or now > deadline):
            ended = protocol.STOPPED if attempt.stop.exists() else protocol.TIMEOUT
            deadline = now + grace_seconds
            _signal_group(process, signal.SIGTERM)
        time.sleep(POLL_SECONDS)
    _end_all(process, tag)
    return ended


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # it ended meanwhile
        return


def _end_all(process: subprocess.Popen[bytes], tag: str) -> None:
    """Leave no process of the trainer behind; torchrun's ranks have sessions of their own and outlive its death."""
    if process.poll() is None:
        _signal_group(process, signal.SIGKILL)
    signal_tagged(TRAINER_TAG, tag, signal.SIGKILL)
    process.wait()


def _result(
    run: RunDir, attempt: AttemptDir, *, status: str, failure: Failure | None = None, spec: Spec | None = None
) -> Result:
    """A result for an attempt whose trainer left none."""
    if spec is None:
        return Result(run_id=run.run_id, attempt=attempt.number, status=status, seed=0, failure=failure)
    return Result(
        run_id=run.run_id, attempt=attempt.number, status=status, seed=spec.seed, failure=failure,
        bundle_sha256=spec.bundle_sha256, bundle_bytes=run.bundle.stat().st_size,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run runs on."""

    host: str
    platform: str
    python: str
    processors: int | None
    packages: dict[str, str]
    gpus: Sequence[str]


def describe_machine(gpus: str) -> Machine:
    """This machine, with the GPUs that are visible to the run."""
    return Machine(
        host=platform.node(), platform=platform.platform(), python=platform.python_version(), processors=os.cpu_count(),
        packages={name: version for name in PACKAGES if (version := _installed(name))}, gpus=_gpu_names(gpus),
    )  # fmt: skip


def describe_environment(
    environment: dict[str, str], machine: Machine, compiled: compile_cache.Found
) -> dict[str, object]:
    """What the run ran on, for `env.json`; nothing that could be a secret."""
    return {
        **dataclasses.asdict(machine),
        "environment": {name: environment[name] for name in ENVIRONMENT if name in environment},
        "compile_cache": dataclasses.asdict(compiled),
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu_names(visible: str) -> Sequence[str]:
    """Name, driver and memory of the visible GPUs, as the driver gives them."""
    if not visible:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader", f"--id={visible}"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []
