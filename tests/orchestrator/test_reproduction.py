"""A public record's numbers beside ours, and whether its claim holds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from make_public import score_line, slash_log
from make_scripts import write_claim
from make_study import BYTES, TOKENS, make_record

from orchestrator import cli, reproduction
from orchestrator.errors import ConfigError
from orchestrator.home import Home
from orchestrator.reproduction import Point, Reproduction, SeedFigures, Side, Stage, compare
from orchestrator.statistics import known_spread, summarize

RATIO = TOKENS / BYTES


def seed_of(
    seed: int, bpb: float, *, ratio: float = RATIO, stage: str = "ttt", curve: Sequence[Point] = (), **figures: float
) -> SeedFigures:
    score = Stage(bpb=bpb, loss=bpb * math.log(2) / ratio, seconds=60.0)
    return SeedFigures(
        seed=seed, stages={stage: score}, figures=figures, settings={}, curve=tuple(curve), source="log:1"
    )


def side(name: str, scores: dict[int, float], facts: dict[str, str] | None = None, **options) -> Side:
    return Side(
        name=name, seeds=tuple(seed_of(seed, bpb, **options) for seed, bpb in scores.items()), facts=facts or {}
    )


OURS = {1: 1.0810, 2: 1.0814, 3: 1.0812}
THEIRS = {42: 1.0808, 314: 1.0812, 999: 1.0816}


def rows(found: Reproduction, title: str) -> list[list[str]]:
    (table,) = [table for table in found.tables if table.title == title]
    return [[str(cell) for cell in row] for row in table.rows]


def test_the_difference_is_measured_in_standard_errors_of_the_pooled_spread() -> None:
    found = compare(side("ours", OURS), side("theirs", THEIRS), "ttt")
    sigma = math.sqrt((2 * 0.0002**2 + 2 * 0.0004**2) / 4)
    assert (found.sigma, found.degrees_of_freedom) == (pytest.approx(sigma), 4)
    expected = known_spread(summarize(list(OURS.values())), summarize(list(THEIRS.values())), std=sigma)
    assert found.difference and found.difference.statistic == pytest.approx(expected.statistic)
    assert "Within noise, the claim holds." in found.verdict


def test_a_score_beyond_noise_is_told_with_its_direction() -> None:
    worse = compare(side("ours", {s: v + 0.01 for s, v in OURS.items()}), side("theirs", THEIRS), "ttt")
    better = compare(side("ours", {s: v - 0.01 for s, v in OURS.items()}), side("theirs", THEIRS), "ttt")
    assert "Our runs are worse than the claim, beyond noise." in worse.verdict
    assert "Our runs are better than the claim, beyond noise." in better.verdict


def test_a_single_run_is_judged_by_the_published_spreads_too() -> None:
    found = compare(side("ours", {1: 1.0810}), side("theirs", THEIRS), "ttt")
    assert found.degrees_of_freedom > 4 and "published records" in found.sigma_from
    assert found.difference is not None and found.difference.statistic is not None


@pytest.mark.parametrize("changes", [{"ratio": 0.3}, {"val_tokens": 1000.0}])
def test_scores_on_other_data_are_not_compared(changes: dict[str, float]) -> None:
    found = compare(side("ours", OURS, **changes), side("theirs", THEIRS, val_tokens=TOKENS), "ttt")
    assert not found.is_comparable
    assert "not comparable, the validation data differ" in found.verdict and any(
        "other data" in p for p in found.problems
    )


def test_without_a_common_stage_nothing_is_said() -> None:
    found = compare(side("ours", OURS, stage="sliding"), side("theirs", THEIRS), "")
    assert found.verdict.startswith("Nothing can be said") and found.difference is None


def line(*points: tuple[int, float, float]) -> list[Point]:
    return [Point(step=step, seconds=time, train_loss=loss) for step, time, loss in points]


def test_curves_are_compared_at_equal_steps_and_at_equal_time() -> None:
    slow = line((100, 20.0, 3.0), (200, 40.0, 2.0))  # twice as slow, the same by step
    fast = line((100, 10.0, 3.0), (200, 20.0, 2.0), (400, 40.0, 1.0))
    found = compare(side("ours", OURS, curve=slow), side("theirs", THEIRS, curve=fast), "ttt")
    table = rows(found, "At equal steps and equal time")
    assert ["training", "200 steps", "2.0000", "2.0000", "+0.0000"] in table
    assert ["training", "150 steps", "2.5000", "2.5000", "+0.0000"] in table, "on a straight line between"
    assert ["training", "40 s", "2.0000", "1.0000", "+1.0000"] in table
    assert ["training", "20 s", "3.0000", "2.0000", "+1.0000"] in table


def test_speed_and_bytes_stand_beside_each_other() -> None:
    figures = {"steps": 100.0, "train_seconds": 10.0, "batch_tokens": 1000.0, "total_bytes": 15_000_000.0}
    found = compare(side("ours", OURS, **figures), side("theirs", THEIRS, **{**figures, "train_seconds": 20.0}), "ttt")
    table = {row[0]: row[1:] for row in rows(found, "Bytes, steps and speed")}
    assert table["ms a step"] == ["100.0", "200.0", "0.500"]
    assert table["Tokens a second"] == ["10,000", "5,000", "2.000"]
    assert table["Artifact bytes"] == ["15,000,000", "15,000,000", "1.000"]


def test_what_differs_is_listed() -> None:
    ours = side("ours", OURS, {"torch": "2.11", "device": "NVIDIA H200"}, world_size=1.0, parameters=5.0)
    theirs = side("theirs", THEIRS, {"torch": "2.9", "device": "NVIDIA H200"}, world_size=8.0, parameters=5.0)
    assert compare(ours, theirs, "ttt").differing == (("processes", "1", "8"), ("torch", "2.11", "2.9"))


def test_seeds_that_change_nothing_are_told() -> None:
    same = line((1, 0.1, 6.9))
    found = compare(side("ours", OURS, curve=same), side("theirs", THEIRS), "ttt")
    assert found.problems == ("all 3 seeds of ours have the loss 6.9 at step 1: the seed reaches nothing",)


# ── from files ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def record(tmp_path: Path) -> Path:
    folder = tmp_path / "2026-04-01_Made_Up"
    folder.mkdir()
    for seed, bpb in THEIRS.items():
        scores = [
            score_line(label, bpb + shift, ratio=RATIO)
            for label, shift in (("quantized", 0.03), ("quantized_ttt", 0.0))
        ]
        text = f"Running PyTorch 2.9.1+cu128\n| 0  NVIDIA H100 80GB HBM3          On  |\n{slash_log(seed=seed, scores=scores, tokens=TOKENS)}"
        (folder / f"train_seed{seed}.log").write_text(text)
    write_claim(folder, THEIRS)
    return folder


def test_a_study_of_ours_is_put_beside_a_folder(tmp_path: Path, record: Path) -> None:
    home = make_record(tmp_path / "home")
    (study,) = home.study_names()
    found = reproduction.reproduce(home, study, reproduction.find_record(home, str(record)))
    assert found.is_comparable and found.stage == "ttt"
    assert found.theirs.facts == {"torch": "2.9.1+cu128", "device": "NVIDIA H100 80GB HBM3"}
    assert [row[0] for row in rows(found, "By stage")] == ["Post-EMA BPB", "Round-trip BPB", "Sliding BPB", "TTT BPB"]
    assert ("device", "cpu", "NVIDIA H100 80GB HBM3") in found.differing
    assert any(what == "data" and "manifest abababababab" in a for what, a, _ in found.differing)
    written = json.loads(home.study(study).reproduction_data.read_text())
    assert written["z"] == found.difference.statistic if found.difference else None
    assert written["sides"]["record"]["seeds"][0]["source"].startswith("train_seed42.log:")
    assert home.study(study).reproduction_text.read_text().startswith(f"# {study}:preset beside 2026-04-01_Made_Up")


def test_an_imported_record_is_found_by_its_name(tmp_path: Path, record: Path) -> None:
    home = Home(tmp_path / "home")
    first = reproduction.find_record(home, str(record))
    assert reproduction.find_record(home, "Made_Up").provenance == first.provenance


def test_a_tree_of_records_is_not_one(tmp_path: Path, record: Path) -> None:
    other = tmp_path / "2026-04-02_Other"
    other.mkdir()
    write_claim(other, THEIRS)
    with pytest.raises(ConfigError, match="holds 2 records, a run is compared with one"):
        reproduction.find_record(Home(tmp_path / "home"), str(tmp_path))


def test_against_without_a_record_is_refused_before_anything_runs(home: Home, capsys) -> None:
    assert cli.main(["--home", str(home.root), "run", "smoke", "--against", "nowhere"]) == ConfigError.exit_code
    told = capsys.readouterr().err
    assert "--against must name a public record" in told and "a preset is run beside another with --interleave" in told
    assert not home.root.exists()
