"""What is checked of a study of somebody else's script before anything is submitted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from make_scripts import make_data, make_layout, write_script

from orchestrator import preflight, script_check
from orchestrator.errors import ConfigError
from orchestrator.home import Home
from orchestrator.study import Study
from orchestrator.study_file import parse_study


def study_of(
    script: Path, *, data: str = "tiny", seeds: str = "[42, 314, 999]", settings: str = "", space: str = ""
) -> Study:
    search = f'[search]\ntrials = 3\nobjective = "roundtrip"\n\n{space}\n' if space else ""
    return parse_study(
        f'name = "replay"\nquestion = "?"\nscript = "{script}"\ndata = "{data}"\n\n[set]\n{settings}\n\n'
        f"{search}[confirm]\nseeds = {seeds}\n"
    )


@pytest.fixture
def prepared(home: Home) -> Home:
    make_data(home.dataset("tiny"))
    return home


def test_a_study_of_a_script_is_checked_with_its_data(prepared: Home, tmp_path: Path) -> None:
    data = preflight.check(study_of(write_script(tmp_path, "A")), prepared)
    assert data.root == prepared.dataset("tiny")


def test_data_that_others_laid_out_have_an_identity_of_their_own(home: Home, tmp_path: Path) -> None:
    raw = make_layout(tmp_path / "raw")
    data = preflight.check(study_of(write_script(tmp_path / "A", "A"), data=str(raw)), home)
    assert data.root == raw and len(data.manifest_sha256) == 64


def test_several_seeds_need_a_script_that_takes_one(prepared: Home, tmp_path: Path) -> None:
    path = write_script(tmp_path, "A", changes={'int(os.environ.get("SEED", 1337))': "1337"})
    with pytest.raises(ConfigError, match="never looks at SEED, so that runs of 3 seeds would be one and the same"):
        preflight.check(study_of(path), prepared)
    preflight.check(study_of(path, seeds="[42]"), prepared)


def test_a_script_that_cannot_be_told_where_its_data_are_is_a_warning(tmp_path: Path) -> None:
    path = write_script(tmp_path, "C", changes={'E["DATA_PATH"]': '"./data/datasets/fineweb10B_sp64"'})
    assert "looks at neither DATA_PATH nor DATA_DIR" in script_check.warnings(study_of(path))[0]


def test_a_vocabulary_that_the_data_have_not_is_refused(prepared: Home, tmp_path: Path) -> None:
    study = study_of(write_script(tmp_path, "B"), settings='"env.VOCAB_SIZE" = 1024')
    with pytest.raises(ConfigError, match="env.VOCAB_SIZE is 1024, the data set .* has 64 pieces"):
        preflight.check(study, prepared)


def test_what_cannot_be_decided_from_the_text_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "train_gpt.py").write_text("import helper\nexec(open('x').read())\n")
    (tmp_path / "helper.py").write_text("")
    found = script_check.warnings(study_of(tmp_path))
    assert (
        len(found) == 2 and "reads are traced as it runs" in found[0] and "imports helper from its folder" in found[1]
    )


def test_the_proof_is_kept_with_the_study(prepared: Home, tmp_path: Path) -> None:
    space = '[space."env.WEIGHT_DECAY"]\nlow = 0.01\nhigh = 0.2\n'
    study = study_of(write_script(tmp_path, "A"), settings='"env.ITERATIONS" = 300', space=space)
    found = script_check.prove(study, prepared)
    assert [(one.name, one.status) for one in found] == [("WEIGHT_DECAY", "live"), ("ITERATIONS", "live")]
    kept = json.loads(prepared.study("replay").liveness.read_text())
    assert kept["variables"][0] == {"name": "WEIGHT_DECAY", "status": "live", "found": "weight_decay is 0.01 and 0.2"}


def test_nothing_is_started_where_nothing_is_set(prepared: Home, tmp_path: Path) -> None:
    path = write_script(tmp_path, "A", changes={"import glob": f"open({str(tmp_path / 'ran')!r}, 'w')\nimport glob"})
    assert script_check.prove(study_of(path), prepared) == []
    assert not (tmp_path / "ran").exists()
