from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from trainer import pool
from trainer.errors import CaddieError, DataError
from trainer.pool import in_order, usable_processes


@dataclass(frozen=True)
class Square:
    """Work that goes wrong in one of two ways."""

    refused: int = -1
    deadly: int = -1

    def __call__(self, number: int) -> int:
        if number == self.refused:
            raise DataError(f"no {number}", hint="another")
        if number == self.deadly:
            os._exit(9)
        return number * number


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_the_tasks_order(processes: int) -> None:
    assert list(in_order(Square(), range(40), processes)) == [(n, n * n) for n in range(40)]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_the_work_is_raised_with_its_hint_after_the_results_before_it(processes: int) -> None:
    results = in_order(Square(refused=3), range(40), processes)
    assert [next(results) for _ in range(3)] == [(0, 0), (1, 1), (2, 4)]
    with pytest.raises(DataError, match="no 3") as caught:
        next(results)
    assert caught.value.hint == "another"


def test_tasks_are_made_only_a_little_ahead() -> None:
    made: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    results = in_order(Square(), tasks(), 2)
    next(results)
    assert len(made) <= 2 * pool.TASKS_AHEAD
    results.close()  # type: ignore[attr-defined]


def test_a_process_that_is_killed_is_told_with_what_to_do() -> None:
    with pytest.raises(CaddieError, match="one of 2 processes was killed") as caught:
        list(in_order(Square(deadly=5), range(40), 2))
    assert "--processes" in str(caught.value.hint)


def test_the_machine_lends_at_least_one_process() -> None:
    assert 1 <= usable_processes() <= (os.cpu_count() or 1)
