import dataclasses
import io

import pytest
from make_study import Maker, make_record, make_study, result_of, sampled_params, search, with_event_line
from rich.console import Console

from orchestrator import ledger
from orchestrator.allocation import Allocation
from orchestrator.claims import claim_for, make_claim
from orchestrator.evidence import read_study
from orchestrator.progress import (
    HEARTBEAT_SECONDS,
    TAIL_BYTES,
    Progress,
    RunningRun,
    _PlainLines,
    duration_text,
    render,
    running_text,
    runs_asked,
    snapshot,
    summary_text,
    tail_events,
)
from orchestrator.runs import RunStore
from trainer import protocol

NAME = "wd-qk-ttt-smoke"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def look(home, name=NAME, **options):
    study, state = read_study(home, name)
    return study, snapshot(study, RunStore(home), state, **options)


def test_a_running_study_shows_its_runs_with_step_loss_and_owner(tmp_path):
    home = make_study(tmp_path, stage="search")
    _, now = look(home)
    assert [(run.owner, run.seed, run.phase, run.step, run.steps) for run in now.running] == [
        ("trial 6", 1, "train", 40, 120), ("trial 7", 1, "train", 60, 120),
    ]  # fmt: skip
    assert all(run.loss is not None and 3 < run.loss < 7 for run in now.running)
    assert (now.complete, now.failed, now.stopped, now.ended) == (4, 1, 1, 6)
    assert now.best is not None
    assert now.best.number == 1


def test_time_left_is_the_median_of_complete_runs_times_the_runs_to_go_over_the_slots(tmp_path):
    home = make_study(tmp_path, stage="search")
    _, state = read_study(home, NAME)
    started = max(attempt.submitted for attempt in state.attempts.values())
    study, now = look(home, now=started)
    # 8 trials and 2 x 3 seeds less 6 ended runs; both running ones have just begun; 39.4 s a run on two slots
    assert (now.runs_asked, study.resources.slots) == (14, 2)
    assert now.seconds_left == pytest.approx(39.4 * 8 / 2)


def test_time_left_is_unknown_before_a_run_has_ended_and_none_after_the_end(tmp_path):
    maker = Maker(tmp_path / "a")
    [run] = maker.ask_trial(0, sampled_params(maker.study, 0)).values()
    maker.begin(run, steps=5)
    assert look(maker.home)[1].seconds_left is None
    assert look(make_study(tmp_path / "b"))[1].seconds_left is None


def test_a_job_without_events_is_queued(tmp_path):
    maker = Maker(tmp_path)
    [run] = maker.ask_trial(0, sampled_params(maker.study, 0)).values()
    maker.submit(run)
    [running] = look(maker.home)[1].running
    assert (running.phase, running.step, running.loss) == ("queued", 0, None)


def test_what_waits_in_a_queue_has_done_nothing_and_is_not_counted_as_running(tmp_path):
    """Submitted an hour ago; begun a minute ago, or not yet."""
    maker = Maker(tmp_path)
    done, begun, waiting = (maker.ask_trial(n, sampled_params(maker.study, n))[1] for n in range(3))
    maker.complete(done)
    median = maker.ledger.state().attempts_of(done.run_id)[0].seconds
    files, now = maker.submit(begun), maker.clock + 3600
    maker.submit(waiting)
    make_claim(files, dataclasses.replace(claim_for(Allocation()), began=now - 20))
    study, found = look(maker.home, now=now)
    assert [(run.phase, run.seconds) for run in found.running] == [("start", 20), ("queued", 3600)]
    assert found.seconds_left == pytest.approx((13 * median - 20) / study.resources.slots)
    assert summary_text(study, found).startswith(f"{NAME}: 1 of 14 runs done, 1 running, 1 queued, ")
    assert running_text(found.running[1]) == "trial 2, seed 1: queued, 1 h 00 min"


def test_a_best_point_that_is_the_preset_is_confirmed_once(tmp_path):
    maker = Maker(tmp_path)
    search(maker, 1)
    assert runs_asked(maker.study, maker.ledger.state()) == 8 + 6
    maker.ask_arm("preset", 0, maker.study.preset_params(), (42, 314, 999))
    assert runs_asked(maker.study, maker.ledger.state()) == 8 + 3


def test_a_record_attempt_asks_only_its_seeds(tmp_path):
    _, now = look(make_record(tmp_path), "record-smoke")
    assert (now.runs_asked, now.complete, now.closed) == (3, 3, "finished")


def test_only_the_end_of_a_long_event_file_is_read_and_damage_is_forgiven(tmp_path):
    home = make_study(tmp_path, stage="search")
    _, state = read_study(home, NAME)
    run_id = next(attempt.run_id for attempt in state.attempts.values() if attempt.status is None)
    attempt = home.run(run_id).attempt(1)
    for step in range(1000):
        protocol.append_line(
            attempt.events,
            {"kind": "metric", "t": 1.0, "step": step, "train_seconds": 1.0, "values": {"train_loss": 2.0}},
        )
    with_event_line(attempt, b'broken\n[1]\n{"kind": "metric", "step": 77')
    events = list(tail_events(attempt))
    assert 0 < len(events) < TAIL_BYTES / 50  # a line of this file has more than fifty bytes
    assert look(home)[1].running[0].step == 999


def test_runs_that_another_study_has_completed_count_from_the_start(tmp_path):
    maker = Maker(tmp_path)
    asked = maker.ask_trial(0, sampled_params(maker.study, 0)) | maker.ask_arm("preset", 0, {}, (42, 314))
    assert look(maker.home)[1].complete == 0
    for run in (asked[1], asked[42]):
        protocol.write_result(run.attempt(1).result, result_of(run, 1))
    assert look(maker.home)[1].complete == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_read_like_a_clock(seconds, text):
    assert duration_text(seconds) == text


