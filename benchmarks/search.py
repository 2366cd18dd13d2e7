"""What a search finds for its GPU-hours, and what its decisions cost: the real controller on a simulated cluster.

    python -m benchmarks.search policies [--repetitions 20] [--families bowl,valley,ripple] [--policies random,tpe,...]
    python -m benchmarks.search scale [--trials 100,1000,10000] [--nodes 1000] [--sampler tpe]

`policies` spends the same number of trials by each policy on the same landscapes and prints, at the same GPU-hours, how far the
best trial (by its score with noise) truly is from the best there is. `scale` prints seconds of processor time a decision,
memory, and the seconds until a restarted controller knows all.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.simulation import Clock, Cluster, Landscape, Silence
from orchestrator.home import Home
from orchestrator.ledger import Trial
from orchestrator.search import Search
from orchestrator.slots import Slots
from orchestrator.statistics import summarize
from orchestrator.study import Study, parse_study
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
HALVING = '[stop_early]\nrule = "halving"\nat_fracs = [0.1, 0.3]\nreduction = 3\nstartup_trials = 4\n'
MEDIAN = '[stop_early]\nrule = "median"\nat_fracs = [0.3]\nstartup_trials = 4\n'
POLICIES = {  # sampler, and what stops a trial early
    "random": ("random", ""),
    "tpe": ("tpe", ""),
    "gp": ("gp", ""),
    "tpe + median": ("tpe", MEDIAN),
    "tpe + halving": ("tpe", HALVING),
}
MARKS = (25, 50, 100, 150)  # GPU-hours
POLL_SECONDS = 10.0  # simulated, between two turns of the controller
BUNDLE = b"simulated"
GPUS = 8


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

    ask_seconds: list[float] = field(default_factory=list)
    idle_seconds: list[float] = field(default_factory=list)
    processor_seconds: float = 0.0
    rebuild_seconds: float = 0.0

    def at(self, gpu_hours: float) -> float | None:
        """The best so far when so much was spent; None before anything was told."""
        place = bisect.bisect_right(self.gpu_hours, gpu_hours) - 1
        return self.excess[place] if place >= 0 else None


class WatchedSearch(Search):
    """The real search, which notes how long it thinks and how good its best is."""

    def watch(self, trace: Trace, cluster: Cluster) -> WatchedSearch:
        self.trace, self.cluster = trace, cluster
        return self

    def ask(self, number: int) -> dict[str, object]:
        started = time.perf_counter()
        params = super().ask(number)
        self.trace.ask_seconds.append(time.perf_counter() - started)
        return params

    def tell(self, trial: Trial) -> None:
        super().tell(trial)
        done = [t for t in self.trials.values() if t.value is not None and t.is_feasible]
        if done:
            best = min(done, key=lambda t: (t.value or 0.0, t.number))
            self.trace.gpu_hours.append(self.cluster.gpu_seconds / 3600)
            self.trace.excess.append(self.cluster.landscape.excess(best.params))


def controller(study: Study, home: Home, cluster: Cluster, trace: Trace, poll_seconds: float) -> Controller:
    silence = Silence()
    return Controller(
        study, home, launcher=cluster, search=WatchedSearch(study, home.study(study.name).optuna_journal).watch(trace, cluster),
        pack=lambda _: BUNDLE, code={}, data_dir=home.root, manifest_sha256=hashlib.sha256(b"none").hexdigest(),
        progress=silence, mirror=silence, slots=Slots(((),) * study.resources.slots), poll_seconds=poll_seconds,
    )  # fmt: skip


def simulate(
    study: Study, landscape: Landscape, *, poll_seconds: float = POLL_SECONDS, rebuilds: bool = False
) -> Trace:
    """Run a study to its end under a clock that jumps."""
    clock, trace = Clock(), Trace()
    cluster = Cluster(clock, landscape, gpus=GPUS)
    with tempfile.TemporaryDirectory(prefix="caddie-simulation-") as folder:
        home = Home(Path(folder))
        started = time.process_time()
        with clock.installed():
            controller(study, home, cluster, trace, poll_seconds).run()
        trace.processor_seconds = time.process_time() - started
        trace.idle_seconds = cluster.idle_seconds
        if rebuilds:
            again = time.perf_counter()
            controller(study, home, cluster, Trace(), poll_seconds).run()  # finds that all is done
            trace.rebuild_seconds = time.perf_counter() - again
    return trace


def policies(repetitions: int, families: list[str], names: list[str], trials: int, slots: int) -> Iterator[str]:
    """Each policy on the same landscapes."""
    yield f"{trials} trials of {GPUS} GPUs on {slots} slots, {repetitions} landscapes of each family; mean excess and its 95 % interval, mBPB.\n"
    columns = " | ".join(f"{mark} GPU-hours" for mark in MARKS)
    yield f"| family | policy | {columns} | all trials | GPU-hours in all | processor s |\n|{'---|' * (len(MARKS) + 5)}"
    for family in families:
        for name in names:
            sampler, extra = POLICIES[name]
            study = study_of("simulated", sampler=sampler, trials=trials, slots=slots, extra=extra)
            traces = [
                simulate(study, Landscape(seed=seed, bounds=BOUNDS, family=family)) for seed in range(repetitions)
            ]
            cells = [_cell([trace.at(mark) for trace in traces]) for mark in MARKS]
            final = _cell([trace.excess[-1] for trace in traces])
            hours = statistics.fmean(trace.gpu_hours[-1] for trace in traces)
            seconds = statistics.fmean(trace.processor_seconds for trace in traces)
            yield f"| {family} | {name} | {' | '.join(cells)} | {final} | {hours:.0f} | {seconds:.1f} |"


def _cell(values: list[float | None]) -> str:
    known = [1e3 * value for value in values if value is not None]
    if len(known) < max(2, len(values)):
        return "–"
    found = summarize(known)
    return f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"


def scale(sizes: list[int], nodes: int, sampler: str) -> Iterator[str]:
    """What decisions cost as a study grows."""
    yield (
        "| trials | nodes | processor s | ms a trial | ask, median ms | ask, last tenth, median ms | idle slot p50, p99, simulated s "
        "| restart s | memory, MiB |\n|---|---|---|---|---|---|---|---|---|"
    )
    for size in sizes:
        study = study_of("scale", sampler=sampler, trials=size, slots=min(nodes, size))
        trace = simulate(study, Landscape(seed=1, bounds=BOUNDS), rebuilds=True)
        asks, idle = [1e3 * s for s in trace.ask_seconds], sorted(trace.idle_seconds) or [0.0]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        yield (
            f"| {size:,} | {min(nodes, size):,} | {trace.processor_seconds:.1f} | {1e3 * trace.processor_seconds / size:.1f} "
            f"| {statistics.median(asks):.1f} | {statistics.median(asks[-max(1, size // 10) :]):.1f} "
            f"| {idle[len(idle) // 2]:.0f}, {idle[int(0.99 * (len(idle) - 1))]:.0f} | {trace.rebuild_seconds:.2f} | {memory:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("policies", "scale"))
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--families", default="bowl,valley,ripple")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--trials", default="")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--sampler", default="tpe")
    options = parser.parse_args()
    if options.what == "policies":
        lines = policies(
            options.repetitions,
            options.families.split(","),
            options.policies.split(","),
            int(options.trials or 60),
            options.slots,
        )
    else:
        lines = scale(
            [int(size) for size in (options.trials or "100,1000,10000").split(",")], options.nodes, options.sampler
        )
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
