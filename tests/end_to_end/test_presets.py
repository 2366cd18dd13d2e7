"""Every preset, in small, from its own bundle to its last score, and evidence that each of its techniques took part."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.folding import choices
from orchestrator.home import Home
from orchestrator.machine import THREADS
from tests.end_to_end.shrunk import Finished, run_again, run_preset
from tests.trainer.published import FACTS, TWICE
from trainer.artifact import CODERS
from trainer.config import ModelConfig, OptimConfig, QuantConfig
from trainer.gptq import as_scales, largest_integer, round_to_nearest, scales_for
from trainer.model import HEAD
from trainer.protocol import COMPLETE, LEARNED, SCORED, TTT
from trainer.quantize import FISHER_BITS
from trainer.ttt import PARITY_TOLERANCE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first run compiles what the others find

FISHER = "pr1326-fisher"
ORDERS = {name: order for name, (_, order) in FACTS.items()} | {FISHER: TWICE}

HEAD_TABLE = "embedding.weight"  # the output head, too

LARGEST_BUNDLE_BYTES = 25_000

REPRODUCED = 1e-6  # nats per token between compiled and plain float32; seen: 3e-8
FELT = 1e-6  # nats by which a token's score moves, on average; without part in it every bit would stay. Seen: 9e-6
NEAREST, FED_BACK = 0.99, 0.95  # parts of a matrix's integers that are the nearest: without error feedback, and with it
LOGGED = 0.5e-4  # by which the grid's factor lies beside the four digits of it that are logged, at most


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One core a run, and here, and one compile cache for all, as a user may have it: the presets share most graphs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setenv(THREADS, "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(ORDERS))
def preset(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("presets"))


@pytest.fixture(scope="module")
def finished(preset: str, home: Home, data: Path, compiled: None) -> Finished:
    # pr1296 is pr1334's configuration under another name, and must not find that one's run
    return run_preset(Home(home.root / preset), preset, data)


def test_its_own_bundle_trains_packs_and_scores_it_to_the_end(finished: Finished) -> None:
    result, packed = finished.result, finished.packed
    assert (result.status, result.failure, result.resumed_from) == (COMPLETE, None, {})
    assert choices(finished.config) == choices(finished.published)
    assert finished.run.bundle.read_bytes() == packed and result.bundle_sha256 == hashlib.sha256(packed).hexdigest()
    assert result.bundle_bytes == len(packed) <= LARGEST_BUNDLE_BYTES
    assert result.artifact_bytes == len(packed) + finished.run.artifact.stat().st_size <= result.cap_bytes
    losses = [event["values"]["train_loss"] for event in finished.metrics("train_loss")]
    assert len(losses) == result.steps >= 5 and all(map(math.isfinite, losses))
    assert losses[0] == pytest.approx(math.log(finished.config.model.vocab_size), rel=0.02)  # it knew nothing
    assert losses[-1] < 0.8 * losses[0]


def test_it_goes_through_the_phases_and_scores_the_stages_that_it_asks_for(finished: Finished) -> None:
    config, result = finished.published, finished.result
    stages = ["post_ema", "roundtrip", "sliding"] + [TTT] * (config.ttt.method != "off")
    calibrates = config.quant.method == "gptq" or config.quant.grid == "fisher"
    before = ["load", "compile", "warm_up", "train"] + ["calibrate"] * calibrates + ["quantize", "pack"]
    assert list(result.phases) == [*before, "post_ema", "reload", *stages[1:]]
    assert list(result.scores) == list(result.chains) == stages
    expected = finished.stream.positions, int(finished.stream.target_bytes_P.sum())
    assert all((score.tokens, score.bytes) == expected for score in result.scores.values())
    assert all(math.isfinite(score.bpb) for score in result.scores.values())
    assert finished.named("gptq_fallback") == []


def test_its_layers_are_run_again_as_published(finished: Finished, preset: str) -> None:
    events, order = finished.named("recurrence"), ORDERS[preset]
    assert finished.recurrent == (finished.published.model.recurrence_passes if events else 0)
    assert finished.model(finished.weights).layer_order(finished.recurrent) == order
    if finished.recurrent:
        assert events[-1]["layers"] == order
    assert bool(events) == finished.published.model.has_recurrence == (len(order) > finished.published.model.layers)


def left_out(model: ModelConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """The techniques of a network, each with what switches it off, or takes it otherwise."""
    off = {
        "leaky_slope": 0.0, "rope_dims": 0, "qk_norm": False, "qk_gain": 0.0, "xsa_layers": 0, "value_embedding_dim": 0,
        "ln_scale": False, "residual_mix": False, "skips": "off", "logit_softcap": 0.0, "bigram_buckets": 0,
        "smear": False, "untied_mlps": False, "recurrence_passes": 0, "parallel_start_layer": -1,
    }  # fmt: skip
    yield from ((name, {name: value}) for name, value in off.items() if getattr(model, name) != value)
    if model.parallel == "lanes" and model.parallel_start_layer >= 0:
        yield "lane_skips", {"lane_skips": not model.lane_skips}
    if model.rope_base != 10_000:
        yield "rope_base", {"rope_base": 10_000.0}


def test_the_readable_source_scores_its_weights_and_its_file_alike(finished: Finished) -> None:
    length, scores = finished.config.evaluation.sequence_length, finished.result.scores
    for stage, state in (("post_ema", finished.weights), ("roundtrip", finished.file.state())):
        assert finished.loss(state, stride=length) == pytest.approx(scores[stage].loss, abs=REPRODUCED), stage


def test_none_of_its_techniques_could_be_left_out_unnoticed(finished: Finished) -> None:
    whole = finished.nats()
    moved = {
        name: float(
            (finished.nats(recurrent=0 if name == "recurrence_passes" else None, **change) - whole).abs().mean()
        )
        for name, change in left_out(finished.config.model)
    }
    assert {name: round(nats, 7) for name, nats in moved.items() if nats < FELT} == {}


def largest_adam_step(step: int, optim: OptimConfig) -> float:
    """Learning rates by which AdamW's `step`-th step (from 1) moves a weight at most, whatever the gradients were.

    With m = (1 - β1) Σ β1^i g_i and v = (1 - β2) Σ β2^i g_i², g_i the gradient i steps ago, Cauchy and Schwarz have
    m² <= (1 - β1)² Σ (β1² / β2)^i Σ β2^i g_i².
    """
    beta1, beta2 = optim.adam_beta1, optim.adam_beta2
    reach = math.sqrt(sum((beta1**2 / beta2) ** i for i in range(step)))
    return reach * (1 - beta1) / (1 - beta1**step) * math.sqrt((1 - beta2**step) / (1 - beta2))


def largest_gain_move(finished: Finished) -> float:
    """By how much the run's steps and decays can have moved the average of a gain, at most."""
    optim, start, moved, averaged = finished.config.optim, finished.config.model.qk_gain, 0.0, 0.0
    for step, event in enumerate(finished.metrics("lr_scale"), start=1):
        decay = optim.scalar_weight_decay * (start + moved)
        moved += event["values"]["lr_scale"] * optim.scalar_lr * (largest_adam_step(step, optim) + decay)
        averaged += (1 - optim.ema_decay) * (moved - averaged)
    return averaged


