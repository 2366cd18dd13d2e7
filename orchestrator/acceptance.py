"""Acceptance: what a configuration does that the challenge does not accept, so that no record can be made of it."""

from __future__ import annotations

from trainer.config import Config


def objection(config: Config) -> str:
    """Why the challenge would refuse a record of this configuration; empty where nothing is known against it."""
    if config.evaluation.slot_steps:
        return (
            f"evaluation.slot_steps is {config.evaluation.slot_steps}: SLOT fits the windows of a batch together, and what one "
            "of them scores lies in the context of another"
        )
    return ""
