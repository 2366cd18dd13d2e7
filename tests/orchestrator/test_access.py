from __future__ import annotations

import configparser
import importlib.util
import stat
from pathlib import Path

import pytest

from orchestrator.access import prepare
from orchestrator.errors import MachineError
from orchestrator.home import Home


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "flask_wtf" else real(name))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("installed")
def test_a_password_is_made_once_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    home = Home(tmp_path)
    first, second = prepare(home), prepare(home)
    assert first == second
    password = first.password_file.read_text().strip()
    assert len(password) >= 20
    assert first.environment["MLFLOW_AUTH_ADMIN_PASSWORD"] == password
    assert first.environment["MLFLOW_FLASK_SERVER_SECRET_KEY"] != password
    assert mode(home.mlflow_access.root) == 0o700
    assert {mode(path) for path in home.mlflow_access.root.iterdir()} == {0o600}


@pytest.mark.usefixtures("installed")
def test_two_homes_have_two_passwords(tmp_path: Path) -> None:
    passwords = {prepare(Home(tmp_path / name)).environment["MLFLOW_AUTH_ADMIN_PASSWORD"] for name in "ab"}
    assert len(passwords) == 2


@pytest.mark.usefixtures("installed")
def test_users_lie_in_the_home_and_the_password_is_not_in_the_configuration(tmp_path: Path) -> None:
    home = Home(tmp_path)
    access = prepare(home)
    text = home.mlflow_access.config.read_text()
    found = configparser.ConfigParser()
    found.read_string(text)
    assert found["mlflow"]["database_uri"] == f"sqlite:///{home.mlflow_access.users}"
    assert access.environment["MLFLOW_AUTH_ADMIN_PASSWORD"] not in text


def test_without_the_library_the_server_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="not installed") as caught:
        prepare(Home(tmp_path))
    assert "pip install 'mlflow[auth]'" in str(caught.value.hint)
