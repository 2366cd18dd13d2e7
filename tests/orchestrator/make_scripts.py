"""Makes training scripts as others write them: settings from the environment, a log of each family, seconds on a CPU.

What they compute is made up, and depends on their settings and their seed alone: BPB = 1.2 + (wd - 0.05)² + seed / 10⁶.
They read the data that they are told of, so a wrong layout fails them.

path = write_script(tmp_path, "A")              # train_gpt.py
path = write_script(tmp_path, "B", packed=True)  # that unpacks itself
"""

from __future__ import annotations

import base64
import json
import lzma
import struct
from pathlib import Path
from typing import Any

from orchestrator import variables
from orchestrator.home import Home
from orchestrator.runs import RunRequest, RunStore
from orchestrator.script import read_script
from trainer.protocol import DataDir, Manifest, RunDir, Shard, Split, sha256_of, write_manifest

TOKENS, VOCAB = 4096, 64

_SHARED = """
def count_tokens(folder):
    files = sorted(glob.glob(os.path.join(folder, "fineweb_val_*.bin")))
    if not files:
        raise FileNotFoundError(f"no shards in {folder}")
    return sum((os.path.getsize(file) - 1024) // 2 for file in files)


def bits(weight_decay, seed, shift=0.0):
    return 1.2 + (weight_decay - 0.05) ** 2 + seed / 1e6 + shift


def nats(bpb):
    return bpb * math.log(2) / 0.4105208
"""

COLON = f"""
import glob, math, os, sys, time, uuid
{_SHARED}

class Hyperparameters:
    data_path = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp64")
    tokenizer_path = os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_64_bpe.model")
    run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
    seed = int(os.environ.get("SEED", 1337))
    iterations = int(os.environ.get("ITERATIONS", 200))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 8_192))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))
    weight_decay = float(os.environ.get("WEIGHT_DECAY", 0.04))
    tie_embeddings = bool(int(os.environ.get("TIE_EMBEDDINGS", "1")))
    step_seconds = float(os.environ.get("STEP_SECONDS", 0.0))


def main():
    args = Hyperparameters()
    code = open(__file__, encoding="utf-8").read()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    os.makedirs("logs", exist_ok=True)
    def log(text, console=True):
        if rank == 0:
            if console:
                print(text, flush=True)
            with open(f"logs/{{args.run_id}}.txt", "a", encoding="utf-8") as file:
                print(text, file=file)
    log(code, console=False)
    log("Running PyTorch 9.9.9", console=False)
    assert os.path.getsize(args.tokenizer_path)
    log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={{args.tokenizer_path}}")
    log(f"train_loader:dataset:made_up train_shards:1")
    log(f"val_loader:shards pattern=made_up tokens:{{count_tokens(args.data_path)}}")
    log("model_params:12345")
    log(f"world_size:{{world}} grad_accum_steps:{{8 // world}}")
    log(f"tie_embeddings:{{args.tie_embeddings}} weight_decay:{{args.weight_decay}}")
    log(f"train_batch_tokens:{{args.train_batch_tokens}} train_seq_len:64 iterations:{{args.iterations}} warmup_steps:0 max_wallclock_seconds:{{args.max_wallclock_seconds:.3f}}")
    log(f"seed:{{args.seed}}")
    for step in range(0, args.iterations + 1, 50):
        time.sleep(args.step_seconds * 50)
        loss = 2 + 2 / (1 + step) + args.seed / 1e4
        if step:
            log(f"step:{{step}}/{{args.iterations}} train_loss:{{loss:.4f}} train_time:{{step * 20}}ms step_avg:20.00ms")
        if step % 100 == 0:
            log(f"step:{{step}}/{{args.iterations}} val_loss:{{loss + 0.1:.4f}} val_bpb:{{1.3:.4f}} train_time:{{step * 20}}ms step_avg:20.00ms")
    log("peak memory allocated: 100 MiB reserved: 120 MiB")
    if rank == 0:
        with open("final_model.int8.ptz", "wb") as file:
            file.write(bytes(7000 + args.seed))
    log("Serialized model: 40000 bytes")
    log(f"Code size: {{len(code)}} bytes")
    log(f"Total submission size: {{40000 + len(code)}} bytes")
    log(f"Serialized model int8+zlib: {{7000 + args.seed}} bytes (payload:8000 raw_torch:9000 payload_ratio:3.90x)")
    log(f"Total submission size int8+zlib: {{7000 + args.seed + len(code)}} bytes")
    bpb = bits(args.weight_decay, args.seed)
    log(f"final_int8_zlib_roundtrip val_loss:{{nats(bpb):.4f}} val_bpb:{{bpb:.4f}} eval_time:1500ms")
    log(f"final_int8_zlib_roundtrip_exact val_loss:{{nats(bpb):.8f}} val_bpb:{{bpb:.8f}}")


if __name__ == "__main__":
    main()
"""

