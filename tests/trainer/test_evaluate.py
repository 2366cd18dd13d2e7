import dataclasses
import itertools
import math

import pytest
import torch

from tests.trainer.tiny import ALONE
from trainer.config import EvaluationConfig
from trainer.distributed import World
from trainer.evaluate import RUNNING_SCORES, JudgeError, Stream, Tally, evaluate, plan_documents, plan_windows, score_of
from trainer.protocol import EventLog, ScoreChain, read_lines

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


DOCUMENTS = [0, 1, 4, 12, 13, 33]  # first positions; of 40
SPLIT = 41


@pytest.mark.parametrize(("length", "stride"), [(8, 4), (8, 8), (8, 1), (8, 3), (64, 16)])
@pytest.mark.parametrize("chunk_tokens", [5, 8, 40])
def test_windows_of_documents_score_every_position_once_and_read_nothing_before_its_document(
    length, stride, chunk_tokens
):
    windows = plan_documents(torch.tensor(DOCUMENTS), SPLIT - 1, length=length, stride=stride).cut(chunk_tokens)
    places = windows.places_3W.T.tolist()
    assert sorted(p for _, begin, end in places for p in range(begin, end)) == list(range(SPLIT - 1))
    for start, begin, end in places:
        document = max(first for first in DOCUMENTS if first <= begin)
        after = min([first for first in DOCUMENTS if first > begin], default=SPLIT - 1)
        assert document <= start and end <= min(after, start + windows.length)
        assert begin - start >= min(begin - document, windows.length - windows.stride)  # as much context as asked
    for whole, later in itertools.pairwise(places):
        assert whole[1] // chunk_tokens <= later[1] // chunk_tokens
        assert whole[1] // chunk_tokens == (whole[2] - 1) // chunk_tokens


def context_lengths(tokens, targets, *, recurrent, scored):
    """As nats, how many tokens each target is predicted from."""
    return torch.arange(1.0, tokens.size(1) + 1)[-scored:].expand(len(tokens), -1)


def lengths_written_out(positions, *, length, stride):
    """The context lengths of one document, added up."""
    done = min(length, positions)
    total = sum(range(1, done + 1))
    while done < positions:
        end = min(done + stride, positions)
        total += sum(length - (end - 1 - position) for position in range(done, end))
        done = end
    return total


@pytest.mark.parametrize("chunk_tokens", [8, 16, 1000])
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_by_document_each_target_is_predicted_from_as_much_of_its_own_document_as_fits(chunk_tokens, stride):
    stream = stream_of(SPLIT)
    windows = plan_documents(torch.tensor(DOCUMENTS), stream.positions, length=8, stride=stride)
    score = evaluate(
        context_lengths,
        stream,
        windows,
        config=dataclasses.replace(CONFIG, protocol="documents"),
        recurrent=False,
        world=ALONE,
        chunk_tokens=chunk_tokens,
    ).score
    sizes = [after - first for first, after in itertools.pairwise([*DOCUMENTS, SPLIT - 1])]
    assert score.nats == sum(lengths_written_out(size, length=8, stride=stride) for size in sizes)
    assert (score.tokens, score.bytes) == (SPLIT - 1, sum(i % 3 for i in range(1, SPLIT)))


def test_documents_begin_at_every_bos_and_at_the_front():
    tokens = torch.tensor([5, 1, 4, 1, 1, 7, 1])
    assert Stream(tokens, torch.zeros(6, dtype=torch.int64)).documents(1).tolist() == [
        0,
        1,
        3,
        4,
    ]  # the last predicts nothing


def test_the_chain_has_each_chunk_before_it_is_learned_from_and_adds_up_to_the_score(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    stream, model, chain = stream_of(50), Oracle(), ScoreChain(log, "ttt", "ab")
    windows = plan_windows(stream.positions, length=8, stride=4)
    score = evaluate(
        model, stream, windows, config=CONFIG, recurrent=False, world=ALONE, chunk_tokens=16,
        adapter=Recorder(model), chain=chain,
    ).score  # fmt: skip
    events = [event for _, event in read_lines(log.path)]
    told = [(event["kind"], event["chunk"], event["first"], event["last"]) for event in events]
    spans = [(0, 0, 16), (1, 16, 32), (2, 32, 48), (3, 48, 49)]
    assert told == [(kind, *span) for span in spans for kind in ("scored", "learned")][:-1]
    scored = [event for event in events if event["kind"] == "scored"]
    assert math.fsum(event["nats"] for event in scored) == score.nats
    assert [event["bytes"] for event in scored] == [sum(i % 3 for i in range(a + 1, b + 1)) for _, a, b in spans]
    assert scored[-1]["chain"] == chain.link


def test_what_is_not_counted_may_be_no_number():
    tally = Tally(stream_of(3))
    tally.begin_round()
    tally.commit(torch.tensor([[0, 1, 7]]), torch.tensor([[1.0, 2.0, math.nan]]), torch.tensor([[True, True, False]]))
    tally.close(0, 2, ALONE, None)
    assert tally.finish(ALONE, 0.0).nats == 3.0


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
