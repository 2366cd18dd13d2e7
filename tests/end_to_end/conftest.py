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


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What homes have packed so far: to pack takes ten seconds of a slow core, and gives the same bytes in every home."""
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture
def make_home(tmp_path: Path, data: Path, bundles: Path) -> Iterator[Callable[[str], Home]]:
    """Makes homes that hold the data set and what was packed before; what still runs in them is ended with the test."""
    made: list[Home] = []

    def make(name: str) -> Home:
        home = Home(tmp_path / name)
        shutil.copytree(data, home.dataset(DATA))
        shutil.copytree(bundles, home.bundles)
        made.append(home)
        return home

    yield make
    for home in made:
        end_jobs(home)
        if home.bundles.is_dir():
            shutil.copytree(home.bundles, bundles, dirs_exist_ok=True)


def end_jobs(home: Home) -> None:
    """Kill every process that a study of this home has started."""
    try:
        attempts = Ledger(home.study(NAME).ledger).state().attempts.values()
    except ProtocolError:  # a test has damaged it, and nothing was started
        return
    for attempt in attempts:
        signal_tagged(JOB_TAG, attempt.tag, signal.SIGKILL)
