"""Studies on a real Slurm of four nodes with eight fake GPUs each, and what a cluster does to them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from orchestrator import ledger
from orchestrator.claims import read_claim
from orchestrator.errors import ConfigError, StudyFailed
from orchestrator.home import Home
from tests.cluster.emulated import PREEMPTIBLE, Cluster, until
from tests.cluster.sweeps import Running, slow_trainers, slurm_study, starts
from tests.end_to_end.micro import STUDY, caddie
from trainer import protocol
from trainer.protocol import INFRASTRUCTURE, NODE, PREEMPTED, TIMEOUT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def outcomes(running: Running) -> list[tuple[str | None, str | None]]:
    return [(attempt.status, attempt.failure) for attempt in running.attempts()]


def test_a_study_runs_to_its_report_on_four_nodes(cluster: Cluster, tmp_path: Path, data: Path) -> None:
    """The real trainer; also with two processes a run."""
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "data" / "small").symlink_to(data)
    study = tmp_path / "micro.toml"
    study.write_text(
        STUDY.replace("[resources]\nslots = 2", '[resources]\nlauncher = "slurm"\ngpus_per_run = 2\nslots = 4')
    )
    done = caddie("--home", home, "study", "run", study, cwd=tmp_path, **cluster.environment)
    assert done.returncode == 0, done.stderr
    assert "report" in done.stdout and Home(home).study("micro").report_page.exists()
    used = {attempt.nodes for attempt in ledger.Ledger(Home(home).study("micro").ledger).state().attempts.values()}
    assert used <= {(name,) for name in cluster.node_names} and all(used)
    until(lambda: not cluster.jobs("running,pending"), 30, "an empty queue")


def test_a_run_on_two_nodes_is_one_torchrun_whose_first_node_speaks(
    cluster: Cluster, tmp_path: Path, data: Path
) -> None:
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "data" / "small").symlink_to(data)
    settings = [
        f"--set={line.replace(' = ', '=').replace(chr(34), '')}"
        for line in STUDY.partition("[set]\n")[2].partition("[space")[0].strip().splitlines()
    ]
    done = caddie(
        "--home", home, "run", "smoke", "--seeds", "42", "--data", "small", *settings,
        "--launcher", "slurm", "--nodes", "2", "--gpus", "4", "--name", "wide", cwd=tmp_path, **cluster.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (attempt,) = ledger.Ledger(Home(home).study("wide").ledger).state().attempts.values()
    result = protocol.read_result(Home(home).run(attempt.run_id).attempt(1).result)
    assert (result.world_size, attempt.gpus, len(attempt.nodes)) == (4, 4, 2)


def test_a_run_that_is_pre_empted_three_times_comes_to_its_end(cluster: Cluster, home: Home) -> None:
    slow_trainers(home, attempts=[1, 2, 3])
    running = Running(slurm_study(gpus=8, resources=f'partition = "{PREEMPTIBLE}"'), home)
    for number in (1, 2, 3):
        running.begun(number)
        urgent = cluster.ask("sbatch", "--parsable", "--nodes=4", "--gpus-per-node=8", "--wrap=sleep 600")
        running.until(lambda n=number: len(running.attempts()) > n, f"attempt {number + 1}")
        cluster.ask("scancel", urgent)
    state = running.wait()
    assert outcomes(running) == [("failed", PREEMPTED)] * 3 + [("complete", None)]
    assert state.trials[0].state == "complete" and state.excluded_nodes == []


def test_the_trainer_is_told_of_a_pre_emption_and_leaves_in_order(cluster: Cluster, home: Home) -> None:
    slow_trainers(home, attempts=[1])
    running = Running(slurm_study(gpus=8, resources=f'partition = "{PREEMPTIBLE}"'), home)
    files = running.begun()
    urgent = cluster.ask("sbatch", "--parsable", "--nodes=4", "--gpus-per-node=8", "--wrap=sleep 600")
    running.until(files.result.exists, "a result")
    cluster.ask("scancel", urgent)
    running.wait()
    assert files.notice.exists()
    told = protocol.read_result(files.result)
    assert told.failure is not None and told.failure.kind == PREEMPTED
    assert protocol.read_result(running.begun(2).result).status == protocol.COMPLETE


def test_torchrun_and_its_ranks_survive_the_notice_until_they_have_left_in_order(cluster: Cluster, home: Home) -> None:
    slow_trainers(home, attempts=[1])
    running = Running(slurm_study(gpus=2), home)
    files = running.begun()
    job = running.attempts()[0].job_id
    cluster.ask("scancel", "--signal=USR2", str(job))
    running.wait()
    told = protocol.read_result(files.result)
    assert (
        told.failure is not None
        and told.failure.kind == PREEMPTED
        and told.failure.message.startswith("the trainer was told")
    )


def test_a_run_whose_time_is_up_is_not_attempted_again_however_politely_it_leaves(cluster: Cluster, home: Home) -> None:
    slow_trainers(home)
    running = Running(slurm_study(gpus=8, minutes=0.2), home)
    with pytest.raises(StudyFailed, match="timeout: ended after 12 s"):
        running.wait()
    assert outcomes(running) == [("failed", TIMEOUT)]


def test_a_cancelled_job_is_attempted_again(cluster: Cluster, home: Home) -> None:
    slow_trainers(home, attempts=[1])
    running = Running(slurm_study(), home)
    running.begun()
    cluster.ask("scancel", str(running.attempts()[0].job_id))
    running.wait()
    assert outcomes(running)[1:] == [("complete", None)]
    assert outcomes(running)[0] in [("failed", PREEMPTED), ("failed", INFRASTRUCTURE)]


def test_a_job_that_is_cancelled_before_it_begins_is_attempted_again(cluster: Cluster, home: Home) -> None:
    urgent = cluster.ask("sbatch", "--parsable", "--nodes=4", "--gpus-per-node=8", "--wrap=sleep 600")
    running = Running(slurm_study(), home)
    running.until(lambda: running.attempts() and running.attempts()[0].job_id, "a submission")
    cluster.ask("scancel", str(running.attempts()[0].job_id))
    running.until(lambda: len(running.attempts()) > 1, "a second attempt")
    cluster.ask("scancel", urgent)
    running.wait()
    assert outcomes(running) == [("failed", INFRASTRUCTURE), ("complete", None)]


def test_slurm_does_not_requeue_a_job_and_one_that_is_made_to_finds_the_claim_and_leaves(
    cluster: Cluster, home: Home
) -> None:
    slow_trainers(home, seconds=12)
    running = Running(slurm_study(), home)
    files = running.begun()
    job = str(running.attempts()[0].job_id)
    with pytest.raises(RuntimeError, match="disabled"):
        cluster.ask("scontrol", "requeue", job)
    cluster.ask("scontrol", "update", f"jobid={job}", "requeue=1")
    cluster.ask("scontrol", "requeue", job)
    running.wait()
    assert outcomes(running) == [("failed", PREEMPTED), ("complete", None)]
    until(
        lambda: not [fields for fields in cluster.jobs("pending,running") if fields[0] == job],
        60,
        "its second life over",
    )
    assert starts(home) == {f"{files.root.parent.parent.name}/1": 1, f"{files.root.parent.parent.name}/2": 1}


def test_a_node_that_crashes_is_missed_within_half_a_minute_and_the_run_goes_on_elsewhere(
    cluster: Cluster, home: Home
) -> None:
    slow_trainers(home, attempts=[1])
    running = Running(slurm_study(gpus=8), home)
    running.begun()
    (node,) = {fields[3] for fields in cluster.jobs("running")}
    cluster.crash(node)
    crashed = time.monotonic()
    running.until(lambda: len(running.attempts()) > 1, "a second attempt")
    assert time.monotonic() - crashed < 30
    running.wait()
    assert outcomes(running) == [("failed", NODE), ("complete", None)]
    first, second = running.attempts()
    assert first.nodes == (node,) and second.nodes != (node,)


def test_a_job_that_slurm_suspends_is_attempted_again_and_its_node_is_not_blamed(cluster: Cluster, home: Home) -> None:
    slow_trainers(home, attempts=[1])
    running = Running(slurm_study(gpus=8), home)
    running.begun()
    job = str(running.attempts()[0].job_id)
    cluster.ask("scontrol", "suspend", job)
    running.wait()
    assert outcomes(running) == [("failed", PREEMPTED), ("complete", None)]
    until(lambda: job not in [fields[0] for fields in cluster.jobs("running,suspended")], 60, "the suspended job's end")


def test_a_node_that_fails_twice_gets_no_more_runs(
    cluster: Cluster, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "SAME_CRASH_SECONDS", 0.0)
    slow_trainers(home, attempts=[1, 2])
    running = Running(slurm_study(gpus=8, resources='sbatch = { exclude = "node[3-4]" }'), home)
    for number in (1, 2):
        running.begun(number)
        cluster.ask("scontrol", "update", "nodename=node2", "state=drain", "reason=test", check=number == 1)
        if number == 1 and cluster.jobs("running")[0][3] != "node1":
            pytest.fail("the first job is expected on node1")
        cluster.crash("node1")
        running.until(lambda n=number: running.attempts()[n - 1].status is not None, "the crash noticed")
        cluster.revive("slurmd.node1")
    cluster.ask("scontrol", "update", "nodename=node2", "state=resume")
    state = running.wait()
    assert state.excluded_nodes == ["node1"]
    assert [attempt.nodes for attempt in running.attempts()] == [("node1",), ("node1",), ("node2",)]
    script = next(running.begun(3).scheduler.glob("*_submission.sh")).read_text()
    assert "--exclude='node[3-4],node1'" in script or "--exclude=node[3-4],node1" in script


REFUSED = {
    'partition = "nope"': "invalid partition specified: nope",
    'qos = "gold"': "Invalid qos specification",
    'account = "nobody"': "Invalid account or account/partition combination",
    'sbatch = { frobnicate = "1" }': "unrecognized option",
    'constraint = "h900"': "Invalid feature specification",
}


@pytest.mark.parametrize("resources", REFUSED)
def test_what_sbatch_refuses_is_told_in_its_own_words_and_goes_on_once_it_is_mended(
    cluster: Cluster, home: Home, resources: str
) -> None:
    with pytest.raises(ConfigError, match=f"sbatch refuses the job: .*{REFUSED[resources]}") as caught:
        Running(slurm_study(resources=resources), home).wait()
    assert "go on" in caught.value.hint.replace("goes", "go")
    running = Running(slurm_study(), home)
    running.wait()
    assert outcomes(running) == [("complete", None)]


def test_more_gpus_than_a_node_has_are_refused_and_fewer_go_on(cluster: Cluster, home: Home) -> None:
    with pytest.raises(ConfigError, match="Requested node configuration is not available"):
        Running(slurm_study(gpus=9), home).wait()
    running = Running(slurm_study(gpus=2), home)
    assert running.wait().trials[0].state == "complete" and running.attempts()[0].gpus == 2


def test_a_study_runs_while_accounting_is_down(cluster: Cluster, home: Home) -> None:
    cluster.kill("slurmdbd")
    slow_trainers(home, attempts=[1], seconds=120)
    running = Running(slurm_study(trials=2), home)
    files = running.begun()
    claim = read_claim(files)
    assert claim is not None
    os.kill(claim.pid, signal.SIGKILL)
    running.begun(2)
    for attempt in running.attempts()[1:2]:
        cluster.ask("scancel", str(attempt.job_id))
    state = running.wait()
    assert [trial.state for trial in state.trials.values()] == ["complete"] * 2
    assert outcomes(running).count(("complete", None)) == 2


def test_a_worker_that_is_killed_is_missed_within_half_a_minute(cluster: Cluster, home: Home) -> None:
    slow_trainers(home, attempts=[1])
    running = Running(slurm_study(), home)
    claim = read_claim(running.begun())
    assert claim is not None
    os.kill(claim.pid, signal.SIGKILL)
    killed = time.monotonic()
    running.until(lambda: len(running.attempts()) > 1, "a second attempt")
    assert time.monotonic() - killed < 30
    running.wait()
    assert outcomes(running) == [("failed", INFRASTRUCTURE), ("complete", None)]


def test_a_submission_while_slurm_does_not_answer_is_made_when_it_does(cluster: Cluster, home: Home) -> None:
    # No job begins before all nodes are back: Slurm fails to launch one on a node that has yet to come.
    for node in cluster.node_names:
        cluster.ask("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    cluster.kill("slurmctld", signal.SIGTERM)
    running = Running(slurm_study(trials=2), home)
    running.until(lambda: any("Unable to contact" in note for note in running.listener.notes), "a note")
    cluster.start()
    running.wait()
    assert outcomes(running) == [("complete", None)] * 2
    assert set(starts(home).values()) == {1}


LYING_SBATCH = """#!/bin/sh
{sbatch} "$@" >/dev/null
echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2
exit 1
"""


def test_a_job_that_sbatch_accepted_and_denied_is_found_by_its_name_and_run_once(
    cluster: Cluster, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar = tmp_path / "bin" / "sbatch"
    liar.parent.mkdir()
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True, check=True).stdout.strip()
    liar.write_text(LYING_SBATCH.format(sbatch=real))
    liar.chmod(0o755)
    monkeypatch.setenv("PATH", f"{liar.parent}{os.pathsep}{os.environ['PATH']}")
    running = Running(slurm_study(trials=2, slots=2), home)
    running.wait()
    assert outcomes(running) == [("complete", None)] * 2
    assert set(starts(home).values()) == {1}
    assert (
        len(
            [
                fields
                for fields in cluster.jobs()
                if str(fields[1]).startswith("caddie.tiny") and running.controller.attempts.names.home in fields[1]
            ]
        )
        == 2
    )


def test_jobs_are_submitted_from_inside_a_job_as_from_outside(
    cluster: Cluster, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaked = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "7", "SLURM_CPUS_PER_TASK": "63", "SLURM_GPUS": "3", "SLURM_MEM_PER_NODE": "1",
              "SBATCH_TIMELIMIT": "1", "SBATCH_PARTITION": "nope", "SQUEUE_FORMAT": "%i", "RANK": "5", "WORLD_SIZE": "9"}  # fmt: skip
    for name, value in leaked.items():
        monkeypatch.setenv(name, value)
    running = Running(slurm_study(gpus=2, resources='partition = "gpu"'), home)
    running.wait()
    assert outcomes(running) == [("complete", None)]
    (attempt,) = running.attempts()
    described = protocol.read_json(home.run(attempt.run_id).attempt(1).env)
    assert described["environment"]["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_controller_that_died_finds_its_jobs_again(cluster: Cluster, home: Home) -> None:
    slow_trainers(home, seconds=12)
    study = slurm_study(trials=3, slots=3)
    first = Running(study, home)
    first.until(lambda: sum(attempt.job_id is not None for attempt in first.attempts()) == 3, "three submissions")
    first.controller.interrupts.by = signal.SIGTERM
    with pytest.raises(Exception, match="3 running jobs go on"):
        first.wait()
    second = Running(study, home)
    second.wait()
    assert outcomes(second) == [("complete", None)] * 3
    assert set(starts(home).values()) == {1}


def test_a_waiting_job_of_a_study_that_is_stopped_leaves_the_queue(cluster: Cluster, home: Home) -> None:
    urgent = cluster.ask("sbatch", "--parsable", "--nodes=4", "--gpus-per-node=8", "--wrap=sleep 600")
    running = Running(slurm_study(), home)
    running.until(lambda: running.attempts() and running.attempts()[0].job_id, "a submission")
    home.study("tiny").stop.write_text("cancel")
    assert running.wait().closed == "stopped"
    assert [fields[0] for fields in cluster.jobs("pending,running")] == [urgent]
    assert outcomes(running) == [("stopped", None)]


def test_the_time_of_a_job_that_waits_does_not_count(cluster: Cluster, home: Home) -> None:
    urgent = cluster.ask("sbatch", "--parsable", "--nodes=4", "--gpus-per-node=8", "--wrap=sleep 600")
    running = Running(slurm_study(resources="max_attempts = 1", minutes=0.05), home)
    running.until(lambda: running.attempts() and running.attempts()[0].job_id, "a submission")
    time.sleep(6)  # longer than an attempt may take
    cluster.ask("scancel", urgent)
    running.wait()
    assert outcomes(running) == [("complete", None)]
