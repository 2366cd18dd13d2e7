from __future__ import annotations

import argparse
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from make_data import VOCAB_SIZE, make_data, texts, write_jsonl
from make_study import make_study
from make_verified import data_of, edit_result, make_run

from orchestrator import assignments, attempt_commands, cli, terminal
from orchestrator.errors import ConfigError, DataError, MachineError, ProtocolError, StorageError
from orchestrator.evidence import gather
from orchestrator.home import SHIPPED_STUDIES, Home
from trainer.protocol import TRAIN, DataDir

NAME = "wd-qk-ttt-smoke"
SHIPPED = str(SHIPPED_STUDIES / f"{NAME}.toml")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def caddie(home: Path, *arguments: str) -> int:
    return cli.main(["--home", str(home), *arguments])


def small_data(home: Path) -> Path:
    (home / "data").mkdir(parents=True)
    return make_data(home / "data")


# ---- help --------------------------------------------------------------------------------------------------------


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


@pytest.mark.parametrize("parser", list(parsers(cli.make_parser())), ids=lambda parser: parser.prog)
def test_the_help_of_every_command_shows_an_example_that_is_one(parser: argparse.ArgumentParser) -> None:
    examples = [line.strip() for line in (parser.epilog or "").splitlines()[1:]]
    assert examples
    for example in examples:
        words = example.split()
        assert words[0] == "caddie"
        assert cli.make_parser().parse_args(words[1:]).call


