import os

import pytest

from orchestrator import pulse
from orchestrator.pulse import Pulse
from trainer.protocol import AttemptDir


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(pulse, "time", made)
    return made


@pytest.fixture
def attempt(tmp_path):
    found = AttemptDir(tmp_path / "1")
    found.root.mkdir()
    return found


def touch(path, seconds):
    path.touch()
    os.utime(path, ns=(int(seconds * 1e9), int(seconds * 1e9)))


def test_what_nobody_has_begun_has_no_pulse(attempt, clock):
    assert Pulse().silent_seconds(attempt) is None


def test_silence_lasts_until_the_claim_or_the_events_change(attempt, clock):
    heart = Pulse()
    touch(attempt.claim, 5)
    assert heart.silent_seconds(attempt) == 0
    for _ in range(4):
        clock.now += 2
        last = heart.silent_seconds(attempt)
    assert last == 8
    clock.now += 2
    touch(attempt.events, 3)  # another host's clock may be behind
    assert heart.silent_seconds(attempt) == 0


def test_an_observer_that_was_suspended_has_heard_no_silence(attempt, clock):
    heart = Pulse()
    touch(attempt.claim, 5)
    heart.silent_seconds(attempt)
    clock.now += 3600
    assert heart.silent_seconds(attempt) == pulse.LONGEST_GAP_SECONDS


def test_files_are_not_opened_at_every_turn_of_a_loop(attempt, clock):
    heart = Pulse()
    touch(attempt.claim, 5)
    heart.silent_seconds(attempt)
    clock.now += 2
    assert heart.silent_seconds(attempt) == 2
    touch(attempt.claim, 6)
    clock.now += pulse.LOOK_SECONDS / 2
    assert heart.silent_seconds(attempt) == 2
    clock.now += pulse.LOOK_SECONDS
    assert heart.silent_seconds(attempt) == 0


def test_what_is_forgotten_is_heard_afresh(attempt, clock):
    heart = Pulse()
    touch(attempt.claim, 5)
    heart.silent_seconds(attempt)
    clock.now += 2
    heart.forget(attempt)
    assert heart.silent_seconds(attempt) == 0
