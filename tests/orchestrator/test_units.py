import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.evidence import SeedScore
from orchestrator.published import known_split
from orchestrator.units import Split, split_of


@pytest.mark.parametrize(
    ("name", "bpb"), [("sp1024", 0.002961), ("sp4096", 0.002173), ("sp8192", 0.001936), ("caseops", 0.002285)]
)
def test_the_written_margin_in_bits_per_byte_is_as_public_logs_imply_it(name, bpb):
    assert known_split(name).bpb(0.005) == pytest.approx(bpb, abs=5e-7)


@given(st.floats(0.1, 2.0), st.floats(0.5, 4.0))
def test_nats_and_bits_per_byte_turn_into_one_another(tokens_per_byte, bpb):
    split = Split(tokens_per_byte=tokens_per_byte)
    assert split.bpb(split.nats(bpb)) == pytest.approx(bpb)
    assert split.nats(1.0) == pytest.approx(math.log(2) / tokens_per_byte)


def test_a_split_is_known_by_scores_in_both_units_and_names_their_place():
    scores = [
        SeedScore(seed=1, bpb=1.11508120, nats_per_token=1.88276292, source="a.log", line=7),
        SeedScore(seed=2, bpb=1.11437394, nats_per_token=1.88156874),
        SeedScore(seed=3, bpb=1.1),
    ]
    split = split_of(scores)
    assert split.tokens_per_byte == pytest.approx(known_split("sp1024").tokens_per_byte, rel=1e-5)
    assert split.source == "a.log:7"


def test_scores_of_two_splits_have_none():
    scores = [SeedScore(seed=1, bpb=1.0, nats_per_token=2.0), SeedScore(seed=2, bpb=1.0, nats_per_token=2.1)]
    assert split_of(scores) is None
    assert split_of([SeedScore(seed=1, bpb=1.0)]) is None
    assert split_of([]) is None
