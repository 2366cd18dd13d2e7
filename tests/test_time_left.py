"""Slow tests end where the time that is left for them does: they are skipped, not failed and not forgotten."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

TESTS = """
import pytest

def test_quick():
    pass

@pytest.mark.slow
def test_slow():
    pass
"""


def outcome(folder: Path, **environment: str) -> str:
    """The last line that pytest prints about a quick and a slow test under this suite's own conftest."""
    (folder / "test_two.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CADDIE_TEST_UNTIL", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", str(folder)]
    done = subprocess.run(command, cwd=folder, env={**kept, **environment}, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[-1].partition(" in ")[0]


def test_no_slow_test_begins_after_its_time_and_it_is_counted(tmp_path: Path) -> None:
    assert outcome(tmp_path, CADDIE_TEST_UNTIL=str(time.time() - 1)) == "1 passed, 1 skipped"


def test_all_begin_where_there_is_time_or_no_limit(tmp_path: Path) -> None:
    assert outcome(tmp_path, CADDIE_TEST_UNTIL=str(time.time() + 600)) == "2 passed"
    assert outcome(tmp_path) == "2 passed"
