import dataclasses
import math
import time

import optuna
import pytest
from fakes import tiny_study
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from orchestrator import ledger
from orchestrator.errors import ConfigError, MachineError, StorageError
from orchestrator.ledger import StudyState, Trial
from orchestrator.memory import Memory
from orchestrator.search import Search, is_worse_than_median, knob_importance, propose, sampler_of, seed_of
from orchestrator.space import Choice, NumberRange
from trainer.protocol import SLIDING

DECAY, RATE = "optim.muon_weight_decay", "ttt.lr"


GRID = {
    DECAY: NumberRange(low=0.01, high=0.3, step=0.05),
    RATE: Choice(values=(0.001, 0.002, 0.004)),
}


def study_with(**search):
    study = tiny_study(trials=40, extra="[stop_early]\nat_fracs = [0.25, 0.5]\nstartup_trials = 3")
    return dataclasses.replace(study, search=dataclasses.replace(study.search, **search))


def trial(number, params, *, state=ledger.COMPLETE, value=1.0, **fields):
    value = value if state == ledger.COMPLETE else None
    return Trial(
        number=number, origin="sampler", params=params, runs={1: f"r{number}"}, state=state, value=value, **fields
    )


def point(decay, rate=0.002):
    return {DECAY: decay, RATE: rate}


def propose_on(study, trials, number, *, salt=0):
    return propose(Memory.of(study, trials), number, salt=salt)


def state_of(*trials):
    return StudyState(trials={t.number: t for t in trials})


def search_on(study, tmp_path, state=None):
    search = Search(study, tmp_path / "optuna.journal")
    search.rebuild(state or StudyState())
    return search


def journal(tmp_path):
    """As optuna-dashboard reads it."""
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "optuna.journal")))
    return optuna.load_study(study_name="tiny", storage=storage).trials


def go_on(search, study, numbers):
    """Ask and tell in turn, as the controller does; the score is lowest at decay 0.05."""
    asked = []
    for number in numbers:
        params = search.ask(number)
        asked.append(params)
        running = trial(number, params, state=ledger.RUNNING)
        search.begin(running)
        running.state, running.value = ledger.COMPLETE, (params[DECAY] - 0.05) ** 2 + params[RATE]
        running.constraints = {"artifact_bytes": -1.0}
        search.tell(running)
    return asked


def test_the_first_trial_is_the_preset(tmp_path):
    study = study_with()
    assert search_on(study, tmp_path).ask(0) == study.preset_params()


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "cmaes", "grid"])
def test_a_restart_goes_on_with_what_would_have_been_proposed(tmp_path, sampler):
    study = study_with(sampler=sampler)
    if sampler == "grid":
        study = dataclasses.replace(study, space=GRID)
    unbroken = search_on(study, tmp_path / "a")
    expected = go_on(unbroken, study, range(10))
    first = search_on(study, tmp_path / "b")
    begun = go_on(first, study, range(6))
    second = search_on(study, tmp_path / "c", StudyState(trials=dict(first.trials)))
    assert begun + go_on(second, study, range(6, 10)) == expected
    assert len({str(params) for params in expected}) == 10


def test_another_study_is_searched_elsewhere(tmp_path):
    study = study_with()
    other = dataclasses.replace(study, name="other")
    assert propose_on(study, {}, 1) != propose_on(other, {}, 1)
    assert seed_of("a", 1) != seed_of("a", 2) != seed_of("a", 2, 1)


def test_proposals_lie_in_the_space_and_fall_into_the_types_of_their_knobs(tmp_path):
    study = dataclasses.replace(
        study_with(sampler="random"),
        space={
            "ttt.epochs": NumberRange(low=1, high=7, step=2, is_integer=True),
            "ttt.lr": NumberRange(low=0.001, high=0.1, log=True),
            "quant.damping": NumberRange(low=0.01, high=0.1, step=0.04),
            "model.recurrence_layers": Choice(values=((2, 3), ())),
            "quant.method": Choice(values=("gptq", "rtn")),
        },
    )
    seen = [propose_on(study, {}, number) for number in range(1, 30)]
    assert {params["ttt.epochs"] for params in seen} <= {1, 3, 5, 7}
    assert all(0.001 <= params["ttt.lr"] <= 0.1 for params in seen)
    assert {round(params["quant.damping"], 6) for params in seen} == {0.01, 0.05, 0.09}
    assert {str(params["model.recurrence_layers"]) for params in seen} == {"[2, 3]", "[]"}
    for params in seen:
        study.config_of(params)


