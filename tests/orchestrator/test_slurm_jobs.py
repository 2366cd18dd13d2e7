import pytest

from orchestrator import slurm_jobs
from orchestrator.slurm import Answer
from orchestrator.slurm_jobs import ASK_SECONDS, HISTORY_LAG_SECONDS, JobTable

NAME = "caddie.a.b.1.c"


class Cluster:
    """Answers as it is told, when it is told; its clock stands still until it is set."""

    def __init__(self):
        self.now = 0.0
        self.queue, self.history = "", Answer(output="", errors="accounting storage is disabled", returncode=1)
        self.asked = []
        self.is_slow = False

    def clock(self):
        return self.now

    def ask(self, command):
        cluster, answer = self, self._answer(command)
        self.asked.append(command)

        class Asked:
            asked = cluster.now

            def answer(self):
                return None if cluster.is_slow else answer

        return Asked()

    def _answer(self, command):
        if command[0] == "sacct":
            return self.history
        return Answer(output=self.queue, errors="", returncode=0) if isinstance(self.queue, str) else self.queue

    def says(self, *lines):
        self.queue = "".join(f"{line}\n" for line in lines)


@pytest.fixture
def cluster():
    return Cluster()


@pytest.fixture
def table(cluster):
    return JobTable(cluster.ask, cluster.clock)


def turns(cluster, table, count=2, names=None):
    """Let the loop come by often enough for one more question and its answer."""
    for _ in range(count):
        table.refresh(names or {NAME: "5"})
        cluster.now += ASK_SECONDS


def test_all_jobs_are_asked_about_with_one_question(cluster, table):
    names = {f"{NAME}{n}": str(n) for n in range(500)}
    turns(cluster, table, 1, names)
    assert len(cluster.asked) == 1


def test_a_job_that_waits_or_runs_is_not_gone(cluster, table):
    for state in ("PENDING", "RUNNING", "COMPLETING"):
        cluster.says(f"5|{NAME}|{state}|None|")
        turns(cluster, table, 3)
        assert table.gone_seconds(NAME) is None and table.live(NAME)[0].state == state


def test_what_was_asked_before_a_job_was_known_says_nothing_of_it(cluster, table):
    cluster.is_slow = True
    table.refresh({})
    cluster.now += 1
    table.refresh({NAME: "5"})
    cluster.is_slow = False
    table.refresh({NAME: "5"})
    assert table.gone_seconds(NAME) is None
    turns(cluster, table, 3)
    assert table.gone_seconds(NAME) is not None


def test_a_job_is_gone_since_the_first_of_the_answers_that_agree_on_it(cluster, table):
    turns(cluster, table)
    first = table.gone_seconds(NAME)
    turns(cluster, table)
    assert table.gone_seconds(NAME) == first + 2 * ASK_SECONDS
    cluster.says(f"5|{NAME}|RUNNING|None|node1")  # NODE_FAIL of a job that is requeued, say
    turns(cluster, table)
    assert table.gone_seconds(NAME) is None


def test_while_squeue_does_not_answer_nothing_is_gone_and_the_trouble_is_known(cluster, table):
    cluster.says(f"5|{NAME}|RUNNING|None|node1")
    turns(cluster, table)
    cluster.queue = Answer(output="", errors="Unable to contact slurm controller", returncode=1)
    turns(cluster, table)
    assert table.gone_seconds(NAME) is None and table.silent_since is not None
    assert table.problem == "Unable to contact slurm controller"
    cluster.says(f"5|{NAME}|RUNNING|None|node1")
    turns(cluster, table)
    assert table.silent_since is None and not table.problem


def test_squeue_tells_the_end_of_a_job_without_accounting(cluster, table):
    cluster.says(f"5|{NAME}|NODE_FAIL|None|node3")
    turns(cluster, table)
    assert table.is_explained(NAME, "5") and table.last(NAME, "5").nodes == "node3"
    assert all(command[0] == "squeue" for command in cluster.asked)


def test_accounting_is_asked_about_jobs_that_squeue_has_forgotten(cluster, table):
    cluster.history = Answer(output=f"5|{NAME}|TIMEOUT|node2\n", errors="", returncode=0)
    turns(cluster, table, 4)
    assert table.is_explained(NAME, "5") and table.last(NAME, "5").state == "TIMEOUT"
    assert cluster.asked[-1][0] == "squeue" and [c[-1] for c in cluster.asked if c[0] == "sacct"] == ["--jobs=5"]


@pytest.mark.parametrize("history", ["PENDING", "RUNNING", None])
def test_accounting_that_lags_or_is_down_is_not_waited_for_for_ever(cluster, table, history):
    if history:
        cluster.history = Answer(output=f"5|{NAME}|{history}|node2\n", errors="", returncode=0)
    turns(cluster, table, 3)
    assert not table.is_explained(NAME, "5") and table.last(NAME, "5") is None
    cluster.now += HISTORY_LAG_SECONDS
    turns(cluster, table)
    assert table.is_explained(NAME, "5")


def test_an_earlier_job_of_the_same_name_is_not_taken_for_this_one(cluster, table):
    cluster.says(f"4|{NAME}|FAILED|BadConstraints|", f"5|{NAME}|CANCELLED|None|node1")
    turns(cluster, table)
    assert table.last(NAME, "4").state == "FAILED" and table.last(NAME, "5").state == "CANCELLED"


def test_questions_are_not_asked_faster_than_one_at_a_time(cluster, table):
    cluster.is_slow = True
    turns(cluster, table, 20)
    assert len(cluster.asked) == 1
    assert slurm_jobs.ASK_SECONDS >= 1


def test_another_job_that_had_the_same_id_is_not_taken_for_this_one(cluster, table):
    """A slurmctld that was killed gives the last ids again, and forgets jobs."""
    cluster.history = Answer(output="5|caddie.a.b.0.c|COMPLETED|node2\n", errors="", returncode=0)
    turns(cluster, table, 4)
    assert table.last(NAME, "5") is None
    cluster.now += HISTORY_LAG_SECONDS
    assert table.is_explained(NAME, "5")
