import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
from make_mlflow import NAME, count_metric_points, points, runs_by_key
from make_study import Maker, confirm, make_record, make_study, sampled_params, search, spec_of, with_event_line

from orchestrator import ledger
from orchestrator.errors import StorageError
from orchestrator.evidence import gather
from orchestrator.home import Home
from orchestrator.mirror import Mirror, rebuild, sync_all, view_paths
from orchestrator.report import write_report
from orchestrator.tracking import MlflowStore
from trainer import protocol

# SQLAlchemy 2.1 tells MLflow, on its first use, of an option that it should leave.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture(scope="session")
def mirrored(tmp_path_factory, empty_database):
    """A finished study and its mirror, read by several tests and changed by none."""
    home = make_study(tmp_path_factory.mktemp("mirrored"))
    shutil.copyfile(empty_database, home.mlflow_database)
    write_report(home, NAME)
    assert Mirror(home).sync(NAME) == []
    return home, runs_by_key(home)


def test_runs_nest_from_study_to_trial_and_arm_to_seed(mirrored):
    _, runs = mirrored
    study = runs["study"].info.run_id
    assert len(runs) == 1 + 8 + 8 + 2 + 6
    for key, run in runs.items():
        parent = run.data.tags.get("mlflow.parentRunId")
        if key == "study":
            assert parent is None
        elif "/seed/" in key:
            assert parent == runs[key.rpartition("/seed/")[0]].info.run_id
        else:
            assert parent == study


def test_states_are_true(mirrored):
    _, runs = mirrored
    states = {key: runs[key].info.status for key in runs}
    assert states["study"] == states["trial/0"] == states["trial/0/seed/1"] == "FINISHED"
    assert states["trial/3"] == states["trial/3/seed/1"] == "FAILED"
    assert states["trial/5"] == states["trial/5/seed/1"] == "KILLED"
    assert states["arm/best"] == "FINISHED"


def test_a_trial_carries_its_knobs_in_full_and_its_mean(mirrored):
    home, runs = mirrored
    trial = gather(home, NAME).trials[4].trial
    assert runs["trial/4"].data.params == {knob: str(value) for knob, value in trial.params.items()}
    assert runs["trial/4"].data.metrics["objective_bpb"] == trial.value
    assert runs["trial/4"].data.metrics["constraint/artifact_bytes"] == -12000.0


def test_an_arm_carries_mean_and_spread_over_its_seeds(mirrored):
    home, runs = mirrored
    summary = gather(home, NAME).arms[0].summary("ttt")
    assert runs["arm/best"].data.metrics["final/ttt_bpb"] == summary.mean
    assert runs["arm/best"].data.metrics["final/ttt_bpb_std"] == summary.std


def test_a_seed_run_has_the_resolved_configuration_and_every_final_score(mirrored):
    home, runs = mirrored
    run = gather(home, NAME).arms[0].runs[0]
    data = runs["arm/best/seed/42"].data
    spec = spec_of(home.run(run.run_id))
    for section, entries in spec.config.items():
        for name in entries:
            assert f"{section}.{name}" in data.params
    assert data.params["schedule.clock"] == "step"
    for stage in protocol.STAGES:
        assert data.metrics[f"final/{stage}_bpb"] == run.bpb(stage)
    assert data.metrics["final/artifact_bytes"] == run.result.artifact_bytes
    assert data.metrics["final/train_seconds"] == 21.6
    assert data.metrics["phase_seconds/train"] == 21.6


def test_tags_say_which_run_study_trial_seed_and_code_it_was(mirrored):
    home, runs = mirrored
    tags = runs["trial/4/seed/1"].data.tags
    run = gather(home, NAME).trials[4].runs[0]
    expected = {"run_id": run.run_id, "study": NAME, "trial": "4", "seed": "1", "status": "complete"}
    assert expected.items() <= {key.removeprefix("caddie."): value for key, value in tags.items()}.items()
    assert tags["mlflow.source.git.commit"] == spec_of(home.run(run.run_id)).code["git_sha"]
    assert run.run_id in tags["mlflow.note.content"]
    assert "out_of_memory" in runs["trial/3/seed/1"].data.tags["mlflow.note.content"]


