from __future__ import annotations

from pathlib import Path

import pytest
from make_audited import make_audited

from orchestrator.checks import NOTED, read_claims
from orchestrator.open_rules import note_open_rules

ALWAYS = {"open.track", "open.calibration", "open.code_bytes", "open.bytes"}


@pytest.mark.parametrize(
    ("knobs", "names"),
    [
        ({}, {"open.epochs", "open.across_documents"}),
        ({"ttt.epochs": 1, "evaluation.protocol": "documents"}, set()),
        ({"ttt.method": "lora", "ttt.lora_unit": "document"}, {"open.order", "open.across_documents"}),
        ({"ttt.method": "off"}, {"open.across_documents"}),
    ],
)
def test_open_rules_are_noted_where_they_matter_with_their_threads(
    tmp_path: Path, knobs: dict[str, object], names: set[str]
) -> None:
    notes = note_open_rules(read_claims(make_audited(tmp_path, knobs=knobs)))
    assert {note.name for note in notes} == ALWAYS | names
    assert all(note.status == NOTED and note.rule and "#" in note.note for note in notes)
    track = next(note.note for note in notes if note.name == "open.track")
    assert track.startswith("track A" if knobs.get("ttt.method") == "off" else "track B")


def test_without_a_configuration_there_is_nothing_to_say(tmp_path: Path) -> None:
    run = make_audited(tmp_path)
    run.spec.unlink()
    assert note_open_rules(read_claims(run)) == []
