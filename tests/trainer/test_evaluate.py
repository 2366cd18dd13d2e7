import math

import pytest
import torch

from tests.trainer.tiny import ALONE
from trainer.config import EvaluationConfig
from trainer.distributed import World
from trainer.evaluate import RUNNING_SCORES, JudgeError, Stream, Tally, evaluate, plan_windows, score_of

CONFIG = EvaluationConfig(sequence_length=8, stride=4, batch_windows=3)


class Oracle:
    """Gives each target its own value in nats, so that a misplaced one shows; remembers what it was asked."""

    def __init__(self):
        self.contexts, self.asked = {}, []

    def __call__(self, tokens, targets, *, recurrent, scored):
        self.asked.append((tuple(tokens.shape), scored))
        for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
            for back in range(scored, 0, -1):
                self.contexts[target[-back]] = row[: len(row) - back + 1]
        return targets[:, -scored:].float() / 10


class Apart(World):
    """One of several processes that do not hear each other; keeps what it was to add up."""

    def sum(self, tensor):
        if tensor.dtype == torch.int32:
            self.times_scored.append(tensor)
        return tensor


def stream_of(tokens):
    """Token i is the number i, and stands for i % 3 bytes."""
    numbers = torch.arange(tokens)
    return Stream(numbers.int(), numbers[1:] % 3)


@pytest.mark.parametrize("positions", [1, 3, 7, 8, 9, 11, 12, 13, 31, 32, 33, 100])
@pytest.mark.parametrize(("length", "stride"), [(8, 4), (8, 8), (8, 1), (8, 3)])
def test_windows_score_every_position_once_with_all_the_context_that_fits(positions, length, stride):
    windows = plan_windows(positions, length=length, stride=stride)
    scored = [p for _, begin, end in windows.places_3W.T.tolist() for p in range(begin, end)]
    assert scored == list(range(positions))
    assert windows.length == min(length, positions)


def test_the_number_of_windows_is_the_published_one():
    # sp4096: 45,508,608 positions, length 2,048, stride 64; the scripts with 31 tail windows print 711,072
    assert len(plan_windows(45_508_608, length=2048, stride=64).places_3W.T) == 711_041


@pytest.mark.parametrize("tokens", [6, 9, 30, 101])
@pytest.mark.parametrize("chunk_tokens", [8, 16, 1000])
def test_a_score_is_the_sum_over_every_target_once(tokens, chunk_tokens):
    stream, model = stream_of(tokens), Oracle()
    windows = plan_windows(stream.positions, length=8, stride=4)
    score = evaluate(
        model, stream, windows, config=CONFIG, recurrent=False, world=ALONE, chunk_tokens=chunk_tokens
    ).score
    assert score.tokens == tokens - 1
    assert score.bytes == sum(i % 3 for i in range(1, tokens))
    assert score.nats == pytest.approx(sum(range(1, tokens)) / 10)
    assert score.bpb == pytest.approx(score.nats / math.log(2) / score.bytes)


def test_every_target_is_predicted_from_what_stands_right_before_it():
    stream, model = stream_of(40), Oracle()
    windows = plan_windows(stream.positions, length=8, stride=4)
    evaluate(model, stream, windows, config=CONFIG, recurrent=False, world=ALONE, chunk_tokens=16)
    for target, context in model.contexts.items():
        assert context == list(range(target - len(context), target))
        assert len(context) >= min(target, 5)  # length 8, stride 4: five to eight tokens once the text is long enough


class Recorder:
    def __init__(self, model):
        self.model, self.learned, self.scored_before = model, [], []

    def learn(self, first, last, *, chunk, chunks):
        self.learned.append((first, last, chunk, chunks))
        self.scored_before.append(sorted(self.model.contexts))


def test_a_chunk_is_learned_from_only_after_it_was_scored_and_the_last_one_never():
    stream, model = stream_of(50), Oracle()
    recorder = Recorder(model)
    windows = plan_windows(stream.positions, length=8, stride=4)
    evaluate(
        model,
        stream,
        windows,
        config=CONFIG,
        recurrent=False,
        world=ALONE,
        chunk_tokens=16,
        adapter=recorder,
    )
    assert recorder.learned == [(0, 16, 0, 4), (16, 32, 1, 4), (32, 48, 2, 4)]
    for (_, last, _, _), scored in zip(recorder.learned, recorder.scored_before, strict=True):
        assert scored == list(range(1, last + 1))  # targets of positions 0 ... last - 1, and no later one


