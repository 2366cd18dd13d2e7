import errno
import os
import tempfile

import pytest

from orchestrator.failures import classify, explain, failure_of, failure_of_lost, has_room, kind_of_error, log_tail
from trainer import protocol
from trainer.errors import CaddieError, StorageError
from trainer.protocol import CODE, CONFIG, DATA, DISK, INFRASTRUCTURE, NODE, OUT_OF_MEMORY, TIMEOUT  # fmt: skip

RANKS = """
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 4711)
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""


@pytest.fixture
def attempt(tmp_path):
    return protocol.RunDir(tmp_path).attempt(1)


@pytest.mark.parametrize(
    ("returncode", "tail", "kind"),
    [
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", OUT_OF_MEMORY),
        (1, "MemoryError", OUT_OF_MEMORY),
        (1, "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", OUT_OF_MEMORY),
        (1, "[rank1]: OutOfMemoryError\n[rank0]: DistBackendError: NCCL error", OUT_OF_MEMORY),
        (1, "OSError: [Errno 28] No space left on device", DISK),
        (3, "error: x", CONFIG),
        (4, "error: x", DATA),
        (6, "error: x", DISK),
        (1, RANKS.format(code=4), DATA),
        (1, RANKS.format(code=-9), INFRASTRUCTURE),
        (1, RANKS.format(code=1), CODE),
        (1, "torch.distributed.DistBackendError: NCCL error in: foo", INFRASTRUCTURE),
        (1, "Traceback (most recent call last):\nValueError: x", CODE),
        (0, "", CODE),
        (-9, "", INFRASTRUCTURE),
        (-7, "", INFRASTRUCTURE),
    ],
)
def test_a_failure_is_classified_by_its_cause(returncode, tail, kind):
    assert classify(returncode, tail) == kind


def test_a_timeout_is_one_whatever_the_log_says():
    assert classify(-15, "CUDA out of memory", timed_out=True) == TIMEOUT


@pytest.mark.parametrize(
    ("returncode", "tail", "message"),
    [
        (1, "Traceback\n  File x\nValueError: wrong shape\nlast words", "ValueError: wrong shape"),
        (
            1,
            "[rank0]: torch.OutOfMemoryError: CUDA out of memory" + RANKS,
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        (4, "error: shard 3 is truncated", "shard 3 is truncated"),
        (-9, "step 3", "the trainer was ended by SIGKILL"),
        (2, "", "the trainer ended with exit code 2 and left no result"),
    ],
)
def test_a_failure_is_explained_in_one_line(returncode, tail, message):
    assert explain(returncode, tail) == message


def test_a_failure_shows_where_its_log_is_and_how_it_ends(tmp_path):
    log = tmp_path / "stderr.log"
    log.write_text("".join(f"line {n}\n" for n in range(100)))
    lines = failure_of(CODE, "x", log).log.splitlines()
    assert lines[0] == str(log) and lines[1:] == [f"line {n}" for n in range(80, 100)]
    assert log_tail(tmp_path / "none") == ""


def test_an_attempt_that_could_not_write_its_claim_found_the_disk_full(attempt):
    attempt.root.mkdir(parents=True)
    attempt.claim.write_text("")
    failure = failure_of_lost(attempt)
    assert (failure.kind, failure.message) == (
        protocol.DISK, "the job ended and left no result: no space was left for one",
    )  # fmt: skip


def test_a_result_that_could_not_be_written_found_the_disk_full(attempt):
    attempt.root.mkdir(parents=True)
    attempt.claim.write_text("{}")
    assert failure_of_lost(attempt).kind == INFRASTRUCTURE
    attempt.no_room.touch()
    assert failure_of_lost(attempt).kind == DISK


@pytest.mark.parametrize(("number", "is_room"), [(errno.ENOSPC, False), (errno.EDQUOT, False), (errno.EMFILE, True)])
def test_there_is_room_where_a_little_can_be_written(tmp_path, monkeypatch, number, is_room):
    def refuse(**_):
        raise OSError(number, os.strerror(number))

    assert has_room(tmp_path) and not list(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert has_room(tmp_path) == is_room


def test_a_job_that_died_before_its_claim_says_why_in_the_schedulers_log(attempt):
    assert failure_of_lost(attempt).log == str(attempt.stderr)
    attempt.scheduler.mkdir(parents=True)
    (attempt.scheduler / "12_0_log.err").write_text("ModuleNotFoundError: no numpy\n")
    failure = failure_of_lost(attempt)
    assert failure.kind == INFRASTRUCTURE and failure.log.endswith("12_0_log.err\nModuleNotFoundError: no numpy")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StorageError("x"), DISK),
        (CaddieError("x"), CODE),
        (OSError(28, "full"), DISK),
        (OSError(11, "no more processes"), INFRASTRUCTURE),
    ],
)
def test_a_trainer_that_cannot_be_started_has_a_kind_of_failure(error, kind):
    assert kind_of_error(error) == kind


@pytest.mark.parametrize(
    "line",
    [
        "RuntimeError: CUDA error: uncorrectable ECC error encountered",
        "RuntimeError: CUDA error: all CUDA-capable devices are busy or unavailable",
        "NVRM: GPU has fallen off the bus.",
    ],
)
def test_what_only_a_broken_machine_says_is_the_nodes_failure(line):
    assert classify(1, line) == NODE
