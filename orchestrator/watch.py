"""What a Python program opens, calls and starts, taken down by an audit hook in each of its processes.

A hook hears Python, not what a library of C does by itself; it finds what somebody forgot, not what somebody hides.
"""

from __future__ import annotations

import ast
import os
import socket
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

LOG = "CADDIE_WATCH"
"""Environment variable that names the file which the hook appends to."""

FILES, NETWORK, PROGRAMS = "files", "network", "programs"

HOOK_FILE = "sitecustomize.py"  # Python imports it at its start, also in the processes that torchrun starts
LOG_FILE = "log.txt"
HOOK = """
import os, sys

log = os.open(os.environ["CADDIE_WATCH"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
kinds = {
    "open": ("files", 0), "sqlite3.connect": ("files", 0), "socket.connect": ("network", 1), "socket.sendto": ("network", 1),
    "socket.sendmsg": ("network", 1), "socket.getaddrinfo": ("network", 0), "socket.gethostbyname": ("network", 0),
    "subprocess.Popen": ("programs", 0), "os.exec": ("programs", 0), "os.posix_spawn": ("programs", 0),
    "os.system": ("programs", 0),
}
told = set()

def hear(event, arguments):
    if event not in kinds:
        return
    kind, number = kinds[event]
    what = arguments[number]
    if what is None and event == "subprocess.Popen":
        what = arguments[1][0]
    if isinstance(what, int):
        return  # a descriptor: its file was opened before
    if hasattr(what, "__fspath__") or isinstance(what, bytes):
        what = os.fsdecode(what)
    if kind == "files":
        what = os.path.abspath(str(what))
    line = repr((kind, str(what[0] if isinstance(what, tuple) and what else what))) + "\\n"
    if line not in told:
        told.add(line)
        os.write(log, line.encode(errors="backslashreplace"))

sys.addaudithook(hear)
"""

SYSTEM = ("/proc", "/sys", "/dev", "/usr", "/lib", "/lib64", "/bin", "/etc")
"""The machine's own: devices, libraries, settings."""

LIBRARIES = ("LD_LIBRARY_PATH", "CUDA_HOME", "PYTHONPATH")
"""Variables of a program's environment that name further folders of code."""

HERE = frozenset({"", "localhost", "127.0.0.1", "0.0.0.0", "::1", "::"})


@dataclass(frozen=True)
class Access:
    """Something that a program reached for."""

    kind: str
    """files, network or programs."""

    what: str
    """A path, a host or a program."""


def install(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Put the hook into an empty folder; a program's environment, changed so that its processes begin with the hook."""
    (folder / HOOK_FILE).write_text(HOOK, encoding="utf-8")
    paths = [str(folder), environment.get("PYTHONPATH", "")]
    return {**environment, LOG: str(folder / LOG_FILE), "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def read(folder: Path) -> list[Access]:
    """What was taken down, each thing once, in order of time; of a process that was killed, what it had written."""
    try:
        lines = (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return list(dict.fromkeys(Access(*ast.literal_eval(line)) for line in lines if line.endswith(")")))


def code_folders(environment: Mapping[str, str]) -> list[Path]:
    """Where a program with this environment has its code and libraries from."""
    named = [part for name in LIBRARIES for part in environment.get(name, "").split(os.pathsep) if part]
    paths = sysconfig.get_paths()
    ours = [sys.prefix, sys.base_prefix, *(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))]
    return [Path(os.path.realpath(path)) for path in (*named, *ours)]


def elsewhere(accesses: Iterable[Access], folders: Iterable[Path]) -> list[str]:
    """Files outside these folders and the machine's own."""
    allowed = [*folders, *map(Path, SYSTEM)]
    files = (Path(os.path.realpath(access.what)) for access in accesses if access.kind == FILES)
    return sorted({str(file) for file in files if not any(file.is_relative_to(folder) for folder in allowed)})


def outward(accesses: Iterable[Access]) -> list[str]:
    """Hosts other than this one; a path is a socket of this machine."""
    here = HERE | {socket.gethostname(), socket.getfqdn()}
    hosts = {access.what for access in accesses if access.kind == NETWORK}
    return sorted(host for host in hosts - here if not host.startswith(("/", "\0", "127.")) and host != "None")


def programs(accesses: Iterable[Access]) -> list[str]:
    """Programs that were started, by name."""
    return sorted({Path(access.what.split()[0]).name for access in accesses if access.kind == PROGRAMS and access.what})
