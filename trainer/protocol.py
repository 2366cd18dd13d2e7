"""The files of a run directory: the one contract between the planes. Standard library only.

    runs/<run_id>/spec.json, train_gpt.py, source.bin  orchestrator, before launch, never changed
    runs/<run_id>/attempts/N/job.json                  orchestrator, at submission
    runs/<run_id>/attempts/N/demands.json              orchestrator, before submission: what its nodes must offer
    runs/<run_id>/attempts/N/claim.json, env.json      worker, when the job starts
    runs/<run_id>/attempts/N/node_check<K>.json        worker on each node, before the trainer starts: what it found
    runs/<run_id>/attempts/N/system-M.jsonl            worker on node M, append-only: what its GPUs did
    runs/<run_id>/attempts/N/stop                      orchestrator: please stop (an empty file, or GIVEN_UP)
    runs/<run_id>/attempts/N/notice                    worker: the machine is wanted back (an empty file)
    runs/<run_id>/attempts/N/node<K>.json              worker on another node than the first: why its part failed
    runs/<run_id>/attempts/N/events.jsonl              trainer, rank 0, append-only
    runs/<run_id>/attempts/N/reads.jsonl, work/        somebody else's script, where one is run in place of the trainer
    runs/<run_id>/attempts/N/result.json               trainer (or worker), whole, last
    runs/<run_id>/artifact.bin, checkpoint/            trainer
    runs/<run_id>/verify.json, audit.json              orchestrator, when somebody checks the run, replaced by the next check

A data set is a folder of shards, a tokenizer and `manifest.json`, which says what belongs to it: `DataDir`, `Manifest`.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trainer.errors import ProtocolError, StorageError

T = TypeVar("T")

PROTOCOL = 1

# Stages of evaluation, in the order in which a run reaches them.
POST_EMA, ROUNDTRIP, SLIDING, TTT = "post_ema", "roundtrip", "sliding", "ttt"
STAGES = (POST_EMA, ROUNDTRIP, SLIDING, TTT)

# Kinds of event.
START, PHASE, METRIC, WARNING = "start", "phase", "metric", "warning"
CHECKPOINT = "checkpoint"
KEPT = "kept"  # state of a checkpoint: it ends an attempt's training
RESTORED = "restored"  # it begins it
SCORED, LEARNED = "scored", "learned"  # of a chunk of positions: its score is fixed; later chunks may depend on it

# What a run takes from another instead of training.
ARTIFACT = "artifact"
WEIGHTS = "weights"

# Names of values in a metric event that the control plane reads.
TRAIN_LOSS = "train_loss"
VAL_LOSS = "val_loss"  # on a part of the validation split, in the middle of training; nats per token
TOKENS_PER_SECOND = "tokens_per_second"  # over the run's training so far
ELAPSED_FRAC = "elapsed_frac"  # part of the run's own schedule, by its own clock, that is used up after the step

GIVEN_UP = b"given up\n"  # content of a stop file: at once, what the attempt has is not wanted

# Status of a result.
COMPLETE, FAILED, STOPPED = "complete", "failed", "stopped"

# Kinds of failure. The first three are the machine's: the run is attempted again. The others belong to the configuration.
# A node that failed, or was refused, gets no more runs after a while; who was pre-empted has only lost his place.
INFRASTRUCTURE = "infrastructure"
NODE = "node"
PREEMPTED = "preempted"
TIMEOUT = "timeout"
CONFIG, DATA, OUT_OF_MEMORY, NOT_FINITE, OVER_CAP, PARITY, DISK, CODE = (
    "config", "data", "out_of_memory", "not_finite", "over_cap", "parity", "disk", "code",
)  # fmt: skip
RETRYABLE = frozenset({INFRASTRUCTURE, NODE, PREEMPTED})


@dataclass(frozen=True)
class AttemptDir:
    """Names every file of one execution of a run."""

    root: Path

    @property
    def number(self) -> int:
        return int(self.root.name)

    @property
    def job(self) -> Path:
        return self.root / "job.json"

    @property
    def claim(self) -> Path:  # made by exclusive creation: a second copy of the same attempt finds it and leaves
        return self.root / "claim.json"

    @property
    def demands(self) -> Path:  # without it the nodes are not checked
        return self.root / "demands.json"

    def node_check(self, node: int) -> Path:  # what was found of a node of the job before the trainer started
        return self.root / f"node_check{node}.json"

    @property
    def env(self) -> Path:
        return self.root / "env.json"

    def system(self, node: int = 0) -> Path:  # worker, a line a sample of the node's GPUs: unix time, a table a GPU
        return self.root / f"system-{node}.jsonl"

    @property
    def stop(self) -> Path:
        return self.root / "stop"

    @property
    def notice(
        self,
    ) -> Path:  # not a stop: a run that may be resumed keeps a checkpoint and leaves, to be attempted again
        return self.root / "notice"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def no_room(self) -> Path:  # empty, since that takes no room: the worker had a result and could not write it
        return self.root / "no_room"

    @property
    def overdue(self) -> Path:  # empty: its time was up before its trainer was told to leave
        return self.root / "overdue"

    @property
    def stdout(self) -> Path:
        return self.root / "stdout.log"

    @property
    def stderr(self) -> Path:
        return self.root / "stderr.log"

    def node_failure(
        self, node: int
    ) -> Path:  # of a run on several nodes: what the worker on another than the first says
        return self.root / f"node{node}.json"

    @property
    def work(self) -> Path:  # the current directory of somebody else's script, where it leaves its log and its files
        return self.root / "work"

    @property
    def reads(self) -> Path:  # the environment variables that such a script looked at, one JSON object a line
        return self.root / "reads.jsonl"

    @property
    def scheduler(self) -> Path:  # the scheduler's own files; fresh for each attempt, so that no old answer is found
        return self.root / "scheduler"


@dataclass(frozen=True)
class RunDir:
    """Names every file of a run; no other module spells a file name."""

    root: Path

    @property
    def run_id(self) -> str:
        return self.root.name

    @property
    def spec(self) -> Path:
        return self.root / "spec.json"

    @property
    def bundle(self) -> Path:
        return self.root / "train_gpt.py"

    @property
    def artifact(self) -> Path:
        return self.root / "artifact.bin"

    @property
    def source(self) -> Path:  # the model file of another run, or its weights, where this one trains nothing
        return self.root / "source.bin"

    @property
    def weights(self) -> Path:  # final averaged weights, unquantised, in the flat format
        return self.root / "checkpoint" / "weights.bin"

    @property
    def checkpoint(self) -> Path:  # training as the latest attempt that had to leave left it
        return self.root / "checkpoint" / "training.bin"

    @property
    def recheck(self) -> Path:  # a result: what the model file alone scores
        return self.root / "recheck.json"

    @property
    def verify(self) -> Path:  # what a clean-room check of this run found
        return self.root / "verify.json"

    @property
    def audit(self) -> Path:  # what probes of this run's stored model and a replay of its events found
        return self.root / "audit.json"

    def attempt(self, number: int) -> AttemptDir:
        return AttemptDir(self.root / "attempts" / str(number))

    def attempts(self) -> list[AttemptDir]:
        """The attempts made so far, oldest first."""
        folder = self.root / "attempts"
        if not folder.is_dir():
            return []
        numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())  # others were moved away
        return [self.attempt(number) for number in numbers]

    def is_newest(self, attempt: AttemptDir) -> bool:
        """Whether no later attempt owns the run: one that does not own it any more must leave without writing."""
        return all(other.number <= attempt.number for other in self.attempts())


# Splits of a data set.
TRAIN, VALIDATION = "train", "val"
SPLITS = (TRAIN, VALIDATION)

DATA_FORMAT = 1


@dataclass(frozen=True)
class DataDir:
    """Names every file of a data set. A reader takes the shards' names from the manifest."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer.model"

    @property
    def documents(self) -> Path:  # a line a document: split, SHA-256 of its scored text, raw bytes, counted bytes
        return self.root / "documents.txt"

    def shard(self, split: str, number: int) -> Path:
        return self.root / f"{split}_{number:06d}.bin"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of tokens; a document crosses two only in a published export."""

    file: str
    tokens: int
    bytes: int
    """Size of the file."""

    sha256: str
    first_document: int
    """Documents of the split that begin before it."""

    documents: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """The shards of one split, and their totals."""

    shards: tuple[Shard, ...]
    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the normalised text: the denominator of bits per byte."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a data set consists of. Written last."""

    source: str
    """Where the text comes from, for people."""

    recipe: dict[str, Any]
    """Inputs and settings of the preparation: the same recipe makes the same data set."""

    tokenizer: str
    """File name of the SentencePiece model."""

    tokenizer_sha256: str
    vocab_size: int
    splits: dict[str, Split]
    format: int = DATA_FORMAT


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Everything a run is asked to do. Written before the launch, never changed."""

    run_id: str
    seed: int
    replicate: int
    preset: str
    config: dict[str, dict[str, Any]]
    data_dir: str
    manifest_sha256: str
    bundle_sha256: str
    code: dict[str, str]
    """`git_sha` of the orchestrator's checkout and `diff_sha256` of its uncommitted changes, where there is one."""

    source: str = ""
    """Run whose model is scored again, where nothing is trained; empty for a run that trains."""

    source_sha256: str = ""
    """Of the file that is taken from it."""

    source_part: str = ARTIFACT
    """What is taken from it: the model file ARTIFACT, or the trained WEIGHTS, which are then quantised anew."""

    script: str = ""
    """Name of the program of somebody else's that is run in place of our trainer, `config` holding its environment."""

    gpus: int = 0
    """Part of the run's identity, where it is to be told from the same configuration on another number of GPUs; else 0."""

    study: str = ""
    """Study that asked first; another may ask for the same run and is told the same result."""

    trial: int | None = None
    protocol: int = PROTOCOL