SLASH = f"""
import glob, math, os, sys
{_SHARED}

def setting(name, default, kind=str):
    text = os.environ.get(name, str(default))
    return kind(text)


class Hyperparameters:
    data_dir = setting("DATA_DIR", "./data/")
    vocab_size = setting("VOCAB_SIZE", 64, int)
    datasets_dir = os.path.join(data_dir, "datasets", f"fineweb10B_sp{{vocab_size}}")
    seed = setting("SEED", 1337, int)
    run_id = setting("RUN_ID", "none")
    iterations = setting("ITERATIONS", 200, int)
    train_batch_tokens = setting("TRAIN_BATCH_TOKENS", 2048 * 4, int)
    max_wallclock_seconds = setting("MAX_WALLCLOCK_SECONDS", 600.0, float)
    muon_wd = setting("MUON_WD", 0.09, float)
    sliding_window_enabled = bool(setting("SLIDING_WINDOW_ENABLED", 1, int))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))


args = Hyperparameters()
print("Hyperparameters:")
for name in sorted(vars(Hyperparameters)):
    if not name.startswith("_"):
        print(f"  {{name}}: {{getattr(args, name)}}")
print("train_shards: 1")
print(f"val_tokens: {{count_tokens(args.datasets_dir)}}")
print("model_params:23456")
for step in range(100, args.iterations + 1, 100):
    print(f"{{step}}/{{args.iterations}} train_loss: {{3 - step / 1000 + args.seed / 1e4:.4f}} train_time: {{step / 1000:.1f}}m tok/s: {{args.train_batch_tokens * 20}}", flush=True)
print(f"{{args.iterations}}/{{args.iterations}} val_loss: 2.9000 val_bpb: 1.3000")
print("peak memory allocated: 100 MiB reserved: 120 MiB")
bpb = bits(args.muon_wd, args.seed)
print(f"pre-quantization post-ema val_loss:{{nats(bpb - 0.01):.8f}} val_bpb:{{bpb - 0.01:.8f}} eval_time:900ms")
open("final_model.int6.ptz", "wb").write(bytes(5000))
print("Serialized model quantized+brotli: 5000 bytes")
print("Total submission size quantized+brotli: 9000 bytes")
print(f"quantized val_loss:{{nats(bpb + 0.01):.8f}} val_bpb:{{bpb + 0.01:.8f}} eval_time:900ms")
if args.sliding_window_enabled:
    print(f"quantized_sliding_window val_loss:{{nats(bpb):.8f}} val_bpb:{{bpb:.8f}} eval_time:2000ms")
"""

SHORT = f"""
import glob, math, os
from os import environ as E
{_SHARED}

get = lambda name, default: float(E.get(name, default))
data_path = E["DATA_PATH"]
seed = int(E.get("SEED", "42"))
iterations = int(E.get("ITERATIONS", "200"))
weight_decay = get("WD", 0.04)
count_tokens(data_path)
print(f"data_path={{data_path}} iterations={{iterations}} seed={{seed}} weight_decay={{weight_decay}}")
print(f"params:34567 L:2 d:64 h:2 kv:2 ws:1 ga:8 s:{{seed}}")
for step in range(100, iterations + 1, 100):
    print(f"step:{{step}}/{{iterations}} loss:{{3 - step / 1000:.4f}} t:{{step * 10}}ms avg:10.0ms", flush=True)
    print(f"step:{{step}}/{{iterations}} val_loss:2.5000 val_bpb:1.3000 train_time:{{step * 10}}ms zero_frac:0.3")
bpb = bits(weight_decay, seed)
print("artifact:0.01MB ternary:1(2B) fp:3(4B) code:4000")
print("budget:12000/16000000 (0.01/16.00MB) FITS")
print(f"final_ternary_roundtrip val_loss:{{nats(bpb):.4f}} val_bpb:{{bpb:.4f}} eval_time:500ms")
"""

