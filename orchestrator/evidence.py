"""What a study's ledger and run directories say, gathered once for every view of it; nothing here is stored.

Each number keeps the path of the file that it was read from, relative to CADDIE_HOME.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.errors import CaddieError, ConfigError, ProtocolError
from orchestrator.findings import recorded_verdict
from orchestrator.home import Home
from orchestrator.ledger import BEST_ARM, PRESET_ARM, Arm, Ledger, StudyState, Trial
from orchestrator.places import lines_of
from orchestrator.runs import PLANNED, RunStore
from orchestrator.statistics import Difference, PairedDifference, Summary, difference, paired_difference, summarize
from orchestrator.study import Study
from orchestrator.study_file import parse_study
from orchestrator.study_rules import on_seeds
from trainer import protocol
from trainer.protocol import COMPLETE, METRIC, TRAIN_LOSS, WARNING, AttemptDir, Result

UNREADABLE = "unreadable"
"""State of a run whose files are damaged."""


TRIAL = "trial "
"""What the owner of a trial's runs begins with; its number follows."""


@dataclass(frozen=True, kw_only=True)
class RunEvidence:
    """One run as one of its owners asked for it."""

    owner: str
    """`trial 3`, or the arm's name."""

    seed: int
    run_id: str
    state: str
    """planned, queued, running, unreadable, or the status of the result."""

    reason: str
    """Why there is no score; empty where there is one or the run still goes on."""

    source: str
    """Path of the deciding result under CADDIE_HOME; empty without one."""

    result: Result | None
    verified: str = ""
    """Verdict of the clean-room check on this result: passed or failed; empty where none was made."""

    verification: str = ""
    """Path of that verdict under CADDIE_HOME; empty without one."""

    audited: str = ""
    """Verdict of the audit of this result, the same way."""

    auditing: str = ""
    """Path of that verdict under CADDIE_HOME; empty without one."""

    warned: tuple[str, ...] = ()
    """What is to be known of the deciding attempt, for an arm's runs, each in words that follow a colon."""

    lines: Mapping[str, int] = field(default_factory=dict)
    """Line of each value in the source, by its JSON pointer."""

    @property
    def is_of_trial(self) -> bool:
        """Whether the search asked for it, and no arm."""
        return self.owner.startswith(TRIAL)

    def bpb(self, stage: str) -> float | None:
        """Bits per byte of one stage of a complete run."""
        if self.result is None or self.result.status != COMPLETE or stage not in self.result.scores:
            return None
        return self.result.scores[stage].bpb

    def gap(self, worse: str, better: str) -> float | None:
        """Bits per byte by which one stage lies above another."""
        high, low = self.bpb(worse), self.bpb(better)
        return None if high is None or low is None else high - low

    @property
    def ttt_gain(self) -> float | None:
        """Bits per byte that test-time training takes off the sliding score."""
        return self.gap(protocol.SLIDING, protocol.TTT)

    @property
    def quantization_gap(self) -> float | None:
        """Bits per byte that the stored model loses against the averaged weights."""
        return self.gap(protocol.ROUNDTRIP, protocol.POST_EMA)


@dataclass(frozen=True, kw_only=True)
class SeedScore:
    """The score of one seed, from a run of ours or from a published record: what a comparison needs and no more."""

    seed: int | None
    """None where a record does not name it."""

    bpb: float
    """Bits per byte of the stage that is compared."""

    nats_per_token: float | None = None
    """The same score as a loss; None where only bits per byte are known."""

    steps: int | None = None
    train_seconds: float | None = None
    eval_seconds: float | None = None
    artifact_bytes: int | None = None
    source: str = ""
    """File of the score: a path under CADDIE_HOME, or what a record cites."""

    line: int = 0
    """Line of the score in that file, from 1; 0 where it is not known."""