@dataclass(frozen=True, kw_only=True)
class Failure:
    kind: str
    message: str
    log: str = ""
    """Path of the log and its last lines, for people."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One evaluation: sums over the scored positions, in float64."""

    nats: float
    tokens: int
    bytes: int
    loss: float
    """Nats per token."""

    bpb: float
    """Bits per byte."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an attempt ended with."""

    run_id: str
    attempt: int
    status: str
    seed: int
    failure: Failure | None = None
    steps: int = 0
    tokens: int = 0
    """Training tokens seen."""

    train_seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase, on the one clock from process start."""

    scores: dict[str, Score] = field(default_factory=dict)
    chains: dict[str, str] = field(default_factory=dict)
    """Last link of each stage's chain of scored chunks: binds the score to the events, and both to the artifact."""

    parity_nats: float | None = None
    """First TTT chunk before any update minus what the plain network gives the same tokens, nats per token."""

    bundle_bytes: int = 0
    model_bytes: int = 0
    artifact_bytes: int = 0
    cap_bytes: int = 0
    parameters: int = 0
    world_size: int = 1
    device: str = ""
    peak_memory_bytes: int = 0
    artifact_sha256: str = ""
    bundle_sha256: str = ""
    final_train_loss: float | None = None
    resumed_from: dict[str, float] = field(default_factory=dict)
    """Training seconds of each earlier attempt that this one's training continues, by its number; they are a part of
    `train_seconds`. Empty where it began from scratch.
    """

    protocol: int = PROTOCOL


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def storage_error(error: OSError, path: Path) -> StorageError:
    """The same failure in words that name the remedy."""
    hint = "free some space, or set CADDIE_HOME to a directory of your own; nothing was lost: run the command again"
    is_known = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
    return StorageError(f"{path}: cannot be written: {error.strerror or error}", hint=hint if is_known else None)


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees all of it or none of it; raises StorageError."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, path) from error


