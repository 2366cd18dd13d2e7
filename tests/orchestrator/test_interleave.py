import dataclasses
import json
from dataclasses import dataclass, field

import pytest
from fakes import FakeLauncher, scored
from make_controller import controller

from orchestrator import interleave
from orchestrator.claims import claim_of
from orchestrator.errors import ConfigError
from orchestrator.evidence import gather
from orchestrator.record_attempt import record_study
from orchestrator.report import render_text, write_report
from orchestrator.slots import Slots
from orchestrator.study_file import parse_study
from trainer import protocol

SEEDS = (42, 314, 999, 7)
CANDIDATE = {"set": {"optim.muon_weight_decay": 0.05}}


def study(**plan):
    return record_study(
        "smoke", data="d", seeds=SEEDS, knobs={}, name="ab", interleave={**CANDIDATE, **plan},
        resources={"slots": 2, "preflight": False},
    )  # fmt: skip


@dataclass
class OneNode(FakeLauncher):
    """Runs at 100 steps a second on one node, unless told otherwise: a candidate's speed by seed, a node by seed and arm."""

    speeds: dict[int, float] = field(default_factory=dict)
    nodes: dict[tuple[int, bool], str] = field(default_factory=dict)

    def _end(self, run, attempt):
        spec = protocol.read_spec(run.spec)
        is_candidate = spec.config["optim"]["muon_weight_decay"] == 0.05
        speed = self.speeds.get(spec.seed, 100.0) if is_candidate else 100.0
        bpb = 1.2 + spec.seed * 1e-5 + (-0.002 + spec.seed * 1e-7 if is_candidate else 0.0)
        node = self.nodes.get((spec.seed, is_candidate), "node7")
        claim = dataclasses.replace(claim_of(1), node=node)
        protocol.write_json_atomically(attempt.claim, dataclasses.asdict(claim))
        result = scored(run, attempt, spec, bpb=bpb, steps=1000, tokens=1000, train_seconds=1000 / speed)
        protocol.write_result(attempt.result, result)


def compared(home, launcher=None, **plan):
    """The study's blocks, after its controller has run it to its end, and the launcher."""
    launcher = launcher or OneNode()
    controller(study(**plan), home, launcher=launcher, slots=Slots(((),))).run()
    return interleave.blocks(home, gather(home, "ab")), launcher


def order(home, launcher):
    """The arm of each run in the order of submission."""
    arms = gather(home, "ab").state.arms
    names = {run_id: name for name, arm in arms.items() for run_id in arm.runs.values()}
    return [names[run_id] for run_id, _, _ in launcher.submitted]


def test_preset_and_candidate_alternate_seed_by_seed_in_the_order_abba_one_at_a_time(home):
    blocks, launcher = compared(home)
    assert order(home, launcher) == ["preset", "best", "best", "preset"] * 2
    assert launcher.most_alive == 1
    assert [(block.seed, block.first) for block in blocks] == [
        (42, "preset"), (314, "best"), (999, "preset"), (7, "best"),
    ]  # fmt: skip
    assert {block.node for block in blocks} == {"node7"} and not any(block.rejected for block in blocks)


def test_the_report_pairs_the_blocks_that_count_and_says_so(home):
    compared(home)
    report = write_report(home, "ab")
    assert report.claim.startswith("Over 4 of 4 blocks the candidate scores −0.00197 bits per byte beside smoke")
    assert "better, the interval excludes zero" in report.claim
    text = render_text(report)
    assert "Steps/s candidate" in text and "node7" in text and "Paired: −0.00197" in text
    record = json.loads(report.data.read_text())
    assert [block["ratio"] for block in record["blocks"]] == [1.0] * 4


@pytest.mark.parametrize(("speed", "is_rejected"), [(98.5, False), (97.0, True), (103.0, True)])
def test_a_block_whose_speeds_differ_by_more_than_the_stated_share_is_rejected(home, speed, is_rejected):
    launcher = OneNode()
    launcher.speeds = {999: speed}
    blocks, _ = compared(home, launcher)
    assert [bool(block.rejected) for block in blocks] == [False, False, is_rejected, False]
    if is_rejected:
        ratio = speed / 100
        assert f"steps per second were {ratio:.3f} of the preset's, more than 2.0% off" in blocks[2].rejected
        report = write_report(home, "ab")
        assert "Over 3 of 4 blocks" in report.claim
        assert any("Block of seed 999 is left out" in problem for problem in report.problems)


