"""Every preset, in small, from its own bundle to its last score, and evidence that each of its techniques took part."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import worker
from orchestrator.folding import choices
from orchestrator.home import Home
from tests.end_to_end.shrunk import Finished, run_again, run_preset
from tests.trainer.published import FACTS, TWICE
from trainer.artifact import CODERS
from trainer.config import ModelConfig
from trainer.gptq import largest_integer, round_to_nearest
from trainer.protocol import COMPLETE, LEARNED, SCORED, TTT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first run compiles what the others find

FISHER = "pr1326-fisher"
ORDERS = {name: order for name, (_, order) in FACTS.items()} | {FISHER: TWICE}

LARGEST_BUNDLE_BYTES = 25_000

REPRODUCED = 1e-6  # nats per token between compiled and plain float32; seen: 3e-8
FELT = 1e-6  # nats by which a token's score moves, on average; without part in it every bit would stay. Seen: 9e-6
NEAREST, FED_BACK = 0.99, 0.95  # parts of a matrix's integers that are the nearest: without error feedback, and with it
GAIN_MOVES = 1.5  # by which training in small moves the queries' gain, at most; seen: 0.64
BETWEEN_5_AND_6_BITS = 23  # of the largest integers
STEPS_OFF = 2.5  # of a coarser grid, by which rounding and error feedback move a row's largest integer; seen: 1.8
SCALES_OFF = 0.03  # a scale keeps 6 bits, and is rounded once more where the grid is changed: 0.8 % each time


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One core a run, and one compile cache for all, as a user may have it: the presets share most graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setenv(worker.THREADS, "1")
        yield


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


def test_its_parts_have_learned(finished: Finished) -> None:
    model, state = finished.published.model, finished.file.state()
    gain = state["blocks.1.attention.gain"]
    assert float((gain - model.qk_gain).abs().max()) < GAIN_MOVES and gain.unique().numel() > 1
    outs = [state[f"blocks.{layer}.attention.out.weight"] for layer in range(model.layers)]
    idle = [layer for layer, out in enumerate(outs) if not out.count_nonzero()]
    assert idle == list(range(model.first_attention_layer))  # they began at zero
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


def clip_in_deviations(finished: Finished, name: str) -> torch.Tensor:
    """Standard deviations at which each row of a matrix is clipped in 6 bits."""
    scales_M = finished.quantized[name].scales_M.float()
    return scales_M * largest_integer(6) / finished.weights[name].std(1, correction=0)


def share_of_nearest(finished: Finished, name: str, bits: int) -> float:
    """The part of a tensor's integers that are the nearest to its weights on its grid."""
    tensor = finished.quantized[name]
    nearest = round_to_nearest(finished.weights[name], tensor.scales_M, bits)
    return float((nearest == tensor.integers_MN).float().mean())


def test_its_matrices_are_rounded_as_it_says(finished: Finished) -> None:
    config, quantized = finished.published.quant, finished.quantized
    names = [f"{name}.weight" for name, _, _ in finished.model(finished.weights).matrices()]
    factor = next((event["grid_factor"] for event in finished.named("fitted")), 1.0)  # how much coarser the grid became
    reach = {name: int(quantized[name].integers_MN.abs().max()) * factor for name in names}
    used = [name for name in names if reach[name]]
    bits = dict.fromkeys(used, 8 if config.grid == "fisher" else 6)
    if config.grid == "quantile":  # whose highest candidate puts a row's largest weight on the largest integer
        bits = {name: 5 if reach[name] < BETWEEN_5_AND_6_BITS else 6 for name in used}
        step = factor if factor > 1 else 0.0
        assert all(abs(reach[name] - largest_integer(bits[name])) <= STEPS_OFF * step for name in used)
        assert list(bits.values()).count(5) == config.coarse_matrices
    if config.grid == "std":
        clips = {n: config.attention_clip_std if ".attention." in n else config.mlp_clip_std for n in used}
        off = torch.cat([clip_in_deviations(finished, name) / factor / clips[name] - 1 for name in used])
        assert abs(float(off.mean())) < SCALES_OFF  # some rows earlier, some later, where they differ in importance
        assert (float(off.abs().max()) > SCALES_OFF) == (config.clip_importance > 0)
    nearest = [share_of_nearest(finished, name, bits[name]) for name in used]
    if config.method == "gptq":
        assert min(nearest) < FED_BACK and sum(nearest) / len(nearest) < NEAREST
    else:
        assert min(nearest) > NEAREST


def test_its_tables_and_vectors_are_stored_as_it_says(finished: Finished) -> None:
    config = finished.published.quant
    plain = [tensor for tensor in finished.file.tensors.values() if isinstance(tensor, torch.Tensor)]
    assert all(tensor.dtype == torch.float16 for tensor in plain) == config.half_vectors
    assert CODERS[finished.run.artifact.read_bytes()[0]] == config.coder
    nearest = share_of_nearest(finished, "embedding.weight", config.embedding_bits)
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


def test_it_learns_from_each_chunk_after_its_score_where_it_adapts(finished: Finished) -> None:
    config, result = finished.config.ttt, finished.result
    learned = [event for event in finished.events if event["kind"] == LEARNED]
    if config.method == "off":
        assert learned == [] and result.parity_nats is None
        return
    chunks = math.ceil(finished.stream.positions / config.chunk_tokens)
    kinds = [event["kind"] for event in finished.events if event.get("stage") == TTT]
    assert kinds == [*([SCORED, LEARNED] * (chunks - 1)), SCORED] and chunks > 2
    assert abs(result.parity_nats or 0.0) < REPRODUCED
    assert (
        abs(result.scores[TTT].bpb - result.scores["sliding"].bpb) > REPRODUCED
    )  # for better or worse, after so few steps


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
