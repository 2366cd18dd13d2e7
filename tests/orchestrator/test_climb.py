import dataclasses
import json

import pytest
from fakes import FakeLauncher, FakeSearch, Listener, scored
from make_controller import controller
from make_ladder import DECAY, RUNGS, climb_with_fakes, ladder_text, point, rungs_of_text, scored_by, trials_of

from orchestrator import assembly, climb, ladder, ledger, lock, oversight
from orchestrator.cells import as_text
from orchestrator.errors import ConfigError, DataError, MachineError
from orchestrator.home import Home
from orchestrator.ladder_tables import plan_table, points_table
from orchestrator.ledger import Ledger
from orchestrator.purse import Purse, run_cost
from orchestrator.report import as_record, render_markdown, write_report
from orchestrator.study_file import parse_study

LEAST = RUNGS.replace('name = "full"\n', 'name = "full"\nleast_rank_correlation = 0.3\n')


@pytest.fixture(scope="module")
def climbed(tmp_path_factory):
    """A home with a ladder that was climbed to its end."""
    home = Home(tmp_path_factory.mktemp("climbed"))
    climb_with_fakes(home, rungs_of_text())
    return home


def reversed_above(study):
    """On the lowest rung a small weight decay is best, above a large one."""
    return scored_by(lambda decay: 1.0 + decay if study.rung_name == "proxy" else 2.0 - decay)


# ── before a rung begins ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rung_is_told_with_what_goes_up_how_the_rungs_agree_and_what_it_will_take(home):
    notes = {}
    climb_with_fakes(home, rungs_of_text(), notes=notes)
    assert notes["proxy"] == []
    assert notes["mid"][0] == "rung mid comes next" and "too few" not in "".join(notes["mid"])
    assert "goes up    trial 4 (1.00000)" in notes["mid"][1] and "4 runs, on the CPU" in notes["mid"][2]
    assert notes["full"][0].startswith("proxy and mid share 4 points: Spearman +")
    assert "the best of the lower one and the preset" in notes["full"][1] and "Fisher's z" in notes["full"][2]


def test_a_climb_ends_after_the_rung_that_is_named_and_tells_what_would_come(home):
    end = climb_with_fakes(home, rungs_of_text(), until="mid")
    assert end.study.name == "tiny-mid" and "rung full comes next" in end.notes
    assert not home.study("tiny").queue.exists() and not home.study("tiny").ledger.exists(), "nothing has gone up yet"
    with pytest.raises(ConfigError, match="has no rung 'middle'") as caught:
        climb.number_of(rungs_of_text(), "middle")
    assert caught.value.hint == "did you mean 'mid'?"
    with pytest.raises(ConfigError, match="tiny is no ladder"):
        climb.number_of((parse_study(ladder_text(rungs="", ema="")),), "mid")


def test_rungs_that_do_not_agree_end_the_climb_before_the_next_ones_money(home):
    end = climb_with_fakes(home, rungs_of_text(rungs=LEAST), launcher=reversed_above)
    assert end.study.name == "tiny-mid" and not home.study("tiny").ledger.exists()
    assert any("rank correlation of -1.00, below least_rank_correlation = 0.3" in note for note in end.notes)
    again = climb_with_fakes(home, rungs_of_text(), launcher=reversed_above)
    assert again.study.name == "tiny", "without the threshold the same climb goes on"


def test_agreement_that_is_not_known_is_none(home):
    def launcher(study):
        def behave(run, attempt, spec):
            decay = spec.config["optim"]["muon_weight_decay"]
            return scored(run, attempt, spec) if study.rung_name == "proxy" or decay > 0.05 else None

        return FakeLauncher(behaviours={"*": behave})

    rungs = rungs_of_text(rungs=LEAST, resources="max_attempts = 1")
    end = climb_with_fakes(home, rungs, launcher=launcher)
    assert end.study.name == "tiny-mid"
    assert any("how well mid agrees with the rung below it is not known" in note for note in end.notes)


def test_failed_runs_of_the_rung_that_was_begun_last_are_attempted_again_before_the_next(home):
    def launcher(study):
        def behave(run, attempt, spec):
            is_lost = study.rung_name == "mid" and spec.config["optim"]["muon_weight_decay"] <= 0.05
            return None if is_lost else scored(run, attempt, spec)

        return FakeLauncher(behaviours={"*": behave})

    rungs = rungs_of_text(rungs=LEAST, resources="max_attempts = 1")
    assert climb_with_fakes(home, rungs, launcher=launcher).study.name == "tiny-mid"
    told = oversight.ask_to_retry(home, "tiny")
    assert told.startswith("tiny-mid: to be attempted again; give the study's command again")
    assert climb_with_fakes(home, rungs).study.name == "tiny"
    assert {trial.state for trial in Ledger(home.study("tiny-mid").ledger).state().trials.values()} == {"complete"}


