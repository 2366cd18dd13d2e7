"""Somebody's own script as a record attempt and in a study, from the file to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from make_public import colon_log, score_line
from make_scripts import make_data, write_claim, write_script

from orchestrator import cli, replay
from orchestrator.errors import ConfigError
from orchestrator.home import Home
from orchestrator.ledger import Ledger
from orchestrator.runs import RunStore
from orchestrator.study_file import parse_study
from trainer.protocol import read_spec

RATIO = 0.4105208


@pytest.fixture
def prepared(in_home, home: Home) -> Home:
    make_data(home.dataset("tiny"))
    return in_home(home)


def caddie(home: Home, *words: object) -> int:
    return cli.main(["--home", str(home.root), *map(str, words)])


def only_study(home: Home) -> str:
    (name,) = home.study_names()
    return name


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A folder with a script and what its author claims of it, in the script's own numbers."""
    folder = tmp_path / "2026-03-20_Made_Up"
    scores = {42: 1.200142, 314: 1.200414, 999: 1.201099}
    write_script(folder, "A")
    for seed, bpb in scores.items():
        log = colon_log(
            seed=seed, scores=[score_line("final_int8_zlib_roundtrip_exact", bpb, ratio=RATIO, seconds=None)]
        )
        (folder / f"train_seed{seed}.log").write_text(log.replace("tokens:62021632", "tokens:4096"))
    write_claim(folder, scores)
    return folder


@pytest.mark.slow
def test_a_folder_is_replayed_and_its_claim_is_judged(prepared: Home, record: Path, capsys) -> None:
    assert caddie(prepared, "replay", record, "--data", "tiny") == 0
    told = capsys.readouterr().out
    assert (
        "2026-03-20_Made_Up claims 1.20055 over 3: +0.00000, z = +0.00 by σ 0.00049 of one run (both sides' seeds, 4 degrees"
        in told
    )
    assert "Within noise, the claim holds." in told
    study = prepared.study(only_study(prepared))
    assert json.loads(study.reproduction_data.read_text())["is_comparable"] is True
    assert study.reproduction_text.read_text().startswith("# replay-2026-03-20_made_up-")
    report = study.report_text.read_text()
    assert "Seconds, as the script's log tells them." in report and "on one clock" not in report
    specs = [read_spec(prepared.run(run_id).spec) for run_id in RunStore(prepared).ids()]
    assert {spec.seed for spec in specs} == {42, 314, 999} and {spec.config["env"] == {} for spec in specs} == {True}


@pytest.mark.slow
def test_the_same_replay_again_runs_nothing_again(prepared: Home, record: Path) -> None:
    words = ("replay", record, "--data", "tiny", "--seeds", "42,1")
    assert caddie(prepared, *words) == 0
    before = len(Ledger(prepared.study(only_study(prepared)).ledger).state().attempts)
    (record / "train_gpt.py").touch()
    assert caddie(prepared, *words) == 0
    assert len(Ledger(prepared.study(only_study(prepared)).ledger).state().attempts) == before == 2


@pytest.mark.slow
def test_a_report_does_not_need_the_script_where_it_was(prepared: Home, record: Path, capsys) -> None:
    assert (
        caddie(
            prepared, "replay", record / "train_gpt.py", "--data", "tiny", "--seeds", "42", "--set", "WEIGHT_DECAY=0.05"
        )
        == 0
    )
    (record / "train_gpt.py").unlink()
    capsys.readouterr()
    assert caddie(prepared, "report", only_study(prepared)) == 0
    told = prepared.study(only_study(prepared)).report_text.read_text()
    assert "caddie replay" in told and "--set WEIGHT_DECAY=0.05" in told
    assert "WEIGHT_DECAY=0.05 SEED=42 RUN_ID=" in told, "and one run by hand"


def test_a_study_searches_a_scripts_variables(prepared: Home, tmp_path: Path, capsys) -> None:
    write_script(tmp_path / "B", "B", packed=True)
    file = tmp_path / "study.toml"
    file.write_text(
        'name = "wd"\nquestion = "?"\nscript = "B/train_gpt.py"\ndata = "tiny"\n\n[set]\n"env.ITERATIONS" = 100\n\n'
        '[space."env.MUON_WD"]\nlow = 0.01\nhigh = 0.3\n\n[search]\ntrials = 3\nobjective = "sliding"\nsampler = "qmc"\n'
    )
    assert caddie(prepared, "study", "run", file) == 0
    state = Ledger(prepared.study("wd").ledger).state()
    assert state.trials[0].params == {"env.MUON_WD": 0.09}, "the script's own value comes first"
    assert len({trial.value for trial in state.trials.values()}) == 3
    for trial in state.trials.values():
        wd = trial.params["env.MUON_WD"]
        assert trial.value == pytest.approx(1.2 + (wd - 0.05) ** 2 + 1e-6)


