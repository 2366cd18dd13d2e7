import math
import time

import pytest
from fakes import FakeLauncher, FakeSearch, Listener, scored, tiny_study, write_plans
from hypothesis import given
from hypothesis import strategies as st
from make_controller import controller

from orchestrator.early_stopping import Curve, is_cut_by_halving
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


# ------------------------------------------------------------------------------------------------ halving, disasters

HALVING = '[stop_early]\nat_fracs = [0.25, 0.5]\nrule = "halving"\nreduction = 2\nstartup_trials = 2'


class ByTrial(FakeLauncher):
    """Logs the losses, and the tokens per second, that a trial is said to have."""

    def __init__(self, losses, *, speeds=None, **fields):
        super().__init__(**fields)
        self.by_trial, self.speeds = losses, speeds or {}

    def submit(self, run, attempt, *, tag, resources):
        number = protocol.read_spec(run.spec).trial
        self.losses = []
        job_id = super().submit(run, attempt, tag=tag, resources=resources)
        events = protocol.EventLog(run.attempt(attempt).events)
        for step, (frac, loss) in enumerate(self.by_trial.get(number, [])):
            events.metrics(
                step, 0.1, train_loss=loss, elapsed_frac=frac, tokens_per_second=self.speeds.get(number, 1000.0)
            )
        return job_id


def test_halving_lets_the_first_ones_go_on_and_then_the_best_half_of_all_that_got_there(home):
    losses = {0: [(0.25, 3.0)], 1: [(0.25, 3.2)], 2: [(0.25, 3.1)], 3: [(0.25, 2.9), (0.5, 2.5)], 4: [(0.25, 2.95)]}
    study = tiny_study(trials=5, slots=1, confirm=None, extra=HALVING)
    listener = Listener()
    state = controller(study, home, launcher=ByTrial(losses, polls=4), listener=listener).run()
    assert [t.state for t in state.trials.values()] == ["complete", "complete", "pruned", "complete", "complete"]
    (attempt,) = state.attempts_of(state.trials[2].runs[1])
    assert attempt.stop_reason == "halving"
    assert any("has 1 of 2 before it, 1 in 2 goes on" in note for note in listener.notes)
    assert state.trials[2].intermediate == {250: 3.1}


def test_halving_counts_trials_that_still_run_and_those_that_were_stopped(home):
    losses = {n: [(0.25, 3.0 + 0.1 * n)] for n in range(4)}
    study = tiny_study(trials=4, slots=4, confirm=None, extra=HALVING)
    state = controller(study, home, launcher=ByTrial(losses, polls=4)).run()
    assert [t.state for t in state.trials.values()] == ["complete", "complete", "pruned", "pruned"]


