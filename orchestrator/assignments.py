"""Values as they are given on the command line: seeds, knobs, variables, options of sbatch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError
from trainer.config import parse_value

RECORD_SEEDS = "42,314,999"  # the challenge's usual three


def named_preset(text: str) -> str:
    """A preset's name as it stands; a file's path in full, since a study outlives the current directory."""
    return str(Path(text).resolve()) if text.endswith(".toml") else text


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from `42,314,999`; raises ConfigError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--seeds must be whole numbers between commas, got {text!r}", hint=f"--seeds {RECORD_SEEDS}"
        ) from error


def parse_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """Knobs from `optim.matrix_lr=0.02`; raises ConfigError with the nearest name for an unknown one."""
    settings = {}
    for assignment in assignments:
        knob, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(
                f"--set must be knob=value, got {assignment!r}", hint="--set optim.muon_weight_decay=0.05"
            )
        settings[knob] = parse_value(knob, text)
    return settings


def parse_pairs(assignments: Sequence[str]) -> dict[str, str]:
    """Names and texts from `MUON_WD=0.09`; raises ConfigError."""
    pairs = [assignment.partition("=") for assignment in assignments]
    for name, equals, text in pairs:
        if not equals or not name:
            raise ConfigError(f"--set must be NAME=VALUE, got {name + equals + text!r}", hint="--set MUON_WD=0.09")
    return {name: text for name, _, text in pairs}


def parse_options(assignments: Sequence[str]) -> dict[str, Any]:
    """sbatch's options from `mem=0` and `overcommit`."""
    pairs = [assignment.removeprefix("--").partition("=") for assignment in assignments]
    return {name: value if equals else True for name, equals, value in pairs}
