"""Controllers that are jobs of a real Slurm: they leave when their time is up, and their successors go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator import ledger
from orchestrator.home import Home
from tests.cluster.emulated import Cluster, until
from tests.end_to_end.micro import NAME, ONE_AT_A_TIME, TRIALS, caddie, records, require_decided_once, state
from trainer import protocol

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]

SETTINGS = ONE_AT_A_TIME.partition("[set]\n")[2].partition("[space")[0].strip().splitlines()
AS_ARGUMENTS = [f"--set={line.replace(' = ', '=').replace(chr(34), '')}" for line in SETTINGS]


@pytest.fixture
def held(tmp_path: Path, data: Path) -> Home:
    """A home with the data set."""
    home = Home(tmp_path / "home")
    home.data.mkdir(parents=True)
    (home.data / "small").symlink_to(data)
    return home


def log(home: Home, name: str = NAME) -> str:
    return home.study(name).log.read_text() if home.study(name).log.exists() else ""


def controllers(cluster: Cluster, state: str) -> list[str]:
    """Ids of the controller jobs in a state of Slurm's."""
    return [job for job, name, *_ in cluster.jobs(state) if name.startswith("caddie-controller")]


def test_a_controller_whose_time_is_up_is_followed_by_another_that_repeats_nothing(
    cluster: Cluster, tmp_path: Path, held: Home
) -> None:
    """Two minutes, of which it is told to leave after some twenty seconds; one is killed, the next as it starts."""
    study = tmp_path / "micro.toml"
    longer = ONE_AT_A_TIME.replace(f"trials = {TRIALS}", "trials = 5")  # none of them is to reach the end by itself
    study.write_text(longer.replace("slots = 1", 'launcher = "slurm"\nslots = 1'))
    at_home = ("--home", str(held.root), "study")
    started = caddie(
        *at_home, "run", study, "--as-job", "--job-options=--time=2 --signal=B:TERM@100", cwd=tmp_path,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    assert "its controller is job" in started.stdout and "study stop micro" in started.stdout
    until(lambda: "left by SIGTERM" in log(held), 240, "the first controller's time")
    told = json.loads(caddie(*at_home, "status", NAME, "--json", cwd=tmp_path).stdout)
    assert told["controller_jobs"], "its successor waits or runs"

    seen = len(records(held, ledger.ENDED))
    until(lambda: len(records(held, ledger.ENDED)) > seen, 240, "progress under the successor")
    until(
        lambda: controllers(cluster, "running") and controllers(cluster, "pending"),
        60,
        "a controller and its successor",
    )
    (works,), (waiting,) = controllers(cluster, "running"), controllers(cluster, "pending")
    cluster.ask("scancel", "--signal=KILL", "--full", works, check=False)
    until(
        lambda: waiting in controllers(cluster, "running") and controllers(cluster, "pending"), 60, "the next of them"
    )
    cluster.ask("scancel", waiting)

    until(lambda: held.study(NAME).ledger.exists() and state(held).closed == ledger.FINISHED, 400, "the study's end")
    until(lambda: not cluster.jobs("running,pending"), 60, "an empty queue")
    require_decided_once(held)
    assert {attempt.status for attempt in state(held).attempts.values()} == {protocol.COMPLETE}
    assert {attempt.number for attempt in state(held).attempts.values()} == {1}


def test_preset_and_candidate_take_turns_within_one_allocation(cluster: Cluster, tmp_path: Path, held: Home) -> None:
    done = caddie(
        "--home", held.root, "run", "smoke", "--interleave", "--set-against=optim.muon_weight_decay=0.05", "--seeds=42,314",
        "--data=small", "--name=ab", "--launcher=slurm", "--gpus=2", "--max-gap=0.9", "--timeout-minutes=5", *AS_ARGUMENTS,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    until(lambda: held.study("ab").report_data.exists(), 400, f"the report: {log(held, 'ab')}")
    until(lambda: not cluster.jobs("running,pending"), 60, "an empty queue")
    record = json.loads(held.study("ab").report_data.read_text())
    assert [(block["seed"], block["first"]) for block in record["blocks"]] == [(42, "preset"), (314, "best")]
    assert len({block["node"] for block in record["blocks"]}) == 1
    assert "blocks the candidate scores" in record["claim"] or "No block" in record["claim"]
