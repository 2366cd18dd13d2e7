"""The fault harness: many short trials while everything they stand on is killed at random, and an account of what came.

    python tests/cluster/faults.py slurm --trials 1000 --every 4     on an emulated cluster of four nodes
    python tests/cluster/faults.py local --trials 1000 --every 4     on this machine alone
    python tests/cluster/faults.py local --trials 40 --only fill_disk    with one kind of fault

The trainer is the tests' fake one, which lasts a second. Controllers are processes of their own and started again as soon
as they end. Faults come in an order that the seed decides, at moments that it does not.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "orchestrator")]

from orchestrator.claims import Claim, is_live, read_claim  # noqa: E402
from orchestrator.errors import CaddieError  # noqa: E402
from orchestrator.home import Home  # noqa: E402
from orchestrator.job_names import JobNames  # noqa: E402
from orchestrator.launcher import LocalLauncher  # noqa: E402
from orchestrator.ledger import ENDED, Attempt, Ledger, StudyState  # noqa: E402
from orchestrator.processes import TRAINER_TAG, signal_tagged, trainer_tag  # noqa: E402
from orchestrator.slots import Slots  # noqa: E402
from orchestrator.slurm_launcher import SlurmLauncher  # noqa: E402
from orchestrator.study import Study  # noqa: E402
from tests.cluster.emulated import Cluster, missing  # noqa: E402
from tests.orchestrator.fakes import FakeSearch, Listener, tiny_study, write_plans  # noqa: E402
from tests.orchestrator.make_controller import controller  # noqa: E402
from trainer import protocol  # noqa: E402
from trainer.protocol import AttemptDir  # noqa: E402

TRIAL_SECONDS = 1.0
DOWN_SECONDS = 6.0  # for which a daemon stays away; a node's must be away for longer than Slurm waits for it
NODE_SECONDS = 20.0
FULL_SECONDS = 3.0
SUSPENDED_SECONDS = (5.0, 40.0)
DISK_BYTES = 2**29
CONTROLLER_PAUSE = 0.5
CALM_FROM = 0.6  # part of the limit after which nothing more is killed
UNEXPECTED = 1  # exit code of a Python program that an error of no known kind has ended
LOG_CHARACTERS = 4000
MOST_EXITS = 50  # of controllers, with no run complete between them: it is no fault of ours then
MOST_IDLE_FAULTS = 2  # with no run complete between them: on a slow machine controllers would only ever start

LYING_SBATCH = """#!/bin/sh
# One submission in {one_in} is made and denied, another is neither made nor answered.
case $(od -An -N1 -tu1 /dev/urandom | awk '{{print $1 % {one_in}}}') in
0) {sbatch} "$@" >/dev/null; echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1;;
1) echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)' >&2; exit 1;;
*) exec {sbatch} "$@";;
esac
"""


def study_of(kind: str, trials: int, slots: int) -> Study:
    resources = "timeout_minutes = 5"
    if kind == "slurm":
        resources += '\nlauncher = "slurm"\ngpus_per_run = 1'
    return tiny_study(trials=trials, slots=slots, confirm=None, resources=resources)


def point_of(number: int, trials: int) -> dict[str, Any]:
    """A point of its own for each trial, all of them within the space."""
    return {"optim.muon_weight_decay": 0.01 + 0.29 * number / trials, "ttt.lr": 0.001}


class Notes(Listener):
    """Keeps what people are told in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def note(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{time.time():.2f} {text}\n")


def control(kind: str, home: Home, trials: int, slots: int) -> None:
    """A controller, until the study is finished."""
    study = study_of(kind, trials, slots)
    launcher = (
        SlurmLauncher(study.resources, JobNames.of_study(study.name, home.root)) if kind == "slurm" else LocalLauncher()
    )
    search = FakeSearch(point=lambda number: point_of(number, trials))
    controller(
        study, home, launcher=launcher, search=search, slots=Slots(((),) * slots), listener=Notes(home.root / "notes.txt"),
        poll_seconds=0.2,
    ).run()  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the harness


@dataclass
class Fault:
    what: str
    seconds: float
    """Unix time."""

    victims: list[tuple[str, int]] = field(default_factory=list)
    """Attempts that were killed by it, by run and number."""


@dataclass
class Harness:
    kind: str
    home: Home
    trials: int
    slots: int
    cluster: Cluster | None
    dice: random.Random
    only: str = ""
    """The one kind of fault that there is; empty for all."""

    faults: list[Fault] = field(default_factory=list)
    cpu_seconds: float = 0.0
    exits: Counter[int] = field(default_factory=Counter)
    _controller: subprocess.Popen[bytes] | None = None
    _due: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    """What comes back, and when; monotonic."""

    _suspended: set[str] = field(default_factory=set)
    """Jobs that were, by id."""

    _complete: int = 0
    """Attempts that had come to their end when it was last looked."""

    _idle_faults: int = 0
    _idle_exits: int = 0
    """Since that number grew."""

    def run(self, every: float, until: float) -> None:
        """Work until the study is finished, with a fault every so many seconds, but for the last part of the time."""
        kinds = self._kinds()
        next_fault = time.monotonic() + every
        ends, calm = time.monotonic() + until, time.monotonic() + CALM_FROM * until
        self._start()
        while time.monotonic() < ends:
            time.sleep(0.1)
            if self._reap() == 0:
                break
            for due in [due for due in self._due if time.monotonic() >= due[0]]:
                self._due.remove(due)
                due[1]()
            if every and next_fault <= time.monotonic() < calm and self._has_moved():
                next_fault = time.monotonic() + every * self.dice.uniform(0.5, 1.5)
                fault = self.dice.choice(kinds)()
                self.faults += [fault] if fault else []
                self._idle_faults += fault is not None
        for _, come_back in self._due:
            come_back()
        if self._controller is not None and self._controller.returncode is None:
            self._controller.kill()
            self._controller.wait()

    def _has_moved(self) -> bool:
        """Whether a run has come to its end lately, for all that was done to it."""
        ledger = self.home.study("tiny").ledger
        ends = (
            (record for _, record in protocol.read_lines(ledger) if record["kind"] == ENDED) if ledger.exists() else ()
        )
        complete = sum(record["status"] == protocol.COMPLETE for record in ends)
        if complete > self._complete:
            self._complete, self._idle_faults, self._idle_exits = complete, 0, 0
        return self._idle_faults < MOST_IDLE_FAULTS

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._controller = subprocess.Popen(
                [sys.executable, __file__, "control", self.kind, str(self.home.root), str(self.trials), str(self.slots)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    @property
    def _log(self) -> Path:  # not on the disk that is filled
        return self.home.root.with_name("controller.log")

    def _reap(self) -> int | None:
        """The exit code of a controller that ended of itself; one that did not finish is started again."""
        assert self._controller is not None
        pid, status, usage = os.wait4(self._controller.pid, os.WNOHANG)
        if not pid:
            return None
        self._controller.returncode = code = os.waitstatus_to_exitcode(status)
        self.exits[code] += 1
        self._idle_exits += 1
        self.cpu_seconds += usage.ru_utime + usage.ru_stime
        if code == UNEXPECTED or (code > 0 and self._idle_exits > MOST_EXITS):
            raise RuntimeError(f"controllers end with {code}:\n{self._log.read_text()[-LOG_CHARACTERS:]}")
        if code:
            time.sleep(CONTROLLER_PAUSE)
            self._start()
        return code

    # ------------------------------------------------------------------------------------------------ faults

    def _kinds(self) -> list[Callable[[], Fault | None]]:
        common: list[Callable[[], Fault | None]] = [
            self._kill_controller, self._kill_worker, self._kill_trainer, self._fill_disk,
        ]  # fmt: skip
        of_cluster: list[Callable[[], Fault | None]] = [
            self._crash_node, self._kill_slurmd, self._kill_slurmctld, self._kill_slurmdbd, self._scancel, self._requeue,
            self._pre_empt, self._suspend, self._scancel, self._requeue,
        ]  # fmt: skip
        kinds = common + (of_cluster if self.cluster else [])
        chosen = [kind for kind in kinds if self.only in ("", kind.__name__.lstrip("_"))]
        if not chosen:
            names = sorted({kind.__name__.lstrip("_") for kind in kinds})
            raise SystemExit(f"--only {self.only}: no such fault; there are {', '.join(names)}")
        return chosen

    def _live(self) -> list[tuple[AttemptDir, Claim]]:
        """Attempts at work, as their claims say."""
        found = []
        for claim_file in self.home.runs.glob(f"*/attempts/*/{AttemptDir(Path()).claim.name}"):
            files = AttemptDir(claim_file.parent)
            claim = read_claim(files)
            if claim is not None and not files.result.exists() and is_live(claim):
                found.append((files, claim))
        return found

    def _one(self) -> tuple[AttemptDir, Claim] | None:
        live = self._live()
        return self.dice.choice(live) if live else None

    def _fault(self, what: str, *victims: AttemptDir) -> Fault:
        return Fault(what, time.time(), [(files.root.parent.parent.name, files.number) for files in victims])

    def _kill_controller(self) -> Fault:
        assert self._controller is not None
        self._controller.kill()
        return self._fault("controller killed")

    def _kill_worker(self) -> Fault | None:
        one = self._one()
        if one is None:
            return None
        _kill(one[1].pid)
        return self._fault("worker killed", one[0])

    def _kill_trainer(self) -> Fault | None:
        one = self._one()
        if one is None:
            return None
        signal_tagged(TRAINER_TAG, trainer_tag(one[0]), signal.SIGKILL)
        return self._fault("trainer killed", one[0])

    def _crash_node(self) -> Fault:
        cluster = self._cluster()
        node = self.dice.choice(cluster.node_names)
        victims = [files for files, claim in self._live() if claim.node == node]
        cluster.crash(node)
        self._later(NODE_SECONDS, lambda: self._revive(f"slurmd.{node}"))
        return self._fault("node crashed", *victims)

    def _kill_slurmd(self) -> Fault:
        node = self.dice.choice(self._cluster().node_names)
        self._cluster().kill(f"slurmd.{node}")
        self._later(DOWN_SECONDS, lambda: self._revive(f"slurmd.{node}"))
        return self._fault("slurmd killed")

    def _kill_slurmctld(self) -> Fault:
        self._cluster().kill("slurmctld")
        self._later(DOWN_SECONDS, lambda: self._revive("slurmctld"))
        return self._fault("slurmctld killed")

    def _kill_slurmdbd(self) -> Fault:
        self._cluster().kill("slurmdbd")
        self._later(DOWN_SECONDS, lambda: self._revive("slurmdbd"))
        return self._fault("slurmdbd killed")

    def _scancel(self) -> Fault | None:
        one = self._one()
        if one is None:
            return None
        self._cluster().ask("scancel", one[1].job, check=False)
        return self._fault("scancel", one[0])

    def _requeue(self) -> Fault | None:
        one = self._one()
        if one is None:
            return None
        self._cluster().ask("scontrol", "update", f"jobid={one[1].job}", "requeue=1", check=False)
        self._cluster().ask("scontrol", "requeue", one[1].job, check=False)
        return self._fault("requeued", one[0])

    def _pre_empt(self) -> Fault | None:
        """As a pre-emption begins: the signal that a job gets then."""
        one = self._one()
        if one is None:
            return None
        self._cluster().ask("scancel", "--signal=USR2", one[1].job, check=False)
        return self._fault("noticed", one[0])

    def _suspend(self) -> Fault | None:
        """Stop a job where it stands; it may go on before anybody misses it, or after another attempt has replaced it."""
        live = [(files, claim.job) for files, claim in self._live() if claim.job not in self._suspended]
        if not live:
            return None
        files, job = self.dice.choice(live)
        self._suspended.add(job)
        self._cluster().ask("scontrol", "suspend", job, check=False)
        self._later(
            self.dice.choice(SUSPENDED_SECONDS), lambda: self._cluster().ask("scontrol", "resume", job, check=False)
        )
        return self._fault("suspended", files)

    def _fill_disk(self) -> Fault | None:
        """Leave no room where runs and ledger lie, for a while; only where they lie on a disk of their own."""
        if not self.home.root.is_mount():
            return None
        filler = self.home.root / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**20))
        self._later(FULL_SECONDS, lambda: filler.unlink(missing_ok=True))
        return self._fault("disk full")

    def _cluster(self) -> Cluster:
        assert self.cluster is not None
        return self.cluster

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + seconds, act))

    def _revive(self, daemon: str) -> None:
        self._cluster().revive(daemon)
        for name in self._cluster().node_names:  # after some deaths Slurm keeps a node out of service until people look
            self._cluster().ask("scontrol", "update", f"nodename={name}", "state=resume", check=False)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