@dataclass(frozen=True, kw_only=True)
class ScoredArm:
    """One configuration as a comparison sees it: its seeds' scores, and the seeds that have none."""

    name: str
    scores: tuple[SeedScore, ...]
    stage: str = ""
    """Stage of evaluation that the scores are of."""

    missing: tuple[str, ...] = ()
    """Seeds that were started and have no score, each with its reason."""

    started: int | None = None
    """Runs of the configuration that were started and have ended, shown or not; None where a record does not say."""

    is_ours: bool = False
    """Whether what a seed decides is known, so that two arms may be paired by it."""

    problems: tuple[str, ...] = ()
    """What a reader must know before he believes the scores."""

    stated: Summary | None = None
    """Mean and spread as published, where the seeds' own scores are not known."""

    constant: bool = False
    """Whether this is one number taken as exact, a quoted score say, and no runs."""

    @property
    def summary(self) -> Summary:
        """Mean and spread of the scores, or what is stated of them."""
        return self.stated or summarize(self.values)

    @property
    def values(self) -> list[float]:
        """Bits per byte of every seed that has them."""
        return [score.bpb for score in self.scores]

    @property
    def by_seed(self) -> dict[int, float]:
        """The same by seed, of the seeds that are named."""
        return {score.seed: score.bpb for score in self.scores if score.seed is not None}


@dataclass(frozen=True, kw_only=True)
class ArmEvidence:
    """A configuration on its confirmation seeds."""

    name: str
    trial: int
    params: dict[str, Any]
    runs: tuple[RunEvidence, ...]

    def values(self, stage: str) -> list[float]:
        """The stage's bits per byte on the seeds that have it."""
        return [value for value in (run.bpb(stage) for run in self.runs) if value is not None]

    def by_seed(self, stage: str) -> dict[int, float]:
        """The stage's bits per byte by seed, of the seeds that have it."""
        return {run.seed: value for run in self.runs if (value := run.bpb(stage)) is not None}

    def summary(self, stage: str) -> Summary:
        return summarize(self.values(stage))

    @property
    def missing(self) -> tuple[RunEvidence, ...]:
        """Seeds without a complete result."""
        return tuple(run for run in self.runs if run.result is None or run.result.status != COMPLETE)


@dataclass(frozen=True, kw_only=True)
class TrialEvidence:
    """A point of the space and its runs."""

    trial: Trial
    runs: tuple[RunEvidence, ...]


