import math
from dataclasses import replace

import pytest
from make_study import make_study

from orchestrator.evidence import Curve, gather, read_curves
from orchestrator.footing import adjusted_for_steps, footing, throughput

NAME = "wd-qk-ttt-smoke"


@pytest.fixture
def evidence(tmp_path):
    return gather(make_study(tmp_path), NAME)


def curve(evidence, arm, seed, *, seconds_per_step, loss_at, last=100):
    run = next(run for run in evidence.arm(arm).runs if run.seed == seed)
    steps = tuple(range(1, last + 1))
    return Curve(
        run=run, steps=steps, train_seconds=tuple(seconds_per_step * step for step in steps),
        losses=tuple(loss_at(step) for step in steps),
    )  # fmt: skip


def test_arms_are_compared_at_the_last_step_and_the_last_second_that_all_reached(evidence):
    fast = [curve(evidence, "best", 42, seconds_per_step=0.5, loss_at=lambda step: 5 - step / 50)]
    slow = [curve(evidence, "preset", 42, seconds_per_step=1.0, loss_at=lambda step: 5 - step / 50, last=60)]
    by_step = footing([*fast, *slow], "best", "preset", way="steps")
    assert by_step.point == 60
    assert by_step.difference.value == pytest.approx(0.0)
    by_second = footing([*fast, *slow], "best", "preset", way="seconds")
    assert by_second.point == 50.0
    assert by_second.difference.value < -0.5  # the fast one was twice as far


def test_losses_that_are_not_finite_are_left_out(evidence):
    good = curve(evidence, "preset", 42, seconds_per_step=1.0, loss_at=lambda step: 2.0)
    bad = curve(evidence, "best", 42, seconds_per_step=1.0, loss_at=lambda step: math.nan if step > 97 else 3.0)
    assert footing([good, bad], "best", "preset", way="steps").candidate == {42: 3.0}
    lost = curve(evidence, "best", 42, seconds_per_step=1.0, loss_at=lambda step: math.nan)
    assert footing([good, lost], "best", "preset", way="steps") is None


def test_one_arm_alone_has_nothing_to_stand_on(evidence):
    assert footing([], "best", "preset", way="steps") is None


def test_a_run_that_was_cut_off_does_not_draw_the_point_to_itself(evidence):
    whole = [
        curve(evidence, arm, 42, seconds_per_step=1.0, loss_at=lambda step: 2.0) for arm in ("best", "preset")
    ]  # fmt: skip
    short = curve(evidence, "best", 314, seconds_per_step=1.0, loss_at=lambda step: 9.0, last=3)
    failed = replace(short, run=replace(short.run, state="failed"))
    assert footing([*whole, failed], "best", "preset", way="steps").point == 100
    assert footing([*whole, short], "best", "preset", way="steps").point == 3


def test_throughput_leaves_calibration_out(evidence):
    run = evidence.arms[0].runs[0]
    result = replace(run.result, train_seconds=30.0, phases={"calibrate": 6.0}, steps=120, tokens=2400)
    found = throughput(replace(run, result=result))
    assert (found.ms_per_step, found.tokens_per_second) == (200.0, 100.0)
    assert throughput(replace(run, result=replace(result, steps=0))) is None
    assert throughput(replace(run, result=None)) is None


def test_equal_numbers_of_steps_leave_nothing_to_adjust(evidence):
    assert adjusted_for_steps(*evidence.arms, "ttt") is None


def test_steps_that_explain_all_leave_no_difference(evidence):
    arms = []
    for arm, offset in zip(evidence.arms, (20, 0), strict=True):
        runs = []
        for i, run in enumerate(arm.runs):
            steps = 100 + offset + 7 * i
            score = replace(run.result.scores["ttt"], bpb=3.0 - 0.001 * steps)
            runs.append(replace(run, result=replace(run.result, steps=steps, scores={"ttt": score})))
        arms.append(replace(arm, runs=tuple(runs)))
    found = adjusted_for_steps(*arms, "ttt")
    assert found.slope == pytest.approx(-0.001)
    assert found.value == pytest.approx(0.0, abs=1e-9)


def test_curves_of_a_home_have_their_tokens(tmp_path):
    home = make_study(tmp_path)
    found = gather(home, NAME)
    curves, _ = read_curves(home, found)
    assert {curve.tokens_per_step for curve in curves} == {found.study.config.data.tokens_per_step}
