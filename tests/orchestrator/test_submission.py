from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from orchestrator import submission
from orchestrator.errors import ProtocolError
from orchestrator.submission import Claim, Submission, find_submission, read_submission


def read(folder: Path, text: str) -> Submission:
    path = folder / "submission.json"
    path.write_text(text)
    return read_submission(path, path.name)


@pytest.mark.parametrize("key", ["val_bpb", "mean_val_bpb", "mean_bpb"])
def test_the_headline_has_several_names(tmp_path: Path, key: str) -> None:
    found = read(tmp_path, f'{{"{key}": 1.0810, "author": "A"}}')
    assert found.headline == Claim(Decimal("1.0810"), f"/{key}")
    assert found.about == {"author": "A"}


@pytest.mark.parametrize(
    "text",
    [
        '{"seeds": [42], "seed_results": {"42": {"val_bpb": 1.08}}}',
        '{"seeds": {"42": {"val_bpb": 1.08}}}',
        '{"seeds": [42], "seed_scores": [1.08]}',
    ],
)
def test_scores_by_seed_stand_in_three_shapes(tmp_path: Path, text: str) -> None:
    found = read(tmp_path, text)
    assert found.seeds[42][submission.BPB].value == Decimal("1.08")
    assert found.named_seeds == (42,)


def test_every_figure_comes_in_the_unit_of_its_name(tmp_path: Path) -> None:
    text = '{"seeds": {"7": {"bytes_total": 15993346, "train_time_ms": 588052, "ttt_time_ms": 341841}}}'
    fields = read(tmp_path, text).seeds[7]
    assert fields[submission.SIZE].value == 15_993_346
    assert fields[submission.TRAIN_SECONDS].value == Decimal("588.052")
    assert fields[submission.EVAL_SECONDS].is_met_by(341.841)


def test_scores_under_other_keys_are_told_of_and_not_submitted(tmp_path: Path) -> None:
    text = (
        '{"seed_results": {"1": {"val_bpb": 1.06}}, "rerun": {"seed_results": {"2": {"val_bpb": 1.07}}},'
        ' "disclosure": {"all_7_val_bpb": {"7": 1.065}}}'
    )
    found = read(tmp_path, text)
    assert list(found.seeds) == [1]
    assert {(seed, str(claim.value)) for seed, claim in found.elsewhere} == {(2, "1.07"), (7, "1.065")}


def test_a_claim_is_met_by_what_rounds_or_is_cut_to_it_and_by_nothing_else() -> None:
    claim = Claim(Decimal("1.0810"), "/val_bpb")
    assert claim.is_met_by(1.08103)
    assert claim.is_met_by(1.08098)
    assert not claim.is_met_by(1.0812)
    assert Claim(Decimal("15999533"), "").is_met_by(15_999_533)
    assert not Claim(Decimal("15999533"), "").is_met_by(15_999_534)


def test_the_file_may_have_a_suffix(tmp_path: Path) -> None:
    (tmp_path / "submission_ternary.json").write_text("{}")
    (tmp_path / "results.json").write_text("{}")
    found = find_submission(list(tmp_path.iterdir()))
    assert found is not None
    assert found.name == "submission_ternary.json"


@pytest.mark.parametrize("text", ["{", "[1]", '"text"'])
def test_another_file_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ProtocolError, match="submission.json: not a JSON object"):
        read(tmp_path, text)
