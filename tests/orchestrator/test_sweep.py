import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import (
    UNCHECKED,
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
from make_controller import Killed, controller, die_at, fill_disk_at, records

from orchestrator import ledger, lock
from orchestrator.errors import StorageError, StudyBusy, StudyFailed
from orchestrator.home import Home
from orchestrator.launcher import LocalLauncher
from orchestrator.ledger import Ledger
from orchestrator.record_attempt import record_study
from orchestrator.runs import without_resuming
from orchestrator.search import Search
from orchestrator.study_file import parse_study
from trainer import protocol
from trainer.protocol import CODE, INFRASTRUCTURE, NOT_FINITE, OVER_CAP

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
    launcher, search = FakeLauncher(), FakeSearch(point=lambda _: {"optim.muon_weight_decay": 0.09, "ttt.lr": 0.002})
    state = controller(tiny_study(trials=2, confirm=None), home, launcher=launcher, search=search).run()
    assert state.trials[0].runs == state.trials[1].runs
    assert len(launcher.submitted) == 1


def test_a_trial_may_go_on_from_a_checkpoint_and_a_record_of_the_same_point_and_seed_is_made_in_one_go(home):
    state = controller(tiny_study(seeds="[42]", trials=1), home).run()
    runs = [owner.runs[42] for owner in (state.trials[0], state.arms["preset"])]
    configs = [protocol.read_spec(home.run(run_id).spec).config for run_id in runs]
    assert [config["runtime"]["resumable"] for config in configs] == [True, False]
    assert without_resuming(configs[0]) == without_resuming(configs[1])


def test_a_result_that_another_study_left_is_reused(home):
    controller(tiny_study(), home).run()
    launcher = FakeLauncher()
    state = controller(tiny_study(name="other"), home, launcher=launcher).run()
    assert launcher.submitted == [] and state.attempts == {} and state.closed == "finished"
    assert all(trial.value is not None for trial in state.trials.values())


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


def test_a_point_that_makes_no_configuration_is_told_without_a_run(home):
    def point(number):
        return {**FakeSearch().point(number), "evaluation.stride": 64 if number != 1 else 65}

    state = controller(tiny_study(confirm=None), home, search=FakeSearch(point=point)).run()
    assert (state.trials[1].state, state.trials[1].runs) == ("failed", {})
    assert state.trials[1].reason.startswith("config: ") and "65" in state.trials[1].reason


def test_a_point_that_makes_no_configuration_is_told_after_a_kill_too(home):
    def point(number):
        return {**FakeSearch().point(number), "evaluation.stride": 64 if number != 1 else 65}

    study = tiny_study(confirm=None)
    with pytest.raises(Killed):
        die_at(controller(study, home, search=FakeSearch(point=point)), ledger.TRIAL_ASKED, 2).run()
    state = controller(study, home, search=FakeSearch(point=point)).run()
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


# ------------------------------------------------------------------------------------------------ leaving and coming back


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "kind", [ledger.OPENED, ledger.TRIAL_ASKED, ledger.SUBMITTING, ledger.SUBMITTED, ledger.ENDED, ledger.TRIAL_TOLD, ledger.ARM_ASKED]
)  # fmt: skip
def test_a_controller_killed_after_any_decision_is_continued_without_loss_or_repetition(home, kind, count):
    if (kind, count) in ((ledger.OPENED, 3), (ledger.ARM_ASKED, 3)):
        count = 1
    launcher, study = FakeLauncher(), tiny_study()
    with pytest.raises(Killed):
        die_at(controller(study, home, launcher=launcher), kind, count).run()
    state = controller(study, home, launcher=launcher).run()
    assert len(state.trials) == 4 and state.closed == "finished"
    runs = [run for run, _, _ in launcher.submitted]
    assert len(runs) == len(set(runs)) == 8
    assert all([a.number for a in home.run(run).attempts()] == [1] for run in runs)
    assert all(a.status == "complete" for a in state.attempts.values())
    asked = [(r["kind"], r.get("trial"), r.get("arm")) for r in records(home) if r["kind"].endswith("_asked")]
    assert len(asked) == len(set(asked))


def test_a_disk_that_is_full_at_any_decision_ends_the_controller_and_nothing_is_lost(tmp_path):
    study = tiny_study(trials=2, confirm="[42]")
    whole = Home(tmp_path / "whole")
    controller(study, whole).run()
    expected = [trial.params for trial in Ledger(whole.study("tiny").ledger).state().trials.values()]
    for number in range(len(records(whole))):
        home, launcher = Home(tmp_path / str(number)), FakeLauncher()
        with pytest.raises(StorageError, match="ledger.jsonl: cannot be written: No space left") as caught:
            fill_disk_at(controller(study, home, launcher=launcher), number).run()
        assert (caught.value.exit_code, "run the command again" in caught.value.hint) == (6, True)
        state = controller(study, home, launcher=launcher).run()
        assert [trial.params for trial in state.trials.values()] == expected and state.closed == "finished"
        runs = [run for run, _, _ in launcher.submitted]
        assert len(runs) == len(set(runs)) == len(state.run_ids)
        assert [a.status for a in state.attempts.values()] == ["complete"] * len(runs)


def test_a_torn_last_line_of_the_ledger_is_dropped(home):
    study = tiny_study(trials=1)
    controller(study, home).run()
    with home.study("tiny").ledger.open("a") as file:
        file.write('{"kind":"tri')
    assert len(controller(tiny_study(trials=2), home).run().trials) == 2


def test_a_second_controller_of_the_study_is_refused(home):
    listener = Listener()
    with lock.held(home.study("tiny")), pytest.raises(StudyBusy, match=f"process {os.getpid()}"):
        controller(tiny_study(), home, listener=listener).run()
    assert listener.closed == 2


def test_total_slots_limits_of_time_and_confirmation_may_change(home):
    controller(tiny_study(trials=2), home).run()
    changed = tiny_study(trials=3, slots=1, confirm="[5]", resources="timeout_minutes = 5")
    state = controller(changed, home).run()
    assert len(state.trials) == 3 and list(state.arms["preset"].runs) == [5]
    assert [r["kind"] for r in records(home)].count(ledger.OPENED) == 2


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


# ------------------------------------------------------------------------------------------------ real processes

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fakes import FAKE_BUNDLE, MANIFEST, Listener
from orchestrator.home import Home
from orchestrator.launcher import LocalLauncher
from orchestrator.search import Search
from orchestrator.study_file import parse_study
from orchestrator.sweep import Controller
home, study = Home(Path(sys.argv[1])), parse_study(sys.stdin.read())
Controller(
    study, home, launcher=LocalLauncher(), search=Search(study, home.study(study.name).optuna_journal), pack=lambda config: FAKE_BUNDLE,
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
    text = study_text(trials=4, confirm="[42]", resources=UNCHECKED)
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


def test_real_search_and_real_jobs_make_a_study(home):
    study = tiny_study(trials=3, confirm="[42]")
    search = Search(study, home.study("tiny").optuna_journal)
    state = controller(study, home, launcher=LocalLauncher(), search=search, poll_seconds=0.02).run()
    assert state.closed == "finished" and state.best.value == min(t.value for t in state.trials.values())
    assert home.study("tiny").optuna_journal.exists()
