import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from fakes import FAKE_BUNDLE, MANIFEST, subprocess_environment, write_plans

from orchestrator import worker
from orchestrator.allocation import Allocation
from orchestrator.claims import claim_for, is_live, make_claim, read_claim
from orchestrator.home import Home
from orchestrator.machine import THREADS, describe_machine, installed_packages
from orchestrator.notice import Notice
from orchestrator.presets import load_preset
from orchestrator.processes import TRAINER_TAG, tagged_processes, trainer_tag
from orchestrator.runs import RunRequest, RunStore
from trainer import protocol
from trainer.errors import StorageError
from trainer.protocol import CODE, CONFIG, DATA, DISK, INFRASTRUCTURE, OUT_OF_MEMORY, TIMEOUT  # fmt: skip


@pytest.fixture
def run(tmp_path):
    request = RunRequest(
        preset="smoke", config=load_preset("smoke"), seed=7, data_dir="/data", manifest_sha256=MANIFEST
    )
    return RunStore(Home(tmp_path)).plan(request, bundle=FAKE_BUNDLE, code={})


def attempt_with(run, mode="", *, number=1, timeout=60.0, grace=0.5, **plan):
    """Run one attempt to its end and give its result."""
    write_plans(Home(run.root.parent.parent), {"*": {"mode": mode, **plan}})
    worker.run_attempt(str(run.root), number, 1, "", timeout, grace)
    return protocol.read_result(run.attempt(number).result)


