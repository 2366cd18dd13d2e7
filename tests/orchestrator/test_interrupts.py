import os
import signal

import pytest
from fakes import FakeLauncher, Listener, tiny_study
from make_controller import controller

from orchestrator import sweep
from orchestrator.errors import Interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_leaves_the_jobs_running_and_says_how_to_go_on(home, number):
    class Signalled(FakeLauncher):
        def submit(self, run, attempt, *, tag, resources):
            job_id = super().submit(run, attempt, tag=tag, resources=resources)
            os.kill(os.getpid(), number)
            return job_id

    before = signal.getsignal(number)
    listener, launcher = Listener(), Signalled(polls=20)
    with pytest.raises(Interrupted, match="running jobs go on; the same command continues") as caught:
        controller(tiny_study(slots=1), home, launcher=launcher, listener=listener).run()
    assert caught.value.exit_code == 130 and signal.getsignal(number) is before
    assert len(launcher.alive) == 1 and not listener.notes  # the error says it once
    launcher.__class__ = FakeLauncher
    assert controller(tiny_study(slots=1), home, launcher=launcher).run().closed == "finished"
    assert len(launcher.submitted) == 8


def leave_at(number, home):
    """Send the signal during the first submission; what the controller says."""

    class Signalled(FakeLauncher):
        def submit(self, run, attempt, *, tag, resources):
            job_id = super().submit(run, attempt, tag=tag, resources=resources)
            for _ in range(3):  # a shell and the kernel both tell of a terminal that closes
                os.kill(os.getpid(), number)
            return job_id

    launcher = Signalled(polls=20)
    controller(tiny_study(slots=1), home, launcher=launcher).run()


def test_a_terminal_that_closes_is_left_in_order_however_often_it_is_told(home):
    before = signal.getsignal(signal.SIGHUP)
    with pytest.raises(Interrupted, match="left by SIGHUP: 1 running jobs go on"):
        leave_at(signal.SIGHUP, home)
    assert signal.getsignal(signal.SIGHUP) is before


def test_one_who_was_started_to_outlive_the_terminal_does(home):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        leave_at(signal.SIGHUP, home)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_mirror_is_given_little_time_where_a_signal_says_that_time_is_short(home):
    class Slow(Listener):
        waits: tuple = ()

        def close(self, timeout=60.0):
            self.waits += (timeout,)

    class Signalled(FakeLauncher):
        def submit(self, run, attempt, *, tag, resources):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().submit(run, attempt, tag=tag, resources=resources)

    slow = Slow()
    with pytest.raises(Interrupted):
        controller(tiny_study(slots=1), home, launcher=Signalled(), mirror=slow).run()
    assert slow.waits == (sweep.LEAVE_SECONDS,)
