"""The lines of public training logs, as tables: what a line looks like, what it says, in which unit.

Three families of log are known. A prints `key:value` without blanks (the challenge's baseline trainer and what follows
from it), B a block of hyper-parameters and `step/steps key: value` (the rewrite of #1218 and its descendants), C the
ternary and binary trainers' short lines. Numbers name threads of openai/parameter-golf. A log may hold the source of its
script: patterns begin at the start of the line and want digits, which an f-string has not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trainer.protocol import POST_EMA, ROUNDTRIP, SLIDING, TTT

COLON, SLASH, SHORT = FAMILIES = ("A", "B", "C")

# Units: how a figure is printed, and what makes of it the unit that its name carries.
COUNT, REAL, BYTES, MEBIBYTES, SECONDS, MILLISECONDS, MINUTES, TEXT = (
    "count", "number", "bytes", "MiB", "s", "ms", "min", "text",
)  # fmt: skip
Value = int | float | str
UNITS: Mapping[str, Callable[[str], Value]] = {
    COUNT: int,
    REAL: float,
    BYTES: int,
    MEBIBYTES: lambda text: int(text) * 2**20,
    SECONDS: float,
    MILLISECONDS: lambda text: int(text) / 1000,
    MINUTES: lambda text: float(text) * 60,
    TEXT: str,
}

N, F = r"(\d+)", r"(\d+\.\d+|nan|inf)"

# What a line says. Those of STARTS come once a run: where one comes again, another run begins in the same file.
START, PARAMETERS, HEADER, SEED = "start", "parameters", "header", "seed"
STARTS = (START, PARAMETERS, HEADER)
TRAIN_STEP, VAL_STEP, STOP, WORLD, TOKENS, SHARDS, PLAN, MEMORY = (
    "train step", "validation step", "stop", "world", "validation tokens", "training shards", "plan", "memory",
)  # fmt: skip
CODE, MODEL, TOTAL, UNLABELLED, BUDGET = "code", "model", "total", "unlabelled total", "budget"
SLIDING_MODE, SUBSET, EVAL_TOTAL, PHASE = "sliding mode", "subset", "evaluation total", "phase"


@dataclass(frozen=True)
class Form:
    """One kind of line: the groups of its pattern are its fields, in order."""

    says: str
    families: str
    pattern: str
    fields: tuple[tuple[str, str], ...] = ()
    """Name and unit; the value that is kept carries the name's unit."""


