from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from orchestrator.gauges import recording, sample
from trainer.protocol import read_lines

ROWS = "0, 97, 61234, 655.12, 61, 1755\\n3, 96, 61230, [N/A], 60, 1755\\n"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for nvidia-smi that writes down what it was asked and answers with the rows of two GPUs."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nprintf "{ROWS}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program


def test_a_sample_has_the_counters_of_the_jobs_gpus_alone(driver: Path, tmp_path: Path) -> None:
    found = sample("0,3")
    assert found["0"] == {
        "utilization_percentage": 97.0, "memory_usage_mebibytes": 61234.0, "power_usage_watts": 655.12,
        "temperature_celsius": 61.0, "clock_megahertz": 1755.0,
    }  # fmt: skip
    assert "--id=0,3" in (tmp_path / "asked").read_text()


def test_a_counter_that_a_card_does_not_have_costs_no_other(driver: Path) -> None:
    assert "power_usage_watts" not in sample("0,3")["3"]
    assert sample("0,3")["3"]["temperature_celsius"] == 60.0


def test_samples_are_recorded_while_the_block_runs_and_not_after(driver: Path, tmp_path: Path) -> None:
    path = tmp_path / "system.jsonl"
    with recording(path, "0,3", interval_seconds=0.01):
        deadline = time.monotonic() + 30.0
        while len(list(read_lines(path))) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
    count = len(list(read_lines(path)))
    assert count >= 3
    assert all(set(record["gpus"]) == {"0", "3"} for _, record in read_lines(path))
    time.sleep(0.05)
    assert len(list(read_lines(path))) == count


def test_without_gpus_nothing_is_asked_or_written(driver: Path, tmp_path: Path) -> None:
    with recording(tmp_path / "system.jsonl", ""):
        pass
    assert not (tmp_path / "asked").exists()
    assert not (tmp_path / "system.jsonl").exists()


@pytest.mark.parametrize("answer", ["exit 9", "echo nonsense", "exec sleep 60"])
def test_a_driver_that_fails_says_nonsense_or_hangs_harms_nothing(
    driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    driver.write_text(f"#!/bin/sh\n{answer}\n")
    monkeypatch.setattr("orchestrator.gauges.QUERY_SECONDS", 0.2)
    with recording(tmp_path / "system.jsonl", "0"):
        pass
    assert not (tmp_path / "system.jsonl").exists()


def test_a_machine_without_the_tool_gives_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert sample("0") == {}
