import dataclasses
import os
import subprocess
import sys

import pytest
from fakes import study_text

from orchestrator import cli, controller_job, detach, lock, oversight
from orchestrator.errors import Interrupted, MachineError, StorageError
from orchestrator.record_attempt import record_study
from orchestrator.study import LOCAL
from orchestrator.study_file import parse_study


class FakeSlurm:
    """sbatch, squeue and scancel that keep their jobs in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.log, self.jobs = folder / "log", folder / "jobs"
        self.jobs.mkdir(parents=True)
        self.log.touch()
        programs = {
            "sbatch": f"n=$(($(ls {self.jobs} | wc -l) + 1)); echo PENDING > {self.jobs}/$n; echo $n",
            "squeue": f'for a; do case "$a" in --states=*) s="${{a#--states=}}";; esac; done; cd {self.jobs}; '
            'for j in *; do [ -e "$j" ] || continue; case ",$s," in *",$(cat "$j"),"*) echo "$j";; esac; done; true',
            "scancel": f"for j; do [ -e {self.jobs}/$j ] || exit 1; echo CANCELLED > {self.jobs}/$j; done",
        }
        for name, body in programs.items():
            path = folder / name
            path.write_text(f'#!/bin/bash\necho "{name} $*" >> {self.log}\nenv | grep ^SLURM_ >> {self.log}\n{body}\n')
            path.chmod(0o755)

    def states(self):
        return {path.name: path.read_text().strip() for path in sorted(self.jobs.iterdir())}

    def asked(self):
        return self.log.read_text().splitlines()

    def refuse(self, words):
        (self.folder / "sbatch").write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 1\n")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    found = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{found.folder}:{os.environ['PATH']}")
    return found


def submit(home, *options):
    return controller_job.submit(home, "tiny", ["study", "run", "my study.toml"], options)


def test_a_controller_job_runs_the_same_command_and_is_told_before_its_time_is_up(home, slurm):
    assert submit(home, "--partition=cpu", "--time=60") == "1"
    script = home.study("tiny").job_script.read_text()
    assert "#SBATCH --partition=cpu\n#SBATCH --time=60\n" in script
    assert "#SBATCH --signal=B:TERM@120\n" in script and "--no-requeue" in script
    assert f"#SBATCH --output={home.study('tiny').log}\n" in script
    assert f"export {detach.ROLE}=job" in script
    assert script.endswith(f"exec {sys.executable} -m orchestrator.cli study run 'my study.toml'\n")
    subprocess.run(["bash", "-n", home.study("tiny").job_script], check=True)


def test_a_controller_job_has_a_successor_which_goes_when_the_study_ends(home, slurm):
    submit(home)
    with controller_job.succeeded(home.study("tiny"), "1"):
        assert slurm.states() == {"1": "PENDING", "2": "PENDING"}
        assert any("sbatch --parsable --dependency=afterany:1 " in line for line in slurm.asked())
    assert slurm.states()["2"] == "CANCELLED"


def test_the_successor_stays_where_the_controller_only_has_to_leave(home, slurm):
    submit(home)
    with pytest.raises(Interrupted), controller_job.succeeded(home.study("tiny"), "1"):
        raise Interrupted("told to leave")
    assert slurm.states()["2"] == "PENDING"


def test_the_successor_stays_where_the_controller_is_killed(home, slurm):
    submit(home)
    with pytest.raises(SystemExit), controller_job.succeeded(home.study("tiny"), "1"):
        raise SystemExit
    assert slurm.states()["2"] == "PENDING"


def run_script(home, job_id, last_line):
    """The job's script, as Slurm runs it, with another program at its end; what that printed."""
    lines = home.study("tiny").job_script.read_text().splitlines()
    script = "\n".join([*lines[:-1], last_line])
    environment = {**os.environ, "SLURM_JOB_ID": job_id, "SLURM_CPUS_PER_TASK": "4", "SLURM_CONF": "/etc/slurm.conf"}
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True).stdout


def test_the_successor_is_queued_before_the_program_is_loaded(home, slurm, monkeypatch):
    submit(home)
    assert run_script(home, "1", f"echo ${controller_job.SUCCESSOR}") == "2\n"
    assert f"sbatch --parsable --dependency=afterany:1 {home.study('tiny').job_script}" in slurm.asked()
    assert "SLURM_CONF=/etc/slurm.conf" in slurm.asked()
    assert not any(line.startswith(("SLURM_JOB_ID", "SLURM_CPUS")) for line in slurm.asked())
    monkeypatch.setenv(controller_job.SUCCESSOR, "2")
    with controller_job.succeeded(home.study("tiny"), "1"):
        assert slurm.states() == {"1": "PENDING", "2": "PENDING"}
        assert controller_job.SUCCESSOR not in os.environ  # what it starts has another
    assert slurm.states()["2"] == "CANCELLED"


def test_controllers_that_never_begin_do_not_follow_one_another_forever(home, slurm):
    submit(home)
    said = [run_script(home, str(number), f"echo ${controller_job.SUCCESSOR}").strip() for number in range(1, 6)]
    assert said == ["2", "3", "4", "", ""]
    assert submit(home) == "5"  # given again, once the environment is mended
    assert run_script(home, "5", f"echo ${controller_job.SUCCESSOR}") == "6\n"
    with controller_job.succeeded(home.study("tiny"), "5"):  # one that begins queues its own, and the count begins anew
        assert "sbatch --parsable --dependency=afterany:5" in slurm.log.read_text()
        assert run_script(home, "6", f"echo ${controller_job.SUCCESSOR}") == "8\n"


