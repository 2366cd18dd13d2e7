import pytest

from orchestrator.errors import ConfigError
from orchestrator.evidence import ScoredArm, SeedScore
from orchestrator.gates import find_gates, judge, load_gates, looks_of
from orchestrator.published import known_split, published_records
from orchestrator.statistics import summary_of

SP1024 = known_split("sp1024")


def arm(*values, started=None, **fields):
    """An arm whose seeds keep every limit, but for the fields that are given."""
    kept = {"artifact_bytes": 15_000_000, "train_seconds": 590.0, "eval_seconds": 300.0, **fields}
    scores = tuple(SeedScore(seed=i, bpb=value, **kept) for i, value in enumerate(values))
    return ScoredArm(name="arm", scores=scores, started=started)


def record(number):
    return published_records()[number].arm


def condition(verdict, name):
    return next(found for found in verdict.conditions if found.name == name)


def test_every_shipped_gate_has_source_and_date():
    gates = load_gates()
    assert {"pg-readme", "pg-readme-constant", "pg-leaderboard", "speedrun", "speedrun-track3"} <= set(gates)
    assert all(gate.source and gate.date and gate.title for gate in gates.values())
    assert [gate.name for gate in find_gates_of_no_home([])] == ["pg-readme", "pg-readme-constant", "pg-leaderboard"]


def find_gates_of_no_home(names):
    from pathlib import Path

    from orchestrator.home import Home

    return find_gates(Home(Path("/nowhere")), names)


@pytest.mark.parametrize(
    ("candidate", "baseline", "p", "digits"),
    [
        ("1514", "1493", 0.0203, 8e-4),
        ("1769", "1736", 0.0625, 5e-5),
        ("1769-all", "1736", 0.106, 5e-4),
        ("1855-pooled", "1868", 0.188, 5e-4),
    ],
)
def test_the_applied_rule_gives_the_published_p(candidate, baseline, p, digits):
    gate = load_gates()["pg-leaderboard"]
    verdict = judge(gate, record(candidate), record(baseline), split=None)
    assert verdict.difference.p_one_sided == pytest.approx(p, abs=digits)
    assert condition(verdict, "p").is_met
    assert verdict.is_met is None  # what these records say of limits is not among the data
    assert verdict.slack_bpb > 0


def test_the_written_rule_was_met_by_1019_against_549_with_little_to_spare():
    verdict = judge(load_gates()["pg-readme"], record("1019"), record("549"), split=SP1024)
    assert verdict.margin_bpb == pytest.approx(0.002961, abs=5e-7)
    assert verdict.difference.p_one_sided == pytest.approx(0.0095, abs=1e-4)
    assert 0 < verdict.slack_bpb < 1e-4


def test_a_mean_inside_the_margin_is_told_that_seeds_do_not_help():
    verdict = judge(load_gates()["pg-readme"], arm(1.0, 1.001, 1.002), arm(1.002, 1.003, 1.004), split=SP1024)
    assert verdict.is_met is False
    assert verdict.more_seeds is None
    assert "the mean must fall by 0.00096 more; seeds alone do not help" in verdict.missing


def test_a_mean_beyond_the_margin_is_told_both_ways_to_the_level():
    verdict = judge(load_gates()["pg-leaderboard"], arm(1.000, 1.004, 1.002), arm(1.0015, 1.004, 1.0035), split=None)
    assert verdict.is_met is False
    [missing] = verdict.missing
    assert missing.startswith("a mean lower by 0.000")
    assert f"or {verdict.more_seeds} more seed" in missing
    # so many seeds with this mean and spread are enough, one fewer are not
    values = arm(1.000, 1.004, 1.002).summary
    for extra, is_met in ((verdict.more_seeds, True), (verdict.more_seeds - 1, False)):
        stated = ScoredArm(name="more", scores=(), stated=summary_of(3 + extra, values.mean, values.std))
        again = judge(load_gates()["pg-leaderboard"], stated, arm(1.0015, 1.004, 1.0035), split=None)
        assert condition(again, "p").is_met is is_met


def test_a_mean_lower_by_what_is_missing_meets_the_rule():
    gate, baseline = load_gates()["pg-readme"], arm(1.01, 1.011, 1.012)
    verdict = judge(gate, arm(1.007, 1.008, 1.010), baseline, split=SP1024)
    lower = -verdict.slack_bpb + 1e-6
    assert judge(gate, arm(*(value - lower for value in (1.007, 1.008, 1.010))), baseline, split=SP1024).is_met is True


@pytest.mark.parametrize(
    ("candidate", "baseline", "missing"),
    [
        (arm(1.0), arm(1.1, 1.2, 1.3), "2 more seeds of this configuration"),
        (arm(1.0), arm(1.1, 1.2, 1.3), "a second seed of the candidate: one has no spread"),
        (arm(1.0, 1.0, 1.0), arm(1.1, 1.1, 1.1), "spread: every value is the same, so no test of it is defined"),
        (arm(), arm(1.1, 1.2), "a score of the candidate"),
        (arm(1.0, 1.1, 1.2), arm(), "a score of the baseline"),
        (arm(1.0, 1.1, 1.2), arm(1.5), "the baseline's seeds: its spread counts in Welch's test"),
        (arm(1.0, 1.1, 1.2), None, "a baseline to compare with"),
        (arm(1.0, 1.1, 1.2, artifact_bytes=16_000_001), arm(1.3, 1.4), "largest artifact: 1 bytes over"),
        (arm(1.0, 1.1, 1.2, train_seconds=601.25), arm(1.3, 1.4), "longest training: 1.2 s over"),
        (arm(1.0, 1.1, eval_seconds=None), arm(1.3, 1.4), "longest evaluation of 2 seeds: the record does not say"),
    ],
)
def test_what_is_missing_is_said(candidate, baseline, missing):
    verdict = judge(load_gates()["pg-leaderboard"], candidate, baseline, split=None)
    assert not verdict.is_met
    assert any(missing in text for text in verdict.missing), verdict.missing


