import dataclasses

import pytest
from fakes import FakeLauncher, failed, tiny_study
from make_controller import controller
from make_study import make_study

from orchestrator import plan as plans
from orchestrator.errors import ConfigError, StudyFailed
from orchestrator.plan import as_record, as_text, plan, require_caps
from orchestrator.purse import run_cost

GPUS = "gpus_per_run = 8\ntimeout_minutes = 30"
NOW = 1_767_225_600.0


def gpu_study(*, budget="", **changes):
    resources = changes.pop("resources", GPUS)
    extra = f"{changes.pop('extra', '')}\n[budget]\n{budget}" if budget else changes.pop("extra", "")
    return tiny_study(resources=resources, extra=extra, **changes)


def test_a_study_that_has_not_begun_is_planned_by_its_budgets(home):
    study = gpu_study(trials=10, seeds="[1, 2]", confirm="[3, 4, 5]", budget="price_per_gpu_hour = 2.5")
    found = plan(study, home, slots=4, now=NOW)
    limits = study.config.limits
    seconds = limits.train_seconds + limits.eval_seconds + plans.OVERHEAD_SECONDS
    assert (found.trials, found.trial_runs, found.confirmation_runs, found.runs) == (10, 20, 6, 26)
    assert found.run.seconds == seconds and "no run like it" in found.run.basis
    assert found.gpu_hours == pytest.approx(26 * 8 * seconds / 3600)
    assert found.price == pytest.approx(2.5 * found.gpu_hours)
    assert found.makespan_seconds == (5 + 2) * seconds  # twenty runs and then six, four at a time
    assert found.finish == NOW + found.makespan_seconds
    assert found.affordable_trial_runs is None


def test_what_runs_like_it_took_is_what_it_will_take(tmp_path):
    home = make_study(tmp_path)
    study, state = plans.read_study(home, "wd-qk-ttt-smoke")
    took = sorted(a.seconds for a in state.attempts.values() if a.status == "complete")
    found = plans.estimate(study, home)
    assert found.seconds in took and "of this study" in found.basis
    other = dataclasses.replace(study, name="other")
    assert "of other studies of smoke" in plans.estimate(other, home).basis
    assert "no run like it" in plans.estimate(dataclasses.replace(other, data="books"), home).basis


def test_only_what_is_left_is_planned(home):
    controller(tiny_study(trials=2, confirm=None), home).run()
    found = plan(tiny_study(trials=5), home, slots=2)
    assert (found.trials, found.trial_runs, found.confirmation_runs) == (3, 3, 4)
    controller(tiny_study(trials=2), home).run()
    assert plan(tiny_study(trials=2), home).runs == 0


def test_a_race_is_planned_from_its_first_look_to_its_last(home):
    study = gpu_study(trials=2, confirm="[1, 2, 3, 4, 5, 6]\nsequential = true")
    found = plan(study, home, slots=2, now=NOW)
    assert (found.confirmation_runs_at_least, found.confirmation_runs) == (4, 12)
    assert found.gpu_hours_at_least < found.gpu_hours
    assert found.makespan_seconds == (1 + 2 + 4) * found.run.seconds
    assert "4 to 12 runs" in as_text(found)
    against = gpu_study(trials=2, confirm='[1, 2, 3]\nsequential = true\nagainst = "1.08"')
    assert plan(against, home).confirmation_runs == 3


def test_a_cap_of_the_study_says_how_far_the_search_will_come(home):
    study = gpu_study(trials=50, confirm="[1, 2, 3]", budget="gpu_hours = 60")
    found = plan(study, home, now=NOW)
    kept = 6 * run_cost(study)
    expected = 8 * found.run.seconds
    assert found.affordable_trial_runs == 1 + int((60 * 3600 - kept - run_cost(study)) // expected)
    assert f"ends the search after about {found.affordable_trial_runs} of 50" in as_text(found)


def test_a_cap_of_a_day_spreads_a_study_over_days(home):
    found = plan(gpu_study(trials=50, budget="gpu_hours_per_day = 20"), home, slots=50, now=NOW)
    days = -(-found.gpu_hours // 20)
    assert found.finish == NOW + (days - 1) * 86_400
    assert f"at least {days:g} days" in as_text(found)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("gpu_hours = 10", r"cap of 10.00 GPU-hours is below the 22.00 of its first trial and its confirmation"),
        ("gpu_hours_per_day = 4", "the day's cap of 4.00 GPU-hours lets no run begin: a run may take 4.40"),
        ("cost_per_day = 4\nprice_per_gpu_hour = 1", "the day's cap of 4.00"),
    ],
)  # fmt: skip
def test_a_cap_that_lets_nothing_begin_is_refused_before_anything_is_submitted(budget, message):
    with pytest.raises(ConfigError, match=message) as caught:
        require_caps(gpu_study(budget=budget))
    assert "timeout_minutes" in caught.value.hint


def test_runs_on_the_cpu_need_no_cap(home):
    study = tiny_study(extra="[budget]\ngpu_hours = 0.001")
    require_caps(study)
    found = plan(study, home)
    assert found.gpu_hours == 0 and "runs on the CPU" in as_text(found)


def test_a_plan_is_plain_values_for_a_script(home):
    import json

    record = as_record(plan(gpu_study(extra="[stop_early]"), home))
    assert json.loads(json.dumps(record))["runs"] == 8
    assert any("stopped early cost less" in note for note in record["notes"])


def test_a_study_of_which_all_failed_is_planned_by_its_budgets(home):
    with pytest.raises(StudyFailed):
        controller(tiny_study(trials=2), home, launcher=FakeLauncher(behaviours={"*": failed("code")})).run()
    assert "no run like it" in plan(tiny_study(trials=4), home).run.basis


def test_the_slots_of_a_machine_without_the_gpus_are_not_known(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert plans.slots_of(gpu_study()) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(16))))
    assert plans.slots_of(gpu_study()) == 2
    assert plans.slots_of(gpu_study(resources='launcher = "slurm"\ngpus_per_run = 8', slots=7)) == 7
