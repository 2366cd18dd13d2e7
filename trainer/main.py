"""One attempt of a run, from its directory to its result: load, warm up, train, calibrate, pack, score.

python train_gpt.py RUN_DIR --attempt N        (or under torchrun, one process a GPU)
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer import artifact, protocol
from trainer.attention import fastest_kernels
from trainer.by_document import Documents, evaluate_documents
from trainer.calibration import Calibration, calibrate
from trainer.checkpoint import Checkpoint
from trainer.config import Config, from_mapping
from trainer.data import BOS, Dataset
from trainer.distributed import World, start_world
from trainer.errors import CaddieError, ConfigError, DataError, ProtocolError, StorageError
from trainer.evaluate import Evaluation, OnChunk, Scorer, Stream, Windows, evaluate, plan_documents, plan_windows
from trainer.fit import fit
from trainer.graphs import Recorded
from trainer.model import Model
from trainer.protocol import AttemptDir, EventLog, Failure, Result, RunDir, Score, ScoreChain, Spec
from trainer.quantize import corrected
from trainer.slot import Slot
from trainer.train import Network, NotFiniteError, order_seed, reserve_seconds, train, warm_up
from trainer.ttt import ChunkAdapter, DocumentAdapter, ParityError, require_parity

LOG_LINES = 40  # of a traceback, kept in the result

FAILURES: tuple[tuple[type[BaseException], str], ...] = (
    (ConfigError, protocol.CONFIG),
    (DataError, protocol.DATA),
    (StorageError, protocol.DISK),
    (ProtocolError, protocol.DATA),
    (NotFiniteError, protocol.NOT_FINITE),
    (ParityError, protocol.PARITY),
    (torch.OutOfMemoryError, protocol.OUT_OF_MEMORY),
    (MemoryError, protocol.OUT_OF_MEMORY),
)


class StopAsked(BaseException):  # not an Exception: no handler of an ordinary failure may take it
    """Somebody wants this attempt to end."""


@dataclass
class StopSignal:
    """SIGTERM, heard at the next step of training, and at once anywhere else."""

    is_asked: bool = False
    waits_for_step: bool = False

    def hear(self, _number: int, _frame: object) -> None:
        self.is_asked = True
        if not self.waits_for_step:
            raise StopAsked


@dataclass
class Run:
    """What the phases of one attempt share."""

    directory: RunDir
    spec: Spec
    config: Config
    world: World
    log: EventLog
    stop: StopSignal
    attempt: AttemptDir
    found: dict[str, Any] = field(default_factory=lambda: {"scores": {}, "chains": {}, "train_seconds": 0.0})
    """Fields of the result, as they become known."""

    def phase(self, name: str) -> Any:
        return self.log.phase(name, self.world.synchronize)


def main(arguments: list[str] | None = None) -> int:
    """Run one attempt; returns the exit code. The result file says everything else."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", type=int, default=1)
    parser.add_argument("--recheck", type=Path, metavar="DATA")
    options = parser.parse_args(arguments)
    directory = RunDir(options.run_dir.resolve())
    stop = StopSignal()
    try:
        if options.recheck:
            recheck(directory, options.recheck)
            return 0
        signal.signal(signal.SIGTERM, stop.hear)
        spec = protocol.read_spec(directory.spec)
        config = from_mapping(spec.config)
        world = start_world(config.runtime)
        attempt = directory.attempt(options.attempt)
        log = EventLog(attempt.events if world.is_first else None)
        return attempt_run(Run(directory, spec, config, world, log, stop, attempt))
    except (CaddieError, OSError) as error:
        complain(f"error: {error}")
        return getattr(error, "exit_code", 1)


def complain(text: str) -> None:
    """Say it on stderr, which may be a file on a full disk: the exit code is heard then."""
    with suppress(OSError):
        print(text, file=sys.stderr)


