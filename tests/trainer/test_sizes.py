import json
import subprocess
import sys

import pytest
import torch

from trainer import artifact
from trainer.gptq import Quantized
from trainer.protocol import RunDir
from trainer.sizes import ATTENTION, EMBEDDING, MLP, REST, VALUE_EMBEDDING, bytes_by_group, group_of, sizes_of


def quantized(rows, columns, largest):
    integers = torch.randint(-largest, largest + 1, (rows, columns), generator=torch.Generator().manual_seed(rows))
    return Quantized(integers.to(torch.int8), torch.rand(rows).half())


def make_run(root, coder):
    tensors = {
        "embedding.weight": quantized(64, 32, 100),
        "blocks.0.attention.query.weight": quantized(32, 32, 3),
        "blocks.0.mlp.up.weight": quantized(96, 32, 3),
        "blocks.0.mlp_scale": torch.ones(32).half(),
    }
    run = RunDir(root)
    root.mkdir()
    file = artifact.ModelFile({"config": {"quant": {"brotli_quality": 5}}, "recurrent": False}, tensors)
    run.artifact.write_bytes(artifact.pack(file, coder, 5))
    return run


@pytest.mark.parametrize("coder", artifact.CODERS)
def test_groups_together_are_the_whole_file_and_larger_ones_take_more(tmp_path, coder):
    run = make_run(tmp_path / "run", coder)
    sizes = bytes_by_group(run)
    assert sum(sizes.values()) == run.artifact.stat().st_size
    assert set(sizes) == {EMBEDDING, ATTENTION, MLP, REST}
    # three times the values of the same range; a seven-bit range for two values a row
    assert sizes[MLP] == pytest.approx(3 * sizes[ATTENTION], rel=0.02)
    assert sizes[EMBEDDING] > 4 * sizes[ATTENTION]
    assert sizes[REST] > 0


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("value_embedding.table.weight", VALUE_EMBEDDING),
        ("head.weight", EMBEDDING),
        ("blocks.3.mlp.down.weight", MLP),
        ("blocks.3.attention.out.weight", ATTENTION),
    ],
)
def test_a_tensor_belongs_to_the_group_of_its_name(name, group):
    assert group_of(name) == group


def test_a_file_that_cannot_be_read_is_told_and_the_others_are_shown(tmp_path):
    good, damaged, missing = make_run(tmp_path / "good", "brotli"), RunDir(tmp_path / "bad"), RunDir(tmp_path / "none")
    damaged.root.mkdir()
    damaged.artifact.write_bytes(b"no model")
    found = sizes_of([good, damaged, missing])
    assert list(found["sizes"]) == ["good"]
    assert found["unreadable"]["bad"].startswith("ProtocolError: ")
    assert found["unreadable"]["none"].startswith("FileNotFoundError: ")


def test_the_command_prints_one_object(tmp_path):
    run = make_run(tmp_path / "run", "brotli")
    told = subprocess.run(
        [sys.executable, "-m", "trainer", "sizes", str(run.root), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(told.stdout.splitlines()[-1])["sizes"]["run"] == bytes_by_group(run)
