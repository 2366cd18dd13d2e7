import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.evolution import Seen, from_unit, propose, to_unit
from orchestrator.space import NumberRange

SPACE = {"a": NumberRange(low=-2.0, high=3.0), "b": NumberRange(low=1e-4, high=1.0, log=True)}


def value(params):
    return (params["a"] - 1.0) ** 2 + (math.log10(params["b"]) + 2.0) ** 2


def evolve(trials, *, excess=lambda params: 0.0, seed=0):
    draw = random.Random(seed)
    seen = []
    for _ in range(trials):
        params = propose(SPACE, seen, draw.randrange(2**31))
        seen.append(Seen(params=params, value=value(params), excess=excess(params)))
    return seen


def test_evolution_comes_to_the_lowest_value():
    seen = evolve(150)
    assert min(one.value for one in seen[-12:]) < 0.01
    assert min(one.value for one in seen[-12:]) < min(one.value for one in seen[:12])


def test_points_that_break_a_limit_are_left_behind_though_their_values_are_lower():
    seen = evolve(150, excess=lambda params: max(0.0, params["a"] - 0.2))
    late = [one.params["a"] for one in seen[-12:]]
    assert sorted(late)[6] < 0.35 and any(one.excess == 0 for one in seen[-12:])


def test_the_same_trials_and_seed_give_the_same_point_and_another_seed_another():
    seen = evolve(20)
    assert propose(SPACE, seen, 3) == propose(SPACE, seen, 3) != propose(SPACE, seen, 4)


def test_a_generation_counts_when_it_is_whole():
    seen = evolve(13)
    assert propose(SPACE, seen[:12], 3) == propose(SPACE, seen, 3) != propose(SPACE, seen[:6], 3)


@given(st.floats(0, 1))
def test_a_place_between_the_bounds_comes_back(place):
    for knob_range in SPACE.values():
        found = from_unit(knob_range, place)
        assert knob_range.low <= found <= knob_range.high
        assert to_unit(knob_range, found) == pytest.approx(place, abs=1e-9)


def test_whole_numbers_and_steps_are_met():
    assert from_unit(NumberRange(low=1, high=7, step=2, is_integer=True), 0.55) in (3, 5)
    assert from_unit(NumberRange(low=0.1, high=0.5, step=0.2), 0.4) == 0.3
    assert isinstance(from_unit(NumberRange(low=1, high=64, log=True, is_integer=True), 0.5), int)
