import json
from dataclasses import replace
from pathlib import Path

import pytest
from make_study import Maker, make_record, make_study, put_verdict, sampled_params, with_event_line

from orchestrator.errors import ConfigError
from orchestrator.evidence import UNREADABLE, gather, read_curves, study_names
from orchestrator.tables import attempts_table
from trainer import protocol
from trainer.protocol import EventLog

NAME = "wd-qk-ttt-smoke"


def test_a_closed_study_has_both_arms_the_best_first(tmp_path):
    evidence = gather(make_study(tmp_path), NAME)
    assert [arm.name for arm in evidence.arms] == ["best", "preset"]
    assert [run.seed for run in evidence.arms[0].runs] == [42, 314, 999]
    assert evidence.improvement is not None
    assert evidence.problems == ()


def test_every_score_names_the_result_that_it_was_read_from(tmp_path):
    home = make_study(tmp_path)
    for run in gather(home, NAME).runs:
        assert (home.root / run.source).is_file()


def test_a_run_with_two_attempts_is_one_run_and_two_started_attempts(tmp_path):
    evidence = gather(make_study(tmp_path), NAME)
    run = evidence.trials[2].runs[0]
    attempts = [attempt for attempt in evidence.attempts if attempt.run_id == run.run_id]
    assert [(attempt.number, attempt.status, attempt.failure) for attempt in attempts] == [
        (1, "failed", "infrastructure"), (2, "complete", ""),
    ]  # fmt: skip
    assert run.source.endswith("attempts/2/result.json")
    assert attempts[0].owners == ("trial 2, seed 1",)


def test_a_failed_and_a_stopped_run_keep_their_reasons(tmp_path):
    trials = gather(make_study(tmp_path), NAME).trials
    assert (trials[3].runs[0].state, trials[3].runs[0].reason) == ("failed", "out_of_memory: CUDA out of memory")
    assert trials[5].runs[0].state == "stopped"
    assert "above the median" in trials[5].runs[0].reason
    assert trials[3].runs[0].bpb("ttt") is None


def test_runs_that_still_go_on_are_running(tmp_path):
    trials = gather(make_study(tmp_path, stage="search"), NAME).trials
    assert [trial.runs[0].state for trial in trials[-2:]] == ["running", "running"]


def test_a_run_that_a_closed_study_never_started_says_so(tmp_path):
    maker = Maker(tmp_path)
    maker.ask_trial(0, sampled_params(maker.study, 0))
    maker.append("closed", reason="stopped")
    [run] = gather(maker.home, NAME).runs
    assert (run.state, run.reason) == ("planned", "never started")


def test_gains_and_gaps_are_differences_of_stages(tmp_path):
    run = gather(make_study(tmp_path), NAME).arms[0].runs[0]
    assert run.ttt_gain == pytest.approx(0.008)
    assert run.quantization_gap == pytest.approx(0.019)


def test_a_damaged_result_is_named_and_its_run_stays_visible(tmp_path):
    home = make_study(tmp_path)
    run = gather(home, NAME).arms[0].runs[1]
    (home.root / run.source).write_text("{")
    evidence = gather(home, NAME)
    assert evidence.arms[0].runs[1].state == UNREADABLE
    assert len(evidence.problems) == 1
    assert run.source in evidence.problems[0]
    assert len(evidence.arms[0].values("ttt")) == 2


def test_a_curve_ends_before_a_damaged_line_and_the_place_is_reported(tmp_path):
    home = make_study(tmp_path)
    run = gather(home, NAME).arms[0].runs[0]
    with_event_line(home.run(run.run_id).attempt(1), b"not json\n")
    curves, problems = read_curves(home, gather(home, NAME))
    assert len(curves) == len(gather(home, NAME).runs)
    assert len(problems) == 1
    assert "not a JSON object" in problems[0]
    assert curves[0].steps[0] == 1
    assert len(curves[0].steps) == len(curves[0].losses) == len(curves[0].train_seconds)


def test_curves_leave_out_a_run_whose_result_is_damaged(tmp_path):
    home = make_study(tmp_path)
    run = gather(home, NAME).arms[0].runs[1]
    (home.root / run.source).write_text("{")
    evidence = gather(home, NAME)
    curves, problems = read_curves(home, evidence)
    assert run.run_id not in {curve.run.run_id for curve in curves}
    assert problems == []