def test_a_point_of_the_space_is_not_run_twice_while_another_is_left(tmp_path):
    study = dataclasses.replace(
        study_with(sampler="random", trials=4), space={"quant.method": Choice(values=("gptq", "rtn"))}
    )
    search = search_on(study, tmp_path, state_of(trial(0, {"quant.method": "gptq"})))
    assert search.ask(1) == {"quant.method": "rtn"}


def test_tpe_learns_where_the_score_is_low(tmp_path):
    study = study_with()
    asked = go_on(search_on(study, tmp_path), study, range(30))
    late = [abs(params[DECAY] - 0.05) for params in asked[15:]]
    assert sorted(late)[len(late) // 2] < 0.05


def test_running_trials_keep_the_sampler_from_proposing_beside_them(tmp_path):
    """Constant liar: with the same trials told, a running one changes what comes next."""
    study = study_with()
    told = [trial(n, point(0.02 * (n + 1)), value=1.0 + n) for n in range(8)]
    alone = propose_on(study, {t.number: t for t in told}, 9)
    running = trial(8, alone, state=ledger.RUNNING)
    assert propose_on(study, {t.number: t for t in [*told, running]}, 9) != alone


def test_the_journal_shows_the_ledgers_trials_to_others(tmp_path):
    study = study_with()
    state = state_of(
        trial(0, point(0.09), value=1.5, constraints={"artifact_bytes": 10.0}, intermediate={500: 3.0}),
        trial(1, point(0.02), state=ledger.PRUNED, intermediate={250: 4.0}, reason="stopped early"),
        trial(2, point(0.03), state=ledger.FAILED, reason="code: x"),
        trial(3, point(0.04), state=ledger.RUNNING),
    )
    search = search_on(study, tmp_path, state)
    seen = journal(tmp_path)
    assert [t.state for t in seen] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING]
    assert (seen[0].value, seen[0].constraints, seen[0].intermediate_values) == (
        1.5,
        {"artifact_bytes": 10.0},
        {500: 3.0},
    )
    assert seen[1].user_attrs["caddie_reason"] == "stopped early"
    done = state.trials[3]
    done.state, done.value, done.constraints, done.intermediate = (
        ledger.COMPLETE,
        1.2,
        {"artifact_bytes": -1.0},
        {500: 2.0},
    )
    search.tell(done)
    last = journal(tmp_path)[3]
    assert (last.state, last.value, last.params) == (TrialState.COMPLETE, 1.2, point(0.04))
    assert (last.constraints, last.intermediate_values) == ({"artifact_bytes": -1.0}, {500: 2.0})


@pytest.mark.parametrize(("end", "expected"), [(ledger.PRUNED, TrialState.PRUNED), (ledger.FAILED, TrialState.FAIL)])
def test_trials_without_a_value_are_told_as_what_they_are(tmp_path, end, expected):
    search = search_on(study_with(), tmp_path)
    running = trial(0, point(0.09), state=ledger.RUNNING)
    search.begin(running)
    running.state, running.reason = end, "why"
    search.tell(running)
    (seen,) = journal(tmp_path)
    assert (seen.state, seen.user_attrs["caddie_reason"]) == (expected, "why")


def test_the_journal_is_made_anew_whatever_a_killed_controller_left(tmp_path):
    study = study_with()
    (tmp_path / "optuna.journal").write_text("{broken\n{}\n")
    (tmp_path / "optuna.journal.lock").write_text("")
    search_on(study, tmp_path, state_of(trial(0, point(0.09))))
    assert len(journal(tmp_path)) == 1


def test_a_lock_that_somebody_left_on_the_journal_holds_nothing_up(tmp_path, monkeypatch):
    search = search_on(study_with(), tmp_path, state_of(trial(0, point(0.09))))
    (tmp_path / "optuna.journal.lock").write_text("")
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited for the lock"))
    search.begin(trial(1, point(0.05), state="running", value=None))
    assert len(journal(tmp_path)) == 2 and search.problem is None