# ---------------------------------------------------------------------------------------------------- the account


def account(harness: Harness, wall_seconds: float) -> dict[str, Any]:
    """What came of it."""
    state = Ledger(harness.home.study("tiny").ledger).state()
    files = {key: harness.home.run(key[0]).attempt(key[1]) for key in state.attempts}
    told = Counter(trial.state for trial in state.trials.values())
    idle = idle_seconds(state, files)
    recovered = recover_seconds(harness.faults, state, files)
    return {
        "kind": harness.kind, "trials": harness.trials, "slots": harness.slots, "wall_seconds": round(wall_seconds, 1),
        "faults": dict(Counter(fault.what for fault in harness.faults)), "attempts": len(state.attempts),
        "lost": harness.trials - sum(told[name] for name in ("complete", "failed", "pruned")),
        "wrongly_failed": told["failed"] + told["pruned"], "why": why_failed(state, files),
        "duplicated": duplicated(state, files), "two_live_copies": overlapping(state, files),
        "failures": dict(Counter(attempt.failure for attempt in state.attempts.values() if attempt.failure)),
        "excluded": state.excluded_nodes,
        "recover_seconds": quantiles(recovered), "idle_seconds": quantiles(idle),
        "controllers": dict(harness.exits), "controller_cpu_share": round(harness.cpu_seconds / wall_seconds, 3),
        "controller_cpu_seconds_per_trial": round(harness.cpu_seconds / harness.trials, 4),
    }  # fmt: skip


