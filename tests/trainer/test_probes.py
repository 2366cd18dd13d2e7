import math

import pytest
import torch

from tests.trainer import broken
from tests.trainer.broken import CHUNK, LENGTH, STRIDE, V, driver
from tests.trainer.tiny import ALONE, random_model
from tests.trainer.tiny import CONFIG as TINY
from trainer.data import BOS, Dataset, TokenBytes
from trainer.evaluate import Stream, Tally
from trainer.probes import (
    Judged,
    Moved,
    boundary_reach,
    byte_count,
    compare,
    coverage,
    distribution,
    disturbed,
    faults_taken,
    future_reach,
    loss_gap,
    reach_back,
)
from trainer.ttt import PARITY_TOLERANCE
from trainer.verification import Speller

EXACT = 1e-5  # float32 on the CPU: nothing moves; what these evaluators break is a hundred times that


def seeded():
    return torch.Generator().manual_seed(3)


def rows(count=12, length=LENGTH, vocab_size=V):
    return torch.randint(2, vocab_size, (count, length + 1), generator=seeded())


def judged(scorer, vocab_size=V):
    return Judged(scorer, False, vocab_size, 4)


@pytest.fixture
def stream():
    tokens = torch.randint(2, V, (5 * CHUNK + 1,), generator=seeded())
    tokens[torch.tensor([0, 40, 75, 120])] = BOS
    return Stream(tokens.int(), tokens[1:] % 4)


def future(scorer, **options):
    return future_reach(
        judged(scorer, **options), rows(vocab_size=options.get("vocab_size", V)), scored=LENGTH, generator=seeded()
    )


def moved_ways(scorer):
    return {way for way, found in future(scorer).items() if found.largest > EXACT}


