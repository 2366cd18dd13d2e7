"""Rules that nobody has settled, and what the run does about each: information for a reviewer, never a verdict.

Numbers name threads of openai/parameter-golf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.checks import Check, Claims, Rule, noted
from trainer.config import Config


@dataclass(frozen=True)
class OpenRule:
    """A question without an answer, and where it matters."""

    topic: str
    """Ends the name of its line."""

    question: str
    matters: Callable[[Config], bool]
    does: Callable[[Config], str]
    """What this configuration does."""

    threads: str


def learns(config: Config) -> bool:
    return config.ttt.is_scored


OPEN_RULES = (
    OpenRule(
        "track",
        "whether state may be built from evaluation tokens that were scored",
        lambda _: True,
        lambda config: "track B, adaptive" if learns(config) else "track A, a fixed predictor",
        "#1017 (tracks), #1735",
    ),
    OpenRule(
        "epochs",
        "whether a scored chunk may be learned in several passes",
        lambda config: learns(config) and not config.ttt.is_by_document and config.ttt.epochs > 1,
        lambda config: f"{config.ttt.epochs} passes",
        "used by all merged chunk records, questioned in #1698",
    ),
    OpenRule(
        "order",
        "whether documents may be scored in another order than the file's",
        lambda config: config.ttt.is_by_document,
        lambda _: "by falling length",
        "used by all LoRA records since #77",
    ),
    OpenRule(
        "across_documents",
        "whether the document before may serve as context",
        lambda config: config.evaluation.protocol != "documents",
        lambda config: f"yes, windows of {config.evaluation.sequence_length}",
        "ordinary context in merged records; token shifts across BOS were fixed in #1851",
    ),
    OpenRule(
        "calibration",
        "whether quantisation after the clock may read training data",
        lambda config: config.quant.method == "gptq" or config.quant.grid == "fisher",
        lambda _: "calibration is inside the training limit; rounding and packing are not counted",
        "closed for calibrating after it: #535, #569, #593, #609 (by #1019); packing uncounted: #1868",
    ),
    OpenRule(
        "code_bytes",
        "which code counts",
        lambda _: True,
        lambda _: "the file that is shipped and run",
        "computed sizes since #1530 (#1667); over the cap by the log's total: #1835",
    ),
    OpenRule(
        "bytes",
        "whether bytes are the raw text's or the normalised text's",
        lambda _: True,
        lambda _: "the normalised text's, as the challenge's scripts count",
        "#1785; lossy normalisation is disputed in #1578, #1604",
    ),
)  # fmt: skip


def note_open_rules(claims: Claims) -> list[Check]:
    """What the run does where nobody has ruled."""
    config = claims.config
    if config is None:
        return []
    return [
        noted(
            Rule(f"open.{rule.topic}", rule.question, ""),
            None,
            claims.run.spec,
            f"{rule.does(config)} ({rule.threads})",
        )
        for rule in OPEN_RULES
        if rule.matters(config)
    ]
