"""Failed runs that are attempted again because somebody asks for it."""

import pytest
from fakes import FakeLauncher, FakeSearch, Listener, failed, scored, tiny_study
from make_controller import Killed, controller, die_at, records

from orchestrator import ledger
from orchestrator.errors import ConfigError, StudyFailed
from orchestrator.oversight import ask_to_retry
from orchestrator.retries import failed_runs
from trainer import protocol
from trainer.protocol import CODE, INFRASTRUCTURE, NODE, NOT_FINITE, OUT_OF_MEMORY, OVER_CAP, TIMEOUT


@pytest.mark.parametrize("kind", [TIMEOUT, CODE, OUT_OF_MEMORY, INFRASTRUCTURE])
def test_a_confirmation_of_which_every_run_failed_is_made_once_its_cause_is_mended(home, kind):
    study = tiny_study(trials=1)
    seeds = study.confirm.seeds
    broken = FakeLauncher(behaviours=dict.fromkeys(seeds, failed(kind)))
    with pytest.raises(StudyFailed, match="none of its 2 confirmation runs completed") as caught:
        controller(study, home, launcher=broken).run()
    assert "caddie study retry tiny" in caught.value.hint
    unasked = FakeLauncher()
    with pytest.raises(StudyFailed):
        controller(study, home, launcher=unasked).run()
    assert unasked.submitted == []

    told = ask_to_retry(home, "tiny")
    assert told.splitlines() == [
        "tiny: to be attempted again; give the study's command again, it begins with them",
        *(f"  arm preset, seed {seed} ({kind})" for seed in seeds),
    ]
    listener, mended = Listener(), FakeLauncher()
    state = controller(study, home, launcher=mended, listener=listener).run()
    assert (state.closed, len(mended.submitted)) == (ledger.FINISHED, 2)
    assert [state.attempts_of(run_id)[-1].status for run_id in state.arms["preset"].runs.values()] == ["complete"] * 2
    assert f"attempted again: arm preset, seed {seeds[0]} ({kind})" in listener.notes
    assert not home.study("tiny").retry.exists()
    assert ask_to_retry(home, "tiny") == "tiny: no run failed that another attempt could bring to a score"


def test_failed_trials_are_run_again_and_told_anew_the_preset_first(home):
    study = tiny_study(trials=3, confirm=None)
    with pytest.raises(StudyFailed, match="the first 3 trials all failed"):
        controller(study, home, launcher=FakeLauncher(behaviours={"*": failed(CODE)})).run()
    ask_to_retry(home, "tiny")
    search = FakeSearch()
    state = controller(study, home, search=search).run()
    assert [(number, told) for number, told in search.told] == [(0, "complete"), (1, "complete"), (2, "complete")]
    assert search.asked == []
    assert all(trial.value is not None and not trial.reason for trial in state.trials.values())


@pytest.mark.parametrize("kind", [NOT_FINITE, OVER_CAP])
def test_what_a_run_came_to_is_not_asked_again(home, kind):
    """To draw until the loss is a number, or the file small enough, would be to choose."""
    study = tiny_study(trials=1)
    changes = {} if kind == NOT_FINITE else {"artifact_bytes": 10**8}
    controller(study, home, launcher=FakeLauncher(behaviours={study.confirm.seeds[0]: failed(kind, **changes)})).run()
    assert "no run failed that another attempt" in ask_to_retry(home, "tiny")
    assert not home.study("tiny").retry.exists()


def test_points_that_failed_by_themselves_are_left_to_the_search_unless_they_are_named(home):
    """A study whose points ran out of memory and time has learned from them; its time limit may have been the mistake."""
    study = tiny_study(trials=4, confirm=None)
    kinds = {1: OUT_OF_MEMORY, 2: TIMEOUT, 3: CODE}

    def break_some(run, attempt, spec):
        kind = kinds.get(spec.trial)
        return failed(kind)(run, attempt, spec) if kind else scored(run, attempt, spec)

    controller(study, home, launcher=FakeLauncher(behaviours={"*": break_some})).run()
    assert ask_to_retry(home, "tiny").splitlines()[1:] == [
        "  trial 3, seed 1 (code)",
        "  left to the search: 1 by out_of_memory; --failure out_of_memory takes them too",
        "  left to the search: 1 by timeout; --failure timeout takes them too",
    ]
    told = ask_to_retry(home, "tiny", kinds=[TIMEOUT])  # beside what was asked for before
    assert [line for line in told.splitlines() if "left" in line] == [
        "  left to the search: 1 by out_of_memory; --failure out_of_memory takes them too"
    ]
    state = controller(study, home).run()
    assert [trial.state for trial in state.trials.values()] == ["complete", "failed", "complete", "complete"]