@given(st.lists(st.floats(0, 10), min_size=3, max_size=40, unique=True), st.integers(2, 5))
def test_of_a_set_that_arrived_whole_halving_keeps_about_one_in_so_many_and_always_the_best(losses, reduction):
    kept = [
        value
        for value in losses
        if not is_cut_by_halving(value, [x for x in losses if x != value], reduction=reduction, startup_trials=1)
    ]
    assert min(losses) in kept and len(kept) == max(1, len(losses) // reduction)


def test_a_validation_loss_may_be_what_is_compared(home):
    run = home.run("r")
    events = protocol.EventLog(run.attempt(1).events)
    events.metrics(1, 0.1, train_loss=9.0, elapsed_frac=0.5)
    events.metrics(1, 0.1, val_loss=3.5, elapsed_frac=0.5)
    curve = Curve(run, (500,), metric=protocol.VAL_LOSS)
    curve.read()
    assert curve.losses == {500: 3.5}


def test_a_loss_that_is_no_number_stops_a_trial_at_once_wherever_it_is_in_its_schedule(home):
    losses = {0: [(0.01, 3.0)], 1: [(0.01, math.nan)]}
    study = tiny_study(trials=2, confirm=None, extra='[stop_early]\nrule = "disasters"')
    state = controller(study, home, launcher=ByTrial(losses, polls=5)).run()
    assert [t.state for t in state.trials.values()] == ["complete", "pruned"]
    assert state.attempts_of(state.trials[1].runs[1])[0].stop_reason == "not a finite number"


class Measured(ByTrial):
    """A trainer whose results count their tokens."""

    def _end(self, run, attempt):
        self.behaviours = {"*": lambda *a: scored(*a, tokens=10_000, train_seconds=10.0)}
        super()._end(run, attempt)


def test_a_trial_far_slower_than_the_others_is_stopped(home):
    losses = {n: [(0.1, 3.0)] for n in range(4)}
    speeds = {2: 260.0, 3: 240.0}
    study = tiny_study(trials=4, slots=1, confirm=None, extra='[stop_early]\nrule = "disasters"\nstartup_trials = 2')
    listener = Listener()
    launcher = Measured(losses, speeds=speeds, polls=4)
    state = controller(study, home, launcher=launcher, listener=listener).run()
    assert [t.state for t in state.trials.values()] == ["complete", "complete", "complete", "pruned"]
    assert any("240 tokens per second are under 25% of the median 1,000" in note for note in listener.notes)
    assert sum("is stopped" in note for note in listener.notes) == 1
    assert state.trials[0].measures["tokens_per_second"] == 1000.0


def test_the_first_steps_and_a_rule_without_a_floor_make_nobody_slow(home):
    for plan, frac in (("min_throughput = 0.0", 0.1), ("", 0.01)):
        extra = f'[stop_early]\nrule = "disasters"\nstartup_trials = 1\n{plan}'
        study = tiny_study(trials=2, slots=1, confirm=None, extra=extra, name=f"of-{len(plan)}")
        launcher = Measured({n: [(frac, 3.0)] for n in range(2)}, speeds={1: 1.0}, polls=4)
        state = controller(study, home, launcher=launcher).run()
        assert [t.state for t in state.trials.values()] == ["complete", "complete"]


def test_a_seed_of_the_confirmation_is_never_stopped(home):
    losses = {None: [(0.25, math.nan)], 0: [(0.25, 3.0)], 1: [(0.25, 3.0)]}
    study = tiny_study(trials=2, extra=HALVING)
    state = controller(study, home, launcher=ByTrial(losses, polls=4)).run()
    assert {a.stop_reason for arm in state.arms.values() for r in arm.runs.values() for a in state.attempts_of(r)} == {
        None
    }


@pytest.mark.parametrize("mode", ["", "deaf"])
def test_a_trial_that_is_stopped_early_leaves_its_slot_within_five_seconds_even_if_it_does_not_listen(home, mode):
    study = tiny_study(trials=2, confirm=None, slots=1, extra="[stop_early]\nat_fracs = [0.25]\nstartup_trials = 1")

    class Second(FakeSearch):
        def should_stop(self, number, per_mille, loss):
            if number == 1:
                self.asked_at = time.monotonic()
            return number == 1

        def tell(self, trial):
            self.told_at = time.monotonic()

        def begin(self, trial):
            write_plans(home, {"*": {"step_seconds": 8.0 if mode and trial.number else 0.2, "mode": mode}})

    search = Second()
    state = controller(study, home, launcher=LocalLauncher(), search=search, poll_seconds=0.02).run()
    assert [t.state for t in state.trials.values()] == ["complete", "pruned"]
    assert search.told_at - search.asked_at < 5.0


def test_a_trial_validates_while_it_trains_and_the_same_point_as_a_record_does_not(home):
    study = tiny_study(
        trials=1, confirm="[1]", settings='"schedule.validations" = 3', extra='[stop_early]\nmetric = "val_loss"'
    )
    state = controller(study, home).run()
    owners = (state.trials[0], state.arms["preset"])
    configs = [protocol.read_spec(home.run(owner.runs[1]).spec).config["schedule"] for owner in owners]
    assert [config["validations"] for config in configs] == [3, 0]
