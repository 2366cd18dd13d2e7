import dataclasses

import pytest
from fakes import FakeLauncher, FakeSearch, failed
from make_controller import Killed, controller, die_at, records
from make_ladder import DECAY, EMA, RUNGS, climb_with_fakes, ladder_text, point, rungs_of_text, scored_by, trials_of

from orchestrator import enqueued, ladder, ledger
from orchestrator.errors import ConfigError
from orchestrator.study_file import parse_study

PLAIN = {"ema": ""}


def test_an_ordinary_study_is_a_ladder_of_itself():
    study = parse_study(ladder_text(rungs="", ema=""))
    assert ladder.rungs_of(study) == (study,)


def test_any_rung_knows_the_whole_ladder():
    rungs = rungs_of_text()
    assert all(ladder.rungs_of(rung) == rungs for rung in rungs)


def test_the_best_feasible_points_go_up_and_the_preset_not():
    mid = rungs_of_text(**PLAIN)[1]
    state = trials_of(
        0.5, 1.3, 1.1, 1.2, 1.05, 1.15, t4={"constraints": {"artifact_bytes": 1.0}}, t2={"state": "pruned"}
    )
    assert [found.trial for found in ladder.chosen(mid, state)] == [5, 3, 1]
    assert ladder.chosen(mid, state)[0].params == point(5)
    assert len(ladder.chosen(mid, trials_of(1.0, 1.1))) == 1, "fewer than were asked for, where there are no more"


def test_of_equal_scores_the_earlier_goes_up():
    state = trials_of(1.0, 1.2, 1.1, 1.1, 1.1, 1.1)
    assert [found.trial for found in ladder.chosen(rungs_of_text(**PLAIN)[1], state)] == [2, 3, 4]


