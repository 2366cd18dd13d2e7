import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import (
    FAKE_BUNDLE,
    MANIFEST,
    FakeLauncher,
    FakeSearch,
    Listener,
    failed,
    scored,
    study_text,
    subprocess_environment,
    tiny_study,
    write_plans,
)  # fmt: skip

from orchestrator import ledger, lock, sweep
from orchestrator.errors import ConfigError, Interrupted, ProtocolError, StudyBusy, StudyFailed
from orchestrator.home import Home
from orchestrator.launcher import LocalLauncher
from orchestrator.ledger import Ledger
from orchestrator.search import Search
from orchestrator.study import parse_study, record_study
from orchestrator.sweep import Controller, identity_of
from trainer import protocol
from trainer.protocol import CODE, INFRASTRUCTURE, NOT_FINITE, OVER_CAP

STOP_EARLY = "[stop_early]\nat_fracs = [0.5]\nstartup_trials = 2"


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """The waits are for processes of a real machine; the fakes end at once."""
    monkeypatch.setattr(sweep, "DEATH_SECONDS", 0.01)


def controller(study, home, **parts):
    listener = parts.pop("listener", Listener())
    fakes = {
        "launcher": FakeLauncher(),
        "search": FakeSearch(),
        "bundle": FAKE_BUNDLE,
        "progress": listener,
        "mirror": listener,
    }
    fixed = {"code": {}, "data_dir": home.root, "manifest_sha256": MANIFEST, "poll_seconds": 0.001}
    return Controller(study, home, **{**fakes, **fixed, **parts})


def records(home, name="tiny"):
    return [record for _, record in protocol.read_lines(home.study(name).ledger)]


def kinds(home):
    return [record["kind"] for record in records(home)]


# ------------------------------------------------------------------------------------------------ the whole way


def test_a_study_goes_to_its_total_and_confirms_the_preset_and_the_best_point(home):
    listener = Listener()
    state = controller(tiny_study(), home, listener=listener).run()
    assert [(t.number, t.origin, t.state) for t in state.trials.values()] == [
        (0, "preset", "complete"), (1, "sampler", "complete"), (2, "sampler", "complete"), (3, "sampler", "complete"),
    ]  # fmt: skip
    assert state.best.number == 3
    assert {name: (arm.trial, list(arm.runs)) for name, arm in state.arms.items()} == {
        "preset": (0, [42, 314]), "best": (3, [42, 314]),
    }  # fmt: skip
    assert state.closed == "finished"
    assert Ledger(home.study("tiny").ledger).state() == state
    assert listener.closed == 2 and listener.shown and listener.nudges


def test_a_decision_is_on_disk_before_it_is_acted_on(home):
    class Watching(FakeLauncher):
        def submit(self, run, attempt, *, tag, resources):
            last = records(home)[-1]
            assert (last["kind"], last["tag"], last["run_id"]) == (ledger.SUBMITTING, tag, run.run_id)
            asked = [r for r in records(home) if r["kind"] in (ledger.TRIAL_ASKED, ledger.ARM_ASKED)]
            assert any(run.run_id in r["runs"].values() for r in asked)
            return super().submit(run, attempt, tag=tag, resources=resources)

    controller(tiny_study(), home, launcher=Watching()).run()


def test_a_trial_is_asked_only_when_a_slot_is_free_and_the_slots_are_kept_full(home):
    launcher = FakeLauncher(polls=3)

    class Asked(FakeSearch):
        def ask(self, number):
            assert len(launcher.alive) < 2
            return super().ask(number)

    controller(tiny_study(), home, launcher=launcher, search=Asked()).run()
    assert launcher.most_alive == 2
    assert len(launcher.submitted) == len(set(launcher.submitted)) == 8


def test_a_finished_study_run_again_changes_nothing(home):
    controller(tiny_study(), home).run()
    before = home.study("tiny").ledger.read_bytes()
    launcher = FakeLauncher()
    controller(tiny_study(), home, launcher=launcher).run()
    assert home.study("tiny").ledger.read_bytes() == before and not launcher.submitted


