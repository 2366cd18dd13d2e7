"""Integers of a model file through a range coder that learns, from those before, how large and near what each one will be.

Nothing of a matrix is stored but its values, and they are read in the order in which they were written, so the reader can
repeat every guess. A guess is what an integer is near and how far off it may be; the latter puts it into a class, and a
class has a table: how often each distance came up in it, in all matrices so far. Reader and writer must agree in every
bit, on whatever machine: they take sums of integers, running sums of floats (`cumsum`, not `sum`), and single operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import constriction
import numpy as np

from trainer.errors import ProtocolError

# Dimensions: M, N rows and columns of a matrix, S values that are coded at once, B rows of a block, K classes,
# V = 2 limit + 1 integers of a matrix.

LARGEST_LIMIT = 127
FIRST_SIZE = 0.25  # of an integer, as a part of the largest, before any is known
NORMAL_SIZE = 0.8  # mean of a normal variable's absolute value, in standard deviations
NOISE = 0.57  # and the variance of that, in its mean's square

# Matrices of which only sizes can be guessed.
PASSES, FEWEST_VALUES, MOST_VALUES = 32, 2**8, 2**15  # of a matrix; of a pass: few tell little, many take memory

# Tables: so many more rows than columns that one column says something of the next.
TALL = 8  # rows for each column
FIRST_ROWS, GROWTH = 8, 1.5  # of the first block; all rows from one block to the next
RIDGE = 256  # rows whose columns say nothing of each other, put before a table's own
DOUBT = 14  # columns until a row's own distances count as much as all rows'

OCTAVE_BITS = 4  # 2^4 classes between a distance and its double
CLASSES = 10 << OCTAVE_BITS
SMALLEST = 1020 << OCTAVE_BITS  # the first bits of 2^-3, the smallest distance
TAIL = 15  # degrees of freedom of the first tables, Student's t: nearly normal
UNIT = 64  # of a table, for one value
TRUST = 200 * UNIT  # of a first table
# Of the tables that the library gets: so far under the 2^24 of float32 that sums are exact, and each entry at least 1. With
# less, its rounding can leave nothing for the last integer, which it takes for a bug of its own and panics.
TOTAL = 2**20

FAMILY = constriction.stream.model.Categorical(perfect=False)

Step = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Codes some values: (distances [S], from 0 up; tables [., V]; which of those [S]) to the distances."""

