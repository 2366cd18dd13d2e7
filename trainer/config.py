"""The configuration of a run: frozen sections, checked when they are built. Standard library only.

The defaults are PR openai/parameter-golf#1326 on 8 GPUs; a preset names only what differs. A knob is one value by its
dotted name, `optim.muon_weight_decay`. Every technique can be switched off; its field says by which value.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import ConfigError


def _between(default: Any, low: float | None = None, high: float | None = None, *, above: float | None = None) -> Any:
    """A number in [low, high], or greater than `above`."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


def _one_of(default: str, *choices: str) -> Any:
    return field(default=default, metadata={"choices": choices})


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """The types of a section's fields; found once, since a study builds thousands of configurations."""
    return typing.get_type_hints(cls)


class Section:
    """A part of the configuration; checks the type and range of each field when it is built."""

    def __post_init__(self) -> None:
        hints = hints_of(type(self))  # type: ignore[arg-type]  # mypy looks for the hash of an instance
        for f in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            place = f"{section_name(type(self))}.{f.name}"
            value = _coerced(getattr(self, f.name), hints[f.name], place)
            object.__setattr__(self, f.name, value)
            _check_range(value, f.metadata, place)


def _coerced(value: Any, hint: Any, place: str) -> Any:
    """`value` in the field's type: an int may stand for a float, a list for a tuple; anything else is refused."""
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(_coerced(item, typing.get_args(hint)[0], place) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    raise ConfigError(f"{place} must be of type {getattr(hint, '__name__', hint)}, got {value!r}")


def _check_range(value: Any, rule: Mapping[str, Any], place: str) -> None:
    if "choices" in rule and value not in rule["choices"]:
        raise ConfigError(
            f"{place} must be one of {', '.join(rule['choices'])}, got {value!r}", hint=nearest(value, rule["choices"])
        )
    low, high, above = rule.get("low"), rule.get("high"), rule.get("above")
    if value == () and rule:
        raise ConfigError(f"{place} must not be empty")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigError(f"{place} must be finite, got {number!r}")
        if above is not None and number <= above:
            raise ConfigError(f"{place} must be greater than {above}, got {number!r}")
        if (low is not None and number < low) or (high is not None and number > high):
            bounds = f"at least {low}" if high is None else f"at most {high}" if low is None else f"in [{low}, {high}]"
            raise ConfigError(f"{place} must be {bounds}, got {number!r}")


def nearest(word: str, known: Iterable[str]) -> str:
    """What the writer may have meant, as a hint."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The network of #1326."""

    vocab_size: int = _between(4096, 8, 65536)
    """Pieces of the tokenizer; shards hold uint16."""

    layers: int = _between(11, 1)
    """Physical layers; recurrence repeats some of them without adding parameters."""

    width: int = _between(512, 8)
    """Width of the residual stream."""

    heads: int = _between(8, 1)
    """Query heads."""

    kv_heads: int = _between(4, 1)
    """Key/value heads, each shared by heads / kv_heads query heads."""

    mlp_ratio: float = _between(4.0, above=0)
    """Hidden width of the MLP over the model's width."""

    leaky_slope: float = _between(0.5, 0, 1)
    """MLP activation leaky_relu(x, slope)²; 0 is the plain squared ReLU."""

    rope_dims: int = _between(16, 0)
    """Leading dimensions of each head that are rotated; 0 switches positions off."""

    rope_base: float = _between(10000.0, above=0)
    """Base of the rotary frequencies, at the training length."""

    first_attention_layer: int = _between(0, 0)
    """Physical layers before it do without attention, #1204: 1; their matrices stay, unused, and are zero in the file."""

    qk_norm: bool = True
    """RMS-normalise queries and keys per head."""

    qk_gain: float = _between(5.0, 0)
    """Initial value of the learned gain per query head; 0 leaves the gain out."""

    xsa_layers: int = _between(11, 0)
    """Last n layers that remove from each head's output its part along the position's own value; 0 is off."""

    value_embedding_dim: int = _between(128, 0)
    """Width of the table of value embeddings; 0 is off."""

    value_embedding_layers: tuple[int, ...] = (9, 10)
    """Physical layers whose values receive the value embedding."""

    ln_scale: bool = True
    """Multiply each block's normalised inputs by 1 / sqrt(layer + 1)."""

    residual_mix: bool = True
    """Learned mix of the stream with the embedding x0 at each block's entry."""

    skips: str = _one_of("gated", "gated", "plain", "off")
    """U-Net skips from the first half of the (virtual) layers to the second."""

    lane_skips: bool = False
    """Fuse skips that land behind the split into the attention's lane. #1326's script computes them and throws them away;
    using them cost 5 mBPB (benchmarks/trainer.md)."""

    skip_count: int = _between(0, 0)
    """Skips that have weights, the first ones of the second half; 0: half of the physical layers. #1394: 7."""

    bigram_buckets: int = _between(0, 0)
    """Rows of a table of pairs of tokens by their hash, whose entries are added to the embedding; 0 is off. #1019: 3072."""

    bigram_dim: int = _between(128, 1)
    """Width of that table. #1019: 112."""

    smear: bool = False
    """Mix the embedding of the token before into each position's by a learned gate a channel. #549, #1019."""

    tie_embeddings: bool = True
    """Use the token table as the output head."""

    logit_softcap: float = _between(30.0, 0)
    """Logits are c · tanh(logits / c); 0 is off."""

    embedding_std: float = _between(0.005, above=0)
    """Standard deviation of the token table at the start."""

    recurrence_layers: tuple[int, ...] = (4, 5)
    """Consecutive physical layers that are run again once recurrence is on; empty is off."""

    recurrence_passes: int = _between(1, 0)
    """Extra passes through them; 0 is off."""

    untied_mlps: bool = False
    """Give the extra pass MLPs of its own, copied from the layers' when recurrence comes on. #1204."""

    parallel_start_layer: int = _between(7, -1)
    """First physical layer where attention and MLP work side by side; -1: nowhere."""

    parallel: str = _one_of("lanes", "lanes", "routed", "stream")
    """How: on two `lanes` that meet at the end, #1326; on two that each writes into by learned weights (`routed`, #1204); or
    in one `stream`, from the same inputs, #1412.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        head_dim = self.width // self.heads
        for broken, rule in (
            (self.width % self.heads, f"width {self.width} must be a multiple of heads {self.heads}"),
            (self.heads % self.kv_heads, f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}"),
            (self.rope_dims % 2, f"rope_dims {self.rope_dims} must be even"),
            (self.rope_dims > head_dim, f"rope_dims {self.rope_dims} must not exceed the head's {head_dim}"),
            (self.xsa_layers > self.layers, f"xsa_layers {self.xsa_layers} must not exceed layers {self.layers}"),
            (
                self.parallel_start_layer >= self.layers,
                f"parallel_start_layer {self.parallel_start_layer} must be below layers {self.layers}",
            ),
        ):
            if broken:
                raise ConfigError(f"model: {rule}")
        if self.untied_mlps and self.recurrence_passes > 1:
            raise ConfigError(f"model.untied_mlps needs recurrence_passes 1, got {self.recurrence_passes}")
        for name in ("value_embedding_layers", "recurrence_layers"):
            for layer in getattr(self, name):
                if not 0 <= layer < self.layers:
                    raise ConfigError(f"model.{name} names layer {layer}, the model has 0 to {self.layers - 1}")
        loop = self.recurrence_layers
        if loop and loop != tuple(range(loop[0], loop[0] + len(loop))):
            raise ConfigError(f"model.recurrence_layers must be consecutive, got {list(loop)}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_ratio * self.width)

    @property
    def has_recurrence(self) -> bool:
        return bool(self.recurrence_layers) and self.recurrence_passes > 0


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What a step of training reads."""

    tokens_per_step: int = _between(786_432, 1)
    """Tokens of one optimiser step over all GPUs, whatever their number."""

    sequence_length: int = _between(2048, 2)
    """Tokens of one training sequence."""

    micro_batch_sequences: int = _between(48, 1)
    """Most sequences that one GPU takes through the network at once; the rest is accumulated."""

    order_seed: int = _between(-1, -1)
    """Seed of the order of the training data; -1 takes the run's seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_per_step % self.sequence_length:
            raise ConfigError(
                f"data.tokens_per_step {self.tokens_per_step} must be a multiple of data.sequence_length {self.sequence_length}"
            )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """How a run moves through its budget. A fraction is of the time budget or of the steps, as `clock` says."""

    clock: str = _one_of("time", "time", "step")
    """`time`: fractions of limits.train_seconds less the reserve; `step`: fractions of `steps`, the same on any machine."""

    steps: int = _between(20_000, 1)
    """Most optimiser steps."""

    warmdown_frac: float = _between(0.667, 0, 1)
    """Last part, over which learning rates fall linearly to the floor; 0 keeps them constant."""

    lr_floor: float = _between(0.0, 0, 1)
    """Factor of the base learning rates at the end."""

    recurrence_start_step: int = _between(3000, 0)
    """Recurrence is off before this step ..."""

    recurrence_start_frac: float = _between(0.0, 0, 1)
    """... and before this fraction."""

    recurrence_full_frac: float = _between(0.0, 0, 1)
    """Until this fraction only one extra pass is made; 0: all from the start. #1412: 0.65."""

    warmup_steps: int = _between(20, 0)
    """Steps on random tokens before the clock starts, in both graphs, undone afterwards; they absorb compilation."""

    log_every: int = _between(50, 1)
    """Steps between two metric events; the first ten steps are always logged."""

    validations: int = _between(0, 0)
    """Times, evenly over the schedule, at which the present weights are scored on a part of the validation split, for a
    search to stop by; 0 never, as in every record. The clock stands still meanwhile."""

    validation_sequences: int = _between(64, 1)
    """How much of the split that is, from its beginning, in evaluation.sequence_length."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """MuonEq-R for matrices, AdamW for embeddings and for vectors."""

    matrix_lr: float = _between(0.02, 0)
    """Muon's learning rate."""

    muon_momentum: float = _between(0.99, 0, 1)
    """Nesterov momentum after the ramp."""

    muon_momentum_start: float = _between(0.92, 0, 1)
    """Momentum at step 0."""

    muon_momentum_ramp_steps: int = _between(1500, 0)
    """Steps over which momentum rises linearly; 0 is off."""

    muon_weight_decay: float = _between(0.09, 0)
    """Decoupled decay of matrices: W is multiplied by 1 - lr · decay."""

    muon_row_normalize: bool = True
    """MuonEq-R: every row of the momentum matrix gets unit length before it is orthogonalised."""

    newton_schulz_steps: int = _between(5, 1, 20)
    """Iterations of the orthogonalisation."""

    embedding_lr: float = _between(0.03, 0)
    """AdamW's learning rate for the token and value tables (tied)."""

    embedding_weight_decay: float = _between(0.09, 0)
    """Decoupled decay of the tables."""

    embedding_precision: str = _one_of("float32", "float32", "bfloat16")
    """What the tables and their moments are kept in from step to step. Public scripts: bfloat16, which has 8 significant bits."""

    projections: str = _one_of("muon", "muon", "adamw")
    """What moves the projections of the value table and of the pairs': Muon as other matrices, or AdamW as vectors, #549."""

    head_lr: float = _between(0.008, 0)
    """AdamW's learning rate for an untied output head."""

    scalar_lr: float = _between(0.02, 0)
    """AdamW's learning rate for vectors and scalars."""

    scalar_weight_decay: float = _between(0.02, 0)
    """Decoupled decay of vectors and scalars."""

    adam_beta1: float = _between(0.9, 0, 0.999999)
    """Decay of AdamW's first moment."""

    adam_beta2: float = _between(0.95, 0, 0.999999)
    """Decay of AdamW's second moment."""

    adam_eps: float = _between(1e-8, above=0)
    """AdamW's denominator floor."""

    grad_clip_norm: float = _between(0.3, 0)
    """Largest global gradient norm; 0 is off."""

    ema_decay: float = _between(0.997, 0, 0.999999)
    """Decay of the weight average that is quantised, from step 0 without bias correction; 0 is off."""


@dataclass(frozen=True, kw_only=True)
class QuantConfig(Section):
    """From float weights to the model file."""

    method: str = _one_of("gptq", "gptq", "rtn")
    """`gptq`: error feedback through the inputs' second moments; `rtn`: round to nearest."""

    attention_bits: int = _between(6, 2, 8)
    """Bits of a weight of queries, keys, values and attention's output, symmetric, without the most negative value."""

    mlp_bits: int = _between(6, 2, 8)
    """Bits of a weight of the MLPs."""

    coarse_matrices: int = _between(0, 0)
    """Matrices, those whose inputs have the smallest second moments, that get one bit less; 0 is off. #1260: 6."""

    embedding_bits: int = _between(8, 2, 8)
    """Bits of a table's entry."""

    grid: str = _one_of("quantile", "quantile", "std", "fisher")
    """What sets the step of a row: `quantile` tries several of its quantiles as clipping points; `std` clips at so many of
    its standard deviations; `fisher` gives each row of each matrix and table the step at which all weights add equally to
    the loss, in 8 bits and without clipping, so that only entropy counts.
    """

    clip_quantiles: tuple[float, ...] = _between((0.9990, 0.9995, 0.9999, 0.99999, 1.0), 0.5, 1)
    """Candidates for a row's clipping point, as quantiles of its absolute weights."""

    clip_floor: float = _between(0.0, 0)
    """Smallest clipping point of a row under `quantile`, of a table's too; 0 is off. The scripts from #549 to #1334: 1, so that
    all rows of smaller weights share one grid, of steps of 1/31 in 6 bits.
    """

    clip_criterion: str = _one_of("weight", "weight", "output")
    """Error that chooses a row's candidate: `weight` plain, `output` weighted by the inputs' second moments."""

    embedding_clip_quantile: float = _between(0.9999984, 0.5, 1)
    """Clipping point of a table's row."""

    attention_clip_std: float = _between(12.85, above=0)
    """Standard deviations at which `std` clips attention's matrices; more means a smaller file and a coarser grid. #1394."""

    mlp_clip_std: float = _between(12.85, above=0)
    """The same for the MLPs' matrices."""

    embedding_clip_std: float = _between(20.0, above=0)
    """The same for the tables."""

    clip_importance: float = _between(0.0, 0, 1)
    """λ by which rows that matter more to their outputs are clipped later under `std`; 0 is off. #1412: 0.175."""

    embedding_method: str = _one_of("rtn", "rtn", "gptq")
    """How the token table is rounded: to nearest, or by GPTQ as the output head that it is. #1394."""

    information_sequences: int = _between(256, 1)
    """Training sequences from whose gradients `fisher` learns how much the loss feels a row, over all GPUs."""

    fisher_nats: float = _between(0.01, above=0)
    """Loss that rounding under `fisher` may add by the second-order estimate, nats per token, before the file is fitted."""

    half_vectors: bool = False
    """Store learned vectors in float16, as the scripts from #549 on do."""

    coder: str = _one_of("entropy", "brotli", "entropy")
    """How integers are coded: `brotli` as bytes; `entropy` by a range coder that learns the sizes of rows and columns."""

    low_rank_tensors: int = _between(0, 0)
    """Matrices, the worst rounded first, that get a low-rank correction of their rounding error; 0 is off. #1797."""

    low_rank: int = _between(4, 1)
    """Rank of the correction."""

    fit: str = _one_of("coarsen", "coarsen", "prune", "fill")
    """How a file comes under the cap: `coarsen` makes the matrices' grid coarser by one factor, `prune` only sets
    single ±1 to zero, `fill` makes the grid coarser or finer so that the file uses the cap.
    """

    margin_bytes: int = _between(1000, 0)
    """Bytes that a file whose grid was changed is aimed under the cap."""

    calibration: str = _one_of("training", "training", "generated")
    """What GPTQ's second moments are taken from: training data, or text that the trained model writes, which belongs to no
    budget of data, #1019.
    """

    generated_sequences: int = _between(64, 1)
    """Sequences of the training length that the model writes, over all GPUs."""

    generated_temperature: float = _between(0.8, above=0)
    """Temperature at which it writes them."""

    calibration_steps: int = _between(8, 1)
    """Training batches that GPTQ's second moments are taken from; the script of #1326 reads 64 a GPU and keeps one GPU's."""

    damping: float = _between(0.01, above=0)
    """Added to the second moments' diagonal, as a part of its mean."""

    block_columns: int = _between(128, 1)
    """Columns between two lazy updates of the rest."""

    act_order: bool = True
    """Take columns by falling second moment."""

    brotli_quality: int = _between(11, 0, 11)
    """Effort of the final compression."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coarse_matrices and self.method != "gptq":
            raise ConfigError("quant.coarse_matrices goes by what GPTQ measures", hint='set quant.method to "gptq"')


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """How a stored model is scored: the stages `sliding` and `ttt`; `post_ema` and `roundtrip` are always flat."""

    protocol: str = _one_of("sliding", "sliding", "flat", "documents")
    """Windows of `sequence_length`: `flat` ones lie one behind the other; `sliding` ones move by `stride`, across the
    boundaries of documents; `documents` does so in each document by itself, and nothing before its BOS is read.
    """

    sequence_length: int = _between(2048, 2)
    """Longest context plus one scored position."""

    stride: int = _between(64, 1)
    """Positions between two sliding windows; each scores its last `stride` positions, the first scores all."""

    batch_windows: int = _between(32, 1)
    """Windows a GPU scores at once."""

    slot_steps: int = _between(0, 0)
    """Steps of SLOT before a batch's windows are scored, #1217: 8; 0 is off. Not accepted: a window's context may hold what
    another window of its batch scores.
    """

    slot_lr: float = _between(0.005, above=0)
    """AdamW's learning rate of those steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride > self.sequence_length:
            raise ConfigError(
                f"evaluation.stride {self.stride} must not exceed evaluation.sequence_length {self.sequence_length}"
            )


LORA_TARGETS = ("q", "k", "v", "out", "up", "down", "mlp", "head")
"""The block's matrices; `mlp`, a term beside the whole MLP; and the output head."""


@dataclass(frozen=True, kw_only=True)
class TTTConfig(Section):
    """Score-first test-time training, after #461 / #549 / #1326, #1341 and #1530."""

    method: str = _one_of("sgd", "sgd", "adamw", "lora", "off")
    """What learns and how: `sgd` or `adamw` on the weights themselves, `lora` on low-rank adapters, or `off`."""

    parameters: str = _one_of("all", "all", "query")
    """Weights that learn under `sgd` and `adamw`: all, or attention's query matrices alone."""

    lr: float = _between(0.002, 0)
    """Learning rate of the first chunk; a cosine over chunks takes it to 0. Constant where a document is the unit."""

    momentum: float = _between(0.9, 0, 0.999999)
    """SGD's momentum; its buffer lives through all chunks, or through a document."""

    adam_beta1: float = _between(0.9, 0, 0.999999)
    """Decay of AdamW's first moment; 0 is off. #1530: 0."""

    adam_beta2: float = _between(0.999, 0, 0.999999)
    """Decay of AdamW's second moment."""

    adam_eps: float = _between(1e-8, above=0)
    """AdamW's denominator floor. #1530: 1e-10."""

    weight_decay: float = _between(0.0, 0)
    """AdamW's decoupled decay. #1530: 0.5."""

    epochs: int = _between(3, 0)
    """Passes over a chunk after it has been scored; one step where a document is the unit."""

    chunk_tokens: int = _between(32_768, 1)
    """Positions that are scored before anything learns from them."""

    batch_sequences: int = _between(32, 1)
    """Sequences of one update, over all GPUs."""

    grad_clip_norm: float = _between(1.0, 0)
    """Largest global gradient norm, of each document's own adapter where a document is the unit; 0 is off."""

    frozen_blocks: int = _between(0, 0)
    """First blocks that do not learn."""

    before_quantization: bool = False
    """Learn from the whole validation split before the weights are quantised, and from nothing afterwards: what is scored has
    been learned. Breaks condition 3 of #1017; for studies of what learning and rounding do to each other, #1341.
    """

    lora_unit: str = _one_of("chunk", "chunk", "document")
    """`chunk`: one adapter learns from chunk to chunk, #1341; `document`: each document has its own and leaves nothing."""

    lora_rank: int = _between(8, 1)
    """Rank of the adapters. #1530: 96."""

    lora_targets: tuple[str, ...] = ("q", "v")
    """What the adapters are added to, of LORA_TARGETS. #1341: q, v; #1530: q, k, v, out, mlp, head."""

    lora_scale: float = _between(1.0, above=0)
    """Factor of the adapters' outputs, often written α / rank."""

    lora_optimizer: str = _one_of("adamw", "adamw", "sgd")
    """Rule by which the adapters learn."""

    lora_seed: int = _between(0, 0)
    """Seed of the adapters' start; not the run's, since the stored model alone must score the same."""

    document_tokens: int = _between(32, 1)
    """Positions of a document that are scored before its adapter learns from them. #1530: 32, #1855: 48."""

    batch_documents: int = _between(64, 1)
    """Documents that a GPU takes through the network at once, of one length as near as can be."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for target in self.lora_targets:
            if target not in LORA_TARGETS:
                raise ConfigError(
                    f"ttt.lora_targets must name some of {', '.join(LORA_TARGETS)}, got {target!r}",
                    hint=nearest(target, LORA_TARGETS),
                )
        if not self.lora_targets or len(set(self.lora_targets)) < len(self.lora_targets):
            raise ConfigError(f"ttt.lora_targets must name each target once, got {list(self.lora_targets)}")
        if self.before_quantization and self.method not in ("sgd", "adamw"):
            raise ConfigError(
                f"ttt.before_quantization needs weights that learn themselves, got ttt.method {self.method!r}",
                hint='set ttt.method to "sgd" or "adamw"',
            )

    @property
    def is_by_document(self) -> bool:
        return self.method == "lora" and self.lora_unit == "document"

    @property
    def is_scored(self) -> bool:
        """Whether there is a score of its own, beside the one without learning."""
        return self.method != "off" and not self.before_quantization


@dataclass(frozen=True, kw_only=True)
class LimitsConfig(Section):
    """The budget. Defaults are the challenge's, on 8 H100."""

    train_seconds: float = _between(600.0, above=0)
    """Wall-clock of the training loop, calibration included."""

    reserve_seconds: float = _between(10.0, 0)
    """Part of it that is kept for GPTQ's calibration; where warming up shows that it takes longer, that long."""

    eval_seconds: float = _between(600.0, above=0)
    """Wall-clock of the scored evaluation."""

    artifact_bytes: int = _between(16_000_000, 1)
    """Cap on bundle plus model file, decimal bytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reserve_seconds >= self.train_seconds:
            raise ConfigError(
                f"limits.reserve_seconds {self.reserve_seconds} must be below limits.train_seconds {self.train_seconds}"
            )


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Section):
    """How the machine is used; does not change the mathematics beyond rounding."""

    device: str = _one_of("auto", "auto", "cpu", "cuda")
    """`auto` takes a GPU where there is one."""

    precision: str = _one_of("auto", "auto", "float32", "bfloat16")
    """Of matrix products; `auto` is bfloat16 on a GPU and float32 on a CPU. Weights are float32."""

    compile: bool = True
    """Compile the network with torch.compile, each recurrence state as its own graph."""

    cpu_threads: int = _between(0, 0)
    """Threads a process uses on a CPU; 0 leaves it to torch. A fixed number makes CPU runs repeat bit for bit."""

    resumable: bool = False
    """Keep a checkpoint where training has to leave or ends, from which the run's next attempt goes on. A search sets it for
    its trials; a record is made in one go, and its bundle does without this code.
    """


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig, "data": DataConfig, "schedule": ScheduleConfig, "optim": OptimConfig, "quant": QuantConfig,
    "evaluation": EvaluationConfig, "ttt": TTTConfig, "limits": LimitsConfig, "runtime": RuntimeConfig,
}  # fmt: skip
"""The type of each field of a Config, by its name in dotted knobs and in TOML."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A complete configuration."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    ttt: TTTConfig = field(default_factory=TTTConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        ttt, length, stride = self.ttt, self.evaluation.sequence_length, self.evaluation.stride
        if self.evaluation.slot_steps and ttt.method != "off":
            raise ConfigError(
                f"evaluation.slot_steps {self.evaluation.slot_steps} changes the score that test-time training must begin with",
                hint='set ttt.method to "off"',
            )
        if ttt.method == "off":
            return
        if ttt.is_by_document:
            if ttt.document_tokens > length:
                raise ConfigError(
                    f"ttt.document_tokens {ttt.document_tokens} must not exceed evaluation.sequence_length {length}"
                )
        elif ttt.chunk_tokens % length or ttt.chunk_tokens % stride or length % stride:
            raise ConfigError(
                f"ttt.chunk_tokens {ttt.chunk_tokens} must be a multiple of evaluation.sequence_length {length}, and both of "
                f"evaluation.stride {stride}, so that no window scores two chunks"
            )
        learns_in_blocks = ttt.lora_targets != ("head",) if ttt.method == "lora" else ttt.parameters == "query"
        if ttt.frozen_blocks > self.model.layers - learns_in_blocks:
            raise ConfigError(
                f"ttt.frozen_blocks {ttt.frozen_blocks} must "
                + ("be below" if learns_in_blocks else "not exceed")
                + f" model.layers {self.model.layers}",
                hint="nothing would be left to learn" if learns_in_blocks else None,
            )


def section_name(cls: type[Section]) -> str:
    """The section's name in dotted knobs and in TOML."""
    return next((name for name, section in SECTIONS.items() if section is cls), cls.__name__)


@functools.cache
def knobs() -> dict[str, Any]:
    """Every knob by its dotted name, with its type."""
    return {  # mypy looks for the hash of an instance
        f"{section}.{name}": hint
        for section, cls in SECTIONS.items()
        for name, hint in hints_of(cls).items()  # type: ignore[arg-type]
    }


FOLDED = ""
"""The choices that this code was packed for, without the code of others: one word a knob, in the order of their names,
nothing where any will do. Filled in when a bundle is packed; the source takes every configuration.
"""


def choice_of(value: Any) -> str:
    """What a knob's value decides: a word itself, of a number or a switch its sign, of a list whether it holds anything."""
    number = len(value) if isinstance(value, (list, tuple)) else value
    return value if isinstance(value, str) else str((number > 0) - (number < 0))


def from_mapping(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """The configuration with the given values, and the defaults of those that are not; refuses what does not exist."""
    _require_known(values)
    found = [(f"{s}.{key}", value) for s, entries in sorted(values.items()) for key, value in sorted(entries.items())]
    for (knob, value), choice in zip(found, FOLDED.split(" "), strict=bool(FOLDED)):
        if choice not in ("", choice_of(value)):
            raise ConfigError(
                f"{knob} is {value!r}; this code was packed for the choice {choice} alone",
                hint="take the bundle that was packed for it, or the source",
            )
    sections: dict[str, Any] = {name: SECTIONS[name](**entries) for name, entries in values.items()}
    return Config(**sections)


def _require_known(values: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ConfigError for a section or a key that does not exist, with the nearest name."""
    for section, entries in values.items():
        if section not in SECTIONS:
            raise ConfigError(f"there is no section [{section}]", hint=nearest(section, SECTIONS))
        if not isinstance(entries, Mapping):
            raise ConfigError(f"[{section}] must be a table, got {entries!r}")
        names = [f.name for f in dataclasses.fields(SECTIONS[section])]  # type: ignore[arg-type]
        for key in entries:
            if key not in names:
                raise ConfigError(f"[{section}] has no key {key!r}", hint=nearest(key, names))


def with_knobs(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with knobs set by their dotted names; raises ConfigError with the nearest name for an unknown one."""
    sections: dict[str, dict[str, Any]] = {}
    for knob, value in values.items():
        if knob not in knobs():
            raise ConfigError(f"there is no knob {knob!r}", hint=nearest(knob, knobs()))
        section, _, name = knob.partition(".")
        sections.setdefault(section, {})[name] = value
    changed: dict[str, Any] = {
        section: dataclasses.replace(getattr(config, section), **entries) for section, entries in sections.items()
    }
    return dataclasses.replace(config, **changed)


def knob_value(config: Config, knob: str) -> Any:
    """The value of one knob; raises ConfigError with the nearest name for an unknown one."""
    if knob not in knobs():
        raise ConfigError(f"there is no knob {knob!r}", hint=nearest(knob, knobs()))
    section, _, name = knob.partition(".")
    return getattr(getattr(config, section), name)


def to_mapping(config: Config) -> dict[str, dict[str, Any]]:
    """The whole configuration as plain JSON values."""
    return {
        name: {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(section).items()
        }
        for name, section in ((name, getattr(config, name)) for name in SECTIONS)
    }


def parse_value(knob: str, text: str) -> Any:
    """A knob's value from a command line; raises ConfigError where the text is not of its type."""
    hint = knobs().get(knob)
    if hint is None:
        raise ConfigError(f"there is no knob {knob!r}", hint=nearest(knob, knobs()))
    try:
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        if isinstance(hint, types.GenericAlias):
            item = typing.get_args(hint)[0]
            return tuple(item(part.strip()) for part in text.split(",") if part.strip())
        return hint(text)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{knob} is of type {getattr(hint, '__name__', hint)}, got {text!r}") from error
