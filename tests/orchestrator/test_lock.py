import os
import subprocess
import sys

import pytest
from fakes import subprocess_environment

from orchestrator import lock
from orchestrator.errors import StorageError, StudyBusy

HOLD = """
import sys, time
from pathlib import Path
from orchestrator import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

NO_ROOM = """
import resource, signal, sys
from pathlib import Path
from orchestrator import lock
from orchestrator.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
try:
    with lock.held(Path(sys.argv[1])):
        pass
except StorageError as error:
    print(error)
"""


def test_a_second_controller_is_told_who_holds_the_study(tmp_path):
    path = tmp_path / "wd" / "controller.lock"
    with lock.held(path):
        assert lock.holder(path) == f"process {os.getpid()} on {os.uname().nodename}"
        with pytest.raises(StudyBusy, match=rf"wd: process {os.getpid()} on ") as caught, lock.held(path):
            pass
    assert "caddie study stop wd" in caught.value.hint
    assert lock.holder(path) is None


def test_a_holder_that_has_not_yet_written_its_name_is_another_controller(tmp_path):
    path = tmp_path / "wd" / "controller.lock"
    with lock.held(path):
        path.write_text("")
        assert lock.holder(path) == "another controller"


def test_nobody_holds_the_lock_of_a_study_that_never_ran(tmp_path):
    assert lock.holder(tmp_path / "none") is None


def test_a_killed_holder_leaves_the_lock_free(tmp_path):
    path = tmp_path / "controller.lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, env=subprocess_environment()
    )
    with process:
        assert process.stdout.readline() == b"held\n"
        assert lock.holder(path) == f"process {process.pid} on {os.uname().nodename}"
        process.kill()
    with lock.held(path):
        assert str(os.getpid()) in lock.holder(path)


def test_a_lock_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"), lock.held(tmp_path / "file" / "lock"):
        pass


def test_a_lock_that_cannot_be_written_is_a_storage_error_and_is_let_go(tmp_path):
    """A limit on the size of files fails as a full disk does: when the name is written, not when the file is opened."""
    path = tmp_path / "wd" / "controller.lock"
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM, str(path)],
        env=subprocess_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "controller.lock: cannot be written" in done.stdout and done.stderr == ""
    assert lock.holder(path) is None