def test_a_larger_total_continues_the_study_and_confirms_the_new_best_point(home):
    controller(tiny_study(trials=2), home).run()
    search, launcher = FakeSearch(), FakeLauncher()
    state = controller(tiny_study(trials=4), home, search=search, launcher=launcher).run()
    assert search.asked == [2, 3] and state.arms["best"].trial == 3
    assert len(launcher.submitted) == 4


def test_when_the_preset_is_the_best_point_it_is_the_only_arm(home):
    search = FakeSearch(point=lambda number: {"optim.muon_weight_decay": 0.05 + 0.01 * number, "ttt.lr": 0.002})
    assert list(controller(tiny_study(), home, search=search).run().arms) == ["preset"]


def test_a_study_without_a_confirmation_ends_after_its_trials(home):
    assert controller(tiny_study(confirm=None), home).run().arms == {}


def test_a_record_attempt_runs_its_seeds_and_no_trial(home):
    study = record_study("smoke", data="d", seeds=(42, 314, 999), knobs={"ttt.lr": 0.004}, name="mine")
    search = FakeSearch()
    state = controller(study, home, search=search).run()
    assert (search.asked, state.trials, list(state.arms["preset"].runs)) == ([], {}, [42, 314, 999])
    assert state.closed == "finished" and parse_study(state.source) == study


def test_arms_run_side_by_side_in_time(home):
    launcher = FakeLauncher()
    state = controller(tiny_study(slots=1), home, launcher=launcher).run()
    order = [run_id for run_id, _, _ in launcher.submitted[4:]]
    preset, best = state.arms["preset"].runs, state.arms["best"].runs
    assert order == [preset[42], best[42], preset[314], best[314]]


# ------------------------------------------------------------------------------------------------ runs


def test_a_trial_holds_a_run_for_each_seed_and_its_value_is_their_mean(home):
    behaviours = {1: lambda *a: scored(*a, bpb=1.0), 2: lambda *a: scored(*a, bpb=2.0)}
    study = tiny_study(seeds="[1, 2]", trials=1, confirm=None)
    state = controller(study, home, launcher=FakeLauncher(behaviours=behaviours)).run()
    assert list(state.trials[0].runs) == [1, 2] and state.trials[0].value == pytest.approx(1.5)
    assert set(state.trials[0].constraints) == {"artifact_bytes", "train_seconds", "eval_seconds"}


def test_a_run_that_two_owners_ask_for_runs_once(home):
    launcher = FakeLauncher()
    state = controller(tiny_study(seeds="[42]", trials=2), home, launcher=launcher).run()
    assert state.trials[0].runs[42] == state.arms["preset"].runs[42]
    assert len(launcher.submitted) == len({run for run, _, _ in launcher.submitted}) == 4


def test_a_result_that_another_study_left_is_reused(home):
    controller(tiny_study(), home).run()
    launcher = FakeLauncher()
    state = controller(tiny_study(name="other"), home, launcher=launcher).run()
    assert launcher.submitted == [] and state.attempts == {} and state.closed == "finished"
    assert all(trial.value is not None for trial in state.trials.values())


def test_a_run_that_another_study_works_on_is_waited_for(home):
    first = controller(tiny_study(trials=1, confirm=None), home)
    run = first._plan(ledger.Trial(number=0, origin="preset", params=FakeSearch().point(0), runs={}), 1)
    run.attempt(1).root.mkdir(parents=True)

    class Elsewhere(FakeLauncher):
        asked = 0

        def is_alive(self, attempt, *, tag):
            if tag is not None or attempt.number != 1:
                return super().is_alive(attempt, tag=tag)
            self.asked += 1
            if self.asked == 3:
                protocol.write_result(attempt.result, scored(run, attempt, protocol.read_spec(run.spec), bpb=1.25))
            return self.asked < 3

    launcher = Elsewhere()
    state = controller(tiny_study(trials=1, confirm=None), home, launcher=launcher).run()
    assert launcher.submitted == [] and state.trials[0].value == 1.25