def recheck(directory: RunDir, data_dir: Path) -> None:
    """Score a model file that stands alone, on a data set's validation split, into `recheck.json`.

    Nothing else of the run is read, and nothing of the training data.
    """
    file = artifact.load(directory.artifact.read_bytes(), str(directory.artifact))
    config = from_mapping(file.meta["config"])
    unknown = dict.fromkeys(("run_id", "preset", "data_dir", "manifest_sha256", "bundle_sha256"), "")
    spec = Spec(**{**unknown, "seed": 0, "replicate": 0, "config": file.meta["config"], "code": {}})
    attempt = directory.attempt(0)
    run = Run(directory, spec, config, start_world(config.runtime), EventLog(None), StopSignal(), attempt)
    run.found["artifact_sha256"] = protocol.sha256_of(directory.artifact)
    with fastest_kernels():
        dataset = Dataset.open(data_dir, config.model.vocab_size, splits=(protocol.VALIDATION,))
        score_stored(run, stream_of(run, dataset))
    if run.world.is_first:
        protocol.write_result(directory.recheck, result_of(run, protocol.COMPLETE, None))
    run.world.close()


def attempt_run(run: Run) -> int:
    """Execute the phases and write the result, whatever happens; returns the exit code. Raises StorageError where the
    disk does not take the result.

    An attempt that does not own the run any more leaves none.
    """
    status, failure, code = protocol.COMPLETE, None, 0
    try:
        with fastest_kernels():
            execute(run)
        failure = over_cap(run)
        status = protocol.FAILED if failure else run.found.pop("status", protocol.COMPLETE)
    except StopAsked:
        status = protocol.STOPPED
    except Exception as error:
        status, failure = protocol.FAILED, describe(error, run.attempt)
        code = getattr(error, "exit_code", 1)
        complain(traceback.format_exc())
        if isinstance(error, CaddieError) and error.hint:
            complain(f"hint: {error.hint}")
    if run.world.is_first and run.directory.is_newest(run.attempt):
        protocol.write_result(run.attempt.result, result_of(run, status, failure))
        if run.config.runtime.resumable and code == 0 and status != protocol.STOPPED:
            run.directory.checkpoint.unlink(missing_ok=True)
    if code == 0:
        run.world.close()
    return code


def describe(error: Exception, attempt: AttemptDir) -> Failure:
    """The failure's kind, in the words of the contract."""
    kind = next((kind for cls, kind in FAILURES if isinstance(error, cls)), protocol.CODE)
    if isinstance(error, RuntimeError) and "out of memory" in str(error).lower():
        kind = protocol.OUT_OF_MEMORY
    lines = traceback.format_exc().splitlines()[-LOG_LINES:]
    return Failure(kind=kind, message=f"{type(error).__name__}: {error}", log="\n".join([f"{attempt.stderr}:", *lines]))


def over_cap(run: Run) -> Failure | None:
    """The failure of a run whose artifact is too large; its scores stand beside it, for the search to learn from."""
    size, cap = run.found.get("artifact_bytes", 0), run.config.limits.artifact_bytes
    if size <= cap:
        return None
    return Failure(
        kind=protocol.OVER_CAP, message=f"the artifact has {size} bytes, the cap is {cap}: {size - cap} too many"
    )


def result_of(run: Run, status: str, failure: Failure | None) -> Result:
    return Result(
        run_id=run.spec.run_id, attempt=run.attempt.number, status=status, seed=run.spec.seed, failure=failure,
        phases=run.log.phases, world_size=run.world.size, device=device_name(run.world),
        peak_memory_bytes=run.world.peak_memory_bytes(), cap_bytes=run.config.limits.artifact_bytes,
        bundle_sha256=run.spec.bundle_sha256, **run.found,
    )  # fmt: skip


def device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"


def execute(run: Run) -> None:
    """All phases, in order; what becomes known goes into `run.found`."""
    config, world = run.config, run.world
    run.log.emit(
        protocol.START, time=time.time(), seed=run.spec.seed, device=device_name(world), torch=torch.__version__,
        world_size=world.size, run_id=run.spec.run_id,
    )  # fmt: skip
    with run.phase("load"):
        dataset = Dataset.open(Path(run.spec.data_dir), config.model.vocab_size, run.spec.manifest_sha256)
    if run.spec.source and run.spec.source_part == protocol.ARTIFACT:
        if world.is_first:
            take_over(run)
        world.agree(0.0)  # the others read the file only now
        score_stored(run, stream_of(run, dataset))
        return
    with run.phase("load"):
        torch.manual_seed(run.spec.seed)
        model = build_model(config, world)
        run.found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    recurrent = given_weights(run, model) if run.spec.source else trained(run, model, dataset)
    if "status" in run.found:
        return
    if config.ttt.before_quantization:
        learn_beforehand(run, model, stream_of(run, dataset), recurrent)
    pack(run, model, dataset, recurrent)
    stream = stream_of(run, dataset)
    stage_score(run, protocol.POST_EMA, model, stream, recurrent)
    score_stored(run, stream)


