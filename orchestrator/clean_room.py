"""The clean room: an empty directory where a bundle scores a model file, without network, checkout or training data."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator import compile_cache, watch, worker
from orchestrator.errors import CaddieError, DataError
from orchestrator.failures import SHOWN_LINES, classify, explain, log_tail
from orchestrator.machine import describe_environment, describe_machine
from orchestrator.processes import TRAINER_TAG, signal_tagged, trainer_tag
from trainer import protocol
from trainer.protocol import VALIDATION, DataDir, Failure, Manifest, Result, RunDir

KEPT = (
    "PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "CUDA_HOME", "CC", "CXX", "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER", "CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS", "PYTHONUNBUFFERED", TRAINER_TAG,
)  # fmt: skip
"""What the bundle sees of this process's environment: how to find Python, compilers and GPUs, and how sums are ordered."""

ISOLATION = {"PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
"""As `python -I` would have it; variables reach the processes that torchrun starts, an option would not."""

LOOPBACK = {"PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""How torchrun and its processes meet where there is no other interface; the first is torchrun's `--local-addr`."""

NAMESPACES = (("unshare", "--net"), ("unshare", "--map-root-user", "--net"))
"""Ways into a network namespace of one's own: root's, and that of a user who may make user namespaces."""

ENTER = """
import fcntl, os, socket, struct, sys
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
try:
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP))
except OSError:
    pass  # some sandboxes have it up and refuse the call
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Begins in a new namespace, where the loopback is down, and becomes the program that it is given."""

NAMESPACE_OF = "import os; print(os.readlink('/proc/self/ns/net'))"
PROBE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What a bundle reached for outside the room."""

    files: list[str]
    """Beside its own, the data set's, Python's and the machine's."""

    hosts: list[str]
    programs: list[str]
    count: int
    """Different files, hosts and programs in all, those in the room included."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a bundle said of a model file alone."""

    result: Result | None
    failure: Failure | None
    """Why there is no result."""

    is_offline: bool
    """Whether it ran in a network namespace without a way out."""

    wall_seconds: float
    """From the start of the process to its end."""

    environment: dict[str, object]
    """Machine and variables, as a run's `env.json` has them."""

    reached: Reached | None = None
    """What it reached for, where that was watched."""


def evaluate(
    run: RunDir,
    data: DataDir,
    manifest: Manifest,
    *,
    gpus: Sequence[str],
    timeout_seconds: float,
    is_watched: bool = False,
) -> Evaluation:
    """Let a run's bundle score its model file on the validation split, in a directory of their own that is gone afterwards.

    One process a GPU, or one on the CPU; watched, what it reaches for is taken down. Raises DataError for a manifest that
    names files elsewhere, OSError for a disk that cannot take the copies; whatever the bundle does wrong is the
    evaluation's failure.
    """
    with tempfile.TemporaryDirectory(prefix="caddie-clean-room-", ignore_cleanup_errors=True) as folder:
        room, shards, scratch, hook = (Path(folder) / name for name in ("run", "data", "scratch", "hook"))
        for place in (room, shards, scratch, hook):
            place.mkdir()
        for path in (run.bundle, run.artifact):
            copy_read_only(path, room)
        for path in validation_files(data, manifest):
            copy_read_only(path, shards)
        found = _evaluate(
            RunDir(room), shards, scratch, hook if is_watched else None, gpus=gpus, timeout_seconds=timeout_seconds
        )
        return dataclasses.replace(found, reached=_reached(Path(folder), hook)) if is_watched else found


def _reached(room: Path, hook: Path) -> Reached:
    """What was taken down, less what may be reached for."""
    accesses, job = watch.read(hook), worker.trainer_environment("", "")
    return Reached(
        files=watch.elsewhere(accesses, [Path(os.path.realpath(room)), *watch.code_folders(job)]),
        hosts=watch.outward(accesses), programs=watch.programs(accesses), count=len(accesses),
    )  # fmt: skip


def validation_files(data: DataDir, manifest: Manifest) -> list[Path]:
    """Manifest, tokenizer and validation shards: all that an evaluation reads. Raises DataError for a name that leads away."""
    names = [manifest.tokenizer, *(shard.file for shard in manifest.splits[VALIDATION].shards)]
    for name in names:
        if Path(name).name != name:
            raise DataError(
                f"{data.manifest}: a file of a data set must lie in its folder, got {name!r}",
                hint="the manifest is damaged: put it back, or prepare the data set again",
            )
    return [data.manifest, *(data.root / name for name in names)]


def copy_read_only(path: Path, folder: Path) -> None:
    """A copy, not a link: nothing in the room leads back to where the training data lie."""
    copied = Path(shutil.copyfile(path, folder / path.name))
    copied.chmod(0o444)


def _evaluate(
    room: RunDir, data: Path, scratch: Path, hook: Path | None, *, gpus: Sequence[str], timeout_seconds: float
) -> Evaluation:
    visible, namespace = ",".join(gpus), offline_namespace()
    machine = describe_machine(visible)
    environment = room_environment(room, scratch, gpus=visible, is_offline=bool(namespace))
    if hook is not None:
        environment = watch.install(hook, environment)
    program = [*worker.trainer_command(room, 0, max(1, len(gpus))), "--recheck", str(data)]
    log, started = scratch / "log.txt", time.monotonic()
    returncode = run_to_its_end(
        [*namespace, *program], room=room, environment=environment, log=log, timeout_seconds=timeout_seconds
    )
    wall_seconds = time.monotonic() - started
    result, failure = _outcome(room, returncode, log_tail(log), timeout_seconds)
    return Evaluation(
        result=result, failure=failure, is_offline=bool(namespace), wall_seconds=round(wall_seconds, 2),
        environment=describe_environment(
            environment, machine, compile_cache.Found(key="", state=compile_cache.COLD)
        ),
    )  # fmt: skip


def room_environment(room: RunDir, scratch: Path, *, gpus: str, is_offline: bool) -> dict[str, str]:
    """The bundle's environment: a job's, reduced to what it needs, its caches and temporary files in the room."""
    job = worker.trainer_environment(gpus, tag_of(room))
    places = {variable: str(scratch / name) for variable, name in compile_cache.DIRECTORIES.items()}
    return {
        **{name: job[name] for name in KEPT if name in job}, **ISOLATION, **(LOOPBACK if is_offline else {}), **places,
        "HOME": str(scratch), "TMPDIR": str(scratch),
    }  # fmt: skip


def tag_of(room: RunDir) -> str:
    """Marks every process of the room, as an attempt's are marked."""
    return trainer_tag(room.attempt(0))


def offline_namespace() -> list[str]:
    """Command that starts a program in a network namespace with the loopback alone; empty where this machine has no way."""
    try:
        ours = os.readlink("/proc/self/ns/net")
    except OSError:
        return []
    for unshare in NAMESPACES:
        enter = [*unshare, sys.executable, "-I", "-c", ENTER]
        try:
            probe = subprocess.run(
                [*enter, sys.executable, "-I", "-c", NAMESPACE_OF],
                capture_output=True, text=True, timeout=PROBE_SECONDS, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            continue
        if probe.returncode == 0 and probe.stdout.strip() not in ("", ours):
            return enter
    return []


def run_to_its_end(
    command: Sequence[str], *, room: RunDir, environment: dict[str, str], log: Path, timeout_seconds: float
) -> int | None:
    """Run a program and leave no process of it behind; its exit code, or None where it took too long."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=room.root, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, process_group=0
        )
        try:
            return process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also where the user presses Ctrl-C
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            signal_tagged(TRAINER_TAG, tag_of(room), signal.SIGKILL)  # torchrun's ranks have own sessions


def _outcome(
    room: RunDir, returncode: int | None, log: str, timeout_seconds: float
) -> tuple[Result | None, Failure | None]:
    """What the bundle wrote, or why it wrote nothing that counts."""
    lines = "\n".join(log.splitlines()[-SHOWN_LINES:])
    if returncode is None:
        message = f"not done after {timeout_seconds:g} s, and ended"
        return None, Failure(kind=protocol.TIMEOUT, message=message, log=lines)
    if returncode != 0:
        kind, message = classify(returncode, log), explain(returncode, log)
        return None, Failure(kind=kind, message=message, log=lines)
    try:
        return protocol.read_result(room.recheck), None
    except FileNotFoundError:
        return None, Failure(kind=protocol.CODE, message="the bundle ended well and wrote no scores", log=lines)
    except CaddieError as error:
        return None, Failure(kind=protocol.CODE, message=f"its scores cannot be read: {error}", log=lines)
