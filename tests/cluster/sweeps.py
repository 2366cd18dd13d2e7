"""Studies on an emulated cluster: a controller in a thread, while the test hurts what it stands on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from orchestrator.home import Home
from orchestrator.job_names import JobNames
from orchestrator.ledger import Attempt, StudyState
from orchestrator.slots import Slots
from orchestrator.slurm_launcher import SlurmLauncher
from orchestrator.study import Study
from tests.cluster.emulated import until
from tests.orchestrator.fakes import Listener, tiny_study, write_plans
from tests.orchestrator.make_controller import controller
from trainer.protocol import AttemptDir, read_lines

SECONDS = 120.0


def slurm_study(
    *, trials: int = 1, slots: int = 4, resources: str = "", gpus: int = 1, minutes: float = 5, **changes: Any
) -> Study:
    """A study of the fake trainer whose runs are jobs of a GPU each."""
    lines = f'launcher = "slurm"\ngpus_per_run = {gpus}\ntimeout_minutes = {minutes}\n{resources}'
    return tiny_study(**{"confirm": None, **changes, "trials": trials, "slots": slots, "resources": lines})


class Running:
    """A controller at work in a thread of this process."""

    def __init__(self, study: Study, home: Home) -> None:
        self.home = home
        self.listener = Listener()
        launcher = SlurmLauncher(study.resources, JobNames.of_study(study.name, home.root))
        slots = Slots(((),) * study.resources.slots)
        self.controller = controller(
            study, home, launcher=launcher, slots=slots, listener=self.listener, poll_seconds=0.1
        )
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.controller.run()
        except BaseException as error:
            self.error = error

    def wait(self, seconds: float = SECONDS) -> StudyState:
        """The state at the study's end; raises what ended it instead."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"the study did not end: {self.attempts()}, {self.listener.notes}"
        if self.error is not None:
            raise self.error
        return self.controller.state

    def attempts(self) -> list[Attempt]:
        """In the order of their submission."""
        return list(self.controller.state.attempts.values())

    def begun(self, number: int = 1) -> AttemptDir:
        """The files of the n-th submission, once its trainer runs."""
        self.until(lambda: len(self.attempts()) >= number and self.trainers(number - 1), f"attempt {number} running")
        attempt = self.attempts()[number - 1]
        return self.home.run(attempt.run_id).attempt(attempt.number)

    def trainers(self, index: int) -> bool:
        attempt = self.attempts()[index]
        return (self.home.run(attempt.run_id).attempt(attempt.number).root / "trainer.pid").exists()

    def until(self, condition: Callable[[], object], what: str) -> None:
        until(lambda: condition() or self.error is not None, SECONDS, what)
        if self.error is not None:
            raise self.error


def slow_trainers(home: Home, *, seconds: float = 60.0, attempts: list[int] | None = None) -> None:
    """Let the fake trainer take its time, in the attempts of these numbers or in all."""
    write_plans(home, {"*": {"step_seconds": seconds / 4, **({"attempts": attempts} if attempts else {})}})


def starts(home: Home) -> dict[str, int]:
    """How often a trainer began, by run and attempt."""
    return {
        f"{run.name}/{attempt.name}": sum(
            event["kind"] == "start" for _, event in read_lines(AttemptDir(attempt).events)
        )
        for run in home.runs.iterdir()
        for attempt in (run / "attempts").glob("*")
    }