def test_an_empty_file_by_hand_asks_as_the_command_does(home):
    study = tiny_study(trials=1)
    seed = study.confirm.seeds[0]
    controller(study, home, launcher=FakeLauncher(behaviours={seed: failed(CODE)})).run()
    home.study("tiny").retry.touch()
    state = controller(study, home).run()
    assert failed_runs(state, max_attempts=3) == [] and not home.study("tiny").retry.exists()


def test_the_remedy_names_the_kind_of_failure_that_all_trials_had(home):
    study = tiny_study(trials=2, confirm=None)
    with pytest.raises(StudyFailed) as caught:
        controller(study, home, launcher=FakeLauncher(behaviours={"*": failed(TIMEOUT)})).run()
    assert "`caddie study retry tiny --failure timeout`" in caught.value.hint
    diverged = tiny_study(trials=2, confirm=None, name="other")
    with pytest.raises(StudyFailed) as caught:
        controller(diverged, home, launcher=FakeLauncher(behaviours={"*": failed(NOT_FINITE)})).run()
    assert "retry" not in caught.value.hint


def test_a_finished_study_runs_its_one_failed_seed_and_nothing_else(home):
    study = tiny_study(trials=2)
    first = study.confirm.seeds[0]
    state = controller(study, home, launcher=FakeLauncher(behaviours={first: failed(TIMEOUT)})).run()
    assert state.closed == ledger.FINISHED
    failing = {run.run_id for run in failed_runs(state, max_attempts=3)}
    ask_to_retry(home, "tiny")
    launcher = FakeLauncher()
    state = controller(study, home, launcher=launcher).run()
    assert {run_id for run_id, *_ in launcher.submitted} == failing
    assert state.closed == ledger.FINISHED and failed_runs(state, max_attempts=3) == []


def test_a_controller_at_work_takes_it_up(home):
    study = tiny_study(trials=4, confirm=None, slots=1)
    said = []

    def mended(run, attempt, spec):
        if spec.trial == 2 and not said:
            said.append(ask_to_retry(home, "tiny"))
        return scored(run, attempt, spec)

    def breaks_once(run, attempt, spec):
        return failed(CODE)(run, attempt, spec) if spec.trial == 1 else mended(run, attempt, spec)

    launcher = FakeLauncher(behaviours={(1, 1): breaks_once, (1, 2): mended})
    state = controller(study, home, launcher=launcher).run()
    assert said == ["tiny: to be attempted again; its controller takes it up\n  trial 1, seed 1 (code)"]
    assert [trial.state for trial in state.trials.values()] == ["complete"] * 4
    assert len(launcher.submitted) == 5


@pytest.mark.parametrize("kind", [ledger.OPENED, ledger.RETRIED, ledger.SUBMITTING, ledger.ENDED])
def test_a_controller_killed_under_way_retries_each_run_once(home, kind):
    study = tiny_study(trials=1)
    broken = FakeLauncher(behaviours=dict.fromkeys(study.confirm.seeds, failed(TIMEOUT)))
    with pytest.raises(StudyFailed):
        controller(study, home, launcher=broken).run()
    ask_to_retry(home, "tiny")
    launcher = FakeLauncher()
    with pytest.raises(Killed):
        die_at(controller(study, home, launcher=launcher), kind).run()
    state = controller(study, home, launcher=launcher).run()
    assert len(launcher.submitted) == 2 and state.closed == ledger.FINISHED
    assert sum(record["kind"] == ledger.RETRIED for record in records(home)) == 1


def test_a_retry_has_all_its_attempts_again_and_forgets_what_was_held_against_nodes(home):
    study = tiny_study(trials=1, resources="max_attempts = 2")

    class OnNode(FakeLauncher):
        def nodes_of(self, attempt, *, tag):
            return ("node1",)

    seed = study.confirm.seeds[0]
    controller(study, home, launcher=OnNode(behaviours={seed: failed(NODE)})).run()
    ask_to_retry(home, "tiny")
    launcher = OnNode(behaviours={(seed, 3): failed(INFRASTRUCTURE)})
    state = controller(study, home, launcher=launcher).run()
    run_id = state.arms["preset"].runs[seed]
    assert [attempt.failure for attempt in state.attempts_of(run_id)] == [NODE, NODE, INFRASTRUCTURE, None]
    assert state.excluded_nodes == []


def test_a_study_that_nobody_began_cannot_be_asked(home):
    with pytest.raises(ConfigError, match="tiny"):
        ask_to_retry(home, "tiny")
    assert not home.study("tiny").retry.exists()


def test_a_trial_whose_result_holds_no_score_has_no_failed_run(home):
    study = tiny_study(trials=2, confirm=None)

    def without_score(run, attempt, spec):
        return scored(run, attempt, spec, scores={}) if spec.trial == 1 else scored(run, attempt, spec)

    state = controller(study, home, launcher=FakeLauncher(behaviours={"*": without_score})).run()
    assert state.trials[1].state == protocol.FAILED and failed_runs(state, max_attempts=3) == []