def test_a_failure_of_the_machine_makes_a_new_attempt_of_the_same_run(home):
    launcher = FakeLauncher(behaviours={(1, 1): failed(INFRASTRUCTURE), (1, 2): lambda *a: None})
    state = controller(tiny_study(trials=1, confirm=None), home, launcher=launcher).run()
    (run_id,) = state.run_ids
    assert [(a.number, a.status, a.failure) for a in state.attempts_of(run_id)] == [
        (1, "failed", INFRASTRUCTURE), (2, "failed", INFRASTRUCTURE), (3, "complete", None),
    ]  # fmt: skip
    assert state.trials[0].state == "complete"
    lost = protocol.read_result(home.run(run_id).attempt(2).result)
    assert "its worker was killed, or could not start" in lost.failure.message


def test_failures_of_the_machine_are_told_once_their_attempts_are_used_up(home):
    launcher = FakeLauncher(behaviours={(1, 1): failed(INFRASTRUCTURE), (1, 2): failed(INFRASTRUCTURE)})
    study = tiny_study(trials=2, confirm=None, resources="max_attempts = 2")
    with pytest.raises(StudyFailed, match="none of its 2 trials completed: infrastructure: it broke"):
        controller(study, home, launcher=launcher).run()
    assert len(launcher.submitted) == 4


def test_a_failure_of_the_configuration_is_told_once_and_the_study_goes_on(home):
    class OnlyTheSecond(FakeLauncher):
        def _end(self, run, attempt):
            is_second = protocol.read_spec(run.spec).trial == 1
            self.behaviours = {"*": failed(NOT_FINITE, "loss is nan")} if is_second else {}
            super()._end(run, attempt)

    listener, launcher = Listener(), OnlyTheSecond()
    state = controller(tiny_study(), home, launcher=launcher, listener=listener).run()
    assert [t.state for t in state.trials.values()] == ["complete", "failed", "complete", "complete"]
    assert state.trials[1].reason == "not_finite: loss is nan (seed 1; log: some.log)"
    assert state.closed == "finished" and any("loss is nan" in note for note in listener.notes)


def test_an_artifact_over_the_cap_is_complete_and_never_the_best(home):
    def over(run, attempt, spec):
        if spec.trial != 3:
            return scored(run, attempt, spec)
        result = failed(OVER_CAP)(run, attempt, spec)
        return dataclasses.replace(result, scores=scored(run, attempt, spec).scores, artifact_bytes=600_000)

    state = controller(tiny_study(), home, launcher=FakeLauncher(behaviours={1: over})).run()
    assert (state.trials[3].state, state.trials[3].constraints["artifact_bytes"]) == ("complete", 100_000.0)
    assert state.best.number == 2


def test_a_damaged_result_is_its_runs_failure(home):
    class Damaging(FakeLauncher):
        def _end(self, run, attempt):
            if protocol.read_spec(run.spec).trial == 1:
                attempt.result.write_text("{")
            else:
                super()._end(run, attempt)

    state = controller(tiny_study(confirm=None), home, launcher=Damaging()).run()
    assert state.trials[1].state == "failed" and "not a JSON object" in state.trials[1].reason


def test_a_point_that_makes_no_configuration_is_told_without_a_run(home):
    def point(number):
        return {**FakeSearch().point(number), "evaluation.stride": 64 if number != 1 else 65}

    state = controller(tiny_study(confirm=None), home, search=FakeSearch(point=point)).run()
    assert (state.trials[1].state, state.trials[1].runs) == ("failed", {})
    assert state.trials[1].reason.startswith("config: ") and "65" in state.trials[1].reason


def test_one_failed_seed_ends_its_trial_without_running_the_others(home):
    launcher = FakeLauncher(behaviours={1: failed(CODE)})
    with pytest.raises(StudyFailed):
        controller(tiny_study(seeds="[1, 2]", slots=1, trials=2, confirm=None), home, launcher=launcher).run()
    assert len(launcher.submitted) == 2


