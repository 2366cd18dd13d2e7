"""A study through the services of docker/compose.yaml, on this machine: Slurm, PostgreSQL, MLflow with a password, S3."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.home import Home
from tests.cluster import emulated
from tests.cluster.emulated import Cluster
from tests.deployment import services
from tests.deployment.services import PASSWORD, Services
from tests.end_to_end import micro
from tests.trainer.make_data import make_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SEEN, STARTED = "environment-of-job", "started-in-container"
RESOURCES = """
[resources]
launcher = "slurm"
slots = 2
timeout_minutes = 5
setup = ["env > {seen}", "export PATH={folder}:$PATH CADDIE_TRAINER_IMAGE={folder}/apptainer"]
python = "{python}"
"""
APPTAINER = f"""#!/bin/sh
# Starts the program that it is given, in no container.
[ "$1 $2 $3" = "exec --nv --bind" ] && [ -d "$4" ] || exit 9
shift 6
echo "$@" >> {STARTED}
exec {sys.executable} "$@"
"""


def study_text(folder: Path) -> str:
    """The micro study, its trainer in a container of a runtime that is a stand-in."""
    stand_in = folder / "apptainer"
    stand_in.write_text(APPTAINER)
    stand_in.chmod(0o755)
    python = services.DOCKER / "trainer-python"
    return micro.STUDY.partition("\n[resources]")[0] + RESOURCES.format(seen=SEEN, folder=folder, python=python)


@dataclass(frozen=True)
class Deployment:
    """Where everything is."""

    home: Home
    services: Services
    cluster: Cluster
    study: Path

    def caddie(self, *arguments: str | Path, home: Home | None = None, **changes: str):  # type: ignore[no-untyped-def]
        """One command, as the orchestrator's container would run it."""
        settings = {**self.services.settings, **self.cluster.environment, **changes}
        root = (home or self.home).root
        return micro.caddie("--home", root, *arguments, cwd=self.study.parent, **settings)


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """A micro study that has been run to its end on the services."""
    if reason := emulated.missing() or services.missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="deployment-", dir="/tmp"))  # sockets need short paths
    folder.chmod(0o755)
    cluster = Cluster(folder / "c", nodes=1, gpus=1, has_accounting=False)
    try:
        cluster.start()
        with services.running(folder) as found:
            home = Home(folder / "home")
            home.data.mkdir(parents=True)
            make_data(home.data, name=micro.DATA)
            study = micro.write_study(folder / "studies", study_text(folder))
            yield Deployment(home, found, cluster, study)
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def finished(deployment: Deployment) -> Deployment:
    done = deployment.caddie("study", "run", deployment.study)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MLflow" not in done.stderr, done.stderr
    return deployment


def ask(deployment: Deployment, path: str, **values: object) -> dict:
    """What MLflow's own interface answers to somebody with the password."""
    request = urllib.request.Request(
        f"{deployment.services.mlflow}/api/2.0/mlflow/{path}",
        data=json.dumps(values).encode() if values else None,
        headers={"Content-Type": "application/json"},
    )
    manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    manager.add_password(None, deployment.services.mlflow, services.USER, PASSWORD)
    with urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(manager)).open(request, timeout=30) as answer:
        found: dict = json.load(answer)
    return found


def runs_of(deployment: Deployment) -> list[dict]:
    """MLflow's runs of the study."""
    experiment = ask(deployment, f"experiments/get-by-name?experiment_name={micro.NAME}")["experiment"]
    return ask(deployment, "runs/search", experiment_ids=[experiment["experiment_id"]], max_results=1000).get(
        "runs", []
    )


def keys(deployment: Deployment) -> list[str]:
    return sorted(
        tag["value"] for run in runs_of(deployment) for tag in run["data"]["tags"] if tag["key"] == "caddie.key"
    )


def test_a_study_goes_through_every_service_to_its_report(finished: Deployment) -> None:
    files = finished.home.study(micro.NAME)
    assert files.report_page.is_file() and files.report_text.is_file()
    assert len(micro.state(finished.home).trials) == micro.TRIALS
    assert {"study", "trial/0", "arm/preset"} <= set(keys(finished))
    assert not finished.home.mlflow_database.exists()


