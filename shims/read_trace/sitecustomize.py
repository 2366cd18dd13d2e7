"""Notes which environment variables a script looks at, and what settings it makes of them.

Python imports a module of this name at its start. Each first look of the script's own code, not of its libraries, is
appended to the file that CADDIE_READS names, as one JSON object; at the end, or at a SIGTERM where CADDIE_READS_PROBE is
set, the settings that its main module holds. Another module of this name further down the path runs as ever.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import site
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import FrameType
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
FILE, PROBE = "CADDIE_READS", "CADDIE_READS_PROBE"
LIBRARIES = (os.path.dirname(os.__file__), *site.getsitepackages(), site.getusersitepackages(), HERE, "<frozen ")
PLAIN = (bool, int, float, str)
MOST_SETTINGS, LONGEST = 2000, 400


class Trace:
    """The file of one process."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.seen: set[str] = set()
        self.copying: list[str] = []
        """Names that an iteration has given and whose values it has not: copying an environment, which first lists all
        names and then asks for each in turn, is no look at them."""

        self.is_dumped = False

    def note(self, name: object, default: object = None, *, has_default: bool = False) -> None:
        if not isinstance(name, str) or name in self.seen or not is_of_script():
            return
        self.seen.add(name)
        line: dict[str, object] = {"name": name, "is_set": name in set_names()}
        if has_default and isinstance(default, (*PLAIN, type(None))):
            line["default"] = default
        self.write(line)

    def is_copying(self, name: object) -> bool:
        """Whether this is the next value of a copy."""
        if self.copying and self.copying[-1] == name:
            self.copying.pop()
            return True
        self.copying = []
        return False

    def dump(self) -> None:
        """The settings, once."""
        if not self.is_dumped:
            self.is_dumped = True
            self.write({"settings": settings()})

    def write(self, line: dict[str, object]) -> None:
        with suppress(OSError, ValueError):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, (json.dumps(line) + "\n").encode())
            finally:
                os.close(descriptor)


def set_names() -> Any:
    """The variables that there are, without a look that would be noted."""
    return {key.decode(errors="replace") if isinstance(key, bytes) else key for key in vars(os.environ)["_data"]}


def is_of_script() -> bool:
    """Whether the nearest code that is no library's looks for the environment itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    while frame is not None and frame.f_globals.get("__name__") in ("os", "_collections_abc", "collections.abc"):
        frame = frame.f_back
    return frame is not None and not frame.f_code.co_filename.startswith(LIBRARIES)


def settings() -> dict[str, object]:
    """Plain values that the main module holds, its own and those of its classes."""
    main = vars(sys.modules.get("__main__", object()))
    found = {name: value for name, value in main.items() if _is_shown(name, value)}
    for value in list(main.values()):
        if isinstance(value, type) and value.__module__ == "__main__":
            found |= {name: own for name, own in vars(value).items() if _is_shown(name, own)}
    return dict(list(found.items())[:MOST_SETTINGS])


def _is_shown(name: str, value: object) -> bool:
    return not name.startswith("__") and isinstance(value, PLAIN) and len(str(value)) <= LONGEST


class Watched(type(os.environ)):  # type: ignore[misc]  # the class that os keeps to itself
    """The environment, with its reader's looks noted."""

    def __getitem__(self, key: Any) -> Any:
        if not TRACE.is_copying(key):
            TRACE.note(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        TRACE.note(key, default, has_default=True)
        return super().get(key, default)

    def __iter__(self) -> Iterator[Any]:
        names = list(super().__iter__())
        TRACE.copying = names[::-1]
        yield from names


def _leave(_number: int, _frame: FrameType | None) -> None:
    TRACE.dump()
    os._exit(0)


def _run_next() -> None:
    """The module that would have been imported without this one."""
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.abspath(path or ".") != HERE])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


if os.environ.get(FILE) and os.environ.get("RANK", "0") == "0":
    TRACE = Trace(os.environ[FILE])
    if Path(TRACE.path).parent.is_dir():
        os.environ.__class__ = Watched
        atexit.register(TRACE.dump)
        if os.environ.get(PROBE):
            signal.signal(signal.SIGTERM, _leave)
_run_next()
