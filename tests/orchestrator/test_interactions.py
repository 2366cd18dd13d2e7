import json
import random
import signal

import pytest
from fakes import FakeLauncher, scored
from make_controller import controller, records

from orchestrator import interactions
from orchestrator.errors import ConfigError, Interrupted
from orchestrator.evidence import gather
from orchestrator.factors import Factor
from orchestrator.interactions import INTERACTION, MAIN, SIMPLE, Contrast, contrasts
from orchestrator.report import render_text, write_report
from orchestrator.statistics import Difference
from orchestrator.study_file import parse_study
from trainer import protocol
from trainer.protocol import ROUNDTRIP, SLIDING

FACTORS = (
    Factor(name="rounding", levels={"nearest": {}, "gptq": {}, "coarse": {}}),
    Factor(name="learning", levels={"none": {}, "sgd": {}}),
)
EFFECTS = {"nearest": 0.0, "gptq": -0.02, "coarse": 0.03, "none": 0.0, "sgd": -0.004}
SEEDS = (42, 314, 999)


def made_up(interaction=0.0, spread=0.0, seeds=SEEDS):
    """Scores that add up of effects, a seed's own level, noise, and what GPTQ takes off the gain of learning."""
    random.seed(4)
    return {
        (rounding, learning): {
            seed: 1.2 + 1e-5 * seed + EFFECTS[rounding] + EFFECTS[learning] + random.gauss(0, spread)
            + (interaction if (rounding, learning) == ("gptq", "sgd") else 0.0)
            for seed in seeds
        }
        for rounding in FACTORS[0].levels
        for learning in FACTORS[1].levels
    }  # fmt: skip


def by_title(found):
    return {contrast.title: contrast for contrast in found}


def test_effects_that_only_add_up_have_no_interaction_whatever_the_seeds_own_levels():
    found = contrasts(FACTORS, made_up())
    assert {c.kind for c in found} == {MAIN, SIMPLE, INTERACTION}
    values = {c.title: c.difference.value for c in found}
    assert values == {
        "rounding: gptq − nearest": pytest.approx(-0.02), "rounding: coarse − nearest": pytest.approx(0.03),
        "learning: sgd − none": pytest.approx(-0.004),
        "nearest: sgd − none": pytest.approx(-0.004), "gptq: sgd − none": pytest.approx(-0.004),
        "coarse: sgd − none": pytest.approx(-0.004),
        "(sgd − none) with gptq − with nearest": pytest.approx(0.0, abs=1e-12),
        "(sgd − none) with coarse − with nearest": pytest.approx(0.0, abs=1e-12),
    }  # fmt: skip


def test_what_one_factor_does_to_the_other_is_found_and_the_rest_is_within_noise():
    found = by_title(contrasts(FACTORS, made_up(interaction=0.003, spread=1e-4)))
    clear, null = found["(sgd − none) with gptq − with nearest"], found["(sgd − none) with coarse − with nearest"]
    assert clear.difference.value == pytest.approx(0.003, abs=3e-4) and clear.verdict == "higher"
    assert null.verdict == "within noise" and null.difference.contains_zero
    assert found["gptq: sgd − none"].difference.value == pytest.approx(-0.001, abs=3e-4)
    assert clear.adjusted_p == pytest.approx(2 * 2 * (1 - clear.difference.p_one_sided))  # two sides, two contrasts


def test_a_contrast_is_the_paired_difference_of_its_cells():
    scores = made_up(spread=1e-3)
    found = by_title(contrasts(FACTORS, scores))["gptq: sgd − none"]
    pairs = [scores["gptq", "sgd"][seed] - scores["gptq", "none"][seed] for seed in SEEDS]
    mean = sum(pairs) / 3
    error = (sum((pair - mean) ** 2 for pair in pairs) / 2 / 3) ** 0.5
    half = 4.302652729911275 * error  # Student's two-sided 95 % point at two degrees of freedom
    assert (found.difference.low, found.difference.high) == (pytest.approx(mean - half), pytest.approx(mean + half))


def test_a_seed_that_lacks_a_cell_is_left_out_of_the_contrasts_that_need_it_alone():
    scores = made_up(spread=1e-3)
    del scores["coarse", "sgd"][42]
    found = by_title(contrasts(FACTORS, scores))
    assert found["coarse: sgd − none"].seeds == 2 and found["gptq: sgd − none"].seeds == 3
    assert found["learning: sgd − none"].seeds == 2  # averaged over all roundings


def test_a_single_seed_has_differences_and_no_verdict():
    found = contrasts(FACTORS, made_up(seeds=(1,)))
    assert {c.verdict for c in found} == {"no interval"} and all(c.adjusted_p is None for c in found)


def test_three_factors_have_an_interaction_for_each_pair():
    third = Factor(name="size", levels={"small": {}, "large": {}})
    scores = {(*levels, size): dict(values) for levels, values in made_up().items() for size in third.levels}
    found = [c for c in contrasts((*FACTORS, third), scores) if c.kind == INTERACTION]
    assert len(found) == 2 + 2 + 1
    assert all(c.difference.value == pytest.approx(0.0, abs=1e-12) for c in found)


def test_one_factor_alone_has_main_effects_alone():
    scores = {("none",): {1: 1.0, 2: 1.1}, ("sgd",): {1: 0.9, 2: 1.05}}
    assert [(c.kind, c.title) for c in contrasts(FACTORS[1:], scores)] == [(MAIN, "learning: sgd − none")]