def test_three_first_trials_that_fail_alike_fail_the_study_with_the_end_of_the_log(home):
    launcher = FakeLauncher(behaviours={"*": failed(CODE, "no such module")})
    with pytest.raises(StudyFailed, match="the first 3 trials all failed: code: no such module") as caught:
        controller(tiny_study(trials=20), home, launcher=launcher).run()
    assert "last line" in str(caught.value) and "same command again" in caught.value.hint
    assert records(home)[-1]["reason"] == "failed" and len(launcher.submitted) <= 4


def test_a_study_whose_cause_was_mended_goes_on_to_its_total(home):
    with pytest.raises(StudyFailed):
        controller(tiny_study(trials=6), home, launcher=FakeLauncher(behaviours={"*": failed(CODE)})).run()
    state = controller(tiny_study(trials=6), home).run()
    assert len(state.trials) == 6 and state.closed == "finished"
    assert state.best is not None


def test_trials_that_fail_in_different_ways_are_no_failure_of_the_study(home):
    def fail(run, attempt, spec):
        kind = {0: CODE, 1: NOT_FINITE, 2: CODE}.get(spec.trial)
        return failed(kind)(run, attempt, spec) if kind else scored(run, attempt, spec)

    state = controller(tiny_study(), home, launcher=FakeLauncher(behaviours={1: fail})).run()
    assert state.closed == "finished" and state.best.number == 3


def test_an_arm_with_a_failing_run_is_kept(home):
    state = controller(tiny_study(), home, launcher=FakeLauncher(behaviours={314: failed(CODE)})).run()
    assert state.closed == "finished"
    assert [a.status for a in state.attempts_of(state.arms["best"].runs[314])] == ["failed"]


def test_a_record_attempt_of_which_nothing_completed_is_a_failure(home):
    study = record_study("smoke", data="d", seeds=(1, 2), knobs={}, name="mine")
    launcher = FakeLauncher(behaviours={"*": failed(CODE, "no such module")})
    with pytest.raises(StudyFailed, match="none of its 2 confirmation runs completed: no such module"):
        controller(study, home, launcher=launcher).run()


# ------------------------------------------------------------------------------------------------ stopping early


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


# ------------------------------------------------------------------------------------------------ leaving and coming back


def kill_at(home, kind, count):
    """A controller that dies, as by kill -9, just after the given decision is on disk for the n-th time."""

    class Killed(BaseException):
        pass

    class Dying(Controller):
        seen = 0

        def _record(self, what, **fields):
            super()._record(what, **fields)
            self.seen += what == kind
            if self.seen == count and what == kind:
                raise Killed

    return Dying, Killed


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "kind", [ledger.OPENED, ledger.TRIAL_ASKED, ledger.SUBMITTING, ledger.SUBMITTED, ledger.ENDED, ledger.TRIAL_TOLD, ledger.ARM_ASKED]
)  # fmt: skip
def test_a_controller_killed_after_any_decision_is_continued_without_loss_or_repetition(home, kind, count):
    if (kind, count) in ((ledger.OPENED, 3), (ledger.ARM_ASKED, 3)):
        count = 1
    launcher, study = FakeLauncher(), tiny_study()
    dying, killed = kill_at(home, kind, count)
    first = controller(study, home, launcher=launcher)
    first.__class__ = dying
    with pytest.raises(killed):
        first.run()
    state = controller(study, home, launcher=launcher).run()
    assert len(state.trials) == 4 and state.closed == "finished"
    runs = [run for run, _, _ in launcher.submitted]
    assert len(runs) == len(set(runs)) == 8
    assert all([a.number for a in home.run(run).attempts()] == [1] for run in runs)
    assert all(a.status == "complete" for a in state.attempts.values())
    asked = [(r["kind"], r.get("trial"), r.get("arm")) for r in records(home) if r["kind"].endswith("_asked")]
    assert len(asked) == len(set(asked))


def killed_before_submitted(home, study, launcher):
    """Decided, and dead before the ledger heard of the job."""
    first = controller(study, home, launcher=launcher)
    dying, killed = kill_at(home, ledger.SUBMITTING, 1)
    first.__class__ = dying
    with pytest.raises(killed):
        first.run()
    (attempt,) = first.state.attempts.values()
    return attempt, home.run(attempt.run_id).attempt(1)


