"""The fused kernels without a GPU: Triton's interpreter computes what they say, values and gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.interpreted import NOT_INTERPRETED
from tests.trainer.kernel_cases import KERNELS, ROUNDING

ROOT = Path(__file__).parents[2]
TRITON = os.environ.get("CADDIE_TEST_TRITON", "")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not TRITON, reason="needs Triton in a folder that CADDIE_TEST_TRITON names; a gigabyte")
def test_a_fused_kernel_computes_its_plain_form_by_the_interpreter_too():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), TRITON))}
    found = subprocess.run(
        [sys.executable, "-m", "tests.trainer.interpreted"], env=environment, cwd=ROOT, capture_output=True, text=True,
        check=False, timeout=800,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    errors = json.loads(found.stdout)
    assert sorted(errors) == sorted(KERNELS.keys() - set(NOT_INTERPRETED))
    too_large = {name: values for name, values in errors.items() if max(values.values()) >= ROUNDING}
    assert too_large == {}
    assert all(len(values) >= 2 and max(values.values()) > 0 for values in errors.values())  # a kernel did round
