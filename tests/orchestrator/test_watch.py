from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import watch
from orchestrator.watch import FILES, NETWORK, PROGRAMS, Access

PROGRAM = """
import os, socket, subprocess, sys
open(sys.argv[1]).read()
os.chdir(os.path.dirname(sys.argv[1]))
try:
    open(b"nowhere.txt")
except OSError:
    pass
os.fdopen(os.dup(0)).close()
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as knock:
    try:
        knock.sendto(b"x", ("192.0.2.1", 9))
    except OSError:
        pass
    knock.sendto(b"x", ("127.0.0.1", 9))
with socket.socket(socket.AF_UNIX) as local:
    try:
        local.connect("/nowhere.sock")
    except OSError:
        pass
subprocess.run([sys.executable, "-c", f"open({sys.argv[2]!r})"], check=True)
"""


@pytest.fixture
def watched(tmp_path: Path) -> list[Access]:
    """What a program reached for that opens, calls and starts a little of everything."""
    hook = tmp_path / "hook"
    hook.mkdir()
    for name in ("one.txt", "two\nlines.txt"):
        (tmp_path / name).write_text("x")
    environment = watch.install(hook, {"PATH": os.environ["PATH"]})
    files = [str(tmp_path / name) for name in ("one.txt", "two\nlines.txt")]
    subprocess.run([sys.executable, "-c", PROGRAM, *files], env=environment, check=True)
    return watch.read(hook)


def test_files_are_heard_in_every_process_with_their_whole_path(watched: list[Access], tmp_path: Path) -> None:
    for name in ("one.txt", "nowhere.txt", "two\nlines.txt"):
        assert Access(FILES, str(tmp_path / name)) in watched


def test_files_of_python_and_of_the_machine_are_not_elsewhere(watched: list[Access], tmp_path: Path) -> None:
    found = watch.elsewhere(watched, watch.code_folders({}))
    assert found == sorted(str(tmp_path / name) for name in ("one.txt", "nowhere.txt", "two\nlines.txt"))
    assert watch.elsewhere(watched, [tmp_path, *watch.code_folders({})]) == []


def test_a_link_out_of_a_folder_leads_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside.txt")
    accesses = [Access(FILES, str(tmp_path / "inside" / "link")), Access(FILES, "/proc/cpuinfo")]
    assert watch.elsewhere(accesses, [tmp_path / "inside"]) == [str(tmp_path / "outside.txt")]


def test_other_machines_are_told_and_this_one_is_not(watched: list[Access]) -> None:
    assert Access(NETWORK, "127.0.0.1") in watched and Access(NETWORK, "/nowhere.sock") in watched
    assert watch.outward(watched) == ["192.0.2.1"]


def test_programs_are_told_by_name(watched: list[Access]) -> None:
    assert Access(PROGRAMS, sys.executable) in watched
    assert watch.programs(watched) == [Path(sys.executable).name]


def test_where_nothing_was_taken_down_nothing_was_reached_for(tmp_path: Path) -> None:
    assert watch.read(tmp_path) == []


def test_folders_of_code_are_those_of_the_environment_too(tmp_path: Path) -> None:
    folders = watch.code_folders({"PYTHONPATH": f"{tmp_path}{os.pathsep}", "CUDA_HOME": "/opt/cuda"})
    assert tmp_path.resolve() in folders and Path("/opt/cuda") in folders
    assert Path(os.path.realpath(sys.prefix)) in folders
