"""The rules of a study that its single tables cannot know."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import fields

from orchestrator.errors import ConfigError
from orchestrator.factors import require_repeatable
from orchestrator.measures import MINIMIZABLE
from orchestrator.space import NumberRange, grid_values
from orchestrator.study import (
    LAUNCHERS,
    LOCAL,
    STOP_RULES,
    TAKEN,
    TAKEN_WORDS,
    THROUGHPUTS,
    BudgetPlan,
    ConfirmPlan,
    InterleavePlan,
    Resources,
    StopEarlyPlan,
    Study,
)
from trainer.config import nearest
from trainer.protocol import POST_EMA, STAGES, TRAIN_LOSS, TTT, VAL_LOSS

STOP_METRICS = (TRAIN_LOSS, VAL_LOSS)
SAMPLERS = ("tpe", "gp", "cmaes", "qmc", "random", "grid")
EVOLUTION_KNOBS = 2  # fewest that evolution has a covariance of
MAX_SEED = 2**63 - 1  # what torch and numpy both take
# Options of sbatch that have a key of their own, and those that would break what the launcher relies on.
OWN_KEYS = {
    "nodes": "nodes", "gpus-per-node": "gpus_per_node", "gpus": "gpus_per_run", "partition": "partition", "account": "account",
    "qos": "qos", "constraint": "constraint", "comment": "comment", "exclusive": "exclusive", "time": "timeout_minutes",
}  # fmt: skip
RESERVED = (
    "array", "dependency", "error", "job-name", "no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable",
    "requeue", "signal", "test-only", "wait", "wrap",
)  # fmt: skip
SLURM_ONLY = frozenset((
    "nodes", "gpus_per_node", "partition", "account", "qos", "constraint", "comment", "exclusive", "sbatch", "setup", "python",
))  # fmt: skip


def check_study(study: Study) -> None:
    """The rules that single tables cannot know."""
    search, resources = study.search, study.resources
    _require(
        bool(re.fullmatch(r"[a-z0-9][a-z0-9._-]*", study.name)),
        "name must be lower-case letters, digits, '.', '_', '-'",
        study.name,
    )
    if study.space:
        _require(search.trials >= 1, "[search] trials must be at least 1", search.trials)
        _require(search.startup_trials >= 1, "[search] startup_trials must be at least 1", search.startup_trials)
    for place, value, known in (
        ("[search] sampler", search.sampler, SAMPLERS),
        ("[search] objective", search.objective, STAGES),
        ("[resources] launcher", resources.launcher, LAUNCHERS),
        *(("[search] also_minimize", name, MINIMIZABLE) for name in search.also_minimize),
    ):
        if value not in known:
            raise ConfigError(f"{place} must be one of {', '.join(known)}, got {value!r}", hint=nearest(value, known))
    _check_sampler(study)
    learning = study.configs if study.cells else (study.config,)
    if search.objective == TTT and not any(config.ttt.is_scored for config in learning):
        why = "ttt.before_quantization is true" if study.config.ttt.before_quantization else 'ttt.method is "off"'
        raise ConfigError(f'[search] objective is "ttt", but {why}', hint='take objective = "sliding"')
    for place, seeds in (("[search]", search.seeds), ("[confirm]", study.confirm.seeds if study.confirm else ())):
        for seed in seeds:
            _require(0 <= seed <= MAX_SEED, f"{place} seeds must lie between 0 and {MAX_SEED}", seed)
    if study.from_runs:
        _check_scoring(study)
    if study.noise:
        require_repeatable(study.noise, study.config)
    if study.interleave:
        _check_interleaving(study, study.interleave)
    if study.stop_early:
        _check_stopping(study, study.stop_early)
    if study.confirm:
        _check_confirmation(study, study.confirm)
    _check_budget(study.budget)
    _check_resources(resources)


def on_seeds(study: Study, seeds: tuple[int, ...]) -> Study:
    """The study on the seeds of the runs that it takes, where it names none itself. Raises ConfigError."""
    confirm = dataclasses.replace(study.confirm, seeds=study.confirm.seeds or seeds) if study.confirm else None
    search = dataclasses.replace(study.search, seeds=study.search.seeds or seeds)
    bound = dataclasses.replace(study, search=search, confirm=confirm)
    check_study(bound)
    return bound


def _check_sampler(study: Study) -> None:
    """The rules of samplers that cannot search every space."""
    search, space = study.search, study.space
    numbers = [knob for knob, knob_range in space.items() if isinstance(knob_range, NumberRange)]
    if search.sampler == "cmaes" and space:
        _require(
            not search.also_minimize, '[search] sampler "cmaes" has one objective, also_minimize', search.also_minimize
        )
        for knob in space:
            if knob not in numbers:
                raise ConfigError(
                    f'[space."{knob}"] choices have no direction in which sampler = "cmaes" could go',
                    hint='give low and high, or take sampler = "tpe"',
                )
        _require(len(space) >= EVOLUTION_KNOBS, f'[search] sampler "cmaes" needs {EVOLUTION_KNOBS} knobs', len(space))
    if search.sampler == "grid" and space:
        for knob in numbers:
            if grid_values(space[knob]) is None:
                raise ConfigError(
                    f'[space."{knob}"] sampler = "grid" needs a step', hint="add step = ..., or give choices = [...]"
                )
        points = math.prod(len(grid_values(knob_range) or ()) for knob_range in space.values())
        if search.trials > points + 1:
            raise ConfigError(
                f"[search] trials must be at most {points + 1}, the grid's {points} points and the preset; "
                f"got {search.trials}",
                hint=f"trials = {points + 1}",
            )


def _check_stopping(study: Study, plan: StopEarlyPlan) -> None:
    """The rules of early stopping."""
    for place, value, known in (("rule", plan.rule, STOP_RULES), ("metric", plan.metric, STOP_METRICS)):
        if value not in known:
            raise ConfigError(
                f"[stop_early] {place} must be one of {', '.join(known)}, got {value!r}", hint=nearest(value, known)
            )
    if plan.metric == VAL_LOSS and not study.config.schedule.validations:
        raise ConfigError(
            f'[stop_early] metric = "{VAL_LOSS}" needs runs that validate while they train, schedule.validations is 0',
            hint='[set] "schedule.validations" = 3, say: at a quarter, half and three quarters of the schedule',
        )
    _require(plan.startup_trials >= 1, "[stop_early] startup_trials must be at least 1", plan.startup_trials)
    _require(plan.reduction >= 2, "[stop_early] reduction must be at least 2", plan.reduction)
    _require(0 <= plan.min_throughput < 1, "[stop_early] min_throughput must lie between 0 and 1", plan.min_throughput)
    for frac in plan.at_fracs:
        _require(0.001 <= frac <= 0.999, "[stop_early] at_fracs must lie between 0.001 and 0.999", frac)


def _check_confirmation(study: Study, plan: ConfirmPlan) -> None:
    """The rules of a race to a verdict."""
    place = "[confirm]"
    if not plan.sequential:
        for f in fields(ConfirmPlan):
            if f.name != "seeds" and getattr(plan, f.name) != f.default:
                raise ConfigError(f"{place} {f.name} goes with sequential = true", hint="add sequential = true")
        return
    _require(
        2 <= plan.first <= (len(plan.seeds) or plan.first),  # of runs that are taken, the number is not known yet
        f"{place} first must lie between 2 and the number of seeds",
        plan.first,
    )
    _require(not study.cells, f"{place} sequential does not go with [factors] or [noise]", plan.sequential)
    _require(plan.step >= 1, f"{place} step must be at least 1", plan.step)
    _require(0 < plan.alpha < 0.5, f"{place} alpha must lie between 0 and 0.5", plan.alpha)
    _require(plan.margin >= 0, f"{place} margin must not be negative", plan.margin)
    if not study.space and not plan.against:
        raise ConfigError(
            f"{place} sequential needs two arms, and nothing is searched",
            hint='add against = "pr1493", or leave sequential out',
        )
    _require(study.interleave is None, f"{place} sequential does not go with [interleave]", plan.sequential)


def _check_budget(plan: BudgetPlan) -> None:
    """The rules of what may be spent."""
    for f in fields(BudgetPlan):
        _require(getattr(plan, f.name) >= 0, f"[budget] {f.name} must not be negative", getattr(plan, f.name))
    if (plan.cost or plan.cost_per_day) and not plan.price_per_gpu_hour:
        raise ConfigError("[budget] a cap in money needs a price", hint="add price_per_gpu_hour = ...")


def _check_resources(resources: Resources) -> None:
    """The rules of the table that says where runs go."""
    lows = {"slots": 1, "gpus_per_run": 0, "processes_per_run": 1, "max_attempts": 1, "nodes": 1, "gpus_per_node": 0}
    for name, low in lows.items():
        _require(
            getattr(resources, name) >= low, f"[resources] {name} must be at least {low}", getattr(resources, name)
        )
    _require(
        resources.timeout_minutes >= 0, "[resources] timeout_minutes must not be negative", resources.timeout_minutes
    )
    if resources.launcher == LOCAL:
        for f in fields(Resources):
            if f.name in SLURM_ONLY and getattr(resources, f.name) not in (f.default, {}):
                raise ConfigError(
                    f'[resources] {f.name} is for launcher = "slurm", got {getattr(resources, f.name)!r} with "local"',
                    hint='add launcher = "slurm", or leave it out',
                )
    product = resources.nodes * resources.gpus_per_node
    if resources.gpus_per_run and resources.gpus_per_node and resources.gpus_per_run != product:
        raise ConfigError(
            f"[resources] gpus_per_run must be nodes × gpus_per_node = {product}, got {resources.gpus_per_run}",
            hint="leave one of the two out",
        )
    _require(
        resources.gpus_of_run % resources.nodes == 0,
        f"[resources] gpus_per_run must be a multiple of nodes = {resources.nodes}", resources.gpus_per_run,
    )  # fmt: skip
    for option in resources.sbatch:
        if option in OWN_KEYS:
            raise ConfigError(f"[resources] sbatch.{option} has a key of its own", hint=f"{OWN_KEYS[option]} = ...")
        if option in RESERVED or not re.fullmatch(r"[a-z][a-z0-9-]+", option):
            raise ConfigError(
                f"[resources] sbatch.{option}: this option must be left to caddie, or is not the long name of one",
                hint='long names without dashes before them, as in sbatch = { mem = "0", reservation = "golf" }',
            )


def _check_interleaving(study: Study, plan: InterleavePlan) -> None:
    """The rules of a comparison on one node."""
    _require(
        not study.space and not study.from_runs, "[interleave] goes with [confirm] alone, without a search", study.space
    )
    _require(0 < plan.max_gap < 1, "[interleave] max_gap must lie between 0 and 1", plan.max_gap)
    if plan.throughput not in THROUGHPUTS:
        raise ConfigError(
            f"[interleave] throughput must be one of {', '.join(THROUGHPUTS)}, got {plan.throughput!r}",
            hint=nearest(plan.throughput, THROUGHPUTS),
        )
    _require(
        study.resources.nodes == 1, "[interleave] needs runs on one node, [resources] nodes", study.resources.nodes
    )
    if not study.candidate_params:
        raise ConfigError(
            f"[interleave] the candidate is the preset itself: {plan.against or study.preset}",
            hint="name another preset with against, or change a knob with set",
        )


def _check_scoring(study: Study) -> None:
    """The rules of a study that trains nothing."""
    places = [("[space]", knob) for knob in study.space]
    places += [("[factors]", knob) for factor in study.factors for level in factor.levels.values() for knob in level]
    for place, knob in places:
        if not knob.startswith(TAKEN):
            raise ConfigError(
                f"{place} {knob} cannot matter where a stored model is only scored (from = {', '.join(study.from_runs)}); "
                f"only {TAKEN_WORDS} can",
                hint="leave it out, or leave out `from`",
            )
    _require(study.noise is None, "[noise] needs training, `from` leaves none", study.noise)
    _require(study.stop_early is None, "[stop_early] needs training, `from` leaves none", study.stop_early)
    _require(study.search.objective != POST_EMA, "[search] objective must be one of the stored model's", POST_EMA)


def _require(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"{rule}, got {got!r}")
