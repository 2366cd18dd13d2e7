"""What a search finds for its GPU-hours, and what its decisions cost: the real controller on a simulated cluster.

    python -m benchmarks.search policies [--repetitions 20] [--families bowl,valley,ripple] [--policies random,tpe,...]
    python -m benchmarks.search studies [--repetitions 20] [--families ...] [--policies ...]
    python -m benchmarks.search scale [--trials 100,1000,10000] [--nodes 1000] [--sampler tpe]

`policies` lets each policy search the same landscapes and prints, at the same GPU-hours, how far the best trial (by its score
with noise) truly is from the best there is. `studies` goes on to the confirmation, and prints what is accepted. `scale` prints seconds of processor time a decision,
memory, and the seconds until a restarted controller knows all.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import itertools
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.simulation import EARLY, Clock, Cluster, Landscape, Silence
from orchestrator import ladder
from orchestrator.costs import accepted_improvement
from orchestrator.evidence import gather
from orchestrator.home import Home
from orchestrator.ledger import Trial
from orchestrator.search import Search
from orchestrator.slots import Slots
from orchestrator.statistics import summarize
from orchestrator.study import Study
from orchestrator.study_file import parse_study
from orchestrator.sweep import Controller

BOUNDS = {
    "optim.muon_weight_decay": (0.02, 0.3, True),
    "model.qk_gain": (1.5, 8.0, False),
    "ttt.lr": (0.0005, 0.02, True),
    "optim.matrix_lr": (0.005, 0.06, True),
}
SPACE = "\n".join(
    f'[space."{knob}"]\nlow = {low}\nhigh = {high}\nlog = {str(log).lower()}\n'
    for knob, (low, high, log) in BOUNDS.items()
)
HALVING = '[stop_early]\nrule = "halving"\nat_fracs = [0.3]\nreduction = 3\nstartup_trials = 4\n'
EARLY_HALVING = HALVING.replace("[0.3]", "[0.1, 0.3]")
MEDIAN = '[stop_early]\nrule = "median"\nat_fracs = [0.3]\nstartup_trials = 4\n'
RUNGS = """
[[rungs]]
name = "proxy"
gpus_per_run = 1
[rungs.set]
"limits.train_seconds" = 120
[[rungs]]
name = "longer"
promote = 12
gpus_per_run = 1
[[rungs]]
name = "full"
promote = 4
trials = {full}
"""
FIXED = "[confirm]\nseeds = [42, 314, 999]\n"
RACE = "[confirm]\nseeds = [42, 314, 999, 7, 11, 13]\nsequential = true\n"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How a study searches."""

    sampler: str
    trials: int
    """Of the first rung, where there are several."""

    extra: str = ""
    """Tables of the study's file: what stops a trial early, or the rungs."""


