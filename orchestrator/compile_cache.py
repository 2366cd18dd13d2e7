"""The compile cache: what torch.compile and Triton compiled, on the node and, from node to node, in CADDIE_HOME.

A cold start compiles for a minute and more while the GPUs wait, and on a cluster any job may be the first on its node.
So the trainer gets a directory on the node, which is filled from an archive before it starts; what it compiled is
archived after it has ended. Losing any of it costs time only: what goes wrong here is told on stderr and fails no run.
Standard library only: this runs inside a job.
"""

from __future__ import annotations

import dataclasses
import errno
import gzip
import hashlib
import json
import os
import platform
import shutil
import stat
import sys
import tarfile
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.protocol import Spec

PLACE = "CADDIE_COMPILE_CACHE"
"""Environment variable with the folder on the node that takes the directories, instead of the temporary one."""

DIRECTORIES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_HOME": "triton"}
"""Environment variables that torch.compile (with its graph caches) and Triton take their places from, and ours."""

VARIABLES = (*DIRECTORIES, "TRITON_CACHE_DIR")
"""Those by which a user may choose the places.

Ours is not given by the last one. torch.compile sets it for each process to a directory of its GPU, within its own:
processes that compile one kernel into one directory at the same time may mix their files (pytorch/pytorch#92664).
"""

SHAPING_SECTIONS = ("model", "data", "evaluation", "ttt", "runtime")
"""Sections of the configuration that decide about graphs and shapes; a knob counts unless it is named below.

schedule, optim, quant and limits hold numbers that a graph is fed with, or that no graph sees.
"""

NUMBERS = frozenset({
    "model.embedding_std", "data.order_seed", "ttt.lr", "ttt.momentum", "ttt.epochs", "ttt.adam_beta1", "ttt.adam_beta2",
    "ttt.adam_eps", "ttt.weight_decay", "ttt.lora_seed",
})  # fmt: skip
"""Knobs of these sections that change no graph, so that all trials of a search over them share one key."""

SWITCHES = frozenset({"model.qk_gain", "ttt.grad_clip_norm"})
"""Knobs of which only that they are 0 changes a graph."""

COMPILERS = ("torch", "triton")

LARGEST_BYTES = 2**30  # of the files in one archive: some 6 s to restore, at 0.11 s for the 20 MB of a small run
STORE_BYTES = 4 * 2**30  # of all archives together
IDLE_SECONDS = 7 * 86_400.0  # then the node's copy goes: far longer than any job, so that none loses its own
SETTLED_SECONDS = 2.0  # linkers write in place; a younger file may be another attempt's, half written
ABANDONED_SECONDS = 3600.0  # then nobody writes a partial archive any more
COMPRESSION = 1  # of gzip, which is there for its checksum; the fastest level leaves a quarter
FILES = "caddie.files"  # pax header at the head of an archive: the number of files in it

DAMAGE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, KeyError)
"""What reading an archive raises where its bytes are wrong; any other OSError is the machine's."""

# What a trainer finds in its directory when it starts.
COLD, LOCAL, RESTORED, OWN, NONE = "cold", "local", "restored", "own", "none"


# ---------------------------------------------------------------------------------------------------- the key


