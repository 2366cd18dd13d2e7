"""Fakes at the ports of the controller, and the small study that its tests run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.home import Home
from orchestrator.ledger import StudyState, Trial
from orchestrator.ports import Ending, OpenJob
from orchestrator.slots import JobResources
from orchestrator.study import Study
from orchestrator.study_file import parse_study
from trainer import protocol
from trainer.protocol import AttemptDir, EventLog, Failure, Result, RunDir, Score

REPOSITORY = Path(__file__).resolve().parents[2]
FAKE_BUNDLE = (REPOSITORY / "tests" / "fake_trainer.py").read_text().replace("@REPOSITORY@", str(REPOSITORY)).encode()
MANIFEST = "m" * 64


def study_text(
    *,
    trials: int = 4,
    seeds: str = "[1]",
    slots: int = 2,
    extra: str = "",
    resources: str = "",
    confirm: str | None = "[42, 314]",
    name: str = "tiny",
    settings: str = "",
    high: float = 0.3,
) -> str:
    """A study of two knobs on the smoke preset."""
    confirmation = f"\n[confirm]\nseeds = {confirm}\n" if confirm else ""
    return f"""
name = "{name}"
question = "Which?"
preset = "smoke"
data = "nothing"

[set]
"schedule.steps" = 120
"limits.artifact_bytes" = 500_000
{settings}

[space."optim.muon_weight_decay"]
low = 0.01
high = {high}

[space."ttt.lr"]
low = 0.0005
high = 0.05
log = true

[search]
trials = {trials}
seeds = {seeds}
{confirmation}
[resources]
slots = {slots}
{resources}
{extra}
"""


UNCHECKED = "preflight = false"
"""For a study's [resources]: the data set of the fakes has no files that a node could check."""


def tiny_study(*, resources: str = "", **changes: Any) -> Study:
    return parse_study(study_text(resources=f"{UNCHECKED}\n{resources}", **changes))


@dataclass
class FakeSearch:
    """Proposes points in a row and stops whom it is told to stop."""

    stops: set[int] = field(default_factory=set)
    asked: list[int] = field(default_factory=list)
    told: list[tuple[int, str]] = field(default_factory=list)
    rebuilt: int = 0
    point: Callable[[int], dict[str, Any]] = lambda number: {
        "optim.muon_weight_decay": 0.09 - 0.01 * number, "ttt.lr": 0.002,
    }  # fmt: skip

    def rebuild(self, state: StudyState) -> None:
        self.rebuilt += 1

    def ask(self, number: int) -> dict[str, Any]:
        self.asked.append(number)
        return self.point(number)

    def begin(self, trial: Trial) -> None:
        assert trial.state == "running"

    def should_stop(self, number: int, per_mille: int, loss: float) -> bool:
        return number in self.stops

    def tell(self, trial: Trial) -> None:
        self.told.append((trial.number, trial.state))


Behaviour = Callable[[RunDir, AttemptDir, protocol.Spec], Result | None]


def scored(run: RunDir, attempt: AttemptDir, spec: protocol.Spec, **changes: Any) -> Result:
    """A complete result whose score is best at weight decay 0.05."""
    bpb = changes.pop("bpb", 1.0 + (spec.config["optim"]["muon_weight_decay"] - 0.05) ** 2 + spec.seed * 1e-6)
    score = Score(nats=bpb, tokens=1, bytes=1, loss=bpb, bpb=bpb, seconds=1.0)
    values: dict[str, Any] = {
        "run_id": run.run_id, "attempt": attempt.number, "status": protocol.COMPLETE, "seed": spec.seed,
        "scores": dict.fromkeys(protocol.STAGES, score), "artifact_bytes": 1000, "train_seconds": 1.0,
    }  # fmt: skip
    return Result(**{**values, **changes})


def failed(kind: str, message: str = "it broke", **changes: Any) -> Behaviour:
    """A behaviour that fails in one way."""

    def behave(run: RunDir, attempt: AttemptDir, spec: protocol.Spec) -> Result:
        failure = Failure(kind=kind, message=message, log="some.log\nlast line")
        return scored(run, attempt, spec, status=protocol.FAILED, failure=failure, **{"scores": {}, **changes})

    return behave


@dataclass
class FakeLauncher:
    """Ends each attempt a few polls after its submission, as the behaviour of its (seed, attempt) says."""

    behaviours: dict[Any, Behaviour] = field(default_factory=dict)
    has_queue = False
    polls: int = 2
    submitted: list[tuple[str, int, str]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    alive: dict[str, int] = field(default_factory=dict)
    """Polls that are left to each tag."""

    most_alive: int = 0
    losses: list[tuple[float, float]] = field(default_factory=lambda: [(0.5, 2.0)])
    """(elapsed_frac, loss) that every run logs."""

    def submit(self, run: RunDir, attempt: int, *, tag: str, resources: JobResources) -> str:
        assert tag not in self.alive, "two live copies of one attempt"
        self.submitted.append((run.run_id, attempt, tag))
        self.alive[tag] = self.polls
        self.most_alive = max(self.most_alive, len(self.alive))
        events = EventLog(run.attempt(attempt).events)
        for step, (elapsed_frac, loss) in enumerate(self.losses):
            events.metrics(step, 0.1, train_loss=loss, elapsed_frac=elapsed_frac)
        return f"job-{len(self.submitted)}"

    def is_alive(self, attempt: AttemptDir, *, tag: str | None) -> bool:
        if tag not in self.alive:
            return False
        self.alive[tag] -= 1
        if self.alive[tag] > 0 and not attempt.stop.exists():
            return True
        del self.alive[tag]
        self._end(RunDir(attempt.root.parent.parent), attempt)
        return False

    def _end(self, run: RunDir, attempt: AttemptDir) -> None:
        spec = protocol.read_spec(run.spec)
        behave = next(
            (self.behaviours[key] for key in ((spec.seed, attempt.number), spec.seed, "*") if key in self.behaviours),
            scored,
        )
        result = behave(run, attempt, spec)
        if attempt.stop.exists():
            result = scored(run, attempt, spec, status=protocol.STOPPED, scores={})
        if result is not None:
            protocol.write_result(attempt.result, result)

    def look(self, jobs: Collection[OpenJob]) -> list[str]:
        return []

    def ending(self, attempt: AttemptDir, *, tag: str) -> Ending | None:
        return None

    def nodes_of(self, attempt: AttemptDir, *, tag: str) -> tuple[str, ...]:
        return ()

    def find(self, attempt: AttemptDir, *, tag: str) -> str | None:
        return "found" if tag in self.alive else None

    def cancel(self, tag: str) -> None:
        self.cancelled.append(tag)
        self.alive.pop(tag, None)


@dataclass
class Listener:
    """Progress and mirror in one, remembering what they were told."""

    notes: list[str] = field(default_factory=list)
    shown: int = 0
    nudges: int = 0
    closed: int = 0

    def show(self, state: StudyState) -> None:
        self.shown += 1

    def note(self, text: str) -> None:
        self.notes.append(text)

    def nudge(self) -> None:
        self.nudges += 1

    def close(self, timeout: float = 60.0) -> None:
        self.closed += 1


def write_plans(home: Home, plans: dict[str, dict[str, Any]]) -> None:
    """Tell the fake trainer what should go wrong, by seed."""
    home.root.mkdir(parents=True, exist_ok=True)
    (home.root / "fake.json").write_text(json.dumps(plans))


def subprocess_environment() -> dict[str, str]:
    """For a test's own processes: this checkout is importable, installed or not."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
