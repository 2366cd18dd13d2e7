import pytest

from tests.trainer.make_data import make_data
from tests.trainer.make_run import execute, micro_config, plan


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared data set."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data):
    """A complete run of the bundle and its one attempt."""
    run = plan(tmp_path_factory.mktemp("home"), data, micro_config())
    return run, execute(run)