@pytest.mark.parametrize("harm", ["deleted", "damaged", "replaced by a folder"])
def test_a_journal_that_is_lost_under_way_stops_no_study_and_is_made_anew(tmp_path, harm):
    search = search_on(study_with(), tmp_path, state_of(trial(0, point(0.09))))
    path = tmp_path / "optuna.journal"
    if harm == "damaged":
        path.write_text("{broken\n" * 3)
    else:
        path.unlink()
    if harm == "replaced by a folder":
        path.mkdir()
    search.begin(trial(1, point(0.05), state="running", value=None))
    assert search.ask(2)
    if harm == "replaced by a folder":
        assert "IsADirectoryError" in search.problem
        path.rmdir()
    search.tell(trial(1, point(0.05), value=1.3))
    if harm == "damaged":  # nobody reads it before the next start
        search.rebuild(state_of(*search.trials.values()))
    assert [t.value for t in journal(tmp_path)] == [t.value for t in search.trials.values()]
    assert search.problem is None


def test_a_journal_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        Search(study_with(), tmp_path / "file" / "optuna.journal").rebuild(StudyState())


def test_a_preset_outside_the_space_keeps_its_number_and_leaves_the_sampler_working(tmp_path):
    study = study_with()
    outside = trial(0, point(0.9), value=1.4)
    search = search_on(study, tmp_path, state_of(outside))
    asked = go_on(search, study, range(1, 8))
    assert all(0.01 <= params[DECAY] <= 0.3 for params in asked)
    search.tell(outside)
    seen = journal(tmp_path)
    assert [t.number for t in seen] == list(range(8))
    assert seen[0].user_attrs["caddie_value"] == 1.4


def curve(number, loss_25, loss_50, state=ledger.COMPLETE):
    return trial(number, point(0.01 * (number + 1)), state=state, intermediate={250: loss_25, 500: loss_50})


def test_a_trial_above_the_median_of_the_complete_ones_is_stopped(tmp_path):
    search = search_on(study_with(), tmp_path, state_of(curve(0, 5, 3.0), curve(1, 5, 3.2), curve(2, 5, 3.4)))
    assert search.should_stop(3, 500, 3.21)
    assert not search.should_stop(3, 500, 3.2)


def test_each_part_of_the_schedule_is_compared_with_itself(tmp_path):
    search = search_on(study_with(), tmp_path, state_of(*(curve(n, 5.0, 3.0) for n in range(3))))
    assert not search.should_stop(3, 250, 4.9)
    assert search.should_stop(3, 500, 4.9)
    assert not search.should_stop(3, 750, 99.0)


def test_the_preset_is_never_stopped_and_nobody_before_enough_trials(tmp_path):
    search = search_on(study_with(), tmp_path, state_of(*(curve(n, 5.0, 3.0) for n in range(3))))
    assert not search.should_stop(0, 500, 9.0)
    few = search_on(
        study_with(), tmp_path / "few", state_of(curve(0, 5, 3), curve(1, 5, 3), curve(2, 5, 3, ledger.PRUNED))
    )
    assert not few.should_stop(3, 500, 9.0)


def test_without_a_plan_nobody_is_stopped(tmp_path):
    study = dataclasses.replace(study_with(), stop_early=None)
    assert not search_on(study, tmp_path).should_stop(3, 500, math.nan)


@given(st.lists(st.floats(0, 10), min_size=1), st.floats(0, 10))
def test_the_median_rule_stops_at_most_half_of_those_that_it_compares(others, value):
    stopped = [x for x in others if is_worse_than_median(x, others, startup_trials=1)]
    assert len(stopped) <= len(others) / 2
    assert is_worse_than_median(math.nan, others, startup_trials=99)
    assert not is_worse_than_median(value, others, startup_trials=len(others) + 1)


def test_importance_finds_the_knob_that_matters_and_sums_to_one():
    study = study_with()
    trials = [
        trial(n, point(0.01 + 0.28 * (n % 7) / 7, 0.001 + 0.001 * (n % 5)), value=(n % 7) + 0.001 * (n % 5))
        for n in range(35)
    ]
    shares = knob_importance(study, state_of(*trials))
    assert shares[DECAY] > 0.6 and sum(shares.values()) == pytest.approx(1.0)


def test_importance_is_empty_where_nothing_can_be_said():
    study = study_with()
    few = state_of(*(trial(n, point(0.01 * (n + 1)), value=n) for n in range(3)))
    equal = state_of(*(trial(n, point(0.01 * (n + 1)), value=1.0) for n in range(9)))
    assert knob_importance(study, few) == knob_importance(study, equal) == {}


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ConfigError, match="sampler 'bayes' is not known"):
        sampler_of(study_with(sampler="bayes"), 1)


