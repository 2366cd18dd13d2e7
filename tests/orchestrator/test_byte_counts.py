"""Whether a script's scores are divided by the bytes of the text, as the report tells it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from make_scripts import make_data, make_layout, write_script

from orchestrator import byte_counts, cli
from orchestrator.byte_counts import ByteCount, precision
from orchestrator.data_view import validation_files
from orchestrator.home import Home
from tests.trainer.make_data import VOCAB_SIZE, texts, write_jsonl
from trainer.prepare import Recipe, prepare
from trainer.protocol import VALIDATION, Score

TARGETS, BYTES = 1000, 2436


def score(*, counted: float = BYTES, bpb: float = 1.23456789, digits: int = 8) -> Score:
    loss = round(bpb * math.log(2) * counted / TARGETS, digits)
    return Score(nats=0.0, tokens=TARGETS, bytes=0, loss=loss, bpb=round(bpb, digits), seconds=0.0)


def count(found: Score) -> ByteCount:
    return ByteCount(
        arm="preset", seed=42, stage="sliding", score=found, counted=BYTES, targets=TARGETS, source="runs/1/result.json"
    )


@pytest.mark.parametrize("digits", [8, 4, 3])
def test_a_script_that_counts_the_text_is_equal_in_whatever_decimals_it_prints(digits: int) -> None:
    found = count(score(digits=digits))
    assert found.is_equal and found.problem == ""
    assert abs(found.excess) <= precision(found.score) + 1 / BYTES


def test_bytes_that_are_not_there_are_told_with_the_score_that_they_hide() -> None:
    found = count(score(counted=BYTES * 1.02))
    assert found.excess == pytest.approx(0.02, abs=1e-6) and not found.is_equal
    assert found.problem == (
        "preset, seed 42: the script divides by 2,485 bytes for its Sliding BPB 1.23457, the text behind its 1,000 targets "
        "has 2,436 (+2.0000%): by these it is 1.25926."
    )
    assert "(−1.0000%)" in count(score(counted=BYTES * 0.99)).problem


def test_what_no_comparison_would_notice_is_no_problem() -> None:
    found = ByteCount(
        arm="preset", seed=42, stage="sliding", targets=TARGETS, source="", counted=10**9,
        score=Score(nats=0.0, tokens=TARGETS, bytes=0, loss=math.log(2) * 10**6 * 1.000005, bpb=1.00000001, seconds=0.0),
    )  # fmt: skip
    assert found.excess == pytest.approx(5e-6, rel=0.1) and not found.problem
    assert byte_counts.table([found]).rows[0][6] == "+0.0005%"


def test_a_folder_with_several_data_sets_has_no_one_split(tmp_path: Path) -> None:
    shards, tokenizer = validation_files(make_layout(tmp_path / "raw")) or ([], Path())
    assert [path.name for path in shards] == ["fineweb_val_000000.bin"] and tokenizer.is_file()
    assert validation_files(make_data(tmp_path / "own")) is not None
    (tmp_path / "raw" / "tokenizers" / "other.model").write_bytes(b"")
    assert validation_files(tmp_path / "raw") is None


@pytest.fixture(scope="module")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    corpus = write_jsonl(root / "corpus.jsonl", texts())
    prepare(Recipe(corpus=[str(corpus)], vocab_size=VOCAB_SIZE, val_documents=20), root / "data", say=lambda _: None)
    return root / "data"


@pytest.mark.slow
@pytest.mark.parametrize(("excess", "last", "told"), [(0.0, -1, []), (0.02, -1, ["+2.0"]), (0.0, 0, [])])
def test_a_replays_report_holds_the_scripts_bytes_against_the_text(
    text_data: Path, in_home, home: Home, tmp_path: Path, excess: float, last: int, told: list[str], capsys
) -> None:
    """Of a script that logs its targets, as public ones do, and of one that logs the tokens of the split."""
    make_data(home.dataset("tiny"))
    in_home(home)
    split = json.loads((text_data / "manifest.json").read_text())["splits"][VALIDATION]
    ratio = (split["tokens"] - 1) / (split["text_bytes"] * (1 + excess))
    changes = {"0.4105208": repr(ratio), "for file in files)": f"for file in files) + {last}"}
    script = write_script(tmp_path / "Theirs", "A", changes=changes)
    assert cli.main(["--home", str(home.root), "replay", str(script), "--data", str(text_data), "--seeds", "42"]) == 0
    said = capsys.readouterr().out
    (name,) = home.study_names()
    record = json.loads(home.study(name).report_data.read_text())
    (found,) = record["byte_counts"]
    assert (found["targets"], found["counted_bytes"]) == (split["tokens"] - 1, split["text_bytes"])
    assert found["is_equal"] is (not excess) and "Bytes behind the scores" in said
    problems = [problem for problem in record["problems"] if "divides by" in problem]
    assert len(problems) == len(told) and all(part in problem for part, problem in zip(told, problems, strict=True))


@pytest.mark.slow
def test_without_a_tokenizer_that_can_be_read_nothing_is_said(in_home, home: Home, tmp_path: Path, capsys) -> None:
    make_data(home.dataset("tiny"))
    in_home(home)
    script = write_script(tmp_path / "Theirs", "A")
    assert cli.main(["--home", str(home.root), "replay", str(script), "--data", "tiny", "--seeds", "42"]) == 0
    said = capsys.readouterr()
    assert "Bytes behind the scores" not in said.out and "divides by" not in said.out + said.err
