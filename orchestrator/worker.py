"""The worker: runs inside a job and stands between the scheduler and the trainer. Needs the standard library only.

It claims the attempt, starts the trainer from the run directory alone, passes on what asks it to leave, and sees to it
that every attempt ends with a result: where the trainer left none, the worker says why. A worker whose run has a later
attempt ends its trainer and writes nothing: a run has one owner.

On several nodes each has a worker with its own part of the trainer. The first one speaks for the run.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator import compile_cache, gauges, node_check
from orchestrator.allocation import Allocation
from orchestrator.claims import Claim, beating, claim_for, make_claim, read_claim
from orchestrator.failures import classify, explain, failure_of, failure_of_overdue, has_room, kind_of_error, log_tail
from orchestrator.home import home_of
from orchestrator.machine import THREADS, cores, describe_environment, describe_machine
from orchestrator.node_check import Node, NodeRefused, Pace
from orchestrator.notice import Notice
from orchestrator.processes import TRAINER_TAG, parent_of, signal_tagged, tagged_processes, trainer_tag
from orchestrator.script_run import ScriptRun
from trainer import protocol
from trainer.errors import CaddieError, ProtocolError, StorageError
from trainer.protocol import AttemptDir, Failure, Result, RunDir, Spec

POLL_SECONDS = 0.1
GRACE_SECONDS = 15.0  # for the step in progress to end after SIGTERM, and for a process to leave after its result
GIVEN_UP_SECONDS = 2.0  # the same for a trial that is stopped early: its slot is wanted
OWNER_SECONDS = 2.0  # between two looks for a later attempt of the run
JOIN_SECONDS = 300.0  # for the other nodes of a job to find the first one's claim
SUPERSEDED = "superseded"  # why a trainer had to end: a later attempt owns the run

TORCHRUN = ("-m", "torch.distributed.run")
SHIELDING_TORCH = (2, 10)  # from which torchrun can be told to leave signals to its ranks
SHIELD = "exec_ignoring"  # what the shell that ignores signals calls itself in messages


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker is asked to do."""

    processes: int
    """Of the trainer, on this node."""

    gpus: str
    """Value of CUDA_VISIBLE_DEVICES, empty for the CPU."""

    timeout_seconds: float
    grace_seconds: float = GRACE_SECONDS
    python: str = ""
    """Interpreter of the trainer; empty for this one."""

    beside: int = 1
    """Runs that share the processors that this one may use, itself counted."""


def run_attempt(
    run_dir: str,
    attempt: int,
    processes: int,
    gpus: str,
    timeout_seconds: float,
    grace_seconds: float = GRACE_SECONDS,
    beside: int = 1,
) -> None:
    """Run one attempt to its result. `gpus` is the value of CUDA_VISIBLE_DEVICES, empty for the CPU; `beside` as in Order.

    A second copy of the same attempt finds the claim and leaves without a trace.
    """
    order = Order(
        processes=processes, gpus=gpus, timeout_seconds=timeout_seconds, grace_seconds=grace_seconds, beside=beside
    )
    carry_out(RunDir(Path(run_dir)), attempt, order, Allocation())


def run_in_own_session(
    run_dir: str, attempt: int, processes: int, gpus: str, timeout_seconds: float, beside: int = 1
) -> None:
    """`run_attempt` in a session of its own, so that whoever kills the controller's whole process group spares the job."""
    os.setsid()
    run_attempt(run_dir, attempt, processes, gpus, timeout_seconds, beside=beside)


def run_in_slurm(run_dir: str, attempt: int, processes: int, timeout_seconds: float, python: str) -> None:
    """This node's part of an attempt, on the GPUs that Slurm gave the job; every node of the job calls it."""
    allocation = Allocation.from_environment()
    order = Order(processes=processes, gpus=allocation.gpus, timeout_seconds=timeout_seconds, python=python)
    carry_out(RunDir(Path(run_dir)), attempt, order, allocation)


def carry_out(run: RunDir, attempt: int, order: Order, allocation: Allocation) -> None:
    """Run one attempt, or one node's part of it, to its end."""
    files = run.attempt(attempt)
    if allocation.node:
        _join(run, files, order, allocation)
        return
    claim = claim_for(allocation)
    if not make_claim(files, claim):
        return
    _end_earlier(run, files)
    notice = Notice(files)
    with beating(files), notice.heard() if allocation.job else nullcontext():
        try:
            result = _attempt(
                Part(run=run, files=files, order=order, allocation=allocation, claim=claim, notice=notice)
            )
        except (CaddieError, OSError) as error:
            failure = failure_of(kind_of_error(error), str(error), files.stderr)
            result = None if files.result.exists() else _result(run, files, status=protocol.FAILED, failure=failure)
        if result is not None and run.is_newest(files):
            _leave_result(files, result)


