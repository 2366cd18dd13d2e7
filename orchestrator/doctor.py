"""What this machine and cluster can do, what is missing, and the command that mends it. Loads nothing heavy itself."""

from __future__ import annotations

import grp
import json
import pwd
import re
import shlex
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from orchestrator import datasets, lock, tracking_server
from orchestrator.errors import CaddieError, MachineError
from orchestrator.home import Home
from orchestrator.ledger import Ledger
from orchestrator.machine import cores

OK, WARN, MISSING = "ok", "warn", "missing"

LEAST_PYTHON = (3, 11)
PACKAGE = "caddie"
"""Name of the distribution, whose requirements are what is checked."""

LEAST_FREE_BYTES = 2_000_000_000
"""A smoke study leaves some hundred megabytes; its MLflow and reports the rest."""

LEAST_MEMORY_BYTES = 3_000_000_000
"""Two smoke runs at a time, each with torch in it, and the controller."""

PROBE_SECONDS = 60.0

TORCH_PROBE = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "gpus": gpus, "cuda": torch.version.cuda}))
"""

MEANT_FOR = {
    "dev": "work on caddie itself",
    "postgresql": "keep Optuna's or MLflow's tables on a server",
    "s3": "keep MLflow's artifacts in object storage",
}
"""Extras without which everything that a user does still works."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: str
    """ok, warn (something does not work, or not well) or missing (nothing works without it)."""

    found: str
    remedy: str = ""
    """Command or step that mends it; empty where nothing is wrong."""


def examine(home: Home) -> list[Finding]:
    """Look at everything; never raises for what it finds."""
    return [
        python_version(sys.version_info[:3]),
        *packages(),
        torch_and_gpus(),
        slurm(),
        home_directory(home),
        cores_and_memory(),
        *data_sets(home),
        mlflow_database(home),
        *studies(home),
    ]


def exit_code(findings: Sequence[Finding]) -> int:
    """0, or MachineError's code where something required is missing."""
    return MachineError.exit_code if any(finding.status == MISSING for finding in findings) else 0


def python_version(version: tuple[int, ...]) -> Finding:
    text, least = ".".join(map(str, version)), ".".join(map(str, LEAST_PYTHON))
    if version[:2] >= LEAST_PYTHON:
        return Finding(name="Python", status=OK, found=f"{text} ({sys.executable})")
    return Finding(name="Python", status=MISSING, found=f"{text}, {least} is needed", remedy="python3.11 -m venv .venv")


# ── packages ────────────────────────────────────────────────────────────────────────────────────────────────────────


def packages(version_of: Callable[[str], str] = metadata.version) -> list[Finding]:
    """The installed packages against what the distribution requires, read off its metadata."""
    try:
        requirements = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return [
            Finding(
                name=PACKAGE,
                status=WARN,
                found="not installed, run from its source",
                remedy="pip install -c constraints.txt -e '.[all]'",
            )
        ]
    return [package(requirement, version_of) for requirement in dict.fromkeys(requirements) if not _is_own(requirement)]


def _is_own(requirement: str) -> bool:
    """The extra `all` requires the package's own extras."""
    return bool(re.match(rf"{PACKAGE}\b", requirement))


def package(requirement: str, version_of: Callable[[str], str]) -> Finding:
    """One requirement of the form `name>=1,<2; extra == "trainer"`."""
    constraint, _, marker = requirement.partition(";")
    match = re.match(r"\s*([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(.*)", constraint)
    name, wanted = (match.group(1), match.group(2).strip(" ()")) if match else (constraint, "")
    extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
    absent = WARN if extra and extra.group(1) in MEANT_FOR else MISSING
    remedy = f"pip install -c constraints.txt '{constraint.strip()}'"
    try:
        version = version_of(name)
    except metadata.PackageNotFoundError:
        purpose = f", needed to {MEANT_FOR[extra.group(1)]}" if extra and extra.group(1) in MEANT_FOR else ""
        return Finding(name=name, status=absent, found=f"not installed{purpose}", remedy=remedy)
    if not is_satisfied(version, wanted):
        return Finding(name=name, status=WARN, found=f"{version}, wanted {wanted}", remedy=remedy)
    return Finding(name=name, status=OK, found=version)


