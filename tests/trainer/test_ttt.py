import math

import pytest
import torch

from tests.trainer.tiny import ALONE, LENGTH, random_model, random_tokens
from trainer.config import EvaluationConfig, TTTConfig
from trainer.evaluate import Stream, evaluate, plan_windows
from trainer.ttt import ChunkAdapter, ParityError, chunk_lr, require_parity

EVALUATION = EvaluationConfig(sequence_length=LENGTH, stride=4, batch_windows=8)
TTT = TTTConfig(chunk_tokens=32, lr=0.05, epochs=2, batch_sequences=2)


@pytest.fixture
def stream():
    # a short text over and over: there is something to learn from what has been scored
    tokens = random_tokens(rows=1, length=24).flatten().repeat(9)
    return Stream(tokens.int(), torch.ones(tokens.numel() - 1, dtype=torch.int64))


def score(model, stream, adapter=None):
    windows = plan_windows(stream.positions, length=LENGTH, stride=EVALUATION.stride)
    return evaluate(
        model.nats, stream, windows, config=EVALUATION, recurrent=True, world=ALONE,
        chunk_tokens=TTT.chunk_tokens, adapter=adapter,
    )  # fmt: skip


def adapter_of(model, stream, config=TTT):
    return ChunkAdapter(model, stream, config=config, length=LENGTH, recurrent=True, world=ALONE)


def test_first_chunk_scores_as_without_adaptation_and_later_ones_better(stream):
    plain = score(random_model(), stream)
    model = random_model()
    adapted = score(model, stream, adapter_of(model, stream))
    assert abs(require_parity(plain.first_chunk_loss, adapted.first_chunk_loss)) <= 1e-4
    assert adapted.score.loss < plain.score.loss - 0.1


def test_adaptation_never_reaches_back(stream):
    """Other tokens in the last chunk leave the nats of every earlier chunk as they were."""
    seen = {}
    for name, ending in (("a", 3), ("b", 5)):
        tokens = stream.tokens_N.clone()
        tokens[-20:] = ending
        model, heard = random_model(), []
        changed = Stream(tokens, stream.target_bytes_P)
        windows = plan_windows(changed.positions, length=LENGTH, stride=4)
        evaluate(
            model.nats, changed, windows, config=EVALUATION, recurrent=True, world=ALONE,
            chunk_tokens=TTT.chunk_tokens, adapter=adapter_of(model, changed),
            on_chunk=lambda chunk, chunks, bpb, heard=heard: heard.append(bpb),
        )  # fmt: skip
        seen[name] = heard
    assert seen["a"][:-1] == seen["b"][:-1]
    assert seen["a"][-1] != seen["b"][-1]


def test_one_update_is_sgd_with_momentum_on_the_clipped_mean_gradient(stream):
    config = TTTConfig(chunk_tokens=32, lr=0.1, epochs=1, batch_sequences=2, grad_clip_norm=0.5)
    model, reference = random_model(), random_model()
    adapter_of(model, stream, config).learn(0, 32, chunk=0, chunks=2)
    tokens = stream.tokens_N[:33].long()
    loss = reference(tokens[:32].view(2, 16), tokens[1:33].view(2, 16), True)
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in reference.parameters()))
    for moved, before in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(moved, before - 0.1 * before.grad * min(1.0, 0.5 / norm), atol=1e-6, rtol=1e-4)


def test_chunks_leave_the_weights_of_sgd_written_out(stream):
    config = TTTConfig(
        chunk_tokens=80, lr=0.1, momentum=0.8, epochs=2, batch_sequences=2, grad_clip_norm=0.5, frozen_blocks=1
    )
    model, reference = random_model(), random_model()
    adapter = adapter_of(model, stream, config)
    learned = [p for name, p in reference.named_parameters() if not name.startswith("blocks.0.")]
    velocities = [torch.zeros_like(p) for p in learned]
    for chunk, (first, last) in enumerate([(0, 80), (80, 160)]):
        adapter.learn(first, last, chunk=chunk, chunks=3)
        lr = 0.1 * 0.5 * (1 + math.cos(math.pi * chunk / 2))
        tokens = stream.tokens_N[first : last + 1].long()
        sequences, targets = tokens[:-1].view(5, LENGTH), tokens[1:].view(5, LENGTH)
        for rows in [slice(0, 2), slice(2, 4), slice(4, 5)] * 2:  # the last batch of an epoch is a smaller one
            grads = torch.autograd.grad(reference(sequences[rows], targets[rows], True), learned)
            clip = min(1.0, 0.5 / torch.cat([g.flatten() for g in grads]).norm().item())
            with torch.no_grad():
                for parameter, velocity, grad in zip(learned, velocities, grads, strict=True):
                    velocity.mul_(0.8).add_(clip * grad)
                    parameter.sub_(lr * velocity)
    for moved, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-4)  # a dozen steps of float32


def test_momentum_lives_through_chunks(stream):
    def moved(momentum):
        model = random_model()
        adapter = adapter_of(model, stream, TTTConfig(chunk_tokens=32, lr=0.05, epochs=1, momentum=momentum))
        before = [p.detach().clone() for p in model.parameters()]
        adapter.learn(0, 32, chunk=0, chunks=9)
        adapter.learn(0, 32, chunk=0, chunks=9)
        return sum((p - b).norm().item() for p, b in zip(model.parameters(), before, strict=True))

    assert moved(0.9) > 1.2 * moved(0.0)


def test_frozen_blocks_do_not_learn(stream):
    model = random_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter_of(model, stream, TTTConfig(chunk_tokens=32, frozen_blocks=2)).learn(0, 32, chunk=0, chunks=2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not any(name.startswith(("blocks.0.", "blocks.1.")) for name in changed)
    assert any(name.startswith("blocks.2.") for name in changed)


def test_learning_rate_is_a_cosine_over_chunks():
    assert [chunk_lr(0.002, chunk, 5) for chunk in (0, 2, 4)] == pytest.approx([0.002, 0.001, 0.0])
    assert chunk_lr(0.002, 0, 1) == 0.002


@pytest.mark.parametrize("ttt_loss", [1.7613, 1.7609, math.nan])
def test_two_paths_that_score_differently_are_refused(ttt_loss):
    with pytest.raises(ParityError, match="plain evaluation 1.761100 on the same tokens") as caught:
        require_parity(1.7611, ttt_loss)
    assert "forward paths differ" in caught.value.hint


def test_a_forward_path_that_lacks_a_part_is_caught(stream):
    """What #1787 met: the path that adapts had no gate that the other had."""
    plain, broken = random_model(), random_model()
    broken.skip_gates = None
    with pytest.raises(ParityError):
        require_parity(
            score(plain, stream).first_chunk_loss, score(broken, stream, adapter_of(broken, stream)).first_chunk_loss
        )
