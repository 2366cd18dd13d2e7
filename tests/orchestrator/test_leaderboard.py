from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from make_public import CODE, MODEL, make_folder, score_line, seed_results, slash_log

from orchestrator import leaderboard
from orchestrator.cells import as_text
from orchestrator.gates import load_gates
from orchestrator.leaderboard import Leaderboard, Row
from orchestrator.public_record import PublicRecord
from orchestrator.record_folder import read_record

TRACK = "track_10min_16mb"


def record(root: Path, name: str, scores: Mapping[int, float]) -> PublicRecord:
    logs = {
        f"train_seed{seed}.log": slash_log(seed=seed, scores=[score_line("quantized_ttt", bpb)])
        for seed, bpb in scores.items()
    }
    return read_record(make_folder(root / name, logs, submission=seed_results(dict(scores))))


def board(root: Path, records: Mapping[str, Mapping[int, float]], track: str = TRACK) -> Leaderboard:
    found = [(record(root, name, scores), track) for name, scores in records.items()]
    return leaderboard.rank(found, leaderboard.chosen_gates(load_gates()))


def by_name(found: Leaderboard) -> dict[str, Row]:
    return {row.record.name: row for row in found.rows}


FIRST = {1: 1.0900, 2: 1.0904, 3: 1.0896}
BETTER = {1: 1.0800, 2: 1.0804, 3: 1.0796}
WORSE = {1: 1.0950, 2: 1.0954, 3: 1.0946}


def test_rows_stand_by_their_mean_and_are_judged_against_the_best_before_them(tmp_path: Path) -> None:
    found = board(tmp_path, {"2026-04-03_C": BETTER, "2026-04-01_A": FIRST, "2026-04-02_B": WORSE})
    assert [row.record.name for row in found.rows] == ["2026-04-03_C", "2026-04-01_A", "2026-04-02_B"]
    rows = by_name(found)
    assert rows["2026-04-01_A"].before == ""
    assert rows["2026-04-02_B"].before == "2026-04-01_A"
    assert rows["2026-04-03_C"].before == "2026-04-01_A"  # not B, which was no better
    assert rows["2026-04-03_C"].difference == pytest.approx(-0.01)


def test_gates_are_recomputed_from_the_logs(tmp_path: Path) -> None:
    rows = by_name(board(tmp_path, {"2026-04-01_A": FIRST, "2026-04-02_B": WORSE, "2026-04-03_C": BETTER}))
    met = {name: {v.gate.name: v.is_met for v in row.verdicts} for name, row in rows.items()}
    assert met["2026-04-03_C"] == {"pg-leaderboard": True, "pg-readme": True}
    assert met["2026-04-02_B"] == {"pg-leaderboard": False, "pg-readme": False}


def test_a_record_without_a_score_stays_in_the_list(tmp_path: Path) -> None:
    broken = read_record(make_folder(tmp_path / "2026-04-05_D", {}, submission='{"val_bpb": 1.0}'))
    found = leaderboard.rank(
        [(broken, TRACK), (record(tmp_path, "2026-04-01_A", FIRST), TRACK)], leaderboard.chosen_gates(load_gates())
    )
    assert [row.record.name for row in found.rows] == ["2026-04-01_A", "2026-04-05_D"]
    assert "0 of 1" in as_text(leaderboard.as_tables(found)[0])


def test_a_track_without_a_leaderboard_is_listed_and_not_judged(tmp_path: Path) -> None:
    found = board(tmp_path, {"2026-04-01_A": FIRST, "2026-04-03_C": BETTER}, track="track_non_record_16mb")
    assert all(row.verdicts == () and row.before == "" for row in found.rows)


def test_the_csv_has_a_line_a_record_and_the_json_every_place(tmp_path: Path) -> None:
    found = board(tmp_path, {"2026-04-01_A": FIRST, "2026-04-03_C": BETTER})
    [best, _] = list(csv.DictReader(io.StringIO(leaderboard.as_csv(found))))
    assert (best["name"], best["seeds"], best["pg-leaderboard_met"]) == ("2026-04-03_C", "3", "True")
    assert float(best["mean_bpb"]) == pytest.approx(1.08)
    assert int(best["artifact_bytes_max"]) == CODE + MODEL
    listed = json.loads(json.dumps(leaderboard.as_record(found)))["tracks"][TRACK]
    assert listed[0]["std_bpb"] == pytest.approx(0.0004)
    assert listed[0]["scores"][0]["place"].startswith("train_seed1.log:")
    assert "claims it" in listed[0]["scores"][0]["why"]


def test_one_records_table_says_where_each_score_stands_and_why(tmp_path: Path) -> None:
    text = as_text(leaderboard.seed_table(record(tmp_path, "2026-04-01_A", FIRST)))
    assert "train_seed2.log:" in text
    assert "mean 1.09000" in text
