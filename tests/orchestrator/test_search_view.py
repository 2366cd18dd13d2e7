import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from fakes import FakeLauncher, tiny_study
from make_controller import controller
from optuna.trial import TrialState

from orchestrator import ledger, search_view
from orchestrator.errors import ConfigError
from orchestrator.ledger import StudyState, Trial
from orchestrator.search import Search
from tests.deployment import services
from tests.deployment.services import Services

STUDY = tiny_study(trials=40)


def trial(number, *, state=ledger.COMPLETE, value=None, **fields):
    params = {"optim.muon_weight_decay": 0.01 + 0.005 * number, "ttt.lr": 0.002}
    value = 1.0 + number if state == ledger.COMPLETE and value is None else value
    return Trial(number=number, origin="sampler", params=params, runs={1: "r"}, state=state, value=value, **fields)


def state_of(*trials):
    return StudyState(trials={t.number: t for t in trials})


def database(tmp_path):
    return f"sqlite:///{tmp_path}/optuna.db"


def search_of(home, url, study=STUDY):
    return Search(study, home.study(study.name).optuna_journal, url=url)


def shown(url, name="tiny"):
    return optuna.load_study(study_name=name, storage=search_view.database(url)).trials


def follow(search):
    """A study's trials as a controller tells them."""
    search.rebuild(StudyState())
    for number in range(3):
        running = trial(number, state=ledger.RUNNING)
        search.begin(running)
        running.state, running.value, running.constraints = ledger.COMPLETE, 1.0 + number, {"artifact_bytes": -1.0}
        search.tell(running)


def test_a_database_shows_what_a_journal_would(home, tmp_path):
    url = database(tmp_path)
    search = search_of(home, url)
    follow(search)
    assert search.problem is None and not home.study("tiny").optuna_journal.exists()
    assert [(t.value, t.constraints) for t in shown(url)] == [(1.0 + n, {"artifact_bytes": -1.0}) for n in range(3)]


def test_a_restart_adds_to_a_database_what_it_has_not_and_tells_what_ended_meanwhile(home, tmp_path, monkeypatch):
    url = database(tmp_path)
    search_of(home, url).rebuild(state_of(trial(0), trial(1, state=ledger.RUNNING)))
    monkeypatch.setattr(optuna, "delete_study", lambda **_: pytest.fail("it was written anew"))
    search_of(home, url).rebuild(state_of(trial(0), trial(1), trial(2, state=ledger.PRUNED)))
    assert [t.state for t in shown(url)] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]


@pytest.mark.parametrize("changed", [trial(1, value=9.0, state=ledger.FAILED), trial(5)])
def test_a_database_that_shows_another_history_is_made_anew(home, tmp_path, changed):
    url = database(tmp_path)
    search_of(home, url).rebuild(state_of(trial(0), trial(1)))
    search_of(home, url).rebuild(state_of(trial(0), changed))
    assert [t.user_attrs["caddie_trial"] for t in shown(url)] == [0, changed.number]


def test_another_homes_study_of_the_same_name_is_left_alone(home, tmp_path):
    from orchestrator.home import Home

    url, other = database(tmp_path), Home(tmp_path / "other")
    search_of(home, url).rebuild(state_of(trial(0)))
    search_of(other, url).rebuild(state_of(trial(0), trial(1)))
    search_of(other, url).rebuild(state_of(trial(0), trial(1), trial(2)))
    assert len(shown(url)) == 1
    (name,) = set(optuna.get_all_study_names(storage=url)) - {"tiny"}
    assert name.startswith("tiny-") and len(shown(url, name)) == 3


def test_a_database_that_is_away_stops_nobody_is_told_of_once_and_made_whole_later(home, tmp_path, monkeypatch):
    folder = tmp_path / "missing"
    url, notes = f"sqlite:///{folder}/optuna.db", []
    search = search_of(home, url)
    search.view.note = notes.append
    follow(search)
    assert "unable to open database file" in search.problem and len(notes) == 1
    folder.mkdir()
    monkeypatch.setattr(search_view, "RETRY_SECONDS", 0.0)
    search.view._not_before = 0.0  # a minute later
    search.begin(trial(3, state=ledger.RUNNING))
    assert search.problem is None and len(shown(url)) == 4


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://h/d", "must begin with postgresql:// or sqlite://, got 'mysql'"),
        ("somewhere", "must begin with postgresql:// or sqlite://, got 'somewhere'"),
        ("postgresql+psycopg://u:secret@h/d", "must not hold a password"),
    ],
)
def test_an_address_that_is_none_or_tells_a_password_is_refused(monkeypatch, url, message):
    monkeypatch.setenv(search_view.VARIABLE, url)
    with pytest.raises(ConfigError, match=message) as caught:
        search_view.address()
    assert "secret" not in str(caught.value)


def test_the_address_is_the_environments(monkeypatch):
    monkeypatch.delenv(search_view.VARIABLE, raising=False)
    assert search_view.address() == ""
    monkeypatch.setenv(search_view.VARIABLE, "postgresql+psycopg://caddie@db/optuna")
    assert search_view.address() == "postgresql+psycopg://caddie@db/optuna"


# ------------------------------------------------------------------------------------------------ real ones


@pytest.fixture
def postgres(monkeypatch) -> Iterator[str]:
    """The address of Optuna's database on a server of the test's own."""
    if services.postgres_programs() is None:
        pytest.skip("no PostgreSQL server here: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="not installed: pip install -e '.[postgresql]'")
    folder = Path(tempfile.mkdtemp(prefix="caddie-postgres-"))
    folder.chmod(0o755)  # the server is not run by root
    monkeypatch.setenv("PGPASSWORD", services.PASSWORD)
    try:
        place = Services(folder, services.free_port(), 0, 0)
        with services.postgres(place):
            yield place.optuna
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_study_is_shown_by_a_postgresql_server(home, postgres):
    study = tiny_study(trials=6, confirm=None, extra="[stop_early]")
    search = search_of(home, postgres, study)
    state = controller(study, home, search=search, launcher=FakeLauncher()).run()
    assert search.problem is None
    assert [t.value for t in shown(postgres)] == [t.value for t in state.trials.values()]
    assert [t.params for t in shown(postgres)] == [t.params for t in state.trials.values()]
    again = tiny_study(trials=8, confirm=None, extra="[stop_early]")
    controller(again, home, search=search_of(home, postgres, again), launcher=FakeLauncher()).run()
    assert len(shown(postgres)) == 8
    assert os.environ["PGPASSWORD"] not in postgres


@pytest.mark.parametrize("kind", ["journal", "database"])
def test_optuna_dashboard_opens_on_the_view(home, tmp_path, kind):
    dashboard = pytest.importorskip("optuna_dashboard", reason="not installed: pip install optuna-dashboard")
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    url = database(tmp_path) if kind == "database" else ""
    search = search_of(home, url)
    follow(search)
    journal = str(home.study("tiny").optuna_journal)
    storage = RDBStorage(url) if url else JournalStorage(JournalFileBackend(journal))
    status: list[str] = []
    request = {
        "REQUEST_METHOD": "GET", "PATH_INFO": "/api/studies", "SERVER_NAME": "localhost", "SERVER_PORT": "80",
        "wsgi.input": io.BytesIO(), "wsgi.url_scheme": "http", "wsgi.errors": io.StringIO(),
    }  # fmt: skip
    body = b"".join(dashboard.wsgi(storage)(request, lambda code, headers, exc_info=None: status.append(code)))
    assert status == ["200 OK"]
    assert [study["study_name"] for study in json.loads(body)["study_summaries"]] == ["tiny"]
