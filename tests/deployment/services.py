"""The services of docker/compose.yaml on this machine's loopback: the same start scripts, Debian's PostgreSQL, moto for S3."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKER = REPOSITORY / "docker"
BUCKET, REGION = "caddie", "garage"
USER, PASSWORD = "caddie", "a long password, made for this test"
PASSWORDS = {"MLFLOW_DB_PASSWORD": PASSWORD, "OPTUNA_DB_PASSWORD": PASSWORD}
START_SECONDS = 120.0


def missing() -> str:
    """Why the services cannot be started here; empty where they can."""
    if postgres_programs() is None:
        return "no PostgreSQL server here: apt-get install postgresql"
    lacking = [name for name in ("moto", "boto3", "psycopg", "flask_wtf") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(lacking)} (pip install -c constraints.txt -e '.[all,dev]')" if lacking else ""


def postgres_programs() -> Path | None:
    """Folder of the server's programs; Debian keeps them apart by version, and off the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Services:
    """Where they answer."""

    folder: Path
    postgres_port: int
    s3_port: int
    mlflow_port: int

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def optuna(self) -> str:
        """Optuna's database, for a client that knows the password."""
        return f"postgresql+psycopg://optuna@127.0.0.1:{self.postgres_port}/optuna"

    @property
    def settings(self) -> dict[str, str]:
        """What a controller needs to use them, as compose gives it to the orchestrator."""
        return {
            "CADDIE_MLFLOW_URI": self.mlflow, "MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD,
            "CADDIE_OPTUNA_URL": self.optuna, "PGPASSWORD": PASSWORD,
        }  # fmt: skip

    @property
    def key(self) -> dict[str, str]:
        """What opens the bucket."""
        return {
            "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.s3_port}", "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": "GK0000", "AWS_SECRET_ACCESS_KEY": "secret of the bucket",
        }  # fmt: skip


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Services]:
    """All three within the block, everything they write in one folder."""
    services = Services(folder, free_port(), free_port(), free_port())
    with postgres(services), bucket(services), mlflow(services):
        yield services


@contextlib.contextmanager
def postgres(services: Services, passwords: Mapping[str, str] = PASSWORDS) -> Iterator[None]:
    """A server that was made by docker/postgres-init.sh; it asks everybody but its administrator for a password."""
    programs, folder = postgres_programs(), services.folder / "postgres"
    assert programs is not None
    folder.mkdir()
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to be run by root
    if user:
        shutil.chown(folder, user)
    data, log = folder / "data", folder / "log"
    options = f"-p {services.postgres_port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"

    def call(*command: str) -> None:
        subprocess.run(command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL, timeout=START_SECONDS)

    call(str(programs / "initdb"), "--username=postgres", "--auth-local=trust", "--auth-host=scram-sha-256", "--no-sync", str(data))  # fmt: skip
    call(str(programs / "pg_ctl"), "start", "--wait", "--silent", f"--pgdata={data}", f"--log={log}", f"--options={options}")  # fmt: skip
    try:
        subprocess.run(
            ["bash", str(DOCKER / "postgres-init.sh")], check=True, timeout=START_SECONDS,
            env={**os.environ, **passwords, "PGHOST": str(folder), "PGPORT": str(services.postgres_port)},
        )  # fmt: skip
        yield
    finally:
        call(str(programs / "pg_ctl"), "stop", "--wait", "--silent", "--mode=fast", f"--pgdata={data}")


@contextlib.contextmanager
def bucket(services: Services) -> Iterator[None]:
    """An S3 server with one bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=services.s3_port, verbose=False)
    server.start()
    try:
        s3_client(services).create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
        yield
    finally:
        server.stop()


def s3_client(services: Services):  # type: ignore[no-untyped-def]  # boto3's clients have no types
    import boto3

    key = services.key
    return boto3.client(
        "s3", endpoint_url=key["MLFLOW_S3_ENDPOINT_URL"], region_name=REGION, aws_access_key_id=key["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=key["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip


@contextlib.contextmanager
def mlflow(services: Services) -> Iterator[None]:
    """MLflow as the container starts it: tables in PostgreSQL, artifacts in the bucket, nobody let in without a password."""
    place = f"127.0.0.1:{services.mlflow_port}"
    environment = {
        **os.environ, **services.key, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "POSTGRES_HOST": "127.0.0.1", "PGPORT": str(services.postgres_port), "PGPASSWORD": PASSWORD,
        "ARTIFACTS": f"s3://{BUCKET}/mlflow", "MLFLOW_AUTH_ADMIN_USERNAME": USER, "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this test", "MLFLOW_HOSTS": place, "MLFLOW_HOST": "127.0.0.1",
        "MLFLOW_PORT": str(services.mlflow_port),
    }  # fmt: skip
    log = services.folder / "mlflow.log"
    with log.open("ab") as out:
        server = subprocess.Popen(
            ["sh", str(DOCKER / "start-mlflow")], env=environment, cwd=services.folder, stdout=out, stderr=out,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_for(f"{services.mlflow}/health", server, log)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(url, timeout=5):
            return
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{url} does not answer: {log.read_text()[-2000:]}")
        time.sleep(0.2)
