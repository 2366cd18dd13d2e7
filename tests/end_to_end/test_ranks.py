"""The benchmark of several processes on one host, as it is called, on processors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def ranks(*arguments: str) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "benchmarks.ranks"]
    return subprocess.run([sys.executable, *launch, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_both_processes_end_every_chunk_with_the_same_weights():
    done = ranks("--preset", "smoke", "--repeats", "1", "--set", "ttt.chunk_tokens=256")
    assert done.returncode == 0, done.stdout + done.stderr
    hashes = re.findall(r"equal on 2, ([0-9a-f]{16})", done.stdout)
    assert len(hashes) == 4 and len(set(hashes)) == 4, done.stdout  # after the steps, and after each of three chunks
    efficiencies = re.findall(r"^\| [68] \| .* \| ([0-9.]+)% \|$", done.stdout, re.MULTILINE)
    assert len(efficiencies) == 2 and all(float(found) > 0 for found in efficiencies), done.stdout


def test_an_unknown_knob_ends_it_before_anything_is_measured():
    done = ranks("--preset", "smoke", "--set", "ttt.chunk_token=256")
    assert done.returncode != 0 and "ttt.chunk_tokens" in done.stderr and "|" not in done.stdout