def trained(run: Run, model: Model, dataset: Dataset) -> int:
    """Train the model, which then holds the averaged weights; returns the extra passes through its repeated layers.

    Where the run was stopped, its status says so.
    """
    config, world = run.config, run.world
    with run.phase("load"):
        network = Network(model, config, world)
    if config.runtime.compile or world.device.type == "cuda":
        with run.phase("compile"):
            network.prepare()
    with run.phase("warm_up"):
        reserve = reserve_seconds(config, warm_up(model, network, config, world))
    if config.schedule.clock == "time" and reserve > config.limits.reserve_seconds:
        run.log.emit(protocol.WARNING, name="reserve", planned=config.limits.reserve_seconds, needed=round(reserve, 2))
    checkpoint = Checkpoint(run.directory, run.attempt, world, run.log) if config.runtime.resumable else None
    if checkpoint:
        run.found["resumed_from"] = checkpoint.earlier  # filled in when it is read
    run.stop.waits_for_step = True
    with run.phase("train"):
        outcome = train(
            model, network, dataset, config=config, seed=run.spec.seed, world=world, log=run.log,
            reserve=reserve, stop_asked=lambda: is_asked_to_leave(run), checkpoint=checkpoint,
            validate=validation(run, model, dataset) if config.schedule.validations else None,
        )  # fmt: skip
    run.stop.waits_for_step = False
    run.found.update(
        steps=outcome.steps, tokens=outcome.tokens, train_seconds=outcome.train_seconds,
        final_train_loss=outcome.final_train_loss,
    )  # fmt: skip
    if outcome.was_stopped:
        run.found["status"] = protocol.STOPPED
    return outcome.recurrent


def validation(run: Run, model: Model, dataset: Dataset) -> Callable[[int], float]:
    """What scores the present weights on the beginning of the validation split: nats per token, by the recurrence."""
    config, whole = run.config, stream_of(run, dataset)
    length = config.evaluation.sequence_length
    positions = min(whole.positions, config.schedule.validation_sequences * length)
    stream = Stream(whole.tokens_N[: positions + 1], whole.target_bytes_P[:positions])
    windows, scorer = plan_windows(positions, length=length, stride=length), Recorded(model.nats, is_pure=True)

    def loss(recurrent: int) -> float:
        return evaluate(
            scorer, stream, windows, config=config.evaluation, recurrent=recurrent, world=run.world, chunk_tokens=positions
        ).score.loss  # fmt: skip

    return loss


def given_weights(run: Run, model: Model) -> int:
    """Put another run's trained weights into the model; returns what `trained` does. Raises ProtocolError."""
    path = run.directory.source
    file = artifact.decode(path.read_bytes(), str(path))
    model.load_state_dict(file.state())
    return int(file.meta["recurrent"])


def learn_beforehand(run: Run, model: Model, stream: Stream, recurrent: int) -> None:
    """Learn from the validation split before quantisation, which no submission may; the log says so."""
    config = run.config.ttt
    run.log.emit(protocol.WARNING, name="learned_before_quantization", positions=stream.positions)
    with run.phase("adapt"):
        length = run.config.evaluation.sequence_length
        adapter = ChunkAdapter(model, stream, config=config, length=length, recurrent=recurrent, world=run.world)
        firsts = range(0, stream.positions - length + 1, config.chunk_tokens)  # a rest too short for a sequence is left
        for chunk, first in enumerate(firsts):
            last = min(first + config.chunk_tokens, stream.positions)
            adapter.learn(first, last, chunk=chunk, chunks=len(firsts))
    model.requires_grad_(True)  # as training leaves it
    model.zero_grad()


def is_asked_to_leave(run: Run) -> bool:
    """Whether training is to end with this step, as the first process hears it."""
    if run.config.runtime.resumable and run.world.is_first and run.attempt.notice.exists():
        return True
    return run.stop.is_asked