def back(evaluation, stream, place=2 * CHUNK + CHUNK // 2):
    return reach_back(evaluation, stream, place, vocab_size=V, generator=seeded(), keeps_bos=False)


# ── C1: scorers ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scorer", [broken.Counting(), broken.Apart(), broken.UnnormalizedCache()])
@pytest.mark.parametrize("scored", [LENGTH, STRIDE])
def test_nothing_moves_in_a_causal_scorer_whatever_is_disturbed(scorer, scored):
    found = future_reach(judged(scorer), rows(), scored=scored, generator=seeded())
    assert [(way, value.moved, value.largest) for way, value in found.items()] == [
        (way, 0, 0.0) for way in ("future", "target", "targets", "inputs", "other rows")
    ]
    assert all(value.compared and value.control for value in found.values())


def test_the_network_itself_is_causal():
    found = future(random_model().nats, vocab_size=TINY.model.vocab_size)
    assert max(value.largest for value in found.values()) == 0.0


def test_a_position_that_sees_the_next_token_is_told():
    found = future(broken.FuturePeek())
    assert found["inputs"].largest > EXACT
    assert 6 <= found["inputs"].moved <= 12  # of each row the target's own score, but for a row's last
    assert moved_ways(broken.FuturePeek()) == {"inputs"}  # by the others its own target hides it


def test_a_position_that_sees_further_is_told_in_every_way_that_changes_inputs():
    assert moved_ways(broken.FurtherPeek()) == {"future", "target", "inputs"}


def test_a_shift_fitted_to_the_targets_that_are_scored_is_told():
    assert moved_ways(broken.Slot()) == {"future", "target", "targets", "inputs"}
    found = future(broken.Slot())["targets"]
    assert found.moved == found.compared > 50


def test_rows_of_a_call_that_look_at_each_other_are_told():
    assert "other rows" in moved_ways(broken.BatchSlot())


def test_a_place_is_always_drawn_behind_a_position_that_is_scored():
    for seed in range(20):
        found = future_reach(
            judged(broken.Counting()), rows(1), scored=2, generator=torch.Generator().manual_seed(seed)
        )
        assert found["future"].compared >= 1


# ── C2 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scorer", [broken.Counting(), broken.FuturePeek()])
def test_a_softmax_sums_to_one_and_scores_are_its_entries(scorer):
    found = distribution(judged(scorer), rows(5), scored=STRIDE)
    assert (found.positions, found.context) == (5, LENGTH)
    assert found.largest_log_sum < EXACT and found.largest_entry_gap == 0.0


def test_the_networks_distribution_is_one():
    scorer = judged(random_model().nats, vocab_size=TINY.model.vocab_size)
    found = distribution(scorer, rows(3, vocab_size=TINY.model.vocab_size), scored=STRIDE)
    assert found.largest_log_sum < EXACT and found.largest_entry_gap < EXACT


@pytest.mark.parametrize("scorer", [broken.UnnormalizedCache(), broken.TargetOnly(), broken.Slot()])
def test_probabilities_that_do_not_sum_to_one_are_told(scorer):
    assert distribution(judged(scorer), rows(5), scored=STRIDE).largest_log_sum > 1e-3


def test_the_sum_over_the_vocabulary_is_taken_by_hand():
    bonus = distribution(judged(broken.TargetOnly()), rows(2), scored=STRIDE)
    assert bonus.largest_log_sum == pytest.approx(0.05, abs=1e-5)


def test_a_score_that_is_no_number_is_infinitely_wrong():
    found = distribution(judged(lambda tokens, targets, **_: targets[:, -STRIDE:] * math.nan), rows(1), scored=STRIDE)
    assert math.isinf(found.largest_log_sum) and math.isinf(found.largest_entry_gap)


# ── C1, C3: whole evaluations ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("learns", [False, True])
def test_nothing_that_comes_later_reaches_back_in_a_sound_evaluation(stream, learns):
    found = back(driver(learns=learns), stream)
    assert (found.compared, found.moved) == (2 * CHUNK + CHUNK // 2 - 1, 0)
    assert found.control > CHUNK


def test_learning_is_seen_by_what_comes_later(stream):
    plain, learned = (driver(learns=learns)(stream).nats_P for learns in (False, True))
    assert torch.equal(plain[:CHUNK], learned[:CHUNK])
    assert (plain != learned)[CHUNK:].float().mean() > 0.9  # a bit may round alike


def test_a_chunk_that_is_learned_before_it_is_scored_is_told_by_its_own_first_half(stream):
    found = back(broken.train_before_score, stream)
    assert found.moved == CHUNK // 2 - 1  # positions of the changed chunk; the chunks before are as they were
    assert found.largest > EXACT and found.noise == 0.0


def test_a_change_at_a_chunks_beginning_does_not_show_what_is_learned_too_early(stream):
    assert back(broken.train_before_score, stream, place=2 * CHUNK + 1).moved == 0  # why the middle is taken


def test_what_moves_by_itself_is_measured_beside(stream):
    turns = iter(range(100))

    def restless(given):
        found = driver()(given)
        found.nats_P[3] += next(turns)
        return found

    found = back(restless, stream)
    assert (found.moved, found.largest, found.noise) == (1, 1.0, 2.0)


@pytest.mark.parametrize(("scorer", "is_told"), [(broken.Apart, False), (broken.Smear, True), (broken.Counting, True)])
def test_a_document_that_reaches_into_the_next_is_told(stream, scorer, is_told):
    found = boundary_reach(driver(scorer), stream, 75, vocab_size=V, generator=seeded())
    assert found.compared == stream.positions - 75 and found.control > 60
    assert (found.largest > EXACT) == is_told
    if scorer is broken.Smear:
        assert found.moved == 1  # the token behind BOS


def test_two_paths_that_differ_before_anything_is_learned_are_told():
    vocab_size = TINY.model.vocab_size
    tokens = torch.randint(2, vocab_size, (2 * CHUNK + 1,), generator=seeded())
    text = Stream(tokens.int(), torch.ones(len(tokens) - 1, dtype=torch.int64))

    def without_gates():  # what #1787 met
        model = random_model()
        model.skip_gates = None
        return model.nats

    plain, same, lacking = (
        driver(network)(text) for network in (lambda: random_model().nats, lambda: random_model().nats, without_gates)
    )
    assert loss_gap(plain, same, CHUNK) == 0.0
    assert loss_gap(plain, lacking, CHUNK) > PARITY_TOLERANCE


# ── C4 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sound_evaluation_covers_each_position_once(stream):
    found = coverage(driver(learns=True)(stream), stream)
    assert (found.never, found.again, found.tokens) == (0, 0, stream.positions)
    assert found.bytes == found.stream_bytes == int(stream.target_bytes_P.sum())


def test_a_second_pass_and_a_missing_tail_are_counted(stream):
    assert coverage(broken.rescored(stream), stream).again == stream.positions
    found = coverage(broken.without_tail(stream), stream)
    assert (found.never, found.tokens) == (STRIDE, stream.positions - STRIDE)


def test_the_account_refuses_what_it_must():
    assert faults_taken(Tally, ALONE) == []


def test_accounts_that_take_anything_or_count_wrongly_are_told():
    assert faults_taken(broken.ForgivingTally, ALONE) == ["a position scored twice", "a position never scored"]
    assert faults_taken(broken.TwiceCountingTally, ALONE) == [
        "sums of 7.0 nats, 8 tokens and 7 bytes come to 7.0, 8 and 14"
    ]


# ── bytes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def dataset(prepared):
    return Dataset.open(prepared, 420)


def counted_by(dataset, table):
    tokens_N = dataset.validation_tokens()
    return byte_count(
        Stream(tokens_N, table.bytes_of_targets(tokens_N[:-1], tokens_N[1:])), Speller(dataset.tokenizer).texts
    )


def test_counted_bytes_are_those_of_the_text(dataset):
    found = counted_by(dataset, TokenBytes(dataset.tokenizer))
    assert found.documents == dataset.manifest.splits["val"].documents - 1  # the last one's end is not known
    assert found.wrong == 0 and found.counted == found.spelled > 1000


def test_spaces_of_three_bytes_are_told(dataset):
    found = counted_by(dataset, broken.ThreeByteSpaces(dataset.tokenizer))
    assert found.wrong > 0.9 * found.documents
    assert found.counted > 1.2 * found.spelled


# ── the disturbance ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_disturbed_tokens_are_all_others_and_no_bos():
    tokens = torch.arange(V).repeat(50)
    found = disturbed(tokens, torch.ones_like(tokens) == 1, vocab_size=V, generator=seeded())
    assert not (found == tokens).any() and not (found == BOS).any()
    assert set(found.tolist()) == set(range(V)) - {BOS}
    kept = disturbed(tokens, tokens < 5, vocab_size=V, generator=seeded(), keeps_bos=True)
    assert ((kept != tokens) == ((tokens < 5) & (tokens != BOS))).all()


def test_movements_add_up():
    one = compare(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), torch.tensor([True, True]))
    assert one == Moved(compared=2, moved=1, largest=0.5, mean=0.25, control=0)
    both = one + Moved(compared=2, moved=0, largest=0.0, mean=0.0, control=7, noise=0.125)
    assert both == Moved(compared=4, moved=1, largest=0.5, mean=0.125, control=7, noise=0.125)
