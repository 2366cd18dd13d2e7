import pytest
from fakes import FakeLauncher, FakeSearch, failed, study_text, tiny_study
from make_controller import Killed, controller, die_at
from make_public import make_folder, score_line, slash_log

from orchestrator import enqueued, imports, ledger
from orchestrator.errors import ConfigError, StudyFailed
from orchestrator.ledger import Ledger

DECAY, RATE = "optim.muon_weight_decay", "ttt.lr"


def params_of(state):
    return [(trial.origin, trial.params[DECAY], trial.params[RATE]) for trial in state.trials.values()]


def test_an_enqueued_point_is_the_next_trial_after_the_preset(home):
    study = tiny_study(confirm=None)
    point = enqueued.by_hand(study, {DECAY: 0.2})
    made, notes = enqueued.enqueue(home, study, [(point, "by hand")])
    assert len(made) == 1 and notes == []
    search = FakeSearch()
    state = controller(study, home, search=search).run()
    assert params_of(state)[:2] == [("preset", 0.09, 0.002), ("enqueued", 0.2, 0.002)]
    assert search.asked == [0, 2, 3] and state.trials[1].queued == made[0].id
    assert Ledger(home.study("tiny").ledger).state() == state


def test_an_enqueued_point_is_taken_once_whatever_kills_the_controller(home):
    study, launcher = tiny_study(confirm=None), FakeLauncher()
    enqueued.enqueue(home, study, [(enqueued.by_hand(study, {DECAY: 0.2}), "by hand")])
    with pytest.raises(Killed):
        die_at(controller(study, home, launcher=launcher), ledger.TRIAL_ASKED, 2).run()
    state = controller(study, home, launcher=launcher).run()
    assert [origin for origin, *_ in params_of(state)] == ["preset", "enqueued", "sampler", "sampler"]


def test_points_are_taken_in_the_order_in_which_they_were_asked_for_and_known_ones_left_out(home):
    study = tiny_study(confirm=None)
    points = [(enqueued.by_hand(study, {DECAY: decay}), "by hand") for decay in (0.2, 0.11, 0.2, 0.09)]
    made, notes = enqueued.enqueue(home, study, points)
    assert [request.params[DECAY] for request in made] == [0.2, 0.11] and len(notes) == 2
    assert "is a trial of tiny already, or waits to be one" in notes[0]
    state = controller(study, home).run()
    assert [decay for _, decay, _ in params_of(state)][1:3] == [0.2, 0.11]
    assert enqueued.waiting(home.study("tiny").queue, state) == []
    assert enqueued.enqueue(home, study, points[:1])[0] == []


def test_a_knob_that_is_not_searched_and_a_value_that_cannot_run_are_refused():
    study = tiny_study()
    with pytest.raises(ConfigError, match="tiny does not search 'ttt.lrr'") as caught:
        enqueued.by_hand(study, {"ttt.lrr": 0.1})
    assert "ttt.lr" in caught.value.hint
    with pytest.raises(ConfigError, match="ttt.lr"):
        enqueued.by_hand(study, {RATE: -1.0})


def test_the_best_trials_of_another_study_are_taken_over(home):
    controller(tiny_study(name="other", confirm=None), home).run()
    study = tiny_study()
    points, notes = enqueued.points_from(home, study, "other", top=2)
    assert [(params[DECAY], source) for params, source in points] == [
        (pytest.approx(0.06), "trial 3 of other"), (pytest.approx(0.07), "trial 2 of other"),
    ]  # fmt: skip
    assert notes == []
    ((params, source),), _ = enqueued.points_from(home, study, "other:trial-1")
    assert params[DECAY] == pytest.approx(0.08) and source == "trial 1 of other"
    changed = tiny_study(settings='"model.qk_gain" = 3.0', name="changed")
    assert "also differs in knobs that changed does not search" in enqueued.points_from(home, changed, "other")[1][0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("other:trial-9", "there is no trial-9"), ("other:worst", "has no part 'worst'"),
        ("nowhere", "'nowhere' names no study, imported record, preset or run"),
    ],
)  # fmt: skip
def test_what_names_nothing_is_told_with_what_there_is(home, text, message):
    controller(tiny_study(name="other", confirm=None, trials=1), home).run()
    with pytest.raises(ConfigError, match=message):
        enqueued.points_from(home, tiny_study(), text)


def test_a_study_without_a_complete_trial_has_no_best(home):
    launcher = FakeLauncher(behaviours={"*": failed("code")})
    broken = controller(tiny_study(name="other", confirm=None, trials=1), home, launcher=launcher)
    with pytest.raises(StudyFailed):
        broken.run()
    with pytest.raises(ConfigError, match="no trial of it has completed"):
        enqueued.points_from(home, tiny_study(), "other")


def test_a_preset_and_a_run_are_points_too(home):
    state = controller(tiny_study(name="other", confirm=None, trials=2), home).run()
    ((params, source),), _ = enqueued.points_from(home, tiny_study(), state.trials[1].runs[1])
    assert params[DECAY] == pytest.approx(0.08) and source.startswith("run ")
    ((params, source),), notes = enqueued.points_from(home, tiny_study(), "pr1493")
    assert source == "preset pr1493" and "does not search" in notes[0]


def test_an_imported_record_is_a_point_by_the_hyper_parameters_that_its_logs_print(home, tmp_path):
    settings = {"muon_wd": 0.095, "qk_gain_init": 5.0, "some_path": "./x"}
    log = slash_log(seed=42, settings=settings, scores=[score_line("final_int6_sliding_window", 1.08)])
    folder = make_folder(tmp_path / "2026-04-01_Some_Record", {"train_seed42.log": log}, submission={"val_bpb": 1.08})
    imports.keep(home, folder)
    ((params, source),), notes = enqueued.points_from(home, tiny_study(), "imports/Some_Record")
    assert params == {DECAY: 0.095, RATE: 0.002} and source == "record 2026-04-01_Some_Record"
    assert notes == ["2026-04-01_Some_Record does not print ttt.lr: the preset's value is taken"]
    bare = slash_log(seed=42, scores=[score_line("final_int6_sliding_window", 1.09)])
    imports.keep(
        home, make_folder(tmp_path / "2026-04-02_Bare", {"train_seed42.log": bare}, submission={"val_bpb": 1.09})
    )
    with pytest.raises(ConfigError, match="print none of the knobs that tiny searches"):
        enqueued.points_from(home, tiny_study(), "imports/Bare")


def test_a_study_is_named_by_its_file_before_it_begins_and_by_its_name_after(home, tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(study_text(confirm=None, trials=1))
    assert enqueued.named_study(home, str(path)).name == "tiny"
    controller(tiny_study(confirm=None, trials=1), home).run()
    assert enqueued.named_study(home, "tiny").name == "tiny"