def _leave_result(files: AttemptDir, result: Result) -> None:
    """Write the result; where that fails, an empty file says so: it may be all that a full disk takes."""
    try:
        protocol.write_result(files.result, result)
    except StorageError:
        files.no_room.touch()
        raise


def _end_earlier(run: RunDir, files: AttemptDir) -> None:
    """End what earlier attempts of the run have left on this host: the trainer of a worker that was killed, say."""
    for earlier in run.attempts():
        if earlier.number < files.number:
            signal_tagged(TRAINER_TAG, trainer_tag(earlier), signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One node's part of an attempt; all of it, where there is one node."""

    run: RunDir
    files: AttemptDir
    order: Order
    allocation: Allocation
    claim: Claim
    notice: Notice

    @property
    def is_first(self) -> bool:
        return self.allocation.node == 0

    @property
    def stdout(self) -> Path:
        return self.files.stdout if self.is_first else self.files.scheduler / f"trainer{self.allocation.node}.out"

    @property
    def stderr(self) -> Path:
        return self.files.stderr if self.is_first else self.files.scheduler / f"trainer{self.allocation.node}.err"


def _attempt(part: Part) -> Result | None:
    """Run the trainer; None where it left a result of its own that can stand, or where nothing may be written any more."""
    run, attempt, order = part.run, part.files, part.order
    spec = protocol.read_spec(run.spec)
    if attempt.stop.exists():
        return _result(run, attempt, status=protocol.STOPPED, spec=spec)
    _require_sha256(run.bundle, spec.bundle_sha256)
    if spec.source:
        _require_sha256(run.source, spec.source_sha256)
    returncode, ended = _run_trainer(part, spec)
    if ended == SUPERSEDED:
        return None
    is_overdue = ended == protocol.TIMEOUT or attempt.overdue.exists()
    if attempt.result.exists():
        left = protocol.read_result(attempt.result)
        if not is_overdue or left.status != protocol.STOPPED:
            return None
        too_long = failure_of_overdue(attempt, order.timeout_seconds)
        return dataclasses.replace(left, status=protocol.FAILED, failure=too_long)  # it left politely, and too late
    if ended == protocol.STOPPED:
        return _result(run, attempt, status=protocol.STOPPED, spec=spec)
    failure = failure_of_overdue(attempt, order.timeout_seconds) if is_overdue else _failure(part, returncode)
    return _result(run, attempt, status=protocol.FAILED, failure=failure, spec=spec)


def _failure(part: Part, returncode: int) -> Failure:
    """Why a trainer left no result: what another node says of its part comes first."""
    for node in range(1, part.allocation.nodes):
        told = part.files.node_failure(node)
        if told.exists():
            return Failure(**protocol.read_json(told))
    if part.notice.by is not None:
        return part.notice.failure(part.stderr)
    tail = log_tail(part.stderr)
    kind = classify(returncode, tail)
    if kind == protocol.CODE and not has_room(part.files.root):  # its log could not take what it said
        return failure_of(protocol.DISK, f"{part.files.root}: no space left on device", part.stderr)
    return failure_of(kind, explain(returncode, tail), part.stderr)


def _join(run: RunDir, files: AttemptDir, order: Order, allocation: Allocation) -> None:
    """Run another node's part, once this very life of the job has claimed the attempt; say why, where it fails."""
    claim = _claim_of_job(files, allocation)
    if claim is None:
        return
    notice = Notice(files)
    part = Part(run=run, files=files, order=order, allocation=allocation, claim=claim, notice=notice)
    with notice.heard():
        try:
            returncode, ended = _run_trainer(part, protocol.read_spec(run.spec))
        except (CaddieError, OSError) as error:
            failure = failure_of(kind_of_error(error), str(error), part.stderr)
        else:
            if ended is not None or returncode == 0 or files.result.exists():
                return
            failure = _failure(part, returncode)
        named = dataclasses.replace(failure, message=f"node {allocation.name}: {failure.message}")
        protocol.write_json_atomically(files.node_failure(allocation.node), dataclasses.asdict(named))


def _claim_of_job(files: AttemptDir, allocation: Allocation) -> Claim | None:
    """The claim that the first node has made for this life of the job; None where the attempt is another's."""
    until = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < until:
        claim = read_claim(files)
        if claim is not None:
            return claim if (claim.job, claim.restarts) == (allocation.job, allocation.restarts) else None
        time.sleep(POLL_SECONDS)
    return None


def _run_trainer(part: Part, spec: Spec) -> tuple[int, str | None]:
    """Start the trainer, with what was compiled before, and see it end: its exit status, and why it had to end."""
    run, files, order = part.run, part.files, part.order
    tag = trainer_tag(files)
    environment = {THREADS: str(threads_of(order)), **trainer_environment(order.gpus, tag)}
    machine = describe_machine(order.gpus, order.python)
    processes = order.processes * part.allocation.nodes
    key = compile_cache.key_of(spec, processes=processes, packages=machine.packages, gpus=machine.gpus)
    with compile_cache.lent(key, archive=home_of(run).compiled(key), environment=environment) as cache:
        environment |= cache.variables
        script = ScriptRun(run, files, spec) if spec.script else None
        if script:
            environment = script.prepare(environment, order.python or sys.executable)
        if part.is_first:
            protocol.write_json_atomically(files.env, describe_environment(environment, machine, cache.found))
        try:
            node_check.require(_node_of(part, spec, environment, cache.found))
        except NodeRefused:
            signal_tagged(TRAINER_TAG, tag, signal.SIGKILL)  # of a sum over the GPUs that hangs
            raise
        with part.stdout.open("ab") as out, part.stderr.open("ab") as err:
            command = part_command(part, torch=machine.packages.get("torch", ""), script=script)
            process = subprocess.Popen(
                shielded(command, is_alone=processes == 1 and not set(TORCHRUN) <= set(command)),
                cwd=files.work if script else run.root, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0,
            )  # fmt: skip
        with gauges.recording(files.system(part.allocation.node), order.gpus):
            follower = script if part.is_first else None
            if follower:
                follower.start(device=machine.device, torch=machine.packages.get("torch", ""), world_size=processes)
            ended = _watch(process, part, tag, script=follower)
        if follower and ended is None and process.returncode == 0:
            follower.conclude(device=machine.device, world_size=processes)
        if part.is_first and files.result.exists() and protocol.read_result(files.result).status == protocol.COMPLETE:
            cache.save()
    return process.returncode, ended


def _name_of_node(part: Part) -> str:
    return part.allocation.name or platform.node()


def _node_of(part: Part, spec: Spec, environment: Mapping[str, str], compiled: compile_cache.Found) -> Node:
    """What is checked before the trainer starts."""
    return Node(
        run=part.run, files=part.files, spec=spec, name=_name_of_node(part), gpus=part.order.gpus,
        number=part.allocation.node, python=part.order.python or sys.executable,
        environment=environment, compiled=compiled,
    )  # fmt: skip


def _require_sha256(path: Path, planned: str) -> None:
    """What runs, and what it scores again, must be what the spec names."""
    found = protocol.sha256_of(path) if path.exists() else "missing"
    if found != planned:
        raise ProtocolError(
            f"{path}: its SHA-256 is {found}, the spec says {planned}",
            hint="the file was changed after the run was planned; move the run's directory away and ask again",
        )


def trainer_command(run: RunDir, attempt: int, processes: int) -> list[str]:
    """How a trainer on one node is started: by Python, or by torchrun where it has several processes."""
    return [sys.executable, *_on_one_node(processes), *_program(run, attempt)]


def part_command(part: Part, *, torch: str, script: ScriptRun | None = None) -> list[str]:
    """The same for one node's part of an attempt, by the interpreter that is ordered, with signals left to the ranks.

    Somebody else's script has torchrun on a single GPU too: some look for its variables without asking.
    """
    is_launched = script is not None and bool(part.order.gpus)
    is_alone = part.allocation.nodes == 1
    options = _on_one_node(part.order.processes, is_launched=is_launched) if is_alone else _on_this_node(part)
    version = tuple(int(number) for number in re.findall(r"\d+", torch)[:2])
    if options and version >= SHIELDING_TORCH:
        options.append("--signals-to-handle=SIGINT")
    program = script.program if script else _program(part.run, part.files.number)
    return [part.order.python or sys.executable, *options, *program]


def _program(run: RunDir, attempt: int) -> list[str]:
    return [str(run.bundle), str(run.root), "--attempt", str(attempt)]


def _on_one_node(processes: int, *, is_launched: bool = False) -> list[str]:
    is_needed = processes > 1 or is_launched
    return [*TORCHRUN, "--standalone", f"--nproc_per_node={processes}"] if is_needed else []


def _on_this_node(part: Part) -> list[str]:
    host, _, port = part.claim.rendezvous.rpartition(":")
    return [
        *TORCHRUN, f"--nproc_per_node={part.order.processes}", f"--nnodes={part.allocation.nodes}",
        f"--node_rank={part.allocation.node}", f"--master_addr={host}", f"--master_port={port}",
    ]  # fmt: skip


def shielded(command: Sequence[str], *, is_alone: bool) -> list[str]:
    """A command that SIGUSR2 does not end, which a scheduler sends to all; nor does SIGTERM torchrun, whose ranks hear it.

    A shell gives its ignored signals to what it becomes. `is_alone`: the trainer is one process, without torchrun.
    """
    ignored = "USR2" if is_alone else "USR2 TERM"
    return ["/bin/sh", "-c", f"trap '' {ignored}; exec \"$@\"", SHIELD, *command]


def trainer_environment(gpus: str, tag: str) -> dict[str, str]:
    """The trainer's environment: this job's, without our own checkout, which the bundle must not see."""
    environment = dict(os.environ)
    checkout = str(Path(protocol.__file__).resolve().parent.parent)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path != checkout]
    environment.pop("PYTHONPATH", None)
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return {**environment, "CUDA_VISIBLE_DEVICES": gpus, "PYTHONUNBUFFERED": "1", TRAINER_TAG: tag}


