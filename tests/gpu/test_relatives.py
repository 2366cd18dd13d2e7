"""#1326's relatives on a GPU: the same network as on a CPU, and through the fused kernels; resuming there too."""

import pytest
import torch

from tests.trainer.make_data import make_data
from tests.trainer.make_run import execute, micro_config, plan, result_of
from tests.trainer.test_checkpoint import LONG, start, wait_for_step
from tests.trainer.test_folded_runs import ROUTED, SLOT, STREAM
from tests.trainer.test_relatives import RELATIVES
from tests.trainer.tiny import CONFIG, LENGTH, random_model, random_tokens
from trainer import protocol
from trainer.config import with_knobs
from trainer.model import Model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDE = {"width": 256, "heads": 4, "kv_heads": 2, "mlp_ratio": 4.0, "rope_dims": 16, "value_embedding_dim": 64}
"""As wide as every fused kernel asks for."""


def wide_model(knobs, precision):
    changed = {f"model.{name}": value for name, value in {**WIDE, **knobs}.items()}
    torch.manual_seed(0)
    model = Model(with_knobs(CONFIG, changed).model, train_length=LENGTH, precision=precision)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.cuda()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("knobs", RELATIVES.values(), ids=list(RELATIVES))
@pytest.mark.parametrize("passes", [0, 1])
def test_the_network_gives_the_same_nats_as_on_a_cpu(knobs, passes):
    model, tokens = random_model(**knobs), random_tokens(length=LENGTH + 1)
    on_cpu = model.nats(tokens[:, :-1], tokens[:, 1:], recurrent=passes, scored=LENGTH)
    moved = tokens.cuda()
    on_gpu = model.cuda().nats(moved[:, :-1], moved[:, 1:], recurrent=passes, scored=LENGTH)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-3, rtol=1e-3)  # matrix products may use TF32-like orders


@pytest.mark.parametrize("knobs", RELATIVES.values(), ids=list(RELATIVES))
@pytest.mark.parametrize("passes", [0, 1])
def test_fused_in_bfloat16_it_follows_itself_in_float32(knobs, passes):
    tokens = random_tokens(rows=4, length=LENGTH + 1).cuda()
    fused, reference = (wide_model(knobs, precision) for precision in (torch.bfloat16, torch.float32))
    losses = [model(tokens[:, :-1], tokens[:, 1:], passes) for model in (fused, reference)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=0.02)
    errors = [
        float((x.grad - y.grad).norm() / y.grad.norm())
        for x, y in zip(fused.parameters(), reference.parameters(), strict=True)
        if y.grad is not None and y.grad.any()
    ]
    assert sum(errors) / len(errors) < 0.1  # a wrong gradient is off by its own size, rounding by a few per cent


@pytest.mark.parametrize("knobs", [STREAM, ROUTED, SLOT], ids=["stream", "routed", "slot"])
def test_a_run_completes_compiled_and_recorded(knobs, tmp_path, data):
    attempt = execute(plan(tmp_path, data, micro_config(runtime__compile=True, **knobs)))
    assert result_of(attempt).status == protocol.COMPLETE


def test_a_resumed_run_goes_on_where_it_was_left(tmp_path, data):
    run = plan(tmp_path, data, micro_config(**LONG))
    first, process = start(run, 1)
    wait_for_step(first, process, 5)
    first.notice.touch()
    assert process.wait(timeout=300) == 0
    result = result_of(execute(run))
    assert (result.status, result.steps, list(result.resumed_from)) == (protocol.COMPLETE, 150, ["1"])
