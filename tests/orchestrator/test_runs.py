import dataclasses

import pytest
from fakes import FAKE_BUNDLE, MANIFEST, scored

from orchestrator.errors import ProtocolError
from orchestrator.home import Home
from orchestrator.presets import load_preset
from orchestrator.runs import RESUMABLE, RunRequest, RunStore, run_id_of, without_resuming
from trainer import protocol
from trainer.config import to_mapping, with_knobs
from trainer.protocol import EventLog, Failure

REQUEST = RunRequest(
    preset="smoke", config=load_preset("smoke"), seed=1, data_dir="/data", manifest_sha256=MANIFEST, study="a", trial=3
)


@pytest.fixture
def store(tmp_path):
    return RunStore(Home(tmp_path))


@pytest.fixture
def run(store):
    return store.plan(REQUEST, bundle=FAKE_BUNDLE, code={"git_sha": "abc"})


def end(run, number, status, failure=None):
    attempt = run.attempt(number)
    result = scored(run, attempt, protocol.read_spec(run.spec), status=status, failure=failure)
    protocol.write_result(attempt.result, result)


def test_the_same_question_is_the_same_run_whoever_asks(store, run):
    other = dataclasses.replace(REQUEST, study="b", trial=None, preset="copy of smoke", data_dir="/elsewhere")
    assert store.plan(other, bundle=FAKE_BUNDLE, code={}).root == run.root
    assert protocol.read_spec(run.spec).study == "a"
    assert store.ids() == [run.run_id]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"replicate": 1},
        {"manifest_sha256": "other"},
        {"config": with_knobs(REQUEST.config, {"ttt.lr": 0.5})},
    ],
)
def test_another_question_is_another_run(change):
    assert run_id_of(dataclasses.replace(REQUEST, **change), "bundle") != run_id_of(REQUEST, "bundle")
    assert run_id_of(REQUEST, "another bundle") != run_id_of(REQUEST, "bundle")


def test_a_planned_run_holds_its_spec_and_the_bundle_that_it_names(run):
    spec = protocol.read_spec(run.spec)
    assert (spec.run_id, spec.seed, spec.study, spec.trial, spec.code) == (run.run_id, 1, "a", 3, {"git_sha": "abc"})
    assert protocol.sha256_of(run.bundle) == spec.bundle_sha256


def test_the_state_of_a_run_is_read_off_its_files(store, run):
    assert store.state(run.run_id) == "planned"
    assert store.deciding_attempt(run.run_id) is None
    run.attempt(1).root.mkdir(parents=True)
    assert store.state(run.run_id) == "queued"
    run.attempt(1).events.write_text("")
    assert store.state(run.run_id) == "running"
    end(run, 1, protocol.FAILED, Failure(kind=protocol.INFRASTRUCTURE, message="lost"))
    assert store.state(run.run_id) == "failed"
    run.attempt(2).root.mkdir()
    assert store.state(run.run_id) == "queued"
    end(run, 2, protocol.COMPLETE)
    assert store.state(run.run_id) == "complete"


def test_a_complete_attempt_stands_for_the_run_whatever_came_after(store, run):
    end(run, 1, protocol.COMPLETE)
    end(run, 2, protocol.STOPPED)
    assert store.result(run.run_id).attempt == 1
    assert store.deciding_attempt(run.run_id).number == 1


def test_without_a_complete_attempt_the_latest_stands(store, run):
    assert store.result(run.run_id) is None
    end(run, 1, protocol.FAILED)
    end(run, 10, protocol.STOPPED)
    assert store.result(run.run_id).attempt == 10
    assert store.deciding_attempt(run.run_id).number == 10


def test_an_attempt_that_was_moved_away_is_no_attempt(store, run):
    end(run, 2, protocol.FAILED)
    end(run, 10, protocol.FAILED)
    run.attempt(2).root.rename(run.attempt(2).root.with_name("2.damaged"))
    assert [attempt.number for attempt in run.attempts()] == [10]


def test_events_are_read_on_from_an_offset_and_a_damaged_line_is_refused(store, run):
    attempt = run.attempt(1)
    events = protocol.EventLog(attempt.events)
    events.metrics(1, 0.1, train_loss=3.0)
    ((offset, first),) = store.events(attempt)
    assert protocol.values_of(first, protocol.TRAIN_LOSS) == [3.0]
    assert protocol.values_of(first, protocol.TRAIN_LOSS, "grad_norm") is None
    events.emit(protocol.PHASE, name="train")
    ((_, second),) = store.events(attempt, offset)
    assert protocol.values_of(second, protocol.TRAIN_LOSS) is None
    with attempt.events.open("a") as file:
        file.write("}{\n")
    with pytest.raises(ProtocolError, match="not a JSON object"):
        list(store.events(attempt))


def write_metrics(attempt, steps, *, restored=None):
    log = EventLog(attempt.events)
    if restored:
        step, attempts = restored
        log.emit(protocol.CHECKPOINT, state=protocol.RESTORED, step=step, train_seconds=1.0, attempts=attempts)
    for step in steps:
        log.metrics(step, step * 0.1, train_loss=attempt.number)


def test_a_resumed_runs_curve_is_that_of_its_attempts_each_as_far_as_the_next_continues_it(store, run):
    write_metrics(run.attempt(1), range(1, 7))  # wrote no checkpoint after the fourth step
    write_metrics(run.attempt(2), [])  # never began
    write_metrics(run.attempt(3), [5, 6, 7], restored=(4, ["1"]))
    write_metrics(run.attempt(4), [8, 9], restored=(7, ["1", "3"]))
    curve = [(e["step"], e["values"]["train_loss"]) for e in store.curve(run.attempt(4)) if e["kind"] == "metric"]
    assert curve == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 3), (6, 3), (7, 3), (8, 4), (9, 4)]
    assert [e["step"] for e in store.curve(run.attempt(1))] == [1, 2, 3, 4, 5, 6]


def test_what_a_run_computes_does_not_depend_on_whether_it_may_be_resumed():
    resumable = to_mapping(with_knobs(REQUEST.config, {RESUMABLE: True}))
    assert resumable != to_mapping(REQUEST.config)
    assert without_resuming(resumable) == without_resuming(to_mapping(REQUEST.config))