def test_a_study_tells_how_its_variables_are_heeded_before_it_runs(prepared: Home, tmp_path: Path, capsys) -> None:
    write_script(tmp_path / "B", "B", packed=True)
    file = tmp_path / "study.toml"
    file.write_text(
        'name = "wd"\nquestion = "?"\nscript = "B/train_gpt.py"\ndata = "tiny"\n\n[space."env.MUON_WD"]\nlow = 0.01\nhigh = 0.3\n\n'
        '[search]\ntrials = 3\nobjective = "sliding"\n'
    )
    assert caddie(prepared, "study", "check", file) == 0
    assert "env.MUON_WD: live, muon_wd is 0.01 and 0.3" in capsys.readouterr().out
    assert not list(prepared.runs.glob("*"))


def test_what_a_script_looks_at_is_told_without_running_it(home: Home, record: Path, capsys) -> None:
    assert caddie(home, "replay", record, "--look", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"name": "WEIGHT_DECAY", "kind": "float", "default": "0.04", "setting": "weight_decay"} in found["variables"]
    assert caddie(home, "replay", record, "--look") == 0
    assert "it can print the stages roundtrip" in capsys.readouterr().out
    assert not home.root.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "WEIGHT_DECAI=1"), "never looks at WEIGHT_DECAI"),
        (("--set", "WEIGHT_DECAY"), "--set must be NAME=VALUE, got 'WEIGHT_DECAY'"),
        (("--set", "limits.eval_seconds=long"), "limits.eval_seconds must be a number, got 'long'"),
        (("--against", "nowhere"), "there is no imported record 'nowhere'"),
        (("--data", "nowhere"), "there is no data set 'nowhere'"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(
    prepared: Home, record: Path, words, message, capsys
) -> None:
    assert caddie(prepared, "replay", record, "--data", "tiny", *words) != 0
    assert message in capsys.readouterr().err
    assert not list(prepared.runs.glob("*"))


def test_a_study_has_a_preset_or_a_script(tmp_path: Path) -> None:
    path = write_script(tmp_path, "A")
    text = f'name = "x"\nquestion = "?"\nscript = "{path}"\ndata = "d"\n'
    with pytest.raises(ConfigError, match="script and preset exclude one another"):
        parse_study(text + 'preset = "smoke"\n[confirm]\nseeds = [1]\n')
    with pytest.raises(ConfigError, match="stage is for a record attempt, this is a search"):
        parse_study(text + 'stage = "ttt"\n[space."env.WEIGHT_DECAY"]\nlow = 0.0\nhigh = 1.0\n[search]\ntrials = 2\n')
    assert parse_study(text + "[confirm]\nseeds = [1]\n").search.objective == "roundtrip", "by the labels in its text"


def test_keeping_a_study_changes_its_scripts_place_alone(home: Home, tmp_path: Path) -> None:
    path = write_script(tmp_path / "Some_Record", "A")
    study = parse_study(f'name = "x"\nquestion = "?"\nscript = "{path}"  # mine\ndata = "d"\n[confirm]\nseeds = [1]\n')
    kept = replay.keep(study, home)
    assert kept.script and kept.script.script.path.is_relative_to(home.scripts)
    assert kept.script.script.content == path.read_bytes()
    assert (kept.name, kept.confirm, kept.data) == (study.name, study.confirm, study.data)
    assert replay.keep(kept, home).source == kept.source


@pytest.mark.slow
def test_runs_of_a_script_are_neither_verified_nor_packaged_as_ours(
    prepared: Home, record: Path, capsys, tmp_path: Path
) -> None:
    assert caddie(prepared, "replay", record, "--data", "tiny", "--seeds", "42") == 0
    (run_id,) = RunStore(prepared).ids()
    assert caddie(prepared, "verify", run_id) != 0
    assert "the run is of somebody else's script" in capsys.readouterr().err
    words = ("package", only_study(prepared), "--out", tmp_path / "out", "--author", "A", "--github-id", "a")
    assert caddie(prepared, *words) != 0
    assert "its folder is made by its author" in capsys.readouterr().err


@pytest.mark.slow
def test_settings_that_only_the_records_logs_tell_are_told_and_can_be_taken(
    prepared: Home, record: Path, capsys
) -> None:
    for log in record.glob("*.log"):
        log.write_text(log.read_text().replace("tie_embeddings:True", "tie_embeddings:False weight_decay:0.15"))
    words = ("replay", record, "--data", "tiny", "--seeds", "42")
    assert caddie(prepared, *words) == 0
    assert "the record's logs have " in (told := capsys.readouterr().err) and "WEIGHT_DECAY=0.15" in told
    assert "WORLD_SIZE" not in told, "the machine's, not the author's choice"
    assert "--as-logged takes them" in told
    assert caddie(prepared, *words, "--as-logged", "--set", "ITERATIONS=100", "--name", "as-logged") == 0
    (run_id,) = Ledger(prepared.study("as-logged").ledger).state().run_ids
    env = read_spec(prepared.run(run_id).spec).config["env"]
    assert (env["WEIGHT_DECAY"], env["TIE_EMBEDDINGS"], env["ITERATIONS"]) == ("0.15", "0", "100"), (
        "what is set comes first"
    )
