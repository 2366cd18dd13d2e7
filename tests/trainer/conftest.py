import shutil
from pathlib import Path

import pytest

from tests.trainer.make_data import make_data
from tests.trainer.make_run import execute, micro_config, plan
from tests.trainer.processes import Pair


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A prepared data set, for all tests to read."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def folder(prepared, tmp_path):
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, prepared):
    """A complete run of the bundle and its one attempt."""
    run = plan(tmp_path_factory.mktemp("home"), prepared, micro_config())
    return run, execute(run)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Two processes in one group, for functions of a test module to run on."""
    processes = Pair(tmp_path_factory.mktemp("pair") / "meeting")
    yield processes
    processes.close()
