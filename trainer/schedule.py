"""How learning rates, momentum and recurrence move over a run. Pure functions of the step and the elapsed fraction."""

from __future__ import annotations

from trainer.config import Config, OptimConfig, ScheduleConfig


def lr_multiplier(elapsed_frac: float, *, warmdown_frac: float, floor: float) -> float:
    """Learning-rate factor at `elapsed_frac` of the budget: 1, then linearly down to `floor` at its end."""
    remaining_frac = max(0.0, 1.0 - elapsed_frac)
    if remaining_frac >= warmdown_frac:
        return 1.0
    return floor + (1.0 - floor) * remaining_frac / warmdown_frac


def muon_momentum(step: int, optim: OptimConfig) -> float:
    """Muon's momentum at a step: a linear ramp to its final value."""
    ramp_frac = min(1.0, step / optim.muon_momentum_ramp_steps) if optim.muon_momentum_ramp_steps else 1.0
    return optim.muon_momentum_start + ramp_frac * (optim.muon_momentum - optim.muon_momentum_start)


def extra_passes(step: int, elapsed_frac: float, config: Config) -> int:
    """How often the repeated layers run again at this point; both conditions must have been reached."""
    schedule = config.schedule
    if step < schedule.recurrence_start_step or elapsed_frac < schedule.recurrence_start_frac:
        return 0
    if schedule.recurrence_full_frac and elapsed_frac < schedule.recurrence_full_frac:
        return 1
    return config.model.recurrence_passes


def elapsed_fraction(step: int, train_seconds: float, *, schedule: ScheduleConfig, budget_seconds: float) -> float:
    """Part of the budget that is used up before `step`, in [0, 1], by the schedule's own clock."""
    used = train_seconds / budget_seconds if schedule.clock == "time" else step / schedule.steps
    return min(1.0, used)
