import subprocess
import sys

import pytest
from fakes import subprocess_environment

from orchestrator import ledger
from orchestrator.errors import ProtocolError, StorageError
from orchestrator.ledger import Attempt, Ledger, OpenLedger, StudyState, Trial
from trainer.protocol import INFRASTRUCTURE, NODE, PREEMPTED, read_lines


def ask(book, number, **params):
    book.append(ledger.TRIAL_ASKED, trial=number, origin="sampler", params=params, runs={1: f"run{number}"})


def tell(book, number, value, state=ledger.COMPLETE, **constraints):
    book.append(
        ledger.TRIAL_TOLD,
        trial=number,
        state=state,
        value=value,
        constraints=constraints,
        intermediate={5: 2.5},
        reason="r",
    )


def test_the_state_of_a_study_follows_from_its_records(tmp_path):
    book = Ledger(tmp_path / "ledger.jsonl")
    book.append(ledger.OPENED, source="text", digest="d", identity={"data": "x"}, caddie="0")
    ask(book, 0, a=1)
    book.append(ledger.SUBMITTING, run_id="run0", attempt=1, tag="t", resources={"slot": 0})
    book.append(ledger.SUBMITTED, run_id="run0", attempt=1, job_id="77")
    book.append(ledger.STOP_ASKED, run_id="run0", attempt=1, reason="median")
    book.append(ledger.STOP_ASKED, run_id="run0", attempt=1, reason="cancelled")
    book.append(ledger.ENDED, run_id="run0", attempt=1, status="complete", failure=None, seconds=3.0, gpus=8)
    tell(book, 0, 1.5, bytes=-1.0)
    book.append(ledger.ARM_ASKED, arm="preset", trial=0, params={"a": 1}, runs={42: "run9", 1: "run0"})
    book.append(ledger.CLOSED, reason="finished")
    state = book.state()
    assert (state.source, state.identity, state.closed) == ("text", {"data": "x"}, "finished")
    assert state.trials[0].runs == {1: "run0"} and state.trials[0].intermediate == {5: 2.5}
    assert (state.trials[0].state, state.trials[0].value, state.trials[0].reason) == ("complete", 1.5, "r")
    (attempt,) = state.attempts_of("run0")
    assert (attempt.job_id, attempt.stop_reason, attempt.status) == ("77", "median", "complete")
    assert state.run_ids == ["run0", "run9"]
    assert state.gpu_seconds == 24.0
    book.append(ledger.OPENED, source="text 2", digest="d", caddie="0")
    assert book.state().closed is None and book.state().opened_at == state.opened_at


def test_the_best_trial_is_the_lowest_feasible_one_and_the_earliest_of_equals():
    def trial(number, value, excess=0.0, state=ledger.COMPLETE):
        return Trial(
            number=number, origin="sampler", params={}, runs={}, state=state, value=value, constraints={"bytes": excess}
        )

    trials = [
        trial(0, 2.0),
        trial(1, 1.0, excess=1.0),
        trial(2, 1.5),
        trial(3, 1.5),
        trial(4, 1.1, state=ledger.PRUNED),
    ]
    assert StudyState(trials={t.number: t for t in trials}).best.number == 2
    assert StudyState().best is None


def test_a_record_is_returned_as_it_was_written(tmp_path):
    book = Ledger(tmp_path / "ledger.jsonl")
    record = book.append(ledger.CLOSED, reason="stopped")
    assert record["kind"] == ledger.CLOSED and record["reason"] == "stopped" and record["time"] > 0


def test_a_torn_last_line_is_cut_off_and_the_rest_kept(tmp_path):
    book = Ledger(tmp_path / "ledger.jsonl")
    book.drop_torn_line()
    ask(book, 0)
    with book.path.open("a") as file:
        file.write('{"kind": "trial_to')
    assert list(book.state().trials) == [0]
    book.drop_torn_line()
    ask(book, 1)
    assert list(book.state().trials) == [0, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "vote", "time": 1}\n', "unknown kind of record 'vote'"),
        ('{"time": 1}\n', "lacks or refers to the unknown 'kind'"),
        ('{"kind": "submitted", "time": 1, "run_id": "a", "attempt": 3, "job_id": "1"}\n', "refers to the unknown"),
        ('{"kind"\n{}\n', "byte 0: not a JSON object"),
        ("[]\n", "byte 0: not a JSON object"),
    ],
)
def test_a_damaged_ledger_is_refused_with_its_place(tmp_path, line, message):
    path = tmp_path / "ledger.jsonl"
    path.write_text(line)
    with pytest.raises(ProtocolError, match=message):
        Ledger(path).state()


def test_a_ledger_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        Ledger(tmp_path / "file" / "ledger.jsonl").append(ledger.CLOSED, reason="x")


