import dataclasses

import pytest
from fakes import FAKE_BUNDLE
from make_verified import data_of, make_run

from orchestrator import cli, preflight, source_run, worker
from orchestrator.errors import ConfigError
from orchestrator.home import Home
from orchestrator.runs import RunRequest, RunStore
from orchestrator.study import parse_study, record_study
from trainer import protocol
from trainer.config import knob_value, with_knobs
from trainer.protocol import read_spec, sha256_of

KNOBS = {"ttt.lr": 0.01, "optim.matrix_lr": 0.03}


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, knobs=KNOBS)


def test_a_run_is_found_by_the_beginning_of_its_id_with_what_its_preset_has_otherwise(home, run):
    source = source_run.find(home, run.run_id[:6])
    assert source.artifact_sha256 == sha256_of(run.artifact)
    assert source_run.knobs_set(source) == {**KNOBS, "limits.artifact_bytes": 20_000}


def test_a_run_without_a_model_file_of_its_own_is_refused(home, run):
    run.artifact.write_bytes(b"another")
    with pytest.raises(
        ConfigError, match="has no model file that could be scored again: .* is not the one of its result"
    ):
        source_run.find(home, run.run_id)
    run.artifact.unlink()
    with pytest.raises(
        ConfigError, match=r"\(complete\) has no model file that could be scored again: .* is missing"
    ) as caught:
        source_run.find(home, run.run_id)
    assert "wait for its end" in caught.value.hint


def test_a_run_of_another_home_is_refused(tmp_path, run):
    other = Home(tmp_path / "other")
    with pytest.raises(ConfigError, match="the run must lie in"):
        source_run.find(other, str(run.root))


@pytest.mark.parametrize("knob", ["ttt.epochs", "ttt.lora_rank", "evaluation.stride"])
def test_knobs_of_scoring_may_differ(home, run, knob):
    source = source_run.find(home, run.run_id)
    config = with_knobs(source.config, {knob: 2})
    source_run.require_scorable(source, config, source.spec.manifest_sha256)


def test_that_a_trial_could_have_been_resumed_is_no_difference_of_what_is_scored(home, run):
    source = source_run.find(home, run.run_id)
    resumable = with_knobs(source.config, {"runtime.resumable": True})
    source_run.require_scorable(source, resumable, source.spec.manifest_sha256)
    assert source_run.knobs_set(dataclasses.replace(source, config=resumable)) == source_run.knobs_set(source)


def test_any_other_knob_and_other_data_are_refused_with_both_values(home, run):
    source = source_run.find(home, run.run_id)
    config = with_knobs(source.config, {"optim.matrix_lr": 0.05, "quant.mlp_bits": 5, "ttt.lr": 0.5})
    with pytest.raises(ConfigError) as caught:
        source_run.require_scorable(source, config, source.spec.manifest_sha256)
    assert "optim.matrix_lr is 0.05, there 0.03, quant.mlp_bits is 5, there 6" in str(caught.value)
    assert "ttt.lr" not in str(caught.value).partition(";")[2]
    with pytest.raises(ConfigError, match="was made with another data set"):
        source_run.require_scorable(source, source.config, "0" * 64)


def request_of(found, **changes):
    return RunRequest(**{
        "preset": "smoke", "config": found.config, "seed": found.spec.seed, "data_dir": found.spec.data_dir,
        "manifest_sha256": found.spec.manifest_sha256, "source": found.spec.run_id,
        "source_sha256": found.artifact_sha256, **changes,
    })  # fmt: skip


def test_a_run_that_scores_another_holds_its_model_file_and_is_a_run_of_its_own(home, run):
    source, store = source_run.find(home, run.run_id), RunStore(home)
    planned = store.plan(request_of(source), bundle=FAKE_BUNDLE, code={})
    assert sha256_of(planned.source) == source.artifact_sha256
    spec = read_spec(planned.spec)
    assert (spec.source, spec.source_sha256) == (run.run_id, source.artifact_sha256)
    ids = {
        store.plan(request, bundle=FAKE_BUNDLE, code={}).run_id
        for request in (request_of(source), request_of(source, source="", source_sha256=""), request_of(source, seed=8))
    }
    assert len(ids) == 3


def test_a_job_whose_source_was_changed_is_not_started(home, run):
    planned = RunStore(home).plan(request_of(source_run.find(home, run.run_id)), bundle=FAKE_BUNDLE, code={})
    planned.source.write_bytes(b"another")
    attempt = planned.attempt(1)
    worker.run_attempt(str(planned.root), 1, 1, "", 5.0)
    result = protocol.read_result(attempt.result)
    assert result.status == protocol.FAILED
    assert f"{planned.source}: its SHA-256 is" in result.failure.message


