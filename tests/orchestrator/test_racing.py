import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.racing import (
    BETTER,
    HOPELESS,
    NOT_BETTER,
    OPEN,
    Rules,
    boundaries,
    information,
    race,
    scores_at,
    seeds_of_looks,
    spent,
)
from orchestrator.statistics import Summary, summarize

SIGMA = 0.00067  # pooled over the public records' seeds
RACES = 300
PATHS = 200_000
LOOKS = seeds_of_looks(first=2, step=1, most=8)


def races(delta, *, rules, against="arm", count=RACES, seed=5):
    """Verdict and seeds used of simulated races of a candidate whose true difference is `delta`."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ours = (1.08 + delta + SIGMA * draw.standard_normal(LOOKS[-1])).tolist()
        theirs = (1.08 + SIGMA * draw.standard_normal(LOOKS[-1])).tolist()
        scores = [ours[:n] for n in LOOKS]
        if against == "arm":
            done = race(scores, [theirs[:n] for n in LOOKS], planned=[(n, n) for n in LOOKS], rules=rules)
        elif against == "number":
            done = race(scores, 1.08, planned=[(n, 0) for n in LOOKS], rules=rules)
        else:  # a record of three seeds
            fixed = summarize(theirs[:3])
            done = race(scores, fixed, planned=[(n, 3) for n in LOOKS], rules=rules)
        found.append((done.verdict, done.looks[-1].seeds))
    return found


def share(found, verdict):
    return sum(one == verdict for one, _ in found) / len(found)


def three_sigma(alpha, count=RACES):
    """What a share of `alpha` may come out as, in so many races."""
    return alpha + 3 * math.sqrt(alpha * (1 - alpha) / count)


def t_statistics(ours, theirs, n, m):
    """Student's t of many races at once, by the textbook; `m` 0 for an exact zero."""
    a, b = ours[:, :n], theirs[:, :m]
    means = a.mean(axis=1) - (b.mean(axis=1) if m else 0.0)
    squares = ((a - a.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    if m:
        squares = squares + ((b - b.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    freedom = n - 1 + max(0, m - 1)
    return means / np.sqrt(squares / freedom * (1 / n + (1 / m if m else 0.0)))


@pytest.mark.parametrize("alpha", [0.05, 0.01])
@pytest.mark.parametrize("theirs", ["the same", 0, 3, 5])
def test_the_error_over_all_looks_together_stays_within_alpha(alpha, theirs):
    """Proof by a simulation of its own: equal arms, a spread nobody knows, a look after every seed."""
    draw = np.random.default_rng(99)
    counts = tuple((n, n if theirs == "the same" else theirs) for n in LOOKS)
    ours, baseline = SIGMA * draw.standard_normal((2, PATHS, LOOKS[-1]))
    lower, upper = np.zeros(PATHS, dtype=bool), np.zeros(PATHS, dtype=bool)
    for (n, m), boundary in zip(counts, boundaries(counts, alpha), strict=True):
        found = t_statistics(ours, baseline, n, m)
        lower |= found <= -boundary
        upper |= found >= boundary
    error = math.sqrt(alpha * (1 - alpha) / PATHS)
    for crossed in (lower, upper):
        assert 0.8 * alpha < crossed.mean() <= alpha + 2 * error


@pytest.mark.parametrize("against", ["arm", "number", "record"])
def test_equal_arms_are_seldom_called_better(against):
    found = races(0.0, rules=Rules(alpha=0.05), against=against)
    assert share(found, BETTER) <= three_sigma(0.05)
    assert share(found, NOT_BETTER) <= three_sigma(0.05)


def test_looking_after_every_seed_without_the_boundaries_would_break_the_bound():
    """The same races, each look at its own level: what the boundaries are there for."""
    from scipy import stats

    ours, theirs = np.random.default_rng(99).standard_normal((2, 20_000, LOOKS[-1]))
    naive = [t_statistics(ours, theirs, n, n) <= -stats.t.isf(0.05, 2 * n - 2) for n in LOOKS]
    assert np.any(naive, axis=0).mean() > 2 * 0.05


def test_a_margin_moves_what_is_bounded_to_the_margins_edge():
    rules = Rules(alpha=0.05, margin=0.002)
    assert share(races(-0.002, rules=rules, count=300), BETTER) <= three_sigma(0.05, 300)
    assert share(races(-0.006, rules=rules, count=200), BETTER) > 0.99


def test_a_clear_difference_is_found_early_and_a_clear_loss_is_left_early():
    wins = races(-0.005, rules=Rules(alpha=0.05), count=200)
    assert share(wins, BETTER) > 0.98 and np.mean([seeds for _, seeds in wins]) < 3
    losses = races(0.005, rules=Rules(alpha=0.05), count=200)
    assert share(losses, BETTER) == 0 and np.mean([seeds for _, seeds in losses]) < 2.5


def test_a_race_that_nobody_can_win_any_more_is_given_up():
    found = races(0.0, rules=Rules(alpha=0.05), count=150)
    assert share(found, HOPELESS) > 0.5
    assert np.mean([seeds for _, seeds in found]) < 0.6 * LOOKS[-1]


@given(st.floats(0.001, 0.2), st.floats(0, 1), st.floats(0, 1))
def test_the_error_spent_grows_from_nothing_to_alpha(alpha, a, b):
    low, high = sorted((a, b))
    assert 0 <= spent(low, alpha) <= spent(high, alpha) <= alpha * (1 + 1e-12)
    assert spent(1.0, alpha) == pytest.approx(alpha) and spent(0.0, alpha) == 0


def test_boundaries_fall_with_the_degrees_of_freedom_and_one_look_has_that_of_the_plain_test():
    from scipy import stats

    counts = tuple((n, n) for n in LOOKS)
    found = boundaries(counts, 0.05)
    assert list(found) == sorted(found, reverse=True)
    (alone,) = boundaries(((4, 4),), 0.05)
    assert alone == pytest.approx(stats.t.isf(0.05, 6), abs=0.06)  # the simulation's error, and its safety
    assert boundaries(((1, 1), (2, 2)), 0.05)[0] == math.inf  # one seed each has no spread


def test_information_is_that_of_the_harmonic_mean():
    assert information((3, 3)) == pytest.approx(1.5)
    assert information((3, 0)) == 3 and information((0, 3)) == 0


def test_a_seed_that_failed_takes_its_information_and_nothing_else():
    rules, planned = Rules(alpha=0.05), [(2, 2), (3, 3), (4, 4)]
    found = race(
        [[1.0], [1.0, 1.01], [1.0, 1.01, 1.0]], [[1.2, 1.21], [1.2, 1.21, 1.2], [1.2, 1.21, 1.2, 1.21]], planned=planned, rules=rules
    )  # fmt: skip
    assert found.looks[0].counts == (1, 2)
    assert found.verdict == BETTER


def test_without_scores_it_is_open_and_without_spread_it_is_decided():
    rules, planned = Rules(alpha=0.05), [(2, 2), (3, 3)]
    assert race([[]], [[1.0, 1.1]], planned=planned, rules=rules).verdict == OPEN
    assert race([[1.0, 1.0]], [[1.1, 1.1]], planned=planned, rules=rules).verdict == BETTER
    assert race([[1.1, 1.1]], [[1.0, 1.0]], planned=planned, rules=rules).verdict == NOT_BETTER


def test_a_race_ends_at_the_look_that_decides_it_and_at_the_last_seed():
    rules, planned = Rules(alpha=0.05), [(2, 0), (3, 0)]
    decided = race([[1.0, 1.0001], [2.0, 2.0, 2.0]], 1.08, planned=planned, rules=rules)
    assert len(decided.looks) == 1 and decided.is_over
    open_to_the_end = race([[1.0788, 1.0791], [1.0788, 1.0791, 1.0801]], 1.08, planned=planned, rules=rules)
    assert [look.verdict for look in open_to_the_end.looks] == [OPEN, OPEN]
    assert open_to_the_end.is_over and open_to_the_end.looks[-1].chance is None


def test_a_published_spread_of_one_record_is_pooled_with_our_seeds():
    fixed = Summary(count=5, mean=1.08, std=0.001, low=None, high=None)
    (look,) = race([[1.0790, 1.0790]], fixed, planned=[(2, 5)], rules=Rules(alpha=0.05)).looks
    assert look.std == pytest.approx(math.sqrt(4 * 0.001**2 / 5)) and look.counts == (2, 5)


def test_looks_end_at_the_last_seed_whatever_the_step():
    assert seeds_of_looks(first=2, step=2, most=7) == [2, 4, 6, 7]
    assert seeds_of_looks(first=3, step=1, most=3) == [3]
    assert scores_at({42: 1.0, 7: 3.0}, (42, 314, 7), 3) == [1.0, 3.0]
    assert scores_at({42: 1.0, 7: 3.0}, (42, 314, 7), 2) == [1.0]
