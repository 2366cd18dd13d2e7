import errno
import os
import re

import pytest
from fakes import FAKE_BUNDLE, MANIFEST

from orchestrator import pulse, slurm_jobs, slurm_launcher
from orchestrator.allocation import Allocation
from orchestrator.claims import claim_for, make_claim
from orchestrator.errors import ConfigError, StorageError
from orchestrator.home import Home
from orchestrator.job_names import JobNames
from orchestrator.ports import OpenJob, Unanswered
from orchestrator.presets import load_preset
from orchestrator.runs import RunRequest, RunStore
from orchestrator.slots import JobResources
from orchestrator.slurm_launcher import SlurmLauncher, is_hidden
from orchestrator.study import Resources
from trainer import protocol
from trainer.protocol import INFRASTRUCTURE, NODE, PREEMPTED

NAMES = JobNames("tiny", "h")
PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >>{folder}/asked
cat {folder}/{name}.err >&2 2>/dev/null
cat {folder}/{name}.out 2>/dev/null
exit $(cat {folder}/{name}.rc 2>/dev/null || echo 0)
"""


class Slurm:
    """Programs by Slurm's names that answer as they are told, and keep what they were asked."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("sbatch", "squeue", "sacct", "scancel", "sinfo", "srun"):
            path = folder / name
            path.write_text(PROGRAM.format(folder=folder, name=name))
            path.chmod(0o755)
        self.says("sbatch", "Submitted batch job 41\n")

    def says(self, name, output="", *, errors="", returncode=0):
        for suffix, content in (("out", output), ("err", errors), ("rc", str(returncode))):
            (self.folder / f"{name}.{suffix}").write_text(content)

    def asked(self, name):
        path = self.folder / "asked"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(f"{name} ")]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(slurm_jobs, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(slurm_jobs, "HISTORY_SECONDS", 0.0)
    monkeypatch.setattr(slurm_launcher, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(slurm_launcher, "DOUBT_SECONDS", 0.0)
    return Slurm(folder)


@pytest.fixture
def run(tmp_path):
    request = RunRequest(preset="smoke", config=load_preset("smoke"), seed=7, data_dir="/d", manifest_sha256=MANIFEST)
    return RunStore(Home(tmp_path / "home")).plan(request, bundle=FAKE_BUNDLE, code={})


@pytest.fixture
def tag(run):
    return NAMES.tag(run.run_id, 1)


def launcher(**resources):
    return SlurmLauncher(Resources(launcher="slurm", **resources), NAMES)


def submit(run, tag, one=None, **changes):
    one = one or launcher()
    return one, one.submit(
        run, 1, tag=tag, resources=JobResources(slot=0, timeout_seconds=600.0, gpus_per_node=8, **changes)
    )


def script_of(run):
    return next(run.attempt(1).scheduler.glob("41_submission.sh")).read_text()


def look(one, run, tag, job_id="41", times=12):
    """Let the loop come by until questions asked now have been answered and taken up."""
    notes = []
    for _ in range(times):
        asked = one.table._queue
        notes += one.look([OpenJob(tag=tag, job_id=job_id, files=run.attempt(1))])
        while asked is not None and asked is one.table._queue and asked._process.poll() is None:
            pass
        while one.table._history is not None and one.table._history._process.poll() is None:
            pass
    return notes


def test_a_job_asks_for_what_the_study_says_and_for_no_more(run, tag, cluster):
    one = launcher(
        nodes=2, partition="gpu", account="golf", qos="short", constraint="h100", comment="wd sweep", exclusive=True,
        sbatch={"mem": "0", "cpus-per-task": 64, "overcommit": True, "exclude": "bad1"}, setup=("module load cuda",),
    )  # fmt: skip
    _, job_id = submit(run, tag, one, nodes=2, exclude=("bad2",))
    text = script_of(run)
    options = dict(re.findall(r"#SBATCH --([\w-]+)(?:=(.*))?", text))
    assert job_id == "41" and protocol.read_json(run.attempt(1).job)["job_id"] == "41"
    expected = {
        "job-name": tag, "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "8", "partition": "gpu", "account": "golf",
        "qos": "short", "constraint": "h100", "comment": "'wd sweep'", "exclusive": "", "mem": "0", "cpus-per-task": "64",
        "overcommit": "", "exclude": "bad1,bad2", "no-requeue": "", "time": "15",
    }  # fmt: skip
    assert {name: options.get(name) for name in expected} == expected and "wckey" not in options
    assert text.index("module load cuda") < text.index(f"export CADDIE_JOB_TAG={tag}") < text.index("srun ")
    assert "--cpus-per-task=64" in text.partition("srun ")[2]


def test_a_job_of_no_wishes_leaves_everything_else_to_the_cluster(run, tag, cluster):
    submit(run, tag)
    options = dict(re.findall(r"#SBATCH --([\w-]+)(?:=(.*))?", script_of(run)))
    assert not {"partition", "account", "qos", "constraint", "comment", "exclusive", "exclude", "wckey"} & set(options)


def test_a_cluster_that_names_gpus_otherwise_is_asked_its_way(run, tag, cluster):
    submit(run, tag, launcher(sbatch={"gres": "gpu:h100:8"}))
    assert "gpus-per-node" not in script_of(run) and "--gres=gpu:h100:8" in script_of(run)


@pytest.mark.parametrize(
    ("name", "named", "hidden"),
    [
        ("SLURM_JOB_ID", (), True),
        ("SLURM_CPUS_PER_TASK", (), True),
        ("SUBMITIT_FOLDER", (), True),
        ("RANK", (), True),
        ("CUDA_VISIBLE_DEVICES", (), True),
        ("SBATCH_TIMELIMIT", (), True),
        ("SBATCH_REQUEUE", (), True),
        ("SBATCH_PARTITION", ("partition",), True),
        ("SBATCH_PARTITION", (), False),
        ("SBATCH_ACCOUNT", ("partition",), False),
        ("SLURM_CONF", (), False),
        ("HF_TOKEN", (), True),
        ("HOME", (), False),
    ],
)
def test_a_submission_from_within_a_job_is_not_shaped_by_that_job(name, named, hidden):
    assert is_hidden(name, named) == hidden


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD", "HF_TOKEN"])
def test_a_job_is_not_given_what_lets_the_controller_into_servers(name):
    assert is_hidden(name) and not is_hidden("CADDIE_HOME")


REFUSALS = {
    "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: Invalid partition name specified":
        "invalid partition specified: nope; Batch job submission failed: Invalid partition name specified",
    "sbatch: error: Batch job submission failed: Invalid qos specification": "Invalid qos specification",
    "sbatch: error: Batch job submission failed: Invalid wckey specification": "Invalid wckey specification",
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSALS)
def test_what_sbatch_refuses_is_told_in_its_words(run, tag, cluster, words, capsys):
    cluster.says("sbatch", errors=words, returncode=1)
    with pytest.raises(ConfigError, match=f"sbatch refuses the job: .*{REFUSALS[words]}") as caught:
        submit(run, tag, exclude=("node3",))
    assert "node3" in caught.value.hint
    assert capsys.readouterr().err == "", "said once"


UNANSWERED = [
    "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
    "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
    "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
    "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying",
    "sbatch: error: If munged is up, restart with --num-threads=10\nsbatch: error: Munge encode failed",
    "",
]


@pytest.mark.parametrize("words", UNANSWERED)
def test_a_submission_without_an_answer_is_looked_for_before_it_is_made_again(run, tag, cluster, words):
    cluster.says("sbatch", errors=words, returncode=1)
    one = launcher()
    with pytest.raises(Unanswered):
        submit(run, tag, one)
    cluster.says("squeue", f"77|{tag}|RUNNING|None|node1\n")
    assert one.find(run.attempt(1), tag=tag) == "77"
    assert (run.attempt(1).scheduler / "77_submitted.pkl").exists(), "the job gets the task that it waits for"
    assert protocol.read_json(run.attempt(1).job)["job_id"] == "77"


def test_sbatch_that_says_something_else_may_have_made_a_job(run, tag, cluster):
    cluster.says("sbatch", "all is well\n")
    with pytest.raises(Unanswered, match="Could not make sense"):
        submit(run, tag)


def test_a_job_that_slurm_does_not_have_may_be_submitted_again(run, tag, cluster, monkeypatch):
    one = launcher()
    assert one.find(run.attempt(1), tag=tag) is None and not cluster.asked("squeue"), "sbatch was never called"
    cluster.says("sbatch", errors=UNANSWERED[1], returncode=1)
    with pytest.raises(Unanswered):
        submit(run, tag, one)
    cluster.says("squeue", f"76|{tag}|FAILED|BadConstraints|\n")
    assert one.find(run.attempt(1), tag=tag) is None
    monkeypatch.setattr(slurm_launcher, "DOUBT_SECONDS", 60.0)
    with pytest.raises(Unanswered, match="may still arrive"):
        one.find(run.attempt(1), tag=tag)
    cluster.says("squeue", errors="Unable to contact slurm controller", returncode=1)
    with pytest.raises(Unanswered, match="squeue: Unable"):
        one.find(run.attempt(1), tag=tag)


def test_a_job_whose_submitter_was_killed_is_known_by_its_script(run, tag, cluster):
    submit(run, tag)
    folder = run.attempt(1).scheduler
    (folder / "41_submitted.pkl").rename(folder / "8c1d.pkl")
    run.attempt(1).job.unlink()
    assert launcher().find(run.attempt(1), tag=tag) == "41" and not cluster.asked("squeue")
    assert (folder / "41_submitted.pkl").exists() and run.attempt(1).job.exists()


def test_while_slurm_does_not_answer_nothing_is_submitted(run, tag, cluster):
    cluster.says("squeue", errors="Unable to contact slurm controller (connect failure)", returncode=1)
    one = launcher()
    notes = look(one, run, tag)
    assert len(notes) == 1 and "Slurm does not answer: Unable to contact" in notes[0]
    with pytest.raises(Unanswered):
        submit(run, tag, one)
    assert not cluster.asked("sbatch")


def test_a_full_disk_at_a_submission_is_a_storage_error(run, tag, cluster, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(slurm_launcher.SlurmExecutor, "submit", refuse)
    with pytest.raises(StorageError, match="No space left"):
        submit(run, tag)


def test_a_submission_leaves_nothing_of_an_earlier_one_in_its_folder(run, tag, cluster):
    old = run.attempt(1).scheduler / "41_0_result.pkl"
    old.parent.mkdir(parents=True)
    old.write_text("an old answer under a number that comes again")
    submit(run, tag)
    assert not old.exists()


# ---------------------------------------------------------------------------------------------------- alive, or not


def test_an_attempt_lives_while_its_job_waits_or_runs(run, tag, cluster):
    one, _ = submit(run, tag)
    for state in ("PENDING", "RUNNING", "COMPLETING"):
        cluster.says("squeue", f"41|{tag}|{state}|None|node1\n")
        look(one, run, tag)
        assert one.is_alive(run.attempt(1), tag=tag)


def test_an_attempt_lives_until_slurm_has_answered(run, tag, cluster):
    one, _ = submit(run, tag)
    assert one.is_alive(run.attempt(1), tag=tag)


@pytest.mark.parametrize(
    ("state", "kind"),
    [("PREEMPTED", PREEMPTED), ("NODE_FAIL", NODE), ("CANCELLED", INFRASTRUCTURE), ("TIMEOUT", INFRASTRUCTURE)],
)
def test_an_attempt_whose_job_ended_is_dead_and_slurm_says_why(run, tag, cluster, state, kind):
    one, _ = submit(run, tag)
    cluster.says("squeue", f"41|{tag}|{state}|None|node2\n")
    look(one, run, tag)
    assert not one.is_alive(run.attempt(1), tag=tag)
    ending = one.ending(run.attempt(1), tag=tag)
    assert ending.kind == kind and f"(Slurm: job 41 {state} on node2)" in ending.message
    assert one.nodes_of(run.attempt(1), tag=tag) == ("node2",)


def test_an_attempt_with_a_result_has_ended_whatever_slurm_says(run, tag, cluster):
    one, _ = submit(run, tag)
    cluster.says("squeue", f"41|{tag}|RUNNING|None|node1\n")
    look(one, run, tag)
    run.attempt(1).result.write_text("{}")
    assert not one.is_alive(run.attempt(1), tag=tag)


def claim(run, **changes):
    make_claim(run.attempt(1), claim_for(Allocation(**{"job": "41", "names": ("node1",), **changes})))


def test_an_attempt_that_is_heard_lives_although_slurm_has_given_its_node_up(run, tag, cluster, monkeypatch):
    monkeypatch.setattr(slurm_launcher, "SETTLE_SECONDS", 5.0)
    one, _ = submit(run, tag)
    claim(run)
    cluster.says("squeue", f"41|{tag}|NODE_FAIL|None|node1\n")
    look(one, run, tag)
    monkeypatch.setattr(one.table, "gone_seconds", lambda name: 60.0)
    assert one.is_alive(run.attempt(1), tag=tag)


def test_an_attempt_that_falls_silent_is_dead_although_slurm_says_that_it_runs(run, tag, cluster, monkeypatch):
    one, _ = submit(run, tag)
    claim(run)
    cluster.says("squeue", f"41|{tag}|RUNNING|None|node1\n")
    look(one, run, tag)
    assert one.is_alive(run.attempt(1), tag=tag)
    monkeypatch.setattr(one.pulse, "silent_seconds", lambda attempt: pulse.SILENCE_SECONDS + 1)
    assert not one.is_alive(run.attempt(1), tag=tag)
    ending = one.ending(run.attempt(1), tag=tag)
    assert (
        ending.kind == NODE and ending.message == "nothing was heard from node1 for 25 s, while Slurm says that it runs"
    )


def test_a_suspended_job_that_is_not_heard_was_pre_empted_and_its_node_is_sound(run, tag, cluster, monkeypatch):
    one, _ = submit(run, tag)
    claim(run)
    cluster.says("squeue", f"41|{tag}|SUSPENDED|None|node1\n")
    look(one, run, tag)
    assert one.is_alive(run.attempt(1), tag=tag), "it may go on in time"
    monkeypatch.setattr(one.pulse, "silent_seconds", lambda attempt: pulse.SILENCE_SECONDS + 1)
    assert not one.is_alive(run.attempt(1), tag=tag)
    ending = one.ending(run.attempt(1), tag=tag)
    assert ending.kind == PREEMPTED and ending.message == (
        "the job was suspended, and training by the clock cannot wait (Slurm: job 41 SUSPENDED on node1)"
    )


def test_a_job_of_which_nobody_knows_anything_is_gone(run, tag, cluster, monkeypatch):
    monkeypatch.setattr(slurm_jobs, "HISTORY_LAG_SECONDS", 0.0)
    cluster.says("sacct", errors="Slurm accounting storage is disabled", returncode=1)
    one, _ = submit(run, tag)
    look(one, run, tag)
    assert not one.is_alive(run.attempt(1), tag=tag)
    ending = one.ending(run.attempt(1), tag=tag)
    assert ending.kind == PREEMPTED and ending.message.endswith("had not begun (Slurm knows no job 41)")
    claim(run)
    ending = one.ending(run.attempt(1), tag=tag)
    assert ending.kind == INFRASTRUCTURE and ending.message.endswith("left no result (Slurm knows no job 41)")


def test_another_studys_attempt_is_asked_for_by_its_recorded_name(run, tag, cluster):
    submit(run, tag)
    other = launcher()
    assert other.is_alive(run.attempt(1), tag=None), "not known yet"
    cluster.says("squeue", f"41|{tag}|PENDING|Resources|\n")
    look(other, run, "caddie.other.x.1.h", job_id="1")
    assert other.is_alive(run.attempt(1), tag=None)
    cluster.says("squeue", "")
    look(other, run, "caddie.other.x.1.h", job_id="1")
    assert not other.is_alive(run.attempt(1), tag=None)


def test_an_attempt_of_this_machines_own_launcher_is_known_by_its_pulse(run, cluster, monkeypatch):
    one = launcher()
    assert not one.is_alive(run.attempt(1), tag=None)
    claim(run)
    assert one.is_alive(run.attempt(1), tag=None)
    monkeypatch.setattr(one.pulse, "silent_seconds", lambda attempt: pulse.SILENCE_SECONDS + 1)
    assert not one.is_alive(run.attempt(1), tag=None)


def test_of_several_nodes_only_those_that_failed_are_named(run, tag, cluster):
    one, _ = submit(run, tag, nodes=2)
    cluster.says("squeue", f"41|{tag}|NODE_FAIL|None|node[2-3]\n")
    cluster.says("sinfo", "node2|allocated\nnode3|down*\n")
    look(one, run, tag)
    assert one.nodes_of(run.attempt(1), tag=tag) == ("node3",)
    cluster.says("sinfo", errors="no", returncode=1)
    assert one.nodes_of(run.attempt(1), tag=tag) == ()
    protocol.write_json_atomically(run.attempt(1).node_failure(1), {})
    assert one.nodes_of(run.attempt(1), tag=tag) == ("node3",)


# ---------------------------------------------------------------------------------------------------- tidying


def until_cancelled(cluster, one):
    while any(command.answer() is None for command in one._commands):
        pass
    return cluster.asked("scancel")


def test_a_second_copy_of_an_attempt_is_cancelled(run, tag, cluster):
    one, _ = submit(run, tag)
    cluster.says("squeue", f"41|{tag}|RUNNING|None|node1\n42|{tag}|RUNNING|None|node2\n")
    look(one, run, tag)
    assert until_cancelled(cluster, one) == [f"scancel --name={tag} 42"]


def test_of_two_copies_the_one_that_claimed_the_attempt_stays(run, tag, cluster):
    one, _ = submit(run, tag)
    claim(run, job="42")
    cluster.says("squeue", f"41|{tag}|RUNNING|None|node1\n42|{tag}|RUNNING|None|node2\n")
    look(one, run, tag)
    assert until_cancelled(cluster, one) == [f"scancel --name={tag} 41"]


def test_a_finished_job_that_slurm_would_run_again_is_cancelled(run, tag, cluster):
    one, _ = submit(run, tag)
    ended, foreign = NAMES.tag("aa", 1), JobNames("other", "h").tag("aa", 1)
    cluster.says(
        "squeue", f"39|{ended}|PENDING|BeginTime|\n40|{NAMES.tag('bb', 1)}|RUNNING|None|n\n38|{foreign}|PENDING|x|\n"
    )
    look(one, run, tag)
    assert until_cancelled(cluster, one) == [f"scancel --name={ended} 39"], "one that runs may be about to leave"


@pytest.mark.parametrize("why", ["stop", "launch"])
def test_a_waiting_job_that_is_not_wanted_or_cannot_start_is_cancelled(run, tag, cluster, why):
    one, _ = submit(run, tag)
    reason = "launch failed requeued held" if why == "launch" else "Priority"
    if why == "stop":
        run.attempt(1).stop.touch()
    cluster.says("squeue", f"41|{tag}|PENDING|{reason}|\n")
    look(one, run, tag)
    assert until_cancelled(cluster, one) == [f"scancel --name={tag} 41"]


def test_people_are_told_once_that_jobs_wait_for_what_may_never_come(run, tag, cluster):
    one, _ = submit(run, tag)
    cluster.says("squeue", f"41|{tag}|PENDING|PartitionTimeLimit|\n")
    notes = look(one, run, tag)
    assert len(notes) == 1 and "PartitionTimeLimit" in notes[0]
    assert one.is_alive(run.attempt(1), tag=tag)


def test_a_job_is_cancelled_by_its_name_once_in_a_while(run, tag, cluster):
    one = launcher()
    one.cancel(tag)
    one.cancel(tag)
    assert until_cancelled(cluster, one) == [f"scancel --user={os.getuid()} --name={tag}"]