def build_model(config: Config, world: World, *, compiles: bool = True) -> Model:
    """A fresh model on this process's device, as the run calls it; without compiled parts for rows of many lengths."""
    model = Model(config.model, train_length=config.data.sequence_length, precision=world.precision(config.runtime))
    if config.runtime.compile and compiles:
        model.compile_parts()
    return model.to(world.device)


def pack(run: Run, model: Model, dataset: Dataset, recurrent: int) -> None:
    """Quantise the averaged weights, compress them under the cap and write `artifact.bin`."""
    config, world = run.config, run.world
    found = Calibration()
    if config.quant.method == "gptq" or config.quant.grid == "fisher":
        with run.phase("calibrate"):
            order = order_seed(config, run.spec.seed)
            found = calibrate(model, dataset, config=config, order_seed=order, recurrent=recurrent, world=world)
        reads_training_data = config.quant.calibration == "training" or config.quant.grid == "fisher"
        if reads_training_data and not run.spec.source:  # which trains nothing, and costs its evaluation alone
            run.found["train_seconds"] += run.log.phases["calibrate"]
    if world.is_first:
        cap_bytes = config.limits.artifact_bytes - run.directory.bundle.stat().st_size
        meta = {"config": run.spec.config, "recurrent": recurrent}
        fitted = fit(model, found, meta, cap_bytes=cap_bytes, config=config.quant, phase=run.phase)
        for name in fitted.without_feedback:
            run.log.emit(protocol.WARNING, name="gptq_fallback", tensor=name)
        if fitted.factor != 1 or fitted.pruned:
            run.log.emit(
                protocol.WARNING, name="fitted", grid_factor=round(fitted.factor, 4), pruned=fitted.pruned, added_error=round(fitted.added_error, 4)
            )  # fmt: skip
        with run.phase("pack"):
            keep_artifact(run, fitted.packed)
            if not run.spec.source:
                weights = artifact.encode(artifact.ModelFile(meta, dict(model.state_dict())))
                protocol.write_bytes_atomically(run.directory.weights, weights)
    world.agree(0.0)  # the others read the file only now


def keep_artifact(run: Run, packed: bytes) -> None:
    """Write `artifact.bin` and count what a submission would hold. Raises StopAsked where a later attempt owns the run."""
    if not run.directory.is_newest(run.attempt):
        raise StopAsked
    protocol.write_bytes_atomically(run.directory.artifact, packed)
    bundle_bytes = run.directory.bundle.stat().st_size
    run.found.update(
        bundle_bytes=bundle_bytes, model_bytes=len(packed), artifact_bytes=bundle_bytes + len(packed),
        artifact_sha256=hashlib.sha256(packed).hexdigest(),
    )  # fmt: skip


def take_over(run: Run) -> None:
    """Make `artifact.bin` of another run's model file: its weights to the bit, with this run's configuration.

    So bundle and artifact alone give this run's scores. Raises ProtocolError.
    """
    path, quant = run.directory.source, run.config.quant
    with run.phase("pack"):
        file = artifact.load(path.read_bytes(), str(path))
        again = artifact.ModelFile({**file.meta, "config": run.spec.config}, file.tensors)
        keep_artifact(run, artifact.pack(again, quant.coder, quant.brotli_quality))


def stored_model(run: Run, *, compiles: bool = True) -> tuple[Model, int]:
    """A fresh model from `artifact.bin`, and the extra passes through its repeated layers. Raises ProtocolError."""
    path = run.directory.artifact
    file = artifact.load(path.read_bytes(), str(path))
    config = from_mapping(file.meta["config"])
    model = build_model(config, run.world, compiles=compiles)
    state = file.state()
    model.load_state_dict(corrected(state) if config.quant.low_rank_tensors else state)
    return model.eval(), int(file.meta["recurrent"])


def stream_of(run: Run, dataset: Dataset) -> Stream:
    """The validation split on this process's device."""
    tokens_N = dataset.validation_tokens()
    target_bytes = dataset.byte_counts().bytes_of_targets(tokens_N[:-1], tokens_N[1:])
    return Stream(tokens_N.to(run.world.device), target_bytes.to(run.world.device))


