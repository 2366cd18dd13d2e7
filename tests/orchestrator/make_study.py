"""Makes a realistic CADDIE_HOME without training: a ledger, run directories, events and results, by the contract.

    home = make_study(tmp_path)                       a finished study: trials, stop early, a failure, 2 x 3 seeds
    home = make_study(tmp_path, stage="search")       its controller is still searching; two runs are running
    home = make_record(tmp_path)                      one configuration on three seeds, no search

The scores are a smooth function of the knobs plus noise of the seed, so plots and intervals look as in life.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from orchestrator.evidence import RunEvidence
from orchestrator.home import Home
from orchestrator.ledger import (
    ARM_ASKED,
    CLOSED,
    COMPLETE,
    ENDED,
    FAILED,
    OPENED,
    PRUNED,
    STOP_ASKED,
    SUBMITTED,
    SUBMITTING,
    TRIAL_ASKED,
    TRIAL_TOLD,
    Ledger,
)
from orchestrator.record_attempt import record_study
from orchestrator.runs import RunRequest, RunStore
from orchestrator.study import Study
from orchestrator.study_file import parse_study
from trainer import protocol
from trainer.protocol import AttemptDir, Failure, Result, RunDir, Score

SMOKE = """
name = "wd-qk-ttt-smoke"
question = "Do Muon's weight decay, the QK gain or the TTT learning rate move bits per byte on the smoke preset?"
preset = "smoke"
data = "pydoc"

[set]  # what the tests' numbers rest on
"schedule.steps" = 120
"optim.muon_weight_decay" = 0.09
"model.qk_gain" = 5.0
"ttt.lr" = 0.002

[space."optim.muon_weight_decay"]
low = 0.01
high = 0.3
log = true

[space."model.qk_gain"]
low = 1.5
high = 6.0

[space."ttt.lr"]
low = 0.0005
high = 0.05
log = true

[search]
trials = 8

[stop_early]

[confirm]
seeds = [42, 314, 999]

[resources]
slots = 2
"""
BUNDLE = b"print('a stand-in for the packed trainer')\n" * 40
STARTED = 1_767_225_600.0  # an arbitrary moment: 1 January 2026
CODE = {"git_sha": "0123456789abcdef0123456789abcdef01234567", "diff_sha256": ""}
TOKENS, BYTES = 120_000, 360_000
LOSS_OF_BPB = BYTES * math.log(2) / TOKENS
STAGE_OFFSETS = {protocol.POST_EMA: 0.012, protocol.ROUNDTRIP: 0.031, protocol.SLIDING: 0.0, protocol.TTT: -0.008}


class Maker:
    """Writes one study, decision by decision, with a clock of its own."""

    def __init__(self, root: Path, source: str = SMOKE) -> None:
        self.home = Home(root)
        self.study: Study = parse_study(source)
        self.store = RunStore(self.home)
        self.ledger = Ledger(self.home.study(self.study.name).ledger)
        self.clock = STARTED
        self.append(OPENED, source=source, digest=self.study.digest, caddie="0.1.0")

    def append(self, kind: str, **fields: Any) -> None:
        protocol.append_line(self.ledger.path, {"kind": kind, "time": self.clock, **fields})

    def plan(self, params: dict[str, Any], seed: int, trial: int | None) -> RunDir:
        request = RunRequest(
            preset=self.study.preset, config=self.study.config_of(params), seed=seed, data_dir="/data/pydoc",
            manifest_sha256="ab" * 32, study=self.study.name, trial=trial,
        )  # fmt: skip
        return self.store.plan(request, bundle=BUNDLE, code=CODE)

    def ask_trial(self, number: int, params: dict[str, Any]) -> dict[int, RunDir]:
        runs = {seed: self.plan(params, seed, number) for seed in self.study.search.seeds}
        origin = "preset" if number == 0 else "sampler"
        ids = {str(seed): run.run_id for seed, run in runs.items()}
        self.append(TRIAL_ASKED, trial=number, origin=origin, params=params, runs=ids)
        return runs

    def ask_arm(self, name: str, trial: int, params: dict[str, Any], seeds: tuple[int, ...]) -> dict[int, RunDir]:
        runs = {seed: self.plan(params, seed, None) for seed in seeds}
        ids = {str(seed): run.run_id for seed, run in runs.items()}
        self.append(ARM_ASKED, arm=name, trial=trial, params=params, runs=ids)
        return runs

    def submit(self, run: RunDir, number: int = 1) -> AttemptDir:
        attempt = run.attempt(number)
        resources = {"gpus": 0, "processes": 1, "timeout_minutes": 10.0}
        tag = f"{self.study.name}/{run.run_id}/{number}"
        self.append(SUBMITTING, run_id=run.run_id, attempt=number, tag=tag, resources=resources)
        protocol.write_json_atomically(attempt.job, {"job_id": str(4000 + number), "tag": tag, "time": self.clock})
        self.append(SUBMITTED, run_id=run.run_id, attempt=number, job_id=str(4000 + number))
        return attempt

    def end(self, run: RunDir, attempt: AttemptDir, result: Result) -> None:
        protocol.write_result(attempt.result, result)
        failure = result.failure.kind if result.failure else None
        seconds = result.phases.get("total", 40.0)
        self.clock += seconds / 2
        self.append(
            ENDED,
            run_id=run.run_id,
            attempt=attempt.number,
            status=result.status,
            failure=failure,
            seconds=seconds,
            gpus=0,
        )

    def complete(self, run: RunDir, *, number: int = 1) -> Result:
        attempt = self.submit(run, number)
        write_events(attempt, spec_of(run), started=self.clock, steps=120)
        result = result_of(run, number)
        self.end(run, attempt, result)
        return result

    def stop(self, run: RunDir, reason: str) -> None:
        attempt = self.submit(run)
        write_events(attempt, spec_of(run), started=self.clock, steps=60)
        self.append(STOP_ASKED, run_id=run.run_id, attempt=1, reason=reason)
        seed = spec_of(run).seed
        self.end(
            run,
            attempt,
            Result(
                run_id=run.run_id,
                attempt=1,
                status=protocol.STOPPED,
                seed=seed,
                steps=60,
                phases={"train": 11.0, "total": 14.0},
            ),
        )

    def fail(self, run: RunDir, kind: str, message: str, *, number: int = 1) -> None:
        attempt = self.submit(run, number)
        write_events(attempt, spec_of(run), started=self.clock, steps=30)
        failure = Failure(kind=kind, message=message, log=f"{attempt.stderr}\nTraceback: {message}")
        seed = spec_of(run).seed
        self.end(
            run,
            attempt,
            Result(
                run_id=run.run_id,
                attempt=number,
                status=protocol.FAILED,
                seed=seed,
                failure=failure,
                phases={"total": 9.0},
            ),
        )

    def begin(self, run: RunDir, steps: int) -> AttemptDir:
        attempt = self.submit(run)
        write_events(attempt, spec_of(run), started=self.clock, steps=steps, is_ended=False)
        return attempt

    def tell(
        self, number: int, state: str, value: float | None = None, reason: str = "", over: float = -12_000.0
    ) -> None:
        constraints = {"artifact_bytes": over, "train_seconds": -250.0} if state == COMPLETE else {}
        intermediate = {"60": 3.1} if state == PRUNED else {}
        self.append(
            TRIAL_TOLD,
            trial=number,
            state=state,
            value=value,
            constraints=constraints,
            intermediate=intermediate,
            reason=reason,
        )


def spec_of(run: RunDir) -> protocol.Spec:
    return protocol.read_spec(run.spec)


def bpb_of(config: dict[str, dict[str, Any]], seed: int) -> float:
    """Sliding bits per byte of a configuration and a seed: a bowl over the three knobs, plus the seed's noise."""
    decay, gain, lr = config["optim"]["muon_weight_decay"], config["model"]["qk_gain"], config["ttt"]["lr"]
    bowl = 0.012 * math.log(decay / 0.05) ** 2 + 0.003 * (gain - 3.5) ** 2 + 0.002 * math.log(lr / 0.008) ** 2
    return 2.02 + bowl + random.Random(f"{seed} {decay:.6g} {gain:.6g}").gauss(0.0, 0.004)