Files = dict[tuple[str, int], AttemptDir]


def why_failed(state: StudyState, files: Files) -> dict[str, list[str]]:
    """What each attempt of a trial that was called a failure came to, by run."""
    runs = [
        run_id
        for trial in state.trials.values()
        if trial.state in ("failed", "pruned")
        for run_id in trial.runs.values()
    ]
    return {
        run_id: [_ending(attempt, files[run_id, attempt.number]) for attempt in state.attempts_of(run_id)]
        for run_id in runs
    }


def _ending(attempt: Attempt, files: AttemptDir) -> str:
    try:
        failure = protocol.read_result(files.result).failure
    except (CaddieError, OSError) as error:
        return f"{attempt.status} {attempt.failure}: {error}"
    return f"{attempt.status} {attempt.failure}" + (f": {failure.message} ({failure.log})" if failure else "")


def began(files: AttemptDir) -> float | None:
    claim = read_claim(files)
    return claim.began if claim is not None else None


def idle_seconds(state: StudyState, files: Files) -> list[float]:
    """From each complete result to the beginning of the next attempt that was given the same slot."""
    by_slot: dict[int, list[Attempt]] = {}
    for attempt in state.attempts.values():
        by_slot.setdefault(attempt.resources["slot"], []).append(attempt)
    found = []
    for attempts in by_slot.values():
        for one, next_one in itertools.pairwise(attempts):
            begin = began(files[next_one.run_id, next_one.number])
            if one.status == protocol.COMPLETE and begin is not None:
                found.append(begin - files[one.run_id, one.number].result.stat().st_mtime)
    return found


