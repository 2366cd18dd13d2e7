import pytest

from orchestrator import tracking
from orchestrator.home import Home
from orchestrator.tracking import PARTIAL, MlflowStore


class Killed(BaseException):
    """Stands in for a process that ends in the middle."""


def test_a_database_whose_making_was_cut_off_is_made_anew(tmp_path, monkeypatch):
    home = Home(tmp_path)
    make = tracking._client

    def cut_off(database):
        database.write_bytes(b"half a schema")
        raise Killed

    monkeypatch.setattr(tracking, "_client", cut_off)
    store = MlflowStore(home)
    store.database.parent.mkdir(parents=True, exist_ok=True)
    with pytest.raises(Killed), store.held():
        store.prepare()
    assert not store.database.exists()  # what was begun has another name
    assert list(store.database.parent.glob(f".*{PARTIAL}"))

    monkeypatch.setattr(tracking, "_client", make)
    with MlflowStore(home).held():
        MlflowStore(home).prepare()
    assert store.database.stat().st_size > 10_000
    assert not list(store.database.parent.glob(f".*{PARTIAL}*"))