@pytest.mark.parametrize(("low", "high", "verdict"), [(-2, -1, "lower"), (1, 2, "higher"), (-1, 1, "within noise")])
def test_a_verdict_goes_by_the_interval(low, high, verdict):
    found = Difference(value=0.0, low=low, high=high, degrees_of_freedom=2, p_one_sided=0.1)
    assert Contrast(kind=MAIN, title="", difference=found, seeds=3).verdict == verdict


# ── a study ─────────────────────────────────────────────────────────────────────────────────────────────────────────

STUDY = """
name = "cells"
question = "Do rounding and learning act on one another?"
preset = "smoke"
data = "nothing"

[factors.rounding.nearest]
"quant.method" = "rtn"
[factors.rounding.gptq]
"quant.method" = "gptq"
[factors.learning.none]
"ttt.method" = "off"
[factors.learning.sgd]
"ttt.method" = "sgd"

[resources]
slots = 3
preflight = false
"""


class Bench(FakeLauncher):
    """Scores that learning improves by 0.004, on GPTQ by 0.001 alone."""

    def _end(self, run, attempt):
        spec = protocol.read_spec(run.spec)
        is_gptq, learns = (spec.config[s]["method"] == m for s, m in (("quant", "gptq"), ("ttt", "sgd")))
        bpb = (
            1.2
            + spec.seed * 1e-5
            - 0.02 * is_gptq
            - learns * (0.001 if is_gptq else 0.004)
            + (spec.seed % 7) * 1e-6 * learns * (1 + is_gptq)
        )
        result = scored(run, attempt, spec, bpb=bpb)
        if not learns:
            scores = {stage: score for stage, score in result.scores.items() if stage in (ROUNDTRIP, SLIDING)}
            result = scored(run, attempt, spec, scores=scores)
        protocol.write_result(attempt.result, result)


def test_a_study_runs_every_cell_on_every_seed_and_reports_its_interactions(home):
    study = parse_study(STUDY)
    controller(study, home, launcher=Bench()).run()
    evidence = gather(home, "cells")
    assert {arm.name: len(arm.runs) for arm in evidence.arms} == dict.fromkeys([c.name for c in study.cells], 3)
    report = write_report(home, "cells")
    assert report.claim.startswith("Of 4 cells gptq+sgd has the lowest mean")
    assert "1 of 1 interactions exclude zero: (sgd − none) with gptq − with nearest +0.00300" in report.claim
    assert [table.title for table in report.design] == ["Cells", "Main effects", "Simple effects", "Interactions"]
    text = render_text(report)
    assert "nearest+none" in text and "Record:" not in text
    assert not any("no score" in problem or "not shown" in problem for problem in report.problems)
    assert "Interactions" in report.page.read_text()
    record = json.loads(report.data.read_text())["factorial"]
    assert [cell["count"] for cell in record["cells"]] == [3] * 4
    assert {c["title"]: c["verdict"] for c in record["contrasts"]}["gptq: sgd − none"] == "lower"


def test_a_cell_that_learned_what_it_scores_is_not_called_the_best(home):
    text = STUDY + '\n[factors.learning.before]\n"ttt.before_quantization" = true\n'
    controller(parse_study(text), home, launcher=Bench()).run()
    claim = interactions.claim(gather(home, "cells"))
    assert claim.startswith("Of 4 cells gptq+sgd has the lowest mean")
    assert "(2 cells whose technique is not accepted are left out)" in claim


def test_a_study_that_has_only_begun_says_so(home):
    study = parse_study(STUDY)
    controller(study, home, launcher=Bench()).run()
    evidence = gather(home, "cells")
    for run in evidence.runs:
        home.run(run.run_id).attempt(1).result.unlink()
    assert interactions.claim(gather(home, "cells")) == "No cell has a score yet."


def test_the_same_command_asks_for_no_cell_twice_and_another_cell_needs_another_name(home):
    controller(parse_study(STUDY), home, launcher=Bench()).run()
    asked = len([r for r in records(home, "cells") if r["kind"] == "arm_asked"])
    controller(parse_study(STUDY), home, launcher=Bench()).run()
    assert len([r for r in records(home, "cells") if r["kind"] == "arm_asked"]) == asked == 4
    more = STUDY + '\n[factors.learning.fast]\n"ttt.lr" = 0.01\n'
    with pytest.raises(ConfigError, match="the cells changed since the study was opened"):
        controller(parse_study(more), home, launcher=Bench()).run()


def test_the_trainer_is_packed_for_all_cells_at_once_before_the_first_is_asked_for(home):
    packed = []
    study = parse_study(STUDY)
    for _ in range(2):  # the second has nothing left to ask
        controller(study, home, launcher=Bench(), pack_ahead=packed.append).run()
    (configs,) = packed
    assert [(c.quant.method, c.ttt.method) for c in configs] == [
        ("rtn", "off"), ("rtn", "sgd"), ("gptq", "off"), ("gptq", "sgd"),
    ]  # fmt: skip
    assert [record["kind"] for record in records(home, "cells")][:2] == ["opened", "arm_asked"]


def test_a_controller_that_is_interrupted_while_it_packs_leaves_before_it_asks_and_goes_on_later(home):
    study = parse_study(STUDY)
    first = controller(study, home, launcher=Bench(), pack_ahead=lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match="left by SIGINT: 0 running jobs go on"):
        first.run()
    assert [record["kind"] for record in records(home, "cells")] == ["opened"]
    assert controller(study, home, launcher=Bench()).run().closed == "finished"