def is_satisfied(version: str, wanted: str) -> bool:
    """Whether a release lies within comma-separated bounds (==, !=, >=, <=, >, <, ~=); local suffixes are left out."""
    comparisons: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
        "==": lambda have, bound: have == bound,
        "!=": lambda have, bound: have != bound,
        ">=": lambda have, bound: have >= bound,
        "<=": lambda have, bound: have <= bound,
        ">": lambda have, bound: have > bound,
        "<": lambda have, bound: have < bound,
        "~=": lambda have, bound: have >= bound and have[: len(bound) - 1] == bound[:-1],
    }
    for part in filter(None, (part.strip() for part in wanted.split(","))):
        match = re.fullmatch(r"(==|!=|>=|<=|~=|>|<)\s*([0-9][^*]*?)(\.\*)?", part)
        if match is None:
            continue  # a form that pip knows and this does not: pip has checked it
        operator, text, wildcard = match.groups()
        bound = _release(text)
        have = _release(version)[: len(bound)] if wildcard else _padded(_release(version), len(bound))
        if not comparisons[operator](have, _padded(bound, len(have)) if operator != "~=" else bound):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    """The numbers at the head of a version: 2.13.0+cpu is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _padded(release: tuple[int, ...], length: int) -> tuple[int, ...]:
    return release + (0,) * (length - len(release))


# ── machine ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def torch_and_gpus(command: Sequence[str] = (sys.executable, "-c", TORCH_PROBE)) -> Finding:
    """What torch sees, asked in a process of its own: the control plane never imports it."""
    remedy = "pip install -c constraints.txt -e '.[trainer]'"
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        seen = json.loads(answer.stdout) if answer.returncode == 0 else None
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        return Finding(name="torch", status=WARN, found=f"did not answer: {error}", remedy=remedy)
    if seen is None:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding(name="torch", status=MISSING, found=f"cannot be imported: {last}", remedy=remedy)
    gpus = (
        f"{len(seen['gpus'])} GPUs: {', '.join(sorted(set(seen['gpus'])))}"
        if seen["gpus"]
        else "no GPU, runs use the CPU"
    )
    return Finding(name="GPUs", status=OK, found=f"{gpus} (torch {seen['version']})")


def slurm(which: Callable[[str], str | None] = shutil.which) -> Finding:
    """Slurm is an offer, not a need: without it the local launcher runs everything."""
    tools = ("sbatch", "sinfo", "sacct")
    absent = [tool for tool in tools if which(tool) is None]
    if not absent:
        return Finding(name="Slurm", status=OK, found=f"{', '.join(tools)} are here")
    if len(absent) == len(tools):
        return Finding(name="Slurm", status=OK, found='not here; studies use launcher = "local"')
    return Finding(
        name="Slurm",
        status=WARN,
        found=f"without {', '.join(absent)}",
        remedy="load the cluster's Slurm module, or ask its administrator",
    )


def home_directory(home: Home) -> Finding:
    """CADDIE_HOME can be written, and has room."""
    try:
        home.require_writable()
        free = shutil.disk_usage(home.root).free
    except CaddieError as error:
        return Finding(
            name="CADDIE_HOME",
            status=MISSING,
            found=str(error),
            remedy=error.hint or "set CADDIE_HOME to a directory of your own",
        )
    found = f"{home.root}, {free:,} bytes free"
    if _others_may_write(home.root):
        return Finding(
            name="CADDIE_HOME",
            status=WARN,
            found=f"{home.root}: others may write to it, and so run programs as you, since jobs start what lies there",
            remedy=f"chmod go-w {shlex.quote(str(home.root))}",
        )
    if free < LEAST_FREE_BYTES:
        return Finding(
            name="CADDIE_HOME",
            status=WARN,
            found=f"{found}, {LEAST_FREE_BYTES:,} are wanted",
            remedy="free some space, or set CADDIE_HOME to a larger disk",
        )
    return Finding(name="CADDIE_HOME", status=OK, found=found)


def _others_may_write(folder: Path) -> bool:
    """Whether somebody but its owner may; a group that has its owner's name is the owner's alone, as Debian makes them."""
    seen = folder.stat()
    try:
        is_own_group = grp.getgrgid(seen.st_gid).gr_name == pwd.getpwuid(seen.st_uid).pw_name
    except KeyError:
        is_own_group = False
    return bool(seen.st_mode & (stat.S_IWOTH if is_own_group else stat.S_IWOTH | stat.S_IWGRP))


def cores_and_memory(meminfo: Path = Path("/proc/meminfo")) -> Finding:
    """Cores that this process may use, and the memory that is left."""
    found = f"{cores()} cores"
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match is None:
        return Finding(name="Machine", status=OK, found=found)
    memory = int(match.group(1)) * 1024
    found = f"{found}, {memory:,} bytes of memory available"
    if memory < LEAST_MEMORY_BYTES:
        return Finding(name="Machine", status=WARN, found=found, remedy="set [resources] slots = 1 in the study")
    return Finding(name="Machine", status=OK, found=found)


# ── home ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def data_sets(home: Home) -> list[Finding]:
    """Each data set's manifest, and whether its files are there; `data verify` reads them whole."""
    names = datasets.names(home)
    if not names:
        remedy = f"caddie data prepare --corpus {datasets.PYDOC} --out {datasets.PYDOC}, or caddie demo"
        return [Finding(name="Data", status=WARN, found="no data set yet", remedy=remedy)]
    return [data_set(home, name) for name in names]


