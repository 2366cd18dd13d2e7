from __future__ import annotations

from pathlib import Path

import pytest
from make_study import make_record, make_study

from orchestrator import ledger, lock, oversight, sweep
from orchestrator.errors import ConfigError
from orchestrator.home import Home
from orchestrator.ledger import Ledger

NAME = "wd-qk-ttt-smoke"


@pytest.fixture
def searching(tmp_path: Path) -> Home:
    """A study whose controller has left while runs go on."""
    return make_study(tmp_path, stage="search")


def running(home: Home) -> list[ledger.Attempt]:
    return [attempt for attempt in Ledger(home.study(NAME).ledger).state().attempts.values() if attempt.status is None]


def test_a_finished_study_tells_its_trials_its_arms_and_its_best_point(tmp_path: Path) -> None:
    found = oversight.status(make_study(tmp_path), NAME)
    assert (found.state, found.controller, found.jobs) == ("finished", None, 0)
    assert sum(found.trials.values()) == found.trials_planned == 8
    assert found.arms == {"preset": 3, "best": 3}
    text = oversight.as_text(found)
    assert f"best       trial {found.best_trial}, {found.best_value:.5f} bits per byte" in text
    assert "preset: 3 runs" in text


def test_a_study_without_a_controller_before_its_end_was_left(searching: Home) -> None:
    found = oversight.status(searching, NAME)
    assert found.state == "left"
    assert found.jobs == len(running(searching)) > 0
    assert "confirmed  not yet" in oversight.as_text(found)


def test_a_study_with_a_controller_is_running_and_names_it(searching: Home) -> None:
    with lock.held(searching.study(NAME)):
        found = oversight.status(searching, NAME)
    assert found.state == "running"
    assert f"{NAME}: running (process " in oversight.as_text(found)


def test_every_study_is_listed_and_one_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    home = make_study(tmp_path, stage="search")
    assert [found.name for found in oversight.statuses(home)[0]] == [NAME]
    damaged = home.study("damaged").ledger
    damaged.parent.mkdir()
    damaged.write_text("{\n")
    found, [problem] = oversight.statuses(home)
    assert [status.name for status in found] == [NAME]
    assert str(damaged) in str(problem) and "put the file back from a copy" in str(problem.hint)


def test_a_record_attempt_has_runs_and_no_trials(tmp_path: Path) -> None:
    [found], _ = oversight.statuses(make_record(tmp_path))
    assert "trials" not in oversight.as_text(found)
    assert oversight.as_line(found).endswith("3 runs")


def test_an_unknown_study_is_refused_with_the_known_ones(searching: Home) -> None:
    with pytest.raises(ConfigError, match="there is no study 'wd'") as caught:
        oversight.status(searching, "wd")
    assert NAME in str(caught.value.hint)


@pytest.mark.parametrize(("cancel", "content"), [(False, sweep.DRAIN), (True, sweep.CANCEL)])
def test_a_working_controller_is_asked_through_the_studys_stop_file(
    searching: Home, cancel: bool, content: str
) -> None:
    with lock.held(searching.study(NAME)):
        said = oversight.ask_to_stop(searching, NAME, cancel=cancel)
    assert searching.study(NAME).stop.read_text() == content
    assert "asked its controller" in said


def test_jobs_that_were_left_end_by_themselves_unless_they_are_cancelled(searching: Home) -> None:
    assert "--cancel stops them now" in oversight.ask_to_stop(searching, NAME, cancel=False)
    assert all(attempt.stop_reason is None for attempt in running(searching))


def test_cancelling_without_a_controller_asks_each_job_and_puts_it_on_record(searching: Home) -> None:
    jobs = running(searching)
    assert f"asked {len(jobs)} jobs to stop" in oversight.ask_to_stop(searching, NAME, cancel=True)
    assert all(attempt.stop_reason == ledger.CANCELLED for attempt in running(searching))
    assert all(searching.run(job.run_id).attempt(job.number).stop.exists() for job in jobs)


def test_a_finished_study_has_nothing_to_stop(tmp_path: Path) -> None:
    assert "nothing to stop" in oversight.ask_to_stop(make_study(tmp_path), NAME, cancel=True)


def test_a_study_whose_controller_has_not_yet_opened_it_is_running_and_can_be_asked_to_stop(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with lock.held(home.study(NAME)):
        assert oversight.status(home, NAME).state == "running"
        assert "asked its controller" in oversight.ask_to_stop(home, NAME, cancel=False)
    assert home.study(NAME).stop.exists()


def test_refused_nodes_and_the_log_of_a_detached_controller_are_told(searching: Home) -> None:
    book = Ledger(searching.study(NAME).ledger)
    (job, *_) = running(searching)
    ended = {"status": "failed", "failure": "node", "seconds": 0.0, "gpus": 8, "nodes": ["node7"], "is_refused": True}
    book.append(ledger.ENDED, run_id=job.run_id, attempt=job.number, **ended)
    searching.study(NAME).log.write_text("")
    found = oversight.status(searching, NAME)
    assert (found.excluded_nodes, found.log) == (["node7"], str(searching.study(NAME).log))
    assert "excluded   node node7" in oversight.as_text(found)
    assert book.state().standing(job.run_id, max_attempts=1) == ledger.WANTED, "a refused node costs the run no attempt"