APPEND = """
import resource, signal, sys
from pathlib import Path
from orchestrator.errors import StorageError
from orchestrator.ledger import CLOSED, Ledger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
book = Ledger(path)
book.append(CLOSED, reason="first")
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, resource.RLIM_INFINITY))
try:
    book.append(CLOSED, reason="second")
except StorageError as error:
    print(error, error.hint)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
book.append(CLOSED, reason="third")
"""


def test_a_disk_that_fills_up_in_the_middle_of_a_line_leaves_no_part_of_it(tmp_path):
    """A limit on the file's size cuts a write short as a full disk does."""
    path = tmp_path / "ledger.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", APPEND, str(path)],
        env=subprocess_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "No space left on device" in done.stdout and "run the command again" in done.stdout
    assert [record["reason"] for _, record in read_lines(path)] == ["first", "third"]
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([], ledger.WANTED),
        ([None], ledger.ACTIVE),
        ([("complete", None, None)], ledger.SETTLED),
        ([("failed", "code", None)], ledger.SETTLED),
        ([("failed", "infrastructure", None)], ledger.WANTED),
        ([("failed", "infrastructure", None)] * 2, ledger.SETTLED),
        ([("failed", "disk", None)] * 9, ledger.WANTED),
        ([("stopped", None, ledger.CANCELLED)] * 9, ledger.WANTED),
        ([("stopped", None, ledger.MEDIAN)], ledger.SETTLED),
        ([("failed", "infrastructure", None), ("complete", None, None)], ledger.SETTLED),
    ],
)
def test_a_run_is_wanted_again_after_what_was_not_its_own_fault(ends, expected):
    attempts = {}
    for number, end in enumerate(ends, start=1):
        status, failure, reason = end or (None, None, None)
        attempts["r", number] = Attempt(
            run_id="r", number=number, tag="t", resources={}, submitted=0.0,
            status=status, failure=failure, stop_reason=reason,
        )  # fmt: skip
    assert StudyState(attempts=attempts).standing("r", max_attempts=2) == expected


def test_an_open_ledger_holds_the_state_that_a_replay_would_give(tmp_path):
    book = OpenLedger(tmp_path / "ledger.jsonl")
    book.open()
    book.decide(ledger.OPENED, source="text", digest="d", identity={}, caddie="0")
    book.decide(ledger.TRIAL_ASKED, trial=0, origin=ledger.BY_PRESET, params={"a": 1}, runs={1: "r"})
    assert book.now == book.state() and book.decisions == 2
    with book.path.open("a") as file:
        file.write('{"kind": "trial_to')
    again = OpenLedger(book.path)
    again.open()
    assert again.now == book.now and again.decisions == 0
    assert book.path.read_bytes().endswith(b"\n")


def test_what_is_not_on_disk_has_not_been_decided(tmp_path):
    (tmp_path / "file").write_text("")
    book = OpenLedger(tmp_path / "file" / "ledger.jsonl")
    with pytest.raises(StorageError):
        book.decide(ledger.CLOSED, reason=ledger.HALTED)
    assert (book.now.closed, book.decisions) == (None, 0)


def after(*endings):
    """The state after attempts that ended so: (time, node, failure or None, whether it was refused)."""
    records = []
    for number, (seconds, node, failure, is_refused) in enumerate(endings, start=1):
        common = {"run_id": f"run{number}", "attempt": 1, "time": seconds}
        records += [
            {"kind": ledger.SUBMITTING, "tag": "t", "resources": {}, **common},
            {"kind": ledger.ENDED, "status": "failed" if failure else "complete", "failure": failure, "seconds": 1.0,
             "gpus": 8, "nodes": [node], "is_refused": is_refused, **common},
        ]  # fmt: skip
    return ledger.replay(records)


HOUR = 3600.0


@pytest.mark.parametrize(
    ("endings", "excluded"),
    [
        ([(0, "a", NODE, False)], []),
        ([(0, "a", NODE, False), (HOUR, "a", NODE, False)], ["a"]),
        ([(0, "a", NODE, False), (HOUR, "b", NODE, False)], []),
        ([(0, "a", NODE, False), (1, "a", NODE, False), (2, "a", NODE, False)], []),  # one crash, three runs
        ([(0, "a", NODE, False), (HOUR, "a", None, False), (2 * HOUR, "a", NODE, False)], []),
        ([(0, "a", NODE, False), (-HOUR, "a", NODE, False)], ["a"]),  # the clock was set back
        ([(0, "a", NODE, True)], ["a"]),
        ([(0, "a", INFRASTRUCTURE, False), (HOUR, "a", PREEMPTED, False)], []),
        ([(0, "a", NODE, True), (HOUR, "a", None, False)], ["a"]),
    ],
)
def test_a_node_is_excluded_when_it_was_refused_or_crashed_twice_with_nothing_completed_in_between(endings, excluded):
    assert after(*endings).excluded_nodes == excluded
