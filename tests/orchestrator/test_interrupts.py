import os
import signal

import pytest
from fakes import FakeLauncher, Listener, tiny_study
from make_controller import controller

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