def test_the_first_chunk_is_reported_by_itself_and_the_running_score_as_it_goes():
    stream, heard = stream_of(50), []
    windows = plan_windows(stream.positions, length=8, stride=4)
    evaluation = evaluate(
        Oracle(), stream, windows, config=CONFIG, recurrent=False, world=ALONE, chunk_tokens=16,
        on_chunk=lambda *told: heard.append(told),
    )  # fmt: skip
    assert evaluation.first_chunk_loss == pytest.approx(sum(range(1, 17)) / 10 / 16)
    assert [chunk for chunk, _, _ in heard] == [0, 1, 2, 3]
    assert heard[-1][2] == pytest.approx(evaluation.score.bpb)


@pytest.mark.parametrize("tokens", [9, 30, 50, 101])
@pytest.mark.parametrize("chunk_tokens", [8, 16, 1000])
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_the_network_is_asked_for_one_shape_and_two_numbers_of_positions(tokens, chunk_tokens, stride):
    stream, model = stream_of(tokens), Oracle()
    windows = plan_windows(stream.positions, length=8, stride=stride)
    score = evaluate(
        model, stream, windows, config=CONFIG, recurrent=False, world=ALONE, chunk_tokens=chunk_tokens
    ).score
    assert len({shape for shape, _ in model.asked}) == 1  # what lacks windows is filled up
    assert {scored for _, scored in model.asked} <= {stride, 8}
    assert (score.tokens, score.nats) == (tokens - 1, pytest.approx(sum(range(1, tokens)) / 10))


def test_processes_divide_the_windows_between_them():
    windows, asked = plan_windows(100, length=8, stride=4), []
    for rank in range(3):
        world, model = Apart(rank=rank, size=3, device=ALONE.device), Oracle()
        world.times_scored = []
        with pytest.raises(JudgeError):  # nobody adds the others' up
            evaluate(model, stream_of(101), windows, config=CONFIG, recurrent=False, world=world, chunk_tokens=16)
        asked.append({int(position) for times in world.times_scored for position in times.nonzero()})
    assert set().union(*asked) == set(range(100))
    assert sum(map(len, asked)) == 100


@pytest.mark.parametrize("chunks", [1, 2, 49, 50, 51, 99, 149])
def test_running_scores_are_few_and_the_last_one_is_told(chunks):
    stream, heard = stream_of(chunks * 4 + 1), []
    windows = plan_windows(stream.positions, length=4, stride=4)
    evaluation = evaluate(
        Oracle(), stream, windows, config=CONFIG, recurrent=False, world=ALONE, chunk_tokens=4,
        on_chunk=lambda *told: heard.append(told),
    )  # fmt: skip
    assert min(chunks, RUNNING_SCORES // 2) <= len(heard) <= RUNNING_SCORES
    assert heard[-1] == (chunks - 1, chunks, pytest.approx(evaluation.score.bpb))


def test_a_position_scored_twice_is_refused():
    tally = Tally(stream_of(5))
    tally.begin_round()
    tally.commit(torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4), torch.ones(1, 4) == 1)
    tally.commit(torch.tensor([[2, 3]]), torch.ones(1, 2), torch.tensor([[True, False]]))
    with pytest.raises(JudgeError, match="position 2 of 4 was scored 2 times"):
        tally.finish(ALONE, 0.0)


def test_a_position_never_scored_is_refused():
    tally = Tally(stream_of(5))
    tally.begin_round()
    tally.commit(torch.tensor([[0, 1, 3]]), torch.ones(1, 3), torch.ones(1, 3) == 1)
    with pytest.raises(JudgeError, match="position 2 of 4 was scored 0 times"):
        tally.finish(ALONE, 0.0)


def test_bits_per_byte_by_hand():
    score = score_of(nats=8 * math.log(2), tokens=4, scored_bytes=16, seconds=1.0)
    assert (score.bpb, score.loss) == (pytest.approx(0.5), pytest.approx(2 * math.log(2)))
