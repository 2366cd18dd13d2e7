import importlib.machinery
import sys
import threading
import types

import pytest
from fakes import tiny_study
from make_controller import controller
from make_mlflow import NAME, runs_by_key
from make_study import Maker, make_record

from orchestrator.background_mirror import BackgroundMirror
from orchestrator.home import Home


class FakeMirror:
    """Counts passes; fails while told so."""

    def __init__(self, failures=0, problems=()):
        self.passes, self.failures, self.problems = 0, failures, list(problems)
        self.passed = threading.Event()

    def sync(self, study_name):
        self.passes += 1
        self.passed.set()
        if self.passes <= self.failures:
            raise RuntimeError("database is locked\nand more")
        return self.problems


@pytest.fixture
def opened(tmp_path):
    """A home with an opened study."""
    return Maker(tmp_path).home


def test_a_study_that_is_not_opened_yet_is_no_problem(tmp_path):
    mirror = FakeMirror(failures=9)
    background = BackgroundMirror(Home(tmp_path), NAME, mirror=mirror)
    background.close()
    assert (background.problem, mirror.passes) == (None, 0)


def test_closing_mirrors_a_last_time(tmp_path, in_home):
    home = in_home(make_record(tmp_path))
    background = BackgroundMirror(home, "record-smoke")
    background.close(timeout=60)
    assert background.problem is None
    assert runs_by_key(home, "record-smoke")["study"].info.status == "FINISHED"


def test_a_nudge_mirrors_without_waiting_for_the_pause(opened):
    mirror = FakeMirror()
    background = BackgroundMirror(opened, NAME, mirror=mirror)
    background.nudge()
    assert mirror.passed.wait(BackgroundMirror.PAUSE_SECONDS / 2)
    background.close()
    assert mirror.passes == 2


def test_a_failure_of_mlflow_is_kept_in_one_line_and_never_raised(opened):
    background = BackgroundMirror(opened, NAME, mirror=FakeMirror(failures=9))
    background.close()
    assert background.problem == "database is locked"


def test_what_could_not_be_read_is_told(opened):
    background = BackgroundMirror(opened, NAME, mirror=FakeMirror(problems=["events.jsonl: byte 3: ..."]))
    background.close()
    assert background.problem == "events.jsonl: byte 3: ..."


def test_a_mirror_that_hangs_does_not_hold_the_controller(opened):
    blocked = threading.Event()
    mirror = FakeMirror()
    mirror.sync = lambda name: blocked.wait(60) and []
    background = BackgroundMirror(opened, NAME, mirror=mirror)
    background.close(timeout=0.05)
    blocked.set()
    assert "did not end within 0.05 s" in background.problem


@pytest.mark.parametrize("harm", ["hangs", "is dead"])
def test_a_study_comes_to_its_end_beside_an_mlflow_that(harm, home, monkeypatch):
    blocked = threading.Event()

    def sync(name):
        if harm == "is dead":
            raise ConnectionError("connection refused")
        blocked.wait(60)
        return []

    mirror = FakeMirror()
    mirror.sync = sync
    monkeypatch.setattr("orchestrator.mirror.Mirror", lambda home: mirror)
    background = BackgroundMirror(home, "tiny")
    real_close = background.close
    background.close = lambda timeout=60.0: real_close(0.05 if harm == "hangs" else timeout)
    state = controller(tiny_study(), home, mirror=background).run()
    blocked.set()
    assert state.closed == "finished" and all(trial.state == "complete" for trial in state.trials.values())
    assert ("did not end" if harm == "hangs" else "connection refused") in background.problem


def test_a_study_comes_to_its_end_where_mlflow_is_broken(home, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("orchestrator.mirror", "orchestrator.tracking"))]:
        monkeypatch.delitem(sys.modules, name)
    broken = types.ModuleType("mlflow")
    broken.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow", broken)
    background = BackgroundMirror(home, "tiny")
    state = controller(tiny_study(), home, mirror=background).run()
    assert state.closed == "finished" and "cannot import name 'MlflowClient'" in background.problem


def test_that_mlflow_is_not_installed_is_said_before_a_study_begins(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ModuleNotFoundError, match="No module named 'mlflow'"):
        BackgroundMirror(home, "tiny")
