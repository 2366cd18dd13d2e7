from make_study import make_study

from orchestrator.evidence import gather
from orchestrator.family import families

NAME = "wd-qk-ttt-smoke"


def test_a_family_is_every_run_of_the_configuration_whoever_asked(tmp_path):
    home = make_study(tmp_path)
    best = gather(home, NAME).arms[0]
    found, problems = families(home, [best.runs[0].run_id])
    assert [run.seed for run in found] == [1, 42, 314, 999]  # the search's seed first
    assert len({run.family for run in found}) == 1
    assert problems == []
    assert all((home.root / run.source).is_file() for run in found)


def test_a_failed_run_belongs_to_its_family(tmp_path):
    home = make_study(tmp_path, failing_seed=314)
    found, _ = families(home, [gather(home, NAME).arms[0].runs[0].run_id])
    assert {run.seed: run.state for run in found}[314] == "failed"
    assert {run.seed: run.has_ended for run in found}[314]


def test_runs_that_still_go_on_have_not_ended(tmp_path):
    home = make_study(tmp_path, stage="search")
    running = gather(home, NAME).trials[-1].runs[0]
    [found] = families(home, [running.run_id])[0]
    assert not found.has_ended


def test_damaged_files_are_told_with_their_place(tmp_path):
    home = make_study(tmp_path)
    first, second, _ = gather(home, NAME).arms[0].runs
    home.run(first.run_id).spec.write_text("{")
    (home.root / second.source).write_text("{")
    found, problems = families(home, [first.run_id, second.run_id])
    assert str(home.run(first.run_id).spec) in problems[0]
    [damaged] = [run for run in found if run.problem]
    assert (damaged.run_id, damaged.state) == (second.run_id, "unreadable")


def test_no_runs_have_no_family(tmp_path):
    assert families(make_study(tmp_path), []) == ([], [])
