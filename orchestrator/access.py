"""Who may open MLflow's pages from another machine: one user with a password that is made once and kept in the home."""

from __future__ import annotations

import importlib.util
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import MachineError
from orchestrator.home import AccessDir, Home
from trainer.protocol import storage_error

USER = "caddie"
NEEDED = "flask_wtf"  # of mlflow[auth]: without it the server starts and then refuses to serve
PASSWORD_BYTES = 18


@dataclass(frozen=True)
class Access:
    """What the server is started with."""

    environment: dict[str, str]
    password_file: Path


def prepare(home: Home) -> Access:
    """Make the password and the server's own files where there are none. Raises MachineError, StorageError."""
    if importlib.util.find_spec(NEEDED) is None:
        raise MachineError(
            "opening MLflow to other machines needs its authentication, which is not installed",
            hint="pip install 'mlflow[auth]'; or leave --host out, and reach it through ssh -L",
        )
    files = home.mlflow_access
    try:
        files.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.root.chmod(0o700)
        password, secret = _kept(files.password), _kept(files.secret)
        _write_private(files.config, _config(files))
    except OSError as error:
        raise storage_error(error, files.root) from error
    environment = {
        "MLFLOW_AUTH_CONFIG_PATH": str(files.config), "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secret,
    }  # fmt: skip
    return Access(environment=environment, password_file=files.password)


def _config(files: AccessDir) -> str:
    return (
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{files.users}\nadmin_username = {USER}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )


def _kept(path: Path) -> str:
    """A secret that was made before, or a new one."""
    if not path.is_file():
        _write_private(path, secrets.token_urlsafe(PASSWORD_BYTES) + "\n")
    return path.read_text().strip()


def _write_private(path: Path, text: str) -> None:
    """Write a file that nobody else may read, not even while it is being written."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