def test_a_script_that_can_queue_no_successor_goes_on_to_its_program(home, slurm):
    submit(home)
    slurm.refuse("sbatch: error: Unable to contact slurm controller")
    assert run_script(home, "1", f"echo begun ${controller_job.SUCCESSOR}") == "begun\n"


@pytest.mark.parametrize("error", [StorageError("the disk is full"), RuntimeError("a mistake of ours")])
def test_what_a_person_has_to_mend_is_not_tried_again_and_again(home, slurm, error):
    submit(home)
    with pytest.raises(type(error)), controller_job.succeeded(home.study("tiny"), "1"):
        raise error
    assert slurm.states()["2"] == "CANCELLED"


def test_a_scheduler_that_takes_no_successor_is_asked_again_when_the_time_is_up(home, slurm, capsys):
    submit(home)
    working = (slurm.folder / "sbatch").read_text()
    slurm.refuse("sbatch: error: Unable to contact slurm controller")

    def work_until_told_to_leave():
        with controller_job.succeeded(home.study("tiny"), "1"):
            assert "no successor: sbatch: sbatch: error: Unable to contact" in capsys.readouterr().err
            (slurm.folder / "sbatch").write_text(working)
            raise Interrupted("told to leave")

    with pytest.raises(Interrupted):
        work_until_told_to_leave()
    assert slurm.states()["2"] == "PENDING"


def test_what_sbatch_refuses_is_told_in_its_own_words(home, slurm):
    slurm.refuse("sbatch: error: invalid partition specified: cup")
    with pytest.raises(MachineError, match="invalid partition specified: cup") as caught:
        submit(home, "--partition=cup")
    assert "--job-options" in caught.value.hint


def test_without_slurm_the_remedy_is_a_detached_controller(home, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MachineError, match="sbatch: there is no such program here") as caught:
        submit(home)
    assert "--detach" in caught.value.hint
    assert controller_job.jobs_of(home, "tiny") == []


def test_the_scheduler_is_asked_without_the_variables_of_the_job_that_asks(home, slurm, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    submit(home)
    assert "SLURM_CONF=/etc/slurm.conf" in slurm.asked()
    assert not any(line.startswith(("SLURM_JOB_ID", "SLURM_CPUS")) for line in slurm.asked())


# ------------------------------------------------------------------------------------------------ seen and stopped


def test_a_study_whose_controller_waits_for_the_cluster_is_queued_and_can_be_taken_out(home, slurm):
    submit(home)
    found = oversight.status(home, "tiny")
    assert (found.state, found.controller_jobs) == ("queued", ["1"])
    assert "controller job 1" in oversight.as_text(found)
    assert oversight.ask_to_stop(home, "tiny", cancel=False) == (
        "tiny: took its controller, job 1, out of the queue; nothing had begun"
    )
    assert slurm.states() == {"1": "CANCELLED"}


def test_a_controller_that_is_only_starting_is_taken_out_with_the_successor_that_it_queues_meanwhile(home, slurm):
    submit(home)
    (slurm.jobs / "1").write_text("RUNNING\n")
    scancel = slurm.folder / "scancel"
    scancel.write_text(f"{scancel.read_text()}[ -e {slurm.jobs}/2 ] || echo PENDING > {slurm.jobs}/2\n")
    assert oversight.ask_to_stop(home, "tiny", cancel=False) == (
        "tiny: took its controller, job 1, 2, out of the queue; nothing had begun"
    )
    assert slurm.states() == {"1": "CANCELLED", "2": "CANCELLED"}


def test_a_controller_that_reports_on_a_finished_study_is_left_alone(home, slurm):
    from make_controller import controller

    controller(parse_study(study_text()), home).run()
    submit(home)
    (slurm.jobs / "1").write_text("RUNNING\n")
    assert "there is nothing to stop" in oversight.ask_to_stop(home, "tiny", cancel=False)
    assert slurm.states() == {"1": "RUNNING"}


def test_stopping_a_study_takes_the_waiting_successor_too_and_leaves_the_running_controller(home, slurm):
    from make_controller import controller

    submit(home)
    (slurm.jobs / "1").write_text("RUNNING\n")
    with controller_job.succeeded(home.study("tiny"), "1"):
        controller(parse_study(study_text()), home).run()
        with lock.held(home.study("tiny")):
            assert "asked its controller" in oversight.ask_to_stop(home, "tiny", cancel=False)
        assert slurm.states() == {"1": "RUNNING", "2": "CANCELLED"}


# ------------------------------------------------------------------------------------------------ a study in one job


def test_a_comparison_by_turns_asks_for_one_allocation_and_runs_within_it():
    study = record_study(
        "smoke", data="d", seeds=(1, 2), knobs={}, interleave={"set": {"ttt.lr": 0.01}},
        resources={
            "launcher": "slurm", "gpus_per_run": 8, "partition": "gpu", "exclusive": True, "timeout_minutes": 30.0,
            "sbatch": {"mem": "0", "overcommit": True},
        },
    )  # fmt: skip
    assert controller_job.allocation_of(study) == [
        "--partition=gpu", "--nodes=1", "--time=122", "--gpus-per-node=8", "--exclusive", "--mem=0", "--overcommit",
    ]  # fmt: skip
    within = controller_job.within_allocation(study)
    assert (within.resources.launcher, within.resources.gpus_per_run, within.timeout_minutes) == (LOCAL, 8, 30.0)
    assert dataclasses.replace(within, resources=study.resources) == study


def test_as_job_checks_the_study_before_it_queues_anything(home, slurm, tmp_path, capsys):
    path = tmp_path / "tiny.toml"
    path.write_text(study_text())
    assert cli.main(["--home", str(home.root), "study", "run", str(path), "--as-job"]) == 4
    assert "there is no data set 'nothing'" in capsys.readouterr().err
    assert slurm.states() == {}
