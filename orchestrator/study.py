"""Study files: a question in TOML, read strictly and checked completely before anything is submitted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from orchestrator import rungs as ladders
from orchestrator import variables
from orchestrator.acceptance import objections
from orchestrator.errors import ConfigError
from orchestrator.factors import Cell, Factor, NoisePlan, cells_of, noise_cells, parse_factors, require_repeatable
from orchestrator.home import SHIPPED_STUDIES
from orchestrator.measures import ARTIFACT_BYTES, EVAL_SECONDS, MEASURES, MINIMIZABLE, TRAIN_SECONDS
from orchestrator.rungs import Rung
from orchestrator.script import read_script
from orchestrator.space import NumberRange, Range, grid_values, parse_range
from orchestrator.variables import ScriptPlan
from trainer.config import Config, from_mapping, knob_value, nearest, to_mapping, with_knobs
from trainer.protocol import POST_EMA, SLIDING, STAGES, TRAIN_LOSS, TTT, VAL_LOSS

T = TypeVar("T")

STOP_METRICS = (TRAIN_LOSS, VAL_LOSS)
SAMPLERS = ("tpe", "gp", "cmaes", "qmc", "random", "grid")
EVOLUTION_KNOBS = 2  # fewest that evolution has a covariance of
LOCAL, SLURM = LAUNCHERS = ("local", "slurm")
LOCAL_TIMEOUT_MINUTES = 60.0
# Beyond the budgets of training and evaluation: start, compilation, warm-up, quantisation, the evaluations whose score
# does not count, and reading the model file again.
SLURM_MARGIN_MINUTES = 25.0
MAX_SEED = 2**63 - 1  # what torch and numpy both take
NOT_ACCEPTED = "not_accepted"  # key of a preset's file: why its technique is not accepted in submissions
SCORING = ("ttt.", "evaluation.")  # knobs that matter where a stored model is only scored
PACKING = ("quant.", "limits.artifact_bytes", "ttt.before_quantization")  # where stored weights are quantised anew
TAKEN = (*SCORING, *PACKING)  # that may differ from a run's whose model is taken ...
TAKEN_WORDS = "ttt.*, evaluation.*, quant.* and limits.artifact_bytes"  # ... in words
STUDY_FILE = "study.toml"  # of a study that is a folder


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """How the space is searched."""

    trials: int
    """Total number of trials, the preset's included; running the study again continues to this total.

    0 in a record attempt, which has no [search], no [space] and only the confirmation of its preset.
    """

    seeds: tuple[int, ...] = (1,)
    """Seeds of every trial; kept apart from the confirmation's, or its result would be selected on them."""

    sampler: str = "tpe"
    """One of SAMPLERS."""

    startup_trials: int = 4
    """Random trials before the sampler's model is used."""

    objective: str = TTT
    """Stage whose bits per byte is minimised; see trainer.protocol.STAGES."""

    also_minimize: tuple[str, ...] = ()
    """Quantities of MINIMIZABLE that are searched as objectives beside the score; the best trial stays that of the score."""


MEDIAN_RULE, HALVING_RULE, DISASTERS_ONLY = STOP_RULES = ("median", "halving", "disasters")


@dataclass(frozen=True, kw_only=True)
class StopEarlyPlan:
    """When a running trial is given up. A seed of a record never is."""

    rule: str = MEDIAN_RULE
    """`median`: its loss at a part of its schedule is above the median of the complete trials' there. `halving`: it is not
    among the best share of all trials that got there (asynchronous successive halving). `disasters`: neither.
    """

    metric: str = TRAIN_LOSS
    """Loss that is compared, one of STOP_METRICS."""

    at_fracs: tuple[float, ...] = (0.5,)
    """Fractions of the schedule at which the trial is compared: of its steps, or of its seconds, by schedule.clock."""

    startup_trials: int = 4
    """Trials to compare with, before any is stopped."""

    reduction: int = 3
    """Of the trials that get to a point, halving lets about one in so many go on."""

    min_throughput: float = 0.25
    """Share of the complete trials' median tokens per second below which a trial is given up, by any rule; 0 for never."""

    @property
    def per_milles(self) -> tuple[int, ...]:
        """The same, rising and in thousandths: whole numbers name the points in the ledger and in Optuna."""
        return tuple(sorted({round(1000 * frac) for frac in self.at_fracs}))