def write_json_atomically(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON so that a reader sees all of it or none of it; raises StorageError."""
    write_bytes_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object; raises ProtocolError, FileNotFoundError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"{path}: not a JSON object: {error}", hint="the file is damaged; move it away") from error
    if not isinstance(content, dict):
        raise ProtocolError(f"{path}: not a JSON object but a {type(content).__name__}")
    return content


def append_line(path: Path, record: Mapping[str, object], *, durable: bool = False) -> None:
    """Append one JSON object as one line, by one write; `durable` also waits for the disk. Raises StorageError."""
    line = (json.dumps(record, separators=(",", ":")) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise storage_error(error, path) from error


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset after the line, object) for each finished line from byte `offset`.

    A last line with no newline is still being written and is left for later; a damaged one before it raises
    ProtocolError with its place.
    """
    if not path.exists():
        return
    with path.open("rb") as lines:
        lines.seek(offset)
        for line in lines:
            if not line.endswith(b"\n"):
                return
            start, offset = offset, offset + len(line)
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ProtocolError(
                    f"{path}: byte {start}: not a JSON object: {line[:80]!r}",
                    hint="the line is damaged; delete it, or move the attempt's directory away",
                ) from error
            if not isinstance(record, dict):
                raise ProtocolError(f"{path}: byte {start}: not a JSON object: {line[:80]!r}")
            yield offset, record


def values_of(event: Mapping[str, Any], *names: str) -> list[float] | None:
    """The named values of a metric event; None for another kind of event, or one that lacks any of them."""
    values = event.get("values", {}) if event.get("kind") == METRIC else {}
    return [float(values[name]) for name in names] if set(names) <= set(values) else None


def _from_record(cls: type[T], record: Mapping[str, Any], path: Path) -> T:
    """Build a dataclass of the contract from a file's object."""
    _require_fields(cls, record, path)
    return cls(**record)


def _require_fields(cls: type[Any], record: Mapping[str, Any], path: Path) -> None:
    """Raise ProtocolError that names what a record lacks or has too much."""
    names = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(record) - set(names))
    missing = sorted(
        name
        for name, f in names.items()
        if name not in record and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    if unknown or missing:
        raise ProtocolError(f"{path}: {cls.__name__.lower()} has unknown keys {unknown} and lacks {missing}")


def require_types(record: Any, path: Path) -> None:
    """Raise ProtocolError where a number or a text of a record from the file is something else."""
    number = (int, float)
    plain: dict[str, Any] = {"int": int, "str": str, "float": number, "float | None": (*number, type(None))}
    for f in dataclasses.fields(record):
        value, name = getattr(record, f.name), str(f.type)  # the type as it is written
        if name in plain and (not isinstance(value, plain[name]) or isinstance(value, bool)):
            raise ProtocolError(
                f"{path}: {type(record).__name__.lower()} {f.name} must be of type {name}, got {value!r}",
                hint="the file is damaged: put it back, or make it again",
            )


def read_spec(path: Path) -> Spec:
    """Read `spec.json`; raises ProtocolError for another protocol or a damaged file."""
    record = read_json(path)
    _require_protocol(record, path)
    return _from_record(Spec, record, path)


def _require_protocol(record: Mapping[str, Any], path: Path) -> None:
    """Raise ProtocolError where a spec is not of this protocol."""
    if record.get("protocol") != PROTOCOL:
        raise ProtocolError(
            f"{path}: protocol {record.get('protocol')!r}, this code speaks {PROTOCOL}",
            hint="use the version of caddie that wrote the run, or ask for the run again",
        )


def read_result(path: Path) -> Result:
    """Read `result.json`; raises ProtocolError."""
    record = read_json(path)
    try:
        if record.get("failure"):
            record["failure"] = _from_record(Failure, record["failure"], path)
        scores = record.get("scores", {}).items()
        record["scores"] = {stage: _from_record(Score, score, path) for stage, score in scores}
    except (TypeError, AttributeError) as error:
        raise ProtocolError(f"{path}: failure and scores must be tables", hint="the file is damaged") from error
    result = _from_record(Result, record, path)
    for part in (result, *result.scores.values()):
        require_types(part, path)
    return result


def read_manifest(path: Path) -> Manifest:
    """Read a data set's manifest; raises ProtocolError for another format or a damaged file, FileNotFoundError."""
    record = read_json(path)
    _require_manifest(record, path)
    splits = {
        name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
        for name, split in record["splits"].items()
    }
    return Manifest(**{**record, "splits": splits})


def _require_manifest(record: Mapping[str, Any], path: Path) -> None:
    """Raise ProtocolError where a record is not a manifest of this format, whole."""
    if record.get("format") != DATA_FORMAT:
        raise ProtocolError(
            f"{path}: data format {record.get('format')!r}, this code reads {DATA_FORMAT}",
            hint="prepare the data set again with this version of caddie",
        )
    _require_fields(Manifest, record, path)
    splits = record["splits"]
    tables: list[Any] = list(splits.values()) if isinstance(splits, dict) else [None]
    lists = [split.get("shards") if isinstance(split, dict) else None for split in tables]
    if not all(isinstance(shards, list) and all(isinstance(shard, dict) for shard in shards) for shards in lists):
        raise ProtocolError(f"{path}: splits must be tables with lists of shards")
    for split in tables:
        for shard in split["shards"]:
            _require_fields(Shard, shard, path)
        _require_fields(Split, split, path)
    if set(splits) != set(SPLITS):
        raise ProtocolError(f"{path}: splits must be {' and '.join(SPLITS)}, got {sorted(splits)}")


def write_manifest(path: Path, manifest: Manifest) -> None:
    write_json_atomically(path, dataclasses.asdict(manifest))


def write_spec(path: Path, spec: Spec) -> None:
    write_json_atomically(path, dataclasses.asdict(spec))


def write_result(path: Path, result: Result) -> None:
    write_json_atomically(path, dataclasses.asdict(result))


def process_started() -> float:
    """Unix time at which this process started: the zero of its event clock."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()


class EventLog:
    """The event file of one attempt; `t` of each line is seconds since the process started. A log without a path is silent."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.started = process_started()
        self.phases: dict[str, float] = {}
        """Seconds of the phases that have ended."""

        self._zero = time.monotonic() - (time.time() - self.started)

    def seconds(self) -> float:
        """Seconds since the process started."""
        return time.monotonic() - self._zero

    def emit(self, kind: str, **fields: object) -> None:
        """Append one event; raises StorageError."""
        if self.path is not None:
            append_line(self.path, {"kind": kind, "t": round(self.seconds(), 4), **fields})

    @contextmanager
    def phase(self, name: str, settle: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Time a phase of the run, which may come in parts; `settle` waits for the device, so that its work falls into
        the phase it belongs to.
        """
        begin = self.seconds()
        self.emit(PHASE, name=name, state="start")
        yield
        settle()
        seconds = round(self.seconds() - begin, 4)
        self.phases[name] = round(self.phases.get(name, 0.0) + seconds, 4)
        self.emit(PHASE, name=name, state="end", seconds=seconds)

    def metrics(self, step: int, train_seconds: float, **values: float) -> None:
        """Append the values measured at one step."""
        self.emit(METRIC, step=step, train_seconds=round(train_seconds, 4), values=values)


def first_link(stage: str, artifact_sha256: str) -> str:
    """What a stage's chain of scored chunks begins with."""
    return hashlib.sha256((stage + artifact_sha256).encode()).hexdigest()


def next_link(link: str, record: Mapping[str, object]) -> str:
    """SHA-256 of the link before and of a chunk's record as canonical JSON, in which a float keeps every digit."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256((link + text).encode()).hexdigest()


class ScoreChain:
    """Puts the chunks of one stage into the log in the order in which they are scored and learned from."""

    def __init__(self, log: EventLog, stage: str, artifact_sha256: str) -> None:
        self.log, self.stage = log, stage
        self.link = first_link(stage, artifact_sha256)

    def scored(self, chunk: int, first: int, last: int, **sums: object) -> None:
        """Fix the sums over positions first ... last - 1 of all processes. Raises StorageError."""
        record = {"stage": self.stage, "chunk": chunk, "first": first, "last": last, **sums}
        self.link = next_link(self.link, record)
        self.log.emit(SCORED, **record, chain=self.link)

    def learned(self, chunk: int, first: int, last: int) -> None:
        """Note that what is scored from here on may depend on these positions. Raises StorageError."""
        self.log.emit(LEARNED, stage=self.stage, chunk=chunk, first=first, last=last)
