"""Techniques that reviewers refuse in submissions: a study may measure them, a package refuses them, a report names no cell of theirs best."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config import Config, knob_value

REFUSED_KNOBS = {
    "evaluation.slot_steps": (0, "SLOT optimises on what it then scores: #1240, #1336"),
    "ttt.before_quantization": (False, "the stored model has learned what it then scores: condition 3 of #1017"),
}
"""The value that switches each off, and why it is refused."""


def objections(config: Config) -> Iterator[str]:
    """Every knob that a reviewer would refuse, with its value and the reason."""
    for knob, (off, why) in REFUSED_KNOBS.items():
        if (value := knob_value(config, knob)) != off:
            yield f"{knob} = {value} is not accepted in submissions: {why}"
