from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.checks import FAILED, PASSED, UNDECIDED, Check
from orchestrator.splits import check_split


def checked(**data: Any) -> list[Check]:
    facts = {"variant": None, "targets": 300, "counted_bytes": 1800, "published": None, "overlap": overlap(0)}
    return check_split({"data": {**facts, **data}}, Path("/data/books"))


def overlap(repeated: int, *, most: int = 0) -> dict[str, Any]:
    first = 12 if repeated else None
    return {
        "val_documents": 500, "train_documents": 9000, "repeated": repeated, "repeated_tokens": 9 * repeated, "first": first,
        "most_repeated": most,
    }  # fmt: skip


def test_splits_without_a_common_document_pass_with_their_sizes() -> None:
    [check] = checked()
    assert (check.status, check.expected, check.found) == (PASSED, 0, 0)
    assert check.note.startswith("500 validation and 9,000 training documents, by their tokens")


def test_validation_text_in_training_is_told_with_its_place() -> None:
    [check] = checked(overlap=overlap(400))
    assert (check.status, check.found) == (FAILED, 400)
    assert "the first is training document 12" in check.note and check.remedy


@pytest.mark.parametrize(("repeated", "status"), [(5, PASSED), (6, FAILED)])
def test_crawled_text_may_repeat_itself_a_little(repeated: int, status: str) -> None:
    [check] = checked(variant="sp9", overlap=overlap(repeated, most=5))
    assert (check.status, check.expected, check.is_limit) == (status, 5, True)


def test_without_training_shards_nothing_is_decided() -> None:
    [check] = checked(overlap=None)
    assert (check.status, check.note) == (UNDECIDED, "there are no training shards here")


@pytest.mark.parametrize(
    ("targets", "counted", "failed"),
    [
        (45_508_608, 151_074_053, []),
        (45_508_608, 151_074_061, []),  # as the logs' digits allow
        (45_508_608, 151_074_062, ["split.known_bytes"]),
        (36_562_944, 121_000_000, ["split.known_tokens", "split.known_bytes"]),  # #2109
    ],
)
def test_a_published_split_has_the_counts_of_its_public_logs(targets: int, counted: int, failed: list[str]) -> None:
    known = {"targets": 45_508_608, "counted_bytes": 151_074_053}
    published = {"targets": targets, "counted_bytes": counted, "window_tokens": 2048, "log_bytes": 8, "known": known}
    checks = checked(variant="sp4096", published=published)
    assert [check.name for check in checks if check.status == FAILED] == failed
    assert checks[1].note == "variant sp4096, windows of 2,048"
