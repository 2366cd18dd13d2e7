from __future__ import annotations

import json
from pathlib import Path

import pytest
from make_public import make_folder, score_line, seed_results, slash_log

from orchestrator import imports
from orchestrator.arms import find_arm
from orchestrator.cli import main
from orchestrator.errors import ConfigError, ProtocolError
from orchestrator.home import Home
from trainer.protocol import sha256_of


def folder_of(root: Path, bpb: float = 1.08, name: str = "2026-04-01_Record") -> Path:
    log = slash_log(seed=42, scores=[score_line("quantized_ttt", bpb)])
    return make_folder(root / "track_10min_16mb" / name, {"train_seed42.log": log}, submission=seed_results({42: bpb}))


def test_an_import_is_a_copy_with_its_source_and_hashes(tmp_path: Path) -> None:
    home, folder = Home(tmp_path / "home"), folder_of(tmp_path)
    (folder / "model.bin").write_bytes(b"weights")
    found = imports.keep(home, folder)
    assert found.record.scores == [1.08]
    assert found.provenance.source == str(folder)
    assert found.provenance.files["model.bin"] == sha256_of(folder / "model.bin")
    assert sorted(path.name for path in found.folder.files.iterdir()) == [
        "README.md",
        "submission.json",
        "train_seed42.log",
    ]
    assert imports.track_of(found) == "track_10min_16mb"
    assert home.import_names() == ["2026-04-01_Record"]


def test_importing_again_changes_nothing(tmp_path: Path) -> None:
    home, folder = Home(tmp_path / "home"), folder_of(tmp_path)
    first = imports.keep(home, folder)
    assert imports.keep(home, folder).provenance == first.provenance
    assert home.import_names() == ["2026-04-01_Record"]


def test_another_record_of_the_same_name_lies_beside_the_first(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    imports.keep(home, folder_of(tmp_path / "a"))
    other = imports.keep(home, folder_of(tmp_path / "b", bpb=1.07))
    assert other.record.scores == [1.07]
    assert len(home.import_names()) == 2


def test_a_copy_that_was_changed_is_noticed(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    found = imports.keep(home, folder_of(tmp_path))
    (found.folder.files / "train_seed42.log").write_text("better\n")
    with pytest.raises(ProtocolError, match="not the file that was imported"):
        imports.read(home, found.folder.name)
    records, problems = imports.read_all(home)
    assert records == []
    assert len(problems) == 1


def test_a_name_with_blanks_becomes_a_folders_name(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert (
        imports.keep(home, folder_of(tmp_path, name="2026-03-19_int6_STE QAT_ _U_Net")).folder.name
        == "2026-03-19_int6_STE-QAT_-_U_Net"
    )


def test_an_import_is_found_by_a_part_of_its_name_that_no_other_has(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    for name in ("2026-04-01_Alpha", "2026-04-02_Beta"):
        imports.keep(home, folder_of(tmp_path, name=name))
    assert imports.find(home, "Beta").folder.name == "2026-04-02_Beta"
    with pytest.raises(ConfigError, match="a part of 2 imported records"):
        imports.find(home, "2026-04")
    with pytest.raises(ConfigError, match="no imported record 'Gamma'"):
        imports.find(home, "Gamma")


def test_a_comparison_takes_an_imported_record_by_its_name(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    imports.keep(home, folder_of(tmp_path))
    arm = find_arm(home, "2026-04-01_Record")
    assert arm.values == [1.08]
    assert (home.root / arm.scores[0].source).is_file()
    assert find_arm(home, "imports/Record") == arm


def test_the_command_shows_scores_places_and_what_was_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path)
    (folder / "submission.json").write_text(seed_results({42: 1.08, 7: 1.09}))
    words = ["--home", str(tmp_path / "home"), "import", "--no-mlflow", str(folder)]
    assert main(words) == 0
    told = capsys.readouterr()
    assert "train_seed42.log:" in told.out
    assert "refused: 2026-04-01_Record, seed 7:" in told.err
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tracks"]["track_10min_16mb"][0]["refused"] == 1


def test_the_command_makes_a_leaderboard_of_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for day, bpb in ((1, 1.08), (2, 1.07)):
        folder_of(tmp_path, bpb=bpb, name=f"2026-04-0{day}_Record")
    words = ["--home", str(tmp_path / "home"), "import", "--no-mlflow", str(tmp_path / "track_10min_16mb")]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("2026")] == ["2026-04-02_Record", "2026-04-01_Record"]
    assert main([*words, "--csv"]) == 0
    assert capsys.readouterr().out.startswith("track,name,date")


def test_a_record_without_any_score_fails_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "2026-04-01_Empty", {}, submission='{"val_bpb": 1.0}')
    assert main(["--home", str(tmp_path / "home"), "import", "--no-mlflow", str(folder)]) == ProtocolError.exit_code
    assert "there is no log in the folder" in capsys.readouterr().err