FORMS = (
    # who runs
    Form(START, "A", r"val_bpb:enabled tokenizer_kind="),
    Form(HEADER, "B", r"Hyperparameters:$"),
    Form(PARAMETERS, "AB", rf"model_params:{N}", (("parameters", COUNT),)),
    Form(PARAMETERS, "C", rf"params:{N} L:.* ws:{N} ga:\d+ s:{N}$",
         (("parameters", COUNT), ("world_size", COUNT), ("seed", COUNT))),
    Form(SEED, "A", rf"seed:{N}$", (("seed", COUNT),)),
    Form(SEED, "B", rf"  seed: {N}$", (("seed", COUNT),)),
    Form(WORLD, "A", rf"world_size:{N} grad_accum_steps:{N}$", (("world_size", COUNT), ("accumulation", COUNT))),
    Form(WORLD, "B", rf"  world_size: {N}$", (("world_size", COUNT),)),
    Form(PLAN, "A", rf"train_batch_tokens:{N} train_seq_len:{N} iterations:{N} warmup_steps:{N} max_wallclock_seconds:{F}",
         (("batch_tokens", COUNT), ("sequence_length", COUNT), ("planned_steps", COUNT), ("warmup_steps", COUNT), ("limit_seconds", SECONDS))),
    Form(PLAN, "B", rf"  train_batch_tokens: {N}$", (("batch_tokens", COUNT),)),
    Form(TOKENS, "A", rf"val_loader:shards pattern=\S+ tokens:{N}", (("val_tokens", COUNT),)),
    Form(TOKENS, "B", rf"val_tokens: {N}$", (("val_tokens", COUNT),)),
    Form(SHARDS, "A", rf"train_loader:dataset:\S+ train_shards:{N}", (("train_shards", COUNT),)),
    Form(SHARDS, "B", rf"train_shards: {N}$", (("train_shards", COUNT),)),
    # training; its clock leaves out the warm-up and every validation pass
    Form(TRAIN_STEP, "A", rf"step:{N}/{N} (?:\[\S+\] )?train_loss:{F} train_time:{N}ms",
         (("step", COUNT), ("planned_steps", COUNT), ("train_loss", REAL), ("train_seconds", MILLISECONDS))),
    Form(TRAIN_STEP, "B", rf"{N}/{N} train_loss: {F} train_time: {F}m tok/s: {N}",
         (("step", COUNT), ("planned_steps", COUNT), ("train_loss", REAL), ("train_seconds", MINUTES), ("tokens_per_second", COUNT))),
    Form(TRAIN_STEP, "C", rf"step:{N}/{N} loss:{F} (?:\w+:[\d.]+ )*t:{N}ms",
         (("step", COUNT), ("planned_steps", COUNT), ("train_loss", REAL), ("train_seconds", MILLISECONDS))),
    Form(VAL_STEP, "AC", rf"step:{N}/{N} val_loss:{F} val_bpb:{F} train_time:{N}ms",
         (("step", COUNT), ("planned_steps", COUNT), ("val_loss", REAL), ("val_bpb", REAL), ("train_seconds", MILLISECONDS))),
    Form(VAL_STEP, "B", rf"{N}/{N} val_loss: {F} val_bpb: {F}$",
         (("step", COUNT), ("planned_steps", COUNT), ("val_loss", REAL), ("val_bpb", REAL))),
    Form(STOP, "AC", rf"stopping_early: wallclock_cap train_time:{N}ms(?: step:{N}/{N})?",
         (("train_seconds", MILLISECONDS), ("step", COUNT), ("planned_steps", COUNT))),
    Form(STOP, "B", rf"stopping_early: wallclock_cap train_time: {N}ms step: {N}/{N}",
         (("train_seconds", MILLISECONDS), ("step", COUNT), ("planned_steps", COUNT))),
    Form(MEMORY, "AB", rf"peak memory allocated: {N} MiB", (("peak_memory_bytes", MEBIBYTES),)),
    # sizes; a total without the name of a format is code and uncompressed weights
    Form(CODE, "AB", rf"Code size(?: \(compressed\))?: {N} bytes", (("code_bytes", BYTES),)),
    Form(MODEL, "AB", rf"Serialized model (\S+): {N} bytes", (("format", TEXT), ("model_bytes", BYTES))),
    Form(TOTAL, "AB", rf"Total submission size (\S+): {N} bytes", (("format", TEXT), ("total_bytes", BYTES))),
    Form(UNLABELLED, "AB", rf"Total submission size: {N} bytes", (("total_bytes", BYTES),)),
    Form(CODE, "C", rf"artifact:.* code:{N}$", (("code_bytes", BYTES),)),
    Form(BUDGET, "C", rf"budget:{N}/{N} ", (("total_bytes", BYTES), ("cap_bytes", BYTES))),
    # around the scores
    Form(SLIDING_MODE, "A", r"final_eval_mode:sliding_window"),
    Form(SLIDING_MODE, "A", r"  sliding_eval \[ *[\d.]+%\]"),
    Form(SUBSET, "A", rf"  eval: {N} batches \(limited\)", (("batches", COUNT),)),
    Form(SUBSET, "B", r"  val_doc_fraction: (0\.\d*[1-9]\d*)$", (("share", REAL),)),
    Form(EVAL_TOTAL, "B", rf"total_eval_time:{F}s$", (("eval_seconds", SECONDS),)),
    Form(PHASE, "B", rf"GPTQ:collected \d+ (Hessians) in {F}s", (("phase", TEXT), ("seconds", SECONDS))),
    Form(PHASE, "A", rf"gptq:(generated) \d+ \S+ in {F}s", (("phase", TEXT), ("seconds", SECONDS))),
    Form(PHASE, "A", rf"gptq:(calibrated) \d+ layers in {F}s", (("phase", TEXT), ("seconds", SECONDS))),
    Form(PHASE, "B", rf"ttt_lora:compile (warmup) done \({F}s\)", (("phase", TEXT), ("seconds", SECONDS))),
)  # fmt: skip