def test_the_gaussian_process_says_that_it_needs_torch(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match='"gp" needs PyTorch') as caught:
        sampler_of(study_with(sampler="gp"), 1)
    assert 'sampler = "tpe"' in caught.value.hint


def test_the_objective_does_not_matter_to_the_search(tmp_path):
    assert propose_on(study_with(objective=SLIDING), {}, 3) == propose_on(study_with(), {}, 3)


# ------------------------------------------------------------------------------------------------ limits, objectives, grids


def test_a_point_that_breaks_a_limit_turns_the_sampler_away_though_its_score_is_lower(tmp_path):
    """The score falls with the decay, the file is over the cap beyond 0.15."""
    study = study_with()
    trials = {}
    for number in range(24):
        decay = 0.01 + 0.29 * ((number * 7) % 24) / 23
        over = {"artifact_bytes": 1e6 * (decay - 0.15)}
        trials[number] = trial(number, point(decay), value=2.0 - decay, constraints=over)
    free = {n: dataclasses.replace(t, constraints={"artifact_bytes": -1.0}) for n, t in trials.items()}
    bound = [propose_on(study, trials, 24, salt=salt)[DECAY] for salt in range(12)]
    unbound = [propose_on(study, free, 24, salt=salt)[DECAY] for salt in range(12)]
    assert sorted(bound)[6] < 0.17 < sorted(unbound)[6]


@pytest.mark.parametrize("kind", ["out_of_memory", "not_finite", "over_cap"])
def test_a_point_that_failed_by_itself_is_learned_from_and_one_that_the_machine_failed_is_not(kind):
    study = study_with(sampler="cmaes", startup_trials=2)
    good = [trial(n, point(0.05 + 0.01 * n), value=1.0 + n, constraints={"artifact_bytes": -5.0}) for n in range(3)]
    failed = trial(3, point(0.2), state=ledger.FAILED, failure=kind)
    lost = trial(4, point(0.21), state=ledger.FAILED, failure="infrastructure")
    seen = Memory.of(study, state_of(*good, failed, lost).trials).views
    assert [t.state for t in seen] == [TrialState.COMPLETE] * 4 + [TrialState.FAIL]
    assert seen[3].value == 3.0 and seen[3].constraints == {"artifact_bytes": 0.0, "failed": 1.0}
    assert seen[0].constraints["failed"] == 0.0 and seen[0].constraints["artifact_bytes"] < 0


def test_excesses_are_shares_of_their_limits_so_that_bytes_do_not_drown_seconds():
    study = study_with()
    over = {
        "artifact_bytes": study.limits["artifact_bytes"] * 0.01,
        "train_seconds": study.limits["train_seconds"] * 0.5,
    }
    (seen,) = Memory.of(study, state_of(trial(0, point(0.1), constraints=over)).trials).views
    assert seen.constraints == {"artifact_bytes": pytest.approx(0.01), "train_seconds": pytest.approx(0.5)}


def test_every_trial_names_the_same_limits_whatever_was_measured_of_it():
    """The Gaussian process refuses trials that name different ones."""
    study = study_with(sampler="gp", startup_trials=2)
    trials = state_of(
        trial(0, point(0.05), value=1.0, constraints={"artifact_bytes": -1.0}),
        trial(1, point(0.1), value=1.1, constraints={"artifact_bytes": 2.0, "peak_memory_bytes": -1.0}),
        trial(2, point(0.2), value=1.2, constraints={}),
        trial(3, point(0.25), state=ledger.FAILED, failure="out_of_memory"),
        trial(4, point(0.15), state=ledger.PRUNED, intermediate={500: 3.0}),
    ).trials
    assert len({tuple(t.constraints) for t in Memory.of(study, trials).views}) == 1
    assert set(propose_on(study, trials, 5)) == {DECAY, RATE}
    assert propose_on(study, trials, 5) == propose_on(study, trials, 5)


