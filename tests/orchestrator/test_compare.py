import json
from pathlib import Path

import pytest
from make_study import make_record, make_study

from orchestrator.compare import NOT_MET, as_record, as_text, compare, exit_code
from orchestrator.errors import ConfigError
from orchestrator.home import Home

NAME = "wd-qk-ttt-smoke"
NOWHERE = Home(Path("/nowhere"))


def test_arms_of_a_study_are_compared_and_paired(tmp_path):
    found = compare(make_study(tmp_path), NAME, f"{NAME}:preset")
    assert found.paired.count == 3
    assert found.split.tokens_per_byte == pytest.approx(1 / 3)  # as the runs' own tokens and bytes say
    assert not found.warnings
    text = as_text(found)
    assert "3 common seeds, correlation" in text
    assert "nats per token" in text


def test_published_records_do_not_pair_unless_asked():
    assert compare(NOWHERE, "pr1787", "pr1736").paired is None
    found = compare(NOWHERE, "pr1787", "pr1736", paired=True)
    assert found.paired.count == 3
    assert any("what a seed decides there is not known" in warning for warning in found.warnings)


def test_pairing_without_common_seeds_is_refused():
    with pytest.raises(
        ConfigError, match="--paired needs seeds that both arms have; #1868 has 42, 314, 1234, 1.0 none"
    ):
        compare(NOWHERE, "pr1868", "1.0", paired=True)


def test_five_of_seven_runs_are_told_and_adjusted():
    found = compare(NOWHERE, "pr1769", "pr1736")
    assert found.welch.p_one_sided == pytest.approx(0.0625, abs=5e-5)
    assert found.adjusted_p == pytest.approx(0.125, abs=1e-4)
    assert "#1769: 7 runs of the configuration were started, 5 are compared" in " ".join(found.warnings)
    assert "times 2 equal chances" in as_text(found)


def test_the_published_t_is_in_the_text():
    text = as_text(compare(NOWHERE, "pr1019", "pr549", gates=["pg-readme"]))
    assert "t = -11.83, df = 3.306" in text
    assert "difference −0.00464 bits per byte (−0.00784 nats per token)" in text
    assert "yes p < 0.01: 0.009549" in text
    assert "p has 0.00003 bits per byte to spare" in text
    assert "largest artifact, longest training, longest evaluation: the record does not say of every seed" in text


def test_different_stages_and_tokens_are_warned_of():
    stages = compare(NOWHERE, "pr1019", "pr549").warnings
    assert "the arms are scored at different stages: sliding and ttt" in stages
    tokens = compare(NOWHERE, "pr1514", "pr1019").warnings
    assert any("different tokens" in warning for warning in tokens)


def test_a_split_can_be_named_for_scores_without_losses():
    unknown = compare(NOWHERE, "1.07,1.071,1.072", "1.09,1.091,1.092", gates=["pg-readme"])
    assert unknown.verdicts[0].is_met is None
    known = compare(NOWHERE, "1.07,1.071,1.072", "1.09,1.091,1.092", gates=["pg-readme"], split="sp8192")
    assert known.verdicts[0].margin_bpb == pytest.approx(0.001936, abs=5e-7)


def test_a_gate_that_is_asked_for_decides_the_exit_code(tmp_path):
    home = make_record(tmp_path)
    met = compare(home, "record-smoke", "2.5", gates=["pg-readme-constant"])
    assert (met.verdicts[0].is_met, exit_code(met, asked=True)) == (True, 0)
    missed = compare(home, "record-smoke", "1.5", gates=["pg-readme-constant"])
    assert exit_code(missed, asked=True) == NOT_MET
    assert exit_code(missed, asked=False) == 0
    undecided = compare(home, "record-smoke", "2.5", gates=["pg-leaderboard"])
    assert exit_code(undecided, asked=True) == NOT_MET


def test_two_numbers_have_a_difference_and_no_test():
    found = compare(NOWHERE, "1.08", "1.09")
    assert found.welch.value == pytest.approx(-0.01)
    assert "too few seeds, or no spread, for an interval" in as_text(found)


def test_an_arm_without_scores_is_said(tmp_path):
    home = make_study(tmp_path)
    text = as_text(compare(home, f"{NAME}:trial-3", f"{NAME}:preset"))
    assert "candidate  wd-qk-ttt-smoke:trial-3, ttt: no score" in text
    assert "no difference: an arm has no score." in text


def test_the_json_form_is_whole_and_has_no_nan(tmp_path):
    found = compare(make_study(tmp_path), NAME, "1.9")
    record = json.loads(json.dumps(as_record(found), allow_nan=False))
    assert record["candidate"]["summary"]["count"] == 3
    assert record["verdicts"][0]["gate"]["name"] == "pg-readme"
    assert record["verdicts"][0]["conditions"][0] == {
        "name": "seeds", "required": "≥ 3", "found": "3", "is_met": True, "missing": "",
    }  # fmt: skip
    assert record["candidate"]["scores"][0]["line"] > 0
