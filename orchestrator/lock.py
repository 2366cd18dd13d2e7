"""The study's lock: one controller at a time, on this host and on every other that sees the same files.

It is two things. A flock, which the system frees when its holder dies, however it dies; on a shared file system it may
not reach other hosts. And the controller's own file, which only one process can create, says who works on the study, and
is touched for as long as that process lives. Silence is measured by one clock, the file system's, and must be seen to
last on the observer's own: a clock that jumps takes nothing away from anybody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from orchestrator.claims import Claim, claim_of, is_live
from orchestrator.errors import StorageError, StudyBusy
from orchestrator.home import StudyDir
from trainer.protocol import storage_error

BEAT_SECONDS = 5.0  # between two touches of the controller's file
SILENCE_SECONDS = 60.0  # after which a holder on another host counts as dead
WATCH_SECONDS = 12.0  # for which even an old silence must be seen to last: more than two beats
GLANCE_SECONDS = 1.0  # for which the flock may be held by somebody who only looks who has it
POLL_SECONDS = 0.2

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
"""What flock says on a file system that has none."""

NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
"""What a file system says that knows no hard links."""

NAMELESS = frozenset({"", "localhost", "localhost.localdomain"})  # of hosts that many machines share


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who works on a study."""

    claim: Claim | None
    """None while it has the flock and has not yet said its name."""

    since: float = 0.0
    """Unix time at which it began."""

    silent_seconds: float = 0.0
    """Since its last touch, by the file system's clock."""

    def __str__(self) -> str:
        return "another controller" if self.claim is None else f"process {self.claim.pid} on {self.claim.host}"


@dataclass(frozen=True)
class _Sighting:
    """The controller's file as it was found."""

    content: bytes
    touched_ns: int

    @property
    def holder(self) -> Holder:
        try:
            record = json.loads(self.content)
            claim = Claim(**record["claim"])
            return Holder(claim=claim, since=float(record["since"]))
        except (ValueError, KeyError, TypeError):
            return Holder(claim=None)


