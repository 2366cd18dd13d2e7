from __future__ import annotations

import base64
import http.server
import threading
from collections.abc import Iterator

import pytest

from orchestrator import tracking_server
from orchestrator.errors import ConfigError
from orchestrator.home import Home
from orchestrator.tracking import MlflowStore
from orchestrator.tracking_server import PASSWORD, USER, VARIABLE

EXPECTED = "Basic " + base64.b64encode(b"anna:s3cret").decode()


class Guarded(http.server.BaseHTTPRequestHandler):
    """Lets in whoever has the password."""

    def do_GET(self) -> None:
        self.send_response(200 if self.headers.get("Authorization") == EXPECTED else 401)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Guarded) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


def test_without_the_variable_the_homes_own_database_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    home = Home(tmp_path)
    assert tracking_server.address() == "" and tracking_server.place(home) == str(home.mlflow_database)
    assert MlflowStore(home).server == ""


def test_a_server_is_used_in_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "http://mlflow:5000/")
    home = Home(tmp_path)
    assert tracking_server.place(home) == "http://mlflow:5000"
    assert MlflowStore(home).server == "http://mlflow:5000"
    assert MlflowStore(home, database=tmp_path / "other.db").server == ""  # a rebuild makes a database in any case
    assert not home.mlflow_database.exists()


@pytest.mark.parametrize("given", ["mlflow:5000", "sqlite:///mlflow.db", "http://", "databricks"])
def test_what_is_no_address_of_a_server_is_refused(monkeypatch, given):
    monkeypatch.setenv(VARIABLE, given)
    with pytest.raises(ConfigError, match=VARIABLE) as refused:
        tracking_server.address()
    assert "leave" in str(refused.value.hint)


def test_an_address_that_holds_a_password_is_refused_and_not_repeated(monkeypatch):
    monkeypatch.setenv(VARIABLE, "http://anna:s3cret@mlflow:5000")
    with pytest.raises(ConfigError) as refused:
        tracking_server.address()
    assert "s3cret" not in str(refused.value) and PASSWORD in str(refused.value.hint)


def test_a_server_says_whether_it_lets_us_in(server, monkeypatch):
    monkeypatch.setenv(VARIABLE, server)
    for name in (USER, PASSWORD):
        monkeypatch.delenv(name, raising=False)
    assert tracking_server.problem() == "it answers 401 Unauthorized"
    monkeypatch.setenv(USER, "anna")
    monkeypatch.setenv(PASSWORD, "s3cret")
    assert tracking_server.problem() == ""


def test_a_server_that_is_away_is_named_by_its_reason(server, monkeypatch):
    monkeypatch.setenv(VARIABLE, "http://127.0.0.1:9")
    assert "refused" in tracking_server.problem()
