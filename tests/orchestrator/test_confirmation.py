import dataclasses

import pytest
from fakes import FakeLauncher, FakeSearch, failed, scored, tiny_study
from make_controller import Killed, controller, die_at, records

from orchestrator import contest, ledger
from orchestrator.errors import StudyFailed
from orchestrator.evidence import gather
from orchestrator.record_attempt import record_study
from orchestrator.statistics import Summary
from orchestrator.study_file import parse_study
from trainer.protocol import CODE

SEEDS = "[11, 12, 13, 14, 15, 16]"


def racing_study(*, extra="", seeds=SEEDS, **changes):
    return tiny_study(confirm=f"{seeds}\nsequential = true\n{extra}", trials=2, slots=1, **changes)


class Noisy(FakeLauncher):
    """Scores of the arms that differ by `gap` between candidate and preset, with a spread of one in the last digits."""

    def __init__(self, gap, **fields):
        super().__init__(behaviours={"*": self.score}, **fields)
        self.gap = gap

    def score(self, run, attempt, spec):
        if spec.trial == 0 and spec.seed == 1:
            return scored(run, attempt, spec, bpb=2.0)
        if spec.seed == 1:
            return scored(run, attempt, spec, bpb=1.0)
        is_preset = spec.config["optim"]["muon_weight_decay"] == pytest.approx(0.09)
        wiggle = 0.0007 * ((spec.seed * 7 + is_preset * 3) % 5 - 2)
        return scored(run, attempt, spec, bpb=1.08 + wiggle - (0 if is_preset else self.gap))


def seeds_of(state):
    return {name: list(arm.runs) for name, arm in state.arms.items()}


def test_a_clear_winner_is_confirmed_on_the_first_seeds_alone(home):
    launcher = Noisy(gap=0.05)
    state = controller(racing_study(), home, launcher=launcher).run()
    assert seeds_of(state) == {"preset": [11, 12], "best": [11, 12]}
    assert len(launcher.submitted) == 2 + 4 and state.closed == "finished"
    found = contest.contest(home, gather(home, "tiny"))
    assert found.race.verdict == "better" and found.saved_runs == 8
    assert contest.claim(found).startswith("After 2 of 6 seeds (−0.048")
    assert contest.claim(found).endswith("That saved 8 runs and 0.00 GPU-hours against all 6 seeds.")


def test_an_open_race_gets_seed_after_seed_on_both_arms_and_ends_with_the_plan(home):
    state = controller(racing_study(), home, launcher=Noisy(gap=0.002)).run()
    counts = [len(r["runs"]) for r in records(home) if r["kind"] == ledger.ARM_ASKED]
    assert counts == sorted(counts) and counts[0] == 2 and counts[-1] > 2
    assert seeds_of(state)["preset"] == seeds_of(state)["best"] == [11, 12, 13, 14, 15, 16][: counts[-1]]
    found = contest.contest(home, gather(home, "tiny"))
    assert found.race.is_over and [look.seeds for look in found.race.looks][-1] == counts[-1]


def test_a_race_that_cannot_be_won_is_given_up_and_said_to_be_within_noise(home):
    state = controller(racing_study(), home, launcher=Noisy(gap=0.0)).run()
    assert len(seeds_of(state)["best"]) < 6
    found = contest.contest(home, gather(home, "tiny"))
    assert found.race.verdict == "no verdict in reach" and "within noise" in contest.claim(found)
    assert contest.table(found).rows[-1][-1] == "no verdict in reach"
    assert contest.as_record(found)["verdict"] == "no verdict in reach"


def test_several_seeds_between_two_looks(home):
    controller(racing_study(extra="step = 3\nfirst = 3"), home, launcher=Noisy(gap=0.002)).run()
    counts = {len(r["runs"]) for r in records(home) if r["kind"] == ledger.ARM_ASKED}
    assert counts <= {3, 6}


def test_against_a_published_record_only_the_best_point_runs(home):
    study = racing_study(extra='against = "1.0810"')
    baseline = contest.baseline_of(home, study.confirm)
    assert baseline == 1.0810
    state = controller(study, home, launcher=Noisy(gap=0.05), baseline=baseline).run()
    assert seeds_of(state) == {"best": [11, 12]}
    found = contest.contest(home, gather(home, "tiny"))
    assert (found.baseline, found.race.verdict, found.saved_runs) == ("1.0810", "better", 4)
    published = dataclasses.replace(study.confirm, against="pr1493")
    assert isinstance(contest.baseline_of(home, published), Summary)


def test_a_record_attempt_races_its_preset_against_a_number(home):
    study = record_study("smoke", data="d", seeds=(11, 12, 13), knobs={}, name="tiny")
    source = study.source.replace("[confirm]", '[confirm]\nsequential = true\nagainst = "1.2"')
    state = controller(parse_study(source), home, launcher=Noisy(gap=0.0), baseline=1.2).run()
    assert seeds_of(state) == {"preset": [11, 12]}


def test_when_the_preset_is_the_best_point_there_is_no_race(home):
    search = FakeSearch(point=lambda number: {"optim.muon_weight_decay": 0.05 + 0.01 * number, "ttt.lr": 0.002})
    state = controller(racing_study(), home, search=search).run()
    assert seeds_of(state) == {"preset": [11, 12]}
    assert contest.contest(home, gather(home, "tiny")) is None


def test_seeds_that_all_fail_get_no_successors(home):
    behaviours = {seed: failed(CODE) for seed in range(11, 17)}
    launcher = FakeLauncher(behaviours=behaviours)
    with pytest.raises(StudyFailed, match="none of its 4 confirmation runs completed"):
        controller(racing_study(), home, launcher=launcher).run()
    assert len(launcher.submitted) == 2 + 4


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_race_goes_on_after_a_kill_with_nothing_twice(home, count):
    launcher = Noisy(gap=0.002)
    with pytest.raises(Killed):
        die_at(controller(racing_study(), home, launcher=launcher), ledger.ARM_ASKED, count).run()
    state = controller(racing_study(), home, launcher=launcher).run()
    whole = controller(racing_study(name="whole"), home, launcher=Noisy(gap=0.002)).run()
    assert seeds_of(state) == seeds_of(whole) and state.closed == "finished"
    runs = [run for run, _, _ in launcher.submitted]
    assert len(runs) == len(set(runs))
