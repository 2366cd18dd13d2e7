import pytest

from orchestrator.errors import ConfigError
from orchestrator.published import find_published, known_split, published_records, published_split
from orchestrator.units import SAME_SPLIT, split_of


@pytest.mark.parametrize("text", ["pr1493", "#1493", "PR1493"])
def test_a_record_is_found_by_its_pull_request(text):
    assert find_published(text).arm.by_seed[42] == 1.08079


@pytest.mark.parametrize("text", ["1.0810", "preset", "pr", "1493", "#best"])
def test_another_text_is_no_record(text):
    assert find_published(text) is None
    assert published_split(text) is None


def test_an_unknown_record_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="no scores are known of pull request 1494") as error:
        find_published("pr1494")
    assert error.value.hint == "did you mean '1493'?; or import its folder"


def test_an_unknown_split_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="'sp4069'") as error:
        known_split("sp4069")
    assert error.value.hint == "did you mean 'sp4096'?"


def test_every_record_names_its_source_and_agrees_with_its_split():
    for record in published_records().values():
        assert record.source
        assert record.arm.summary.mean is not None
        own = split_of(record.arm.scores)
        if own is not None:  # losses are published beside the scores
            assert own.tokens_per_byte == pytest.approx(known_split(record.split).tokens_per_byte, rel=SAME_SPLIT)


def test_a_stated_mean_says_that_the_seeds_are_not_known():
    arm = find_published("pr1855-pooled").arm
    assert (arm.summary.count, arm.values) == (6, [])
    assert "not known" in arm.problems[0]
