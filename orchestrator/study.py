"""A study: one question, its search space, its budget, and where its runs go."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator import rungs as ladders
from orchestrator.acceptance import objections
from orchestrator.factors import Cell, Factor, NoisePlan, cells_of, noise_cells
from orchestrator.measures import ARTIFACT_BYTES, EVAL_SECONDS, TRAIN_SECONDS
from orchestrator.rungs import Rung
from orchestrator.space import Range
from orchestrator.variables import ScriptPlan
from trainer.config import Config, knob_value, to_mapping, with_knobs
from trainer.protocol import SLIDING, TRAIN_LOSS, TTT

LOCAL, SLURM = LAUNCHERS = ("local", "slurm")
LOCAL_TIMEOUT_MINUTES = 60.0
# Beyond the budgets of training and evaluation: start, compilation, warm-up, quantisation, the evaluations whose score
# does not count, and reading the model file again.
SLURM_MARGIN_MINUTES = 25.0
SCORING = ("ttt.", "evaluation.")  # knobs that matter where a stored model is only scored
PACKING = ("quant.", "limits.artifact_bytes", "ttt.before_quantization")  # where stored weights are quantised anew
TAKEN = (*SCORING, *PACKING)  # that may differ from a run's whose model is taken ...
TAKEN_WORDS = "ttt.*, evaluation.*, quant.* and limits.artifact_bytes"  # ... in words


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
