"""Makes record folders as others publish them: logs of each family in words of our own, with the lines that matter.

log = colon_log(seed=42, scores=[("final_int6_sliding_window_exact", 2.5, 1.2)])
make_folder(tmp_path / "2026-04-01_Some_Record", {"train_seed42.log": log}, submission={...})
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Score = tuple[str, float]  # label and bits per byte
SP1024, SP4096 = 0.4105208, 0.3012338
CODE, MODEL = 50_000, 15_800_000


def loss_of(bpb: float, ratio: float = SP4096) -> float:
    """The loss that gives these bits per byte at so many tokens per byte."""
    return bpb * math.log(2) / ratio


def score_line(label: str, bpb: float, *, ratio: float = SP4096, seconds: float | None = 60.0, rest: str = "") -> str:
    """A line with all its digits, as family B prints it, and A without the time."""
    time = "" if seconds is None else f" eval_time:{round(1000 * seconds)}ms"
    return f"{label} val_loss:{loss_of(bpb, ratio):.8f} val_bpb:{bpb:.8f}{rest}{time}"


def colon_log(
    *, seed: int = 1337, scores: Iterable[str] = (), steps: int = 9000, code: int = CODE, model: int = MODEL,
    form: str | None = "int8+zlib", seconds: float = 600.04, parameters: int = 17_000_000, source: bool = True,
) -> str:  # fmt: skip
    """Family A: `key:value` without blanks, the script itself before the run."""
    script = ['        log0(f"final_made_up_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{ms:.0f}ms")']
    total = [f"Total submission size {form}: {code + model} bytes"] if form else []
    ms = round(1000 * seconds)
    lines = [
        *(script if source else []),
        "val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./some.model",
        "train_loader:dataset:made_up train_shards:80",
        "val_loader:shards pattern=./made_up_val_*.bin tokens:62021632",
        f"model_params:{parameters}",
        "world_size:8 grad_accum_steps:1",
        "tie_embeddings:True embed_lr:0.05 matrix_lr:0.04",
        "train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000",
        f"seed:{seed}",
        "warmup_step:1/20",
        "step:0/20000 val_loss:6.9000 val_bpb:4.1000 train_time:0ms step_avg:0.01ms",
        "step:1000/20000 train_loss:2.5000 train_time:60000ms step_avg:60.00ms",
        f"step:{steps}/20000 val_loss:2.0600 val_bpb:1.2200 train_time:{ms}ms step_avg:66.00ms",
        f"stopping_early: wallclock_cap train_time:{ms}ms step:{steps}/20000",
        "peak memory allocated: 10000 MiB reserved: 10200 MiB",
        "Serialized model: 67000000 bytes",
        f"Code size: {code} bytes",
        f"Total submission size: {67_000_000 + code} bytes",
        f"Serialized model {form or 'plain'}: {model} bytes (payload:17000000 raw_torch:17100000 payload_ratio:3.90x)",
        *total,
        *scores,
    ]
    return "\n".join(lines) + "\n"


def slash_log(
    *, seed: int = 42, scores: Iterable[str] = (), steps: int = 5000, code: int = CODE, model: int = MODEL,
    settings: Mapping[str, object] | None = None, trains: bool = True, stamp: str = "", tokens: int = 45_508_608,
) -> str:  # fmt: skip
    """Family B: a block of hyper-parameters, `step/steps key: value`; without training, an evaluation of a stored model."""
    chosen = {"matrix_lr": 0.02, "seed": seed, "train_batch_tokens": 786_432, "world_size": 8, **(settings or {})}
    lines = [
        "W0403 14:36:49.421000 68590 torch/distributed/run.py:803] *****************************************",
        "Hyperparameters:", *(f"  {name}: {chosen[name]}" for name in sorted(chosen)),
        f"train_shards: {80 if trains else 0}", f"val_tokens: {tokens}",
    ]  # fmt: skip
    if trains:
        lines += [
            "model_params:34000000", "warmup_step: 1/20", "0/20000 val_loss: 8.3000 val_bpb: 3.6000",
            "500/20000 train_loss: 2.9000 train_time: 0.8m tok/s: 8000000",
            f"{steps}/20000 val_loss: 2.5000 val_bpb: 1.1000",
            f"stopping_early: wallclock_cap train_time: 590020ms step: {steps}/20000",
            "peak memory allocated: 30000 MiB reserved: 30100 MiB", "Serialized model: 132000000 bytes",
            "Code size (uncompressed): 150000 bytes", f"Code size (compressed): {code} bytes",
            "GPTQ:collected 66 Hessians in 9.8s", f"Serialized model quantized+brotli: {model} bytes",
            f"Total submission size quantized+brotli: {code + model} bytes",
        ]  # fmt: skip
    lines += list(scores)
    return "\n".join(stamp + line for line in lines) + "\n"


def short_log(*, seed: int = 42, bpb: float = 1.1565) -> str:
    """Family C: the ternary trainers'."""
    return "\n".join(
        [
            "Python 3.13.0 | made up", f"activation_type=relu2 matrix_lr=0.04 seed={seed}",
            f"params:73000000 L:10 d:768 h:8 kv:4 ws:8 ga:1 s:{seed}", "warmup:1/5",
            "step:1000/10000 loss:3.3000 t:91000ms avg:91.0ms",
            "step:6500/10000 val_loss:3.0500 val_bpb:1.1800 train_time:599650ms zero_frac:0.336",
            "stopping_early: wallclock_cap train_time:599650ms step:6500/10000",
            "artifact:15.92MB ternary:64880640(14239486B) fp:2513744(2537376B) code:70000",
            "budget:15990000/16000000 (15.99/16.00MB) FITS", "final_ternary_roundtrip val_loss:3.0570 val_bpb:1.1837",
            "temp_scaling optimal_T:0.90 eval_time:146ms",
            f"final_sliding val_loss:2.9869 val_bpb:{bpb:.4f} (stride=16, T=0.90) eval_time:429311ms",
        ]
    )  # fmt: skip


def make_folder(
    folder: Path, files: Mapping[str, str], *, submission: Mapping[str, Any] | str | None = None,
    readme: str = "# Made up\n", name: str = "submission.json",
) -> Path:  # fmt: skip
    """A record folder; `submission` as a text keeps its decimals."""
    folder.mkdir(parents=True, exist_ok=True)
    if submission is not None:
        (folder / name).write_text(submission if isinstance(submission, str) else json.dumps(submission, indent=1))
    if readme:
        (folder / "README.md").write_text(readme)
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder


def seed_results(scores: Mapping[int, float], **more: Any) -> str:
    """A submission.json with scores by seed, eight decimals, and their mean."""
    results = ",".join(f'"{seed}": {{"val_bpb": {bpb:.8f}}}' for seed, bpb in scores.items())
    extra = "".join(f', "{name}": {json.dumps(value)}' for name, value in more.items())
    center = sum(scores.values()) / len(scores)
    return f'{{"val_bpb": {center:.8f}, "seeds": {json.dumps(list(scores))}, "seed_results": {{{results}}}{extra}}}'
