import shutil

import pytest

from orchestrator import attempts
from orchestrator.home import Home


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """The waits are for processes of a real machine; the fakes begin and end at once."""
    monkeypatch.setattr(attempts, "DEATH_SECONDS", 0.01)
    monkeypatch.setattr(attempts, "BEGIN_SECONDS", 0.0)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """MLflow's schema, made once: it takes more than a second."""
    from orchestrator.mirror import sync_all  # loads MLflow, which most tests do without

    home = Home(tmp_path_factory.mktemp("mlflow"))
    sync_all(home)
    return home.mlflow_database


@pytest.fixture
def in_home(empty_database):
    """Puts the empty schema into a home."""

    def put(home):
        shutil.copyfile(empty_database, home.mlflow_database)
        return home

    return put
