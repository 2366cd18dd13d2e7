import math

import pytest
from fakes import FakeLauncher, FakeSearch, Listener, tiny_study, write_plans
from make_controller import controller

from orchestrator.early_stopping import Curve
from orchestrator.launcher import LocalLauncher
from trainer import protocol

STOP_EARLY = "[stop_early]\nat_fracs = [0.5]\nstartup_trials = 2"


def test_a_trial_that_the_search_gives_up_is_stopped_and_pruned_with_what_was_seen(home):
    search, launcher = FakeSearch(stops={0, 2}), FakeLauncher(losses=[(0.25, 3.0), (0.51, 2.0), (0.75, 1.0)], polls=5)
    listener = Listener()
    study = tiny_study(extra=STOP_EARLY)
    state = controller(study, home, search=search, launcher=launcher, listener=listener).run()
    assert [t.state for t in state.trials.values()] == ["complete", "complete", "pruned", "complete"]
    assert state.trials[2].intermediate == {500: 2.0} and state.trials[2].reason == "stopped early"
    assert state.trials[0].intermediate == {500: 2.0}
    (attempt,) = state.attempts_of(state.trials[2].runs[1])
    assert (attempt.stop_reason, attempt.status) == ("median", "stopped")
    assert any(
        "trial 2 is stopped: its training loss 2.0000 at 50 % of the schedule" in note for note in listener.notes
    )


def test_all_seeds_are_compared_together_and_stopped_together(home):
    search, launcher = FakeSearch(stops={1}), FakeLauncher(polls=5)
    study = tiny_study(seeds="[1, 2]", trials=2, confirm=None, extra=STOP_EARLY)
    state = controller(study, home, search=search, launcher=launcher).run()
    assert state.trials[1].state == "pruned"
    assert {a.stop_reason for run in state.trials[1].runs.values() for a in state.attempts_of(run)} == {"median"}


def log_at(events, *points):
    for step, (elapsed_frac, loss) in enumerate(points):
        events.metrics(step, 0.1, train_loss=loss, elapsed_frac=elapsed_frac)


def test_a_point_is_the_first_loss_from_there_on_and_before_the_next_point(home):
    run = home.run("r")
    curve = Curve(run, (250, 500, 750))
    curve.read()
    log_at(protocol.EventLog(run.attempt(1).events), (0.249, 9.0), (0.25, 3.0), (0.4, 2.5), (0.76, 1.0), (0.9, 0.5))
    curve.read()
    assert curve.losses == {250: 3.0, 750: 1.0}


def test_runs_are_compared_at_the_same_part_of_their_schedules_whatever_their_steps(home):
    """By the clock of time, a slow run has made fewer steps at half of its seconds."""
    fast, slow = home.run("fast"), home.run("slow")
    protocol.EventLog(fast.attempt(1).events).metrics(900, 30.1, train_loss=2.0, elapsed_frac=0.502)
    protocol.EventLog(slow.attempt(1).events).metrics(10, 31.0, train_loss=4.0, elapsed_frac=0.517)
    curves = [Curve(run, (500,)) for run in (fast, slow)]
    for curve in curves:
        curve.read()
    assert [curve.losses for curve in curves] == [{500: 2.0}, {500: 4.0}]


def test_an_attempt_that_replays_its_steps_does_not_move_the_comparison(home):
    run = home.run("r")
    curve = Curve(run, (250, 500))
    log_at(protocol.EventLog(run.attempt(1).events), (0.26, 3.0))
    curve.read()
    assert curve.losses == {250: 3.0}
    log_at(protocol.EventLog(run.attempt(2).events), (0.25, 8.0), (0.52, 2.0))
    curve.read()
    assert curve.losses == {250: 3.0, 500: 2.0}


def test_events_without_a_loss_are_passed_over(home):
    run = home.run("r")
    events = protocol.EventLog(run.attempt(1).events)
    events.metrics(12, 9.0, ttt_chunk=1, ttt_bpb=2.0)
    events.emit(protocol.PHASE, name="train", state="start")
    events.emit(protocol.METRIC, step=3)
    curve = Curve(run, (500,))
    curve.read()
    assert curve.losses == {}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_behind_and_not_kept(home, loss):
    class Finite(FakeSearch):
        def should_stop(self, number, per_mille, loss):
            return not math.isfinite(loss)

    launcher = FakeLauncher(losses=[(0.5, loss)], polls=5)
    state = controller(
        tiny_study(trials=2, confirm=None, extra=STOP_EARLY), home, launcher=launcher, search=Finite()
    ).run()
    assert [(t.state, t.intermediate) for t in state.trials.values()] == [("complete", {}), ("pruned", {})]


def test_without_a_plan_no_event_is_read(home):
    launcher = FakeLauncher(losses=[(0.5, 1.0)])
    state = controller(tiny_study(trials=1, confirm=None), home, launcher=launcher).run()
    assert state.trials[0].intermediate == {}


def test_a_damaged_event_file_leaves_its_run_uncompared_and_the_study_going(home):
    class Damaging(FakeLauncher):
        def submit(self, run, attempt, *, tag, resources):
            job_id = super().submit(run, attempt, tag=tag, resources=resources)
            run.attempt(attempt).events.write_text("}{\n")
            return job_id

    listener = Listener()
    study = tiny_study(trials=2, confirm=None, extra=STOP_EARLY)
    state = controller(study, home, launcher=Damaging(), listener=listener).run()
    assert [t.state for t in state.trials.values()] == ["complete", "complete"]
    assert sum("is not compared any more" in note and "not a JSON object" in note for note in listener.notes) == 2


def test_a_real_trial_that_falls_behind_is_stopped(home):
    study = tiny_study(trials=4, confirm=None, slots=1, extra=STOP_EARLY)
    write_plans(home, {"*": {"step_seconds": 0.1}})

    class Worse(FakeSearch):
        def should_stop(self, number, per_mille, loss):
            return number == 3

    state = controller(study, home, launcher=LocalLauncher(), search=Worse(), poll_seconds=0.02).run()
    assert [t.state for t in state.trials.values()] == ["complete"] * 3 + ["pruned"]
    assert list(state.trials[3].intermediate) == [500]
