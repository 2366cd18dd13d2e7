"""Bundles of configurations that fold differently, against the readable source."""

import pytest

from orchestrator.bundle import build
from tests.trainer.make_run import execute, metrics_of, micro_config, plan, result_of
from trainer.protocol import COMPLETE

pytestmark = pytest.mark.slow

PLAIN = {
    "model__qk_norm": False, "model__qk_gain": 0.0, "model__rope_dims": 0, "model__xsa_layers": 0,
    "model__value_embedding_dim": 0, "model__ln_scale": False, "model__residual_mix": False, "model__skips": "off",
    "model__tie_embeddings": False, "model__logit_softcap": 0.0, "model__recurrence_passes": 0,
    "model__parallel_start_layer": -1, "optim__muon_row_normalize": False, "optim__muon_momentum_ramp_steps": 0,
    "optim__grad_clip_norm": 0.0, "optim__ema_decay": 0.0, "quant__method": "rtn", "ttt__method": "off",
    "runtime__device": "cpu", "runtime__precision": "bfloat16",
}  # fmt: skip
"""Every technique that can be switched off, is."""

OTHER = {
    "model__skips": "plain", "model__lane_skips": False, "model__recurrence_layers": (2,), "data__order_seed": 3,
    "quant__clip_criterion": "output", "quant__act_order": False, "ttt__grad_clip_norm": 0.0, "ttt__frozen_blocks": 1,
    "runtime__precision": "float32", "optim__embedding_precision": "bfloat16",
}  # fmt: skip
"""What the smoke preset does in another way."""

BY_DOCUMENT = {
    "ttt__method": "lora", "ttt__lora_unit": "document", "ttt__document_tokens": 8, "ttt__batch_documents": 4,
    "ttt__lora_targets": ("q", "k", "v", "out", "mlp", "head"), "ttt__lr": 0.01, "evaluation__protocol": "documents",
}  # fmt: skip
"""Documents apart, each with its adapter."""

LORA = {"ttt__method": "lora", "ttt__lora_targets": ("up", "down"), "ttt__lora_optimizer": "sgd", "ttt__lr": 0.5}


STREAM = {
    "model__parallel": "stream", "model__recurrence_passes": 2, "model__skip_count": 4, "model__value_embedding_dim": 0,
    "model__value_embedding_layers": (), "schedule__recurrence_start_frac": 0.3, "schedule__recurrence_full_frac": 0.6,
    "quant__grid": "std", "quant__embedding_method": "gptq", "quant__clip_importance": 0.175,
}  # fmt: skip
"""As #1412 does it."""

ROUTED = {
    "model__parallel": "routed", "model__untied_mlps": True, "model__first_attention_layer": 1, "model__bigram_buckets": 50,
    "model__bigram_dim": 8, "model__smear": True, "quant__coarse_matrices": 9, "quant__calibration": "generated",
    "quant__generated_sequences": 4, "quant__coder": "brotli", "quant__fit": "prune",
}  # fmt: skip
"""As #1204 does it."""

SLOT = {"evaluation__slot_steps": 2, "ttt__method": "off"}
RESUMABLE = {"runtime__resumable": True}

CHOICES = {
    "plain": PLAIN, "other": OTHER, "by_document": BY_DOCUMENT, "lora": LORA, "stream": STREAM, "routed": ROUTED,
    "slot": SLOT, "resumable": RESUMABLE,
}  # fmt: skip


@pytest.mark.parametrize("knobs", CHOICES.values(), ids=list(CHOICES))
def test_a_bundle_of_other_choices_gives_what_the_source_gives(knobs, tmp_path, prepared):
    config = micro_config(**knobs)
    assert build(config) != build(micro_config())
    run = plan(tmp_path, prepared, config)
    packed, source = (execute(run, source=is_source) for is_source in (False, True))
    results = [result_of(attempt) for attempt in (packed, source)]
    assert [result.status for result in results] == [COMPLETE, COMPLETE]
    assert metrics_of(packed, "train_loss") == metrics_of(source, "train_loss")
    assert results[0].artifact_sha256 == results[1].artifact_sha256
    scores = [{stage: (score.nats, score.bytes) for stage, score in result.scores.items()} for result in results]
    assert scores[0] == scores[1] and len(scores[0]) >= 3