def test_a_record_study_has_one_arm_and_no_trials(tmp_path):
    evidence = gather(make_record(tmp_path), "record-smoke")
    assert (len(evidence.arms), evidence.trials, evidence.improvement) == (1, (), None)


def test_seconds_are_split_by_whether_a_gpu_was_used(tmp_path):
    evidence = gather(make_study(tmp_path), NAME)
    assert evidence.gpu_seconds == 0
    assert evidence.cpu_run_seconds == pytest.approx(sum(a.seconds for a in evidence.state.attempts.values()))


def test_an_unknown_study_is_refused_with_the_known_ones(tmp_path):
    home = make_study(tmp_path)
    with pytest.raises(ConfigError, match="no study 'wd'") as error:
        gather(home, "wd")
    assert error.value.hint == f"there are: {NAME}"
    assert study_names(home) == [NAME]


def test_an_empty_home_says_that_there_is_no_study_yet(tmp_path: Path):
    from orchestrator.home import Home

    with pytest.raises(ConfigError) as error:
        gather(Home(tmp_path), "wd")
    assert error.value.hint == "there are: none yet"


def test_a_run_is_verified_while_its_result_is_the_one_that_was_checked(tmp_path):
    home = make_study(tmp_path)
    run = gather(home, NAME).arms[0].runs[0]
    assert (run.verified, run.verification) == ("", "")
    put_verdict(home, run, "passed")
    run = gather(home, NAME).arms[0].runs[0]
    assert run.verified == "passed"
    assert (home.root / run.verification) == home.run(run.run_id).verify
    result = home.root / run.source
    result.write_text(result.read_text().replace('"steps": 120', '"steps": 121'))
    assert gather(home, NAME).arms[0].runs[0].verified == ""


def test_a_damaged_verification_is_named_and_its_run_keeps_its_scores(tmp_path):
    home = make_study(tmp_path)
    run = gather(home, NAME).arms[0].runs[0]
    home.run(run.run_id).verify.write_text("{")
    evidence = gather(home, NAME)
    assert [str(home.run(run.run_id).verify) in problem for problem in evidence.problems] == [True]
    assert evidence.arms[0].runs[0].bpb("ttt") == run.bpb("ttt")


def resumed(home, run, earlier):
    """Say in the result of the run's last attempt what it continued."""
    path = home.run(run.run_id).attempts()[-1].result
    protocol.write_result(path, replace(protocol.read_result(path), resumed_from=earlier))


@pytest.mark.parametrize(
    ("earlier", "began"),
    [({}, "attempt 2 began from scratch"), ({"1": 12.34}, "went on after 12.3 s of attempt 1")],
)
def test_a_later_attempt_says_how_it_began_in_the_list_of_started_runs(tmp_path, earlier, began):
    home = make_study(tmp_path)
    run = gather(home, NAME).trials[2].runs[0]
    resumed(home, run, earlier)
    evidence = gather(home, NAME)
    attempts = [attempt for attempt in evidence.attempts if attempt.run_id == run.run_id]
    assert [attempt.began for attempt in attempts] == ["", began]
    assert any(cell == began for row in attempts_table(evidence).rows for cell in row)


def test_a_record_run_that_was_begun_again_warns_of_it(tmp_path):
    maker = Maker(tmp_path)
    (run,) = maker.ask_arm("preset", 0, sampled_params(maker.study, 0), (42,)).values()
    maker.fail(run, "infrastructure", "the node went away")
    maker.complete(run, number=2)
    (arm,) = gather(maker.home, NAME).arms
    assert arm.runs[0].warned == ("attempt 2 began from scratch",)


def test_the_curve_of_a_resumed_run_is_whole(tmp_path):
    home = make_study(tmp_path)
    evidence = gather(home, NAME)
    run = evidence.trials[2].runs[0]
    second = home.run(run.run_id).attempts()[-1]
    events = second.events.read_bytes()
    steps = next(c.steps for c in read_curves(home, evidence)[0] if c.run == run)
    assert steps[0] < 30 < steps[-1]
    half = [line for line in events.splitlines(keepends=True) if json.loads(line).get("step", 99) > 20]
    second.events.write_bytes(b"")
    EventLog(second.events).emit(protocol.CHECKPOINT, state=protocol.RESTORED, step=20, attempts=["1"])
    with second.events.open("ab") as file:
        file.writelines(half)
    curve = next(c for c in read_curves(home, evidence)[0] if c.run == run)
    assert curve.steps == steps