@given(
    ends=st.lists(
        st.tuples(
            st.sampled_from([ledger.COMPLETE, ledger.PRUNED, ledger.FAILED]),
            st.sampled_from(["out_of_memory", "infrastructure"]),
            st.floats(1.0, 3.0),
            st.sampled_from([{}, {"artifact_bytes": -4.0}, {"artifact_bytes": 9.0, "train_seconds": -1.0}]),
        ),
        max_size=8,
    ),
    order=st.randoms(use_true_random=False),
    sampler=st.sampled_from(["tpe", "cmaes"]),
)
def test_a_memory_that_is_kept_step_by_step_is_the_one_that_is_made_at_once(ends, order, sampler):
    study = study_with(sampler=sampler)
    trials = {n: trial(n, point(0.02 + 0.02 * n), state=ledger.RUNNING) for n in range(len(ends) + 1)}
    kept = Memory(study)
    for n in trials:
        kept.note(trials[n])
    for n in order.sample(range(len(ends)), len(ends)):
        state, failure, value, constraints = ends[n]
        trials[n].state, trials[n].constraints = state, constraints
        trials[n].value = value if state == ledger.COMPLETE else None
        trials[n].failure = failure if state == ledger.FAILED else None
        kept.note(trials[n])
        assert len(kept.views) == len(trials)  # asked under way too: what it has made must not be kept for too long
    fresh = Memory.of(study, trials)
    assert [(t.number, t.state, t.params, t.values, t.constraints) for t in kept.views] == [
        (t.number, t.state, t.params, t.values, t.constraints) for t in fresh.views
    ]
    assert propose(kept, 20) == propose(fresh, 20)


def several(**search):
    return study_with(also_minimize=("artifact_bytes", "train_seconds"), **search)


def measured(number, decay, size, **fields):
    measures = {"artifact_bytes": size, "train_seconds": 300.0}
    return trial(number, point(decay), value=1.0 + decay, measures=measures, **fields)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "qmc"])
def test_several_objectives_are_searched_and_shown_with_pruned_and_failed_trials_among_them(tmp_path, sampler):
    study = several(sampler=sampler, startup_trials=2)
    trials = [measured(n, 0.05 + 0.02 * n, 1000.0 - n, constraints={"artifact_bytes": -1.0}) for n in range(4)]
    trials += [
        trial(4, point(0.2), state=ledger.PRUNED, intermediate={500: 3.0}),
        trial(5, point(0.21), state=ledger.FAILED, failure="out_of_memory"),
        trial(6, point(0.22), state=ledger.RUNNING),
    ]
    search = search_on(study, tmp_path, state_of(*trials))
    assert set(search.ask(7)) == {DECAY, RATE}
    done = trials[6]
    done.state, done.value, done.measures = ledger.COMPLETE, 1.22, {"artifact_bytes": 5.0, "train_seconds": 9.0}
    done.intermediate, done.constraints = {500: 2.0}, {"artifact_bytes": -2.0}
    search.tell(done)
    last = journal(tmp_path)[6]
    assert search.problem is None and last.values == [1.22, 5.0, 9.0] and last.constraints == {"artifact_bytes": -2.0}
    assert knob_importance(study, state_of(*trials)).keys() == study.space.keys()


def test_a_trial_of_which_an_objective_was_not_measured_is_none_of_the_front(tmp_path):
    search = search_on(several(), tmp_path, state_of(trial(0, point(0.05), value=1.0)))
    assert [t.state for t in journal(tmp_path)] == [TrialState.FAIL]
    assert set(search.ask(1)) == {DECAY, RATE}


def test_a_grid_is_gone_through_whole_in_an_order_of_the_studys_own_and_none_twice(tmp_path):
    study = dataclasses.replace(study_with(sampler="grid"), space=GRID)
    asked = go_on(search_on(study, tmp_path), study, range(19))[1:]
    points = {(round(params[DECAY], 6), params[RATE]) for params in asked}
    assert len(points) == 18 and {decay for decay, _ in points} == {0.01, 0.06, 0.11, 0.16, 0.21, 0.26}
    other = dataclasses.replace(study, name="other")
    assert propose_on(other, {}, 1) != propose_on(study, {}, 1)
    taken = {n: trial(n, params) for n, params in enumerate(asked)}
    again = propose_on(study, taken, 99)
    assert again in [t.params for t in taken.values()]  # all are taken: a run that is there already


def test_evolution_begins_at_random_and_then_comes_closer(tmp_path):
    study = study_with(sampler="cmaes", startup_trials=6)
    asked = go_on(search_on(study, tmp_path), study, range(60))
    early, late = asked[1:20], asked[40:]
    assert sum(abs(p[DECAY] - 0.05) for p in late) / len(late) < sum(abs(p[DECAY] - 0.05) for p in early) / len(early)
