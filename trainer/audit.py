"""The audit of a run by its own model file and validation split: which probe is put to which part of it, on what sample.

Everything is drawn from one seed. Nothing is judged here: the outcome is numbers, and the facts to read them by.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import artifact, probes, protocol
from trainer.attention import fastest_kernels
from trainer.by_document import Documents, evaluate_documents
from trainer.config import Config, from_mapping
from trainer.data import BOS, Dataset
from trainer.distributed import World, start_world
from trainer.errors import ConfigError
from trainer.evaluate import Stream, Tally, evaluate
from trainer.graphs import Recorded
from trainer.main import Run, StopSignal, device_name, stored_model, stream_of, windows_of
from trainer.model import Model
from trainer.overlap import overlap
from trainer.prepare import Say
from trainer.probes import Book, Committed, Driver, Judged
from trainer.protocol import TRAIN, VALIDATION, EventLog, RunDir
from trainer.publication import KNOWN, LOG_BYTES, VARIANT, WINDOW_TOKENS, stream_bytes
from trainer.ttt import ChunkAdapter, DocumentAdapter
from trainer.verification import REPEATED_FRAC, Speller

# Dimensions: B rows, L tokens of a row and its last target, P positions of a stream.

CHUNKS = 4  # of test-time training in a sample, at least, where it is long enough: one learned from on either side
BOUNDARIES = 8  # between documents, looked at
ASKED_TOKENS = 64  # tokens a network reads to spell distributions out, for each position of the sample
DISTRIBUTIONS = 8  # spelled out, with as much context as that affords ...
FEWEST_CONTEXT = 8  # ... and this much at least
TTT_PREFIX = "ttt_"
"""Of the names of probes of what learns."""


@dataclass(frozen=True)
class Sampling:
    """How much of the split is looked at."""

    positions: int
    """Positions that whole evaluations score, at most; the other probes' share follows from it."""

    seed: int

    def __post_init__(self) -> None:
        if self.positions < 1:
            raise ConfigError(f"--sample must be at least 1 position, got {self.positions}", hint="--sample 32768")