def test_its_gains_have_learned_no_faster_than_the_optimiser_steps(finished: Finished) -> None:
    model, lr_scales = finished.published.model, [event["values"]["lr_scale"] for event in finished.metrics("lr_scale")]
    assert len(lr_scales) == finished.result.steps and max(lr_scales) <= 1
    gains = [finished.weights[f"blocks.{layer}.attention.gain"] for layer in range(model.layers)]
    assert max(float((gain - model.qk_gain).abs().max()) for gain in gains) < largest_gain_move(finished)
    alike = [layer for layer, gain in enumerate(gains) if gain.unique().numel() == 1]
    assert alike == list(range(model.first_attention_layer))  # decay alone moves all heads by as much


def test_its_parts_have_learned(finished: Finished) -> None:
    model, state = finished.published.model, finished.file.state()
    outs = [state[f"blocks.{layer}.attention.out.weight"] for layer in range(model.layers)]
    idle = [layer for layer, out in enumerate(outs) if not out.count_nonzero()]
    assert idle == list(range(model.first_attention_layer))  # they began at zero
    unread = [f"blocks.{layer}.attention.{name}.weight" for layer in idle for name in ("query", "key", "value")]
    assert not any(state[name].count_nonzero() for name in unread)  # their bytes would be for nothing
    assert state["skip_weights"].size(0) == (model.skip_count or model.layers // 2)
    assert ("skip_gates" in state) == (model.skips == "gated")
    if model.skips == "gated":
        assert state["skip_gates"].count_nonzero()  # as they began
    if model.untied_mlps:
        for number, layer in enumerate(model.recurrence_layers):  # copied when they came on, and apart since
            assert not torch.equal(state[f"repeats.{number}.up.weight"], state[f"blocks.{layer}.mlp.up.weight"])
    if model.parallel == "routed":
        assert all((state[f"blocks.{layer}.routes"] != 1).all() for layer in range(7, model.layers))
    if model.parallel == "lanes" and model.parallel_start_layer >= 0:
        assert state["lane_merge"] != 0.5


def is_matrix(name: str) -> bool:
    """Whether a quantised tensor is a matrix of a block; else it is a table."""
    return name.startswith(("blocks.", "repeats."))


def bits_of(name: str, config: QuantConfig) -> int:
    """Bits of a quantised tensor by its role, where none is taken from it."""
    if config.grid == "fisher":
        return FISHER_BITS
    if not is_matrix(name):
        return config.embedding_bits
    return config.attention_bits if ".attention." in name else config.mlp_bits


def moments_of(finished: Finished, name: str) -> torch.Tensor | None:
    """Second moments of what a tensor reads; None where it is not rounded by them."""
    is_head = name == HEAD_TABLE and finished.published.quant.embedding_method == "gptq"
    return finished.calibration.moments.get(HEAD if is_head else name.removesuffix(".weight"))


def clips(finished: Finished, name: str) -> torch.Tensor:
    """Where the rows of a tensor may be clipped by its role, one candidate after the other: (C, M)."""
    config, weight_MN, is_table = finished.published.quant, finished.weights[name].double(), not is_matrix(name)
    if config.grid == "quantile":
        quantiles = [config.embedding_clip_quantile] if is_table else list(config.clip_quantiles)
        return torch.quantile(weight_MN.abs(), weight_MN.new_tensor(quantiles), dim=1).clamp_min(config.clip_floor)
    of_matrix = config.attention_clip_std if ".attention." in name else config.mlp_clip_std
    clips_M = (config.embedding_clip_std if is_table else of_matrix) * weight_MN.std(1)
    if (moments_NN := moments_of(finished, name)) is not None:
        moments_N = moments_NN.diagonal().double()
        weigh_M = weight_MN.abs() @ (moments_N + config.damping * moments_N.mean())
        clips_M = clips_M * (1 + config.clip_importance * (weigh_M / weigh_M.mean() - 1))
    return clips_M[None]


def rounding(finished: Finished, name: str) -> float:
    """Relative error of what float32 adds up over a row's columns and a calibration's positions: one rounding a term, at most."""
    positions = finished.config.quant.calibration_steps * finished.config.data.tokens_per_step
    return (finished.weights[name].size(1) + positions) * torch.finfo(torch.float32).eps


def scale_limits(finished: Finished, name: str, bits: int, *, side: int) -> torch.Tensor:
    """The smallest (side -1) or largest (1) scales that the rows of a tensor may have by their rule, a clip each: (C, M).

    A scale rises with all that it is made of, of which nothing is known better than it is added up, or logged.
    """
    summed, factor = 1 + side * rounding(finished, name), finished.grid_factor + side * LOGGED
    if finished.published.quant.grid == "fisher":
        unclipped_M = finished.weights[name].double().abs().amax(1) / (largest_integer(bits) - 1)
        return as_scales((finished.fisher_steps[name].double() * summed * factor).maximum(unclipped_M))[None]
    scales_CM = scales_for(clips(finished, name) * summed, bits)
    return as_scales(scales_CM.double() * factor) if is_matrix(name) else scales_CM


def is_on_grid(finished: Finished, name: str, bits: int) -> bool:
    """Whether every row of a tensor has one of the scales that its rule allows."""
    scales_M = finished.quantized[name].scales_M
    least_CM, most_CM = (scale_limits(finished, name, bits, side=side) for side in (-1, 1))
    return bool(((least_CM <= scales_M) & (scales_M <= most_CM)).any(0).all())


def used(finished: Finished) -> dict[str, int]:
    """Bits of the quantised tensors that hold anything: one less of the matrices that do not fit theirs."""
    config = finished.published.quant
    full = {name: bits_of(name, config) for name, tensor in finished.quantized.items() if tensor.integers_MN.any()}
    if not config.coarse_matrices:
        return full
    return {name: bits - (is_matrix(name) and not is_on_grid(finished, name, bits)) for name, bits in full.items()}


def test_each_row_has_the_scale_that_its_rule_gives(finished: Finished) -> None:
    bits = used(finished)
    assert [name for name in bits if not is_on_grid(finished, name, bits[name])] == []
    largest = {name: int(finished.quantized[name].integers_MN.abs().max()) for name in bits}
    assert [name for name in bits if largest[name] > largest_integer(bits[name])] == []


def test_the_matrices_that_hear_the_least_get_one_bit_less(finished: Finished) -> None:
    config, bits = finished.published.quant, {name: bits for name, bits in used(finished).items() if is_matrix(name)}
    coarse = {name for name in bits if bits[name] < bits_of(name, config)}
    assert len(coarse) == config.coarse_matrices
    heard = {name: float(moments.trace()) for name in bits if (moments := moments_of(finished, name)) is not None}
    least = min((heard[name] for name in heard if name not in coarse), default=0.0)
    assert all(heard[name] <= least * (1 + rounding(finished, name)) for name in coarse)


def share_of_nearest(finished: Finished, name: str, bits: int) -> float:
    """The part of a tensor's integers that are the nearest to its weights on its grid."""
    tensor = finished.quantized[name]
    nearest = round_to_nearest(finished.weights[name], tensor.scales_M, bits)
    return float((nearest == tensor.integers_MN).float().mean())


def test_its_matrices_are_rounded_as_it_says(finished: Finished) -> None:
    nearest = [share_of_nearest(finished, name, bits) for name, bits in used(finished).items() if is_matrix(name)]
    if finished.published.quant.method == "gptq":
        assert min(nearest) < FED_BACK and sum(nearest) / len(nearest) < NEAREST
    else:
        assert min(nearest) > NEAREST


def test_its_tables_and_vectors_are_stored_as_it_says(finished: Finished) -> None:
    config = finished.published.quant
    plain = [tensor for tensor in finished.file.tensors.values() if isinstance(tensor, torch.Tensor)]
    assert all(tensor.dtype == torch.float16 for tensor in plain) == config.half_vectors
    assert CODERS[finished.run.artifact.read_bytes()[0]] == config.coder
    nearest = share_of_nearest(finished, HEAD_TABLE, config.embedding_bits)
    assert nearest < FED_BACK if config.embedding_method == "gptq" else nearest > NEAREST
    cap, margin = finished.config.limits.artifact_bytes, config.margin_bytes
    if config.fit != "prune":  # which the cap of this run does not call for
        assert finished.named("fitted") and cap - 3 * margin < finished.result.artifact_bytes <= cap


def test_its_budget_pays_for_a_calibration_that_reads_training_data(finished: Finished) -> None:
    config, result = finished.published.quant, finished.result
    calibration = result.train_seconds - finished.metrics("train_loss")[-1]["train_seconds"]
    if config.calibration == "training" and "calibrate" in result.phases:
        assert calibration >= result.phases["calibrate"]
    else:  # text that the model has written itself, or none
        assert calibration < result.phases.get("calibrate", math.inf)


def chunk_losses(finished: Finished, stage: str) -> list[float]:
    """Nats per token of each chunk of a stage, as the run has it."""
    scored = [event for event in finished.events if event["kind"] == SCORED and event["stage"] == stage]
    return [event["nats"] / event["tokens"] for event in scored]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by the compiler itself
def test_it_learns_from_each_chunk_after_its_score_where_it_adapts(finished: Finished) -> None:
    config, result = finished.config.ttt, finished.result
    if config.method == "off":
        assert result.parity_nats is None and LEARNED not in [event["kind"] for event in finished.events]
        return
    chunks = math.ceil(finished.stream.positions / config.chunk_tokens)
    kinds = [event["kind"] for event in finished.events if event.get("stage") == TTT]
    assert kinds == [*([SCORED, LEARNED] * (chunks - 1)), SCORED] and chunks > 2
    assert abs(result.parity_nats or 0.0) < REPRODUCED
    assert finished.adapted_loss() == pytest.approx(result.scores[TTT].loss, abs=PARITY_TOLERANCE)
    plain, adapted = (chunk_losses(finished, stage) for stage in ("sliding", TTT))
    moves = [abs(after - before) for before, after in zip(plain, adapted, strict=True)]
    assert max(moves) > PARITY_TOLERANCE  # of a chunk: over all of them better and worse may cancel, after so few steps


@pytest.mark.parametrize("preset", ["pr1217"], indirect=True)
def test_slot_fits_its_vector_before_windows_are_scored(finished: Finished) -> None:
    config, sliding = finished.config.evaluation, finished.result.scores["sliding"].loss
    assert config.slot_steps == finished.published.evaluation.slot_steps == 8
    state = finished.file.state()
    with_slot, without = (finished.loss(state, stride=config.stride, has_slot=has_slot) for has_slot in (True, False))
    assert sliding == pytest.approx(with_slot, abs=REPRODUCED)
    assert sliding < without - 1000 * REPRODUCED


@pytest.mark.parametrize("preset", ["pr461"], indirect=True)
def test_a_file_over_the_cap_is_pruned_where_the_preset_says_so(finished: Finished, home: Home) -> None:
    cap = finished.result.artifact_bytes - 500
    again = run_again(finished, Home(home.root / "pr461"), limits__artifact_bytes=cap)
    (fitted,) = again.named("fitted")
    assert again.result.status == COMPLETE and again.result.artifact_bytes <= cap
    assert fitted["pruned"] > 0 and fitted["grid_factor"] == 1.0
