import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator import bundle_store
from orchestrator.bundle_store import BundleStore
from orchestrator.errors import CaddieError
from orchestrator.presets import load_preset
from orchestrator.processes import tagged_processes
from trainer.config import with_knobs

REPOSITORY = Path(__file__).parents[2]
SMOKE = load_preset("smoke")
OFF = with_knobs(SMOKE, {"ttt.method": "off"})


class Packer:
    """Packs in no time, and counts."""

    def __init__(self):
        self.packed = []

    def __call__(self, config):
        self.packed.append(config)
        return f"bundle {len(self.packed)}".encode()


def by_whom(config):
    """A bundle that names the process that packed it; of one configuration it grows too long."""
    if config is not None and config.quant.method == "rtn":
        raise CaddieError("the bundle has too many bytes")
    return f"{os.getpid()} {config and config.ttt.method}".encode()


def test_a_bundle_is_packed_once_whichever_controller_asks_for_it(home):
    packer = Packer()
    assert BundleStore(home, packer).build(SMOKE) == BundleStore(home, packer).build(SMOKE) == b"bundle 1"
    assert BundleStore(home, packer).build(None) == b"bundle 2"
    assert len(packer.packed) == 2


def test_configurations_that_switch_off_the_same_share_one_bundle(home):
    packer = Packer()
    store = BundleStore(home, packer)
    store.build(SMOKE)
    store.build(with_knobs(SMOKE, {"optim.muon_weight_decay": 0.077}))
    assert len(packer.packed) == 1
    store.build(OFF)
    assert len(packer.packed) == 2


def test_changed_sources_make_another_bundle(home, monkeypatch, tmp_path):
    packer = Packer()
    BundleStore(home, packer).build(SMOKE)
    monkeypatch.setattr(bundle_store, "PACKER", bundle_store.PACKER[:-1])
    assert BundleStore(home, packer).build(SMOKE) == b"bundle 2"


@pytest.mark.parametrize("harm", ["changed", "cut off"])
def test_a_stored_bundle_that_is_damaged_is_packed_again(home, harm):
    packer = Packer()
    BundleStore(home, packer).build(SMOKE)
    (path,) = home.bundles.iterdir()
    path.write_bytes(b"" if harm == "cut off" else b"bundle X")
    assert BundleStore(home, packer).build(SMOKE) == b"bundle 2"


def test_a_home_that_takes_no_bundle_costs_time_only(home):
    home.root.mkdir()
    home.bundles.write_text("in the way")
    packer = Packer()
    store = BundleStore(home, packer)
    assert store.build(SMOKE) == store.build(SMOKE) == b"bundle 1"


def test_only_so_many_are_kept(home, monkeypatch):
    monkeypatch.setattr(bundle_store, "KEPT", 2)
    store = BundleStore(home, Packer())
    for config in (None, SMOKE, OFF):
        store.build(config)
    assert len(list(home.bundles.iterdir())) == 2


def test_several_are_packed_ahead_in_processes_of_their_own_and_then_at_hand(home):
    store = BundleStore(home, by_whom)
    store.build_ahead([SMOKE, OFF, SMOKE])
    assert len(list(home.bundles.iterdir())) == 2
    for one in (store, BundleStore(home, Packer())):
        built = [one.build(config).decode().split() for config in (SMOKE, OFF)]
        assert [method for _, method in built] == ["sgd", "off"]
        assert str(os.getpid()) not in {pid for pid, _ in built}
    store.build_ahead([SMOKE, OFF])
    store.build_ahead([None, OFF])  # one alone is not worth a process
    assert len(list(home.bundles.iterdir())) == 2


def test_what_cannot_be_packed_is_said_before_the_study_asks_for_it(home):
    with pytest.raises(CaddieError, match="too many bytes"):
        BundleStore(home, by_whom).build_ahead([SMOKE, with_knobs(SMOKE, {"quant.method": "rtn"})])


def test_a_machine_that_starts_no_process_packs_one_by_one(home, monkeypatch):
    def refused(*_, **__):
        raise OSError("no more processes")

    monkeypatch.setattr(bundle_store, "ProcessPoolExecutor", refused)
    store = BundleStore(home, by_whom)
    store.build_ahead([SMOKE, OFF])
    assert store.build(OFF) == f"{os.getpid()} off".encode()


PACK = """
import sys, time
from pathlib import Path
from orchestrator.bundle_store import BundleStore
from orchestrator.home import Home
from orchestrator.presets import load_preset
from trainer.config import with_knobs

FOLDER = Path(sys.argv[1])

def pack(config):
    (FOLDER / config.ttt.method).touch()
    time.sleep(120)

if __name__ == "__main__":
    smoke = load_preset("smoke")
    BundleStore(Home(FOLDER), pack).build_ahead([smoke, with_knobs(smoke, {"ttt.method": "off"})])
"""


def test_what_packs_does_not_outlive_a_controller_that_is_killed(tmp_path):
    script = tmp_path / "pack.py"
    script.write_text(PACK)
    tag = str(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CADDIE_TEST_TAG": tag}
    controller = subprocess.Popen([sys.executable, script, tmp_path], env=environment)
    try:
        until(lambda: (tmp_path / "sgd").exists() or (tmp_path / "off").exists())
        assert len(tagged_processes("CADDIE_TEST_TAG", tag)) > 1
        controller.kill()
        controller.wait()
        until(lambda: not tagged_processes("CADDIE_TEST_TAG", tag))
    finally:
        controller.kill()
        controller.wait()
        for pid in tagged_processes("CADDIE_TEST_TAG", tag):
            os.kill(pid, signal.SIGKILL)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