@dataclass(frozen=True, kw_only=True)
class AttemptEvidence:
    """One execution that the study started."""

    run_id: str
    number: int
    owners: tuple[str, ...]
    job_id: str | None
    status: str
    failure: str
    seconds: float
    gpus: int
    source: str
    """Path of this attempt's result under CADDIE_HOME; empty without one."""

    began: str = ""
    """Whether a later attempt went on from a checkpoint or from scratch; empty for the first."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All of a study."""

    study: Study
    state: StudyState
    arms: tuple[ArmEvidence, ...]
    trials: tuple[TrialEvidence, ...]
    attempts: tuple[AttemptEvidence, ...]
    problems: tuple[str, ...]
    """Files that could not be read."""

    @property
    def objective(self) -> str:
        return self.study.search.objective

    def stage_of(self, arm: ArmEvidence) -> str:
        """Stage at which an arm is compared: the objective's, but for a design's cell that has no such stage."""
        return self.study.stage_of(arm.params) if self.study.cells else self.objective

    @property
    def runs(self) -> tuple[RunEvidence, ...]:
        """Every run by owner, the arms' first."""
        return tuple(
            run for runs in ([arm.runs for arm in self.arms] + [trial.runs for trial in self.trials]) for run in runs
        )

    def arm(self, name: str) -> ArmEvidence | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def improvement(self) -> Difference | None:
        """Best minus preset on the confirmation seeds, in the objective; None without both arms."""
        best, preset = self.arm(BEST_ARM), self.arm(PRESET_ARM)
        if best is None or preset is None:
            return None
        return difference(best.values(self.objective), preset.values(self.objective))

    @property
    def paired_improvement(self) -> PairedDifference | None:
        """The same, seed by seed; None without both arms."""
        best, preset = self.arm(BEST_ARM), self.arm(PRESET_ARM)
        if best is None or preset is None:
            return None
        return paired_difference(best.by_seed(self.objective), preset.by_seed(self.objective))

    @property
    def gpu_seconds(self) -> float:
        return self.state.gpu_seconds

    @property
    def cpu_run_seconds(self) -> float:
        """Seconds of attempts that had no GPU."""
        return sum(attempt.seconds for attempt in self.attempts if attempt.gpus == 0)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Training loss of one run."""

    run: RunEvidence
    steps: tuple[int, ...]
    train_seconds: tuple[float, ...]
    losses: tuple[float, ...]
    tokens_per_step: int = 0
    """0 where the spec cannot be read."""


def read_study(home: Home, study_name: str) -> tuple[Study, StudyState]:
    """The study and its state as its ledger has them; raises ConfigError where there is no such study."""
    ledger = Ledger(home.study(study_name).ledger)
    state = ledger.state()
    if not state.source:
        known = ", ".join(home.study_names()) or "none yet"
        raise ConfigError(f"{ledger.path}: there is no study {study_name!r}", hint=f"there are: {known}")
    study = parse_study(state.source)
    asked: list[Trial | Arm] = [*state.trials.values(), *state.arms.values()]
    seeds = tuple(dict.fromkeys(seed for owner in asked for seed in owner.runs))
    return on_seeds(study, seeds) if study.from_runs and seeds else study, state


def study_names(home: Home) -> list[str]:
    """Every study that has a ledger."""
    return home.study_names()


def gather(home: Home, study_name: str) -> Evidence:
    """Read a study, also an unfinished one; a damaged run is named in `problems` and stays visible."""
    study, state = read_study(home, study_name)
    reader = _Reader(home, state)
    return Evidence(
        study=study,
        state=state,
        arms=tuple(reader.arm(arm) for arm in sorted(state.arms.values(), key=lambda arm: arm.name != BEST_ARM)),
        trials=tuple(reader.trial(trial) for trial in state.trials.values()),
        attempts=tuple(reader.attempts()),
        problems=tuple(reader.problems),
    )


def run_evidence(home: Home, run_id: str) -> RunEvidence:
    """One run by itself, whoever asked for it; raises ProtocolError where its files are damaged."""
    reader = _Reader(home, StudyState())
    found = reader.run("run", protocol.read_spec(home.run(run_id).spec).seed, run_id)
    if found.state == UNREADABLE:
        raise ProtocolError(found.reason, hint="the file is damaged: put it back, or ask for the run again")
    return found


class _Reader:
    """Reads run directories and collects what was damaged."""

    def __init__(self, home: Home, state: StudyState) -> None:
        self.home, self.state, self.store = home, state, RunStore(home)
        self.problems: dict[str, None] = {}  # an ordered set: a damaged run may have two owners

    def arm(self, arm: Arm) -> ArmEvidence:
        runs = tuple(replace(run, warned=self._warned(run)) for run in self._runs(arm.name, arm.runs))
        return ArmEvidence(name=arm.name, trial=arm.trial, params=arm.params, runs=runs)

    def trial(self, trial: Trial) -> TrialEvidence:
        return TrialEvidence(trial=trial, runs=self._runs(f"{TRIAL}{trial.number}", trial.runs))

    def _runs(self, owner: str, runs: dict[int, str]) -> tuple[RunEvidence, ...]:
        return tuple(self.run(owner, seed, run_id) for seed, run_id in runs.items())

    def run(self, owner: str, seed: int, run_id: str) -> RunEvidence:
        """One run as its owner asked for it; a damaged one is a problem, and stays visible."""
        try:
            state, result = self.store.state(run_id), self.store.result(run_id)
            attempt = self.store.deciding_attempt(run_id)
        except CaddieError as error:
            self.problems[str(error)] = None
            return RunEvidence(
                owner=owner, seed=seed, run_id=run_id, state=UNREADABLE, reason=str(error), source="", result=None
            )
        reason = "" if state == COMPLETE else self._reason(run_id, state, result)
        source = self._source(attempt) if attempt else ""
        run = self.home.run(run_id)
        verified = self._verdict(run.verify, f"caddie verify {run_id}", attempt) if attempt else ""
        audited = self._verdict(run.audit, f"caddie audit {run_id}", attempt) if attempt else ""
        return RunEvidence(
            owner=owner, seed=seed, run_id=run_id, state=state, reason=reason, source=source, result=result,
            verified=verified, verification=_relative(run.verify, self.home.root) if verified else "",
            audited=audited, auditing=_relative(run.audit, self.home.root) if audited else "",
            lines=lines_of((self.home.root / source).read_text(encoding="utf-8")) if source else {},
        )  # fmt: skip

    def _warned(self, run: RunEvidence) -> tuple[str, ...]:
        """The warnings in the deciding attempt's events; those behind a damaged line are not known, and it is a problem."""
        found: list[str] = []
        try:
            attempt = self.store.deciding_attempt(run.run_id)
            began = self._began(attempt) if attempt else ""
            found += [began] if began else []
            for _, event in self.store.events(attempt) if attempt else ():
                if event.get("kind") == WARNING:
                    found.append(_warning_text(event))
        except CaddieError as error:
            self.problems[str(error)] = None
        return tuple(found)

    def _began(self, attempt: AttemptDir) -> str:
        """How a later attempt that has ended began; empty for the first. A damaged result is a problem, and says nothing."""
        try:
            is_told = attempt.number > 1 and attempt.result.exists()
            earlier = protocol.read_result(attempt.result).resumed_from if is_told else {}
        except CaddieError as error:
            self.problems[str(error)] = None
            return ""
        if not earlier:
            return f"attempt {attempt.number} began from scratch" if is_told else ""
        parts = ", ".join(f"{seconds:.1f} s of attempt {number}" for number, seconds in earlier.items())
        return f"went on after {parts}"

    def _verdict(self, record: Path, command: str, attempt: AttemptDir) -> str:
        """A command's verdict on this attempt's result; a damaged one is a problem, and none."""
        try:
            return recorded_verdict(record, attempt.result, command)
        except CaddieError as error:
            self.problems[str(error)] = None
            return ""

    def _reason(self, run_id: str, state: str, result: Result | None) -> str:
        """Why a run has no score, from its result or from what the controller decided."""
        if result is not None and result.failure:
            return f"{result.failure.kind}: {result.failure.message}"
        stops = [attempt.stop_reason for attempt in self.state.attempts_of(run_id) if attempt.stop_reason]
        if stops:
            return stops[-1]
        return "never started" if state == PLANNED and self.state.closed else ""

    def _source(self, attempt: AttemptDir) -> str:
        return _relative(attempt.result, self.home.root) if attempt.result.exists() else ""

    def attempts(self) -> Iterator[AttemptEvidence]:
        owners = _owners_by_run(self.state)
        for attempt in self.state.attempts.values():
            files = self.home.run(attempt.run_id).attempt(attempt.number)
            yield AttemptEvidence(
                run_id=attempt.run_id,
                number=attempt.number,
                owners=tuple(owners.get(attempt.run_id, ())),
                job_id=attempt.job_id,
                status=attempt.status or "not ended",
                failure=attempt.failure or attempt.stop_reason or "",
                seconds=attempt.seconds,
                gpus=attempt.gpus,
                source=self._source(files),
                began=self._began(files),
            )


