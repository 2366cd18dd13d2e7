"""Makes finished runs to verify without training: a bundle that scores what its model file tells it to, and its data.

The model file is JSON: the bits per byte of each stage, and what the bundle does instead of scoring, where it should
misbehave. Tokens are counted in the validation shard, bytes with the tokenizer, so that other data give other counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from orchestrator.home import Home
from orchestrator.presets import load_preset
from orchestrator.runs import RunRequest, RunStore
from trainer import protocol
from trainer.config import with_knobs
from trainer.protocol import TRAIN, VALIDATION, DataDir, Manifest, Result, RunDir, Score, Shard, Split

REPOSITORY = Path(__file__).resolve().parents[2]
BPB = {protocol.ROUNDTRIP: 2.05, protocol.SLIDING: 2.01, protocol.TTT: 1.98}
STAGE_SECONDS = 0.25
CAP = 20_000

BUNDLE = '''
import json, math, os, socket, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, "@REPOSITORY@")
from trainer import protocol
from trainer.protocol import DataDir, Result, RunDir, Score

run, data = RunDir(Path(sys.argv[1])), DataDir(Path(sys.argv[sys.argv.index("--recheck") + 1]))
try:
    model = json.loads(run.artifact.read_text())
except ValueError:
    print(f"error: {run.artifact}: compressed content is damaged", file=sys.stderr)
    sys.exit(5)
mode = model.get("mode", "")
if mode == "crash":
    raise RuntimeError("a plain mistake")
if mode == "silent":
    sys.exit(0)
if mode == "garbled":
    run.recheck.write_text("{")
    sys.exit(0)
if mode == "hang":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    time.sleep(600)
if mode == "look":
    files = {str(path): oct(path.stat().st_mode & 0o777) for folder in (run, data) for path in folder.root.rglob("*")}
    print(json.dumps([files, dict(os.environ)]), file=sys.stderr)
    sys.exit(9)
if mode == "call":
    try:
        socket.create_connection(("127.0.0.1", model["port"]), timeout=5)
        print("somebody answered", file=sys.stderr)
    except OSError:
        print("nobody answered", file=sys.stderr)
    sys.exit(9)
manifest = protocol.read_manifest(data.manifest)
tokens = sum((data.root / shard.file).stat().st_size for shard in manifest.splits["val"].shards)
size = tokens * len((data.root / manifest.tokenizer).read_bytes())
scores = {}
for stage, bpb in model["bpb"].items():
    nats = bpb * math.log(2) * size
    seconds = model.get("seconds", 0.25)
    scores[stage] = Score(nats=nats, tokens=tokens, bytes=size, loss=nats / tokens, bpb=bpb, seconds=seconds)
protocol.write_result(
    run.recheck, Result(run_id="", attempt=0, status="complete", seed=0, scores=scores, world_size=1, device="cpu")
)
'''.replace("@REPOSITORY@", str(REPOSITORY)).encode()  # fmt: skip


def write_data(folder: Path, *, validation: bytes = b"tokens" * 50, tokenizer: bytes = b"pieces") -> DataDir:
    """A data set without its training shards, which no verification may need."""
    data = DataDir(folder)
    folder.mkdir(parents=True)
    data.tokenizer.write_bytes(tokenizer)
    data.shard(VALIDATION, 0).write_bytes(validation)
    protocol.write_manifest(
        data.manifest,
        Manifest(
            source="made up", recipe={}, tokenizer=data.tokenizer.name, tokenizer_sha256=digest(tokenizer),
            vocab_size=1024, splits={TRAIN: split(data, TRAIN, b"never written"), VALIDATION: split(data, VALIDATION, validation)},
        ),
    )  # fmt: skip
    return data


def split(data: DataDir, name: str, content: bytes) -> Split:
    size = len(content)
    shard = Shard(
        file=data.shard(name, 0).name, tokens=size, bytes=size, sha256=digest(content), first_document=0, documents=1
    )
    return Split(shards=(shard,), tokens=size, documents=1, text_bytes=size)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_run(root: Path, *, knobs: dict[str, Any] | None = None, **model: Any) -> RunDir:
    """A complete run whose model file holds `model`, in a home with its data set."""
    home = Home(root)
    data = write_data(home.dataset("made-up"))
    config = with_knobs(load_preset("smoke"), {"limits.artifact_bytes": CAP, **(knobs or {})})
    request = RunRequest(
        preset="smoke", config=config, seed=7, data_dir=str(data.root),
        manifest_sha256=protocol.sha256_of(data.manifest),
    )  # fmt: skip
    run = RunStore(home).plan(request, bundle=BUNDLE, code={})
    content = json.dumps({"bpb": BPB, **model}).encode()
    run.artifact.write_bytes(content)
    protocol.write_result(
        run.attempt(1).result,
        Result(
            run_id=run.run_id, attempt=1, status=protocol.COMPLETE, seed=7, scores={stage: score(bpb) for stage, bpb in BPB.items()},
            bundle_bytes=len(BUNDLE), model_bytes=len(content), artifact_bytes=len(BUNDLE) + len(content), cap_bytes=CAP,
            artifact_sha256=digest(content), bundle_sha256=digest(BUNDLE), device="cpu",
        ),
    )  # fmt: skip
    return run


def score(bpb: float, *, tokens: int = 300, size: int = 1800) -> Score:
    """What the bundle scores on the data set of `write_data`."""
    nats = bpb * math.log(2) * size
    return Score(nats=nats, tokens=tokens, bytes=size, loss=nats / tokens, bpb=bpb, seconds=STAGE_SECONDS)


def data_of(run: RunDir) -> DataDir:
    return DataDir(Path(protocol.read_spec(run.spec).data_dir))


def edit_result(run: RunDir, **changes: Any) -> None:
    """Change fields of the result, as somebody with an editor could."""
    path = run.attempt(1).result
    protocol.write_result(path, dataclasses.replace(protocol.read_result(path), **changes))


def edit_score(run: RunDir, stage: str, **changes: Any) -> None:
    scores = protocol.read_result(run.attempt(1).result).scores
    edit_result(run, scores={**scores, stage: dataclasses.replace(scores[stage], **changes)})