def write_events(
    attempt: AttemptDir, spec: protocol.Spec, *, started: float, steps: int, is_ended: bool = True
) -> None:
    """The event file of one attempt, up to `steps`; an ended one has its evaluation and TTT too."""
    bpb, t, noise = bpb_of(spec.config, spec.seed), 1.6, random.Random(spec.run_id)

    def emit(kind: str, **fields: Any) -> None:
        protocol.append_line(attempt.events, {"kind": kind, "t": round(t, 4), **fields})

    emit(protocol.START, time=started, device="cpu", torch="2.13.0", world_size=1, parameters=612_345, seed=spec.seed)
    emit(protocol.PHASE, name="train", state="start")
    begun = t
    for step in [*range(1, 11), *range(15, steps + 1, 5)]:
        t = begun + 0.18 * step
        loss = LOSS_OF_BPB * bpb + 4.2 * math.exp(-step / 22) + noise.gauss(0, 0.03)
        values = {
            "train_loss": loss,
            "lr_scale": min(1.0, (121 - step) / 80),
            "tokens_per_second": noise.gauss(22_500, 300),
        }
        emit(protocol.METRIC, step=step, train_seconds=round(t - begun, 4), values=values)
    if not is_ended or steps < 120:
        return
    emit(protocol.PHASE, name="train", state="end", seconds=t - begun)
    for name, seconds in (("quantize", 2.1), ("sliding", 5.3)):
        emit(protocol.PHASE, name=name, state="start")
        t += seconds
        emit(protocol.PHASE, name=name, state="end", seconds=seconds)
    for chunk in range(8):
        t += 1.1
        values = {"ttt_bpb": bpb + 0.04 / (chunk + 1) - 0.008, "ttt_chunk": chunk}
        emit(protocol.METRIC, step=120, train_seconds=21.6, values=values)