def test_a_job_that_was_started_before_the_ledger_heard_of_it_is_found_by_its_tag(home):
    launcher, study = FakeLauncher(), tiny_study(trials=1, confirm=None)
    attempt, _ = killed_before_submitted(home, study, launcher)
    launcher.alive[attempt.tag] = 3
    state = controller(study, home, launcher=launcher).run()
    assert launcher.submitted == []
    assert [a.job_id for a in state.attempts.values()] == ["found"]


@pytest.mark.parametrize("left", ["claim", "result"])
def test_a_job_that_ran_and_ended_unheard_is_not_run_again_under_its_number(home, left):
    launcher, study = FakeLauncher(), tiny_study(trials=1, confirm=None)
    attempt, files = killed_before_submitted(home, study, launcher)
    run = home.run(attempt.run_id)
    if left == "claim":
        protocol.write_bytes_atomically(files.claim, b"{}")
    else:
        protocol.write_result(files.result, scored(run, files, protocol.read_spec(run.spec)))
    state = controller(study, home, launcher=launcher).run()
    assert [number for _, number, _ in launcher.submitted] == ([2] if left == "claim" else [])
    assert state.trials[0].state == "complete"


def test_a_restart_holds_the_slots_of_what_still_runs(home):
    launcher, study = FakeLauncher(polls=50), tiny_study()
    dying, killed = kill_at(home, ledger.SUBMITTED, 2)
    first = controller(study, home, launcher=launcher)
    first.__class__ = dying
    with pytest.raises(killed):
        first.run()
    controller(study, home, launcher=launcher).run()
    assert launcher.most_alive == 2


def test_a_torn_last_line_of_the_ledger_is_dropped(home):
    study = tiny_study(trials=1)
    controller(study, home).run()
    with home.study("tiny").ledger.open("a") as file:
        file.write('{"kind":"tri')
    assert len(controller(tiny_study(trials=2), home).run().trials) == 2


def test_a_result_that_vanished_before_it_was_told_is_an_error_with_its_place(home):
    study = tiny_study(trials=1, confirm=None)
    dying, killed = kill_at(home, ledger.ENDED, 1)
    first = controller(study, home)
    first.__class__ = dying
    with pytest.raises(killed):
        first.run()
    (run_id,) = first.state.run_ids
    home.run(run_id).attempt(1).result.unlink()
    with pytest.raises(ProtocolError, match="missing, though the ledger says that the attempt ended"):
        controller(study, home).run()


def test_a_second_controller_of_the_study_is_refused(home):
    listener = Listener()
    with lock.held(home.study("tiny").lock), pytest.raises(StudyBusy, match=f"process {os.getpid()}"):
        controller(tiny_study(), home, listener=listener).run()
    assert listener.closed == 2


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"high": 0.2}, "space"),
        ({"settings": '"ttt.epochs" = 1'}, "configuration"),
        ({"seeds": "[7]"}, "seeds"),
    ],
)
def test_a_changed_question_is_refused(home, change, word):
    controller(tiny_study(), home).run()
    with pytest.raises(ConfigError, match=f"tiny: the {word} changed since the study was opened") as caught:
        controller(tiny_study(**change), home).run()
    assert "new name" in caught.value.hint


def test_other_data_and_another_trainer_are_refused(home):
    controller(tiny_study(), home).run()
    with pytest.raises(ConfigError, match="the data and the trainer changed"):
        controller(tiny_study(), home, manifest_sha256="other", bundle=FAKE_BUNDLE + b"#").run()
    study = tiny_study()
    objective = dataclasses.replace(study, search=dataclasses.replace(study.search, objective="sliding"))
    with pytest.raises(ConfigError, match="the objective changed"):
        controller(objective, home).run()


def test_total_slots_limits_of_time_and_confirmation_may_change(home):
    controller(tiny_study(trials=2), home).run()
    changed = tiny_study(trials=3, slots=1, confirm="[5]", resources="timeout_minutes = 5")
    state = controller(changed, home).run()
    assert len(state.trials) == 3 and list(state.arms["preset"].runs) == [5]
    assert kinds(home).count(ledger.OPENED) == 2


