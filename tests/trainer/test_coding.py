import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trainer.coding import decode, encode, estimate, limit_of
from trainer.errors import ProtocolError

# One with passes as short as memory asks for, one table with blocks that are.
SHAPES = [(1, 1), (1, 700), (700, 1), (3, 5), (64, 64), (0, 4), (4, 0), (300, 30), (1100, 1000), (120_000, 2)]


def normal(shape, deviation, *, limit=31, seed=0):
    """Rounded normal values; `deviation` may be an array that the shape takes."""
    values = np.random.default_rng(seed).normal(size=shape) * deviation
    return np.clip(np.rint(values), -limit, limit).astype(np.int8)


def spread_out(rows=512, columns=384, seed=1):
    """Standard deviations of rows and columns that differ by a factor of two and more. (M, N)"""
    chance = np.random.default_rng(seed)
    row, column = np.exp(chance.normal(0, 0.4, rows)), np.exp(chance.normal(0, 0.4, columns))
    return 6 * np.outer(row, column).clip(0.2, 3)


def coded_again(matrices):
    return decode(encode(matrices), [m.shape for m in matrices], [limit_of(m) for m in matrices], "model")


def ideal_bytes(integers, deviation):
    """What a coder pays that is told every standard deviation."""
    from scipy.stats import norm

    below, above = norm.cdf((integers - 0.5) / deviation), norm.cdf((integers + 0.5) / deviation)
    below, above = np.where(integers == -31, 0, below), np.where(integers == 31, 1, above)
    return -np.log2(above - below).sum() / 8


def order_0_bytes(integers):
    counts = np.unique(integers, return_counts=True)[1]
    return -(counts * np.log2(counts / counts.sum())).sum() / 8


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_any_shape_comes_back(shape):
    matrix = normal(shape, 8)
    assert np.array_equal(coded_again([matrix])[0], matrix)


def test_matrices_with_other_largest_integers_come_back_from_one_stream():
    matrices = [normal((40, 30), 20, limit=limit) for limit in (31, 127, 1, 31, 15)]
    assert all(np.array_equal(a, b) for a, b in zip(coded_again(matrices), matrices, strict=True))
    assert coded_again([]) == []


@given(
    arrays.arrays(np.int8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.integers(-127, 127))
)
@settings(max_examples=300, deadline=None)
def test_any_integers_come_back(matrix):
    before = matrix.copy()
    assert np.array_equal(coded_again([matrix])[0], matrix)
    assert np.array_equal(matrix, before)


def test_rows_and_columns_of_different_size_cost_little_more_than_if_they_were_known():
    deviation = spread_out()
    integers = normal(deviation.shape, deviation)
    coded = len(encode([integers]))
    assert coded < 0.96 * order_0_bytes(integers)
    assert coded < 1.012 * ideal_bytes(integers, deviation)  # 896 deviations are learned from 196,608 values


def test_where_there_is_nothing_to_learn_little_is_lost():
    integers = [normal((512, 512), 8, seed=seed) for seed in range(4)]
    assert len(encode(integers)) < 1.003 * sum(map(order_0_bytes, integers))


def test_a_table_whose_columns_go_together_costs_little_more_than_what_is_its_own():
    chance = np.random.default_rng(2)
    common = chance.normal(0, 30, (2048, 4)) @ chance.normal(0, 0.5, (4, 64))
    own = chance.normal(0, 4, (2048, 64))
    table = np.clip(np.rint(common + own), -127, 127).astype(np.int8)
    # The four numbers behind a row cost something, too, and columns' weights have to be learned.
    assert len(encode([table])) < 1.2 * ideal_bytes(np.rint(own), np.full(own.shape, 4.0))
    assert len(encode([table])) < 0.75 * order_0_bytes(table)


def test_rows_that_nearly_repeat_cost_little():
    rows = np.repeat(normal((1, 128), 40, limit=120), 256, axis=0)
    noise = np.random.default_rng(3).integers(-1, 2, rows.shape, dtype=np.int8)
    table = np.concatenate([rows + noise, normal((1024, 128), 40, limit=127)])
    alone = len(encode([table[256:]]))
    assert len(encode([table])) < alone + 0.65 * order_0_bytes(table[:256])


def test_zeros_take_next_to_nothing():
    assert len(encode([np.zeros((512, 512), np.int8)])) < 512 * 512 / 8 / 20


def test_the_last_integer_can_still_come_where_it_never_came():
    # The library panics where rounding in its tables leaves that integer nothing.
    for shape in ((1100, 1000), (9000, 40)):
        matrix = np.zeros(shape, np.int8)
        matrix[-1, -1] = 127
        assert np.array_equal(coded_again([matrix])[0], matrix)


@pytest.mark.parametrize(
    "matrices",
    [
        [normal((512, 384), spread_out())], [normal((64, 512), 8), normal((256, 64), 30, limit=127)],
        [np.zeros((64, 64), np.int8)], [normal((900, 40), 30, limit=127)], [],
    ],
)  # fmt: skip
def test_the_estimate_is_what_coding_takes(matrices):
    assert estimate(matrices) == pytest.approx(len(encode(matrices)), rel=1e-3, abs=12)


def test_the_words_of_given_integers_never_change():
    # Another sum means that files written before can no longer be read.
    matrix = (np.arange(300 * 200) ** 2 % 8191 % 63 - 31).astype(np.int8).reshape(300, 200)
    table = (np.add.outer(np.arange(400) ** 2 % 97, np.arange(20) * 5) - 96).astype(np.int8)
    words = encode([matrix, table, np.eye(9, dtype=np.int8) * -127])
    assert hashlib.sha256(words).hexdigest()[:16] == "8ec4f37bb2a1a5f3"


@pytest.mark.parametrize("limit", [0, 128, 255])
def test_a_largest_integer_that_no_matrix_has_is_named(limit):
    with pytest.raises(ProtocolError, match=rf"model: .* must be 1 to 127, got \[31, {limit}\]"):
        decode(b"", [(2, 2), (2, 2)], [31, limit], "model")


@pytest.mark.parametrize("words", [b"\1", b"\xff" * 40])
def test_words_that_no_encoder_writes_are_named(words):
    with pytest.raises(ProtocolError, match="model: coded integers are damaged"):
        decode(words, [(50, 50)], [31], "model")


@given(st.binary(max_size=400).map(lambda raw: raw[: len(raw) // 4 * 4]), st.integers(1, 127))
@settings(max_examples=1000, deadline=None)
def test_any_words_are_integers_in_their_limits_or_refused_as_ours(words, limit):
    shapes, limits = [(9, 20), (0, 3), (24, 3)], [limit, limit, 1]
    try:
        found = decode(words, shapes, limits, "model")
    except ProtocolError:
        return
    assert [m.shape for m in found] == shapes
    assert all(limit_of(m) <= most for m, most in zip(found, limits, strict=True))
