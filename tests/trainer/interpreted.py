"""The fused kernels by Triton's interpreter, on a CPU: prints each case's errors as JSON. Needs TRITON_INTERPRET=1.

A program of its own, since Triton decides on import whether it interprets; `test_interpreted.py` starts it.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch

from tests.trainer.kernel_cases import KERNELS, errors
from trainer import kernels

MULTIPROCESSORS = 2  # of the GPU that is played: fewer programs, so that each sums over several tiles
NOT_INTERPRETED = ("mlp",)  # Triton 3.9's interpreter multiplies what a descriptor loaded in bfloat16 as integers


def main() -> None:
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    kernels.KERNELS_ON = "cpu"
    print(json.dumps({name: errors(name) for name in KERNELS if name not in NOT_INTERPRETED}))


if __name__ == "__main__":
    main()
