"""The machine that a run runs on: versions, processors, GPUs, and what of its environment may be shown."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator import compile_cache
from trainer.errors import ConfigError

DESCRIBE_SECONDS = 120.0  # for an interpreter to say what it has; from a network file system the first start is slow
PACKAGES = ("torch", "numpy", "sentencepiece", "brotli", "constriction", "triton")
THREADS = "OMP_NUM_THREADS"
# Named one by one: an environment holds secrets, and env.json is published with a record.
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES", THREADS, "PYTHONHASHSEED", "NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE",
    *compile_cache.VARIABLES, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG",
    "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT",
)  # fmt: skip
_DESCRIBE = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps([platform.python_version(), found]))
"""


def cores() -> int:
    """Cores that this process may use; of a machine that does not say, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run runs on."""

    host: str
    platform: str
    python: str
    processors: int | None
    packages: dict[str, str]
    gpus: Sequence[str]

    @property
    def device(self) -> str:
        """The first GPU's name, or cpu."""
        return self.gpus[0].partition(",")[0] if self.gpus else "cpu"


def describe_machine(gpus: str, python: str = "") -> Machine:
    """This machine, with the GPUs that are visible to the run and what its interpreter has; empty for this one."""
    version, packages = _described(python) if python else (platform.python_version(), installed_packages())
    return Machine(
        host=platform.node(), platform=platform.platform(), python=version, processors=os.cpu_count(),
        packages=packages, gpus=_gpu_names(gpus),
    )  # fmt: skip


def _described(python: str) -> tuple[str, dict[str, str]]:
    """Version and packages of another interpreter; raises ConfigError where it cannot be started."""
    command = [python, "-c", _DESCRIBE, *PACKAGES]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=DESCRIBE_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"[resources] python: {error}", hint="name an interpreter that every node has, with torch installed"
        ) from error
    version, packages = json.loads(asked.stdout.splitlines()[-1])
    return version, packages


def installed_packages() -> dict[str, str]:
    """Versions of what a run needs, by name."""
    return {name: version for name in PACKAGES if (version := _installed(name))}


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
