"""The main path as a user goes it: data, study, report, MLflow; from another directory, in a home with a space in its name."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator import ledger
from orchestrator.home import Home
from tests.end_to_end.micro import (
    DATA,
    NAME,
    TRIALS,
    caddie,
    command,
    end,
    environment,
    require_decided_once,
    start,
    state,
    until,
    write_study,
)
from tests.trainer.make_data import VOCAB_SIZE, texts, write_jsonl
from trainer import protocol
from trainer.protocol import COMPLETE, TTT, read_result

HELP_SECONDS = 0.3


@dataclass(frozen=True)
class Visit:
    """A user's directory, the home below it, and what the study's command printed."""

    cwd: Path
    home: Home
    table: str


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Visit:
    """Data prepared and a study run, by a relative CADDIE_HOME with a space in it."""
    cwd = tmp_path_factory.mktemp("somewhere else")
    home = Home(cwd / "my runs")
    corpus = write_jsonl(cwd / "corpus.jsonl", texts())
    prepare = ["--out", DATA, "--vocab-size", str(VOCAB_SIZE), "--val-frac", "0.2", "--shard-tokens", "4000"]
    made = caddie("data", "prepare", "--corpus", corpus.name, *prepare, cwd=cwd, CADDIE_HOME="my runs")
    assert (made.returncode, made.stdout.splitlines()[-1]) == (0, str(home.dataset(DATA))), made.stderr
    study = write_study(cwd / "questions")
    done = caddie("study", "run", study.relative_to(cwd), cwd=cwd, CADDIE_HOME="my runs")
    assert done.returncode == 0, done.stderr
    return Visit(cwd, home, done.stdout)


@pytest.mark.slow
def test_a_study_ends_in_a_record_table_whose_numbers_are_the_runs(visit: Visit) -> None:
    require_decided_once(visit.home)
    found = state(visit.home)
    assert (found.closed, len(found.trials)) == (ledger.FINISHED, TRIALS)
    [run_id] = found.arms["preset"].runs.values()
    [attempt] = visit.home.run(run_id).attempts()
    result = read_result(attempt.result)
    row = next(line for line in visit.table.split("Record: preset")[1].splitlines() if line.split()[:1] == ["42"])
    assert f"{result.scores[TTT].bpb:.5f}" in row
    assert f"{result.artifact_bytes:,}" in row
    assert result.status == COMPLETE
    assert result.artifact_bytes == visit.home.run(run_id).bundle.stat().st_size + result.model_bytes


@pytest.mark.slow
def test_bytes_and_tokens_are_counted_exactly_and_the_first_chunk_scores_as_the_sliding_window(visit: Visit) -> None:
    from orchestrator.datasets import manifest_of

    split = manifest_of(visit.home.dataset(DATA)).manifest.splits[protocol.VALIDATION]
    for run_id in state(visit.home).run_ids:
        result = read_result(visit.home.run(run_id).attempts()[-1].result)
        assert {score.bytes for score in result.scores.values()} == {split.text_bytes}
        assert {score.tokens for score in result.scores.values()} == {split.tokens - 1}
        assert result.parity_nats is not None and abs(result.parity_nats) <= 1e-4


@pytest.mark.slow
def test_every_view_of_a_finished_study_can_be_read_by_a_program(visit: Visit) -> None:
    def answer(*arguments: str) -> object:
        done = caddie("--home", visit.home.root, *arguments, "--json", cwd=visit.cwd.parent)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    [listed] = answer("study", "list")  # type: ignore[misc]
    assert (listed["name"], listed["state"]) == (NAME, ledger.FINISHED)
    assert answer("study", "status", NAME)["trials"] == {"complete": TRIALS}  # type: ignore[index]
    assert answer("study", "check", str(visit.cwd / "questions" / f"{NAME}.toml"))["trials"] == TRIALS  # type: ignore[index]
    assert answer("report", NAME)
    assert answer("data", "verify", DATA)["problems"] == []  # type: ignore[index]
    assert all(finding["status"] != "missing" for finding in answer("doctor"))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_same_command_again_decides_nothing_and_shows_the_same(visit: Visit) -> None:
    before = visit.home.study(NAME).ledger.read_bytes()
    again = caddie("study", "run", f"questions/{NAME}.toml", "--home", "my runs", cwd=visit.cwd)
    assert (again.returncode, again.stdout) == (0, visit.table)
    assert visit.home.study(NAME).ledger.read_bytes() == before


@pytest.mark.slow
def test_mlflow_is_made_again_from_the_run_directories(visit: Visit) -> None:
    before = mlflow_names(visit.home)
    assert len(before) == 1 + TRIALS + len(state(visit.home).arms) + len(state(visit.home).run_ids)
    visit.home.mlflow_database.unlink()
    done = caddie("--home", visit.home.root, "track", "--rebuild", cwd=visit.cwd)
    assert (done.returncode, done.stderr) == (0, "")
    assert mlflow_names(visit.home) == before


def mlflow_names(home: Home) -> list[str]:
    with sqlite3.connect(f"file:{home.mlflow_database}?mode=ro", uri=True) as database:
        return sorted(name for (name,) in database.execute("SELECT name FROM runs WHERE lifecycle_stage = 'active'"))


@pytest.mark.slow
def test_the_ui_serves_the_study_until_it_is_told_to_end_and_a_busy_port_is_refused(visit: Visit) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = visit.cwd / "ui.txt"
    server = start("--home", visit.home.root, "ui", "--port", str(port), cwd=visit.cwd, log=log)
    try:
        until(lambda: server.poll() is not None or NAME in log.read_text(), what="the address of the study's view")
        assert server.poll() is None, log.read_text()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert opener.open(f"http://127.0.0.1:{port}/health", timeout=10).status == 200
        refused = caddie("--home", visit.home.root, "ui", "--port", str(port), cwd=visit.cwd)
        assert refused.returncode == 8
        assert (
            f"error: port {port} of 127.0.0.1 cannot be taken: Address already in use\nhint: take --port"
            in refused.stderr
        )
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        end(server)


def test_help_answers_at_once(tmp_path: Path) -> None:
    def seconds() -> float:
        """Of the processor, of which others use this machine's too."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        answered = caddie(
            "--help", cwd=tmp_path, PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=str(tmp_path / "compiled")
        )
        assert answered.returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(4)) < HELP_SECONDS  # the first compiles, as an installation does


def test_a_reader_that_had_enough_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command("--home", tmp_path, "doctor", "--json"), cwd=tmp_path, env=environment(), stdout=writing, stderr=subprocess.PIPE,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
