from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.errors import ProtocolError
from orchestrator.home import Home
from orchestrator.launcher import JOB_TAG
from orchestrator.ledger import Ledger
from orchestrator.processes import signal_tagged
from tests.end_to_end.micro import DATA, NAME
from tests.trainer.make_data import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared data set."""
    return make_data(tmp_path_factory.mktemp("data"), name=DATA)


@pytest.fixture
def make_home(tmp_path: Path, data: Path) -> Iterator[Callable[[str], Home]]:
    """Makes homes that hold the data set; what still runs in them is ended with the test."""
    made: list[Home] = []

    def make(name: str) -> Home:
        home = Home(tmp_path / name)
        shutil.copytree(data, home.dataset(DATA))
        made.append(home)
        return home

    yield make
    for home in made:
        end_jobs(home)


def end_jobs(home: Home) -> None:
    """Kill every process that a study of this home has started."""
    try:
        attempts = Ledger(home.study(NAME).ledger).state().attempts.values()
    except ProtocolError:  # a test has damaged it, and nothing was started
        return
    for attempt in attempts:
        signal_tagged(JOB_TAG, attempt.tag, signal.SIGKILL)
