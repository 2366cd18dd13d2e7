"""What a run's data set must be: without validation text among its training documents, and the published split if it says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.checks import Check, Rule, is_at_most, is_within, judged

REPREPARE = "the run saw text that it was scored on: prepare the data set again, and run again"

DISJOINT = Rule("split.disjoint", "no validation document may be a training document", REPREPARE)
REPEATS = Rule(
    DISJOINT.name, "few validation documents of crawled text, which repeats itself, may be training documents", REPREPARE
)  # fmt: skip
KNOWN_TOKENS = Rule(
    "split.known_tokens",
    "a published validation split must have the tokens of its public logs, in whole windows",
    "scores on this split do not compare with the published ones: fetch the canonical shards (#2031, #2109)",
)
KNOWN_BYTES = Rule(
    "split.known_bytes", "a published validation split must have the bytes of its public logs", KNOWN_TOKENS.remedy
)


def check_split(measured: Mapping[str, Any], root: Path) -> list[Check]:
    """Disjointness by the documents' own tokens, and the known counts of a published export."""
    data = measured["data"]
    published, common = data["published"], data["overlap"]
    if common is None:
        missing = judged(DISJOINT, 0, None, root)
        disjoint = dataclasses.replace(missing, note="there are no training shards here")
    else:
        words = f"{common['val_documents']:,} validation and {common['train_documents']:,} training documents, by their tokens"
        found, most = common["repeated"], common["most_repeated"]
        check = judged(REPEATS, most, found, root, holds=is_at_most) if most else judged(DISJOINT, 0, found, root)
        first = f"; the first is training document {common['first']:,}" if found else ""
        disjoint = dataclasses.replace(check, note=f"{words}{first}; thread #2127")
    if published is None:
        return [disjoint]
    spread = float(published["log_bytes"])  # as far as counts from the logs' eight digits may be off
    known, note = published["known"], f"variant {data['variant']}, windows of {published['window_tokens']:,}"
    tokens = judged(KNOWN_TOKENS, known["targets"], published["targets"], root)
    counted = judged(
        KNOWN_BYTES, known["counted_bytes"], published["counted_bytes"], root, holds=is_within(spread), tolerance=spread
    )  # fmt: skip
    return [disjoint, dataclasses.replace(tokens, note=note), dataclasses.replace(counted, note=note)]
