import json
import os
import subprocess
import sys
import time

import pytest

from orchestrator import claims
from orchestrator.claims import Claim, beating, claim_of, is_live, make_claim, read_claim
from trainer import protocol
from trainer.errors import StorageError


def wait_for_change(path, seconds):
    deadline = time.monotonic() + 10
    while path.stat().st_mtime == seconds:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def attempt(tmp_path):
    return protocol.RunDir(tmp_path).attempt(1)


def test_a_claim_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "attempts").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        make_claim(protocol.RunDir(tmp_path).attempt(1))


def test_a_claim_outlives_neither_its_process_nor_the_boot_nor_the_number():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    claim = claim_of(process.pid)
    assert is_live(claim)
    for change in ({"host": "elsewhere"}, {"boot": "earlier"}, {"started": 1}):
        assert not is_live(Claim(**{**vars(claim), **change}))
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_live(claim), "a zombie does not live"
    process.wait()
    assert not is_live(claim)


@pytest.mark.parametrize("content", ["", "{", json.dumps({"pid": 1})])
def test_a_claim_that_is_not_whole_is_none(attempt, content):
    assert read_claim(attempt) is None
    attempt.root.mkdir(parents=True)
    attempt.claim.write_text(content)
    assert read_claim(attempt) is None


def test_a_claim_is_touched_for_as_long_as_its_worker_lives(attempt, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.02)
    make_claim(attempt)
    os.utime(attempt.claim, (1, 1))
    with beating(attempt):
        wait_for_change(attempt.claim, 1)
    os.utime(attempt.claim, (1, 1))
    time.sleep(0.1)
    assert attempt.claim.stat().st_mtime == 1