def test_metrics_are_kept_by_step_and_by_milliseconds_at_their_own_time(mirrored):
    home, runs = mirrored
    run = runs["trial/0/seed/1"]
    attempt = home.run(run.data.tags["caddie.run_id"]).attempt(1)
    events = [event for _, event in protocol.read_lines(attempt.events)]
    started = next(event["time"] for event in events if event["kind"] == protocol.START)
    metrics = [event for event in events if event["kind"] == protocol.METRIC and "train_loss" in event["values"]]
    expected = [(e["step"], round((started + e["t"]) * 1000), e["values"]["train_loss"]) for e in metrics]
    assert points(home, run, "train_loss") == expected
    assert [step for step, _, _ in points(home, run, "by_ms/train_loss")] == [
        round(e["train_seconds"] * 1000) for e in metrics
    ]


def test_test_time_training_is_kept_by_chunk(mirrored):
    home, runs = mirrored
    run = runs["trial/0/seed/1"]
    assert [step for step, _, _ in points(home, run, "ttt_bpb")] == list(range(8))
    assert "ttt_chunk" not in run.data.metrics
    assert "by_ms/ttt_bpb" not in run.data.metrics


def test_a_run_of_two_attempts_has_one_curve(mirrored):
    home, runs = mirrored
    run = runs["trial/2/seed/1"]
    assert run.data.tags["caddie.attempt"] == "2"
    steps = [step for step, _, _ in points(home, run, "train_loss")]
    assert len(steps) == len(set(steps))
    assert steps[-1] == 120


def test_the_search_is_a_curve_of_the_study_run(mirrored):
    home, runs = mirrored
    best = [value for _, _, value in points(home, runs["study"], "best_bpb")]
    assert best == sorted(best, reverse=True)
    assert [step for step, _, _ in points(home, runs["study"], "trial_bpb")] == [0, 1, 2, 4, 6, 7]


def test_artifacts_are_the_files_of_the_run_and_of_the_report(mirrored):
    home, runs = mirrored
    client = MlflowStore(home).client
    seed = {file.path for file in client.list_artifacts(runs["trial/0/seed/1"].info.run_id)}
    assert seed == {"spec.json", "train_gpt.py", "result.json", "events.jsonl"}
    report = {file.path for file in client.list_artifacts(runs["study"].info.run_id, "report")}
    assert report == {"report/report.html", "report/report.md", "report/report.json", "report/record.csv"}


def test_the_experiment_has_a_description_and_a_view_with_the_studys_columns(mirrored):
    home, _ = mirrored
    experiment = MlflowStore(home).client.get_experiment_by_name(NAME)
    view = json.loads(experiment.tags["mlflow.sharedViewState.caddie"])
    assert "params.`optim.muon_weight_decay`" in view["selectedColumns"]
    assert view["orderByKey"] == "metrics.`final/ttt_bpb`"
    assert experiment.tags["mlflow.note.content"].startswith("Do Muon's weight decay")
    found = MlflowStore(home).client.search_runs([experiment.experiment_id], view["searchFilter"])
    assert {run.data.tags["caddie.level"] for run in found} == {"trial", "arm"}
    base, end = f"/#/experiments/{experiment.experiment_id}/runs?viewStateShareKey=", "&workflowType=machine_learning"
    assert view_paths(home) == {
        NAME: f"{base}caddie{end}",
        f"{NAME}, charts": f"{base}caddie&compareRunsMode=CHART{end}",
        f"{NAME}, curves": f"{base}caddie-curves&compareRunsMode=CHART{end}",
    }