def test_a_point_goes_up_without_what_does_not_transfer_and_its_twins_once():
    def two_by_two(number):
        return {DECAY: 0.09 - 0.01 * (number // 2), EMA: 0.9 if number == 0 else 0.9 + 0.01 * number}

    state = trials_of(1.0, 0.8, 1.2, 1.1, 1.3, 1.4, 1.5, params=two_by_two)
    found = ladder.chosen(rungs_of_text()[1], state)
    # Trial 1 becomes the preset, and trials 2 and 3 the same point: trial 3 is the better of them.
    assert [one.trial for one in found] == [3, 4, 6]
    assert all(one.params[EMA] == 0.9 for one in found)


def test_a_point_that_the_rung_above_cannot_run_is_left_below():
    mid = rungs_of_text(**PLAIN)[1]
    state = trials_of(1.0, 1.1, 1.2, 1.3, 1.4, t1={"params": {DECAY: -1.0, EMA: 0.9}})
    assert [found.trial for found in ladder.chosen(mid, state)] == [2, 3, 4]


def test_nothing_goes_up_from_a_rung_that_has_not_ended(home):
    proxy, mid, _ = rungs_of_text()
    with pytest.raises(ConfigError, match="tiny-proxy has not ended"):
        ladder.promote(home, proxy, mid)


def test_nothing_goes_up_twice(home):
    proxy, mid, _ = rungs_of_text()
    controller(proxy, home, search=FakeSearch(point=point)).run()
    first = ladder.promote(home, proxy, mid)
    files = home.study(mid.name).queue
    (files / f"{enqueued.requests(files)[1].id}.json").unlink()  # as if killed between two of them
    assert ladder.promote(home, proxy, mid) == first
    asked = [request.params for request in enqueued.requests(files)]
    assert len(asked) == len(first) == 3 and all(one.params in asked for one in first)
    controller(mid, home, search=FakeSearch(point=point)).run()
    ladder.promote(home, proxy, mid)
    assert not enqueued.waiting(files, ledger.Ledger(home.study(mid.name).ledger).state())


def test_a_climb_runs_each_rung_with_the_preset_and_what_went_up(home):
    launched = {}

    def launcher(study):
        launched[study.name] = FakeLauncher()
        return launched[study.name]

    end = climb_with_fakes(home, rungs_of_text(), launcher=launcher)
    assert end.study.name == "tiny" and not end.notes
    asked = {
        name: [
            (record["origin"], record["params"][DECAY])
            for record in records(home, name)
            if record["kind"] == "trial_asked"
        ]
        for name in launched
    }
    assert [origin for origin, _ in asked["tiny-proxy"]] == ["preset"] + 5 * ["sampler"]
    assert [origin for origin, _ in asked["tiny-mid"]] == ["preset"] + 3 * ["enqueued"]
    # The score is best at weight decay 0.05: trial 4, then 3 and 5 below and above.
    assert asked["tiny-mid"][1][1] == 0.05 and {decay for _, decay in asked["tiny-mid"][2:]} == {0.06, 0.04}
    assert asked["tiny"][1] == ("enqueued", 0.05)
    state = ledger.Ledger(home.study("tiny").ledger).state()
    assert state.closed == ledger.FINISHED and set(state.arms) == {"preset", "best"}
    assert not ledger.Ledger(home.study("tiny-mid").ledger).state().arms


def test_a_finished_ladder_is_climbed_again_without_a_run(home):
    climb_with_fakes(home, rungs_of_text())
    again = []

    def launcher(study):
        again.append((study.rung_name, FakeLauncher()))
        return again[-1][1]

    climb_with_fakes(home, rungs_of_text(), launcher=launcher)
    assert [(name, one.submitted) for name, one in again] == [("full", [])]


def test_more_trials_below_are_run_before_the_rungs_above_are_looked_at_again(home):
    climb_with_fakes(home, rungs_of_text())
    visited = []
    climb_with_fakes(
        home, rungs_of_text(trials=7), launcher=lambda study: visited.append(study.rung_name) or FakeLauncher()
    )
    assert visited == ["proxy", "full"]


@pytest.mark.parametrize("kind", ["trial_asked", "ended", "closed"])
@pytest.mark.parametrize("victim", ["tiny-proxy", "tiny-mid", "tiny"])
def test_a_climb_that_is_killed_anywhere_goes_on_and_promotes_nothing_twice(home, victim, kind):
    launcher = FakeLauncher()
    runs = {"launcher": lambda _: launcher}

    def deadly(found):
        return die_at(found, kind) if found.study.name == victim else found

    with pytest.raises(Killed):
        climb_with_fakes(home, rungs_of_text(), prepared=deadly, **runs)
    climb_with_fakes(home, rungs_of_text(), **runs)
    for study in rungs_of_text():
        points = [t.params for t in ledger.Ledger(home.study(study.name).ledger).state().trials.values()]
        assert len(points) == study.search.trials
        assert all(one not in points[:n] for n, one in enumerate(points))
        queued = enqueued.requests(home.study(study.name).queue)
        assert len(queued) == (study.rung.promote if study.rung else 0)
    attempts = [(run_id, number) for run_id, number, _ in launcher.submitted]
    assert len(attempts) == len(set(attempts))


def test_the_same_recipe_on_more_gpus_is_run_anew(home):
    rungs = RUNGS.replace('name = "mid"', 'name = "mid"\ngpus_per_run = 1').replace(
        "[rungs.set]\n\"limits.train_seconds\" = 60\n", ""
    )  # fmt: skip
    studies = rungs_of_text(
        rungs=rungs.replace('"proxy"', '"proxy"\ngpus_per_run = 1'), resources="gpus_per_run = 8", **PLAIN
    )
    on_cpu = [
        dataclasses.replace(study, resources=dataclasses.replace(study.resources, gpus_per_run=0)) for study in studies
    ]
    launchers = {}
    climb_with_fakes(home, on_cpu, launcher=lambda study: launchers.setdefault(study.rung_name, FakeLauncher()))
    mid, full = ({run_id for run_id, *_ in launchers[name].submitted} for name in ("mid", "full"))
    assert len(mid) == 4 and len(full) == 3 + 4 and not mid & full


def test_a_runs_id_and_family_tell_it_from_the_same_on_other_gpus(home):
    import hashlib

    from orchestrator.checks import check_id
    from orchestrator.family import family_of
    from orchestrator.presets import load_preset
    from orchestrator.runs import RunRequest, RunStore, run_id_of
    from trainer.protocol import read_spec

    store = RunStore(home)
    common = {"preset": "smoke", "config": load_preset("smoke"), "seed": 1, "data_dir": "/data", "manifest_sha256": "m"}
    specs = [read_spec(store.plan(RunRequest(**common, gpus=gpus), bundle=b"b", code={}).spec) for gpus in (0, 1, 8)]
    assert len({spec.run_id for spec in specs}) == len({family_of(spec) for spec in specs}) == 3
    assert [check_id(spec, common["config"], home.run(spec.run_id)).status for spec in specs] == 3 * ["passed"]
    assert specs[0].run_id == run_id_of(RunRequest(**common), hashlib.sha256(b"b").hexdigest())


def test_a_rung_of_which_all_fails_ends_the_climb(home):
    from orchestrator.errors import StudyFailed

    broken = FakeLauncher(behaviours={"*": failed("nan")})
    with pytest.raises(StudyFailed, match="tiny-mid"):
        climb_with_fakes(
            home, rungs_of_text(), launcher=lambda study: broken if study.rung_name == "mid" else FakeLauncher()
        )
    assert not home.study("tiny").ledger.exists()


def test_scores_of_a_rung_decide_and_not_those_of_the_knob(home):
    rungs = rungs_of_text(**PLAIN)
    climb_with_fakes(home, rungs, until="proxy", launcher=lambda _: scored_by(lambda decay: 1.0 + decay))
    found = ladder.chosen(rungs[1], ledger.Ledger(home.study("tiny-proxy").ledger).state())
    assert [one.trial for one in found] == [5, 4, 3] and found[0].value == pytest.approx(1.04)
