"""Coming back to a study of a thousand runs: what it costs grows with their number, and hardly."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import FAKE_BUNDLE, MANIFEST, UNCHECKED, FakeSearch, scored, study_text
from faults import Cluster, Machine, traced
from make_controller import controller

from orchestrator import ledger
from orchestrator.home import Home
from orchestrator.identity import identity_of
from orchestrator.ledger import Ledger
from orchestrator.record_attempt import record_study
from orchestrator.runs import RunRequest, RunStore, run_id_of
from orchestrator.study import Study
from orchestrator.study_file import parse_study
from trainer import protocol
from trainer.protocol import append_line

RUNNING = 8
"""Jobs that run when the controller comes back."""


class Past:
    """A study's ledger and run directories as a controller left them that was killed."""

    def __init__(self, home: Home, study: Study) -> None:
        self.home, self.study, self.cluster = home, study, Cluster(polls=3)
        self.path = home.study(study.name).ledger
        identity = identity_of(study, manifest_sha256=MANIFEST, bundle_sha256=sha256_of_bytes(FAKE_BUNDLE))
        self.decide(ledger.OPENED, source=study.source, digest=study.digest, identity=identity, caddie="0")

    def decide(self, kind: str, **fields: Any) -> None:
        append_line(self.path, {"kind": kind, "time": 1.0, **fields})

    def request(self, params: dict[str, Any], seed: int) -> RunRequest:
        return RunRequest(
            preset=self.study.preset, config=self.study.config_of(params), seed=seed, data_dir="/d",
            manifest_sha256=MANIFEST,
        )  # fmt: skip

    def run_id(self, params: dict[str, Any], seed: int) -> str:
        return run_id_of(self.request(params, seed), sha256_of_bytes(FAKE_BUNDLE))

    def start(self, run_id: str) -> None:
        tag = f"tag.{run_id}"
        resources = {"slot": 0, "gpus": [], "processes": 1, "timeout_seconds": 3600.0}
        self.decide(ledger.SUBMITTING, run_id=run_id, attempt=1, tag=tag, resources=resources)
        self.decide(ledger.SUBMITTED, run_id=run_id, attempt=1, job_id="1")

    def end(self, run_id: str) -> None:
        self.decide(ledger.ENDED, run_id=run_id, attempt=1, status="complete", failure=None, seconds=1.0, gpus=0)


def sha256_of_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def searched(home: Home, count: int) -> Past:
    """So many trials, all told."""
    past = Past(home, parse_study(study_text(trials=count, confirm=None, resources=UNCHECKED)))
    for number in range(count):
        params = {"optim.muon_weight_decay": 0.01 + number * 1e-5, "ttt.lr": 0.002}
        run_id = f"{number:016x}"
        past.decide(ledger.TRIAL_ASKED, trial=number, origin="sampler", params=params, runs={1: run_id})
        past.start(run_id)
        past.end(run_id)
        past.decide(
            ledger.TRIAL_TOLD,
            trial=number,
            state="complete",
            value=1.0 + number,
            constraints={},
            intermediate={},
            reason="",
        )
    return past


def confirmed(home: Home, count: int) -> Past:
    """A record attempt on so many seeds, of which some run."""
    seeds = tuple(range(count))
    resources = {"slots": RUNNING, "preflight": False}
    past = Past(home, record_study("smoke", data="d", seeds=seeds, knobs={}, name="tiny", resources=resources))
    runs = {seed: past.run_id({}, seed) for seed in seeds}
    past.decide(ledger.ARM_ASKED, arm="preset", trial=0, params={}, runs=runs)
    spec = None
    for seed, run_id in runs.items():
        past.start(run_id)
        run = home.run(run_id)
        if spec is None:
            RunStore(home).plan(past.request({}, seed), bundle=FAKE_BUNDLE, code={})
            spec = protocol.read_spec(run.spec)
        else:
            run.root.mkdir(parents=True)
            protocol.write_spec(run.spec, dataclasses.replace(spec, run_id=run_id, seed=seed))
        if seed < count - RUNNING:
            protocol.write_result(run.attempt(1).result, scored(run, run.attempt(1), spec))
            past.end(run_id)
        else:
            past.cluster.alive[f"tag.{run_id}"] = 3
    return past


def come_back(past: Past) -> Machine:
    """What a controller asks of its files, and the lines that it takes, to bring the study to its end."""
    machine = Machine(past.home.root)
    victim = controller(past.study, past.home, launcher=past.cluster, search=FakeSearch())
    with pytest.MonkeyPatch.context() as patch, traced(machine.kill_at_line(10**12)):
        machine.install(patch)
        state = victim.run()
    assert state.closed == ledger.FINISHED and past.cluster.submitted == []
    return machine


def require_cheap(tmp_path: Path, past: Callable[[Home, int], Past], few: int, many: int, most_a_run: float) -> None:
    small, large = (come_back(past(Home(tmp_path / str(count)), count)) for count in (few, many))
    assert (large.count - small.count) / (many - few) <= most_a_run
    assert large.lines < 1.25 * many / few * small.lines, "what it does grows faster than the number of runs"
    attempts = Ledger(Home(tmp_path / str(many)).study("tiny").ledger).state().attempts.values()
    assert len(attempts) == many and all(attempt.status == "complete" for attempt in attempts)


def test_coming_back_to_a_thousand_told_trials_reads_no_file_of_theirs(tmp_path):
    require_cheap(tmp_path, searched, 250, 1000, most_a_run=0.1)


def test_coming_back_to_runs_of_a_record_costs_a_few_file_operations_for_each(tmp_path):
    require_cheap(tmp_path, confirmed, 50, 200, most_a_run=8.0)


@pytest.mark.slow
def test_coming_back_to_a_thousand_runs_of_a_record_repeats_nothing(tmp_path):
    require_cheap(tmp_path, confirmed, 250, 1000, most_a_run=8.0)
