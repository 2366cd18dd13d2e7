"""Evolution: CMA-ES over the numbers of a space, as a function of what has been scored; the only module that knows cmaes.

The distribution is made again from the scored trials at every question, generation by generation in their order, so it
has no state of its own that a controller could lose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.space import NumberRange, grid_values

FIRST_SPREAD = 0.3
"""Standard deviation of the first generation, in widths of the space: about a third of it, as cmaes advises."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A trial that has been scored."""

    params: Mapping[str, Any]
    value: float
    excess: float
    """Sum of what it breaks its limits by; 0 for a feasible one."""


def propose(space: Mapping[str, NumberRange], seen: Sequence[Seen], seed: int) -> dict[str, Any]:
    """The next point of a space of at least two knobs, given the trials in their order; the same for the same seed.

    Trials are ranked by their excess, then by their value: evolution needs no more than the order. What is left over of
    a generation waits until others complete it.
    """
    import numpy as np
    from cmaes import CMA

    knobs = list(space)
    size = 4 + math.floor(3 * math.log(len(knobs)))  # Hansen's, and the library's
    optimizer = CMA(
        mean=np.full(len(knobs), 0.5), sigma=FIRST_SPREAD, bounds=np.array([[0.0, 1.0]] * len(knobs)), seed=seed,
        population_size=size,
    )  # fmt: skip
    ranked = sorted(range(len(seen)), key=lambda n: (seen[n].excess, seen[n].value))
    rank = {n: float(place) for place, n in enumerate(ranked)}
    points = [np.array([to_unit(space[knob], trial.params[knob]) for knob in knobs]) for trial in seen]
    for first in range(0, len(seen) - size + 1, size):
        optimizer.tell([(points[n], rank[n]) for n in range(first, first + size)])
    proposal = optimizer.ask()
    return {knob: from_unit(space[knob], float(x)) for knob, x in zip(knobs, proposal, strict=True)}


def to_unit(knob_range: NumberRange, value: float) -> float:
    """A knob's value as its place between the bounds, from 0 to 1."""
    low, high = knob_range.low, knob_range.high
    if knob_range.log:
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return (value - low) / (high - low)


def from_unit(knob_range: NumberRange, place: float) -> float | int:
    """The value at a place between the bounds; the nearest that there is, for a grid or whole numbers."""
    low, high = knob_range.low, knob_range.high
    place = min(1.0, max(0.0, place))
    if knob_range.log:
        value = math.exp(math.log(low) + place * (math.log(high) - math.log(low)))
    else:
        value = low + place * (high - low)
    grid = grid_values(knob_range)
    if grid is not None:
        nearest: float | int = min(grid, key=lambda known: abs(known - value))
        return nearest
    return min(high, max(low, value))