def result_of(run: RunDir, attempt: int) -> Result:
    """A complete result whose scores follow from the run's configuration and seed."""
    spec = spec_of(run)
    bpb = bpb_of(spec.config, spec.seed)
    scores = {stage: score_of(bpb + offset) for stage, offset in STAGE_OFFSETS.items()}
    model_bytes = 452_000 + 37 * spec.seed
    phases = {"setup": 1.6, "train": 21.6, "quantize": 2.1, "sliding": 5.3, "ttt": 8.8, "total": 39.4}
    return Result(
        run_id=run.run_id, attempt=attempt, status=protocol.COMPLETE, seed=spec.seed, steps=120, tokens=120 * 4096,
        train_seconds=21.6, phases=phases, scores=scores, parity_nats=2e-7, bundle_bytes=len(BUNDLE), model_bytes=model_bytes,
        artifact_bytes=len(BUNDLE) + model_bytes, cap_bytes=500_000, parameters=612_345, device="cpu",
        peak_memory_bytes=310_000_000, artifact_sha256="cd" * 32, bundle_sha256=spec.bundle_sha256,
        final_train_loss=LOSS_OF_BPB * bpb,
    )  # fmt: skip


def score_of(bpb: float) -> Score:
    loss = bpb * LOSS_OF_BPB
    return Score(nats=loss * TOKENS, tokens=TOKENS, bytes=BYTES, loss=loss, bpb=bpb, seconds=5.3)


def sampled_params(study: Study, number: int) -> dict[str, Any]:
    """A point of the smoke study's space."""
    if number == 0:
        return study.preset_params()
    draw = random.Random(number)
    return {
        "optim.muon_weight_decay": 10 ** draw.uniform(-1.8, -0.7),
        "model.qk_gain": draw.uniform(1.5, 6.0),
        "ttt.lr": 10 ** draw.uniform(-3.0, -1.5),
    }


def search(maker: Maker, trials: int) -> None:
    """Trials with everything that happens: one runs out of memory, one is stopped early, one needs a second attempt."""
    for number in range(trials):
        [run] = maker.ask_trial(number, sampled_params(maker.study, number)).values()
        if number == 3:
            maker.fail(run, protocol.OUT_OF_MEMORY, "CUDA out of memory")
            maker.tell(number, FAILED, reason="out_of_memory: CUDA out of memory")
        elif number == 5:
            maker.stop(run, "training loss 3.1 at step 60 above the median 2.9")
            maker.tell(number, PRUNED, reason="training loss 3.1 at step 60 above the median 2.9")
        else:
            if number == 2:
                maker.fail(run, protocol.INFRASTRUCTURE, "the worker disappeared")
            result = maker.complete(run, number=2 if number == 2 else 1)
            maker.tell(
                number, COMPLETE, value=result.scores[protocol.TTT].bpb, over=1500.0 if number == 6 else -12_000.0
            )


def confirm(maker: Maker, *, failing_seed: int | None = None) -> None:
    """The best point and the preset on the confirmation's seeds."""
    assert maker.study.confirm is not None
    best = maker.ledger.state().best
    assert best is not None
    points = {"preset": (0, maker.study.preset_params()), "best": (best.number, best.params)}
    for name, (trial, params) in points.items():
        runs = maker.ask_arm(name, trial, params, maker.study.confirm.seeds)
        for seed, run in runs.items():
            if (name, seed) == ("best", failing_seed):
                maker.fail(run, protocol.NOT_FINITE, "the loss is not a number at step 31")
            else:
                maker.complete(run)


def make_study(root: Path, *, stage: str = "closed", trials: int = 8, failing_seed: int | None = None) -> Home:
    """A study of the smoke preset at a stage of its life: "opened", "search", "searched" or "closed"."""
    maker = Maker(root)
    if stage == "opened":
        return maker.home
    if stage == "search":
        search(maker, trials - 2)
        for number in (trials - 2, trials - 1):
            [run] = maker.ask_trial(number, sampled_params(maker.study, number)).values()
            maker.begin(run, steps=40 + 20 * (number % 2))
        return maker.home
    search(maker, trials)
    if stage == "closed":
        confirm(maker, failing_seed=failing_seed)
        maker.append(CLOSED, reason="finished")
    return maker.home


def make_record(root: Path, seeds: tuple[int, ...] = (42, 314, 999)) -> Home:
    """A record attempt on the smoke preset: no search, one arm."""
    maker = Maker(root, record_study("smoke", data="pydoc", seeds=seeds, knobs={}, name="record-smoke").source)
    for run in maker.ask_arm("preset", 0, {}, seeds).values():
        maker.complete(run)
    maker.append(CLOSED, reason="finished")
    return maker.home


def put_verdict(home: Home, run: RunEvidence, verdict: str, *, audit: bool = False) -> None:
    """What a clean-room check of the run's present result leaves, or an audit, as far as others read it."""
    record = {"verdict": verdict, "result_sha256": protocol.sha256_of(home.root / run.source)}
    folder = home.run(run.run_id)
    protocol.write_json_atomically(folder.audit if audit else folder.verify, record)


def with_event_line(attempt: AttemptDir, line: bytes) -> None:
    """Append bytes to an event file as they stand: a damaged or an unfinished line."""
    with attempt.events.open("ab") as file:
        file.write(line)