@dataclass
class Subject:
    """A run's stored model and its split, ready to be probed."""

    run: Run
    model: Model
    recurrent: int
    stream: Stream
    sampling: Sampling
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.sampling.seed)

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def world(self) -> World:
        return self.run.world

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return min(self.config.evaluation.sequence_length, self.stream.positions)

    @property
    def stride(self) -> int:
        is_flat = self.config.evaluation.protocol == "flat"
        return self.length if is_flat else min(self.config.evaluation.stride, self.length)

    @property
    def is_by_document(self) -> bool:
        """Whether documents are scored apart, before anything adapts."""
        return self.config.evaluation.protocol == "documents"

    # -- samples --

    @property
    def size(self) -> int:
        """Positions of a sample."""
        return min(self.sampling.positions, self.stream.positions)

    @functools.cached_property
    def documents_D(self) -> Tensor:
        return self.stream.documents(BOS)

    def slice(self, first: int, last: int) -> Stream:
        """Positions first ... last - 1 as a stream of their own."""
        return Stream(self.stream.tokens_N[first : last + 1], self.stream.target_bytes_P[first:last])

    @functools.cached_property
    def sample(self) -> tuple[int, int]:
        """The positions of whole evaluations: a document's beginning, and where the sample ends."""
        begins = self.documents_D[self.documents_D <= self.stream.positions - self.size]
        first = int(begins[self.draw(len(begins))])
        return first, first + self.size

    def draw(self, count: int) -> int:
        """A number below `count`."""
        return int(torch.randint(count, (), generator=self.generator))

    def rows(self, count: int, length: int) -> Tensor:
        """Pieces of the split, anywhere in it, (B, L)."""
        starts = torch.randint(self.stream.positions - length + 1, (count,), generator=self.generator)
        columns = starts[:, None] + torch.arange(length + 1)
        return self.stream.tokens_N[columns.to(self.stream.tokens_N.device)].long()

    # -- whole evaluations --

    @functools.cached_property
    def chunk_tokens(self) -> int:
        """Positions of a chunk in a sample: the run's own, or fewer, so that there are some chunks."""
        length, wanted = self.config.evaluation.sequence_length, self.size // CHUNKS
        return min(self.config.ttt.chunk_tokens, max(1, wanted // length) * length)

    def plain(self, stream: Stream) -> Committed:
        """The evaluation by the run's protocol, without learning."""
        book = Book(stream)
        evaluate(
            Recorded(self.model.nats, is_pure=True), stream, windows_of(self.run, protocol.SLIDING, stream), tally=book,
            config=self.config.evaluation, recurrent=self.recurrent, world=self.world,
            chunk_tokens=stream.positions if self.config.ttt.method == "off" else self.chunk_tokens,
        )  # fmt: skip
        return book.committed()

    def adapting(self, stream: Stream) -> Committed:
        """The evaluation with test-time training, each time from the stored weights."""
        return self.adapt(copy.deepcopy(self.model), stream)

    def adapt(self, model: Model, stream: Stream) -> Committed:
        """The same from this model's weights, which it changes."""
        config, book = self.config.ttt, Book(stream)
        scorer = Recorded(model.nats, is_pure=True)
        if config.is_by_document:
            adapter = DocumentAdapter(model, config=config, recurrent=self.recurrent, world=self.world)
            evaluate_documents(scorer, self.apart(stream), adapter=adapter, tally=book)
        else:
            learner = ChunkAdapter(
                model, stream, config=config, length=self.config.evaluation.sequence_length, recurrent=self.recurrent,
                world=self.world,
            )  # fmt: skip
            evaluate(
                scorer, stream, windows_of(self.run, protocol.TTT, stream), config=self.config.evaluation, adapter=learner,
                recurrent=self.recurrent, world=self.world, chunk_tokens=self.chunk_tokens, tally=book,
            )  # fmt: skip
        return book.committed()

    def apart(self, stream: Stream) -> Documents:
        """A stream's documents, for adapters of their own."""
        return Documents(
            stream, stream.documents(BOS), config=self.config.ttt, length=self.config.evaluation.sequence_length,
            recurrent=self.recurrent, world=self.world,
        )  # fmt: skip

    def adapted(self) -> Model:
        """A network that has learned from a part of the sample; of documents' adapters, one of the last for all rows."""
        model, first = copy.deepcopy(self.model), self.sample[0]
        self.adapt(model, self.slice(first, min(first + 2 * self.chunk_tokens, self.stream.positions)))
        if model.lora is not None:
            for matrix in model.lora.parameters:
                matrix.data.copy_(matrix.data[:1].expand_as(matrix))
        return model.eval()


# ---- the probes --------------------------------------------------------------------------------------------------


def probe(subject: Subject, dataset: Dataset, say: Say) -> dict[str, Any]:
    """Every probe's numbers, by name."""
    found: dict[str, Any] = {}
    named: dict[str, Callable[[], Any]] = {
        **scorer_probes(subject, "", lambda: subject.model, subject.config.evaluation.batch_windows),
        **driver_probes(subject, "", subject.plain, is_by_document=subject.is_by_document),
        "account": lambda: probes.faults_taken(Tally, subject.world),
        "bytes": lambda: probes.byte_count(subject.slice(*subject.sample), Speller(dataset.tokenizer).texts),
        "first_chunk": lambda: first_chunk(subject),
    }
    if subject.config.ttt.is_scored:
        config = subject.config.ttt
        adapted = functools.cache(subject.adapted)
        rows = config.batch_documents if config.is_by_document else subject.config.evaluation.batch_windows
        is_by_document = config.is_by_document or subject.is_by_document
        named |= scorer_probes(subject, TTT_PREFIX, adapted, rows)
        named |= driver_probes(subject, TTT_PREFIX, subject.adapting, is_by_document=is_by_document)
        named["parity"] = lambda: parity(subject)
    for name, call in named.items():
        say(f"probing: {name}")
        outcome = call()
        found[name] = dataclasses.asdict(outcome) if dataclasses.is_dataclass(outcome) else outcome  # type: ignore[arg-type]  # an instance
    return found


def scorer_probes(
    subject: Subject, prefix: str, network: Callable[[], Model], rows: int
) -> dict[str, Callable[[], Any]]:
    """Of a network, asked for so many rows at once."""

    def judged() -> Judged:
        scorer = Recorded(network().eval().nats, is_pure=True)
        return Judged(scorer, subject.recurrent, subject.config.model.vocab_size, rows)

    return {
        f"{prefix}future": lambda: probe_future(subject, judged()),
        f"{prefix}distribution": lambda: probe_distribution(subject, judged()),
    }


def driver_probes(
    subject: Subject, prefix: str, driver: Driver, *, is_by_document: bool
) -> dict[str, Callable[[], Any]]:
    """Of a whole evaluation."""
    return {
        f"{prefix}reach_back": lambda: probe_reach_back(subject, driver, keeps_bos=is_by_document),
        f"{prefix}boundary": lambda: probe_boundary(subject, driver),
        f"{prefix}coverage": lambda: probe_coverage(subject, driver),
    }


def probe_future(subject: Subject, judged: Judged) -> dict[str, Any]:
    """C1 on rows of the split, with all their positions asked for, and with as many as a window scores."""
    count = max(2 * judged.rows, subject.size // subject.length)
    found: dict[str, probes.Moved] = {}
    for scored in sorted({subject.length, subject.stride}):
        for start in range(0, count, judged.rows):
            rows = subject.rows(min(judged.rows, count - start), subject.length)
            moved = probes.future_reach(judged, rows, scored=scored, generator=subject.generator)
            found = {way: found.get(way, probes.NOTHING) + value for way, value in moved.items()}
    return {way: dataclasses.asdict(value) for way, value in found.items()}


def probe_distribution(subject: Subject, judged: Judged) -> probes.Distribution:
    """C2 at as many positions, and with as much context, as the sample's size affords."""
    tokens = ASKED_TOKENS * subject.size // judged.vocab_size
    length = max(min(FEWEST_CONTEXT, subject.length), min(subject.length, tokens // DISTRIBUTIONS))
    rows = subject.rows(max(1, min(DISTRIBUTIONS, tokens // length)), length)
    return probes.distribution(judged, rows, scored=min(length, subject.stride))


def probe_reach_back(subject: Subject, driver: Driver, *, keeps_bos: bool) -> probes.Moved:
    """C1 and C3 on the sample: replaced is all from the middle of a chunk on, so that the chunk's own first half tells."""
    stream = subject.slice(*subject.sample)
    chunk = subject.chunk_tokens
    place = stream.positions // 2 // chunk * chunk + chunk // 2
    place = place if place < stream.positions else stream.positions // 2
    return probes.reach_back(
        driver, stream, place, vocab_size=subject.config.model.vocab_size, generator=subject.generator, keeps_bos=keeps_bos
    )  # fmt: skip


def probe_boundary(subject: Subject, driver: Driver) -> probes.Moved:
    """The boundaries of some documents, each with two rows of text on either side."""
    found, width = probes.NOTHING, 2 * subject.length
    begins_D = subject.documents_D[1:]
    for _ in range(BOUNDARIES if len(begins_D) else 0):
        boundary = int(begins_D[subject.draw(len(begins_D))])
        first = max(0, boundary - width)
        stream = subject.slice(first, min(boundary + width, subject.stream.positions))
        found += probes.boundary_reach(
            driver, stream, boundary - first, vocab_size=subject.config.model.vocab_size, generator=subject.generator
        )
    return found


def probe_coverage(subject: Subject, driver: Driver) -> probes.Coverage:
    stream = subject.slice(*subject.sample)
    return probes.coverage(driver(stream), stream)


def first_chunk(subject: Subject) -> dict[str, Any] | None:
    """What the split's first chunk scores without learning, in the run's own chunks; None where that is no sample."""
    config, positions = subject.config, subject.stream.positions
    size = positions if config.ttt.method == "off" else min(config.ttt.chunk_tokens, positions)
    if size > subject.sampling.positions:
        return None
    # One row more: the last windows of the chunk then stand where they stand in the whole split.
    stream = subject.slice(0, min(positions, size + config.evaluation.sequence_length))
    nats_P = subject.plain(stream).nats_P[:size].double()
    counted = int(stream.target_bytes_P[:size].sum())
    return {"last": size, "nats": math.fsum(nats_P.tolist()), "bytes": counted}


def parity(subject: Subject) -> float:
    """Nats per token by which the two paths differ before anything was learned."""
    stream = subject.slice(*subject.sample)
    if subject.config.ttt.is_by_document:
        documents, model = subject.apart(stream), copy.deepcopy(subject.model)
        plain_loss = documents.first_loss(model.nats)
        DocumentAdapter(model, config=subject.config.ttt, recurrent=subject.recurrent, world=subject.world)
        return abs(documents.first_loss(model.nats) - plain_loss)
    return probes.loss_gap(subject.plain(stream), subject.adapting(stream), subject.chunk_tokens)


# ---- the whole ---------------------------------------------------------------------------------------------------


def audit(directory: RunDir, data_dir: Path, *, sampling: Sampling, say: Say) -> dict[str, Any]:
    """Probe a run's stored model on a data set's validation split, by the run's own knobs of evaluation.

    Raises ConfigError, DataError, ProtocolError.
    """
    spec = protocol.read_spec(directory.spec)
    config = from_mapping(spec.config)
    run = Run(directory, spec, config, start_world(config.runtime), EventLog(None), StopSignal(), directory.attempt(0))
    with fastest_kernels():
        dataset = Dataset.open(data_dir, config.model.vocab_size, splits=(VALIDATION,))
        model, recurrent = stored_model(run, compiles=False)
        subject = Subject(run, model, recurrent, stream_of(run, dataset), sampling)
        found = probe(subject, dataset, say)
    say("probing: data")
    first, last = subject.sample
    return {
        "probes": found, "data": data_facts(dataset),
        "config": artifact.load(directory.artifact.read_bytes(), str(directory.artifact)).meta["config"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": device_name(run.world),
        "sample": {
            "seed": sampling.seed, "first": first, "last": last, "positions": subject.stream.positions,
            "chunk_tokens": subject.chunk_tokens, "length": subject.length, "stride": subject.stride,
        },
    }  # fmt: skip


def data_facts(dataset: Dataset) -> dict[str, Any]:
    """Totals of the validation split, what public logs say of it, and what it has in common with the training split."""
    shards = dataset.shards(VALIDATION)
    tokens_N, table = dataset.validation_tokens().numpy(), dataset.byte_counts()
    facts: dict[str, Any] = {
        "variant": dataset.manifest.recipe.get(VARIANT),
        "targets": len(tokens_N) - 1, "counted_bytes": stream_bytes(table, tokens_N), "published": None, "overlap": None,
    }  # fmt: skip
    if facts["variant"] in KNOWN:
        targets = (len(tokens_N) - 1) // WINDOW_TOKENS * WINDOW_TOKENS
        facts["published"] = {
            "targets": targets, "counted_bytes": stream_bytes(table, tokens_N[: targets + 1]),
            "window_tokens": WINDOW_TOKENS, "log_bytes": LOG_BYTES, "known": dataclasses.asdict(KNOWN[facts["variant"]]),
        }  # fmt: skip
    train_shards = dataset.manifest.splits[TRAIN].shards
    if all((dataset.folder.root / shard.file).is_file() for shard in train_shards):
        found = overlap(shards, dataset.shards(TRAIN))
        most = int(REPEATED_FRAC * found.val_documents) if facts["variant"] is not None else 0
        facts["overlap"] = {**dataclasses.asdict(found), "most_repeated": most}
    return facts