@dataclass(frozen=True, kw_only=True)
class ConfirmPlan:
    """Seeds on which the best point and the unchanged preset are run at the end."""

    seeds: tuple[int, ...] = (42, 314, 999)
    """With `sequential` those that may be run, in this order."""

    sequential: bool = False
    """Whether seeds are added only for as long as it is open whether the best point is better."""

    first: int = 2
    """Seeds of the first look."""

    step: int = 1
    """Seeds that are added between two looks."""

    alpha: float = 0.05
    """Most that the chance of a wrong "better" may be over all looks together, and that of a wrong "not better"."""

    margin: float = 0.0
    """Bits per byte by more than which the best point must be better."""

    against: str = ""
    """What it must beat, as `caddie compare` takes it: a published record, a number; empty for the preset, run beside it."""


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """What the study may take. 0 leaves a cap out."""

    gpu_hours: float = 0.0
    """Cap of this study."""

    gpu_hours_per_day: float = 0.0
    """Cap of a day, by UTC, over every study of this CADDIE_HOME."""

    price_per_gpu_hour: float = 0.0
    """In whatever money the caps of money are; 0 where it is not known."""

    cost: float = 0.0
    """Cap of this study, in money."""

    cost_per_day: float = 0.0
    """Cap of a day over every study, in money."""

    @property
    def study_cap_seconds(self) -> float:
        """GPU-seconds that the study may take; infinite without a cap."""
        return self._cap(self.gpu_hours, self.cost)

    @property
    def day_cap_seconds(self) -> float:
        """GPU-seconds that all studies may take on one day; infinite without a cap."""
        return self._cap(self.gpu_hours_per_day, self.cost_per_day)

    def _cap(self, hours: float, money: float) -> float:
        caps = [hours] if hours else []
        caps += [money / self.price_per_gpu_hour] if money else []
        return 3600 * min(caps, default=math.inf)


EQUAL, MEDIAN = THROUGHPUTS = ("equal", "median")


@dataclass(frozen=True, kw_only=True)
class InterleavePlan:
    """A candidate that is run beside the preset, seed by seed, one run at a time on one node."""

    against: str = ""
    """The candidate's preset; empty for the study's own."""

    set: dict[str, Any] = field(default_factory=dict)
    """Knobs of the candidate alone."""

    max_gap: float = 0.02
    """Share by which the steps per second of a block's two runs may differ; a block that differs more does not count."""

    throughput: str = EQUAL
    """What they are compared with: `equal`, one another; `median`, the ratio that the candidate has in the median block,
    for one that is slower or faster by itself."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a run takes and where it runs."""

    launcher: str = LOCAL
    """`local`: this machine. `slurm`: a job of the cluster for each run. Both through submitit."""

    slots: int = 2
    """Runs at a time on a machine without GPUs; with GPUs it is their number over `gpus_per_run`; in Slurm jobs at a time,
    waiting ones counted.
    """

    gpus_per_run: int = 0
    """GPUs of one run, each with one process under torchrun; 0 runs on the CPU."""

    processes_per_run: int = 1
    """Processes of one run on the CPU, under torchrun where more than one."""

    timeout_minutes: float = 0.0
    """Wall-clock after which an attempt is ended from outside, counted from its beginning. 0: an hour on this machine; in
    Slurm the budgets of training and evaluation and a margin, so that the time limit is no longer than it must be.
    """

    nodes: int = 1
    """Nodes of one run; torchrun joins them."""

    gpus_per_node: int = 0
    """The same as `gpus_per_run`, by node; either may be given."""

    partition: str = ""
    """Slurm's partition; like the others below, empty leaves it to the cluster."""

    account: str = ""
    qos: str = ""
    constraint: str = ""
    """Features that a node must have."""

    comment: str = ""
    exclusive: bool = False
    """Whether a run shares its nodes with no other job."""

    sbatch: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch by their long names: `{mem = "0", cpus-per-task = 64}`; true for one without a value."""

    setup: tuple[str, ...] = ()
    """Lines of shell that a job runs first: `module load cuda`, say."""

    python: str = ""
    """Interpreter of the trainer on the nodes; empty for the controller's own."""

    max_attempts: int = 3
    """Attempts of a run whose failures were the machine's; being pre-empted is none."""

    preflight: bool = True
    """Whether each node is checked before a run begins on it: disk, data, GPUs, their links, the speed of the first steps."""

    gpu_model: str = ""
    """Part of the name that each GPU must have, `H100` say; empty for any."""

    gpu_memory_gib: float = 0.0
    """Memory that each GPU must have."""

    @property
    def gpus_of_run(self) -> int:
        return self.gpus_per_run or self.nodes * self.gpus_per_node

    @property
    def gpus_of_node(self) -> int:
        return self.gpus_of_run // self.nodes

    @property
    def processes_per_node(self) -> int:
        return self.gpus_of_node or self.processes_per_run


