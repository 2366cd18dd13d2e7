"""Makespan and idle slots beside Hydra's Optuna sweeper with its submitit launcher, on the same sleeping objective, in one run.

    python -m venv /tmp/hydra && /tmp/hydra/bin/pip install hydra-core hydra-submitit-launcher hydra-optuna-sweeper
    python tests/cluster/hydra.py local|slurm --python /tmp/hydra/bin/python [--trials 32] [--slots 8] [--repetitions 3]

Trial n sleeps as long under both; how long, follows a log-normal distribution whose median and spread are given. A slot is
idle from the end of an objective to the beginning of the next one in the same slot, whatever goes on in between.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "orchestrator")]

from orchestrator.home import Home  # noqa: E402
from orchestrator.job_names import JobNames  # noqa: E402
from orchestrator.launcher import LocalLauncher  # noqa: E402
from orchestrator.runs import RunStore  # noqa: E402
from orchestrator.search import Search  # noqa: E402
from orchestrator.slots import Slots  # noqa: E402
from orchestrator.slurm_launcher import SlurmLauncher  # noqa: E402
from orchestrator.study import Study  # noqa: E402
from tests.cluster.emulated import Cluster, missing  # noqa: E402
from tests.orchestrator.fakes import tiny_study, write_plans  # noqa: E402
from tests.orchestrator.make_controller import controller  # noqa: E402

LOCAL, SLURM = "local", "slurm"
STARTED = "trainer.pid"  # which the tests' fake trainer writes when it begins
SPREAD = 0.6  # standard deviation of the logarithm of a trial's seconds
OBJECTIVE = """import json, os, time
import hydra
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base=None, config_path=".", config_name="config")
def main(config):
    number, began = HydraConfig.get().job.num, time.time()
    time.sleep(SECONDS[number])
    with open(os.path.join(DONE, f"{number}.json"), "w") as file:
        json.dump([began, time.time()], file)
    return (config.decay - 0.05) ** 2 + (config.rate - 0.01) ** 2

if __name__ == "__main__":
    main()
"""


@dataclass(frozen=True)
class Went:
    """How a sweep went."""

    makespan: float
    """Seconds from the command to its end."""

    idle: tuple[float, ...]
    """Seconds for which slots waited between two objectives."""

    busy: float
    """Share of slots times makespan in which an objective ran."""


def went(spans: list[tuple[float, float]], slots: int, makespan: float) -> Went:
    """From the objectives' beginnings and ends; each that begins takes the slot that has been free for longest."""
    free: list[float] = []
    idle = []
    for began, ended in sorted(spans):
        if len(free) == slots:
            idle.append(max(0.0, began - heapq.heappop(free)))
        heapq.heappush(free, ended)
    return Went(makespan, tuple(idle), sum(ended - began for began, ended in spans) / (slots * makespan))


def ours(kind: str, folder: Path, seconds: Mapping[int, float], slots: int) -> Went:
    """The real controller, search, launcher and worker; only the trainer sleeps."""
    home = Home(folder / "home")
    write_plans(home, {"*": {"seconds_by_trial": {str(number): value for number, value in seconds.items()}}})
    study = study_of(kind, len(seconds), slots)
    launcher = (
        SlurmLauncher(study.resources, JobNames.of_study(study.name, home.root)) if kind == SLURM else LocalLauncher()
    )
    began = time.time()
    controller(
        study, home, launcher=launcher, search=Search(study, home.study(study.name).optuna_journal),
        slots=Slots(((),) * slots), poll_seconds=0.2,
    ).run()  # fmt: skip
    makespan = time.time() - began
    attempts = [attempt for run_id in RunStore(home).ids() for attempt in home.run(run_id).attempts()]
    spans = [((files.root / STARTED).stat().st_mtime, files.result.stat().st_mtime) for files in attempts]
    return went(spans, slots, makespan)


def study_of(kind: str, trials: int, slots: int) -> Study:
    resources = "timeout_minutes = 5" + ('\nlauncher = "slurm"\ngpus_per_run = 1' if kind == SLURM else "")
    return tiny_study(trials=trials, slots=slots, confirm=None, resources=resources)