def study_text(run, *, space="ttt.lr", objective="ttt", extra=""):
    return f"""
name = "sweep"
question = "Which rate?"
preset = "smoke"
data = "made-up"
from = "{run.run_id}"

[set]
"optim.matrix_lr" = 0.03
"limits.artifact_bytes" = 20_000

[space."{space}"]
low = 0.001
high = 0.1

[search]
trials = 2
objective = "{objective}"
{extra}
"""


def test_a_study_can_search_over_the_scoring_of_one_run(run):
    study = parse_study(study_text(run))
    assert study.from_run == run.run_id
    source = source_run.find(Home(run.root.parents[1]), study.from_run)
    source_run.require_scorable(source, study.config, source.spec.manifest_sha256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": "optim.scalar_lr"}, r"\[space\] optim.scalar_lr cannot matter where a stored model is only scored"),
        ({"objective": "post_ema"}, r"\[search\] objective must be one of the stored model's, got 'post_ema'"),
        ({"extra": "[stop_early]\nat_fracs = [0.5]"}, r"\[stop_early\] needs training"),
    ],
)
def test_a_study_of_one_run_cannot_ask_for_training(run, changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_study(study_text(run, **changes))


def test_a_study_s_source_is_a_text(run):
    with pytest.raises(ConfigError, match="from must be the id of a run in quotes, got 7"):
        parse_study(study_text(run).replace(f'"{run.run_id}"', "7"))


def test_the_check_before_a_study_compares_it_with_its_source(home, run, monkeypatch):
    monkeypatch.setattr(preflight.datasets, "require_sound", lambda _: None)  # the data are made up
    assert preflight.check(parse_study(study_text(run)), home).root == data_of(run).root
    other = study_text(run).replace("0.03", "0.02")
    with pytest.raises(ConfigError, match="only ttt. and evaluation.* may differ; optim.matrix_lr is 0.02, there 0.03"):
        preflight.check(parse_study(other), home)


def test_a_record_from_a_run_has_a_name_of_its_own_and_keeps_its_source():
    ask = {"data": "d", "seeds": (7,), "knobs": {"ttt.lr": 0.005}}
    plain, scored, other = (record_study("smoke", **ask, from_run=run) for run in ("", "abc", "abd"))
    assert (plain.from_run, scored.from_run) == ("", "abc")
    assert len({plain.name, scored.name, other.name}) == 3
    assert scored.question == "What does run abc score on seeds 7?"


def command_line(home, *arguments):
    return cli.make_parser().parse_args(["--home", str(home.root), "run", *arguments])


def test_the_command_takes_data_seed_preset_and_knobs_from_the_run(home, run):
    arguments = command_line(home, "--from", run.run_id[:8], "--set", "ttt.lr=0.5", "--set", "ttt.method=lora")
    study = cli.study_from_run(arguments, home)
    assert (study.preset, study.from_run, study.confirm.seeds) == ("smoke", run.run_id, (7,))
    assert study.data == str(data_of(run).root)
    assert knob_value(study.config, "optim.matrix_lr") == 0.03
    assert (knob_value(study.config, "ttt.lr"), knob_value(study.config, "ttt.method")) == (0.5, "lora")
    assert cli.study_from_run(command_line(home, "--from", run.run_id, "--seeds", "1,2"), home).confirm.seeds == (1, 2)


def test_a_preset_and_a_run_exclude_one_another_and_one_is_needed(home, run, capsys):
    for arguments, message in (
        (["smoke", "--from", run.run_id], "a preset and --from exclude one another, got 'smoke'"),
        ([], "a preset or --from RUN must be given"),
    ):
        assert cli.main(["--home", str(home.root), "run", *arguments]) == ConfigError.exit_code
        assert message in capsys.readouterr().err


def test_a_knob_of_training_is_refused_before_anything_is_planned(home, run, capsys, monkeypatch):
    monkeypatch.setattr(preflight.datasets, "require_sound", lambda _: None)
    before = RunStore(home).ids()
    code = cli.main(["--home", str(home.root), "run", "--from", run.run_id, "--set", "optim.matrix_lr=0.5"])
    assert code == ConfigError.exit_code
    assert "only ttt. and evaluation.* may differ; optim.matrix_lr is 0.5, there 0.03" in capsys.readouterr().err
    assert RunStore(home).ids() == before
