import gc

import pytest
import torch

from trainer.graphs import Recorded, compilations, uncollected


def test_on_a_cpu_a_recorded_function_is_called_each_time_with_what_it_is_given():
    calls = []

    def function(a, b, *, doubles):
        calls.append((a, b, doubles))
        return a + b * (1 + doubles)

    recorded, ones = Recorded(function, is_pure=False), torch.ones(2)
    assert torch.equal(recorded(ones, 2 * ones, doubles=True), 5 * ones)
    assert torch.equal(recorded(ones, ones, doubles=False), 2 * ones)
    assert [doubles for _, _, doubles in calls] == [True, False]
    assert calls[0][0] is ones
    assert (recorded.misses, recorded.replays) == (0, {})


def test_on_a_cpu_recording_runs_the_function_once_with_its_effects_and_on_copies():
    total, given = torch.zeros(2), torch.ones(2)

    def add_and_spoil(x):
        total.add_(x)
        return x.zero_()

    recorded = Recorded(add_and_spoil, is_pure=False)
    recorded.record(given)
    assert total.tolist() == [1.0, 1.0]
    assert given.tolist() == [1.0, 1.0]
    assert recorded.replays == {}


def test_what_was_compiled_is_counted():
    before = compilations()
    doubled = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    doubled(torch.ones(2)), doubled(torch.ones(2))
    assert compilations() == before + 1
    doubled(torch.ones(3))
    assert compilations() == before + 2


@pytest.mark.parametrize("is_enabled", [True, False])
def test_nothing_is_collected_while_a_graph_is_recorded_and_then_as_before(is_enabled):
    was_enabled = gc.isenabled()
    (gc.enable if is_enabled else gc.disable)()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() is is_enabled
        with pytest.raises(ZeroDivisionError), uncollected():
            1 / 0  # noqa: B018  # what a recording may raise
        assert gc.isenabled() is is_enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
