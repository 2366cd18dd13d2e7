import pytest
from make_study import BUNDLE, CODE, SMOKE, Maker, make_record, make_study

from orchestrator.arms import find_arm, last_stage
from orchestrator.errors import ConfigError, ProtocolError
from orchestrator.evidence import gather, run_evidence
from orchestrator.runs import RunRequest

NAME = "wd-qk-ttt-smoke"


def test_a_study_stands_for_its_best_point_and_others_by_name(tmp_path):
    home = make_study(tmp_path)
    evidence = gather(home, NAME)
    best = find_arm(home, NAME)
    assert best.name == f"{NAME}:best"
    assert best.by_seed == evidence.arms[0].by_seed("ttt")
    assert find_arm(home, f"{NAME}:preset").by_seed == evidence.arms[1].by_seed("ttt")
    assert find_arm(home, f"{NAME}:trial-1").values == [evidence.trials[1].trial.value]
    assert find_arm(home, NAME, stage="sliding").values == evidence.arms[0].values("sliding")


def test_a_score_of_ours_brings_its_loss_its_limits_and_its_line(tmp_path):
    home = make_study(tmp_path)
    score = find_arm(home, NAME).scores[0]
    result = gather(home, NAME).arms[0].runs[0].result
    assert score.nats_per_token == result.scores["ttt"].loss
    assert (score.artifact_bytes, score.train_seconds) == (result.artifact_bytes, result.train_seconds)
    line = (home.root / score.source).read_text().splitlines()[score.line - 1]
    assert str(score.bpb) in line


def test_a_seed_without_a_score_is_missing_with_its_reason(tmp_path):
    arm = find_arm(make_study(tmp_path, failing_seed=314), NAME)
    assert sorted(arm.by_seed) == [42, 999]
    [missing] = arm.missing
    assert missing.startswith("seed 314: failed: not_finite: the loss is not a number at step 31")
    assert arm.started == 3


def test_an_arm_that_a_study_does_not_have_is_refused_with_the_nearest(tmp_path):
    home = make_study(tmp_path)
    with pytest.raises(ConfigError, match="has no arm 'presett'") as error:
        find_arm(home, f"{NAME}:presett")
    assert error.value.hint == "did you mean 'preset'?"
    with pytest.raises(ConfigError, match="has no runs yet"):
        find_arm(make_study(tmp_path / "new", stage="opened"), NAME)


def test_a_record_study_stands_for_its_only_arm(tmp_path):
    assert find_arm(make_record(tmp_path), "record-smoke").name == "record-smoke:preset"


def test_runs_of_one_configuration_are_an_arm_by_the_beginnings_of_their_ids(tmp_path):
    home = make_study(tmp_path)
    runs = gather(home, NAME).arms[0].runs
    arm = find_arm(home, ",".join(run.run_id[:12] for run in runs))
    assert arm.by_seed == {run.seed: run.bpb("ttt") for run in runs}
    # trial 1 is the best point on the search's seed: by run ids nobody has set it apart
    assert arm.started == 4
    assert any("seed 1, study wd-qk-ttt-smoke: complete" in problem for problem in arm.problems)


def test_runs_of_two_configurations_are_no_arm(tmp_path):
    home = make_study(tmp_path)
    best, preset = gather(home, NAME).arms
    with pytest.raises(ConfigError, match="the 2 runs are of 2 configurations"):
        find_arm(home, f"{best.runs[0].run_id},{preset.runs[0].run_id}")


def test_numbers_stand_for_themselves(tmp_path):
    home = make_record(tmp_path)
    assert find_arm(home, "1.0810").constant
    assert find_arm(home, "1.08,1.09").values == [1.08, 1.09]
    for text in ("1.060755±0.000933x6", "1.060755+-0.000933×6"):
        found = find_arm(home, text).summary
        assert (found.count, found.mean, found.std) == (6, 1.060755, 0.000933)


def test_what_names_nothing_is_refused_with_what_there_is(tmp_path):
    with pytest.raises(ConfigError, match="'nothing' names no study, run, imported or published record") as error:
        find_arm(make_record(tmp_path), "nothing")
    assert error.value.hint.startswith("studies: record-smoke; ")


def test_a_records_folder_and_an_imported_record_are_arms(tmp_path):
    from orchestrator import imports

    home = make_record(tmp_path / "home")
    folder = tmp_path / "2026-01-01_Example"
    folder.mkdir()
    folder.joinpath("train_seed7.log").write_text(
        "seed:7\nstep:10/10 train_loss:3.1 train_time:100ms step_avg:10.00ms\n"
        "final_int8_zlib_roundtrip_exact val_loss:2.10000000 val_bpb:1.25000000\n"
    )
    folder.joinpath("README.md").write_text("# Example\n")
    assert find_arm(home, str(folder)).by_seed == {7: 1.25}
    imports.keep(home, folder)
    arm = find_arm(home, "imports/2026-01-01")
    assert arm.by_seed == {7: 1.25}
    [score] = arm.scores
    assert "val_bpb:1.25" in (home.root / score.source).read_text().splitlines()[score.line - 1]


def test_a_damaged_run_is_refused_with_its_place(tmp_path):
    home = make_study(tmp_path)
    run = gather(home, NAME).arms[0].runs[0]
    (home.root / run.source).write_text("{")
    with pytest.raises(ProtocolError, match="not a JSON object"):
        find_arm(home, run.run_id)


def test_the_last_stage_is_one_that_every_complete_run_has(tmp_path):
    home = make_study(tmp_path)
    runs = [run_evidence(home, run.run_id) for run in gather(home, NAME).arms[0].runs]
    assert last_stage(runs) == "ttt"
    del runs[0].result.scores["ttt"]
    assert last_stage(runs) == "sliding"
    assert last_stage([]) == "ttt"


def test_a_replicate_is_of_the_same_family(tmp_path):
    home = make_record(tmp_path)
    maker = Maker(tmp_path, SMOKE)
    again = RunRequest(
        preset="smoke", config=gather(home, "record-smoke").study.config, seed=42, replicate=1, data_dir="/data/pydoc",
        manifest_sha256="ab" * 32, study="again",
    )  # fmt: skip
    maker.fail(maker.store.plan(again, bundle=BUNDLE, code=CODE), "code", "it broke")
    arm = find_arm(home, "record-smoke")
    assert arm.started == 4
    assert any("seed 42, study again: failed" in problem for problem in arm.problems)
