"""An audit on a GPU: what must stay there stays, though sums come in another order each time."""

import pytest
import torch

from orchestrator.conditions import GPU_NATS, MEAN_NATS, NOISE
from tests.trainer.make_data import make_data, quiet
from tests.trainer.make_run import execute, micro_config, plan, result_of
from trainer import protocol
from trainer.audit import Sampling, audit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BY_DOCUMENT = {
    "ttt__method": "lora", "ttt__lora_unit": "document", "ttt__batch_documents": 4, "ttt__document_tokens": 16,
    "evaluation__protocol": "documents",
}  # fmt: skip


@pytest.mark.parametrize("knobs", [{}, BY_DOCUMENT], ids=["chunks", "documents"])
def test_a_run_on_a_gpu_passes_every_probe(tmp_path, knobs):
    data = make_data(tmp_path)
    run = plan(tmp_path / "home", data, micro_config(**knobs))
    assert result_of(execute(run)).status == protocol.COMPLETE
    found = audit(run, data, sampling=Sampling(2000, 0), say=quiet)
    assert found["device"] != "cpu"
    probes = found["probes"]
    for prefix in ("", "ttt_"):
        for moved in (*probes[f"{prefix}future"].values(), probes[f"{prefix}reach_back"]):
            assert moved["control"] > 0
            assert moved["largest"] <= max(GPU_NATS, NOISE * moved["noise"])
        assert probes[f"{prefix}distribution"]["largest_log_sum"] < GPU_NATS
        assert probes[f"{prefix}distribution"]["largest_entry_gap"] < GPU_NATS
        assert probes[f"{prefix}coverage"]["again"] == probes[f"{prefix}coverage"]["never"] == 0
    assert probes["parity"] < MEAN_NATS
