"""A controller that is killed anywhere, or whose files fail anywhere, and the same command given again."""

from __future__ import annotations

import errno
import os
import random
import sys

import pytest
from fakes import tiny_study
from faults import WRITES, Cluster, Machine, traced
from make_controller import Killed, controller, records

from orchestrator import sweep
from orchestrator.errors import StorageError
from orchestrator.home import Home

STUDY = {"trials": 2, "confirm": "[42]"}
MOMENTS = 16  # of all, in the quick tests; the slow ones take every moment


@pytest.fixture(autouse=True)
def the_dead_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed between two lines leaves its `with` blocks as they are. Here their generators are collected
    later, and find the machine down: that, and nothing else, is no error.
    """
    told = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is not Killed:
            told(unraisable)

    monkeypatch.setattr(sys, "unraisablehook", hook)


def work(home: Home, cluster: Cluster, machine: Machine | None, patch: pytest.MonkeyPatch, *, line: int = 0) -> None:
    """Run the study's controller on a machine."""
    cluster.machine = machine
    victim = controller(tiny_study(**STUDY), home, launcher=cluster)
    if machine is None:
        victim.run()
        return
    with patch.context() as within, traced(machine.kill_at_line(line) if line else None):
        machine.install(within)
        victim.run()


def decisions(home: Home) -> list[tuple[object, ...]]:
    """What was decided, without times and ids of jobs."""
    kept = ("kind", "trial", "arm", "params", "runs", "run_id", "attempt", "state", "value", "status", "reason")
    return sorted(tuple((key, str(record[key])) for key in kept if key in record) for record in records(home))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[object, ...]], list[str], int]:
    """Decisions of a controller that nothing happened to, its operations and its number of lines."""
    patch = pytest.MonkeyPatch()
    home, counted = Home(tmp_path_factory.mktemp("whole") / "home"), Home(tmp_path_factory.mktemp("lines") / "home")
    operations, lines = Machine(home.root), Machine(counted.root)
    work(home, Cluster(), operations, patch)
    work(counted, Cluster(), lines, patch, line=10**9)
    return decisions(home), operations.names, lines.lines


def require_whole(home: Home, cluster: Cluster, expected: list[tuple[object, ...]]) -> None:
    assert decisions(home) == expected
    runs = [run_id for run_id, _, _ in cluster.submitted]
    assert len(runs) == len(set(runs)), "a run was submitted twice"
    assert not cluster.alive, "a job was lost"


def moments(total: int, number: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(1, total + 1), min(number, total)))


def kill_at(tmp_path, patch, expected, moments_of_death) -> None:
    """Kill a controller at each of these operations or lines, continue its study, and compare with one that nothing happened to."""
    for number, (at, line) in enumerate(moments_of_death):
        home, cluster = Home(tmp_path / str(number)), Cluster()
        machine = Machine(home.root, at=at, error=Killed() if at else None)
        with pytest.raises(Killed):
            work(home, cluster, machine, patch, line=line)
        work(home, cluster, None, patch)
        require_whole(home, cluster, expected)


def test_a_controller_killed_at_any_file_operation_repeats_nothing_and_loses_nothing(whole, tmp_path, monkeypatch):
    expected, names, _ = whole
    at_the_scheduler = [at for at, name in enumerate(names, start=1) if "submit" in name]
    chosen = at_the_scheduler + moments(len(names), MOMENTS, seed=1)
    kill_at(tmp_path, monkeypatch, expected, [(at, 0) for at in chosen])


def test_a_controller_killed_at_any_line_repeats_nothing_and_loses_nothing(whole, tmp_path, monkeypatch):
    expected, _, total = whole
    kill_at(tmp_path, monkeypatch, expected, [(Machine(tmp_path), line) for line in moments(total, MOMENTS, seed=2)])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_controller_killed_at_every_file_operation_and_at_many_lines_repeats_nothing(whole, tmp_path, monkeypatch):
    expected, operations, lines = whole
    at_operations = [(at, 0) for at in range(1, len(operations) + 1)]
    kill_at(tmp_path, monkeypatch, expected, at_operations + [(0, line) for line in moments(lines, 100, seed=3)])


def test_a_controller_killed_again_and_again_comes_to_the_same_end(whole, tmp_path, monkeypatch):
    """As on a machine that gives it a random while each time."""
    expected, names, _ = whole
    home, cluster, chance = Home(tmp_path / "home"), Cluster(), random.Random(4)
    for _ in range(30):
        machine = Machine(home.root, at=chance.randint(1, len(names) // 4), error=Killed())
        try:
            work(home, cluster, machine, monkeypatch)
        except Killed:
            continue
        break
    work(home, cluster, None, monkeypatch)
    require_whole(home, cluster, expected)


# ------------------------------------------------------------------------------------------------ file systems

WRITE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@pytest.mark.parametrize("number", WRITE_FAULTS, ids=lambda number: errno.errorcode[number])
def test_a_disk_that_takes_nothing_more_ends_the_controller_in_order_and_the_same_command_goes_on(
    whole, tmp_path, monkeypatch, number
):
    expected, names, _ = whole
    writes = sum(name in WRITES for name in names)
    for at in moments(writes, MOMENTS // 2, seed=number):
        home, cluster = Home(tmp_path / str(at)), Cluster()
        machine = Machine(home.root, at=at, error=OSError(number, os.strerror(number)), lasts=True)
        with pytest.raises(StorageError, match="cannot be written") as caught:
            work(home, cluster, machine, monkeypatch)
        assert caught.value.hint and caught.value.exit_code == 6
        work(home, cluster, None, monkeypatch)
        require_whole(home, cluster, expected)


@pytest.mark.parametrize(
    "number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT], ids=lambda number: errno.errorcode[number]
)
def test_a_file_server_that_fails_once_is_survived(whole, tmp_path, monkeypatch, number):
    expected, names, _ = whole
    monkeypatch.setattr(sweep, "PAUSES_SECONDS", (0.0,))
    for at in moments(len(names), MOMENTS // 2, seed=number):
        home, cluster = Home(tmp_path / str(at)), Cluster()
        machine = Machine(home.root, at=at, error=OSError(number, os.strerror(number)))
        try:
            work(home, cluster, machine, monkeypatch)
        except StorageError:  # before it had the study: nothing has begun that could go on
            begun = records(home)
            work(home, cluster, None, monkeypatch)
            assert not begun
        require_whole(home, cluster, expected)


def test_a_file_server_that_stays_away_ends_the_controller_with_the_remedy_and_nothing_is_lost(
    whole, tmp_path, monkeypatch
):
    expected, names, _ = whole
    monkeypatch.setattr(sweep, "PAUSES_SECONDS", (0.0, 0.0))
    home, cluster = Home(tmp_path / "home"), Cluster()
    machine = Machine(home.root, at=len(names) // 2, error=OSError(errno.ESTALE, "Stale file handle"), lasts=True)
    with pytest.raises(StorageError, match="Stale file handle") as caught:
        work(home, cluster, machine, monkeypatch)
    assert "same command" in caught.value.hint
    work(home, cluster, None, monkeypatch)
    require_whole(home, cluster, expected)
