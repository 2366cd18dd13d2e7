import os
import signal
import subprocess
import sys

from orchestrator.processes import signal_tagged, tagged_processes


def test_processes_are_found_and_signalled_by_their_tag():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, "X_TAG": "me"})
    assert tagged_processes("X_TAG", "me") == [process.pid]
    assert tagged_processes("X_TAG", "m") == []
    signal_tagged("X_TAG", "me", signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