def test_fewer_points_than_asked_for_are_told(home):
    rungs = rungs_of_text()
    few = trials_of(1.0, 1.1, 1.2)
    told = climb.lines(
        climb.Approach(
            study=rungs[1],
            promoted=tuple(ladder.chosen(rungs[1], few)),
            agreements=(),
            plan=climb.plans(home, rungs)[1],
            refusal="",
        )
    )
    assert "1 fewer than asked for, the sampler asks in their place" in told[1]


def test_a_rung_that_this_machine_cannot_run_is_told_before_anything_is_spent(home, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    study = rungs_of_text(rungs=RUNGS.replace('name = "full"', 'name = "full"\ngpus_per_run = 8'), resources=GPUS)[-1]
    with pytest.raises(MachineError, match=r"rung full: .*gpus_per_run is 8, this machine offers 1") as caught:
        assembly.run_study(study, home)
    assert "--until" in caught.value.hint and not home.studies.exists()
    with pytest.raises(DataError):
        assembly.run_study(study, home, until="mid")  # to which it can be climbed


# ── money ───────────────────────────────────────────────────────────────────────────────────────────────────────────

GPUS = "gpus_per_run = 1\ntimeout_minutes = 57"  # and three minutes to end: an hour at most


def test_the_cap_is_the_whole_ladders(home):
    proxy, mid, full = rungs_of_text(resources=GPUS, extra="[budget]\ngpu_hours = 10", confirm="[42]")
    assert run_cost(mid) == 3600
    for number in range(9):
        assert Purse(home, proxy.name, proxy.budget, beside=proxy.other_rungs).reserve(f"p{number}", 3600.0) is None
    upper = Purse(home, mid.name, mid.budget, beside=mid.other_rungs)
    assert upper.reserve("m0", 3600.0) is None and upper.reserve("m1", 3600.0) == "study"
    assert Purse(home, "other", mid.budget).refusal(3600.0) is None
    assert climb._poverty(full, home).startswith("the rungs below left 0.00 GPU-hours of the cap")
    assert climb._poverty(dataclasses.replace(full, budget=dataclasses.replace(full.budget, gpu_hours=13)), home) == ""


def test_a_cap_that_the_ladder_will_meet_is_told_beforehand(home):
    rungs = rungs_of_text(resources=GPUS, extra="[budget]\ngpu_hours = 4\nprice_per_gpu_hour = 2.0", confirm="[42]")
    plans = climb.plans(home, rungs)
    assert sum(plan.gpu_hours for plan in plans) < 4 and climb.cap_notes(home, rungs, plans) == []
    tight = rungs_of_text(resources=GPUS, extra="[budget]\ngpu_hours = 0.9\nprice_per_gpu_hour = 2.0", confirm="[42]")
    assert "GPU-hours ends it in rung" in climb.cap_notes(home, tight, plans)[0]
    table = plan_table(rungs, plans)
    assert table.rows[-1][0] == "all" and table.rows[-1][5] == str(sum(plan.runs for plan in plans))
    assert float(table.rows[-1][7]) == pytest.approx(sum(plan.price for plan in plans), abs=0.01)
    assert "optim.ema_decay" in as_text(table)


def test_a_rung_that_has_ended_may_not_be_asked_otherwise(home):
    climb_with_fakes(home, rungs_of_text(), until="proxy")
    changed = rungs_of_text(rungs=RUNGS.replace("12", "13", 1))
    with pytest.raises(ConfigError, match="tiny-proxy: the configuration.* changed since the study was opened"):
        climb_with_fakes(home, changed, until="mid")


# ── looking on, and stopping ────────────────────────────────────────────────────────────────────────────────────────


def test_a_ladder_is_found_by_its_name_from_its_first_rung_on(home):
    controller(parse_study(ladder_text(rungs="", ema="").replace('"tiny"', '"tiny-other"')), home).run()
    assert climb.find(home, "tiny") == ()
    rungs = rungs_of_text()
    climb_with_fakes(home, rungs, until="proxy")
    assert climb.find(home, "tiny") == rungs and climb.find(home, "tiny-other") == ()
    climb_with_fakes(home, rungs)
    assert climb.find(home, "tiny-proxy") == (), "a lower rung's own name is that of an ordinary study"
    assert oversight.status(home, "tiny-proxy").trials_planned == 6 and not oversight.status(home, "tiny-mid").rungs


def test_the_status_of_a_ladder_is_that_of_the_rung_at_work_and_tells_all_rungs(climbed):
    found = oversight.status(climbed, "tiny")
    assert (found.name, found.rung, found.state) == ("tiny", "tiny", "finished")
    assert [(rung.rung, rung.state, rung.trials) for rung in found.rungs] == [
        ("proxy", "finished", 6), ("mid", "finished", 4), ("full", "finished", 3)
    ]  # fmt: skip
    text = oversight.as_text(found)
    assert "tiny-mid" in text and "proxy and mid share 4 points" in text
    json.dumps(dataclasses.asdict(found))


def test_the_status_before_the_last_rung_is_that_of_the_highest_begun(home):
    climb_with_fakes(home, rungs_of_text(), until="proxy")
    found = oversight.status(home, "tiny")
    assert (found.rung, found.trials_planned) == ("tiny-proxy", 6)
    assert [rung.state for rung in found.rungs] == ["finished", "not begun", "not begun"]


def test_a_stop_of_the_ladder_reaches_the_rung_at_work_and_ends_the_climb(home):
    class Stopped(Listener):
        def show(self, state):
            if len(state.trials) == 2:
                told.append(oversight.ask_to_stop(home, "tiny", cancel=False))

    told, visited = [], []

    def run(study, notes):
        visited.append(study.rung_name)
        return controller(study, home, search=FakeSearch(point=point), listener=Stopped()).run()

    rungs = rungs_of_text()
    end = climb.climb(home, rungs, last=2, run=run)
    assert visited == ["proxy"] and end.study.name == "tiny-proxy" and end.notes == ()
    assert told[0] == "tiny-proxy: asked its controller to end after the running jobs"
    assert Ledger(home.study("tiny-proxy").ledger).state().closed == ledger.HALTED
    assert climb_with_fakes(home, rungs).study.name == "tiny", "the same climb goes on"


def test_a_stop_between_two_rungs_is_heard_before_the_next(home):
    def run(study, notes):
        state = controller(study, home, search=FakeSearch(point=point)).run()
        oversight.ask_to_stop(home, "tiny", cancel=True)
        return state

    end = climb.climb(home, rungs_of_text(), last=2, run=run)
    assert end.study.name == "tiny-proxy" and end.notes == ("stopped before rung mid",)
    assert not home.study("tiny-mid").ledger.exists() and lock.holder(home.study("tiny-proxy")) is None


# ── the report ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_report_tells_the_rungs_how_they_agree_and_what_became_of_every_point(climbed):
    report = write_report(climbed, "tiny")
    text = render_markdown(report)
    assert "## Ladder" in text and "## Agreement of the rungs" in text and "## Points that went up" in text
    record = as_record(report)["ladder"]
    assert [rung["study"] for rung in record["rungs"]] == ["tiny-proxy", "tiny-mid", "tiny"]
    assert [(one["lower"], len(one["pairs"])) for one in record["agreements"]] == [("proxy", 4), ("mid", 3)]
    assert len(record["points"]) == 3 + 2
    best = next(row for row in record["points"] if row["From"] == "mid, trial 1")
    assert best["What became of it"] == "the best, confirmed on more seeds" and best["Place"] == "1 of 3"


def test_a_report_of_an_ordinary_study_has_no_ladder(home):
    controller(parse_study(ladder_text(rungs="", ema="")), home, search=FakeSearch(point=point)).run()
    report = write_report(home, "tiny")
    assert report.ladder is None and "## Ladder" not in render_markdown(report)


def test_the_fate_of_a_point_is_told_in_words():
    proxy, mid, _ = rungs_of_text(ema="")
    below = trials_of(1.0, 1.1, 1.2, 1.3)
    above = trials_of(
        1.0, 1.1, 1.2, t1={"state": "failed", "reason": "nan", "value": None}, t2={"constraints": {"x": 1.0}}
    )
    above.closed = None
    rows = points_table((proxy, mid), (below, above)).rows
    assert [str(row[-1]) for row in rows] == ["failed: nan", "over a limit", "waits"]
    assert points_table((proxy, mid), (dataclasses.replace(below, closed=None), above)).rows == ()
    above.closed = ledger.FINISHED
    above.trials[2].constraints, above.trials[2].value = {}, 0.9
    assert [str(row[-1]) for row in points_table((proxy, mid), (below, above)).rows][1:] == [
        "the best of its rung",
        "not run",
    ]


def test_the_whole_ladder_is_plain_values_for_a_script(climbed):
    record = json.loads(json.dumps(climb.as_record(climbed, rungs_of_text())))
    assert [rung["rung"] for rung in record["rungs"]] == ["proxy", "mid", "full"] and record["gpu_hours"] == 0
    assert record["agreements"][0]["spearman"]["value"] <= 1 and record["rungs"][0]["set"] == {
        "limits.train_seconds": 12
    }
    assert DECAY not in record["not_transferring"]
