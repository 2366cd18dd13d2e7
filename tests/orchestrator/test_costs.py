import dataclasses
import json

import pytest
from make_study import make_record, make_study

from orchestrator import costs
from orchestrator.costs import CONFIRMATION, LOST, OTHER, SEARCH, as_record, bill, costs_of, phases_table, studies_table
from orchestrator.evidence import gather
from orchestrator.home import Home

STUDY = "wd-qk-ttt-smoke"


def priced(home, *, gpus=8, price=2.5):
    """The study's evidence as if each attempt had had GPUs."""
    evidence = gather(home, STUDY)
    attempts = tuple(dataclasses.replace(attempt, gpus=gpus) for attempt in evidence.attempts)
    for attempt in evidence.state.attempts.values():
        attempt.gpus = gpus
    study = dataclasses.replace(
        evidence.study, budget=dataclasses.replace(evidence.study.budget, price_per_gpu_hour=price)
    )
    return dataclasses.replace(evidence, attempts=attempts, study=study)


def test_every_second_of_every_attempt_is_in_one_phase_and_has_one_purpose(tmp_path):
    home = make_study(tmp_path)
    evidence = priced(home)
    found = costs_of(home, evidence)
    total = sum(8 * attempt.seconds for attempt in evidence.attempts)
    assert found.gpu_seconds == pytest.approx(total)
    assert sum(found.by_purpose.values()) == pytest.approx(total)
    assert sum(found.by_phase.values()) >= total - 1e-6 and "train" in found.by_phase
    assert found.price == pytest.approx(2.5 * total / 3600)


def test_what_failed_or_was_stopped_is_lost_and_the_arms_are_the_confirmation(tmp_path):
    home = make_study(tmp_path)
    found = costs_of(home, gather(home, STUDY)).by_purpose
    assert found[LOST] > 0 and found[SEARCH] > 0 and found[CONFIRMATION] > 0


def test_seconds_that_no_phase_accounts_for_are_the_start_and_the_end(tmp_path):
    home = make_study(tmp_path)
    evidence = gather(home, STUDY)
    attempt = next(a for a in evidence.attempts if a.status == "complete" and a.source)
    path = home.root / attempt.source
    record = {**json.loads(path.read_text()), "phases": {"train": 1.0}}
    path.write_text(json.dumps(record))
    alone = dataclasses.replace(evidence, attempts=(attempt,))
    assert costs_of(home, alone).by_phase == {"train": 1.0, OTHER: pytest.approx(attempt.seconds - 1.0)}


def test_a_damaged_result_is_told_and_its_seconds_are_kept(tmp_path):
    home = make_study(tmp_path)
    evidence = gather(home, STUDY)
    (home.root / evidence.attempts[0].source).write_text("{")
    found = costs_of(home, evidence)
    assert (
        found.by_phase["without a result"] >= evidence.attempts[0].seconds and "not a JSON object" in found.problems[0]
    )


def test_an_improvement_is_accepted_where_its_interval_says_so(tmp_path):
    home = make_study(tmp_path)
    evidence = gather(home, STUDY)
    improvement, verdict = costs.accepted_improvement(home, evidence)
    if evidence.improvement.contains_zero:
        assert (improvement, verdict) == (None, "within noise")
    else:
        assert improvement == pytest.approx(-evidence.improvement.value) and verdict == "better"


def test_the_bill_divides_everything_by_what_was_accepted(tmp_path):
    home = make_study(tmp_path)
    one = costs_of(home, priced(home))
    won = dataclasses.replace(one, study="won", improvement=0.002, verdict="better")
    lost = dataclasses.replace(one, study="lost", improvement=None, verdict="within noise")
    found = costs.Bill(studies=(won, lost))
    assert found.accepted == 1
    assert found.gpu_hours_per_improvement == pytest.approx(2 * one.gpu_hours)
    assert found.price_per_improvement == pytest.approx(2 * one.price)
    table = studies_table(found)
    assert [row[0] for row in table.rows] == [
        "won",
        "lost",
        "all of them",
    ] and "An accepted improvement cost" in table.note
    assert "No improvement was accepted" in studies_table(costs.Bill(studies=(lost,))).note
    assert as_record(found)["accepted"] == 1


def test_every_study_is_on_the_bill_and_phases_add_up_to_the_whole(tmp_path):
    home = make_study(tmp_path)
    make_record(tmp_path)
    found = bill(home, home.study_names())
    assert [one.study for one in found.studies] == ["record-smoke", STUDY]
    assert found.studies[0].verdict == "not confirmed"
    shares = [float(str(row[2]).rstrip("%")) for row in phases_table(found.studies[1]).rows]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    json.dumps(as_record(found))
    assert bill(Home(tmp_path / "empty"), []).gpu_hours_per_improvement is None


def test_a_study_of_nothing_yet_has_no_phases(tmp_path):
    home = make_study(tmp_path, stage="opened")
    assert phases_table(costs_of(home, gather(home, STUDY))).rows == ()