def test_the_views_have_charts_of_metrics_and_knobs_that_are_there(mirrored):
    home, runs = mirrored
    tags = MlflowStore(home).client.get_experiment_by_name(NAME).tags
    trials, curves = (json.loads(tags[f"mlflow.sharedViewState.{name}"]) for name in ("caddie", "caddie-curves"))
    trial, seed = runs["trial/0"].data, runs["trial/0/seed/1"].data
    drawn = {chart["metricKey"] for chart in curves["compareRunCharts"]}
    assert {"train_loss", "by_ms/train_loss", "ttt_bpb", "final/ttt_bpb"} <= drawn & set(seed.metrics)
    [together] = [chart for chart in trials["compareRunCharts"] if chart["type"] == "PARALLEL"]
    assert set(together["selectedParams"]) <= set(trial.params)
    assert set(together["selectedMetrics"]) <= set(trial.metrics)
    for view in (trials, curves):
        sections = {section["uuid"] for section in view["compareRunSections"] if section["display"]}
        assert {chart["metricSectionId"] for chart in view["compareRunCharts"]} == sections
        uuids = [chart["uuid"] for chart in view["compareRunCharts"]]
        assert len(set(uuids)) == len(uuids)


def test_descriptions_lead_to_the_best_trial_the_arms_the_report_and_the_files(mirrored):
    _, runs = mirrored
    note = runs["study"].data.tags["mlflow.note.content"]
    for key in ("arm/best", "arm/preset"):
        assert f"/runs/{runs[key].info.run_id}?workflowType=machine_learning)" in note
    assert f"/runs/{runs['study'].info.run_id}/artifacts/report/report.html?" in note
    note = runs["arm/best/seed/42"].data.tags["mlflow.note.content"]
    assert f"/runs/{runs['arm/best'].info.run_id}?" in note
    assert "/artifacts/result.json?" in note


def test_what_the_gpus_did_is_on_the_page_of_system_metrics(tmp_path, in_home):
    home = in_home(make_study(tmp_path))
    [run_id, *_] = ledger.Ledger(home.study(NAME).ledger).state().arms["best"].runs.values()
    attempt = home.run(run_id).attempt(1)
    for second, load in ((0, 91.0), (10, 97.0)):
        counters = {"utilization_percentage": load, "memory_usage_mebibytes": 61_000.0}
        protocol.append_line(
            attempt.system(), {"time": 1_767_225_600.0 + second, "gpus": {"0": counters, "3": counters}}
        )
    protocol.append_line(attempt.system(1), {"time": 1_767_225_600.0, "gpus": {"0": {"power_usage_watts": 640.0}}})
    assert Mirror(home).sync(NAME) == []
    run = runs_by_key(home)["arm/best/seed/42"]
    assert [value for *_, value in points(home, run, "system/gpu_3_utilization_percentage")] == [91.0, 97.0]
    assert run.data.metrics["system/node_1_gpu_0_power_usage_watts"] == 640.0


def test_a_restarted_mirror_adds_nothing_to_what_is_there(tmp_path, in_home):
    home = in_home(make_study(tmp_path, stage="search", trials=3))
    Mirror(home).sync(NAME)
    before = count_metric_points(home), set(runs_by_key(home))
    assert before[0] > 0
    Mirror(home).sync(NAME)
    assert (count_metric_points(home), set(runs_by_key(home))) == before


def test_a_mirror_killed_between_metrics_and_their_end_repeats_no_point(tmp_path, in_home):
    home = in_home(make_study(tmp_path, stage="searched", trials=1))
    Mirror(home).sync(NAME)
    before, run = count_metric_points(home), runs_by_key(home)["trial/0/seed/1"]
    MlflowStore(home).client.delete_tag(
        run.info.run_id, "caddie.mirrored"
    )  # as if the kill had come before the last tag
    Mirror(home).sync(NAME)
    assert count_metric_points(home) == before


def test_new_events_are_added_to_a_running_run(tmp_path, in_home):
    home = in_home(make_study(tmp_path, stage="search", trials=3))
    mirror = Mirror(home)
    mirror.sync(NAME)
    run = runs_by_key(home)["trial/2/seed/1"]
    assert run.info.status == "RUNNING"
    attempt = home.run(run.data.tags["caddie.run_id"]).attempt(1)
    with_event_line(
        attempt,
        b'{"kind":"metric","t":30.0,"step":65,"train_seconds":12.0,"values":{"train_loss":2.5,"odd[name]":1}}\n{"kind":"met',
    )
    mirror.sync(NAME)
    found = runs_by_key(home)["trial/2/seed/1"].data.metrics
    assert (found["train_loss"], found["by_ms/odd_name_"]) == (2.5, 1.0)


