"""Bundles that were packed before: a controller that comes back has them at once, and packing takes seconds.

A bundle follows from the sources of the trainer and of the packer alone, whose hash is its name here. Losing any costs
time only.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path

from orchestrator import bundle
from orchestrator.errors import StorageError
from orchestrator.folding import choices
from orchestrator.home import Home
from orchestrator.machine import cores
from trainer.config import Config
from trainer.protocol import write_bytes_atomically

PACKER = ("bundle", "folding", "facts", "inference", "cuts", "minify", "short_names", "short_attributes", "syntax")
"""Modules of this folder that decide about a bundle's bytes."""

KEPT = 64  # files: one trainer has as many as configurations switch off different parts of it


class BundleStore:
    """Packs what it has not, and keeps it under CADDIE_HOME."""

    def __init__(self, home: Home, build: Callable[[Config | None], bytes] = bundle.build) -> None:
        self.folder = home.bundles
        self._build = build
        self._held: dict[str, bytes] = {}

    def build(self, config: Config | None = None) -> bytes:
        """The same as `bundle.build`. Raises CaddieError."""
        key = self._key(config)
        if key not in self._held:
            self._held[key] = self._stored(key) or self._keep(key, self._build(config))
        return self._held[key]

    def build_ahead(self, configs: Iterable[Config | None]) -> None:
        """Have these packed before they are asked for: what is missing, on all cores at once. Raises CaddieError."""
        missing = {self._key(config): config for config in configs}
        missing = {key: config for key, config in missing.items() if key not in self._held and not self._stored(key)}
        if len(missing) < 2:
            return
        most = min(len(missing), cores())
        with (
            suppress(OSError, BrokenProcessPool),  # then they are packed one by one
            ProcessPoolExecutor(most, mp_context=get_context("spawn"), initializer=_be_of_the_controller) as pool,
        ):
            for key, content in zip(missing, pool.map(self._build, missing.values()), strict=True):
                self._held[key] = self._keep(key, content)

    def _key(self, config: Config | None) -> str:
        chosen = None if config is None else sorted(choices(config).items())
        return hashlib.sha256(json.dumps([self._sources, chosen]).encode()).hexdigest()[:24]

    @cached_property
    def _sources(self) -> str:
        """Hash of all that a bundle is made from and by."""
        here = Path(__file__).parent
        paths = [bundle.ROOT / f"{name}.py" for name in bundle.MODULES] + [here / f"{name}.py" for name in PACKER]
        digest = hashlib.sha256(f"{platform.python_version()} {version('brotli')}".encode())
        for path in paths:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def _stored(self, key: str) -> bytes | None:
        """What was packed before; a file that is not what its name says counts for nothing."""
        for path in self.folder.glob(f"{key}.*"):
            with suppress(OSError):
                content = path.read_bytes()
                if path == self._path(key, content):
                    return content
        return None

    def _keep(self, key: str, content: bytes) -> bytes:
        with suppress(StorageError, OSError):  # a full disk is found by who needs it
            write_bytes_atomically(self._path(key, content), content)
            for path in sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
                path.unlink(missing_ok=True)
        return content

    def _path(self, key: str, content: bytes) -> Path:
        return self.folder / f"{key}.{hashlib.sha256(content).hexdigest()[:24]}"


def _be_of_the_controller() -> None:
    """In a process that packs: a terminal's signals are for the controller; when that is killed, this ends too."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_the_controller, daemon=True).start()


def _leave_with_the_controller() -> None:
    controller = parent_process()
    assert controller is not None, "only a process that was started to pack waits for who started it"
    controller.join()
    os._exit(1)