def policies_for(trials: int) -> dict[str, Policy]:
    """Those that are compared, by name; each takes about the GPU-hours of `trials` whole runs, or fewer."""
    return {
        "random": Policy(sampler="random", trials=trials),
        "tpe": Policy(sampler="tpe", trials=trials),
        "gp": Policy(sampler="gp", trials=trials),
        "tpe + median": Policy(sampler="tpe", trials=5 * trials // 4, extra=MEDIAN),
        "tpe + halving": Policy(sampler="tpe", trials=3 * trials // 2, extra=HALVING),
        "tpe + early halving": Policy(sampler="tpe", trials=3 * trials, extra=EARLY_HALVING),
        "ladder": Policy(sampler="tpe", trials=trials, extra=RUNGS.format(full=trials // 2)),
    }


CONFIRMATIONS = {"3 seeds": FIXED, "race": RACE}
MARKS = (25, 50, 100, 150)  # GPU-hours
POLL_SECONDS = 10.0  # simulated, between two turns of the controller
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else ""  # where a simulation of policies keeps its files
BUNDLE = b"simulated"
GPUS, TRAIN_SECONDS = 8, 600.0  # of a whole run


def study_of(name: str, *, sampler: str, trials: int, slots: int, extra: str = "") -> Study:
    return parse_study(
        f'name = "{name}"\nquestion = "What does a policy find?"\npreset = "pr1326"\ndata = "none"\n\n{SPACE}\n'
        f'[search]\ntrials = {trials}\nsampler = "{sampler}"\nstartup_trials = 8\nseeds = [42]\n\n{extra}\n'
        f"[resources]\nslots = {slots}\npreflight = false\n"
    )


@dataclass
class Trace:
    """How a study went."""

    gpu_hours: list[float] = field(default_factory=list)
    excess: list[float] = field(default_factory=list)
    """True distance of the best trial so far from the lowest point, BPB, at those GPU-hours."""

    spent: float = 0.0
    """GPU-seconds of the rungs that have ended."""

    preset_excess: float = 0.0
    verdict: str = ""
    is_accepted: bool = False
    """Whether the confirmation says that the best point is better than the preset."""

    confirmation_hours: float = 0.0
    ask_seconds: list[float] = field(default_factory=list)
    idle_seconds: list[float] = field(default_factory=list)
    processor_seconds: float = 0.0
    rebuild_seconds: float = 0.0

    def at(self, gpu_hours: float) -> float | None:
        """The best so far when so much was spent; None before anything was told."""
        place = bisect.bisect_right(self.gpu_hours, gpu_hours) - 1
        return self.excess[place] if place >= 0 else None

    @property
    def improvement(self) -> float:
        """By how much what the study ends with is truly better than the preset, in bits per byte."""
        return self.preset_excess - self.excess[-1] if self.is_accepted else 0.0


class WatchedSearch(Search):
    """The real search, which notes how long it thinks and how good its best is."""

    def watch(self, trace: Trace, cluster: Cluster) -> WatchedSearch:
        self.trace, self.cluster = trace, cluster
        self.best: Trial | None = None
        return self

    def ask(self, number: int) -> dict[str, object]:
        started = time.perf_counter()
        params = super().ask(number)
        self.trace.ask_seconds.append(time.perf_counter() - started)
        return params

    def tell(self, trial: Trial) -> None:
        super().tell(trial)
        if trial.value is None or not trial.is_feasible:
            return
        if self.best is None or (trial.value, trial.number) < (self.best.value or 0.0, self.best.number):
            self.best = trial
        if trial.number == 0:
            self.trace.preset_excess = self.cluster.landscape.excess(trial.params)
        self.trace.gpu_hours.append((self.trace.spent + self.cluster.gpu_seconds) / 3600)
        self.trace.excess.append(self.cluster.landscape.excess(self.best.params))


def controller(study: Study, home: Home, cluster: Cluster, trace: Trace, poll_seconds: float) -> Controller:
    silence = Silence()
    return Controller(
        study, home, launcher=cluster, search=WatchedSearch(study, home.study(study.name).optuna_journal).watch(trace, cluster),
        pack=lambda _: BUNDLE, code={}, data_dir=home.root, manifest_sha256=hashlib.sha256(b"none").hexdigest(),
        progress=silence, mirror=silence, slots=Slots(((),) * study.resources.slots), poll_seconds=poll_seconds,
    )  # fmt: skip


def cluster_of(rung: Study, clock: Clock, landscape: Landscape) -> Cluster:
    """A rung's cluster: eight places of one GPU for each of eight GPUs."""
    gpus = rung.resources.gpus_per_run or GPUS
    return Cluster(clock, landscape, gpus=gpus, budget=gpus * rung.config.limits.train_seconds / (GPUS * TRAIN_SECONDS))


def simulate(
    study: Study,
    landscape: Landscape,
    *,
    poll_seconds: float = POLL_SECONDS,
    rebuilds: bool = False,
    folder: str = MEMORY,
) -> Trace:
    """Run a study to its end, rung by rung, under a clock that jumps."""
    clock, trace = Clock(), Trace()
    rungs = ladder.rungs_of(study)
    with tempfile.TemporaryDirectory(prefix="caddie-simulation-", dir=folder or None) as place:
        home = Home(Path(place))
        started = time.process_time()
        with clock.installed():
            for number, rung in enumerate(rungs):
                if number:
                    ladder.promote(home, rungs[number - 1], rung)
                cluster = cluster_of(rung, clock, landscape)
                controller(rung, home, cluster, trace, poll_seconds).run()
                trace.spent += cluster.gpu_seconds
        trace.processor_seconds = time.process_time() - started
        trace.idle_seconds = cluster.idle_seconds
        if study.confirm is not None:
            found, trace.verdict = accepted_improvement(home, gather(home, study.name))
            trace.is_accepted = found is not None
            trace.confirmation_hours = trace.spent / 3600 - trace.gpu_hours[-1]
        if rebuilds:
            again = time.perf_counter()
            controller(study, home, cluster, Trace(), poll_seconds).run()  # finds that all is done
            trace.rebuild_seconds = time.perf_counter() - again
    return trace


def traces_of(
    policy: Policy, family: str, repetitions: int, slots: int, early: float, confirmation: str = ""
) -> list[Trace]:
    """A policy on each landscape of a family."""
    text = policy.extra + confirmation
    study = study_of("simulated", sampler=policy.sampler, trials=policy.trials, slots=slots, extra=text)
    places = [Landscape(seed=seed, bounds=BOUNDS, family=family, early=early) for seed in range(repetitions)]
    return [simulate(study, place) for place in places]


def policies(
    repetitions: int, families: list[str], names: list[str], trials: int, slots: int, early: float
) -> Iterator[str]:
    """What each policy has found by the same GPU-hours, on the same landscapes."""
    yield f"{slots} slots, {repetitions} landscapes of each family; mean excess and its 95 % interval, mBPB.\n"
    columns = " | ".join(f"{mark} GPU-hours" for mark in MARKS)
    yield f"| family | policy | {columns} | in the end | GPU-hours in all | processor s |\n|{'---|' * (len(MARKS) + 5)}"
    for family, name in itertools.product(families, names):
        traces = traces_of(policies_for(trials)[name], family, repetitions, slots, early)
        cells = [_cell([trace.at(mark) for trace in traces]) for mark in MARKS]
        final = _cell([trace.excess[-1] for trace in traces])
        hours = statistics.fmean(trace.gpu_hours[-1] for trace in traces)
        seconds = statistics.fmean(trace.processor_seconds for trace in traces)
        yield f"| {family} | {name} | {' | '.join(cells)} | {final} | {hours:.0f} | {seconds:.1f} |"


def studies(
    repetitions: int, families: list[str], names: list[str], trials: int, slots: int, early: float
) -> Iterator[str]:
    """What whole studies end with, search and confirmation: what is accepted, and what that costs."""
    yield f"{slots} slots, {repetitions} landscapes of each family; means and 95 % intervals.\n"
    yield (
        "| family | policy | confirmation | found better | true improvement of what is accepted, mBPB | confirmation, GPU-hours "
        "| GPU-hours in all |\n|---|---|---|---|---|---|---|"
    )
    for family, name, confirmation in itertools.product(families, names, CONFIRMATIONS):
        traces = traces_of(policies_for(trials)[name], family, repetitions, slots, early, CONFIRMATIONS[confirmation])
        accepted = sum(trace.is_accepted for trace in traces)
        hours = [trace.confirmation_hours for trace in traces]
        yield (
            f"| {family} | {name} | {confirmation} | {accepted} of {len(traces)} | {_cell([t.improvement for t in traces])} "
            f"| {_cell([hour / 1e3 for hour in hours], 1)} | {statistics.fmean(t.spent for t in traces) / 3600:.0f} |"
        )


def _cell(values: list[float | None], decimals: int = 2) -> str:
    known = [1e3 * value for value in values if value is not None]
    if len(known) < max(2, len(values)):
        return "–"
    found = summarize(known)
    return f"{found.mean:.{decimals}f} ({found.low:.{decimals}f} to {found.high:.{decimals}f})"


def scale(sizes: list[int], nodes: int, sampler: str) -> Iterator[str]:
    """What decisions cost as a study grows."""
    yield (
        "| trials | nodes | processor s | ms a trial | ask, median ms | ask, last tenth, median ms | idle slot p50, p99, simulated s "
        "| restart s | memory, MiB |\n|---|---|---|---|---|---|---|---|---|"
    )
    for size in sizes:
        study = study_of("scale", sampler=sampler, trials=size, slots=max(1, min(nodes, size // 10)))
        trace = simulate(study, Landscape(seed=1, bounds=BOUNDS), rebuilds=True, folder="")
        asks, idle = [1e3 * s for s in trace.ask_seconds], sorted(trace.idle_seconds) or [0.0]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        yield (
            f"| {size:,} | {study.resources.slots:,} | {trace.processor_seconds:.1f} | {1e3 * trace.processor_seconds / size:.1f} "
            f"| {statistics.median(asks):.1f} | {statistics.median(asks[-max(1, size // 10) :]):.1f} "
            f"| {idle[len(idle) // 2]:.0f}, {idle[int(0.99 * (len(idle) - 1))]:.0f} | {trace.rebuild_seconds:.2f} | {memory:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("policies", "studies", "scale"))
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--families", default="bowl,valley,ripple")
    parser.add_argument("--policies", default="")
    parser.add_argument("--trials", default="")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--early", type=float, default=EARLY, help="correlation of early losses with the last one")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--sampler", default="tpe")
    options = parser.parse_args()
    if options.what == "scale":
        sizes = [int(size) for size in (options.trials or "100,1000,10000").split(",")]
        lines = scale(sizes, options.nodes, options.sampler)
    else:
        trials = int(options.trials or 60)
        names = options.policies.split(",") if options.policies else list(policies_for(trials))
        table = policies if options.what == "policies" else studies
        lines = table(options.repetitions, options.families.split(","), names, trials, options.slots, options.early)
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