def test_the_summary_is_one_line(tmp_path):
    study, now = look(make_study(tmp_path, stage="search"), now=0.0)
    assert summary_text(study, now) == (
        f"{NAME}: 4 of 14 runs done, 1 failed, 1 stopped, 2 running, best 2.02360 (trial 1), about 2 min 38 s left"
    )


def test_the_table_names_the_best_point_and_what_runs(tmp_path):
    study, now = look(make_study(tmp_path, stage="search"))
    console = Console(file=io.StringIO(), width=120)
    console.print(render(study, now))
    text = console.file.getvalue()
    assert "trial 7" in text
    assert "60 of 120" in text
    assert "best so far: trial 1, 2.02360" in text
    assert "model.qk_gain = " in text


# ── plain lines ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_plain_lines_come_with_changes_only(tmp_path):
    maker, stream = Maker(tmp_path), io.StringIO()
    progress = Progress(maker.study, maker.store, stream)
    [run] = maker.ask_trial(0, sampled_params(maker.study, 0)).values()
    progress.show(maker.ledger.state())
    first = stream.getvalue()
    assert first.startswith("trial 0 (preset): optim.muon_weight_decay = 0.09")
    progress.show(maker.ledger.state())
    assert stream.getvalue() == first
    result = maker.complete(run)
    maker.tell(0, ledger.COMPLETE, value=result.scores["ttt"].bpb)
    progress.show(maker.ledger.state())
    news = stream.getvalue()[len(first) :].splitlines()
    assert news[0] == "trial 0, seed 1: complete after 39 s"
    assert news[1].startswith("new best: trial 0, 2.0")
    assert "1 of 14 runs done" in news[2]
    progress.close()


def test_plain_lines_tell_why_a_run_failed_and_that_the_study_ended(tmp_path):
    maker, stream = Maker(tmp_path), io.StringIO()
    [run] = maker.ask_trial(0, sampled_params(maker.study, 0)).values()
    maker.fail(run, protocol.OUT_OF_MEMORY, "CUDA out of memory")
    maker.append(ledger.CLOSED, reason="failed")
    Progress(maker.study, maker.store, stream).show(maker.ledger.state())
    assert "trial 0, seed 1: failed (out_of_memory) after 9 s" in stream.getvalue()
    assert "study failed" in stream.getvalue()


def test_plain_lines_have_a_heartbeat(tmp_path, monkeypatch):
    study, now = look(make_study(tmp_path, stage="search"))
    _, state = read_study(make_study(tmp_path / "again", stage="search"), NAME)
    stream, clock = io.StringIO(), [1000.0]
    monkeypatch.setattr("orchestrator.progress.time.monotonic", lambda: clock[0])
    lines = _PlainLines(stream)
    lines.show(study, state, now)
    spoken = stream.getvalue()
    clock[0] += HEARTBEAT_SECONDS - 1
    lines.show(study, state, now)
    assert stream.getvalue() == spoken
    clock[0] += 1
    lines.show(study, state, now)
    told = stream.getvalue().removeprefix(spoken).splitlines()
    assert told == [*map(running_text, now.running), summary_text(study, now)]
    assert told[0].startswith("trial 6, seed 1: train, step 40 of 120, loss ")


def test_a_script_has_the_step_of_its_log_and_no_plan():
    run = RunningRun(
        owner="arm preset", seed=42, run_id="a", phase="after sliding", step=40, steps=0, loss=4.76321, seconds=185.0
    )
    assert running_text(run) == "arm preset, seed 42: after sliding, step 40, loss 4.7632, 3 min 05 s"


def test_a_note_is_a_line_of_its_own(tmp_path):
    maker, stream = Maker(tmp_path), io.StringIO()
    Progress(maker.study, maker.store, stream).note("the same command continues it")
    assert stream.getvalue() == "the same command continues it\n"


def test_a_terminal_gets_the_live_table_and_notes_above_it(tmp_path):
    home, stream = make_study(tmp_path, stage="search"), Terminal()
    study, state = read_study(home, NAME)
    progress = Progress(study, RunStore(home), stream)
    progress.show(state)
    progress.note("[brackets] stay")
    progress.close()
    assert "4 of 14 runs done" in stream.getvalue()
    assert "[brackets] stay" in stream.getvalue()


def test_a_damaged_ledger_state_does_not_end_the_display(tmp_path):
    home, stream = make_study(tmp_path, stage="search"), io.StringIO()
    study, state = read_study(home, NAME)
    for attempt in state.attempts.values():
        home.run(attempt.run_id).attempt(attempt.number).events.unlink(missing_ok=True)
    Progress(study, RunStore(home), stream).show(state)
    assert "2 queued" in stream.getvalue()


def test_the_chunks_of_test_time_training_are_not_steps(tmp_path):
    maker = Maker(tmp_path)
    [run] = maker.ask_trial(0, sampled_params(maker.study, 0)).values()
    attempt = maker.begin(run, steps=40)
    event = {
        "kind": protocol.METRIC,
        "t": 50.0,
        "step": 3,
        "train_seconds": 9.0,
        "values": {"ttt_bpb": 1.2, "ttt_chunk": 3},
    }
    protocol.append_line(attempt.events, event)
    [running] = look(maker.home)[1].running
    assert running.step == 40 and running.loss is not None and running.loss > 2