def test_a_record_attempt_is_not_continued_with_another_trainer(home):
    study = record_study("smoke", data="d", seeds=(1, 2), knobs={}, name="mine")
    controller(study, home).run()
    with pytest.raises(ConfigError, match="the trainer changed"):
        controller(study, home, bundle=FAKE_BUNDLE + b"#").run()


def test_the_identity_of_a_study_is_the_same_in_every_process():
    study = tiny_study()
    code = (
        "import sys; from orchestrator.study import parse_study; from orchestrator.sweep import identity_of; "
        "print(identity_of(parse_study(sys.stdin.read()), manifest_sha256='m', bundle_sha256='b'))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        input=study.source,
        capture_output=True,
        text=True,
        env=subprocess_environment(),
        check=True,
    )
    assert other.stdout.strip() == str(identity_of(study, manifest_sha256="m", bundle_sha256="b"))


class Asking(FakeLauncher):
    """Leaves a word in the study's stop file at the third submission."""

    word = ""
    path = Path()

    def submit(self, run, attempt, *, tag, resources):
        if len(self.submitted) == 2:
            self.path.write_text(self.word)
        return super().submit(run, attempt, tag=tag, resources=resources)


@pytest.mark.parametrize(
    ("word", "ends"), [("drain", {"complete"}), ("", {"complete"}), ("cancel", {"complete", "stopped"})]
)
def test_a_study_that_is_stopped_closes_and_is_continued_by_the_same_command(home, word, ends):
    launcher = Asking(polls=5)
    launcher.word, launcher.path = word, home.study("tiny").stop
    state = controller(tiny_study(trials=8), home, launcher=launcher).run()
    assert state.closed == "stopped" and len(state.trials) == 4 and not launcher.alive
    assert {a.status for a in state.attempts.values()} == ends
    assert not home.study("tiny").stop.exists()
    assert len(launcher.submitted) == 4
    again = controller(tiny_study(trials=8), home).run()
    assert again.closed == "finished" and [t.state for t in again.trials.values()] == ["complete"] * 8


def test_a_stop_that_was_meant_for_an_earlier_controller_is_forgotten(home):
    home.study("tiny").root.mkdir(parents=True)
    home.study("tiny").stop.write_text("drain")
    assert controller(tiny_study(), home).run().closed == "finished"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_leaves_the_jobs_running_and_says_how_to_go_on(home, number):
    class Signalled(FakeLauncher):
        def submit(self, run, attempt, *, tag, resources):
            job_id = super().submit(run, attempt, tag=tag, resources=resources)
            os.kill(os.getpid(), number)
            return job_id

    before = signal.getsignal(number)
    listener, launcher = Listener(), Signalled(polls=20)
    with pytest.raises(Interrupted, match="running jobs go on; the same command continues") as caught:
        controller(tiny_study(slots=1), home, launcher=launcher, listener=listener).run()
    assert caught.value.exit_code == 130 and signal.getsignal(number) is before
    assert len(launcher.alive) == 1 and any("the same command continues" in note for note in listener.notes)
    launcher.__class__ = FakeLauncher
    assert controller(tiny_study(slots=1), home, launcher=launcher).run().closed == "finished"
    assert len(launcher.submitted) == 8


@pytest.mark.parametrize("left", ["nothing", "result", "stop"])
def test_processes_that_do_not_leave_in_time_are_ended(home, monkeypatch, left):
    monkeypatch.setattr(sweep, "LEAVE_SECONDS", 0.0)

    class Orphaned(FakeLauncher):
        def is_alive(self, attempt, *, tag):
            run = home.run(attempt.root.parent.parent.name)
            if left == "result" and not attempt.result.exists():
                protocol.write_result(attempt.result, scored(run, attempt, protocol.read_spec(run.spec)))
            if left == "stop" and not attempt.stop.exists():
                home.study("tiny").stop.write_text("cancel")
            return bool(self.alive)

        def cancel(self, tag):
            self.cancelled.append(tag)
            self.alive.clear()

    study = tiny_study(trials=1, confirm=None, resources="timeout_minutes = 0.001\nmax_attempts = 1")
    launcher = Orphaned()
    if left == "nothing":
        with pytest.raises(StudyFailed, match="none of its 1 trials completed: infrastructure"):
            controller(study, home, launcher=launcher).run()
    else:
        state = controller(study, home, launcher=launcher).run()
        assert state.closed == {"result": "finished", "stop": "stopped"}[left]
    assert launcher.cancelled