def test_optunas_tables_hold_every_trial(finished: Deployment) -> None:
    import psycopg

    place = {"host": "127.0.0.1", "port": finished.services.postgres_port, "password": PASSWORD}
    with psycopg.connect(**place, user="optuna", dbname="optuna") as connection:  # type: ignore[arg-type]
        found = connection.execute(
            "SELECT state FROM trials JOIN studies USING (study_id) WHERE study_name = %s", [micro.NAME]
        )
        assert [state for (state,) in found] == ["COMPLETE"] * micro.TRIALS
    assert not finished.home.study(micro.NAME).optuna_journal.exists()


def test_artifacts_lie_in_the_bucket_alone(finished: Deployment) -> None:
    listed = services.s3_client(finished.services).list_objects_v2(Bucket=services.BUCKET, Prefix="mlflow/")
    names = [entry["Key"].rpartition("/")[2] for entry in listed["Contents"]]
    assert finished.home.study(micro.NAME).report_page.name in names
    assert not finished.home.mlflow_artifacts.exists()


def test_nobody_is_let_in_without_the_password(finished: Deployment) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(
            f"{finished.services.mlflow}/api/2.0/mlflow/experiments/search?max_results=1", timeout=30
        )
    told = finished.caddie("doctor", "--json", MLFLOW_TRACKING_PASSWORD="wrong")
    (finding,) = [found for found in json.loads(told.stdout) if found["name"] == "MLflow"]
    assert finding["status"] == "warn" and "401" in finding["found"]


def test_no_job_is_given_a_password(finished: Deployment) -> None:
    seen = list(finished.home.runs.glob(f"*/{SEEN}"))
    assert len(seen) == len(micro.state(finished.home).run_ids)
    assert all("SLURM_JOB_ID" in path.read_text() and PASSWORD not in path.read_text() for path in seen)


def test_every_trainer_is_started_by_the_containers_interpreter(finished: Deployment) -> None:
    for run_id in micro.state(finished.home).run_ids:
        run = finished.home.run(run_id)
        assert f"{run.bundle} {run.root} --attempt 1" in (run.root / STARTED).read_text()


def test_a_server_that_lost_everything_is_filled_again(finished: Deployment) -> None:
    before = keys(finished)
    for run in runs_of(finished):
        ask(finished, "runs/delete", run_id=run["info"]["run_id"])
    assert keys(finished) == []
    done = finished.caddie("track", "--rebuild")
    assert (done.returncode, done.stdout.strip()) == (0, finished.services.mlflow), done.stderr
    assert keys(finished) == before


def test_two_homes_do_not_write_into_one_experiment(finished: Deployment, tmp_path: Path) -> None:
    other = Home(tmp_path / "other")
    shutil.copytree(finished.home.root, other.root)
    refused = finished.caddie("track", home=other)
    assert refused.returncode != 0 and f"that of {finished.home.root}" in refused.stderr
    taken = finished.caddie("track", "--rebuild", home=other)
    assert taken.returncode == 0, taken.stderr
    assert finished.caddie("track", "--rebuild").returncode == 0


def test_a_study_ends_with_its_report_while_the_server_is_away(finished: Deployment, tmp_path: Path) -> None:
    away = f"http://127.0.0.1:{services.free_port()}"
    done = finished.caddie("study", "run", finished.study, CADDIE_MLFLOW_URI=away)
    assert done.returncode == 0 and f"{away}: MLflow cannot use it" in done.stderr, done.stderr


def test_the_pages_of_the_server_are_named_and_none_is_started(finished: Deployment) -> None:
    shown = finished.caddie("ui")
    assert shown.returncode == 0 and f"{micro.NAME}: {finished.services.mlflow}/#/experiments/" in shown.stderr


def test_each_role_of_the_database_opens_its_own_alone(finished: Deployment) -> None:
    import psycopg

    place = {"host": "127.0.0.1", "port": finished.services.postgres_port, "password": PASSWORD}
    for role, databases in (("mlflow", ["mlflow", "mlflow_auth"]), ("optuna", ["optuna"])):
        for database in ("mlflow", "mlflow_auth", "optuna"):
            try:
                psycopg.connect(**place, user=role, dbname=database).close()  # type: ignore[arg-type]
                opens = True
            except psycopg.OperationalError:
                opens = False
            assert opens == (database in databases), (role, database)
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(**{**place, "password": "x"}, user="optuna", dbname="optuna")  # type: ignore[arg-type]


def test_everything_that_was_written_is_in_the_home_or_the_services(finished: Deployment) -> None:
    assert {path.name for path in finished.study.parent.iterdir()} == {finished.study.name}
    assert os.path.commonpath([finished.home.root, finished.services.folder]) == str(finished.services.folder)