FAMILIES = {"A": COLON, "B": SLASH, "C": SHORT}


def pack(text: str) -> str:
    """A script that unpacks itself, as submissions do."""
    filters = [{"id": lzma.FILTER_LZMA2}]
    packed = base64.b85encode(lzma.compress(text.encode(), format=lzma.FORMAT_RAW, filters=filters)).decode()
    head = "import lzma as L,base64 as B\n"
    return head + f'exec(L.decompress(B.b85decode("{packed}"),format=L.FORMAT_RAW,filters=[{{"id":L.FILTER_LZMA2}}]))\n'


def write_script(folder: Path, family: str, *, packed: bool = False, changes: dict[str, str] | None = None) -> Path:
    """A script of a log family; `changes` are replacements in its text."""
    text = FAMILIES[family].lstrip()
    for old, new in (changes or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train_gpt.py"
    path.write_text(pack(text) if packed else text)
    return path


def write_shard(path: Path, tokens: int = TOKENS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<256i", 20240520, 1, tokens, *[0] * 253) + bytes(2 * tokens))


def make_data(root: Path) -> Path:
    """A data set of caddie's with one shard a split, and a tokenizer that nobody reads."""
    data = DataDir(root)
    if data.manifest.exists():
        return root
    splits = {}
    for split in ("train", "val"):
        path = data.shard(split, 0)
        write_shard(path)
        shard = Shard(
            file=path.name,
            tokens=TOKENS,
            bytes=path.stat().st_size,
            sha256=sha256_of(path),
            first_document=0,
            documents=1,
        )
        splits[split] = Split(shards=(shard,), tokens=TOKENS, documents=1, text_bytes=4 * TOKENS)
    data.tokenizer.write_bytes(b"a tokenizer")
    manifest = Manifest(
        source="made up", recipe={}, tokenizer=data.tokenizer.name, tokenizer_sha256=sha256_of(data.tokenizer),
        vocab_size=VOCAB, splits=splits,
    )  # fmt: skip
    write_manifest(data.manifest, manifest)
    return root


def make_layout(root: Path) -> Path:
    """The same as others prepare it, without a manifest."""
    dataset = root / "datasets" / "fineweb10B_sp64"
    write_shard(dataset / "fineweb_train_000000.bin")
    write_shard(dataset / "fineweb_val_000000.bin")
    (root / "tokenizers").mkdir()
    (root / "tokenizers" / "fineweb_64_bpe.model").write_bytes(b"a tokenizer")
    return root


def write_claim(folder: Path, scores: dict[int, float], **fields: Any) -> None:
    """A submission.json that claims these scores, and a README that says them too."""
    by_seed = {str(seed): {"val_bpb": bpb} for seed, bpb in scores.items()}
    mean = sum(scores.values()) / len(scores)
    submission = {"name": "Made up", "author": "Nobody", "val_bpb": round(mean, 8), "seed_results": by_seed, **fields}
    (folder / "submission.json").write_text(json.dumps(submission, indent=1))
    (folder / "README.md").write_text(f"# Made up\n\nIt scores {mean:.8f}.\n")


def plan_run(home: Home, script: Path, *, seed: int = 42, data_dir: Path | None = None, **env: str) -> RunDir:
    """A run of a script in a home, planned and not begun."""
    plan = variables.plan(read_script(script), {f"env.{name}": value for name, value in env.items()})
    request = RunRequest(
        preset="made up", config=plan.config, seed=seed, data_dir=str(data_dir or make_data(home.root / "made-up-data")),
        manifest_sha256="m" * 64, script="made up", script_values=plan.values_of({}),
    )  # fmt: skip
    return RunStore(home).plan(request, bundle=plan.pack(None), code={})
