"""The same code on a GPU: `make test ARGS="tests/gpu"` on a machine that has one; everything is skipped elsewhere."""

import pytest
import torch

from tests.trainer.make_data import make_data
from tests.trainer.make_run import execute, metrics_of, micro_config, plan, result_of
from tests.trainer.test_gptq import correlated_inputs, weights
from tests.trainer.tiny import LENGTH, random_model, random_tokens
from trainer import protocol
from trainer.attention import rotary_tables
from trainer.config import Config, QuantConfig
from trainer.gptq import quantize_matrix
from trainer.muon import newton_schulz
from trainer.ttt import PARITY_TOLERANCE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def test_rotary_tables_are_the_same_eager_and_compiled():
    """Where public scripts broke: tables that the compiler computes in float32 and eager code in bfloat16."""
    config, device = Config().model, torch.device("cuda")
    compiled = torch.compile(rotary_tables, dynamic=False)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        eager = rotary_tables(2048, config, train_length=2048, device=device)
        fused = compiled(2048, config, train_length=2048, device=device)
    for a, b in zip(eager, fused, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0)  # float32 angles near 2,047 are 1.2e-4 apart


@pytest.mark.parametrize("recurrent", [False, True])
def test_the_network_gives_the_same_nats_as_on_a_cpu(recurrent):
    model, tokens = random_model(), random_tokens(length=LENGTH + 1)
    on_cpu = model.nats(tokens[:, :-1], tokens[:, 1:], recurrent=recurrent, scored=LENGTH)
    moved = tokens.cuda()
    on_gpu = model.cuda().nats(moved[:, :-1], moved[:, 1:], recurrent=recurrent, scored=LENGTH)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-3, rtol=1e-3)  # matrix products may use TF32-like orders


def test_orthogonalisation_agrees_with_the_cpu_to_bfloat16():
    matrix = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    on_cpu, on_gpu = newton_schulz(matrix, 5).float(), newton_schulz(matrix.cuda(), 5).float().cpu()
    assert (on_cpu - on_gpu).norm() / on_cpu.norm() < 0.06  # each side is a few per cent from float64


def test_gptq_agrees_with_the_cpu():
    inputs, weight = correlated_inputs(), weights()
    moments = inputs.T @ inputs / len(inputs)
    on_cpu, _ = quantize_matrix(weight, moments, QuantConfig())
    on_gpu, _ = quantize_matrix(weight.cuda(), moments.cuda(), QuantConfig())
    # A sum in another order can tip a value that lies between two integers, and its row after it.
    assert (on_cpu.integers_MN != on_gpu.integers_MN.cpu()).float().mean() < 0.02


def test_a_run_follows_the_cpu_run_in_float32(tmp_path, data):
    losses = {}
    for device in ("cpu", "cuda"):
        attempt = execute(plan(tmp_path, data, micro_config(runtime__device=device, runtime__precision="float32")))
        assert result_of(attempt).status == protocol.COMPLETE
        losses[device] = metrics_of(attempt, protocol.TRAIN_LOSS)
    assert losses["cuda"][1] == pytest.approx(losses["cpu"][1], abs=1e-4)
    for step, loss in losses["cpu"].items():
        assert losses["cuda"][step] == pytest.approx(loss, rel=2e-3)  # bfloat16 in Muon amplifies rounding


def test_a_compiled_run_keeps_parity_and_follows_the_eager_one(tmp_path, data):
    eager = execute(plan(tmp_path, data, micro_config()))
    compiled = execute(plan(tmp_path, data, micro_config(runtime__compile=True)))
    result = result_of(compiled)
    assert result.status == protocol.COMPLETE
    assert abs(result.parity_nats) <= PARITY_TOLERANCE
    last = max(metrics_of(eager, protocol.TRAIN_LOSS))
    expected = metrics_of(eager, protocol.TRAIN_LOSS)[last]
    assert metrics_of(compiled, protocol.TRAIN_LOSS)[last] == pytest.approx(expected, rel=0.01)  # bfloat16 products


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_and_score_as_one_does(tmp_path, data):
    run = plan(tmp_path, data, micro_config(runtime__precision="float32"))
    alone, together = result_of(execute(run)), result_of(execute(run, processes=2))
    assert together.status == protocol.COMPLETE
    assert together.world_size == 2
    for stage, score in alone.scores.items():
        assert (together.scores[stage].tokens, together.scores[stage].bytes) == (score.tokens, score.bytes)
        assert together.scores[stage].bpb == pytest.approx(score.bpb, rel=5e-3)
