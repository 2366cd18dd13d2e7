"""The fault harness, small: what is killed at random is neither lost nor run twice nor called a failure."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.cluster import faults
from tests.cluster.emulated import missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]


@pytest.mark.parametrize("kind", ["slurm", "local"])
def test_random_kills_lose_nothing_repeat_nothing_and_fail_nothing(kind: str) -> None:
    if kind == "slurm" and (reason := missing()):
        pytest.skip(reason)
    command = [sys.executable, faults.__file__, kind, "--trials", "30", "--every", "4", "--limit", "400"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(found["faults"].values()) > 3
    wrong = {what: found[what] for what in ("lost", "wrongly_failed", "duplicated", "two_live_copies")}
    assert wrong == dict.fromkeys(wrong, 0), done.stdout
