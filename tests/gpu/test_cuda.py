"""The same code on a GPU: `make test ARGS="tests/gpu"` on a machine that has one; everything is skipped elsewhere."""

import gc
import math

import pytest
import torch

from benchmarks.plain import PlainNetwork
from tests.trainer.kernel_cases import DEVICE, KERNELS, ROUNDING, errors, relative_error
from tests.trainer.make_data import make_data
from tests.trainer.make_run import execute, metrics_of, micro_config, plan, result_of
from tests.trainer.test_gptq import correlated_inputs, weights
from tests.trainer.tiny import CONFIG, LENGTH, random_model, random_tokens, rounded
from trainer import protocol
from trainer.attention import fastest_kernels, rotary_tables
from trainer.by_document import Documents, evaluate_documents
from trainer.config import Config, EvaluationConfig, QuantConfig, TTTConfig, with_knobs
from trainer.distributed import World
from trainer.evaluate import Stream, evaluate, plan_windows
from trainer.graphs import Recorded
from trainer.lora import LoRA
from trainer.model import Model
from trainer.muon import newton_schulz
from trainer.protocol import read_lines
from trainer.train import Network
from trainer.ttt import PARITY_TOLERANCE, ChunkAdapter, DocumentAdapter, require_parity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


WIDE = {
    "model.width": 256, "model.heads": 4, "model.kv_heads": 2, "model.mlp_ratio": 4.0, "model.rope_dims": 16,
    "model.value_embedding_dim": 64, "data.sequence_length": LENGTH, "data.tokens_per_step": 4 * LENGTH,
    "data.micro_batch_sequences": 2,
}  # fmt: skip
"""The tiny network as wide as every fused kernel asks for."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", KERNELS)
def test_a_fused_kernel_is_its_plain_form_to_the_rounding_of_bfloat16(name):
    assert {what: error for what, error in errors(name).items() if error >= ROUNDING} == {}


def wide_model(precision=torch.bfloat16):
    torch.manual_seed(0)
    model = Model(with_knobs(CONFIG, WIDE).model, train_length=LENGTH, precision=precision)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(DEVICE)


def wide_network(model):
    return Network(model, with_knobs(CONFIG, WIDE), World(rank=0, size=1, device=DEVICE))


@pytest.mark.parametrize("recurrent", [False, True])
def test_the_fused_network_follows_the_plain_one_in_float32(recurrent):
    fused, plain, reference = wide_model(), wide_model(), wide_model(torch.float32)
    tokens = random_tokens(rows=4, length=LENGTH + 1).to(DEVICE)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    tables = rotary_tables(LENGTH, fused.config, train_length=LENGTH, device=DEVICE)
    loss = fused(inputs, targets, recurrent)
    expected = PlainNetwork(reference)(inputs, targets, *tables, recurrent)
    for one in (loss, expected, PlainNetwork(plain)(inputs, targets, *tables, recurrent)):
        one.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=0.02)

    def mean_error(model):
        pairs = zip(model.parameters(), reference.parameters(), strict=True)
        errors = [relative_error(x.grad, y.grad) for x, y in pairs]
        return sum(errors) / len(errors)

    assert mean_error(fused) < 1.25 * mean_error(plain)  # rounded no more often than the usual forms


@pytest.mark.parametrize("recurrent", [False, True])
def test_the_fused_network_scores_the_last_positions_alone_as_among_all(recurrent):
    model, tokens = wide_model(), random_tokens(rows=4, length=LENGTH + 1).to(DEVICE)
    with torch.no_grad(), fastest_kernels():
        everything = model.nats(tokens[:, :-1], tokens[:, 1:], recurrent=recurrent, scored=LENGTH)
        for scored in (1, 4):
            last = model.nats(tokens[:, :-1], tokens[:, 1:], recurrent=recurrent, scored=scored)
            assert (last - everything[:, -scored:]).abs().mean() < 0.03  # other kernels, each rounding to bfloat16


def test_a_replay_gives_the_nats_of_the_call_bit_for_bit():
    model = wide_model()
    recorded = Recorded(model.nats, is_pure=True)
    with torch.no_grad(), fastest_kernels():
        for seed in (0, 1, 2):
            tokens = random_tokens(rows=4, length=LENGTH + 1, seed=seed).to(DEVICE)
            for recurrent in (False, True):
                for scored in (4, LENGTH):
                    asked = {"recurrent": recurrent, "scored": scored}
                    replayed = recorded(tokens[:, :-1], tokens[:, 1:], **asked).clone()
                    assert torch.equal(replayed, model.nats(tokens[:, :-1], tokens[:, 1:], **asked))
    assert len(recorded.replays) == 4


def test_a_replay_reads_the_weights_as_they_are_now():
    model = wide_model()
    recorded, tokens = Recorded(model.nats, is_pure=True), random_tokens(length=LENGTH + 1).to(DEVICE)
    with torch.no_grad():
        before = recorded(tokens[:, :-1], tokens[:, 1:], recurrent=True, scored=LENGTH).clone()
        model.embedding.weight.mul_(1.5)
        after = recorded(tokens[:, :-1], tokens[:, 1:], recurrent=True, scored=LENGTH)
        assert not torch.equal(after, before)
        assert torch.equal(after, model.nats(tokens[:, :-1], tokens[:, 1:], recurrent=True, scored=LENGTH))


def test_an_older_graph_that_is_due_for_collection_spoils_no_recording():
    def recorded_doubling():
        ones, doubled = torch.ones(4, device=DEVICE), Recorded(lambda x: 2 * x, is_pure=True)
        doubled.itself = doubled  # so that only the collector frees it
        return doubled(ones)

    def collecting(x):
        collected = [[] for _ in range(1000)]  # more objects than the collector lets pass
        return x + len(collected)

    thresholds = gc.get_threshold()
    recorded_doubling()
    try:
        gc.set_threshold(10, 1, 1)
        assert Recorded(collecting, is_pure=True)(torch.ones(4, device=DEVICE)).tolist() == 4 * [1001.0]
    finally:
        gc.set_threshold(*thresholds)


@pytest.mark.parametrize("recurrent", [False, True])
def test_replayed_micro_batches_accumulate_the_gradient_of_eager_ones(recurrent):
    recorded, eager = wide_network(wide_model()), wide_network(wide_model())
    batch = random_tokens(rows=4, length=LENGTH + 1).to(DEVICE)
    with fastest_kernels():
        recorded.prepare()
        assert recorded.gradients.all.abs().max() == 0
        before = recorded.surprises()
        loss, expected = recorded.backward(batch, recurrent).clone(), eager.backward(batch, recurrent)
    assert recorded.surprises() == before
    assert (recorded.accumulate.misses, eager.accumulate.misses) == (0, 2)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    # Attention's backward adds up in no fixed order before it rounds to bfloat16.
    assert relative_error(recorded.gradients.all, eager.gradients.all) < ROUNDING


@pytest.mark.parametrize("is_recorded", [True, False])
def test_the_first_chunk_of_ttt_scores_as_sliding_evaluation_does(is_recorded):
    tokens = random_tokens(rows=1, length=24).flatten().repeat(9)
    text = Stream(tokens.int().to(DEVICE), torch.ones(tokens.numel() - 1, dtype=torch.int64, device=DEVICE))
    windows, world = plan_windows(text.positions, length=LENGTH, stride=4), World(rank=0, size=1, device=DEVICE)
    ttt = TTTConfig(chunk_tokens=32, lr=0.05, epochs=2, batch_sequences=2)

    def score(adapts):
        model = wide_model().eval()
        adapter = ChunkAdapter(model, text, config=ttt, length=LENGTH, recurrent=True, world=world) if adapts else None
        return evaluate(
            Recorded(model.nats, is_pure=True) if is_recorded else model.nats, text, windows,
            config=EvaluationConfig(sequence_length=LENGTH, stride=4, batch_windows=8), recurrent=True, world=world,
            chunk_tokens=ttt.chunk_tokens, adapter=adapter,
        )  # fmt: skip

    with fastest_kernels():
        sliding, adapted = score(False), score(True)
    assert abs(require_parity(sliding.first_chunk_loss, adapted.first_chunk_loss)) <= PARITY_TOLERANCE
    assert math.isfinite(adapted.score.loss)
    assert adapted.score.loss < sliding.score.loss


@pytest.mark.parametrize("targets", [("q", "k", "v", "out", "mlp", "head"), ("up", "down")])
@pytest.mark.parametrize("adapters", [1, 4])
def test_fresh_adapters_change_nothing_beside_fused_kernels(targets, adapters):
    config = TTTConfig(method="lora", lora_rank=8, lora_targets=targets)
    model, tokens = wide_model().eval(), random_tokens(rows=4, length=LENGTH + 1).to(DEVICE)
    with fastest_kernels(), torch.no_grad():
        plain = model.nats(tokens[:, :-1], tokens[:, 1:], recurrent=True, scored=LENGTH)
        model.lora = LoRA(model.config, model.layer_order(True), config, adapters=adapters, device=DEVICE)
        adapted = model.nats(tokens[:, :-1], tokens[:, 1:], recurrent=True, scored=LENGTH)
    # All but the MLP's own matrices and the head stand beside what is fused: a term of zeros changes no bit.
    tolerance = 0.05 if "up" in targets else 1e-4
    torch.testing.assert_close(adapted, plain, atol=tolerance, rtol=0)


def test_documents_are_adapted_to_by_recorded_graphs_as_by_eager_code():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(2, 64, (5,), generator=generator).repeat(7)[:length] for length in (30, 9, 17, 4, 12)]
    tokens = torch.cat([part for phrase in parts for part in (torch.tensor([1]), phrase)])
    text = Stream(tokens.int().to(DEVICE), torch.ones(tokens.numel() - 1, dtype=torch.int64, device=DEVICE))
    world = World(rank=0, size=1, device=DEVICE)
    config = TTTConfig(
        method="lora", lora_unit="document", document_tokens=4, batch_documents=2, lr=0.02, lora_targets=("q", "out", "head")
    )  # fmt: skip
    losses = []
    with fastest_kernels():
        for is_recorded in (True, False):
            model = wide_model().eval()
            documents = Documents(text, text.documents(1), config=config, length=LENGTH, recurrent=True, world=world)
            plain = documents.first_loss(model.nats)
            adapter = DocumentAdapter(model, config=config, recurrent=True, world=world)
            scorer = Recorded(model.nats, is_pure=True) if is_recorded else model.nats
            if not is_recorded:
                adapter.differentiate = adapter.differentiate.function
            assert abs(require_parity(plain, documents.first_loss(scorer))) <= PARITY_TOLERANCE
            losses.append(evaluate_documents(scorer, documents, adapter=adapter).loss)
            unadapted = evaluate_documents(wide_model().eval().nats, documents).loss
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)  # bfloat16, and AdamW's steps on small gradients
    assert losses[0] < unadapted


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
    on_cpu, on_gpu = (newton_schulz(x[None], 5)[0].float().cpu() for x in (matrix, matrix.cuda()))
    assert (on_cpu - on_gpu).norm() / on_cpu.norm() < 0.06  # each side is a few per cent from float64


def test_gptq_agrees_with_the_cpu():
    inputs, weight = correlated_inputs(), weights()
    moments = inputs.T @ inputs / len(inputs)
    on_cpu = rounded(weight, moments, config=QuantConfig())
    on_gpu = rounded(weight.cuda(), moments.cuda(), config=QuantConfig())
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
    assert "recompiled" not in {event.get("name") for _, event in read_lines(compiled.events)}
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