@pytest.mark.parametrize("text", [b"NaN", b"Infinity"])
def test_a_loss_that_is_not_finite_is_mirrored_as_not_a_number(tmp_path, in_home, text):
    home = in_home(make_study(tmp_path, stage="search", trials=3))
    run_id = gather(home, NAME).trials[-1].runs[0].run_id
    with_event_line(
        home.run(run_id).attempt(1),
        b'{"kind":"metric","t":30.0,"step":65,"train_seconds":12.0,"values":{"train_loss":' + text + b"}}\n",
    )
    assert Mirror(home).sync(NAME) == []
    value = points(home, runs_by_key(home)["trial/2/seed/1"], "train_loss")[-1][2]
    assert value != value


def test_a_failed_attempt_that_will_be_repeated_leaves_the_run_running(tmp_path, in_home):
    maker = Maker(tmp_path)
    [run] = maker.ask_trial(0, sampled_params(maker.study, 0)).values()
    maker.fail(run, protocol.INFRASTRUCTURE, "the worker disappeared")
    home = in_home(maker.home)
    mirror = Mirror(home)
    mirror.sync(NAME)
    assert runs_by_key(home)["trial/0/seed/1"].info.status == "RUNNING"
    result = maker.complete(run, number=2)
    maker.tell(0, ledger.COMPLETE, value=result.scores["ttt"].bpb)
    mirror.sync(NAME)
    found = runs_by_key(home)["trial/0/seed/1"]
    assert (found.info.status, found.data.tags["caddie.attempt"]) == ("FINISHED", "2")


@pytest.mark.parametrize("end", ["full disk", "cancelled"])
def test_a_run_that_the_next_controller_attempts_again_is_left_running(tmp_path, in_home, end):
    maker = Maker(tmp_path)
    [run] = maker.ask_trial(0, sampled_params(maker.study, 0)).values()
    if end == "cancelled":
        maker.stop(run, ledger.CANCELLED)
    else:
        maker.fail(run, protocol.DISK, "checkpoint: cannot be written: No space left on device")
    home = in_home(maker.home)
    Mirror(home).sync(NAME)
    assert runs_by_key(home)["trial/0/seed/1"].info.status == "RUNNING"


def test_a_failed_run_that_is_asked_for_again_is_replaced_and_its_trial_and_arm_go_on(tmp_path, in_home):
    maker = Maker(tmp_path)
    [run] = maker.ask_trial(0, sampled_params(maker.study, 0)).values()
    maker.fail(run, protocol.TIMEOUT, "ended after 600 s")
    maker.tell(0, ledger.FAILED, reason="timeout: ended after 600 s")
    arm = maker.ask_arm("preset", 0, maker.study.preset_params(), (42, 314))
    maker.complete(arm[42])
    maker.fail(arm[314], protocol.TIMEOUT, "ended after 600 s")
    maker.append(ledger.CLOSED, reason="failed")
    home = in_home(maker.home)
    Mirror(home).sync(NAME)
    before = runs_by_key(home)
    assert [before[key].info.status for key in ("trial/0", "trial/0/seed/1", "arm/preset")] == ["FAILED"] * 3
    maker.append(ledger.OPENED, source=maker.study.source, digest="", caddie="0.1.0")
    maker.append(ledger.RETRIED, runs=[run.run_id, arm[314].run_id], trials=[0])
    result = maker.complete(run, number=2)
    maker.tell(0, ledger.COMPLETE, value=result.scores["ttt"].bpb)
    maker.complete(arm[314], number=2)
    mirror = Mirror(home)
    mirror.sync(NAME)
    after = runs_by_key(home)
    keys = ("trial/0", "trial/0/seed/1", "arm/preset", "arm/preset/seed/42", "arm/preset/seed/314")
    assert [after[key].info.status for key in keys] == ["FINISHED"] * 5
    assert after["trial/0"].data.metrics["objective_bpb"] == result.scores["ttt"].bpb
    assert after["arm/preset"].info.run_id == before["arm/preset"].info.run_id
    assert after["arm/preset/seed/42"].info.run_id == before["arm/preset/seed/42"].info.run_id
    assert after["arm/preset/seed/314"].data.tags["caddie.attempt"] == "2"


