"""A trainer that keeps the contract of a run directory and trains nothing; its bytes serve as a bundle in tests.

The score is a function of the configuration and the seed. What should go wrong is said in a file beside the run store,
`fake.json`, by seed and attempt: {"<seed>": {"mode": ..., "attempts": [1]}}, or for every run under "*". Of several
ranks the first one alone writes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, "@REPOSITORY@")

from trainer import protocol
from trainer.errors import DataError, StorageError
from trainer.protocol import EventLog, Failure, Result, RunDir, Score

STOPPING: list[int] = []


def bits_per_byte(config: dict, seed: int) -> float:
    """Lowest at weight decay 0.09 and TTT learning rate 0.002, with a little noise from the seed."""
    decay, rate = config["optim"]["muon_weight_decay"], config["ttt"]["lr"]
    return 1.1 + (decay - 0.05) ** 2 + (rate - 0.01) ** 2 + (seed % 97) * 1e-4


def plan_of(run: RunDir, seed: int, attempt: int) -> dict:
    path = run.root.parent.parent / "fake.json"
    plans = json.loads(path.read_text()) if path.exists() else {}
    plan = plans.get(str(seed), plans.get("*", {}))
    return plan if attempt in plan.get("attempts", [attempt]) else {}


def misbehave(mode: str) -> None:
    """End without a result, in the way that is asked for."""
    if mode == "traceback":
        raise RuntimeError("a plain mistake")
    if mode == "out_of_memory":
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if mode == "disk":
        raise OSError(28, "No space left on device")
    if mode == "data":
        print("error: shard 3 is truncated", file=sys.stderr)
        sys.exit(DataError.exit_code)
    if mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "silent":
        sys.exit(0)


def main() -> None:
    run, attempt = RunDir(Path(sys.argv[1])), int(sys.argv[3])
    files, spec = run.attempt(attempt), protocol.read_spec(run.spec)
    plan = plan_of(run, spec.seed, attempt)
    mode = plan.get("mode", "")
    if mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: STOPPING.append(1))
    is_first = os.environ.get("RANK", "0") == "0"
    events = EventLog(files.events if is_first else None)
    events.emit(protocol.START, seed=spec.seed)
    if is_first:
        (files.root / "trainer.pid").write_text(str(os.getpid()))
    misbehave(mode)
    bpb = bits_per_byte(spec.config, spec.seed)
    steps = 4
    step_seconds = plan.get("seconds_by_trial", {}).get(str(spec.trial), steps * plan.get("step_seconds", 0.0)) / steps
    for step in range(1, steps + 1):
        whole_steps = step * spec.config["schedule"]["steps"] // steps
        events.metrics(whole_steps, step * 0.01, train_loss=bpb * 2, elapsed_frac=step / steps)
        until = time.monotonic() + step_seconds
        while time.monotonic() < until and not STOPPING:
            time.sleep(0.01)
        if STOPPING:
            break
    failure = None
    status = protocol.STOPPED if STOPPING else protocol.COMPLETE
    artifact_bytes = 400_000
    if mode == "over_cap":
        artifact_bytes = spec.config["limits"]["artifact_bytes"] + 1000
        status, failure = protocol.FAILED, Failure(kind=protocol.OVER_CAP, message="1000 bytes over the cap")
    if mode == "not_finite":
        status, failure = protocol.FAILED, Failure(kind=protocol.NOT_FINITE, message="the loss is nan at step 3")
    score = Score(nats=bpb * 1000, tokens=300, bytes=1000, loss=bpb * 2, bpb=bpb, seconds=0.5)
    scores = {} if status == protocol.STOPPED or mode == "not_finite" else dict.fromkeys(protocol.STAGES, score)
    result = Result(
        run_id=spec.run_id, attempt=attempt, status=status, seed=spec.seed, failure=failure, steps=steps,
        train_seconds=0.04, scores=scores, artifact_bytes=artifact_bytes,
        cap_bytes=spec.config["limits"]["artifact_bytes"], bundle_sha256=spec.bundle_sha256,
    )  # fmt: skip
    if is_first:
        protocol.write_result(files.result, result)
    if mode == "lingers":
        time.sleep(600)


if __name__ == "__main__":
    try:
        main()
    except StorageError as error:
        sys.exit(error.exit_code)
