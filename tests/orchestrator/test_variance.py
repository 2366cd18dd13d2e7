import json
import math

import numpy as np
import pytest
from fakes import FakeLauncher, scored
from make_controller import controller

from orchestrator.evidence import gather
from orchestrator.report import render_text, write_report
from orchestrator.statistics import variance_interval
from orchestrator.study_file import parse_study
from orchestrator.variance import BOTH, INITIALISATION, MACHINE, ORDER, TOTAL, noise
from trainer import protocol


def drawn(sigmas, *, a, b, n, seed=0):
    """Scores with these standard deviations of initialisation, order, both and machine."""
    generator = np.random.default_rng(seed)
    of_a, of_b = generator.normal(0, sigmas[0], a), generator.normal(0, sigmas[1], b)
    of_ab = generator.normal(0, sigmas[2], (a, b))
    return {
        (i, j): [1.2 + of_a[i] + of_b[j] + of_ab[i, j] + e for e in generator.normal(0, sigmas[3], n)]
        for i in range(a)
        for j in range(b)
    }


def components(found):
    return {part.source: part for part in found.components}


def test_every_source_is_found_again_in_many_runs():
    sigmas = (6e-4, 3e-4, 2e-4, 1e-4)
    found = components(noise(drawn(sigmas, a=150, b=150, n=3)))
    for source, sigma in zip((INITIALISATION, ORDER, BOTH, MACHINE), sigmas, strict=True):
        # three standard errors of σ from 149 degrees of freedom
        assert found[source].std == pytest.approx(sigma, rel=0.18), source
        assert found[source].low < found[source].variance < found[source].high
    assert found[TOTAL].variance == pytest.approx(
        sum(found[s].variance for s in (INITIALISATION, ORDER, BOTH, MACHINE))
    )


def test_components_are_unbiased_at_the_size_of_a_study():
    sigmas = (6e-4, 3e-4, 0.0, 1e-4)
    founds = [noise(drawn(sigmas, a=3, b=3, n=2, seed=seed)) for seed in range(400)]
    total = np.mean([found.total.variance for found in founds])
    # the total of a study spreads about as much as its mean: 5 % of standard error over 400
    assert total == pytest.approx(sum(s**2 for s in sigmas), rel=0.2)
    inside = np.mean([components(found)[MACHINE].low <= 1e-8 <= components(found)[MACHINE].high for found in founds])
    assert inside == pytest.approx(0.95, abs=0.035)  # three standard errors of a share of 400


def test_a_case_by_hand():
    """Rows lie 4 apart, columns 2, replicates ±0.5 around: mean squares of rows 32, of columns 8, of both 0, within 0.5."""
    scores = {(i, j): [4 * i + 2 * j - 1 + e for e in (-0.5, 0.5)] for i in (0, 1) for j in (0, 1)}
    found = components(noise(scores))
    assert found[MACHINE].variance == pytest.approx(0.5)
    assert found[BOTH].variance == 0.0  # estimated at -0.25
    assert found[INITIALISATION].variance == pytest.approx(32 / 4)
    assert found[ORDER].variance == pytest.approx(8 / 4)
    assert found[TOTAL].variance == pytest.approx(8 + 2 - 0.25 + 0.5)


def test_runs_that_repeat_to_the_bit_have_no_noise_of_the_machine_and_no_p_of_it():
    found = components(noise({(i, j): [1.0 + i + 3 * i * j, 1.0 + i + 3 * i * j] for i in range(3) for j in range(3)}))
    assert (found[MACHINE].variance, found[MACHINE].low, found[MACHINE].high) == (0.0, 0.0, 0.0)
    assert found[BOTH].p is None and found[INITIALISATION].p < 0.2


def test_an_initialisation_that_lacks_a_run_is_left_out_and_two_of_each_are_needed():
    scores = drawn((1e-3, 1e-3, 1e-3, 1e-3), a=3, b=2, n=2)
    scores[2, 1].pop()
    found = noise(scores)
    assert (found.initialisations, found.orders, found.replicates) == (2, 2, 2)
    scores[1, 0].pop()
    assert noise(scores) is None
    assert noise({}) is None


def test_the_interval_of_a_variance_has_no_upper_end_where_nothing_is_known_of_it():
    assert variance_interval(4.0, 1e-5) == (0.0, None)


STUDY = """
name = "floor"
question = "Where does the spread come from?"
preset = "smoke"
data = "nothing"

[noise]
order_seeds = [1, 2, 3]
replicates = 2

[resources]
slots = 3
preflight = false
"""


class Machine(FakeLauncher):
    """Initialisations differ by 1e-3, orders by 1e-4, equal runs by 1e-5."""

    def _end(self, run, attempt):
        spec = protocol.read_spec(run.spec)
        order = spec.config["data"]["order_seed"]
        bpb = 1.2 + {42: 0, 314: 1e-3, 999: 2e-3}[spec.seed] + 1e-4 * order + 1e-5 * spec.replicate
        protocol.write_result(attempt.result, scored(run, attempt, spec, bpb=bpb))


def test_a_study_of_pure_re_runs_tells_the_sources_apart(home):
    controller(parse_study(STUDY), home, launcher=Machine()).run()
    evidence = gather(home, "floor")
    specs = [protocol.read_spec(home.run(run.run_id).spec) for run in evidence.runs]
    assert len({spec.run_id for spec in specs}) == 18
    assert {(spec.seed, spec.config["data"]["order_seed"], spec.replicate) for spec in specs} == {
        (seed, order, again) for seed in (42, 314, 999) for order in (1, 2, 3) for again in (0, 1)
    }
    report = write_report(home, "floor")
    (table,) = report.design
    assert [str(row[0]) for row in table.rows] == [INITIALISATION, ORDER, BOTH, MACHINE, TOTAL]
    assert "A run's score has σ = 0.00101" in report.claim and "0.00100 from initialisation" in report.claim
    assert "0.00010 from order of the data" in report.claim and "0.00001 from machine" in report.claim
    assert "Variance components" in render_text(report)
    assert not any("not shown" in problem for problem in report.problems)  # replicates are cells of their own
    stored = json.loads(report.data.read_text())["noise"]
    assert math.sqrt(stored["components"][0]["variance"]) == pytest.approx(stored["components"][0]["std"])


def test_a_study_with_too_few_runs_has_no_components_yet(home):
    controller(parse_study(STUDY), home, launcher=Machine()).run()
    for run in gather(home, "floor").runs[::2]:
        home.run(run.run_id).attempt(1).result.unlink()
    report = write_report(home, "floor")
    assert report.design == () and report.claim.startswith("There are not yet two initialisations")