def _owners_by_run(state: StudyState) -> dict[str, list[str]]:
    """Owners, with the seed, of each run."""
    owners: dict[str, list[str]] = {}
    named: Iterable[tuple[str, dict[int, str]]] = (
        *((f"{TRIAL}{trial.number}", trial.runs) for trial in state.trials.values()),
        *((arm.name, arm.runs) for arm in state.arms.values()),
    )
    for owner, runs in named:
        for seed, run_id in runs.items():
            owners.setdefault(run_id, []).append(f"{owner}, seed {seed}")
    return owners


def read_curves(home: Home, evidence: Evidence) -> tuple[list[Curve], list[str]]:
    """The training loss of every run that has one, and what could not be read; a curve ends before a damaged line."""
    store = RunStore(home)
    curves: list[Curve] = []
    problems: list[str] = []
    for run in evidence.runs:
        try:
            attempt = store.deciding_attempt(run.run_id)
        except CaddieError:
            continue  # its result is damaged: gather has named it
        if attempt is not None:
            curve, problem = _read_curve(run, store, attempt)
            curves += [curve] if curve.steps else []
            problems += [problem] if problem else []
    return curves, problems


def _read_curve(run: RunEvidence, store: RunStore, attempt: AttemptDir) -> tuple[Curve, str]:
    points: list[tuple[int, float, float]] = []
    problem = ""
    try:
        for event in store.curve(attempt):
            if event.get("kind") == METRIC and TRAIN_LOSS in event["values"]:
                points.append((event["step"], event["train_seconds"], event["values"][TRAIN_LOSS]))
    except CaddieError as error:
        problem = str(error)
    steps, seconds, losses = zip(*points, strict=True) if points else ((), (), ())
    try:
        tokens = int(protocol.read_spec(store.home.run(run.run_id).spec).config["data"]["tokens_per_step"])
    except (CaddieError, KeyError, OSError) as error:
        tokens, problem = 0, problem or str(error)
    return Curve(run=run, steps=steps, train_seconds=seconds, losses=losses, tokens_per_step=tokens), problem


def _warning_text(event: Mapping[str, Any]) -> str:
    """A warning in its own words; of one that has none, its name and values."""
    if "says" in event:
        return str(event["says"])
    values = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("kind", "t", "name"))
    return f"the trainer warned of {event.get('name')}" + (f" ({values})" if values else "")


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
