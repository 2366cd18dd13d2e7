import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys
import time

import pytest
from fakes import subprocess_environment

from orchestrator import lock
from orchestrator.claims import claim_of
from orchestrator.errors import StorageError, StudyBusy
from orchestrator.home import StudyDir

HOLD = """
import sys, time
from pathlib import Path
from orchestrator import lock
from orchestrator.home import StudyDir
with lock.held(StudyDir(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""

NO_ROOM = """
import resource, signal, sys
from pathlib import Path
from orchestrator import lock
from orchestrator.errors import StorageError
from orchestrator.home import StudyDir
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
try:
    with lock.held(StudyDir(Path(sys.argv[1]))):
        pass
except StorageError as error:
    print(error)
"""

HERE = claim_of(os.getpid())


@pytest.fixture
def study(tmp_path):
    return StudyDir(tmp_path / "wd")


@pytest.fixture
def short_times(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.1)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.4)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)


def left_by(study, *, age=0.0, **changes):
    """A controller's file that another process left so many seconds ago."""
    study.root.mkdir(parents=True, exist_ok=True)
    claim = {**dataclasses.asdict(HERE), **changes}
    study.controller.write_text(json.dumps({"claim": claim, "since": 1.0, "token": "x"}))
    when = time.time() - age
    os.utime(study.controller, (when, when))


def test_a_second_controller_is_told_who_holds_the_study(study):
    with lock.held(study):
        assert str(lock.holder(study)) == f"process {os.getpid()} on {os.uname().nodename}"
        assert time.time() - lock.holder(study).since < 60
        with pytest.raises(StudyBusy, match=rf"wd: process {os.getpid()} on ") as caught, lock.held(study):
            pass
    assert "caddie study stop wd" in caught.value.hint
    assert lock.holder(study) is None and not study.controller.exists()


def test_a_holder_that_has_not_yet_written_its_name_is_another_controller(study):
    study.root.mkdir()
    with study.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert str(lock.holder(study)) == "another controller"
        with pytest.raises(StudyBusy, match="wd: another controller works"), lock.held(study):
            pass


def test_one_who_only_looks_who_has_the_study_keeps_nobody_from_it(study, monkeypatch):
    study.root.mkdir()
    looking = study.lock.open("w")
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(lock.time, "sleep", lambda _: looking.close())
    with lock.held(study):
        assert lock.holder(study) is not None


def test_nobody_holds_the_lock_of_a_study_that_never_ran(study):
    assert lock.holder(study) is None


def test_a_killed_holder_leaves_the_lock_free(study):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(study.root)], stdout=subprocess.PIPE, env=subprocess_environment()
    )
    with process:
        assert process.stdout.readline() == b"held\n"
        assert str(lock.holder(study)) == f"process {process.pid} on {os.uname().nodename}"
        process.kill()
    assert study.controller.exists() and lock.holder(study) is None
    with lock.held(study):
        assert str(os.getpid()) in str(lock.holder(study))


def test_a_lock_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"), lock.held(StudyDir(tmp_path / "file" / "wd")):
        pass


def test_a_lock_that_cannot_be_written_is_a_storage_error_and_is_let_go(study):
    """A limit on the size of files fails as a full disk does: when the name is written, not when the file is opened."""
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM, str(study.root)],
        env=subprocess_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "controller.json: cannot be written" in done.stdout and done.stderr == ""
    assert lock.holder(study) is None and list(study.root.iterdir()) == [study.lock]


# ------------------------------------------------------------------------------------------------ other hosts


def test_a_live_holder_on_another_host_is_named_where_no_flock_reaches_it(study, short_times):
    left_by(study, host="node7", boot="other", age=0.1)
    named = r"process \d+ on node7 works on this study; it was heard 0 s ago"
    with pytest.raises(StudyBusy, match=named) as caught, lock.held(study):
        pass
    assert "silence it is taken over" in str(caught.value)
    assert str(lock.holder(study)).endswith("on node7")


def test_a_holder_on_another_host_that_was_silent_long_enough_is_taken_over(study, short_times):
    left_by(study, host="node7", boot="other", age=3600)
    assert lock.holder(study) is None
    with lock.held(study):
        assert lock.holder(study).claim.pid == os.getpid()