def test_a_margin_in_nats_needs_a_split():
    verdict = judge(load_gates()["pg-readme"], arm(1.0, 1.1, 1.2), arm(2.0, 2.1, 2.2), split=None)
    assert verdict.is_met is None
    assert any("--split NAME" in text for text in verdict.missing)
    assert verdict.difference.value == pytest.approx(-1.0)


def test_the_baseline_as_an_exact_number_needs_no_spread_of_it():
    gate = load_gates()["pg-readme-constant"]
    quoted = ScoredArm(name="1.2244", scores=(SeedScore(seed=None, bpb=1.2244),), constant=True)
    verdict = judge(gate, arm(1.20576485, 1.2061746, 1.20715923), quoted, split=SP1024)
    assert verdict.is_met is True


def test_the_first_records_p_comes_out_again():
    """PR #49: t = 31.42, df 2, p = 0.00051 against 1.2193657, which had the margin taken off already."""
    quoted = ScoredArm(name="quoted", scores=(SeedScore(seed=None, bpb=1.2193657),), constant=True)
    gate = load_gates()["pg-readme-constant"]
    found = judge(gate, arm(1.20576485, 1.2061746, 1.20715923), quoted, split=SP1024)
    without = found.difference
    from orchestrator.statistics import one_sample, summarize

    plain = one_sample(summarize([1.20576485, 1.2061746, 1.20715923]), 1.2193657)
    assert (plain.statistic, plain.p_one_sided) == (pytest.approx(-31.42, abs=0.005), pytest.approx(0.00051, abs=5e-6))
    assert without.margin == pytest.approx(0.00296, abs=1e-5)


def test_track_3_is_a_z_test_against_its_target():
    gate = load_gates()["speedrun-track3"]
    split = SP1024
    just = arm(*[split.bpb(3.28 - 0.0041 / 2)] * 4)
    assert judge(gate, just, None, split=split).is_met is True
    short = arm(*[split.bpb(3.28 - 0.0039 / 2)] * 4)
    assert judge(gate, short, None, split=split).is_met is False


def test_more_started_runs_than_shown_are_equal_chances():
    five_of_seven = record("1769")
    assert looks_of(five_of_seven) == 2
    verdict = judge(load_gates()["pg-leaderboard"], five_of_seven, record("1736"), split=None)
    assert verdict.adjusted_p == pytest.approx(2 * verdict.difference.p_one_sided)
    assert looks_of(arm(1.0, 1.1, 1.2, started=3)) == looks_of(arm(1.0)) == looks_of(arm(started=2)) == 1


def test_the_plan_says_what_seeds_like_these_can_show():
    verdict = judge(load_gates()["pg-leaderboard"], arm(1.0, 1.001, 1.002), arm(1.001, 1.002, 1.003), split=None)
    plan = verdict.plan
    assert plan.std == pytest.approx(0.001)
    assert plan.degrees_of_freedom == 4
    assert 0.5 < plan.power_now < 1
    assert plan.detectable > 0


def test_a_home_has_gates_of_its_own(tmp_path):
    from orchestrator.home import Home

    home = Home(tmp_path)
    home.gates.write_text(
        '[gate.mine]\ntitle = "mine"\ntest = "welch"\nunit = "bpb"\nalpha = 0.05\nseeds = 2\nsource = "us"\ndate = "today"\n'
    )
    [gate] = find_gates(home, ["mine"])
    assert (gate.alpha, gate.limits) == (0.05, None)
    assert "pg-readme" in load_gates(home)
    with pytest.raises(ConfigError, match="no gate 'mime'") as error:
        find_gates(home, ["mime"])
    assert error.value.hint == "did you mean 'mine'?"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("alfa = 1", "unexpected keyword argument 'alfa'"),
        ("", "missing 1 required keyword-only argument: 'alpha'"),
        ("alpha = 2.0", "alpha must lie between 0 and 1, got 2.0"),
        ('alpha = 0.1\nlimits = "none"', "there is no [limits.none]"),
        ("alpha = 0.1\nstd = 0.1", "std belongs to the test 'z'"),
        ("alpha = 0.1\nmargin = -1.0", "margin at least 0"),
        ("alpha = ", "cannot be read as gates"),
    ],
)
def test_a_damaged_gate_is_refused_with_its_place(tmp_path, line, message):
    from orchestrator.home import Home

    home = Home(tmp_path)
    home.gates.write_text(
        f'[gate.mine]\ntitle = "mine"\ntest = "welch"\nunit = "bpb"\nseeds = 2\nsource = "us"\ndate = "today"\n{line}\n'
    )
    with pytest.raises(ConfigError) as error:
        load_gates(home)
    assert message in str(error.value)
    assert str(home.gates) in str(error.value)


def test_a_gate_of_an_unknown_test_is_refused(tmp_path):
    from orchestrator.home import Home

    home = Home(tmp_path)
    home.gates.write_text(
        '[gate.mine]\ntitle = "m"\ntest = "wilch"\nunit = "bpb"\nalpha = 0.1\nseeds = 2\nsource = "us"\ndate = "d"\n'
    )
    with pytest.raises(ConfigError, match="test must be one of welch, one_sample, z, got 'wilch'"):
        load_gates(home)