@dataclass(frozen=True, kw_only=True)
class Study:
    """One question, its space and its budget."""

    name: str
    question: str
    preset: str
    config: Config
    """The preset with the study's own [set]."""

    data: str
    """Data set by name under CADDIE_HOME/data, or a path."""

    space: dict[str, Range]
    search: SearchPlan
    stop_early: StopEarlyPlan | None
    confirm: ConfirmPlan | None
    resources: Resources
    source: str
    """The file's text."""

    from_runs: tuple[str, ...] = ()
    """Runs, or studies for all runs of an arm, whose models are scored again, each by the runs with its seed; of a lone run
    by those of any seed. Empty where the study trains. Seeds that are not named are those of these runs.
    """

    factors: tuple[Factor, ...] = ()
    noise: NoisePlan | None = None

    constraints: dict[str, float] = field(default_factory=dict)
    """The study's own limits on MEASURES, beside or below those of the configuration."""

    budget: BudgetPlan = BudgetPlan()
    interleave: InterleavePlan | None = None
    candidate: Config | None = None
    """Configuration that is run beside the preset's, where the study is interleaved."""

    script: ScriptPlan | None = None
    """Program of somebody else's that is run in place of our trainer; `preset` is its name then."""

    rungs: tuple[Rung, ...] = ()
    """Of the ladder that the study is a rung of, the cheapest first; empty for every other study."""

    rung_number: int = 0
    not_transferring: tuple[str, ...] = ()
    """Knobs of the space whose values do not go up with a point."""

    gpus_apart: int = 0
    """GPUs of a run where the ladder's last rung has another number: the same configuration is then another run. Else 0."""

    @property
    def rung(self) -> Rung | None:
        """Its own; None where it is none of a ladder."""
        return self.rungs[self.rung_number] if self.rungs else None

    @property
    def rung_name(self) -> str:
        """The rung's name; the study's where it is none of a ladder."""
        return self.rung.name if self.rung else self.name

    @property
    def ladder(self) -> str:
        """Name of the ladder's last study; the study's own where it is none of a ladder."""
        is_below = self.rung_number < len(self.rungs) - 1
        return self.name.removesuffix(f"-{self.rung_name}") if is_below else self.name

    @property
    def other_rungs(self) -> tuple[str, ...]:
        """Names of the studies that climb the same ladder."""
        names = [ladders.study_name(self.ladder, self.rungs, number) for number in range(len(self.rungs))]
        return tuple(name for name in names if name != self.name)

    @property
    def candidate_params(self) -> dict[str, Any]:
        """The candidate as knobs that differ from the preset's; empty where the study is not interleaved."""
        if self.candidate is None:
            return {}
        before, after = to_mapping(self.config), to_mapping(self.candidate)
        return {
            f"{section}.{key}": value
            for section, entries in after.items()
            for key, value in entries.items()
            if before[section][key] != value
        }

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The arms of a design; empty for a search and a record attempt."""
        return tuple(noise_cells(self.noise)) if self.noise else cells_of(self.factors) if self.factors else ()

    @property
    def configs(self) -> tuple[Config, ...]:
        """Every configuration that is known beforehand."""
        candidates = (self.candidate,) if self.candidate is not None else ()
        return (self.config, *candidates, *(self.config_of(cell.params) for cell in self.cells))

    def stage_of(self, params: Mapping[str, Any]) -> str:
        """Stage at which a cell is compared with others: without test-time training the score is the one before it."""
        is_scored = self.search.objective != TTT or self.config_of(params).ttt.is_scored
        return self.search.objective if is_scored else SLIDING

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def limits(self) -> dict[str, float]:
        """What a trial must keep to be feasible, by measure."""
        limits = self.config.limits
        own = {
            ARTIFACT_BYTES: float(limits.artifact_bytes), TRAIN_SECONDS: limits.train_seconds,
            EVAL_SECONDS: limits.eval_seconds,
        }  # fmt: skip
        return {**own, **self.constraints}

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of what the search minimises, the score's stage first."""
        return (self.search.objective, *self.search.also_minimize)

    def config_of(self, params: Mapping[str, Any]) -> Config:
        """The configuration of one point of the space; raises ConfigError."""
        return self.config if self.script else with_knobs(self.config, params)

    def script_values(self, params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What somebody else's script is given at one point of the space; empty for our trainer."""
        return self.script.values_of(params) if self.script else {}

    def preset_params(self) -> dict[str, Any]:
        """The point that is the unchanged preset."""
        if self.script:
            return {knob: self.script.preset_value(knob, knob_range) for knob, knob_range in self.space.items()}
        return {knob: knob_value(self.config, knob) for knob in self.space}

    @property
    def timeout_minutes(self) -> float:
        """Wall-clock of one attempt, from its beginning."""
        if self.resources.timeout_minutes:
            return self.resources.timeout_minutes
        if self.resources.launcher == LOCAL:
            return LOCAL_TIMEOUT_MINUTES
        limits = self.config.limits
        train_seconds = 0.0 if self.from_runs else limits.train_seconds
        return math.ceil((train_seconds + limits.eval_seconds) / 60) + SLURM_MARGIN_MINUTES

    def plan_text(self) -> str:
        """What is going to be run, in a few words."""
        seeds = f"on seeds {', '.join(map(str, self.confirm.seeds)) or 'of its runs'}" if self.confirm else ""
        if self.noise:
            orders = f"{len(self.noise.order_seeds)} orders of the data, {self.noise.replicates} times each"
            return f"{len(self.cells)} cells, {orders}, {seeds}"
        if self.factors:
            sizes = " × ".join(f"{len(factor.levels)} {factor.name}" for factor in self.factors)
            return f"{len(self.cells)} cells, {sizes}, {seeds}"
        return f"{self.search.trials} trials over {', '.join(self.space) or 'no knobs'}"

    def warnings(self) -> list[str]:
        """What can be run but weakens the result."""
        found = []
        shared = sorted(set(self.search.seeds) & set(self.confirm.seeds)) if self.confirm else []
        if shared and self.space:
            found.append(
                f"seeds {shared} are searched and confirmed: the best point was selected on them, its mean is biased"
            )
        if self.cells and self.confirm and len(self.confirm.seeds) == 1:
            found.append("cells on one seed: no difference between them gets an interval")
        elif self.confirm and not self.cells and 0 < len(self.confirm.seeds) < 3:
            found.append(f"confirmation on {len(self.confirm.seeds)} of the three seeds that a record needs")
        refused = dict.fromkeys(why for config in self.configs for why in objections(config))
        return [*found, *(f"{why}; such scores are for this study alone" for why in refused)]


def on_seeds(study: Study, seeds: tuple[int, ...]) -> Study:
    """The study on the seeds of the runs that it takes, where it names none itself. Raises ConfigError."""
    confirm = dataclasses.replace(study.confirm, seeds=study.confirm.seeds or seeds) if study.confirm else None
    search = dataclasses.replace(study.search, seeds=study.search.seeds or seeds)
    bound = dataclasses.replace(study, search=search, confirm=confirm)
    _check(bound)
    return bound


def _table(cls: type[Any], values: Any, place: str) -> Any:
    """Build one table's dataclass, refusing unknown keys and wrong types."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place} must be a table, got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(f"{place} has no key {key!r}", hint=nearest(key, hints))
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values:
            raise ConfigError(f"{place} needs {f.name}")
    return cls(**{key: _typed(value, hints[key], f"{place} {key}") for key, value in values.items()})


def _typed(value: Any, hint: Any, place: str) -> Any:
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list) or not value:
            raise ConfigError(f"{place} must be a list with at least one value, got {value!r}")
        items = tuple(_typed(item, typing.get_args(hint)[0], place) for item in value)
        if len(set(items)) < len(items):
            raise ConfigError(f"{place} names a value twice: {value}")
        return items
    if typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping) or not all(isinstance(item, (str, int, float)) for item in value.values()):
            raise ConfigError(f"{place} must be a table of texts and numbers, got {value!r}")
        return dict(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{place} must be of type {hint.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place} must be finite, got {value!r}")
    return value


def _require(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"{rule}, got {got!r}")


def _check(study: Study) -> None:
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


def _constraints(table: Any) -> dict[str, float]:
    """The table [constraints]; raises ConfigError."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"[constraints] must be a table of limits, got {table!r}")
    for name, limit in table.items():
        if name not in MEASURES:
            raise ConfigError(f"[constraints] has no key {name!r}", hint=nearest(name, MEASURES))
        if type(limit) not in (int, float) or not math.isfinite(limit) or limit <= 0:
            raise ConfigError(f"[constraints] {name} must be a number above 0, got {limit!r}")
    return {name: float(limit) for name, limit in table.items()}


# Options of sbatch that have a key of their own, and those that would break what the launcher relies on.
OWN_KEYS = {
    "nodes": "nodes", "gpus-per-node": "gpus_per_node", "gpus": "gpus_per_run", "partition": "partition", "account": "account",
    "qos": "qos", "constraint": "constraint", "comment": "comment", "exclusive": "exclusive", "time": "timeout_minutes",
}  # fmt: skip
RESERVED = (
    "array", "dependency", "error", "job-name", "no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable",
    "requeue", "signal", "test-only", "wait", "wrap",
)  # fmt: skip


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


SLURM_ONLY = frozenset(
    {
        "nodes",
        "gpus_per_node",
        "partition",
        "account",
        "qos",
        "constraint",
        "comment",
        "exclusive",
        "sbatch",
        "setup",
        "python",
    }
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


def load_preset(name: str) -> Config:
    """The configuration of a preset: a shipped name, or the path of a TOML file. Raises ConfigError with its place."""
    path, tables = _preset(name)
    return _at(path, lambda: from_mapping({key: table for key, table in tables.items() if key != NOT_ACCEPTED}))


def not_accepted(preset: str) -> str:
    """Why a preset's technique is not accepted in submissions, as its file says; empty where it says nothing of it.

    Raises ConfigError where there is no such preset.
    """
    return str(_preset(preset)[1].get(NOT_ACCEPTED, ""))


def is_preset(name: str) -> bool:
    """Whether a text names a preset: a shipped one, or a TOML file."""
    return _preset_path(name).is_file() or name.endswith(".toml")


def _preset_path(name: str) -> Path:
    return Path(name) if name.endswith(".toml") else SHIPPED_STUDIES / "presets" / f"{name}.toml"


def _preset(name: str) -> tuple[Path, dict[str, Any]]:
    """A preset's file and its tables."""
    path = _preset_path(name)
    if not path.is_file():
        known = sorted(p.stem for p in (SHIPPED_STUDIES / "presets").glob("*.toml"))
        raise ConfigError(f"there is no preset {name!r}", hint=nearest(Path(name).stem, known))
    return path, _at(path, lambda: _parse_toml(_text_of(path)))


def parse_study(text: str, folder: Path = Path()) -> Study:
    """Read and check a study's text; raises ConfigError that names the table, the value and the rule.

    The path of a script is relative to `folder`. Of a ladder it is the rung that the text's first line names, else the last.
    """
    tables = _parse_toml(text)
    if "rungs" not in tables:
        return _study(tables, text, folder)
    found = parse_ladder(ladders.whole_text(text))
    names = [rung.name for rung in found[-1].rungs]
    name = tables.get("rung", names[-1])
    if name not in names:
        raise ConfigError(f"there is no rung {name!r}", hint=nearest(str(name), names))
    return found[names.index(name)]


def parse_ladder(text: str) -> tuple[Study, ...]:
    """Every rung's study of a ladder's text, the cheapest first; raises ConfigError."""
    tables = _parse_toml(text)
    if "rung" in tables:
        raise ConfigError(
            f"rung = {tables['rung']!r} is for the texts that caddie writes of a ladder's rungs",
            hint="leave it out: `--until RUNG` ends after a rung",
        )
    rungs = ladders.parse_rungs(tables)
    _, stays = ladders.split_space(tables.get("space"))
    last = len(rungs) - 1
    whole = dataclasses.replace(
        _study(ladders.tables_of(tables, rungs, last), text, Path()),
        rungs=rungs,
        rung_number=last,
        not_transferring=stays,
    )
    below = tuple(_below(tables, text, whole, number) for number in range(last))
    ladders.require_points(rungs, below[0].search.trials)
    return (*below, whole)


def _below(tables: Mapping[str, Any], text: str, whole: Study, number: int) -> Study:
    """A rung's study below the last; raises ConfigError with the rung's name."""
    rung = whole.rungs[number]
    try:
        study = _study(ladders.tables_of(tables, whole.rungs, number), ladders.text_of(text, rung.name), Path())
    except ConfigError as error:
        raise ConfigError(f"rung {rung.name!r}: {error}", hint=error.hint) from error
    gpus = study.resources.gpus_of_run
    return dataclasses.replace(
        study, rungs=whole.rungs, rung_number=number, not_transferring=whole.not_transferring,
        gpus_apart=gpus if gpus != whole.resources.gpus_of_run else 0,
    )  # fmt: skip


def _study(tables: dict[str, Any], text: str, folder: Path) -> Study:
    """One study of its tables; raises ConfigError."""
    known = (
        "name", "question", "preset", "data", "from", "set", "space", "search", "constraints", "stop_early", "confirm",
        "interleave", "budget", "resources", "script", "stage", "factors", "noise", "rungs",
    )  # fmt: skip
    for key in tables:
        if key not in known:
            raise ConfigError(f"a study has no key {key!r}", hint=nearest(key, known))
    _require_no_marks(tables.get("space"))
    script = _script(tables, folder) if "script" in tables else None
    if script:
        tables |= {"preset": script.script.name}
    for key in ("name", "question", "preset", "data"):
        if not isinstance(tables.get(key), str) or not tables[key]:
            got = f", got {tables[key]!r}" if key in tables else ""
            raise ConfigError(f'a study needs {key} = "..."{got}')
    sources, design = _sources(tables), _design(tables)
    tables |= {"confirm": tables.get("confirm", {})} if design else {}
    is_record = "confirm" in tables and not {"space", "search", "stop_early"} & set(tables)
    for key in () if is_record else ("space", "search"):
        if not isinstance(tables.get(key), Mapping) or not tables[key]:
            raise ConfigError(
                f"a study needs a table [{key}] with entries",
                hint="[space] and [search] together, or [confirm] alone for a record attempt",
            )
    config = script.config if script else with_knobs(load_preset(tables["preset"]), tables.get("set", {}))
    plan = _table(InterleavePlan, tables["interleave"], "[interleave]") if "interleave" in tables else None
    candidate = _candidate(plan, tables) if plan else None
    factors = parse_factors(tables["factors"], config) if "factors" in tables else ()
    if is_record:
        learns = all(found.ttt.is_scored for found in (config, candidate) if found is not None)
        learns = any(with_knobs(config, c.params).ttt.is_scored for c in cells_of(factors)) if factors else learns
        stage = script.script.last_stage if script else TTT if learns else SLIDING
        tables |= {"space": {}, "search": {"trials": 0, "objective": tables.get("stage", stage)}}
    elif "stage" in tables:
        raise ConfigError("stage is for a record attempt, this is a search", hint='write [search] objective = "..."')
    study = Study(
        name=tables["name"], question=tables["question"], preset=tables["preset"], config=config, data=tables["data"],
        space={
            knob: variables.range_of(script.script, knob, table) if script else parse_range(knob, table, config)
            for knob, table in tables["space"].items()
        },
        search=_table(SearchPlan, tables["search"], "[search]"),
        stop_early=_table(StopEarlyPlan, tables["stop_early"], "[stop_early]") if "stop_early" in tables else None,
        confirm=_table(ConfirmPlan, tables["confirm"], "[confirm]") if "confirm" in tables else None,
        resources=_table(Resources, tables.get("resources", {}), "[resources]"), source=text,
        from_runs=sources, interleave=plan, candidate=candidate, factors=factors,
        noise=_table(NoisePlan, tables["noise"], "[noise]") if "noise" in tables else None,
        constraints=_constraints(tables.get("constraints", {})),
        budget=_table(BudgetPlan, tables.get("budget", {}), "[budget]"), script=script,
    )  # fmt: skip
    study = _without_own_seeds(study, tables) if sources else study
    _check(study)
    return study


def _require_no_marks(space: Any) -> None:
    """Raise ConfigError where a knob is marked for a ladder and there is none."""
    for knob, entries in space.items() if isinstance(space, Mapping) else ():
        if isinstance(entries, Mapping) and ladders.TRANSFERS in entries:
            raise ConfigError(
                f'[space."{knob}"] {ladders.TRANSFERS} goes with [[rungs]], and there are none', hint="leave it out"
            )


def _sources(tables: Mapping[str, Any]) -> tuple[str, ...]:
    """The runs and studies that `from` names; raises ConfigError."""
    named = tables.get("from", [])
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"from must be the id of a run or the name of a study in quotes, or a list of these, got {named!r}"
        )
    if len(set(names)) < len(names):
        raise ConfigError(f"from names a run twice: {names}")
    return tuple(names)


def _design(tables: Mapping[str, Any]) -> str:
    """The table that makes a study a design, if one does; raises ConfigError where another excludes it."""
    designs = [key for key in ("factors", "noise") if key in tables]
    for key in (*designs[1:], "space", "search", "stop_early", "interleave"):
        if designs and key in tables:
            raise ConfigError(
                f"[{designs[0]}] and [{key}] exclude one another", hint="[confirm] seeds are those of every cell"
            )
    return designs[0] if designs else ""


def _without_own_seeds(study: Study, tables: Mapping[str, Any]) -> Study:
    """The study without the seeds that it does not name: they are those of the runs that it takes."""
    search, confirm = study.search, study.confirm
    if "seeds" not in tables["search"]:
        search = dataclasses.replace(search, seeds=())
    if confirm and "seeds" not in tables["confirm"]:
        confirm = dataclasses.replace(confirm, seeds=())
    return dataclasses.replace(study, search=search, confirm=confirm)


def _script(tables: Mapping[str, Any], folder: Path) -> ScriptPlan:
    """The script that a study runs in place of our trainer, with what it sets. Raises ConfigError."""
    for key in ("preset", "from", "interleave", "factors", "noise"):
        if key in tables:
            raise ConfigError(f"script and {key} exclude one another, got both", hint=f"leave {key} out")
    if not isinstance(tables["script"], str) or not tables["script"]:
        raise ConfigError(f"script must be the path of a script in quotes, got {tables['script']!r}")
    return variables.plan(read_script(folder / Path(tables["script"]).expanduser()), tables.get("set", {}))


def _candidate(plan: InterleavePlan, tables: Mapping[str, Any]) -> Config:
    """The candidate's configuration; raises ConfigError."""
    config = load_preset(plan.against or tables["preset"])
    return with_knobs(with_knobs(config, tables.get("set", {})), plan.set)


def record_study(
    preset: str,
    *,
    data: str,
    seeds: tuple[int, ...],
    knobs: Mapping[str, Any],
    resources: Mapping[str, Any] | None = None,
    name: str | None = None,
    from_runs: Sequence[str] = (),
    interleave: Mapping[str, Any] | None = None,
) -> Study:
    """A record attempt: one configuration on the given seeds, as a study without a search. Raises ConfigError.

    `interleave` holds the entries of that table: a candidate is then run beside it.

    With `from_runs` their stored models are scored again, and nothing is trained. The study's name, where none is given,
    follows from what is asked, so that the same command continues the same attempt.
    """
    asked = [preset, data, sorted(seeds), {knob: repr(value) for knob, value in sorted(knobs.items())}]
    sources = from_runs[0] if len(from_runs) == 1 else list(from_runs)
    asked += [extra for extra in (sources, interleave) if extra]
    digest = hashlib.sha256(json.dumps(asked, default=repr).encode()).hexdigest()[:8]
    stem = re.sub(r"[^a-z0-9._-]", "-", Path(preset).stem.lower()).lstrip("._-") or "record"
    tables: dict[str, Any] = {
        "name": name or f"record-{stem}-{digest}",
        "question": _record_question(preset, seeds, from_runs, interleave or {}),
        "preset": preset,
        "data": data,
        **({"from": sources} if sources else {}),
    }
    parts = {"set": knobs, "confirm": {"seeds": seeds}, "interleave": interleave or {}, "resources": resources or {}}
    return parse_study(study_text(tables, parts))


def study_text(keys: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> str:
    """A study's text: its keys, and then those of its tables that have entries."""
    lines = [f"{key} = {_as_toml(value)}" for key, value in keys.items()]
    for table, entries in tables.items():
        if entries:
            lines += ["", f"[{table}]", *(f"{_as_toml(key)} = {_as_toml(value)}" for key, value in entries.items())]
    return "\n".join(lines) + "\n"


def _record_question(preset: str, seeds: tuple[int, ...], sources: Sequence[str], interleave: Mapping[str, Any]) -> str:
    on = f"on seeds {', '.join(map(str, seeds))}"
    if not interleave:
        what = f"run{'s' if len(sources) > 1 else ''} {', '.join(sources)}" if sources else preset
        return f"What does {what} score {on}?"
    candidate = interleave.get("against") or f"{preset} with {', '.join(interleave.get('set', {}))} changed"
    return f"Does {candidate} score better than {preset} {on}, by turns on one node?"


def _as_toml(value: Any) -> str:
    """A value as TOML writes it; the escapes of its strings are JSON's."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_as_toml(key)} = {_as_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_as_toml(item) for item in value) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def load_study(path: Path) -> Study:
    """Read and check a study file; raises ConfigError with the file's name."""
    if not path.is_file():
        shipped = SHIPPED_STUDIES / path.name
        named = shipped.with_name(f"{path.name}.toml")
        places = (path / STUDY_FILE, named, shipped / STUDY_FILE, SHIPPED_STUDIES / path)
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            known = [p.stem for p in SHIPPED_STUDIES.glob("*.toml")]
            known += [p.parent.name for p in SHIPPED_STUDIES.glob(f"*/{STUDY_FILE}")]
            fault = (
                f"is a folder, not a study file, and holds no {STUDY_FILE}"
                if path.is_dir()
                else "there is no such study file"
            )
            raise ConfigError(f"{path}: {fault}", hint=nearest(path.stem, sorted(known)))
        path = found
    return _at(path, lambda: parse_study(_text_of(path), path.parent))


def _text_of(path: Path) -> str:
    """A file's text; raises ConfigError where it has none. Some editors put a byte-order mark before it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}", hint="save the file as UTF-8"
        ) from error


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}") from error


def _at(path: Path, read: Callable[[], T]) -> T:
    """Put the file's name before an error's message."""
    try:
        return read()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", hint=error.hint) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