STAMP = re.compile(r"\d{10}\.\d{3} ")
"""Unix time that some logs have before every line."""

HYPERPARAMETER = {
    COLON: re.compile(r"(\w+):(\S+)"),
    SLASH: re.compile(r"  (\w+): (.*)"),
    SHORT: re.compile(r"(\w+)=(\S+)"),
}
"""A setting in each family: several on a line, or one on an indented line, or all on one."""

SET_BY_THE_RUN = frozenset(
    {"seed", "run_id", "logfile", "model_path", "quantized_model_path", "artifact_dir", "local_rank", "rank"}
)
"""Settings in which the seeds of one configuration may differ."""

# ── scores ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SCORE = re.compile(
    r"(?P<label>ttt_sliding:done|[A-Za-z][\w -]*?)(?: stride:\d+)? (?P<sliding>sliding )?"
    r"val_loss[:=](?P<loss>\d+\.\d+) (?:sliding )?val_bpb[:=](?P<bpb>\d+\.\d+)(?P<rest>.*)"
)
"""A line of a finished evaluation. A running value has a step, or a progress, before it, and no label."""

EVAL_SECONDS = re.compile(r"\b(?:eval_time|time):(\d+)ms")
ONLINE_TTT = "eval_mode:online_ttt"


@dataclass(frozen=True)
class Label:
    """What a label at the start of a score line means."""

    pattern: str
    stage: str
    rank: int
    """Of two stages in one log the higher was submitted: the order that reproduces every merged record but two (#1334,
    #1787). 0 scores weights that are not in the artifact.
    """


LABELS = (
    Label(r"(DIAGNOSTIC|diagnostic pre-quantization|pre-quantization) post[-_]ema", POST_EMA, 0),
    Label(r"quantized_ttt_phased", TTT, 6),
    Label(r"quantized_ttt_lora", TTT, 5),
    Label(r"quantized_ttt", TTT, 4),
    Label(r"legal_ttt(_exact)?|ttt_sliding:done|final(_int\d)?_ttt(_lora)?(_exact)?", TTT, 3),
    Label(r"(final|quantized)(_int\d)?_sliding(_window)?(_eval)?(_s\d+)?(_exact)?", SLIDING, 2),
    Label(r"(diagnostic )?quantized|final(_\w+)?_roundtrip(_exact)?|final_temped", ROUNDTRIP, 1),
)
STAGE_RANKS = {TTT: 3, SLIDING: 2, ROUNDTRIP: 1, POST_EMA: 0}
"""Rank of a line whose stage is not its label's: a label that says round trip was kept for parsers when evaluations changed."""

# ── known byte counts ───────────────────────────────────────────────────────────────────────────────────────────────

TOKENS_PER_BYTE = {
    0.4105208: "sp1024", 0.4105219: "sp1024, windows of 2,048 with the tail scored twice",
    0.4105213: "sp1024, windows of 1,024 with the tail scored twice", 0.4105212: "sp1024, the same",
    0.4094495: "sp1024, first export", 0.3012338: "sp4096", 0.3012727: "sp4096, as #1285 has it", 0.2683389: "sp8192",
    0.2683420: "sp8192, #1412", 0.2683302: "sp8192, packed documents", 0.3167412: "CaseOps sp8192",
    0.3167206: "CaseOps sp8192, packed documents",
}  # fmt: skip
"""Fingerprints of tokenizer, byte accounting and windows in merged records: bpb · ln 2 / loss."""

RATIO_TOLERANCE = 3e-7
"""Seven digits of the table, and the eight of a loss and a score."""