def key_of(spec: Spec, *, processes: int, packages: Mapping[str, str], gpus: Sequence[str]) -> str:
    """Identity of what a run compiles, of all that can be known without torch.

    It only chooses an archive: the caches have exact keys of their own inside. Different code, different key; what
    changes no graph (learning rates, seeds, schedules, limits) is left out.
    """
    identity = [
        spec.bundle_sha256, shaping_knobs(spec.config), processes, platform.python_version(),
        {name: packages.get(name, "") for name in COMPILERS}, sorted(set(gpus)), host_target(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def shaping_knobs(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The knobs that decide about graphs and shapes, by dotted name; of a switch, whether it is on."""
    knobs = {
        f"{section}.{key}": value for section in SHAPING_SECTIONS for key, value in config.get(section, {}).items()
    }
    return {knob: bool(value) if knob in SWITCHES else value for knob, value in knobs.items() if knob not in NUMBERS}


def host_target(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """What code for the host was compiled for: -march=native, so that elsewhere it would die of an illegal instruction."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    features = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return [platform.machine(), *platform.libc_ver(), *sorted(features.split())]


# ---------------------------------------------------------------------------------------------------- one trainer's


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a trainer found in its directory, for env.json."""

    key: str
    state: str
    """cold, local (left by a run on this node), restored, own (the user's directory), none (no directory)."""

    restored_bytes: int = 0
    restore_seconds: float = 0.0


class CompileCache:
    """The directory of one key on this node, and its archive. Attempts at once share it: the caches allow that."""

    def __init__(self, key: str, *, directory: Path | None, archive: Path) -> None:
        self.directory = directory
        self.archive = archive
        self.found = Found(key=key, state=NONE)
        self._is_damaged = False

    @property
    def variables(self) -> dict[str, str]:
        """What the trainer's environment needs."""
        if self.directory is None:
            return {}
        return {variable: str(self.directory / name) for variable, name in DIRECTORIES.items()}

    def restore(self) -> None:
        """Fill the directory from the archive, unless a run on this node left something there."""
        if self.directory is None:
            return
        began, state, size = time.monotonic(), COLD, 0
        try:
            if _is_filled(self.directory):
                state = LOCAL
                os.utime(self.directory)
            elif self.archive.exists():
                size = restore_archive(self.archive, self.directory)
                state = RESTORED if size else LOCAL
            _touch(self.archive)
        except DAMAGE as error:
            self._is_damaged = True
            tell(f"{self.archive}: damaged, and replaced after a complete run: {error}")
        except OSError as error:
            tell(f"{self.archive}: not restored: {error}")
        seconds = round(time.monotonic() - began, 3)
        self.found = dataclasses.replace(self.found, state=state, restored_bytes=size, restore_seconds=seconds)

    def save(self) -> None:
        """Archive the directory where it holds more files than the archive.

        More, not others: two nodes that compiled the same at once name some files differently, and would replace each
        other's archive for ever.
        """
        if self.directory is None:
            return
        began = time.monotonic()
        try:
            sizes = settled_files(self.directory)
            if len(sizes) <= (0 if self._is_damaged else archived_files(self.archive)):
                return
            total = sum(sizes.values())
            if total > LARGEST_BYTES:
                tell(f"{self.directory}: not saved: it holds {total:,} bytes, the limit is {LARGEST_BYTES:,}")
                return
            write_archive(self.archive, self.directory, sorted(sizes))
            drop_archives(self.archive.parent)
        except (*DAMAGE, OSError) as error:
            tell(f"{self.archive}: not saved: {error}")
        else:
            seconds = time.monotonic() - began
            tell(f"{self.archive}: {len(sizes):,} files, {total:,} bytes, saved in {seconds:.1f} s")


@contextmanager
def lent(key: str, *, archive: Path, environment: Mapping[str, str]) -> Iterator[CompileCache]:
    """A directory for one trainer, filled where that is possible. A directory that the user set is left to the user."""
    if any(environment.get(variable) for variable in VARIABLES):
        cache = CompileCache(key, directory=None, archive=archive)
        cache.found = dataclasses.replace(cache.found, state=OWN)
        yield cache
        return
    root, is_passing = None, False
    try:
        root, is_passing = private_root(place(environment))
    except OSError as error:
        tell(f"no directory on this node: {error}")
    cache = CompileCache(key, directory=root / key if root else None, archive=archive)
    cache.restore()
    try:
        yield cache
    finally:
        if root is not None and is_passing:
            shutil.rmtree(root, ignore_errors=True)
        elif root is not None:
            drop_idle(root)


def tell(text: str) -> None:
    """A line for people, in the job's own log: the trainer's is searched for the cause of a failure."""
    sys.stderr.write(f"compile cache: {text}\n")


# ---------------------------------------------------------------------------------------------------- on the node


def place(environment: Mapping[str, str]) -> Path:
    """The folder on this node that holds every user's directories."""
    chosen = environment.get(PLACE)
    return Path(os.path.expanduser(chosen)).absolute() if chosen else Path(tempfile.gettempdir())


def private_root(parent: Path) -> tuple[Path, bool]:
    """This user's folder, and whether it is a passing one, to be removed after the attempt. Raises OSError.

    Everybody may write to /tmp, and the name can be guessed: somebody else may have made the folder, or a link in its
    place, and put compiled code into it, which the trainer would run as this user. What is not a real directory that
    belongs to this user and is closed to all others is an attack, and a fresh directory is used instead.
    """
    root = parent / f"caddie-compile-cache-{os.geteuid()}"
    parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        root.mkdir(mode=0o700)
    found = root.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077:
        return root, False
    tell(f"{root} is not a directory of mode 700 that belongs to this user, and is not used: remove it")
    return Path(tempfile.mkdtemp(prefix=f"{root.name}-", dir=parent)), True


def drop_idle(root: Path) -> None:
    """Delete what no attempt on this node used for long: every change of the trainer has a key, and so a copy, of its own."""
    with suppress(OSError):
        for folder in root.iterdir():
            if folder.lstat().st_mtime < time.time() - IDLE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _is_filled(directory: Path) -> bool:
    """Whether anything was compiled there: torch makes its folder when it is imported."""
    return any(names for _, _, names in os.walk(directory))


def settled_files(directory: Path) -> dict[Path, int]:
    """Size of each file that nobody is writing any more, by its path within the directory."""
    files = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder) / name
            with suppress(FileNotFoundError):  # another attempt's passing file
                found = path.lstat()
                if stat.S_ISREG(found.st_mode) and found.st_mtime < time.time() - SETTLED_SECONDS:
                    files[path.relative_to(directory)] = found.st_size
    return files


# ---------------------------------------------------------------------------------------------------- the archive


def restore_archive(archive: Path, directory: Path) -> int:
    """Extract the archive into the directory and return the bytes of its files. Raises what DAMAGE names, OSError.

    Each compiler's folder appears whole or not at all: another attempt may have filled it meanwhile, and then it stays.
    Returns 0 where all of them stayed.
    """
    stage = Path(tempfile.mkdtemp(prefix=".restore-", dir=directory.parent))
    try:
        size = extract(archive, stage)
        point_triton_to(directory, stage)
        directory.mkdir(exist_ok=True)
        moved = [_took_place(folder, directory / folder.name) for folder in stage.iterdir()]
        return size if any(moved) else 0
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _took_place(source: Path, target: Path) -> bool:
    """Rename a folder to another, unless there is something in that."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def extract(archive: Path, stage: Path) -> int:
    """Extract every file and return their bytes; raises what DAMAGE names, unless all of it is as it was written."""
    if not hasattr(tarfile, "data_filter"):  # Python 3.11.0 to 3.11.3 would write outside the stage if told to
        raise OSError(errno.ENOSYS, "this Python extracts no archive safely, 3.11.4 does")
    sizes = []
    with gzip.open(archive) as packed:
        with tarfile.open(fileobj=packed, mode="r|") as tar:
            expected = int(tar.pax_headers[FILES])
            for member in tar:
                if not member.isreg():
                    raise tarfile.ReadError(f"{member.name!r} is no regular file")
                tar.extract(member, stage, filter="data")
                sizes.append(member.size)
        while packed.read(2**20):  # up to its checksum, which tar does not read
            continue
    if len(sizes) != expected:
        raise tarfile.ReadError(f"{len(sizes)} files of {expected}")
    return sum(sizes)


def point_triton_to(directory: Path, stage: Path) -> None:
    """Let the staged files name the directory that they are going to: Triton lists a kernel's files by absolute path.

    Untouched, they would be looked for where another node had them, in a place that here may be anybody's.
    """
    for listing in stage.rglob("__grp__*.json"):
        content = json.loads(listing.read_text(encoding="utf-8"))
        paths = content.get("child_paths") if isinstance(content, dict) else None
        if isinstance(paths, dict):
            folder = directory / listing.parent.relative_to(stage)
            content["child_paths"] = {name: str(folder / Path(path).name) for name, path in paths.items()}
            listing.write_text(json.dumps(content), encoding="utf-8")


def archived_files(archive: Path) -> int:
    """Number of files in an archive, read off its head; 0 where there is none that can be read."""
    try:
        with gzip.open(archive) as packed, tarfile.open(fileobj=packed, mode="r|") as tar:
            return int(tar.pax_headers[FILES])
    except (*DAMAGE, OSError):
        return 0


def write_archive(archive: Path, directory: Path, files: Sequence[Path]) -> None:
    """Write the files so that a reader sees a whole archive, the last one that was renamed. Raises OSError."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(f"{archive.name}.{uuid.uuid4().hex}.partial")  # other nodes have the same pids
    try:
        with partial.open("xb") as file:
            with (
                gzip.GzipFile(fileobj=file, mode="wb", filename="", compresslevel=COMPRESSION) as packed,
                tarfile.open(
                    fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT, pax_headers={FILES: str(len(files))}
                ) as tar,
            ):
                for path in files:
                    tar.add(directory / path, arcname=str(path), recursive=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, archive)
    finally:
        partial.unlink(missing_ok=True)


def drop_archives(store: Path) -> None:
    """Keep the latest used archives up to their common limit; what was left half written goes too."""
    total = 0
    found = [(path.stat(), path) for path in store.iterdir()]
    for status, path in sorted(found, key=lambda item: item[0].st_mtime, reverse=True):
        if path.suffix == ".partial":
            is_dropped = status.st_mtime < time.time() - ABANDONED_SECONDS
        else:
            total += status.st_size
            is_dropped = total > STORE_BYTES
        if is_dropped:
            path.unlink(missing_ok=True)


def _touch(archive: Path) -> None:
    """Mark the archive as used; another user's cannot be marked."""
    with suppress(OSError):
        os.utime(archive)
