import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from fakes import FAKE_BUNDLE, MANIFEST, subprocess_environment, write_plans

from orchestrator.claims import is_live, read_claim
from orchestrator.errors import MachineError, StorageError
from orchestrator.home import Home
from orchestrator.launcher import LocalLauncher
from orchestrator.machine import THREADS
from orchestrator.presets import load_preset
from orchestrator.processes import started_ticks
from orchestrator.runs import RunRequest, RunStore
from orchestrator.slots import JobResources
from trainer import protocol

SUBMIT = """
import sys, time
from pathlib import Path
from orchestrator.launcher import LocalLauncher
from orchestrator.slots import JobResources
from trainer.protocol import RunDir
LocalLauncher().submit(RunDir(Path(sys.argv[1])), 1, tag=sys.argv[2], resources=JobResources(slot=0, timeout_seconds=60.0))
print("submitted", flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    request = RunRequest(preset="smoke", config=load_preset("smoke"), seed=7, data_dir="/d", manifest_sha256=MANIFEST)
    return RunStore(Home(tmp_path)).plan(request, bundle=FAKE_BUNDLE, code={})


@pytest.fixture
def tag(run):
    name = f"caddie.test.{run.root}"
    yield name
    LocalLauncher().cancel(name)


def resources(**changes):
    return JobResources(**{"slot": 0, "timeout_seconds": 60.0, **changes})


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def test_a_job_is_alive_until_its_result_and_leaves_no_zombie(run, tag):
    launcher, attempt = LocalLauncher(), run.attempt(1)
    job_id = launcher.submit(run, 1, tag=tag, resources=resources())
    assert protocol.read_json(attempt.job)["tag"] == tag
    until(lambda: attempt.result.exists() and not launcher.is_alive(attempt, tag=tag))
    assert protocol.read_result(attempt.result).status == protocol.COMPLETE
    until(lambda: not launcher.is_alive(attempt, tag=tag) and job_id not in {job.job_id for job in launcher.jobs})
    assert started_ticks(int(job_id)) is None
    assert launcher.find(attempt, tag=tag) is None


def test_the_gpus_of_the_slot_are_the_only_ones_that_the_trainer_sees(run, tag):
    launcher, attempt = LocalLauncher(), run.attempt(1)
    launcher.submit(run, 1, tag=tag, resources=resources(gpus=("2", "GPU-ab")))
    until(attempt.result.exists)
    assert protocol.read_json(attempt.env)["environment"]["CUDA_VISIBLE_DEVICES"] == "2,GPU-ab"


def test_runs_side_by_side_share_the_machines_processors(run, tag, monkeypatch):
    monkeypatch.delenv(THREADS, raising=False)
    launcher, attempt = LocalLauncher(), run.attempt(1)
    launcher.submit(run, 1, tag=tag, resources=resources(beside=10_000))
    until(attempt.result.exists)
    assert protocol.read_json(attempt.env)["environment"][THREADS] == "1"
    assert protocol.read_json(attempt.job)["resources"]["beside"] == 10_000


def test_a_job_is_found_by_its_tag_and_ends_when_it_is_cancelled(run, tag):
    write_plans(Home(run.root.parent.parent), {"*": {"mode": "deaf", "step_seconds": 60}})
    launcher, attempt = LocalLauncher(), run.attempt(1)
    launcher.submit(run, 1, tag=tag, resources=resources())
    assert launcher.find(attempt, tag=tag + "0") is None
    until(lambda: (attempt.root / "trainer.pid").exists())
    assert launcher.find(attempt, tag=tag) is not None
    trainer = int((attempt.root / "trainer.pid").read_text())
    launcher.cancel(tag)
    until(lambda: not launcher.is_alive(attempt, tag=tag))
    assert started_ticks(trainer) is None


def test_a_trainer_whose_worker_was_killed_still_counts_as_alive(run, tag):
    write_plans(Home(run.root.parent.parent), {"*": {"step_seconds": 60}})
    launcher, attempt = LocalLauncher(), run.attempt(1)
    launcher.submit(run, 1, tag=tag, resources=resources())
    until(lambda: (attempt.root / "trainer.pid").exists())
    os.kill(read_claim(attempt).pid, signal.SIGKILL)
    until(lambda: not is_live(read_claim(attempt)))
    assert launcher.is_alive(attempt, tag=tag)
    assert launcher.is_alive(attempt, tag=None)
    launcher.cancel(tag)
    until(lambda: not launcher.is_alive(attempt, tag=None))


ENDS = {
    "kill -9 of the controller": signal.SIGKILL,
    "kill -9 of its whole group": signal.SIGKILL,
    "Ctrl-C in its terminal": signal.SIGINT,
    "closing its terminal": signal.SIGHUP,
}


@pytest.mark.parametrize("end", ENDS)
def test_jobs_survive_the_end_of_their_controller(run, tag, end):
    write_plans(Home(run.root.parent.parent), {"*": {"step_seconds": 0.2}})
    controller = subprocess.Popen(
        [sys.executable, "-c", SUBMIT, str(run.root), tag],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=subprocess_environment(), start_new_session=True,
    )  # fmt: skip
    with controller:
        assert controller.stdout.readline() == b"submitted\n"
        until(lambda: (run.attempt(1).root / "trainer.pid").exists())
        if end.endswith("controller"):
            controller.kill()
        else:
            os.killpg(controller.pid, ENDS[end])
    until(run.attempt(1).result.exists)
    assert protocol.read_result(run.attempt(1).result).status == protocol.COMPLETE


def test_a_job_whose_submitter_was_killed_before_it_gave_it_its_task_is_ended_and_not_found(run, tag):
    launcher, attempt = LocalLauncher(), run.attempt(1)
    attempt.scheduler.mkdir(parents=True)
    job = subprocess.Popen(["sleep", "60"], env={**os.environ, "CADDIE_JOB_TAG": tag})
    until(lambda: launcher.is_alive(attempt, tag=tag))
    assert launcher.find(attempt, tag=tag) is None
    assert job.wait(timeout=20) == -signal.SIGKILL


def test_a_job_that_has_its_task_is_found_before_its_worker_has_begun(run, tag):
    launcher, attempt = LocalLauncher(), run.attempt(1)
    attempt.scheduler.mkdir(parents=True)
    (attempt.scheduler / "7_submitted.pkl").write_text("")
    with subprocess.Popen(["sleep", "60"], env={**os.environ, "CADDIE_JOB_TAG": tag}) as job:
        until(lambda: launcher.find(attempt, tag=tag) == str(job.pid))
        job.kill()


def test_a_full_disk_at_a_submission_is_a_storage_error(run, tag, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("submitit.LocalExecutor.submit", refuse)
    with pytest.raises(StorageError, match="scheduler: cannot be written: No space left") as caught:
        LocalLauncher().submit(run, 1, tag=tag, resources=resources())
    assert caught.value.exit_code == 6 and "run the command again" in caught.value.hint


def test_a_submission_that_was_cut_off_is_made_anew_in_a_fresh_folder(run, tag):
    left = run.attempt(1).scheduler / "left_over_submission.pkl"
    left.parent.mkdir(parents=True)
    left.write_text("torn")
    LocalLauncher().submit(run, 1, tag=tag, resources=resources())
    assert not left.exists()
    until(run.attempt(1).result.exists)


def test_a_job_that_cannot_be_started_is_an_error_of_the_machine(run, tag):
    run.attempt(1).root.parent.mkdir()
    run.attempt(1).root.write_text("in the way")
    with pytest.raises(MachineError, match="the job could not be started") as caught:
        LocalLauncher().submit(run, 1, tag=tag, resources=resources())
    assert "same command again" in caught.value.hint


def test_a_job_does_not_hold_the_pipes_of_its_controller(run, tag):
    write_plans(Home(run.root.parent.parent), {"*": {"mode": "deaf", "step_seconds": 60}})
    code = SUBMIT.replace("time.sleep(60)", "")
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.root), tag],
        env=subprocess_environment(),
        capture_output=True,
        timeout=30,
        check=False,
    )  # would wait for the job's end
    assert done.stdout == b"submitted\n"
    assert LocalLauncher().is_alive(run.attempt(1), tag=tag)