def test_an_unknown_command_is_a_usage_error(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        caddie(home, "dmeo")
    assert caught.value.code == 2
    assert "invalid choice: 'dmeo'" in capsys.readouterr().err


# ---- data --------------------------------------------------------------------------------------------------------


def test_data_is_prepared_under_a_name_and_verified(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts())
    options = ["--vocab-size", str(VOCAB_SIZE), "--val-frac", "0.2", "--shard-tokens", "4000"]
    assert caddie(home, "data", "prepare", "--corpus", str(corpus), "--out", "words", *options) == 0
    out = capsys.readouterr().out
    assert out.startswith("train ")
    assert out.endswith(f"{home / 'data' / 'words'}\n")
    assert caddie(home, "data", "verify", "words", "--corpus", str(corpus), "--processes", "1") == 0
    train, val, verdict = capsys.readouterr().out.splitlines()
    assert out.startswith(f"{train}\n{val}\n")  # what was made is what is there
    assert "raw bytes" in train and "counted bytes" in train
    assert verdict == f"{home / 'data' / 'words'}: sound"
    assert caddie(home, "data", "verify", "words", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["splits"]["val"]["counted_bytes"] == found["splits"]["val"]["spelled_bytes"]


def test_a_published_variant_that_nobody_knows_needs_a_repository(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert caddie(home, "data", "fetch", "sp77") == ConfigError.exit_code
    told = capsys.readouterr().err
    assert "no repository is known for the variant 'sp77'; known are sp1024, sp4096, sp8192" in told
    assert "hint: name one with --repo OWNER/NAME" in told


def test_problems_of_a_data_set_are_told_and_fail_the_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DataDir(small_data(home)).shard(TRAIN, 0).unlink()
    assert caddie(home, "data", "verify", "small") == DataError.exit_code
    told = capsys.readouterr()
    assert told.out.endswith("small: 1 problem\n")
    assert "problem: " in told.err
    assert "the shard is missing" in told.err
    assert caddie(home, "data", "verify", "small", "--json") == DataError.exit_code
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 1


# ---- studies -----------------------------------------------------------------------------------------------------


def fitting_study(home: Path, tmp_path: Path) -> str:
    """The shipped study on a small data set."""
    small_data(home)
    path = tmp_path / "study.toml"
    source = Path(SHIPPED).read_text().replace('data = "pydoc"', 'data = "small"')
    path.write_text(source + f'\n[set]\n"model.vocab_size" = {VOCAB_SIZE}\n')
    return str(path)


def test_a_study_is_checked_without_a_submission(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = fitting_study(home, tmp_path)
    assert caddie(home, "study", "check", study) == 0
    assert capsys.readouterr().out.startswith(f"{NAME}: sound; 8 trials over optim.muon_weight_decay, ")
    assert caddie(home, "study", "check", study, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trials"], found["runs_at_most"], found["warnings"]) == (8, 14, [])
    assert sorted(path.name for path in home.iterdir()) == ["data"]


def test_what_weakens_a_study_is_a_warning(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(fitting_study(home, tmp_path))
    path.write_text(path.read_text().replace("seeds = [1]", "seeds = [42]"))
    assert caddie(home, "study", "check", str(path)) == 0
    assert "warning: seeds [42] are searched and confirmed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "code", "message", "hint"),
    [
        (
            ('"model.qk_gain"', '"model.qk_gian"'),
            3,
            "there is no knob 'model.qk_gian'",
            "did you mean 'model.qk_gain'?",
        ),
        (("low = 1.5", "low = 9.5"), 3, '[space."model.qk_gain"] low 9.5 must be below high 6.0', None),
        (("high = 6.0", "high = -1"), 3, '[space."model.qk_gain"] low 1.5 must be below high -1', None),
        (('data = "small"', 'data = "large"'), 4, "there is no data set 'large'", "there are: small"),
        (
            (f"= {VOCAB_SIZE}", "= 512"),
            3,
            "model.vocab_size is 512, the data set",
            "take another data set, or set model.vocab_size to 420",
        ),
    ],
)
def test_a_study_that_cannot_be_run_is_refused_before_anything_is_written(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    change: tuple[str, str], code: int, message: str, hint: str | None,
) -> None:  # fmt: skip
    path = Path(fitting_study(home, tmp_path))
    path.write_text(path.read_text().replace(*change))
    assert caddie(home, "study", "run", str(path)) == code
    told = capsys.readouterr().err
    assert f"error: {message}" in told or f": {message}" in told
    assert hint is None or f"hint: {hint}" in told
    assert sorted(path.name for path in home.iterdir()) == ["data"]


def test_a_home_that_cannot_be_written_stops_a_run_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert caddie(tmp_path / "file" / "home", "demo") == StorageError.exit_code
    assert "error: " in capsys.readouterr().err


def test_studies_are_listed_with_where_they_stand(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_study(home)
    assert caddie(home, "study", "list") == 0
    assert capsys.readouterr().out.startswith(f"{NAME:<32} finished   8 of 8 trials    best ")
    assert caddie(home, "study", "list", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == NAME


def test_a_home_without_studies_lists_none(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert caddie(home, "study", "list") == 0
    assert capsys.readouterr() == ("", f"no studies under {home / 'studies'}\n")


def test_the_status_of_a_study_is_told_to_people_and_to_scripts(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_study(home)
    assert caddie(home, "study", "status", NAME) == 0
    assert capsys.readouterr().out.startswith(f"{NAME}: finished\n")
    assert caddie(home, "study", "status", NAME, "--json") == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"


def test_a_study_is_asked_to_stop(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_study(home)
    assert caddie(home, "study", "stop", NAME, "--cancel") == 0
    assert "nothing to stop" in capsys.readouterr().out


def test_an_unknown_study_is_an_error_with_a_hint(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert caddie(home, "study", "status", "wd") == ConfigError.exit_code
    assert "hint: " in capsys.readouterr().err


# ---- records and views -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "42;314"], "--seeds must be whole numbers between commas, got '42;314'"),
        (["--set", "ttt.lr"], "--set must be knob=value, got 'ttt.lr'"),
        (["--set", "ttt.lrr=1"], "there is no knob 'ttt.lrr'"),
        (["--set", "ttt.lr=fast"], "ttt.lr is of type float, got 'fast'"),
    ],
)
def test_a_record_that_cannot_be_meant_is_refused(
    home: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert caddie(home, "run", "smoke", *options) == ConfigError.exit_code
    assert f"error: {message}" in capsys.readouterr().err
    assert not home.exists()


def test_settings_and_presets_are_read_as_they_are_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert assignments.parse_settings(["ttt.lr=0.01", "model.recurrence_layers=2,3"]) == {
        "ttt.lr": 0.01,
        "model.recurrence_layers": (2, 3),
    }
    assert assignments.named_preset("smoke") == "smoke"
    assert assignments.named_preset("mine.toml") == str(tmp_path / "mine.toml")


def test_a_report_is_printed_with_the_place_of_its_page(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_study(home)
    assert caddie(home, "report", NAME) == 0
    out = capsys.readouterr().out
    page = next(line for line in out.splitlines() if line.startswith("report ")).split()[1]
    assert Path(page).is_file()
    assert f"MLflow   caddie --home {home} ui" in out
    assert caddie(home, "report", NAME, "--json") == 0
    assert json.loads(capsys.readouterr().out)


def test_a_report_on_a_damaged_event_file_is_shown_and_fails_the_command(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = gather(make_study(home), NAME).arms[0].runs[0]
    events = Home(home).run(run.run_id).attempt(1).events
    with events.open("ab") as file:
        file.write(b"{broken\n")
    for options in ([], ["--json"]):
        assert caddie(home, "report", NAME, *options) == ProtocolError.exit_code
        out, err = capsys.readouterr()
        assert "best" in out
        assert f"error: {events}: byte" in err
        assert "hint: what these files hold is missing above; the rest stands" in err


def test_a_sound_run_is_verified_on_stdout_and_recorded(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(home)
    assert caddie(home, "verify", run.run_id[:4]) == 0
    out, err = capsys.readouterr()
    assert out.endswith(f"{run.run_id}: verified, 27 of 27 checks passed\n")
    assert err == f"{run.run_id}: scoring artifact.bin alone; it took the run 1 s\n"
    assert json.loads(run.verify.read_text())["verdict"] == "passed"
    assert caddie(home, "verify", str(run.root), "--json") == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "passed"


def test_what_a_verification_finds_wrong_is_told_and_decides_the_exit_code(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(home)
    data_of(run).tokenizer.write_bytes(b"others")
    assert caddie(home, "verify", run.run_id) == DataError.exit_code
    assert "error: data.tokenizer: the tokenizer must be the one that the manifest names" in capsys.readouterr().err
    edit_result(run, artifact_bytes=30)
    assert caddie(home, "verify", run.run_id, "--json") == ProtocolError.exit_code
    out, err = capsys.readouterr()
    assert json.loads(out)["verdict"] == json.loads(run.verify.read_text())["verdict"] == "failed"
    assert "error: artifact.bytes: " in err and "\nhint: put back" in err


def test_an_audit_without_the_runs_own_data_probes_nothing_and_is_recorded(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(home)
    data_of(run).tokenizer.write_bytes(b"others")
    assert caddie(home, "audit", run.run_id[:4]) == DataError.exit_code
    out, err = capsys.readouterr()
    assert out.endswith(f"{run.run_id}: not audited, the data at hand are not the run's\n")
    assert "error: data.tokenizer: the tokenizer must be the one that the manifest names" in err
    assert "note: undecided: probes, reach.files, reach.network: not probed: data.tokenizer failed" in err
    assert json.loads(run.audit.read_text())["verdict"] == "failed"
    run.artifact.unlink()
    assert caddie(home, "audit", str(run.root), "--json", "--no-evaluation") == ProtocolError.exit_code
    assert json.loads(capsys.readouterr().out)["measured"] is None


def test_an_audit_of_nothing_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(home)
    assert caddie(home, "audit", run.run_id, "--sample", "0") == ConfigError.exit_code
    assert "error: --sample must be at least 1 position, got 0" in capsys.readouterr().err
    assert not run.audit.exists()


def test_a_verification_with_data_or_a_run_that_there_are_not_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(home)
    assert caddie(home, "verify", run.run_id, "--data", str(tmp_path / "nowhere")) == DataError.exit_code
    assert "found missing" in capsys.readouterr().err
    assert caddie(home, "verify", "unheard-of") == ConfigError.exit_code
    assert f"hint: the latest are: {run.run_id}" in capsys.readouterr().err


def test_what_was_found_is_shown_also_where_it_cannot_be_recorded(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(home)
    run.verify.mkdir()
    (run.verify / "in the way").touch()
    assert caddie(home, "verify", run.run_id) == StorageError.exit_code
    assert "27 of 27 checks passed" in capsys.readouterr().out


def test_the_doctor_names_what_it_found_and_fails_only_for_what_is_missing(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = caddie(home, "doctor", "--json")
    findings = json.loads(capsys.readouterr().out)
    assert code == (MachineError.exit_code if any(finding["status"] == "missing" for finding in findings) else 0)
    assert caddie(home, "doctor") == code
    assert findings[0]["name"] in capsys.readouterr().out


# ---- the entry ---------------------------------------------------------------------------------------------------


def answer_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let a command end with an error."""

    def raise_it(arguments: argparse.Namespace, home: object) -> int:
        raise error

    parser = argparse.ArgumentParser()
    parser.set_defaults(call=raise_it, home=None)
    monkeypatch.setattr(cli, "make_parser", lambda: parser)


def test_a_full_disk_is_an_error_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_with(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/home/of/runs"))
    assert cli.main([]) == StorageError.exit_code
    told = capsys.readouterr().err
    assert "error: /home/of/runs: cannot be written: No space left on device" in told
    assert "hint: free some space" in told


def test_another_system_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, ConnectionResetError(errno.ECONNRESET, "reset"))
    with pytest.raises(ConnectionResetError):
        cli.main([])


def test_ctrl_c_ends_with_the_shells_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answer_with(monkeypatch, KeyboardInterrupt())
    assert cli.main([]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "full", "code", "told"),
    [
        (
            ("study", "list"),
            "stdout",
            StorageError.exit_code,
            "error: /dev/stdout: cannot be written: No space left on device",
        ),
        (("study", "status", "nothing"), "stderr", ConfigError.exit_code, ""),
    ],
)
def test_the_exit_code_stands_where_the_disk_takes_no_word(
    home: Path, arguments: tuple[str, ...], full: str, code: int, told: str
) -> None:
    make_study(home)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as disk:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.cli", "--home", str(home), *arguments], cwd=Path(__file__).parents[2],
            text=True, check=False, env=environment,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, full: disk},
        )  # fmt: skip
    assert done.returncode == code
    assert (done.stderr or "").startswith(told) and "Traceback" not in (done.stderr or "")


def test_a_reader_that_leaves_early_is_no_error(home: Path) -> None:
    make_study(home)
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "--home", home, "study", "status", NAME],
        stdout=write, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(write)
    assert (process.returncode, process.stderr) == (141, "")


def test_the_home_is_the_environments_where_none_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_study(home)
    monkeypatch.setenv("CADDIE_HOME", str(home))
    assert cli.main(["study", "list"]) == 0
    assert NAME in capsys.readouterr().out


def test_the_command_to_go_on_with_is_one_that_the_shell_finds(monkeypatch, tmp_path):
    installed = tmp_path / "my bin" / "caddie"
    installed.parent.mkdir()
    installed.write_text("#!/bin/sh\n")
    installed.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(installed)])
    monkeypatch.setenv("PATH", "/nowhere")
    assert terminal.command_name() == f"'{installed}'"
    monkeypatch.setenv("PATH", str(installed.parent))
    assert terminal.command_name() == "caddie"


def test_two_arms_are_compared_and_an_unmet_rule_fails_the_command(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_study(home)
    assert caddie(home, "compare", NAME, f"{NAME}:preset") == 0
    told = capsys.readouterr().out
    assert "pg-readme: the written rule" in told
    assert "pg-leaderboard: the applied rule" in told
    assert caddie(home, "compare", NAME, f"{NAME}:preset", "--gate", "pg-readme", "--paired") == 10
    assert "power: these seeds find" in capsys.readouterr().out
    assert caddie(home, "compare", NAME, "2.9", "--gate", "pg-readme-constant", "--json") == 0
    assert json.loads(capsys.readouterr().out)["verdicts"][0]["is_met"] is True


def test_what_weakens_a_comparison_goes_to_stderr(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert caddie(home, "compare", "pr1769", "pr1736") == 0
    assert "7 runs of the configuration were started, 5 are compared" in capsys.readouterr().err


def test_an_unknown_rule_is_refused_with_the_nearest(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert caddie(home, "compare", "pr1769", "pr1736", "--gate", "pg-reedme") == 3
    assert "did you mean 'pg-readme'?" in capsys.readouterr().err


def test_a_report_is_against_what_is_asked_for(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_study(home)
    assert caddie(home, "report", NAME, "--against", "2.9", "--gate", "pg-readme-constant") == 0
    assert "met: pg-readme-constant" in capsys.readouterr().out
    assert caddie(home, "report", NAME, "--against", "nothing") == 3


@pytest.mark.parametrize(
    "words",
    [["--interleave"], ["--against", "pr1326"], ["--interleave", "--max-gap", "0.1"], ["--set-against", "ttt.lr=0.1"]],
)
def test_a_comparison_by_turns_needs_both_the_word_and_a_candidate(words, tmp_path, capsys):
    assert cli.main(["--home", str(tmp_path), "run", "smoke", *words]) == 3
    told = capsys.readouterr().err
    assert "--interleave goes with a candidate" in told and "--against pr1326-fisher --interleave" in told


def test_a_comparison_by_turns_is_asked_for_with_a_preset_or_with_knobs():
    words = ["run", "smoke", "--interleave", "--set-against", "ttt.lr=0.01", "--max-gap", "0.05", "--seeds", "1,2"]
    study = attempt_commands.study_of_preset(cli.make_parser().parse_args(words))
    assert study.candidate_params == {"ttt.lr": 0.01} and study.interleave.max_gap == 0.05
    study = attempt_commands.study_of_preset(
        cli.make_parser().parse_args(["run", "pr1326", "--interleave", "--against", "pr1326-fisher"])
    )
    assert "quant.grid" in study.candidate_params


# ---- plans, points, costs ----------------------------------------------------------------------------------------


def study_file(folder: Path, data: Path, extra: str = "") -> Path:
    text = Path(SHIPPED).read_text().replace('data = "pydoc"', f'data = "{data}"')
    path = folder / "study.toml"
    path.write_text(text.replace("[search]", f'[set]\n"model.vocab_size" = {VOCAB_SIZE}\n\n[search]') + extra)
    return path


def test_a_dry_run_prints_the_plan_and_submits_nothing(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study_file(tmp_path, small_data(home), "\n[budget]\nprice_per_gpu_hour = 2.5\n")
    assert caddie(home, "study", "run", str(path), "--dry-run") == 0
    out = capsys.readouterr().out
    assert f"plan of {NAME}" in out and "8 to ask, 8 runs" in out and "if it began now" in out
    assert not Home(home).study_names() and not Home(home).runs.exists()
    assert caddie(home, "study", "check", str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["plan"]["runs"] == 14


def test_a_cap_below_one_run_is_refused_by_the_check(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study_file(tmp_path, small_data(home), "\n[budget]\ngpu_hours = 1.0\n")
    path.write_text(path.read_text().replace("slots = 2", "gpus_per_run = 8"))
    assert caddie(home, "study", "check", str(path)) == ConfigError.exit_code
    assert "[budget] the study's cap of 1.00 GPU-hours is below" in capsys.readouterr().err


def test_a_point_is_enqueued_by_hand_and_as_a_preset_has_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert caddie(home, "study", "enqueue", NAME, "--set", "model.qk_gain=4.5") == 0
    assert caddie(home, "study", "enqueue", NAME, "--from", "pr1493") == 0
    told = capsys.readouterr()
    assert "model.qk_gain = 4.5" in told.out and "(preset pr1493)" in told.out and "also differs" in told.err
    assert caddie(home, "study", "enqueue", NAME, "--set", "model.qk_gain=4.5") == 0
    assert "waits to be one" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--set", "model.qk_gain=4.5", "--from", "pr1493"]])
def test_a_point_has_one_source(home: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert caddie(home, "study", "enqueue", NAME, *options) == ConfigError.exit_code
    assert "either --set KNOB=VALUE or --from SOURCE" in capsys.readouterr().err


def test_the_costs_of_studies_are_told_by_phase(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_study(home)
    assert caddie(home, "costs", NAME) == 0
    out = capsys.readouterr().out
    assert "Cost by phase" in out and "train" in out and "all of them" in out
    assert caddie(home, "costs", "--json") == 0
    assert json.loads(capsys.readouterr().out)["studies"][0]["study"] == NAME
    assert caddie(home, "costs", "nowhere") == ConfigError.exit_code


@pytest.mark.parametrize("missing", ["mlflow", "optuna"])
def test_a_package_that_is_not_there_is_named_with_its_remedy(tmp_path: Path, missing: str) -> None:
    """As where only the trainer's packages were installed."""
    begin = f"import sys; sys.modules[{missing!r}] = None; from orchestrator import cli; sys.exit(cli.main())"
    done = subprocess.run(
        [sys.executable, "-c", begin, "--home", str(tmp_path / "home"), "study", "run", SHIPPED],
        cwd=SHIPPED_STUDIES.parent, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 8 and "Traceback" not in done.stderr
    assert f"error: {missing} is not installed in {sys.prefix}, and this command needs it" in done.stderr
    assert "hint: pip install 'caddie[orchestrator]'" in done.stderr


def test_a_module_of_our_own_that_is_not_there_is_a_fault_and_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, ModuleNotFoundError("No module named 'trainer.nowhere'", name="trainer.nowhere"))
    with pytest.raises(ModuleNotFoundError):
        cli.main([])
