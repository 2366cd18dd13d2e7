"""A controller on fakes, controllers that die or find the disk full, and what their ledger says."""

from __future__ import annotations

import errno
from typing import Any

from fakes import FAKE_BUNDLE, MANIFEST, FakeLauncher, FakeSearch, Listener

from orchestrator.home import Home
from orchestrator.ledger import OpenLedger
from orchestrator.study import Study
from orchestrator.sweep import Controller
from trainer import protocol


def controller(study: Study, home: Home, **parts: Any) -> Controller:
    """The study's controller; every part that is not given is a fake."""
    listener = parts.pop("listener", Listener())
    fakes = {
        "launcher": FakeLauncher(),
        "search": FakeSearch(),
        "pack": lambda config: FAKE_BUNDLE,
        "progress": listener,
        "mirror": listener,
    }
    fixed = {"code": {}, "data_dir": home.root, "manifest_sha256": MANIFEST, "poll_seconds": 0.001}
    return Controller(study, home, **{**fakes, **fixed, **parts})


def records(home: Home, name: str = "tiny") -> list[dict[str, Any]]:
    """What the study's ledger holds."""
    return [record for _, record in protocol.read_lines(home.study(name).ledger)]


class Killed(BaseException):
    """As by kill -9."""


def die_at(victim: Controller, kind: str, count: int = 1) -> Controller:
    """Let a controller die just after the given decision is on disk for the n-th time."""

    class Deadly(OpenLedger):
        seen = 0

        def append(self, what: str, **fields: Any) -> dict[str, Any]:
            record = super().append(what, **fields)
            self.seen += what == kind
            if self.seen == count and what == kind:
                raise Killed
            return record

    victim.ledger.__class__ = Deadly
    return victim


def fill_disk_at(victim: Controller, number: int) -> Controller:
    """Let a controller find the disk full at its n-th decision."""

    class Full(OpenLedger):
        def append(self, what: str, **fields: Any) -> dict[str, Any]:
            if self.decisions == number:
                raise protocol.storage_error(OSError(errno.ENOSPC, "No space left on device"), self.path)
            return super().append(what, **fields)

    victim.ledger.__class__ = Full
    return victim