Guess = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Places of some values in a matrix, what they are near, and how far off: all [S]."""


def limit_of(integers_MN: np.ndarray) -> int:
    """The largest size of an integer of the matrix, at least 1."""
    return int(np.abs(integers_MN, dtype=np.int16).max(initial=1))


def encode(matrices: Sequence[np.ndarray]) -> bytes:
    """Code the values of int8 matrices [M, N] between -127 and 127."""
    encoder = constriction.stream.queue.RangeEncoder()

    def step(distances_S: np.ndarray, tables_KV: np.ndarray, tables_S: np.ndarray) -> np.ndarray:
        encoder.encode(distances_S, FAMILY, tables_KV[tables_S])
        return distances_S

    _code(matrices, [limit_of(matrix) for matrix in matrices], step)
    words: bytes = encoder.get_compressed().astype("<u4").tobytes()
    return words


def decode(words: bytes, shapes: Sequence[Sequence[int]], limits: Sequence[int], place: str) -> list[np.ndarray]:
    """Undo `encode`. Raises ProtocolError where the words cannot be those of such matrices; not every damage shows."""
    if not all(1 <= limit <= LARGEST_LIMIT for limit in limits):
        raise ProtocolError(
            f"{place}: the largest integers of its matrices must be 1 to {LARGEST_LIMIT}, got {list(limits)}"
        )
    matrices = [np.zeros(shape, np.int8) for shape in shapes]
    try:
        decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(words, "<u4"))
        _code(matrices, limits, lambda _, tables_KV, tables_S: decoder.decode(FAMILY, tables_KV[tables_S]))
    except (ValueError, AssertionError) as error:  # the library's, for words that no encoder writes
        raise ProtocolError(f"{place}: coded integers are damaged: {error}") from error
    return matrices


def estimate(matrices: Sequence[np.ndarray]) -> float:
    """Bytes that `encode` will take, without coding."""
    bits = 0.0

    def step(distances_S: np.ndarray, tables_KV: np.ndarray, tables_S: np.ndarray) -> np.ndarray:
        nonlocal bits
        bits -= float(np.log2(tables_KV[tables_S, distances_S] / tables_KV.sum(1)[tables_S]).sum())
        return distances_S

    _code(matrices, [limit_of(matrix) for matrix in matrices], step)
    return bits / 8


def _code(matrices: Sequence[np.ndarray], limits: Sequence[int], step: Step) -> None:
    """Take the matrices through `step`, one after the other; those of one limit share their tables."""
    counts = {limit: _first_counts(limit) for limit in set(limits)}
    for integers_MN, limit in zip(matrices, limits, strict=True):
        if integers_MN.size:
            is_table = len(integers_MN) >= TALL * integers_MN.shape[1]
            guesses = _by_neighbours(integers_MN, limit) if is_table else _by_sizes(integers_MN, limit)
            _code_guessed(integers_MN.reshape(-1), limit, counts[limit], guesses, step)


def _code_guessed(flat: np.ndarray, limit: int, counts_KV: np.ndarray, guesses: Iterator[Guess], step: Step) -> None:
    """Take one matrix through `step`, which gives its values; what came up is added to the counts."""
    integers = 2 * limit + 1
    for places_S, near_S, far_S in guesses:
        # The leading bits of a float are its logarithm, in straight pieces.
        classes_S = np.clip((far_S.view(np.int64) >> 52 - OCTAVE_BITS) - SMALLEST, 0, CLASSES - 1)
        used_K, tables_S = np.unique(classes_S, return_inverse=True)
        own_KV = counts_KV[used_K]
        tables_KV = (own_KV * TOTAL // own_KV.sum(1, keepdims=True) + 1).astype(np.float32)
        # Distances go round: beyond the largest integer comes the smallest.
        distances_S = ((flat[places_S] - near_S + limit) % integers).astype(np.int32)
        distances_S = step(distances_S, tables_KV, tables_S)
        flat[places_S] = (distances_S + near_S) % integers - limit
        found_KV = np.bincount(tables_S * integers + distances_S, minlength=own_KV.size).reshape(own_KV.shape)
        counts_KV[used_K] += UNIT // 2 * (found_KV + found_KV[:, ::-1])  # one side is like the other


def _first_counts(limit: int) -> np.ndarray:
    """How often each distance came up in each class, before any has. (K, V)"""
    sizes_K1 = (np.arange(SMALLEST, SMALLEST + CLASSES)[:, None] << 52 - OCTAVE_BITS).view(np.float64)
    deviations_K1 = sizes_K1 / NORMAL_SIZE
    squares_KV = 1 + (np.arange(-limit, limit + 1) / deviations_K1) ** 2 / TAIL
    density_KV = NORMAL_SIZE / 2 / deviations_K1 / ((squares_KV**2) ** 2) ** 2  # the power is (TAIL + 1) / 2
    return (TRUST * density_KV).astype(np.int64)


def _by_sizes(integers_MN: np.ndarray, limit: int) -> Iterator[Guess]:
    """Pass after pass, each with its share of every row and every column; a value is as large as its row and column are."""
    flat, (rows, columns) = integers_MN.reshape(-1), integers_MN.shape
    passes = max(1, min(PASSES, flat.size // FEWEST_VALUES), flat.size // MOST_VALUES)
    turns = (np.add.outer(np.arange(rows), np.arange(columns)) % passes).astype(np.uint16).reshape(-1)
    ends = np.cumsum(np.bincount(turns, minlength=passes))
    sizes, numbers = ([np.zeros(rows), np.zeros(columns)] for _ in range(2))  # sums of integers: exact in any order
    for places_S in np.split(np.argsort(turns, kind="stable"), ends[:-1]):
        indices = np.divmod(places_S, columns)
        mean = (sizes[0].sum() + FIRST_SIZE * limit) / (numbers[0].sum() + 1)
        far_S = 1 / mean
        for size, number, index in zip(sizes, numbers, indices, strict=True):
            doubt = _doubt(size, number, mean)
            far_S = far_S * ((size + doubt * mean) / (number + doubt))[index]
        yield places_S, np.zeros_like(places_S), far_S
        found_S = np.abs(flat[places_S])
        for size, number, index in zip(sizes, numbers, indices, strict=True):
            size += np.bincount(index, found_S, len(size))
            number += np.bincount(index, minlength=len(size))


def _doubt(size: np.ndarray, number: np.ndarray, mean: float) -> float:
    """Values of a row (or column) until its own mean counts as much as the matrix's.

    As many as there are now, times the variance of one value over what rows' sums vary beyond that: empirical Bayes.
    """
    variances = (size - mean * number) ** 2 / (number + 1)
    beyond = float(np.cumsum(variances)[-1]) / (mean * mean * len(size)) - NOISE
    return NOISE * (float(number.sum()) / len(size) + 1) / max(beyond, NOISE / 1000)


def _by_neighbours(integers_MN: np.ndarray, limit: int) -> Iterator[Guess]:
    """Column after column of a block of rows, each near what those before it say by the second moments of earlier blocks."""
    rows, columns = integers_MN.shape
    begin = 0
    while begin < rows:
        end = min(rows, max(FIRST_ROWS, int(GROWTH * begin)), begin + MOST_VALUES)
        known = integers_MN[:begin].astype(np.float64)  # products of integers are exact in any order, too
        moments_NN = known.T @ known + np.eye(columns) * RIDGE * (FIRST_SIZE * limit) ** 2
        near_NB, off_B = np.zeros((columns, end - begin)), np.zeros(end - begin)
        for column in range(columns):
            later = slice(column + 1, None)
            moment, weights = moments_NN[column, column], moments_NN[column, later] / moments_NN[column, column]
            moments_NN[later, later] -= np.multiply.outer(weights, moments_NN[column, later])
            deviation = np.sqrt(moment / (begin + RIDGE))
            far_B = deviation * (off_B + DOUBT * NORMAL_SIZE) / (column + DOUBT)
            near_B = near_NB[column]
            yield np.arange(begin, end) * columns + column, np.rint(near_B).astype(np.int64), far_B
            error_B = integers_MN[begin:end, column] - near_B
            off_B += np.abs(error_B) / deviation
            near_NB[later] += np.multiply.outer(weights, error_B)
        begin = end
