"""A tracking server of MLflow's in place of the home's own database: where it is, and whether it lets us in.

Loads no MLflow. User and password are MLflow's own variables, which its client reads itself.
"""

from __future__ import annotations

import base64
import os
import urllib.error
import urllib.parse
import urllib.request

from orchestrator.errors import ConfigError
from orchestrator.home import Home

VARIABLE = "CADDIE_MLFLOW_URI"
USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
SIGN_IN = f"set {USER} and {PASSWORD}, or keep them in ~/.mlflow/credentials"
ANSWER_SECONDS = 10.0


def address() -> str:
    """The server's address; empty where the home's own database is used.

    Raises ConfigError for what is no address, or holds a password, which would then stand in messages and logs.
    """
    given = os.environ.get(VARIABLE, "").rstrip("/")
    if not given:
        return ""
    parts = urllib.parse.urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"{VARIABLE} must be http://HOST:PORT or https://HOST, got {given!r}",
            hint=f"leave {VARIABLE} out to use the database in CADDIE_HOME",
        )
    if parts.username or parts.password:
        raise ConfigError(f"{VARIABLE} must not hold a user or a password", hint=SIGN_IN)
    return given


def place(home: Home) -> str:
    """Where what is mirrored stands: the server, or the home's database."""
    return address() or str(home.mlflow_database)


def problem() -> str:
    """Why the server does not serve us; empty where it does."""
    request = urllib.request.Request(f"{address()}/api/2.0/mlflow/experiments/search?max_results=1")
    user, password = os.environ.get(USER, ""), os.environ.get(PASSWORD, "")
    if user:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        return f"it answers {error.code} {error.reason}"
    except OSError as error:
        return str(getattr(error, "reason", error))
