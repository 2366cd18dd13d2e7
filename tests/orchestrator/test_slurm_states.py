import pytest

from orchestrator.slurm_states import ENDED, QUEUED, RUNNING, STATES, meaning_of
from trainer.protocol import INFRASTRUCTURE, NODE, OUT_OF_MEMORY, PREEMPTED, RETRYABLE

# Every word that the manual pages of squeue and sacct list, up to Slurm 25.05.
WAITING = ["PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "EXPEDITING"]
AT_WORK = [
    "CONFIGURING", "COMPLETING", "POWER_UP_NODE", "RESIZING", "RUNNING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED",
    "UPDATE_DB",
]  # fmt: skip
OVER = {
    "BOOT_FAIL": NODE, "CANCELLED": INFRASTRUCTURE, "COMPLETED": INFRASTRUCTURE, "DEADLINE": INFRASTRUCTURE,
    "FAILED": INFRASTRUCTURE, "LAUNCH_FAILED": NODE, "NODE_FAIL": NODE, "OUT_OF_MEMORY": OUT_OF_MEMORY,
    "PREEMPTED": PREEMPTED, "RECONFIG_FAIL": NODE, "REVOKED": INFRASTRUCTURE, "TIMEOUT": INFRASTRUCTURE,
}  # fmt: skip


@pytest.mark.parametrize(
    ("state", "standing"), [*((word, QUEUED) for word in WAITING), *((word, RUNNING) for word in AT_WORK)]
)
def test_a_job_that_waits_or_works_is_not_over(state, standing):
    assert meaning_of(state).standing == standing


@pytest.mark.parametrize(("state", "kind"), OVER.items())
def test_a_job_that_is_over_says_why_its_attempt_failed(state, kind):
    meaning = meaning_of(state)
    assert (meaning.standing, meaning.kind) == (ENDED, kind) and meaning.words


def test_every_state_of_the_table_is_one_of_slurms_and_the_other_way_round():
    assert set(STATES) == {*WAITING, *AT_WORK, *OVER}


def test_only_running_out_of_memory_is_the_configurations_own_fault():
    assert {meaning.kind for meaning in STATES.values() if meaning.standing == ENDED} - RETRYABLE == {OUT_OF_MEMORY}


@pytest.mark.parametrize(
    ("text", "state"), [("CANCELLED by 1000", "CANCELLED"), ("CANCELLED+", "CANCELLED"), ("timeout", "TIMEOUT")]
)
def test_a_state_is_understood_as_squeue_and_sacct_write_it(text, state):
    assert meaning_of(text) is STATES[state]


@pytest.mark.parametrize("text", ["", " ", "TELEPORTING"])
def test_nobody_is_given_up_on_account_of_a_word_that_is_not_understood(text):
    assert meaning_of(text).standing == RUNNING