def theirs(kind: str, folder: Path, seconds: Mapping[int, float], slots: int, python: str) -> Went:
    """Hydra's sweeper, which asks for as many trials as there are slots, and for more when all have ended."""
    done = folder / "done"
    done.mkdir(parents=True)
    program = OBJECTIVE.replace("SECONDS[", f"{list(seconds.values())}[").replace("DONE", repr(str(done)))
    (folder / "objective.py").write_text(program)
    (folder / "config.yaml").write_text("decay: 0.1\nrate: 0.01\n")
    launcher = [f"hydra/launcher=submitit_{kind}", "hydra.launcher.timeout_min=5"]
    launcher += ["hydra.launcher.gpus_per_node=1", "hydra.launcher.cpus_per_task=1"] if kind == SLURM else []
    command = [
        python, "objective.py", "--multirun", "hydra/sweeper=optuna", *launcher, f"hydra.sweeper.n_trials={len(seconds)}",
        f"hydra.sweeper.n_jobs={slots}", "decay=interval(0.01,0.3)", "rate=interval(0.001,0.05)",
    ]  # fmt: skip
    began = time.time()
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    makespan = time.time() - began
    spans = [tuple(json.loads(path.read_text())) for path in done.iterdir()]
    if ended.returncode or len(spans) != len(seconds):
        raise SystemExit(f"Hydra ended with {ended.returncode} and {len(spans)} trials:\n{ended.stderr[-3000:]}")
    return went(spans, slots, makespan)


@contextlib.contextmanager
def _cluster(kind: str, folder: Path) -> Iterator[None]:
    if kind == LOCAL:
        yield
        return
    if reason := missing():
        raise SystemExit(reason)
    cluster = Cluster(folder)
    try:
        cluster.start()
        os.environ.update({name: cluster.environment[name] for name in ("PATH", "SLURM_CONF")})
        yield
    finally:
        cluster.stop()


def compare(kind: str, python: str, trials: int, slots: int, median: float, repetitions: int) -> Iterator[str]:
    draw = random.Random(1)
    yield f"{trials} trials of {median:g} s (median, log-normal, spread {SPREAD}) on {slots} slots, {kind}, {repetitions} repetitions in turn\n"
    yield (
        "| | seconds, median | of the least possible | idle slot p50, s | p99, s | slots busy |\n|---|---|---|---|---|---|"
    )
    found: dict[str, list[Went]] = {"Caddie": [], "Hydra": []}
    least = []
    with tempfile.TemporaryDirectory(prefix="hydra-", dir="/tmp") as place, _cluster(kind, Path(place) / "cluster"):
        for repetition in range(repetitions):
            seconds = {number: median * draw.lognormvariate(0, SPREAD) for number in range(trials)}
            least.append(max(sum(seconds.values()) / slots, max(seconds.values())))
            for name in ("Caddie", "Hydra") if repetition % 2 else ("Hydra", "Caddie"):
                folder = Path(place) / f"{name}{repetition}"
                result = (
                    ours(kind, folder, seconds, slots)
                    if name == "Caddie"
                    else theirs(kind, folder, seconds, slots, python)
                )
                found[name].append(result)
    for name, all_of_it in found.items():
        idle = sorted(wait for one in all_of_it for wait in one.idle)
        shares = [one.makespan / minimum for one, minimum in zip(all_of_it, least, strict=True)]
        yield (
            f"| {name} | {statistics.median(one.makespan for one in all_of_it):.1f} | {statistics.median(shares):.2f} "
            f"| {idle[len(idle) // 2]:.2f} | {idle[int(0.99 * (len(idle) - 1))]:.2f} | {statistics.median(one.busy for one in all_of_it):.0%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=(LOCAL, SLURM))
    parser.add_argument("--python", required=True, help="of an environment with Hydra")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    for line in compare(
        options.kind, options.python, options.trials, options.slots, options.seconds, options.repetitions
    ):
        print(line, flush=True)


if __name__ == "__main__":
    main()