def recover_seconds(faults: Iterable[Fault], state: StudyState, files: Files) -> list[float]:
    """From each fault that ended an attempt to the beginning of the run's next one."""
    found = []
    for fault in faults:
        for run_id, number in fault.victims:
            ended = state.attempts.get((run_id, number))
            begin = began(files[run_id, number + 1]) if (run_id, number + 1) in files else None
            if ended is not None and ended.failure is not None and begin is not None:
                found.append(begin - fault.seconds)
    return found


def duplicated(state: StudyState, files: Files) -> int:
    """Runs with two complete attempts, and attempts that began twice."""
    complete = Counter(a.run_id for a in state.attempts.values() if a.status == protocol.COMPLETE)
    begun = [
        sum(event["kind"] == protocol.START for _, event in protocol.read_lines(attempt.events))
        for attempt in files.values()
    ]
    return sum(count > 1 for count in complete.values()) + sum(count > 1 for count in begun)


def overlapping(state: StudyState, files: Files) -> int:
    """Attempts whose trainer still wrote when the run's next one had begun."""
    found = 0
    for run_id, number in files:
        begin = began(files[run_id, number + 1]) if (run_id, number + 1) in files else None
        events = files[run_id, number].events
        if begin is not None and events.exists() and events.stat().st_mtime > begin:
            found += 1
    return found


def quantiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"count": len(values)}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"count": len(values), "p50": round(cuts[49], 2), "p99": round(cuts[98], 2), "max": round(max(values), 2)}


def main() -> int:
    if sys.argv[1:2] == ["control"]:
        kind, home, trials, slots = sys.argv[2:]
        try:
            control(kind, Home(Path(home)), int(trials), int(slots))
        except CaddieError as error:
            print(f"{time.time():.2f} {error}", file=sys.stderr)
            return error.exit_code
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("slurm", "local"))
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--every", type=float, default=4.0, help="mean seconds between two faults; 0 for none")
    parser.add_argument("--only", default="", metavar="KIND", help="one kind of fault, as fill_disk; default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=7200.0, help="seconds after which it is given up")
    parser.add_argument("--keep", action="store_true", help="leave the folder for a look; the disk is never full")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir="/tmp"))
    cluster = Cluster(folder / "c") if options.kind == "slurm" else None
    if cluster is not None and (reason := missing()):
        print(reason, file=sys.stderr)
        return 1
    home = Home(folder / "home")
    home.root.mkdir()
    if options.keep:
        print(folder, file=sys.stderr)
        return work(options, folder, home, cluster)
    try:
        with _disk_of_its_own(home.root):
            return work(options, folder, home, cluster)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def work(options: argparse.Namespace, folder: Path, home: Home, cluster: Cluster | None) -> int:
    """Run a study under faults and print the account."""
    write_plans(home, {"*": {"step_seconds": TRIAL_SECONDS / 4}})
    try:
        if cluster is not None:
            cluster.start()
            _lie(cluster, folder, enabled=bool(options.every))
        harness = Harness(
            options.kind, home, options.trials, options.slots, cluster, random.Random(options.seed), options.only
        )
        started = time.monotonic()
        harness.run(options.every, options.limit)
        print(json.dumps(account(harness, time.monotonic() - started), indent=1))
    finally:
        if cluster is not None:
            cluster.stop()
    return 0


@contextlib.contextmanager
def _disk_of_its_own(folder: Path) -> Iterator[None]:
    """Within the block the folder is a small file system in memory, where this machine lets us make one."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    is_mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


def _lie(cluster: Cluster, folder: Path, *, enabled: bool) -> None:
    """Put the cluster's programs on the path, before them an sbatch that sometimes lies."""
    os.environ.update({name: cluster.environment[name] for name in ("PATH", "SLURM_CONF", "LC_ALL")})
    real = shutil.which("sbatch")
    if enabled and real:
        liar = folder / "bin" / "sbatch"
        liar.parent.mkdir()
        liar.write_text(LYING_SBATCH.format(sbatch=real, one_in=40))
        liar.chmod(0o755)
        os.environ["PATH"] = f"{liar.parent}{os.pathsep}{os.environ['PATH']}"


if __name__ == "__main__":
    sys.exit(main())