def wait_for(path, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def test_an_attempt_runs_the_bundle_from_its_directory_alone(run):
    result = attempt_with(run)
    assert (result.status, result.seed, result.attempt) == (protocol.COMPLETE, 7, 1)
    claim = read_claim(run.attempt(1))
    assert claim.pid == os.getpid() and is_live(claim)
    described = protocol.read_json(run.attempt(1).env)
    assert described["environment"]["CUDA_VISIBLE_DEVICES"] == "" and described["gpus"] == []
    assert re.match(r"\d+\.\d+", described["packages"]["numpy"])


def test_the_environment_file_holds_no_secret(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hush-hush")
    attempt_with(run)
    assert "hush-hush" not in run.attempt(1).env.read_text()


def test_the_trainer_does_not_see_our_checkout(monkeypatch):
    checkout = subprocess_environment()["PYTHONPATH"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([checkout, "/own/modules"]))
    assert worker.trainer_environment("3", "t")["PYTHONPATH"] == "/own/modules"
    monkeypatch.setenv("PYTHONPATH", checkout)
    assert "PYTHONPATH" not in worker.trainer_environment("3", "t")


@pytest.mark.parametrize(
    ("processors", "processes", "beside", "threads"),
    [(8, 1, 1, 8), (8, 1, 3, 2), (8, 2, 2, 2), (2, 1, 3, 1), (2, 8, 4, 1)],
)
def test_a_process_gets_its_share_of_the_processors_that_the_job_may_use(
    monkeypatch, processors, processes, beside, threads
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    order = worker.Order(processes=processes, gpus="", timeout_seconds=1.0, beside=beside)
    assert worker.threads_of(order) == threads


@pytest.mark.parametrize(("set_by_user", "threads"), [(None, "1"), ("5", "5")])
def test_the_trainers_threads_are_the_users_where_he_names_a_number(run, monkeypatch, set_by_user, threads):
    monkeypatch.delenv(THREADS, raising=False)
    if set_by_user:
        monkeypatch.setenv(THREADS, set_by_user)
    worker.run_attempt(str(run.root), 1, 1, "", 60.0, beside=10_000)
    assert protocol.read_json(run.attempt(1).env)["environment"][THREADS] == threads


def part_of(run, allocation=None, *, number=1, **order):
    """A worker's part of an attempt, which it has claimed."""
    allocation = allocation or Allocation(job="9", names=("node1",))
    files, order = run.attempt(number), {"processes": 1, "gpus": "", "timeout_seconds": 60.0, **order}
    claim = (
        claim_for(Allocation(job="9", names=("localhost", "node2"))) if allocation.nodes > 1 else claim_for(allocation)
    )
    return worker.Part(
        run=run,
        files=files,
        order=worker.Order(**order),
        allocation=allocation,
        claim=claim,
        notice=Notice(files),
    )


def test_torchrun_leaves_signals_to_its_ranks_where_it_can_be_told_to(run):
    part = part_of(run, processes=8)
    assert "--signals-to-handle=SIGINT" in worker.part_command(part, torch="2.13.0+cu128")
    assert not [word for word in worker.part_command(part, torch="2.9.1") if word.startswith("--signals")]
    assert len(worker.part_command(part_of(run), torch="2.13.0")) == 5, "one process needs no torchrun"


def test_the_nodes_of_a_run_are_one_torchrun_that_meets_on_the_first(run):
    part = part_of(
        run, Allocation(job="9", node=1, names=("localhost", "node2")), processes=8, python="/opt/torch/bin/python"
    )
    command = worker.part_command(part, torch="2.13.0")
    host, _, port = part.claim.rendezvous.rpartition(":")
    assert command[:3] == ["/opt/torch/bin/python", "-m", "torch.distributed.run"]
    assert {
        "--nnodes=2",
        "--node_rank=1",
        "--nproc_per_node=8",
        f"--master_addr={host}",
        f"--master_port={port}",
    } < set(command)
    assert "--standalone" not in command and int(port) > 0


@pytest.mark.parametrize(("is_alone", "survives"), [(True, False), (False, True)])
def test_a_shielded_command_survives_sigusr2_and_torchrun_sigterm_too(is_alone, survives):
    command = worker.shielded(
        [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(60)"], is_alone=is_alone
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGUSR2)
        process.send_signal(signal.SIGTERM)
        if survives:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.kill()
        assert process.wait(10) == (-signal.SIGKILL if survives else -signal.SIGTERM)


def carry_out(run, *, number=1, allocation=None, mode="", plan=None, **order):
    write_plans(Home(run.root.parent.parent), {"*": {"mode": mode, **(plan or {})}})
    order = worker.Order(**{"processes": 1, "gpus": "", "timeout_seconds": 60.0, "grace_seconds": 5.0, **order})
    worker.carry_out(run, number, order, allocation or Allocation(job="9", names=("node1",)))
    return run.attempt(number)


def once_begun(run, act, number=1):
    def wait_and_act():
        wait_for(run.attempt(number).root / "trainer.pid")
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_job_whose_nodes_are_wanted_back_leaves_in_order(run, number):
    """Of SIGUSR2 the trainer hears nothing; SIGTERM reaches it by itself, as the scheduler sends it to all of a job."""
    before = signal.getsignal(number)

    def act():
        os.kill(os.getpid(), number)
        if number == signal.SIGTERM:
            os.kill(int((run.attempt(1).root / "trainer.pid").read_text()), number)

    thread = once_begun(run, act)
    files = carry_out(run, plan={"step_seconds": 30})
    thread.join()
    assert files.notice.exists() and protocol.read_result(files.result).status == protocol.STOPPED
    assert signal.getsignal(number) is before


def test_a_trainer_that_dies_of_the_notice_was_pre_empted(run):
    def act():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(int((run.attempt(1).root / "trainer.pid").read_text()), signal.SIGKILL)

    thread = once_begun(run, act)
    result = protocol.read_result(carry_out(run, plan={"step_seconds": 30}).result)
    thread.join()
    assert result.failure.kind == protocol.PREEMPTED and "told to leave (SIGTERM)" in result.failure.message


def test_a_notice_before_the_trainer_listens_is_passed_on_when_it_does(run):
    notice = Notice(run.attempt(1))
    run.attempt(1).root.mkdir(parents=True)
    with notice.heard():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        assert not notice.is_due()
        run.attempt(1).events.touch()
        assert notice.is_due() and not notice.is_due()
    assert notice.by is signal.SIGTERM and run.attempt(1).notice.exists()


def test_a_worker_whose_run_has_a_later_attempt_ends_its_trainer_and_writes_nothing(run, monkeypatch):
    monkeypatch.setattr(worker, "OWNER_SECONDS", 0.1)
    thread = once_begun(run, lambda: run.attempt(2).root.mkdir())
    files = carry_out(run, plan={"step_seconds": 30})
    thread.join()
    assert not files.result.exists()
    assert not tagged_processes(TRAINER_TAG, trainer_tag(files))


def test_a_trainer_that_an_earlier_attempt_left_on_this_host_is_ended(run):
    run.attempt(1).root.mkdir(parents=True)
    tag = trainer_tag(run.attempt(1))
    with subprocess.Popen(["sleep", "60"], env={**os.environ, TRAINER_TAG: tag}) as left:
        while not tagged_processes(TRAINER_TAG, tag):  # its environment shows once its exec is through
            time.sleep(0.01)
        carry_out(run, number=2)
        assert left.wait(30) == -signal.SIGKILL


def test_a_second_life_of_the_same_job_finds_the_claim_and_leaves(run):
    allocation = Allocation(job="9", names=("node1",))
    files = carry_out(run, allocation=allocation)
    before = files.result.stat().st_mtime_ns
    carry_out(run, allocation=Allocation(job="9", restarts=1, names=("node1",)))
    assert files.result.stat().st_mtime_ns == before
    claim = read_claim(files)
    assert (claim.job, claim.restarts, claim.node) == ("9", 0, "node1") and claim.began > 0


SECOND = Allocation(job="9", node=1, names=("node1", "node2"))


def test_the_worker_of_another_node_leaves_where_the_attempt_is_not_its_jobs(run):
    make_claim(run.attempt(1), claim_for(Allocation(job="8", names=("node1",))))
    files = carry_out(run, allocation=SECOND)
    assert not files.events.exists() and not files.node_failure(1).exists()


def test_the_worker_of_another_node_says_why_its_part_failed_and_leaves_the_result_to_the_first(run, monkeypatch):
    make_claim(run.attempt(1), claim_for(Allocation(job="9", names=("node1",))))
    monkeypatch.setattr(worker, "_on_this_node", lambda part: [])
    run.attempt(1).scheduler.mkdir()
    files = carry_out(run, allocation=SECOND, mode="out_of_memory")
    told = protocol.read_json(files.node_failure(1))
    assert told["kind"] == OUT_OF_MEMORY and told["message"].startswith("node node2: RuntimeError: CUDA out of memory")
    assert not files.result.exists()


def test_the_first_node_ends_its_part_when_anothers_has_failed_and_tells_why(run, monkeypatch):
    monkeypatch.setattr(worker, "OWNER_SECONDS", 0.1)
    monkeypatch.setattr(worker, "_on_this_node", lambda part: [])
    failure = {"kind": OUT_OF_MEMORY, "message": "node node2: CUDA out of memory", "log": "x"}
    thread = once_begun(run, lambda: protocol.write_json_atomically(run.attempt(1).node_failure(1), failure))
    files = carry_out(run, allocation=Allocation(job="9", names=("localhost", "node2")), plan={"step_seconds": 30})
    thread.join()
    result = protocol.read_result(files.result)
    assert (result.failure.kind, result.failure.message) == (OUT_OF_MEMORY, failure["message"])


def test_another_interpreter_says_what_it_has_and_one_that_is_not_there_is_a_mistake_of_the_study(run):
    assert describe_machine("", sys.executable).packages == installed_packages()
    result = protocol.read_result(carry_out(run, python="/no/such/python").result)
    assert result.failure.kind == CONFIG and "[resources] python: " in result.failure.message


def test_several_processes_run_under_torchrun(run):
    command = worker.trainer_command(run, 2, 8)
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
    assert command[-3:] == [str(run.root), "--attempt", "2"]
    assert worker.trainer_command(run, 2, 1)[1] == str(run.bundle)


def test_a_second_copy_of_an_attempt_leaves_without_a_trace(run):
    attempt_with(run)
    before = {path: path.stat().st_mtime_ns for path in run.attempt(1).root.iterdir()}
    worker.run_attempt(str(run.root), 1, 1, "", 60.0)
    assert {path: path.stat().st_mtime_ns for path in run.attempt(1).root.iterdir()} == before


@pytest.mark.parametrize(
    ("mode", "kind", "message"),
    [
        ("traceback", CODE, "RuntimeError: a plain mistake"),
        ("out_of_memory", OUT_OF_MEMORY, "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB"),
        ("disk", DISK, "OSError: [Errno 28] No space left on device"),
        ("data", DATA, "shard 3 is truncated"),
        ("killed", INFRASTRUCTURE, "the trainer was ended by SIGKILL"),
        ("silent", CODE, "the trainer ended with exit code 0 and left no result"),
    ],
)
def test_a_trainer_that_left_no_result_gets_one_that_says_why(run, mode, kind, message):
    result = attempt_with(run, mode)
    assert (result.status, result.failure.kind, result.failure.message) == (protocol.FAILED, kind, message)
    assert result.failure.log.startswith(str(run.attempt(1).stderr))
    assert result.seed == 7


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_trainer_whose_last_words_found_no_room_says_nothing_of_the_trial(run, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", no_space)
    failure = attempt_with(run, "silent").failure
    assert (failure.kind, failure.message) == (DISK, f"{run.attempt(1).root}: no space left on device")


def test_a_result_for_which_there_is_no_room_leaves_an_empty_file(run, monkeypatch):
    write_plans(Home(run.root.parent.parent), {})
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StorageError, match=r"result\.json: cannot be written: No space left on device"):
        worker.run_attempt(str(run.root), 1, 1, "", 60.0, 0.5)
    assert run.attempt(1).no_room.stat().st_size == 0 and not run.attempt(1).result.exists()


def test_the_trainers_own_result_stands(run):
    assert attempt_with(run, "not_finite").failure.kind == protocol.NOT_FINITE


def test_a_trainer_that_does_not_leave_after_its_result_is_ended(run):
    began = time.monotonic()
    assert attempt_with(run, "lingers").status == protocol.COMPLETE
    assert time.monotonic() - began < 30
    assert not tagged_processes(TRAINER_TAG, trainer_tag(run.attempt(1)))


def test_an_attempt_that_was_stopped_before_it_began_does_not_begin(run):
    run.attempt(1).root.mkdir(parents=True)
    run.attempt(1).stop.touch()
    assert attempt_with(run).status == protocol.STOPPED
    assert not run.attempt(1).events.exists()


def stop_once_begun(run):
    def touch():
        wait_for(run.attempt(1).root / "trainer.pid")
        run.attempt(1).stop.touch()

    thread = threading.Thread(target=touch)
    thread.start()
    return thread


def test_a_running_attempt_ends_its_step_when_it_is_stopped(run):
    thread = stop_once_begun(run)
    result = attempt_with(run, step_seconds=30.0, grace=20.0)
    thread.join()
    assert result.status == protocol.STOPPED and result.scores == {}


def test_a_trainer_that_is_deaf_to_the_stop_is_killed_and_told_as_stopped(run):
    thread = stop_once_begun(run)
    result = attempt_with(run, "deaf", step_seconds=30.0)
    thread.join()
    assert (result.status, result.failure) == (protocol.STOPPED, None)


@pytest.mark.parametrize("mode", ["deaf", ""])
def test_an_attempt_that_takes_too_long_is_ended_and_told_as_that(run, mode):
    """Also where the trainer obeys and leaves a result that says stopped: nobody asked it to stop."""
    result = attempt_with(run, mode, step_seconds=30.0, timeout=0.7, grace=20.0 if mode == "" else 0.5)
    assert result.status == protocol.FAILED
    assert result.failure.kind == TIMEOUT
    assert "ended after 0.7 s, the study's [resources] timeout_minutes" in result.failure.message
    assert run.attempt(1).overdue.exists()


def test_ranks_that_left_the_group_are_ended_too(run, tmp_path):
    """torchrun gives each rank a session of its own."""
    bundle = b"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
raise SystemExit(1)
"""
    request = RunRequest(preset="smoke", config=load_preset("smoke"), seed=7, data_dir="/", manifest_sha256=MANIFEST)
    other = RunStore(Home(tmp_path)).plan(request, bundle=bundle, code={})
    worker.run_attempt(str(other.root), 1, 1, "", 60.0)
    deadline = time.monotonic() + 10
    while tagged_processes(TRAINER_TAG, trainer_tag(other.attempt(1))):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_changed_bundle_is_not_run(run):
    run.bundle.write_bytes(b"print('something else')")
    result = attempt_with(run)
    assert result.failure.kind == CODE
    assert "its SHA-256 is" in result.failure.message and not run.attempt(1).events.exists()


def test_a_missing_bundle_is_not_run(run):
    run.bundle.unlink()
    assert "its SHA-256 is missing" in attempt_with(run).failure.message


def test_a_spec_of_another_protocol_is_refused_before_the_trainer_starts(run):
    """Its own check is left out of the bundle."""
    run.spec.write_text(run.spec.read_text().replace('"protocol": 1', '"protocol": 99'))
    assert "protocol 99, this code speaks 1" in attempt_with(run).failure.message
    assert not run.attempt(1).events.exists()


def test_a_damaged_spec_ends_the_attempt_with_its_place(run):
    run.spec.write_text("{")
    assert f"{run.spec}: not a JSON object" in attempt_with(run).failure.message