def test_an_arm_that_gets_further_seeds_after_it_was_whole_shows_them(tmp_path, in_home):
    """A race goes on, or a design gets further checkpoints."""
    maker = Maker(tmp_path)
    for run in maker.ask_arm("preset", 0, maker.study.preset_params(), (42, 314)).values():
        maker.complete(run)
    home = in_home(maker.home)
    Mirror(home).sync(NAME)
    assert runs_by_key(home)["arm/preset"].info.status == "FINISHED"
    maker.complete(maker.ask_arm("preset", 0, maker.study.preset_params(), (42, 314, 999))[999])
    Mirror(home).sync(NAME)
    found = runs_by_key(home)
    assert found["arm/preset/seed/999"].info.status == "FINISHED"
    assert found["arm/preset"].data.metrics["final/ttt_bpb"] == gather(home, NAME).arms[0].summary("ttt").mean


def test_a_run_whose_worker_died_without_a_result_fails_by_the_ledger(tmp_path, in_home):
    maker = Maker(tmp_path)
    [run] = maker.ask_trial(0, sampled_params(maker.study, 0)).values()
    maker.begin(run, steps=20)
    maker.append(
        ledger.ENDED, run_id=run.run_id, attempt=1, status="failed", failure="infrastructure", seconds=5.0, gpus=0
    )
    maker.tell(0, ledger.FAILED, reason="infrastructure")
    home = in_home(maker.home)
    Mirror(home).sync(NAME)
    runs = runs_by_key(home)
    assert (runs["trial/0/seed/1"].info.status, runs["trial/0"].info.status) == ("FAILED", "FAILED")


def test_an_arm_with_a_failed_seed_is_failed_and_keeps_the_mean_of_the_others(tmp_path, in_home):
    home = in_home(make_study(tmp_path, trials=2, failing_seed=314))
    Mirror(home).sync(NAME)
    runs = runs_by_key(home)
    assert (runs["arm/best"].info.status, runs["arm/best/seed/314"].info.status) == ("FAILED", "FAILED")
    assert runs["arm/best"].data.metrics["final/ttt_bpb"] == gather(home, NAME).arms[0].summary("ttt").mean


def test_a_continued_study_never_sets_an_ended_run_running_again(tmp_path, in_home):
    maker = Maker(tmp_path)
    search(maker, 1)
    maker.append(ledger.CLOSED, reason="stopped")
    home = in_home(maker.home)
    mirror = Mirror(home)
    mirror.sync(NAME)
    assert runs_by_key(home)["study"].info.status == "KILLED"
    maker.append(ledger.OPENED, source=maker.study.source, digest="", caddie="0.1.0")
    confirm(maker)
    mirror.sync(NAME)
    assert runs_by_key(home)["study"].info.status == "KILLED"
    maker.append(ledger.CLOSED, reason="finished")
    mirror.sync(NAME)
    runs = runs_by_key(home)
    assert runs["study"].info.status == "FINISHED"
    assert runs["trial/0/seed/1"].info.status == "FINISHED"


def test_a_damaged_event_line_is_reported_and_the_other_runs_are_mirrored(tmp_path, in_home):
    home = in_home(make_study(tmp_path, stage="searched", trials=2))
    run_id = gather(home, NAME).trials[0].runs[0].run_id
    with_event_line(home.run(run_id).attempt(1), b"broken\n")
    [problem] = Mirror(home).sync(NAME)
    assert "events.jsonl" in problem
    assert "not a JSON object" in problem
    runs = runs_by_key(home)
    assert runs["trial/0/seed/1"].data.tags["caddie.problem"] == problem
    assert runs["trial/0/seed/1"].info.status == "FINISHED"
    assert runs["trial/1/seed/1"].info.status == "FINISHED"
    assert "caddie.problem" not in runs["trial/1/seed/1"].data.tags


