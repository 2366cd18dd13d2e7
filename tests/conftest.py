"""For all tests: signals as in a terminal, also under `nohup` or `&` of a script; and an end to slow tests on a slow machine."""

import os
import signal
import time

import pytest

for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

UNTIL = float(os.environ.get("CADDIE_TEST_UNTIL", "inf"))
"""Unix time after which no slow test begins: those that are left are skipped, and the summary counts them."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if time.time() > UNTIL and item.get_closest_marker("slow"):
        pytest.skip("the time that CADDIE_TEST_UNTIL leaves for slow tests is used up")
