import math

import pytest
from make_ladder import DECAY, EMA, rungs_of_text, trials_of
from scipy import stats

from orchestrator.agreement import agreement, best_alike_share, in_words, pairs_of
from orchestrator.ledger import StudyState

LOWER, UPPER = (1.30, 1.20, 1.25, 1.15, 1.10), (1.20, 1.12, 1.11, 1.10, 1.05)


def measured(lower=LOWER, upper=UPPER, **changes):
    proxy, mid, _ = rungs_of_text(ema="", **changes)
    return agreement(proxy, trials_of(*lower), mid, trials_of(*upper))


def test_correlations_and_residuals_are_those_of_the_points_on_both_rungs():
    found = measured()
    assert [(pair.lower, pair.upper) for pair in found.pairs] == list(zip(LOWER, UPPER, strict=True))
    assert found.spearman.value == pytest.approx(stats.spearmanr(LOWER, UPPER).statistic)
    assert found.kendall.value == pytest.approx(stats.kendalltau(LOWER, UPPER).statistic)
    line = stats.linregress(LOWER, UPPER)
    left = sum((y - line.intercept - line.slope * x) ** 2 for x, y in zip(LOWER, UPPER, strict=True))
    assert found.residual_std == pytest.approx(math.sqrt(left / 3))
    assert found.is_best_alike and 0.5 < found.best_alike_share <= 1
    assert "proxy and mid share 5 points: Spearman +0.90" in in_words(found)


def test_fewer_than_four_points_say_nothing():
    found = measured(LOWER[:3], UPPER[:3])
    assert len(found.pairs) == 3 and found.spearman is None and found.is_best_alike is None
    assert "too few" in in_words(found)


def test_scores_that_are_all_equal_have_no_correlation():
    found = measured(upper=(1.1,) * 5)
    assert found.spearman is None and "the scores are all equal" in in_words(found)


def test_only_points_that_both_rungs_completed_are_pairs():
    mid = rungs_of_text(ema="")[1]
    below = trials_of(1.3, 1.2, 1.1, 1.0, 0.9, t1={"state": "pruned", "value": None})
    above = trials_of(1.3, 1.2, 1.1, 1.0, 0.9, t2={"state": "failed", "value": None})
    assert [pair.upper_trial for pair in pairs_of(mid, below, above)] == [0, 3, 4]


def test_a_point_is_paired_with_the_one_that_it_went_up_as():
    mid = rungs_of_text()[1]
    points = [{DECAY: 0.09, EMA: 0.9}, {DECAY: 0.05, EMA: 0.99}, {DECAY: 0.05, EMA: 0.95}, {DECAY: 0.05, EMA: 0.9}]
    below = trials_of(1.3, 1.2, 1.1, 1.4, params=points.__getitem__)
    above = trials_of(1.25, 1.0, params=[points[0], {DECAY: 0.05, EMA: 0.9}].__getitem__)
    assert [pair.lower_trial for pair in pairs_of(mid, below, above)] == [0, 3], "the same point itself comes first"
    del below.trials[3]
    assert [pair.lower_trial for pair in pairs_of(mid, below, above)] == [0, 2], "else the best of those that became it"


def test_how_often_the_best_is_alike_is_one_for_the_same_order_and_falls_with_another():
    same = measured(LOWER, LOWER)
    other = measured(LOWER, tuple(reversed(LOWER)))
    assert same.best_alike_share == 1 and same.is_best_alike
    assert other.best_alike_share < 0.1 and not other.is_best_alike
    assert best_alike_share(same.pairs) == best_alike_share(same.pairs), "the same report twice"


def test_nothing_is_shared_with_a_rung_that_has_not_begun():
    proxy, mid, _ = rungs_of_text()
    assert agreement(proxy, trials_of(1.0, 1.1), mid, StudyState()).pairs == ()