def data_set(home: Home, name: str) -> Finding:
    place, root = f"Data {name}", home.dataset(name)
    try:
        found = datasets.find(home, name)
    except CaddieError as error:
        return Finding(name=place, status=WARN, found=str(error), remedy=error.hint or f"caddie data verify {name}")
    problem = datasets.damage(found)
    if problem is not None:
        return Finding(name=place, status=WARN, found=problem, remedy=f"move {root} away and run caddie data prepare")
    tokens = sum(split.tokens for split in found.manifest.splits.values())
    return Finding(name=place, status=OK, found=f"{tokens:,} tokens, vocabulary {found.vocab_size:,}")


def mlflow_database(home: Home) -> Finding:
    """MLflow's database can be read, or its server; it is a view, so its loss costs nothing."""
    try:
        server = tracking_server.address()
    except CaddieError as error:
        return Finding(name="MLflow", status=WARN, found=str(error), remedy=error.hint or "")
    if server:
        problem = tracking_server.problem()
        status, remedy = (WARN, f"start it, or {tracking_server.SIGN_IN}") if problem else (OK, "")
        return Finding(name="MLflow", status=status, found=f"{server}: {problem or 'lets us in'}", remedy=remedy)
    path = home.mlflow_database
    if not path.exists():
        return Finding(name="MLflow", status=OK, found="no database yet; the first study makes it")
    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            [check] = connection.execute("PRAGMA quick_check(1)").fetchone()
            [runs] = connection.execute("SELECT count(*) FROM runs").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return Finding(name="MLflow", status=WARN, found=f"{path}: {error}", remedy="caddie track --rebuild")
    if check != "ok":
        return Finding(name="MLflow", status=WARN, found=f"{path}: {check}", remedy="caddie track --rebuild")
    return Finding(name="MLflow", status=OK, found=f"{runs:,} runs in {path}")


def studies(home: Home) -> list[Finding]:
    """Studies whose controller is at work, and those that were left in the middle."""
    return [finding for name in home.study_names() if (finding := study(home, name)) is not None]


def study(home: Home, name: str) -> Finding | None:
    """None for a study that is closed and whole."""
    files = home.study(name)
    try:
        state = Ledger(files.ledger).state()
    except CaddieError as error:
        return Finding(
            name=f"Study {name}", status=WARN, found=str(error), remedy=error.hint or f"look at {files.ledger}"
        )
    holder = lock.holder(files)
    if holder is not None:
        return Finding(name=f"Study {name}", status=OK, found=f"{holder} works on it")
    if state.closed is None:
        return Finding(
            name=f"Study {name}",
            status=WARN,
            found="left in the middle",
            remedy="the command that started it continues it",
        )
    return None
