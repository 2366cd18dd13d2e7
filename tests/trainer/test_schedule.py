import pytest

from trainer.config import Config, ModelConfig, OptimConfig, ScheduleConfig
from trainer.schedule import elapsed_fraction, extra_passes, lr_multiplier, muon_momentum


@pytest.mark.parametrize(("elapsed_frac", "expected"), [(0.0, 1.0), (0.5, 1.0), (0.75, 0.5), (1.0, 0.0), (1.01, 0.0)])
def test_learning_rate_holds_then_falls_to_the_floor(elapsed_frac, expected):
    assert lr_multiplier(elapsed_frac, warmdown_frac=0.5, floor=0.0) == pytest.approx(expected)


def test_learning_rate_ends_at_its_floor():
    assert lr_multiplier(1.0, warmdown_frac=0.5, floor=0.1) == pytest.approx(0.1)


def test_learning_rate_without_warmdown_is_constant():
    assert [lr_multiplier(frac, warmdown_frac=0.0, floor=0.0) for frac in (0.0, 0.99)] == [1.0, 1.0]


def test_momentum_rises_linearly_and_stays():
    optim = OptimConfig(muon_momentum_start=0.8, muon_momentum=1.0, muon_momentum_ramp_steps=100)
    assert [muon_momentum(step, optim) for step in (0, 50, 100, 900)] == pytest.approx([0.8, 0.9, 1.0, 1.0])


def test_momentum_without_a_ramp_is_final_at_once():
    assert muon_momentum(0, OptimConfig(muon_momentum_ramp_steps=0)) == OptimConfig().muon_momentum


def passes_at(step, frac, passes, **schedule):
    config = Config(model=ModelConfig(recurrence_passes=passes), schedule=ScheduleConfig(**schedule))
    return extra_passes(step, frac, config)


@pytest.mark.parametrize(("step", "frac", "expected"), [(99, 0.9, 0), (100, 0.2, 0), (100, 0.5, 2)])
def test_recurrence_needs_both_its_step_and_its_fraction(step, frac, expected):
    assert passes_at(step, frac, 2, recurrence_start_step=100, recurrence_start_frac=0.5) == expected


@pytest.mark.parametrize(("frac", "expected"), [(0.4, 0), (0.5, 1), (0.6, 1), (0.65, 2), (1.0, 2)])
def test_further_passes_come_on_at_a_fraction_of_their_own(frac, expected):
    assert (
        passes_at(7, frac, 2, recurrence_start_step=0, recurrence_start_frac=0.5, recurrence_full_frac=0.65) == expected
    )


def test_fraction_follows_the_configured_clock_and_never_exceeds_one():
    by_step, by_time = ScheduleConfig(clock="step", steps=200), ScheduleConfig(clock="time")
    assert elapsed_fraction(50, 1e9, schedule=by_step, budget_seconds=1) == 0.25
    assert elapsed_fraction(50, 30.0, schedule=by_time, budget_seconds=120) == 0.25
    assert elapsed_fraction(50, 130.0, schedule=by_time, budget_seconds=120) == 1.0
