from __future__ import annotations

from pathlib import Path

import pytest
from make_public import make_folder, score_line, seed_results, slash_log
from mlflow.entities import Run

from orchestrator import imports
from orchestrator.home import Home
from orchestrator.mirror import rebuild, sync_imports
from orchestrator.tracking import MlflowStore

EXPERIMENT = "records track_10min_16mb"
NAME = "2026-04-01_Record"


def keep(home: Home, root: Path) -> None:
    lines = [
        score_line("quantized", 1.1),
        score_line("quantized_sliding_window", 1.082),
        score_line("quantized_ttt", 1.08),
    ]
    folder = make_folder(
        root / "track_10min_16mb" / NAME, {"train_seed42.log": slash_log(seed=42, scores=lines)},
        submission=seed_results({42: 1.08, 7: 1.09}, author="A. Player"),
    )  # fmt: skip
    imports.keep(home, folder)


def runs(home: Home) -> dict[str, Run]:
    client = MlflowStore(home).client
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return {run.data.tags["caddie.key"]: run for run in client.search_runs([experiment.experiment_id])}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("imported")
    found = Home(root / "home")
    keep(found, root)
    assert sync_imports(found, [NAME]) == []
    return found


def test_a_record_is_a_run_and_its_seeds_are_nested_in_it(home: Home) -> None:
    found = runs(home)
    parent = found[f"import/{NAME}"]
    assert parent.info.run_name == NAME
    assert {run.data.tags.get("mlflow.parentRunId") for run in found.values()} == {None, parent.info.run_id}
    assert parent.data.metrics["final/bpb"] == parent.data.metrics["final/ttt_bpb"] == 1.08
    assert parent.data.metrics["final/sliding_bpb"] == 1.082
    assert parent.data.tags["record.author"] == "A. Player"


def test_a_seed_has_its_curve_stages_settings_and_log(home: Home) -> None:
    seed = runs(home)[f"import/{NAME}/0"]
    assert seed.data.metrics["final/ttt_bpb"] == seed.data.metrics["final/bpb"] == 1.08
    assert seed.data.metrics["final/roundtrip_bpb"] == 1.1
    assert {"train_loss", "by_ms/train_loss", "val_bpb", "final/artifact_bytes"} <= set(seed.data.metrics)
    assert seed.data.params["matrix_lr"] == "0.02"
    client = MlflowStore(home).client
    assert [file.path for file in client.list_artifacts(seed.info.run_id, "logs")] == ["logs/train_seed42.log"]


def test_a_refused_seed_is_a_failed_run_that_says_why(home: Home) -> None:
    refused = runs(home)[f"import/{NAME}/1"]
    assert refused.info.status == "FAILED"
    assert "no log of seed 7" in refused.data.tags["mlflow.note.content"]
    assert "final/bpb" not in refused.data.metrics


def test_the_description_has_places_and_disagreements(home: Home) -> None:
    note = runs(home)[f"import/{NAME}"].data.tags["mlflow.note.content"]
    assert "at `train_seed42.log:" in note
    assert "README does not have the headline" in note


def test_mirroring_again_and_a_rebuild_make_the_same_runs(home: Home) -> None:
    before = {key: run.data.metrics for key, run in runs(home).items()}
    assert sync_imports(home, [NAME]) == []
    assert {key: run.data.metrics for key, run in runs(home).items()} == before
    assert rebuild(home) == []
    assert {key: run.data.metrics for key, run in runs(home).items()} == before


def test_a_changed_import_is_named_and_not_mirrored(tmp_path: Path) -> None:
    found = Home(tmp_path / "home")
    keep(found, tmp_path)
    (found.imported(NAME).files / "train_seed42.log").write_text("better\n")
    [problem] = sync_imports(found, [NAME])
    assert "not the file that was imported" in problem
