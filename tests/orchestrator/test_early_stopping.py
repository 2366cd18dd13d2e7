def test_a_trial_that_the_search_gives_up_is_stopped_and_pruned_with_what_was_seen(home):
    search, launcher = FakeSearch(stops={0, 2}), FakeLauncher(losses=[(30, 3.0), (60, 2.0), (90, 1.0)], polls=5)
    listener = Listener()
    study = tiny_study(extra=STOP_EARLY)
    state = controller(study, home, search=search, launcher=launcher, listener=listener).run()
    assert [t.state for t in state.trials.values()] == ["complete", "complete", "pruned", "complete"]
    assert state.trials[2].intermediate == {60: 2.0} and state.trials[2].reason == "stopped early"
    assert state.trials[0].intermediate == {60: 2.0}
    (attempt,) = state.attempts_of(state.trials[2].runs[1])
    assert (attempt.stop_reason, attempt.status) == ("median", "stopped")
    assert any("trial 2 is stopped: training loss 2.0000 at step 60" in note for note in listener.notes)


def test_all_seeds_are_compared_together_and_stopped_together(home):
    search, launcher = FakeSearch(stops={1}), FakeLauncher(polls=5)
    study = tiny_study(seeds="[1, 2]", trials=2, confirm=None, extra=STOP_EARLY)
    state = controller(study, home, search=search, launcher=launcher).run()
    assert state.trials[1].state == "pruned"
    assert {a.stop_reason for run in state.trials[1].runs.values() for a in state.attempts_of(run)} == {"median"}


def test_an_attempt_that_replays_its_steps_does_not_move_the_comparison(home):
    run = home.run("r")
    first, second = (protocol.EventLog(run.attempt(n).events) for n in (1, 2))
    checkpoints = sweep.Checkpoints(run, [30, 60])
    checkpoints.read()
    first.metrics(29, 0.1, train_loss=9.0)
    first.metrics(31, 0.1, train_loss=3.0)
    checkpoints.read()
    assert checkpoints.losses == {30: (31, 3.0)}
    second.metrics(30, 0.1, train_loss=8.0)
    second.metrics(62, 0.1, train_loss=2.0)
    checkpoints.read()
    assert checkpoints.losses == {30: (31, 3.0), 60: (62, 2.0)}
    assert sweep.Checkpoints(run, []).read() is None


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
        def should_stop(self, number, step, value):
            return number == 3

    state = controller(study, home, launcher=LocalLauncher(), search=Worse(), poll_seconds=0.02).run()
    assert [t.state for t in state.trials.values()] == ["complete"] * 3 + ["pruned"]
    assert list(state.trials[3].intermediate) == [60]