def score_stored(run: Run, stream: Stream) -> None:
    """Score the stored model: flat, by its protocol, and with test-time training. Raises ParityError."""
    config = run.config.ttt
    with run.phase("reload"):
        stored, recurrent = stored_model(run)
    stage_score(run, protocol.ROUNDTRIP, stored, stream, recurrent)
    plain = stage_score(run, protocol.SLIDING, stored, stream, recurrent)
    if config.method == "off" or config.before_quantization:
        return
    # Weights that no evaluation has touched.
    if config.method == "lora" and config.lora_unit == "document":
        fresh, recurrent = stored_model(run, compiles=False)
        adapt_by_document(run, fresh, stream, recurrent)
    else:
        fresh, recurrent = stored_model(run)
        adapter = ChunkAdapter(
            fresh,
            stream,
            config=config,
            length=run.config.evaluation.sequence_length,
            recurrent=recurrent,
            world=run.world,
        )
        adapted = stage_score(run, protocol.TTT, fresh, stream, recurrent, adapter)
        run.found["parity_nats"] = require_parity(plain.first_chunk_loss, adapted.first_chunk_loss)


def windows_of(run: Run, stage: str, stream: Stream) -> Windows:
    """The windows of a stage: flat before `sliding`, from there on as the configuration's protocol has them."""
    config, positions = run.config.evaluation, stream.positions
    is_flat = stage in (protocol.POST_EMA, protocol.ROUNDTRIP) or config.protocol == "flat"
    if config.protocol == "documents" and not is_flat:
        begins_D = stream.documents(BOS)
        return plan_documents(begins_D, positions, length=config.sequence_length, stride=config.stride)
    stride = config.sequence_length if is_flat else config.stride
    return plan_windows(positions, length=config.sequence_length, stride=stride)


def stage_score(
    run: Run, stage: str, model: Model, stream: Stream, recurrent: int, adapter: ChunkAdapter | None = None
) -> Evaluation:
    """One evaluation as a phase of its own; its score goes into the result."""
    ttt = run.config.ttt  # the stages whose first chunks are compared have the same chunks
    is_chunked = stage in (protocol.SLIDING, protocol.TTT) and ttt.method != "off" and not ttt.is_by_document
    chain = chain_of(run, stage)
    scorer: Scorer = Recorded(model.eval().nats, is_pure=True)
    if run.config.evaluation.slot_steps and stage == protocol.SLIDING:
        scorer = Slot(model, run.config.evaluation)
    with run.phase(stage):
        evaluation = evaluate(
            scorer, stream, windows_of(run, stage, stream), config=run.config.evaluation,
            recurrent=recurrent, world=run.world, adapter=adapter, chain=chain,
            chunk_tokens=ttt.chunk_tokens if is_chunked else stream.positions,
            on_chunk=running_score(run) if adapter else None,
        )  # fmt: skip
    keep_score(run, chain, evaluation.score)
    return evaluation


def adapt_by_document(run: Run, fresh: Model, stream: Stream, recurrent: int) -> None:
    """Test-time training with an adapter a document, after parity with the same network without. Raises ParityError."""
    chain = chain_of(run, protocol.TTT)
    with run.phase(protocol.TTT):
        documents = Documents(
            stream, stream.documents(BOS), config=run.config.ttt, length=run.config.evaluation.sequence_length,
            recurrent=recurrent, world=run.world,
        )  # fmt: skip
        plain_loss = documents.first_loss(fresh.nats)
        adapter = DocumentAdapter(fresh, config=run.config.ttt, recurrent=recurrent, world=run.world)
        scorer = Recorded(fresh.nats, is_pure=True)
        run.found["parity_nats"] = require_parity(plain_loss, documents.first_loss(scorer))
        score = evaluate_documents(scorer, documents, adapter=adapter, chain=chain, on_chunk=running_score(run))
    keep_score(run, chain, score)


def chain_of(run: Run, stage: str) -> ScoreChain:
    return ScoreChain(run.log, stage, run.found.get("artifact_sha256", ""))


def keep_score(run: Run, chain: ScoreChain, score: Score) -> None:
    """Put a stage's score and the end of its chain into the result."""
    run.found["scores"][chain.stage], run.found["chains"][chain.stage] = score, chain.link


def running_score(run: Run) -> OnChunk:
    """Log the running bits per byte of a TTT pass."""

    def on_chunk(chunk: int, _chunks: int, bpb: float) -> None:
        run.log.metrics(chunk, run.found["train_seconds"], ttt_chunk=chunk, ttt_bpb=bpb)

    return on_chunk


if __name__ == "__main__":
    sys.exit(main())
