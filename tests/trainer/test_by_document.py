import dataclasses
import json
import math

import pytest
import torch

from tests.trainer.tiny import ALONE, CONFIG, LENGTH, random_model
from trainer.by_document import Documents, evaluate_documents
from trainer.config import TTTConfig
from trainer.evaluate import JudgeError, Stream
from trainer.protocol import EventLog, ScoreChain, read_lines
from trainer.ttt import DocumentAdapter

BOS = 1
TTT = TTTConfig(
    method="lora", lora_unit="document", document_tokens=4, batch_documents=2, lr=0.02, lora_rank=4,
    lora_targets=("q", "k", "v", "out", "mlp", "head"), adam_beta1=0.0, weight_decay=0.1,
)  # fmt: skip
LENGTHS = (7, 22, 3, 1, 9, 31, 12)  # tokens of each document, BOS included


def text(lengths=LENGTHS, *, seed=0):
    """Documents that begin with BOS and say a few tokens over and over, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for length in lengths:
        phrase = torch.randint(2, CONFIG.model.vocab_size, (5,), generator=generator)
        parts.append(torch.cat((torch.tensor([BOS]), phrase.repeat(length)[: length - 1])))
    return torch.cat(parts)


def stream_of(tokens):
    return Stream(tokens.int(), torch.arange(len(tokens) - 1) % 3)


def documents_of(stream, *, config=TTT, world=ALONE, length=LENGTH):
    return Documents(stream, stream.documents(BOS), config=config, length=length, recurrent=True, world=world)


def adapted_score(tokens, *, config=TTT, world=ALONE, chain=None):
    model, stream = random_model(), stream_of(tokens)
    adapter = DocumentAdapter(model, config=config, recurrent=True, world=world)
    return evaluate_documents(
        model.nats, documents_of(stream, config=config, world=world), adapter=adapter, chain=chain
    )


class Witness:
    """Scores every target by its position, and keeps what it was shown for each: the order of all that happens."""

    def __init__(self, tokens):
        self.tokens, self.contexts, self.story = tokens.tolist(), {}, []

    def __call__(self, tokens, targets, *, recurrent, scored):
        self.story.append(("scored", tokens.tolist()))
        return targets[:, -scored:].float()

    def begin(self):
        self.story.append(("began", None))

    def learn(self, tokens, targets, learns, *, scored):
        self.story.append(
            ("learned", [row for row, is_on in zip(tokens.tolist(), learns.tolist(), strict=True) if is_on])
        )


def numbered(lengths):
    """Token i of the split is a number of its own, but for the BOS of each document."""
    tokens = torch.arange(1000, 1000 + sum(lengths))
    tokens[[sum(lengths[:i]) for i in range(len(lengths))]] = BOS
    return tokens


@pytest.mark.parametrize("lengths", [LENGTHS, (5,), (1, 1, 1), (40, 2)])
@pytest.mark.parametrize("step", [3, 4, 16])
def test_every_position_is_scored_once(lengths, step):
    tokens = numbered((*lengths, 2))
    stream, config = stream_of(tokens), dataclasses.replace(TTT, document_tokens=step)
    score = evaluate_documents(Witness(tokens), documents_of(stream, config=config))
    assert (score.tokens, score.bytes) == (len(tokens) - 1, int(stream.target_bytes_P.sum()))
    assert score.nats == tokens[1:].sum()


def test_a_row_ends_in_what_is_scored_and_begins_no_earlier_than_its_document():
    tokens = numbered(LENGTHS)
    documents, contexts = documents_of(stream_of(tokens)), {}
    for number in range(len(documents.batches)):
        for rows, _, positions, is_counted, _ in documents.rounds(number):
            for row, column in is_counted.nonzero().tolist():
                ends_at = rows.size(1) - positions.size(1) + column + 1
                contexts[int(positions[row, column])] = rows[row, :ends_at].tolist()
    assert sorted(contexts) == list(range(len(tokens) - 1))
    begin = 0
    for length in LENGTHS:
        for position in range(begin, min(begin + length, len(tokens) - 1)):
            context = contexts[position]
            assert context == tokens[position + 1 - len(context) : position + 1].tolist()
            assert min(position + 1 - begin, LENGTH - 3) <= len(context) <= position + 1 - begin
        begin += length


def test_documents_come_by_falling_length_and_each_learns_only_from_what_was_scored():
    tokens = numbered(LENGTHS)
    witness, stream = Witness(tokens), stream_of(tokens)
    evaluate_documents(witness, documents_of(stream), adapter=witness)
    kinds = [kind for kind, _ in witness.story]
    batches = "".join(kind[0] for kind in kinds).split("b")[1:]
    assert batches == ["sl" * 7 + "s", "sl" * 2 + "s", "sls", "s"]  # 31 positions in rounds of 4; 12, 7 and 1 or 0
    for (kind, rows), (before, scored) in zip(witness.story[1:], witness.story, strict=False):
        if kind == "learned":
            assert before == "scored" and all(row in scored for row in rows)
            assert rows, "a round after which nobody goes on is not learned"


def test_an_adapter_learns_within_its_document():
    tokens = text()
    plain = evaluate_documents(random_model().nats, documents_of(stream_of(tokens)))
    assert adapted_score(tokens).loss < plain.loss - 0.3


def test_a_document_s_score_depends_on_no_other_document(tmp_path):
    """Whatever the others say and however many lie beside it: the rounds of the longest are the same."""
    rounds = []
    for number, (seed, beside) in enumerate([(0, 1), (5, 1), (0, 3)]):
        tokens = torch.cat((text(LENGTHS[:5], seed=seed), text((31, 12), seed=9)))
        log = EventLog(tmp_path / f"{number}.jsonl")
        config = dataclasses.replace(TTT, batch_documents=beside)
        adapted_score(tokens, config=config, chain=ScoreChain(log, "ttt", ""))
        rounds.append([event for _, event in read_lines(log.path)])
    assert rounds[0][0]["rounds"] == rounds[1][0]["rounds"]
    assert rounds[0][1]["nats"] != rounds[1][1]["nats"]
    beside = {tuple(chunk[0][name] for name in ("first", "last")) for chunk in rounds}
    assert beside == {(0, 31), (0, 64)}
    first, second, third = (rounds[0][i]["nats"] for i in range(3))
    assert rounds[2][0]["nats"] == pytest.approx(first + second + third, rel=1e-5)  # sums of a wider batch


def test_no_round_depends_on_a_later_token(tmp_path):
    stories = []
    for ending in (3, 5):
        tokens = text((40, 2))
        tokens[30:40] = ending
        log = EventLog(tmp_path / f"{ending}.jsonl")
        adapted_score(tokens, chain=ScoreChain(log, "ttt", ""))
        stories.append(next(event["rounds"] for _, event in read_lines(log.path)))
    assert stories[0][:7] == stories[1][:7]  # positions 0 to 27 predict tokens 1 to 28
    assert stories[0][7:] != stories[1][7:]


def test_a_batch_of_documents_is_a_chunk_of_the_chain_with_its_rounds(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    chain = ScoreChain(log, "ttt", "ab")
    score = adapted_score(text(), chain=chain)
    events = [event for _, event in read_lines(log.path)]
    assert [(event["kind"], event["chunk"]) for event in events] == [("scored", number) for number in range(4)]
    assert [event["last"] - event["first"] for event in events] == [53, 20, 10, 1]
    assert math.fsum(event["nats"] for event in events) == score.nats
    assert [len(event.get("rounds", "1")) for event in events] == [8, 3, 2, 1]
    assert events[-1]["chain"] == chain.link


def test_the_first_loss_is_before_any_learning_and_counts_nothing():
    stream, model = stream_of(text()), random_model()
    documents = documents_of(stream)
    plain = documents.first_loss(model.nats)
    adapter = DocumentAdapter(model, config=TTT, recurrent=True, world=ALONE)
    assert documents.first_loss(model.nats) == pytest.approx(plain, abs=1e-6)
    assert evaluate_documents(model.nats, documents, adapter=adapter).tokens == stream.positions


def test_a_position_that_no_document_holds_is_refused():
    stream = stream_of(text())
    documents = Documents(stream, stream.documents(BOS)[1:], config=TTT, length=LENGTH, recurrent=True, world=ALONE)
    with pytest.raises(JudgeError, match="position 0 of 84 was scored 0 times"):
        evaluate_documents(random_model().nats, documents)


def one_update(config, tokens):
    model = random_model()
    adapter = DocumentAdapter(model, config=config, recurrent=True, world=ALONE)
    before = [parameter.detach().clone() for parameter in model.lora.parameters]
    adapter.begin()
    adapter.learn(tokens[:, :-1], tokens[:, 1:], torch.tensor([1.0, 0.0]), scored=4)
    return model, before


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_one_update_is_one_of_each_document_by_itself(clip):
    """SGD written out: the mean loss of the last tokens, each document's gradient clipped by its own norm."""
    config = dataclasses.replace(TTT, lora_optimizer="sgd", momentum=0.0, lr=0.5, grad_clip_norm=clip)
    tokens = torch.stack((text((13,)), text((13,), seed=3)))
    model, before = one_update(config, tokens)
    reference = random_model()
    DocumentAdapter(reference, config=config, recurrent=True, world=ALONE)
    loss = reference.nats(tokens[:, :-1], tokens[:, 1:], recurrent=True, scored=4)[0].mean()
    gradients = torch.autograd.grad(loss, reference.lora.parameters)
    norm = math.sqrt(sum(gradient[0].square().sum().item() for gradient in gradients))
    factor = min(1.0, clip / norm) if clip else 1.0
    assert (factor < 1) == bool(clip)
    for moved, start, gradient in zip(model.lora.parameters, before, gradients, strict=True):
        torch.testing.assert_close(moved.detach()[0], start[0] - 0.5 * factor * gradient[0], atol=1e-6, rtol=1e-4)
        assert torch.equal(moved[1], start[1])  # this one had ended


def share(world, tokens, config):
    """What one of two processes comes to."""
    return dataclasses.asdict(dataclasses.replace(adapted_score(tokens, config=config, world=world), seconds=0.0))


def test_two_processes_score_as_one_does(pair):
    tokens = text()
    mine, other = pair(share, tokens, TTT)
    alone = adapted_score(tokens)
    assert json.dumps(mine) == json.dumps(other)
    assert (mine["tokens"], mine["bytes"]) == (alone.tokens, alone.bytes)
    assert mine["nats"] == pytest.approx(alone.nats, rel=1e-6)
