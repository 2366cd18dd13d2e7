"""A controller that no terminal holds: started, followed, asked to stop, and continued by the same command."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import ledger, lock
from orchestrator.home import Home
from tests.end_to_end.micro import (
    NAME,
    ONE_AT_A_TIME,
    caddie,
    command,
    end,
    environment,
    records,
    require_decided_once,
    state,
    until,
    write_study,
)

pytestmark = pytest.mark.slow


def holder_pid(home: Home) -> int:
    holder = lock.holder(home.study(NAME))
    assert holder is not None and holder.claim is not None
    return holder.claim.pid


def test_a_detached_controller_outlives_hangups_is_seen_asked_to_stop_and_continued(
    tmp_path: Path, make_home: Callable[[str], Home]
) -> None:
    home, study = make_home("home"), write_study(tmp_path, ONE_AT_A_TIME)
    at_home = ("--home", str(home.root), "study")
    started = caddie(*at_home, "run", study, "--detach", cwd=tmp_path)
    assert started.returncode == 0, started.stderr
    pid, log = holder_pid(home), home.study(NAME).log
    assert f"process {pid} works on it" in started.stdout
    assert f"tail -f {log}" in started.stdout and f"study stop {NAME}" in started.stdout
    assert os.getsid(pid) == pid

    os.kill(pid, signal.SIGHUP)
    again = caddie(*at_home, "run", study, "--detach", cwd=tmp_path)
    assert again.returncode == 9 and f"process {pid}" in again.stderr
    told = json.loads(caddie(*at_home, "status", NAME, "--json", cwd=tmp_path).stdout)
    assert (told["state"], told["log"]) == ("running", str(log)) and f"process {pid} on" in told["controller"]

    until(lambda: records(home, ledger.SUBMITTED), what="a first job")
    assert "after the running jobs" in caddie(*at_home, "stop", NAME, cwd=tmp_path).stdout
    until(lambda: lock.holder(home.study(NAME)) is None, what="its end")
    until(lambda: "report" in log.read_text(), what="its report")
    assert state(home).closed == ledger.HALTED

    finished = caddie(*at_home, "run", study, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    require_decided_once(home)


def test_a_detached_command_that_cannot_begin_says_why_and_ends_as_it_would_have(
    tmp_path: Path, make_home: Callable[[str], Home]
) -> None:
    home, study = make_home("home"), write_study(tmp_path)
    data = home.dataset("small")
    data.rename(data.with_name("other"))
    done = caddie("--home", home.root, "study", "run", study, "--detach", cwd=tmp_path)
    assert done.returncode == 4 and "there is no data set 'small'" in done.stderr
    assert lock.holder(home.study(NAME)) is None


def test_a_terminal_that_closes_ends_an_attached_controller_in_order_and_its_jobs_go_on(
    tmp_path: Path, make_home: Callable[[str], Home]
) -> None:
    home, study = make_home("home"), write_study(tmp_path, ONE_AT_A_TIME)
    ours, its = pty.openpty()
    process = subprocess.Popen(
        command("--home", home.root, "study", "run", study), cwd=tmp_path, env=environment(), stdin=its, stdout=its,
        stderr=its, start_new_session=True, preexec_fn=lambda: _take_terminal(its),
    )  # fmt: skip
    os.close(its)
    try:
        until(lambda: records(home, ledger.SUBMITTED), what="a first job")
        os.close(ours)  # the terminal is gone, and the kernel says so
        until(lambda: process.poll() is not None, what="its end")
        assert process.returncode == 130
    finally:
        end(process)
    assert lock.holder(home.study(NAME)) is None and not home.study(NAME).controller.exists()
    finished = caddie("--home", home.root, "study", "run", study, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    require_decided_once(home)
    assert {attempt.number for attempt in state(home).attempts.values()} == {1}, "no job was lost with the terminal"


def _take_terminal(descriptor: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
