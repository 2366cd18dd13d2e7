"""Makes runs to audit without training: `make_verified`'s, with events, and the numbers that probes of a sound run give."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

from make_verified import BPB, edit_result, make_run, score

from trainer import protocol
from trainer.protocol import AttemptDir, EventLog, RunDir, ScoreChain

CHUNK = 100
POSITIONS, SIZE = 300, 1800  # of make_verified's scores


def make_audited(root: Path, **options: Any) -> RunDir:
    """A complete run with its log."""
    run = make_run(root, **options)
    log_run(run, run.attempt(1))
    return run


def log_run(run: RunDir, attempt: AttemptDir, *, first_loss: float = 6.5) -> None:
    """Write the events that the run's scores follow from, and the chains' ends into its result."""
    attempt.events.unlink(missing_ok=True)
    result = protocol.read_result(run.attempt(1).result)
    log, chains = EventLog(attempt.events), {}
    log.emit(protocol.START, run_id=run.run_id, seed=result.seed)
    log.metrics(1, 0.5, train_loss=first_loss)
    scores = {}
    first_nats = score(BPB[protocol.SLIDING]).nats / 4  # of the stages that learn or might, alike
    for stage, bpb in BPB.items():
        chain = ScoreChain(log, stage, result.artifact_sha256)
        rest = score(bpb).nats - first_nats
        parts = [first_nats, rest / 3, rest * 2 / 3]
        scores[stage] = dataclasses.replace(score(bpb), nats=math.fsum(parts), loss=math.fsum(parts) / POSITIONS)
        for chunk, nats in enumerate(parts):
            first, last = chunk * CHUNK, (chunk + 1) * CHUNK
            chain.scored(chunk, first, last, nats=nats, tokens=CHUNK, bytes=SIZE // 3)
            if stage == protocol.TTT and chunk < 2:
                chain.learned(chunk, first, last)
        chains[stage] = chain.link
    edit_result(run, scores=scores, chains=chains, parity_nats=1e-7, parameters=77, train_seconds=250.0)


def moved(**changes: Any) -> dict[str, Any]:
    still = {"compared": 1000, "moved": 0, "largest": 0.0, "mean": 0.0, "control": 900, "noise": 0.0}
    return {**still, **changes}


def sound(run: RunDir) -> dict[str, Any]:
    """What the probes of a sound run measure."""
    coverage = {"positions": 300, "never": 0, "again": 0, "tokens": 300, "bytes": 1800, "stream_bytes": 1800}
    distribution = {"positions": 8, "context": 32, "largest_log_sum": 2e-7, "largest_entry_gap": 0.0}
    ways = {way: moved() for way in ("future", "target", "targets", "inputs", "other rows")}
    nats = score(BPB[protocol.SLIDING]).nats / 4
    probes: dict[str, Any] = {
        "account": [], "bytes": {"documents": 9, "counted": 1700, "spelled": 1700, "wrong": 0}, "parity": 0.0,
        "first_chunk": {"last": CHUNK, "nats": nats, "bytes": SIZE // 3},
    }  # fmt: skip
    for prefix in ("", "ttt_"):
        probes[f"{prefix}future"] = copy.deepcopy(ways)
        probes[f"{prefix}distribution"] = dict(distribution)
        probes[f"{prefix}reach_back"] = moved()
        probes[f"{prefix}boundary"] = moved(moved=30, largest=0.2, mean=0.01)
        probes[f"{prefix}coverage"] = dict(coverage)
    return {
        "probes": probes, "config": protocol.read_spec(run.spec).config, "parameters": 77, "device": "cpu",
        "data": {
            "variant": None, "targets": POSITIONS, "counted_bytes": SIZE, "published": None,
            "overlap": {
                "val_documents": 10, "train_documents": 90, "repeated": 0, "repeated_tokens": 0, "first": None,
                "most_repeated": 0,
            },
        },
        "sample": {
            "seed": 0, "first": 0, "last": 300, "positions": 300, "chunk_tokens": CHUNK, "length": 32, "stride": 16,
        },
    }  # fmt: skip
