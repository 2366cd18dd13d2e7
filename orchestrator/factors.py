"""Designs: factors whose levels are knobs, of which every combination is a cell that is run on all seeds; or pure re-runs."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ConfigError
from trainer.config import Config, knob_value, to_mapping, with_knobs

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
BETWEEN = "+"  # of the levels' names in a cell's
ORDER_KNOB = "data.order_seed"
MOST_CELLS = 256
"""Beyond, a factor was meant as a search."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """What is varied, in levels; the first is what the others are compared with."""

    name: str
    levels: dict[str, dict[str, Any]]
    """The knobs of each level."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One level of each factor; an arm of its study."""

    levels: tuple[str, ...]
    params: dict[str, Any]
    replicate: int = 0

    @property
    def name(self) -> str:
        """The arm's."""
        return BETWEEN.join(self.levels)


@dataclass(frozen=True, kw_only=True)
class NoisePlan:
    """Runs of one configuration: every seed of [confirm] decides an initialisation, and is run in every order of the data."""

    order_seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the order of the training data, at least 1, so that all runs have one bundle."""

    replicates: int = 2
    """Runs of each initialisation and order, which differ in nothing that is asked for."""


def parse_factors(table: Any, config: Config) -> tuple[Factor, ...]:
    """Read the tables `[factors.NAME.LEVEL]`, in their order. Raises ConfigError that names the table and the rule."""
    if not isinstance(table, Mapping) or not table:
        raise ConfigError(f"[factors] must hold tables [factors.NAME.LEVEL], got {table!r}")
    factors = tuple(_factor(name, levels, config) for name, levels in table.items())
    owners: dict[str, str] = {}
    for factor in factors:
        for knob in dict.fromkeys(knob for params in factor.levels.values() for knob in params):
            if owners.setdefault(knob, factor.name) != factor.name:
                raise ConfigError(
                    f"[factors] {owners[knob]} and {factor.name} both set {knob}, and a cell has one value of it",
                    hint="make one factor of the two",
                )
    count = math.prod(len(factor.levels) for factor in factors)
    if count > MOST_CELLS:
        raise ConfigError(
            f"[factors] make {count} cells, at most {MOST_CELLS} are run", hint="search the knob: [space] and [search]"
        )
    _require_apart(cells_of(factors), config)
    return factors


def _factor(name: str, levels: Any, config: Config) -> Factor:
    place = f"[factors.{name}]"
    if not isinstance(levels, Mapping) or len(levels) < 2:
        raise ConfigError(f"{place} needs at least two levels, each a table of knobs, got {levels!r}")
    for word in (name, *levels):
        if not NAME.fullmatch(word):
            raise ConfigError(
                f"[factors] names must be lower-case letters, digits, '.', '_', '-', got {word!r}",
                hint="a level is a table of its own: [factors.rate.low]",
            )
    for level, params in levels.items():
        if not isinstance(params, Mapping):
            raise ConfigError(
                f"[factors.{name}.{level}] must be a table of knobs, got {params!r}",
                hint=f'[factors.{name}.{level}] and below it "ttt.lr" = 0.002, say',
            )
        for knob, value in params.items():
            if isinstance(value, Mapping):
                raise ConfigError(
                    f"[factors.{name}.{level}] must hold knobs, got a table {knob!r}",
                    hint=f'a name with a dot stands in quotes: [factors.{name}."{level}.{knob}"]',
                )
            knob_value(config, knob)  # refuses an unknown knob with the nearest name
    return Factor(name=name, levels={level: dict(params) for level, params in levels.items()})


def _require_apart(cells: Sequence[Cell], config: Config) -> None:
    """Raise ConfigError where a cell cannot be run, or is another cell's configuration."""
    seen: list[tuple[dict[str, Any], str]] = []
    for cell in cells:
        try:
            made = to_mapping(with_knobs(config, cell.params))
        except ConfigError as error:
            raise ConfigError(f"[factors] cell {cell.name}: {error}", hint=error.hint) from error
        same = next((name for other, name in seen if other == made), None)
        if same is not None:
            raise ConfigError(
                f"[factors] cells {same} and {cell.name} are one configuration", hint="leave one of the levels out"
            )
        seen.append((made, cell.name))


def cells_of(factors: Sequence[Factor]) -> tuple[Cell, ...]:
    """Every combination of levels, the last factor's changing first."""
    return tuple(
        Cell(levels=levels, params=_merged(factors, levels))
        for levels in itertools.product(*(factor.levels for factor in factors))
    )


def _merged(factors: Sequence[Factor], levels: Sequence[str]) -> dict[str, Any]:
    return dict(item for factor, level in zip(factors, levels, strict=True) for item in factor.levels[level].items())


def noise_cells(plan: NoisePlan) -> Iterator[Cell]:
    """One cell for each order of the data and each time that it is run."""
    for order, again in itertools.product(plan.order_seeds, range(plan.replicates)):
        yield Cell(
            levels=(f"order-{order}", f"run-{again + 1}"), params={ORDER_KNOB: order}, replicate=again
        )  # fmt: skip


def require_repeatable(plan: NoisePlan, config: Config) -> None:
    """Raise ConfigError where the components of the noise could not be told apart."""
    if len(plan.order_seeds) < 2 or min(plan.order_seeds) < 1:
        raise ConfigError(f"[noise] order_seeds must be two or more, each at least 1, got {list(plan.order_seeds)}")
    if plan.replicates < 2:
        raise ConfigError(
            f"[noise] replicates must be at least 2, got {plan.replicates}",
            hint="one run of a kind cannot show what the machine adds to it",
        )
    if knob_value(config, ORDER_KNOB) != -1:
        raise ConfigError(
            f"[noise] sets {ORDER_KNOB} itself, [set] has {knob_value(config, ORDER_KNOB)}", hint="leave it out"
        )