# ------------------------------------------------------------------------------------------------ real processes

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fakes import FAKE_BUNDLE, MANIFEST, Listener
from orchestrator.home import Home
from orchestrator.launcher import LocalLauncher
from orchestrator.search import Search
from orchestrator.study import parse_study
from orchestrator.sweep import Controller
home, study = Home(Path(sys.argv[1])), parse_study(sys.stdin.read())
Controller(
    study, home, launcher=LocalLauncher(), search=Search(study, home.study(study.name).optuna_journal), bundle=FAKE_BUNDLE,
    code={}, data_dir=home.root, manifest_sha256=MANIFEST, progress=Listener(), mirror=Listener(), poll_seconds=0.02,
).run()
"""


def start(home, text):
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(home.root), str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        env=subprocess_environment(),
    )
    process.stdin.write(text.encode())
    process.stdin.close()
    return process


def until(condition, process, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, "it did not come about"
        time.sleep(0.01)


def test_a_controller_that_is_killed_twice_ends_with_the_same_total_and_nothing_twice(home):
    write_plans(home, {"*": {"step_seconds": 0.05}})
    text = study_text(trials=4, confirm="[42]")
    path = home.study("tiny").ledger
    for lines in (6, 14):
        with start(home, text) as process:
            until(lambda lines=lines: path.exists() and len(records(home)) >= lines, process)
            process.kill()
    with start(home, text) as process:
        assert process.wait(timeout=120) == 0
    state = Ledger(path).state()
    assert [t.state for t in state.trials.values()] == ["complete"] * 4 and state.closed == "finished"
    runs = sorted(home.runs.iterdir())
    assert len(runs) == len(state.run_ids) and len({json.dumps(t.params) for t in state.trials.values()}) == 4
    assert all([a.number for a in home.run(run.name).attempts()] == [1] for run in runs)
    starts = [
        sum(event["kind"] == protocol.START for _, event in protocol.read_lines(home.run(run.name).attempt(1).events))
        for run in runs
    ]
    assert starts == [1] * len(runs)


def test_a_real_trial_that_falls_behind_is_stopped(home):
    study = tiny_study(trials=4, confirm=None, slots=1, extra=STOP_EARLY)
    write_plans(home, {"*": {"step_seconds": 0.1}})

    class Worse(FakeSearch):
        def should_stop(self, number, step, value):
            return number == 3

    state = controller(study, home, launcher=LocalLauncher(), search=Worse(), poll_seconds=0.02).run()
    assert [t.state for t in state.trials.values()] == ["complete"] * 3 + ["pruned"]
    assert list(state.trials[3].intermediate) == [60]


def test_real_search_and_real_jobs_make_a_study(home):
    study = tiny_study(trials=3, confirm="[42]")
    search = Search(study, home.study("tiny").optuna_journal)
    state = controller(study, home, launcher=LocalLauncher(), search=search, poll_seconds=0.02).run()
    assert state.closed == "finished" and state.best.value == min(t.value for t in state.trials.values())
    assert home.study("tiny").optuna_journal.exists()


def test_a_real_job_whose_trainer_is_killed_is_run_again(home):
    write_plans(home, {"*": {"mode": "killed", "attempts": [1]}})
    state = controller(tiny_study(trials=1, confirm=None), home, launcher=LocalLauncher(), poll_seconds=0.02).run()
    assert [(a.status, a.failure) for a in state.attempts.values()] == [("failed", INFRASTRUCTURE), ("complete", None)]