def threads_of(order: Order) -> int:
    """Threads of a process where the job's environment names no number: its share of the processors that the job may use.

    torch would take them all in every process, and runs side by side would wait for one another.
    """
    return max(1, cores() // (order.processes * order.beside))


def _watch(process: subprocess.Popen[bytes], part: Part, tag: str, *, script: ScriptRun | None = None) -> str | None:
    """Wait for the trainer's end and say why it had to end: None where it did by itself.

    STOPPED where it was asked to stop, TIMEOUT where it took too long, SUPERSEDED where the run has a later attempt,
    INFRASTRUCTURE where its part on another node failed. Raises NodeRefused where its first steps show a slow node.
    """
    attempt, order = part.files, part.order
    deadline = time.monotonic() + order.timeout_seconds
    ended: str | None = None
    looked = 0.0
    pace = Pace(attempt, is_alone=part.allocation.nodes == 1)
    while process.poll() is None:
        now = time.monotonic()
        if ended is not None and now > deadline:
            break
        if part.notice.is_due():
            _ask_to_leave(process, tag)
        if ended is None and attempt.result.exists():  # what is left to do is to exit
            ended, deadline = protocol.COMPLETE, now + order.grace_seconds
        elif ended is None and (attempt.stop.exists() or now > deadline):
            ended = protocol.STOPPED if attempt.stop.exists() else protocol.TIMEOUT
            if ended == protocol.TIMEOUT:  # said first: whoever reads a polite trainer's result must know why it left
                with suppress(OSError):
                    attempt.overdue.touch()
            deadline = now + (GIVEN_UP_SECONDS if _is_given_up(attempt) else order.grace_seconds)
            _ask_to_leave(process, tag)
        elif ended is None and now - looked > OWNER_SECONDS:
            looked = now
            if script:
                with suppress(CaddieError, OSError):  # what cannot be read or written now is told at the end
                    script.look()
            ended = _why_to_end(part) or (protocol.NODE if pace.problem() else None)
            deadline = now if ended else deadline
        time.sleep(POLL_SECONDS)
    _end_all(process, tag)
    if ended == protocol.NODE:
        raise node_check.refuse(_name_of_node(part), attempt, pace.problem())
    return None if ended == protocol.COMPLETE else ended


def _is_given_up(attempt: AttemptDir) -> bool:
    """Whether nobody wants what the attempt has: it need not end its step, nor keep a checkpoint."""
    return attempt.stop.exists() and attempt.stop.read_bytes() == protocol.GIVEN_UP


def _why_to_end(part: Part) -> str | None:
    if not part.run.is_newest(part.files):
        return SUPERSEDED
    others = range(1, part.allocation.nodes) if part.is_first else ()
    return protocol.INFRASTRUCTURE if any(part.files.node_failure(node).exists() for node in others) else None


def _ask_to_leave(process: subprocess.Popen[bytes], tag: str) -> None:
    """Send SIGTERM to the trainer itself: to the ranks where torchrun has started them, each in a session of its own."""
    ranks = [pid for pid in tagged_processes(TRAINER_TAG, tag) if parent_of(pid) == process.pid]
    for pid in ranks or [process.pid]:
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.kill(pid, signal.SIGTERM)


def _end_all(process: subprocess.Popen[bytes], tag: str) -> None:
    """Leave no process of the trainer behind; torchrun's ranks have sessions of their own and outlive its death."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
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
