import dataclasses

from hypothesis import given
from hypothesis import strategies as st
from make_study import make_study

from orchestrator.evidence import gather
from orchestrator.front import front, front_table, measured
from orchestrator.ledger import COMPLETE, FAILED, Trial


def trial(number, value, size, *, state=COMPLETE, over=-1.0, **fields):
    return Trial(
        number=number, origin="sampler", params={"ttt.lr": 0.1}, runs={}, state=state, value=value,
        constraints={"artifact_bytes": over}, measures={"artifact_bytes": size}, **fields,
    )  # fmt: skip


def numbers(points):
    return [point.trial for point in points]


def test_the_front_holds_what_nothing_beats_in_every_objective():
    trials = [trial(0, 1.10, 900), trial(1, 1.08, 950), trial(2, 1.09, 960), trial(3, 1.20, 800)]
    assert numbers(front(trials, ["artifact_bytes"])) == [1, 0, 3]
    assert front(trials, ["artifact_bytes"])[0].measures == {"artifact_bytes": 950}


def test_what_breaks_a_limit_failed_or_was_not_measured_is_not_on_it():
    trials = [
        trial(0, 1.1, 900), trial(1, 1.0, 800, over=5.0), trial(2, 1.0, 800, state=FAILED),
        dataclasses.replace(trial(3, 1.0, 800), measures={}),
    ]  # fmt: skip
    assert numbers(front(trials, ["artifact_bytes"])) == [0]


def test_of_equals_the_earliest_stands_for_all():
    assert numbers(front([trial(0, 1.1, 900), trial(1, 1.1, 900)], ["artifact_bytes"])) == [0]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_every_trial_is_beaten_or_equalled_by_one_of_the_front_and_those_do_not_beat_one_another(pairs):
    trials = [trial(n, float(value), float(size)) for n, (value, size) in enumerate(pairs)]
    points = [(point.score, point.measures["artifact_bytes"]) for point in front(trials, ["artifact_bytes"])]
    assert all(any(p[0] <= value and p[1] <= size for p in points) for value, size in pairs)
    assert not any(a != b and a[0] <= b[0] and a[1] <= b[1] for a in points for b in points)
    assert len(points) == len(set(points))


def test_a_study_of_one_objective_has_no_table_and_says_what_differs(tmp_path):
    evidence = gather(make_study(tmp_path), "wd-qk-ttt-smoke")
    assert front_table(evidence).rows == () and measured(evidence) == ()


def test_a_study_of_several_objectives_lists_its_front(tmp_path):
    evidence = gather(make_study(tmp_path), "wd-qk-ttt-smoke")
    search = dataclasses.replace(evidence.study.search, also_minimize=("artifact_bytes", "train_seconds"))
    items = tuple(
        dataclasses.replace(item, trial=dataclasses.replace(item.trial, measures={"artifact_bytes": 1e6 + n, "train_seconds": 9.5}))
        for n, item in enumerate(evidence.trials)
    )  # fmt: skip
    evidence = dataclasses.replace(evidence, study=dataclasses.replace(evidence.study, search=search), trials=items)
    table = front_table(evidence)
    assert table.columns[:4] == ("Trial", "BPB", "artifact_bytes", "train_seconds")
    assert table.rows[-1][0] == "0" and table.rows[-1][2:4] == ("1,000,000", "9.5")
    assert measured(evidence) == ("artifact_bytes", "train_seconds")
