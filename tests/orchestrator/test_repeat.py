import shlex

import pytest
from make_study import BUNDLE, CODE, Maker, make_study

from orchestrator import repeat
from orchestrator.assignments import parse_settings
from orchestrator.cli import make_parser
from orchestrator.evidence import gather
from orchestrator.presets import load_preset
from orchestrator.record_attempt import record_study
from orchestrator.runs import RunRequest
from trainer import protocol
from trainer.config import from_mapping, with_knobs

NAME = "wd-qk-ttt-smoke"


@pytest.fixture
def home(tmp_path):
    return make_study(tmp_path)


def commands(home, evidence):
    return [text for _, text in repeat.listing(home, evidence).parts]


def test_the_command_of_a_record_asks_for_the_very_configuration_that_ran(home):
    evidence = gather(home, NAME)
    for arm, line in zip(
        evidence.arms, [c for c in commands(home, evidence) if c.startswith("caddie run")], strict=True
    ):
        arguments = make_parser().parse_args(shlex.split(line)[1:])
        asked = with_knobs(load_preset(arguments.preset), parse_settings(arguments.set))
        assert asked == from_mapping(protocol.read_spec(home.run(arm.runs[0].run_id).spec).config)
        assert arguments.seeds == "42,314,999"


def test_words_switches_and_lists_survive_the_command_line(tmp_path):
    knobs = {"model.value_embedding_layers": (7, 9), "model.qk_norm": False, "ttt.method": "adamw", "ttt.lr": 0.00125}
    study = record_study("pr1326", data="pydoc", seeds=(1,), knobs=knobs, name="record-knobs")
    maker = Maker(tmp_path, study.source)
    for run in maker.ask_arm("preset", 0, {}, (1,)).values():
        maker.begin(run, steps=10)
    evidence = gather(maker.home, "record-knobs")
    [line] = [command for command in commands(maker.home, evidence) if command.startswith("caddie run")]
    arguments = make_parser().parse_args(shlex.split(line)[1:])
    assert with_knobs(load_preset("pr1326"), parse_settings(arguments.set)) == study.config


def test_the_studys_own_text_is_given_whole(home):
    evidence = gather(home, NAME)
    assert commands(home, evidence)[-1] == evidence.state.source.strip()


def test_a_study_without_a_model_file_names_none_to_verify(tmp_path):
    home = make_study(tmp_path, stage="opened")
    assert not [command for command in commands(home, gather(home, NAME)) if "verify" in command]


def test_what_runs_were_made_of_is_named_by_short_hashes(home):
    table = repeat.table(home, gather(home, NAME))
    row = [str(cell) for cell in table.rows[0]]
    assert row[:2] == ["best", "42"]
    assert row[3:6] == ["0123456789ab", "–", "abababababab"]
    assert row[8:] == ["2.13.0", "cpu", "1"]
    assert all((home.root / row[2].path).is_file() for row in table.rows)


def test_a_seed_that_never_ran_keeps_its_row(tmp_path):
    maker = Maker(tmp_path)
    maker.ask_arm("preset", 0, {}, (42,))
    [row] = repeat.table(maker.home, gather(maker.home, NAME)).rows
    assert [str(cell) for cell in row[7:]] == ["–", "–", "–", "–"]


def test_a_preset_that_is_gone_has_every_setting_told(tmp_path):
    maker = Maker(tmp_path)
    request = RunRequest(
        preset="gone.toml",
        config=load_preset("smoke"),
        seed=42,
        data_dir="/data/pydoc",
        manifest_sha256="ab" * 32,
        study=NAME,
    )
    run = maker.store.plan(request, bundle=BUNDLE, code=CODE)
    maker.append("arm_asked", arm="preset", trial=0, params={}, runs={"42": run.run_id})
    [line] = [c for c in commands(maker.home, gather(maker.home, NAME)) if c.startswith("caddie run")]
    assert "--set model.layers=" in line