def test_a_damaged_result_is_reported_and_the_other_runs_are_mirrored(tmp_path, in_home):
    home = in_home(make_study(tmp_path, stage="searched", trials=2))
    source = gather(home, NAME).trials[0].runs[0].source
    (home.root / source).write_text("[]")
    problems = Mirror(home).sync(NAME)
    assert problems
    assert all(source in problem for problem in problems)
    assert runs_by_key(home)["trial/1"].info.status == "FINISHED"


def test_a_record_attempt_is_mirrored_as_one_arm(tmp_path, in_home):
    home = in_home(make_record(tmp_path))
    assert sync_all(home) == []
    assert set(runs_by_key(home, "record-smoke")) == {
        "study",
        "arm/preset",
        *(f"arm/preset/seed/{s}" for s in (42, 314, 999)),
    }


def test_a_study_that_cannot_be_read_does_not_stop_the_others(tmp_path, in_home):
    home = in_home(make_record(tmp_path))
    broken = home.study("broken").ledger
    broken.parent.mkdir(parents=True)
    broken.write_text("x\n")
    [problem] = sync_all(home)
    assert str(broken) in problem
    assert runs_by_key(home, "record-smoke")["study"].info.status == "FINISHED"


def test_a_damaged_database_is_an_error_that_names_the_rebuild_which_mends_it(tmp_path):
    home = make_record(tmp_path)
    home.mlflow_database.write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match="MLflow cannot use it") as error:
        sync_all(home)
    assert error.value.hint.startswith("caddie track --rebuild")
    assert rebuild(home) == []
    assert sync_all(home) == []


def test_a_home_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        sync_all(Home(tmp_path / "file" / "home"))


def test_a_deleted_experiment_comes_back(tmp_path, in_home):
    home = in_home(make_record(tmp_path))
    mirror = Mirror(home)
    mirror.sync("record-smoke")
    mirror.store.client.delete_experiment(mirror.store.client.get_experiment_by_name("record-smoke").experiment_id)
    Mirror(home).sync("record-smoke")
    assert mirror.store.client.get_experiment_by_name("record-smoke").lifecycle_stage == "active"


# ── rebuild ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rebuild_makes_the_same_runs_and_keeps_the_old_database_beside(tmp_path, in_home):
    home = in_home(make_record(tmp_path))
    sync_all(home)
    before = runs_by_key(home, "record-smoke")
    assert rebuild(home) == []
    after = runs_by_key(home, "record-smoke")
    assert {key: run.data.metrics for key, run in after.items()} == {
        key: run.data.metrics for key, run in before.items()
    }
    assert {run.info.run_id for run in after.values()}.isdisjoint(run.info.run_id for run in before.values())
    assert home.mlflow_previous.exists()
    files = MlflowStore(home).client.list_artifacts(after["arm/preset/seed/42"].info.run_id)
    assert len(files) == 4
    folders = {path.name for path in home.mlflow_artifacts.glob("*/*")}
    assert folders <= {run.info.run_id for run in after.values()}


def test_a_rebuild_that_fails_leaves_the_old_database_as_it_was(tmp_path, in_home, monkeypatch):
    home = in_home(make_record(tmp_path))
    sync_all(home)
    before = home.mlflow_database.read_bytes()
    monkeypatch.setattr("mlflow.MlflowClient.log_batch", _refuse)
    with pytest.raises(StorageError, match="MLflow cannot use it: RuntimeError: refused"):
        rebuild(home)
    assert home.mlflow_database.read_bytes() == before
    assert [path for path in home.root.iterdir() if path.name.startswith(".mlflow")] == []


def _refuse(*arguments, **options):
    raise RuntimeError("refused")


def _first_sync(root):
    sync_all(Home(Path(root)))


def test_a_parallel_first_start_leaves_one_whole_database(tmp_path):
    home = make_record(tmp_path)
    context = multiprocessing.get_context("spawn")
    starts = [context.Process(target=_first_sync, args=(str(home.root),)) for _ in range(2)]
    for start in starts:
        start.start()
    for start in starts:
        start.join(100)
    assert [start.exitcode for start in starts] == [0, 0]
    assert len(runs_by_key(home, "record-smoke")) == 5
