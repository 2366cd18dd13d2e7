"""Loads a shim by its file: its folder is on a script's path, never on ours."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SHIMS = Path(__file__).resolve().parents[2] / "shims"


@pytest.fixture(scope="session")
def flash() -> ModuleType:
    path = SHIMS / "flash_attention" / "flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location("flash_attn_interface_shim", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile looks a function's module up by its name
    spec.loader.exec_module(module)
    return module