class Lease:
    """What the holder has: its own file, kept fresh from a thread, and the duty to look whether it is still its own."""

    def __init__(self, study: StudyDir) -> None:
        self.study = study
        claim = dataclasses.asdict(claim_of(os.getpid()))
        record = {"claim": claim, "since": time.time(), "token": secrets.token_hex(8)}
        self.content = (json.dumps(record) + "\n").encode()
        self.heard = _boot_seconds()
        """When the file was last seen to be ours."""

        self.taker: Holder | None = None
        """Who took the study over, where somebody did."""

        self.problem: OSError | None = None
        self._closing = threading.Event()
        self._beats = threading.Lock()

    def create(self) -> None:
        """Make the file, whole, where there is none; raises FileExistsError, other OSErrors."""
        path = self.study.controller
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(self.content)
                file.flush()
                os.fsync(file.fileno())
            _place(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def beat(self) -> None:
        """Touch the file if it is still ours; what cannot be reached now is tried again."""
        with self._beats:
            try:
                found = _sight(self.study.controller)
                if found is None:  # somebody removed it, or is just looking at it
                    self.create()
                elif found.content != self.content:
                    self.taker = found.holder
                    return
                else:
                    os.utime(self.study.controller)
                self.heard, self.problem = _boot_seconds(), None
            except FileExistsError:  # the next beat sees whose it is
                return
            except OSError as error:
                self.problem = error

    def require(self) -> None:
        """Make sure that nobody else works on the study, at most half of SILENCE_SECONDS ago.

        A process that was suspended finds out here, before it decides anything. Raises StudyBusy, StorageError.
        """
        if self._is_stale():
            self.beat()
        if self.taker is not None:
            raise StudyBusy(
                f"{self.study.root.name}: {self.taker} has taken this study over: this controller was not heard for a while",
                hint="the running jobs go on, and the other controller sees them end",
            )
        if self._is_stale():
            reason = self.problem.strerror if self.problem else "it is not this controller's"
            raise StorageError(
                f"{self.study.controller}: cannot be touched: {reason}, so that another controller may believe this one dead",
                hint="running jobs go on; give the same command again once the file system answers",
            )

    def _is_stale(self) -> bool:
        return _boot_seconds() - self.heard > SILENCE_SECONDS / 2

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Keep the file fresh within the block, then give it up."""
        thread = threading.Thread(target=self._keep_beating, name="controller-lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._closing.set()
            thread.join(BEAT_SECONDS)
            self._give_up()

    def _keep_beating(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            self.beat()

    def _give_up(self) -> None:
        """Remove the file, if it is ours; where that cannot be done, it is known to be dead by its process."""
        with contextlib.suppress(OSError):
            found = _sight(self.study.controller)
            if found is not None and found.content == self.content:
                self.study.controller.unlink()


@contextmanager
def held(study: StudyDir, *, patience: float = 0.0) -> Iterator[Lease]:
    """Hold the study's lock. A holder that died is taken over: on this host at once, on another after its silence.

    Waits up to `patience` seconds for a holder to leave. Raises StudyBusy with the holder's name, StorageError.
    """
    deadline = time.monotonic() + patience
    try:
        study.root.mkdir(parents=True, exist_ok=True)
        file = study.lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise storage_error(error, study.lock) from error
    with file:
        has_flock = _wait_for_flock(file, study, deadline)
        try:
            lease = _take(study, has_flock=has_flock, deadline=deadline)
        except OSError as error:
            raise storage_error(error, study.controller) from error
        with lease.beating():
            yield lease


def holder(study: StudyDir) -> Holder | None:
    """Who works on a study, or None where nobody does."""
    found = _sight(study.controller)
    try:
        with study.lock.open("r", encoding="utf-8") as file:
            has_flock = _flock(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return None
    if has_flock is False:
        return found.holder if found is not None else Holder(claim=None)
    if found is None:
        return None
    silent = _silent_seconds(study, found)
    if _silence_of_the_dead(found, silent, has_flock=has_flock is True) < SILENCE_SECONDS:
        return None
    return dataclasses.replace(found.holder, silent_seconds=silent)


# ---------------------------------------------------------------------------------------------------- taking


def _flock(file: TextIO, kind: int) -> bool | None:
    """Whether the flock was free, and is now held; None where the file system has none."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def _wait_for_flock(file: TextIO, study: StudyDir, deadline: float) -> bool:
    """Take the flock; whether there is one. Raises StudyBusy, StorageError."""
    glance = time.monotonic() + GLANCE_SECONDS
    while True:
        try:
            taken = _flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise storage_error(error, study.lock) from error
        if taken is not False:
            return taken is True
        found = _sight(study.controller)
        if time.monotonic() >= (deadline if found is not None else max(deadline, glance)):
            raise _busy(study, found.holder if found is not None else Holder(claim=None))
        time.sleep(POLL_SECONDS / 4)


def _take(study: StudyDir, *, has_flock: bool, deadline: float) -> Lease:
    """Create the controller's file, over a dead holder's. Raises StudyBusy, OSError."""
    lease, seen, since = Lease(study), None, 0.0
    while True:
        try:
            lease.create()
        except FileExistsError:
            found = _sight(study.controller)
            if found is None:
                continue
            if found != seen:
                seen, since = found, time.monotonic()
            silent = _silent_seconds(study, found)
            left = _silence_of_the_dead(found, silent, has_flock=has_flock) - (time.monotonic() - since)
            if left <= 0:
                _put_away(study.controller, found)
            elif left > max(deadline - time.monotonic(), WATCH_SECONDS):
                raise _busy(study, dataclasses.replace(found.holder, silent_seconds=silent)) from None
            else:
                time.sleep(min(POLL_SECONDS, left))
        else:
            return lease


def _sight(path: Path) -> _Sighting | None:
    """The controller's file, or None. Opened anew each time: network file systems then ask the server."""
    try:
        with path.open("rb") as file:
            return _Sighting(file.read(), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def _silent_seconds(study: StudyDir, found: _Sighting) -> float:
    """Seconds since the holder's last touch, both ends by the file system's clock; 0 where nothing can be touched."""
    try:
        os.utime(study.lock)
        return max(0.0, (study.lock.stat().st_mtime_ns - found.touched_ns) / 1e9)
    except OSError:
        return 0.0


def _silence_of_the_dead(found: _Sighting, silent: float, *, has_flock: bool) -> float:
    """Seconds for which the file must be seen untouched before its holder counts as dead; infinite for a live one."""
    claim, here = found.holder.claim, claim_of(os.getpid())
    if claim is None:  # damaged
        return WATCH_SECONDS
    if (
        has_flock and claim.boot and claim.boot == here.boot
    ):  # a flock reaches every process of one kernel, and nobody had it
        return 0.0
    if claim.host == here.host and claim.host not in NAMELESS:
        return math.inf if is_live(claim) else 0.0
    return WATCH_SECONDS if silent > SILENCE_SECONDS else SILENCE_SECONDS


def _place(source: Path, target: Path) -> None:
    """Put a file's content where nothing is; raises FileExistsError, other OSErrors.

    By a hard link, which replaces nothing, unlike a rename; where the file system has none, by exclusive creation, so that
    a process that dies at this very instant leaves a damaged file.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with target.open("xb") as file:
            file.write(source.read_bytes())


def _put_away(path: Path, dead: _Sighting) -> None:
    """Remove a dead holder's file, and only that one: another process may have taken over meanwhile."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    try:
        if aside.read_bytes() != dead.content:
            with contextlib.suppress(FileExistsError):
                _place(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _busy(study: StudyDir, found: Holder) -> StudyBusy:
    name = study.root.name
    silence = ""
    if found.claim is not None and found.claim.host != claim_of(os.getpid()).host:
        silence = f"; it was heard {found.silent_seconds:.0f} s ago, and after {SILENCE_SECONDS:g} s of silence it is taken over"
    return StudyBusy(
        f"{name}: {found} works on this study{silence}",
        hint=f"wait for it, or stop it with: caddie study stop {name}",
    )


def _boot_seconds() -> float:
    """A clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
