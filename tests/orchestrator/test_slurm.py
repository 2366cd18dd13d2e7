import pytest

from orchestrator import slurm
from orchestrator.errors import MachineError
from orchestrator.slurm import Question, wait_for


def test_an_answer_of_squeue_is_read_whatever_names_other_jobs_have():
    output = (
        "12|caddie.a.b.1.c|RUNNING|None|node[1-2]\n13|odd | name|PENDING|launch failed requeued held|\n\nslurm: note\n"
    )
    first, second = slurm.read_squeue(output)
    assert (first.job_id, first.name, first.state, first.nodes) == ("12", "caddie.a.b.1.c", "RUNNING", "node[1-2]")
    assert (second.name, second.reason, second.nodes) == ("odd | name", "launch failed requeued held", "")


def test_an_answer_of_sacct_is_read():
    first, second = slurm.read_sacct("12|n|CANCELLED by 0|node1\n13|m|PENDING|None assigned\n")
    assert (first.state, first.nodes, second.nodes) == ("CANCELLED by 0", "node1", "")


@pytest.mark.parametrize(
    ("state", "is_down"),
    [
        ("idle", False),
        ("mixed", False),
        ("allocated", False),
        ("allocated*", True),
        ("down", True),
        ("drained", True),
        ("fail", True),
    ],
)
def test_nodes_that_slurm_does_not_use_are_told_from_those_that_it_does(state, is_down):
    assert slurm.read_down_nodes(f"node7|{state}\n") == (("node7",) if is_down else ())


@pytest.mark.parametrize(
    "name", ["SLURM_JOB_ID", "SLURM_TIME_FORMAT", "SQUEUE_FORMAT", "SACCT_FORMAT", "SRUN_CPUS_PER_TASK"]
)
def test_variables_that_change_answers_are_kept_from_the_commands(monkeypatch, name):
    monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    assert name not in slurm.environment() and slurm.environment()["SLURM_CONF"] == "/etc/slurm.conf"


def test_an_answer_is_taken_up_with_what_the_command_wrote_and_how_it_ended():
    answer = wait_for(Question(["sh", "-c", "echo yes; echo no >&2; exit 3"]))
    assert (answer.output, answer.errors, answer.returncode, answer.is_given) == ("yes\n", "no", 3, False)


def test_a_command_that_does_not_answer_is_ended(monkeypatch):
    monkeypatch.setattr(slurm, "ANSWER_SECONDS", 0.1)
    assert wait_for(Question(["sleep", "60"])).returncode < 0


def test_nobody_waits_for_an_answer():
    question = Question(["sleep", "60"])
    assert question.answer() is None
    process = question._process
    del question
    assert process.returncode is not None, "it is not left behind"


def test_a_command_that_is_not_there_is_an_answer_too():
    answer = wait_for(Question(["no-such-command"]))
    assert not answer.is_given and "no-such-command" in answer.errors


def test_a_machine_without_slurm_is_told_what_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="this machine has no sbatch, squeue, scancel, srun") as caught:
        slurm.require_clients()
    assert 'launcher = "local"' in caught.value.hint