def test_the_share_can_be_set(home):
    launcher = OneNode()
    launcher.speeds = {999: 97.0}
    blocks, _ = compared(home, launcher, max_gap=0.05)
    assert not any(block.rejected for block in blocks)


def test_a_candidate_that_is_slower_by_itself_is_compared_with_the_median_block_where_that_is_asked_for(home):
    launcher = OneNode()
    launcher.speeds = {42: 90.0, 314: 90.0, 999: 80.0, 7: 90.0}
    blocks, _ = compared(home, launcher, throughput="median")
    assert [bool(block.rejected) for block in blocks] == [False, False, True, False]
    assert "against 0.900 in the median" in blocks[2].rejected


def test_where_no_block_is_of_equal_speed_the_report_says_what_that_may_mean(home):
    launcher = OneNode()
    launcher.speeds = dict.fromkeys(SEEDS, 90.0)
    compared(home, launcher)
    report = write_report(home, "ab")
    assert "No block of smoke and the candidate counts" in report.claim
    assert any('throughput = "median"' in problem for problem in report.problems)


def test_a_block_on_two_nodes_is_rejected_and_names_them(home):
    launcher = OneNode()
    launcher.nodes = {(314, True): "node8"}
    blocks, _ = compared(home, launcher)
    assert blocks[1].rejected == "the runs were on different nodes: node7, node8" and blocks[1].node == ""


def test_steps_per_second_are_a_covariate_where_they_vary(home):
    launcher = OneNode()
    launcher.speeds = {42: 99.0, 314: 100.0, 999: 101.0, 7: 100.5}
    blocks, _ = compared(home, launcher)
    adjusted = interleave.at_equal_speed(blocks)
    gap = interleave.improvement(blocks).difference
    assert adjusted is not None and adjusted.value != gap.value
    assert "Steps per second as covariate" in interleave.table(gather(home, "ab"), blocks).note


def test_a_block_without_a_score_does_not_count(home):
    class Failing(OneNode):
        def _end(self, run, attempt):
            super()._end(run, attempt)
            if protocol.read_spec(run.spec).seed == 42:
                failure = protocol.Failure(kind=protocol.CODE, message="it broke")
                result = protocol.read_result(attempt.result)
                protocol.write_result(
                    attempt.result,
                    dataclasses.replace(result, status=protocol.FAILED, failure=failure, scores={}),
                )

    blocks, _ = compared(home, Failing())
    assert blocks[0].rejected == "a run has no score" and not any(block.rejected for block in blocks[1:])


def test_an_interleaved_study_reads_back_from_its_own_text_and_changes_its_identity_with_the_candidate(home):
    asked = study()
    again = parse_study(asked.source)
    assert again == asked and again.config_of(again.candidate_params) == again.candidate
    compared(home)
    other = dataclasses.replace(asked, candidate=asked.config_of({"optim.muon_weight_decay": 0.06}))
    with pytest.raises(ConfigError, match="the candidate changed since the study was opened"):
        controller(other, home).run()


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"set": {}}, "the candidate is the preset itself: smoke"),
        ({"max_gap": 0.0}, "max_gap must lie between 0 and 1, got 0.0"),
        ({"throughput": "equel"}, "throughput must be one of equal, median, got 'equel'"),
        ({"set": {"optim.muon_weight_decai": 1.0}}, "there is no knob 'optim.muon_weight_decai'"),
        ({"against": "smoke2"}, "there is no preset 'smoke2'"),
        ({"gap": 1}, r"\[interleave\] has no key 'gap'"),
    ],
)
def test_a_comparison_that_cannot_be_meant_is_refused(plan, words):
    with pytest.raises(ConfigError, match=words):
        study(**plan)


def test_runs_on_several_nodes_cannot_take_turns_on_one():
    with pytest.raises(ConfigError, match="needs runs on one node"):
        record_study(
            "smoke", data="d", seeds=(1,), knobs={}, interleave=CANDIDATE, resources={"launcher": "slurm", "nodes": 2}
        )
