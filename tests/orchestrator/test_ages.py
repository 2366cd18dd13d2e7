import time

from orchestrator.ages import Ages


def test_an_age_counts_on_when_the_clock_is_set_forward_or_back(monkeypatch):
    clocks = {"wall": 1000.0, "mono": 50.0}
    monkeypatch.setattr(time, "time", lambda: clocks["wall"])
    monkeypatch.setattr(time, "monotonic", lambda: clocks["mono"])
    ages = Ages()
    assert ages.of(("run", "began"), 900.0) == 100.0
    clocks.update(wall=10_000.0, mono=60.0)
    assert ages.of(("run", "began"), 900.0) == 110.0 and ages.watched(("run", "began")) == 10.0
    clocks.update(wall=0.0, mono=70.0)
    assert ages.of(("run", "began"), 900.0) == 120.0
    assert ages.of(("run", "stop"), 500.0) == 0.0, "what began in the future begins now"
    ages.forget("run")
    assert ages.watched(("run", "began")) == 0.0
