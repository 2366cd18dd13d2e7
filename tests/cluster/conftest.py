from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.home import Home
from tests.cluster.emulated import Cluster, missing
from tests.trainer.make_data import make_data


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    """Four nodes of eight GPUs, for all tests of the session."""
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")) / "c")  # pytest's own folders are too deep
    known = {name: os.environ.get(name) for name in ("PATH", "SLURM_CONF")}
    os.environ.update({name: cluster.environment[name] for name in known})
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        for name, value in known.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        shutil.rmtree(cluster.home.parent, ignore_errors=True)


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, whole, whatever a test did to it before."""
    session_cluster.start()
    yield session_cluster
    session_cluster.ask("scancel", f"--user={os.getuid()}", check=False)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real data set."""
    return make_data(tmp_path_factory.mktemp("data"), name="small")
