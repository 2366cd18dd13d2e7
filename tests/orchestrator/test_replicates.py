import math
import random

import pytest
from make_study import make_record, make_study

from orchestrator.evidence import gather
from orchestrator.replicates import Spread, differences, pooled, spread_of


def test_the_spread_is_pooled_over_every_configuration_with_several_seeds():
    found = pooled([{"a": 1.0, "b": 1.2}, {"c": 2.0, "d": 2.0, "e": 2.3}, {"f": 9.0}])
    assert found.degrees_of_freedom == 3 and found.configurations == 2
    assert found.std == pytest.approx(math.sqrt((0.02 + 0.06) / 3))


def test_a_configuration_that_two_owners_share_counts_once():
    runs = {"a": 1.0, "b": 1.2}
    assert pooled([runs, dict(runs)]).degrees_of_freedom == 1


@pytest.mark.parametrize("groups", [[], [{"a": 1.0}], [{"a": 1.0, "b": 1.0}]])
def test_without_replicates_or_without_spread_there_is_no_noise_to_tell(groups):
    assert pooled(groups) is None


def test_a_difference_that_seeds_alone_make_is_within_noise_nineteen_times_in_twenty():
    draw, inside = random.Random(4), 0
    for _ in range(2000):
        noise = pooled([{str(k): draw.gauss(0, 1) for k in range(3)} for _ in range(3)])
        gap = (draw.gauss(0, 1) + draw.gauss(0, 1)) / 2 - (draw.gauss(0, 1) + draw.gauss(0, 1) + draw.gauss(0, 1)) / 3
        inside += noise.covers(gap, (2, 3))
    assert inside / 2000 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 2000))


def test_fewer_seeds_hide_larger_differences():
    noise = Spread(std=0.001, degrees_of_freedom=4, configurations=2)
    assert noise.half_width((1, 1)) > noise.half_width((3, 3)) > 0.001
    assert str(noise) == "σ 0.00100 of one run (df 4, pooled over 2 configurations with several seeds)"


def test_a_study_pools_its_arms_and_its_trials(tmp_path):
    found = spread_of(gather(make_study(tmp_path / "a"), "wd-qk-ttt-smoke"))
    assert found.degrees_of_freedom == 4 and found.std > 0  # two arms of three seeds, trials of one
    assert spread_of(gather(make_record(tmp_path / "b"), "record-smoke")).degrees_of_freedom == 2


def test_each_trial_is_set_against_the_preset_with_what_the_seeds_explain(tmp_path):
    evidence = gather(make_study(tmp_path), "wd-qk-ttt-smoke")
    found = differences(evidence)
    values = {item.trial.number: item.trial.value for item in evidence.trials if item.trial.value is not None}
    assert set(found) == set(values) - {0}
    spread = spread_of(evidence)
    for number, (gap, is_noise) in found.items():
        assert gap == pytest.approx(values[number] - values[0]) and is_noise == spread.covers(gap, (1, 1))
    assert differences(gather(make_record(tmp_path / "b"), "record-smoke")) == {}
