"""The fault harness, small: what is killed at random is neither lost nor run twice nor called a failure."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.cluster import faults
from tests.cluster.emulated import missing
from trainer import protocol

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]


def account_of(kind: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, faults.__file__, kind, "--every", "4", "--limit", "400", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    wrong = {what: found[what] for what in ("lost", "wrongly_failed", "duplicated", "two_live_copies")}
    assert wrong == dict.fromkeys(wrong, 0), done.stdout
    return found


@pytest.mark.parametrize("kind", ["slurm", "local"])
def test_random_kills_lose_nothing_repeat_nothing_and_fail_nothing(kind: str) -> None:
    if kind == "slurm" and (reason := missing()):
        pytest.skip(reason)
    assert sum(account_of(kind, "--trials", "60")["faults"].values()) > 3


def test_what_a_full_disk_ends_is_known_for_it_and_counts_against_no_run() -> None:
    found = account_of("local", "--trials", "20", "--only", "fill_disk")
    if not found["faults"]:
        pytest.skip("no file system of one's own can be mounted here")
    assert set(found["failures"]) == {protocol.DISK}, found["failures"]