def test_a_clock_that_jumps_takes_nothing_from_a_live_holder(study, short_times, monkeypatch):
    """The file's age says an hour; but it is still being touched."""
    left_by(study, host="node7", boot="other", age=3600)
    touched = []

    def touch(_seconds):
        touched.append(time.time() - 7200 + len(touched))
        os.utime(study.controller, (touched[-1], touched[-1]))

    monkeypatch.setattr(lock.time, "sleep", touch)
    clock = iter(range(10**6))
    monkeypatch.setattr(lock.time, "monotonic", lambda: next(clock) * 0.03)
    with contextlib.suppress(StudyBusy), lock.held(study, patience=3.0):
        pytest.fail("taken from a live holder")
    assert len(touched) > 5


def test_one_who_waits_gets_the_study_when_its_holder_leaves(study, short_times, monkeypatch):
    left_by(study, host="node7", boot="other")
    monkeypatch.setattr(lock.time, "sleep", lambda _: study.controller.unlink(missing_ok=True))
    with lock.held(study, patience=60):
        assert lock.holder(study).claim.pid == os.getpid()


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"boot": "before"}], ids=["died", "rebooted"])
def test_a_dead_holder_of_this_host_is_taken_over_at_once(study, changes, monkeypatch):
    left_by(study, **changes)
    monkeypatch.setattr(lock.time, "sleep", lambda _: pytest.fail("it waited"))
    assert lock.holder(study) is None
    with lock.held(study):
        pass


def test_hosts_that_share_a_name_with_all_others_are_not_taken_for_this_one(study, short_times, monkeypatch):
    monkeypatch.setattr(lock, "claim_of", lambda pid: dataclasses.replace(HERE, host="localhost"))
    left_by(study, host="localhost", boot="other")
    with pytest.raises(StudyBusy, match="on localhost works"), lock.held(study):
        pass


def test_without_any_flock_a_live_process_of_this_host_is_named(study, monkeypatch):
    def no_locks(_file, _kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with lock.held(study), pytest.raises(StudyBusy, match=f"process {os.getpid()}"), lock.held(study):
        pass
    left_by(study, pid=2**22 + 1)
    with lock.held(study):
        assert str(os.getpid()) in str(lock.holder(study))


def test_a_file_system_without_hard_links_will_do(study, monkeypatch):
    def no_links(_source, _target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(lock.os, "link", no_links)
    left_by(study, pid=2**22 + 1)
    with lock.held(study) as lease:
        assert study.controller.read_bytes() == lease.content
        with pytest.raises(FileExistsError):
            lock.Lease(study).create()


def test_a_damaged_name_is_taken_over_once_it_is_seen_to_last(study, short_times):
    study.root.mkdir()
    study.controller.write_text("{")
    with lock.held(study):
        assert lock.holder(study).claim.pid == os.getpid()


def test_two_that_take_over_at_once_do_not_take_from_one_another(study):
    left_by(study, host="node7", boot="other")
    dead = lock._sight(study.controller)
    study.controller.unlink()
    winner = lock.Lease(study)
    winner.create()
    lock._put_away(study.controller, dead)
    assert study.controller.read_bytes() == winner.content
    with pytest.raises(FileExistsError):
        lock.Lease(study).create()
    assert sorted(path.name for path in study.root.iterdir()) == [study.controller.name]


# ------------------------------------------------------------------------------------------------ keeping it


def test_a_holder_touches_its_file_again_and_again(study, short_times):
    with lock.held(study):
        first = study.controller.stat().st_mtime_ns
        deadline = time.monotonic() + 30
        while study.controller.stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_a_holder_that_was_suspended_finds_out_that_it_was_replaced_before_it_decides(study, monkeypatch):
    with lock.held(study) as lease:
        lease.require()
        left_by(study, host="node7", boot="other")
        now = lock._boot_seconds()
        monkeypatch.setattr(lock, "_boot_seconds", lambda: now + 3600)
        with pytest.raises(StudyBusy, match=r"wd: process \d+ on node7 has taken this study over"):
            lease.require()
    assert study.controller.exists(), "it is the other's"


def test_a_holder_that_cannot_touch_its_file_leaves_before_it_counts_as_dead(study, monkeypatch):
    with lock.held(study) as lease:
        monkeypatch.setattr(lock, "_sight", lambda path: (_ for _ in ()).throw(OSError(errno.ESTALE, "Stale handle")))
        now = lock._boot_seconds()
        lease.require()
        monkeypatch.setattr(lock, "_boot_seconds", lambda: now + lock.SILENCE_SECONDS)
        with pytest.raises(StorageError, match="cannot be touched: Stale handle"):
            lease.require()


def test_a_file_that_somebody_removed_is_made_again(study):
    with lock.held(study) as lease:
        study.controller.unlink()
        lease.beat()
        lease.require()
        assert study.controller.read_bytes() == lease.content
