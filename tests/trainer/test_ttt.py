import dataclasses
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


LORA = TTTConfig(
    method="lora", chunk_tokens=32, lr=0.02, epochs=2, batch_sequences=2, lora_rank=4, lora_targets=("q", "v", "down")
)  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_low_rank_adapters_learn_from_chunk_to_chunk_after_a_first_one_as_without(stream, optimizer):
    plain, model = score(random_model(), stream), random_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = dataclasses.replace(LORA, lora_optimizer=optimizer, lr=LORA.lr if optimizer == "adamw" else 0.5)
    adapted = score(model, stream, adapter_of(model, stream, config))
    assert abs(require_parity(plain.first_chunk_loss, adapted.first_chunk_loss)) <= 1e-6
    assert adapted.score.loss < plain.score.loss - 0.1
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("frozen_blocks", [0, 4])
def test_query_matrices_alone_learn(stream, frozen_blocks):
    config = dataclasses.replace(TTT, parameters="query", frozen_blocks=frozen_blocks)
    model = random_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter_of(model, stream, config).learn(0, 32, chunk=0, chunks=2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"blocks.{layer}.attention.query.weight" for layer in range(frozen_blocks, 6)}


def test_adamw_on_the_weights_is_adamw_written_out(stream):
    config = TTTConfig(
        method="adamw", chunk_tokens=32, lr=0.01, epochs=2, batch_sequences=2, grad_clip_norm=0.0,
        adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-6, weight_decay=0.1,
    )  # fmt: skip
    model, reference = random_model(), random_model()
    adapter_of(model, stream, config).learn(0, 32, chunk=0, chunks=2)
    weights = list(reference.parameters())
    firsts, seconds = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    tokens = stream.tokens_N[:33].long()
    for step in (1, 2):
        grads = torch.autograd.grad(reference(tokens[:32].view(2, 16), tokens[1:33].view(2, 16), True), weights)
        with torch.no_grad():
            for weight, first, second, grad in zip(weights, firsts, seconds, grads, strict=True):
                first.mul_(0.8).add_(0.2 * grad)
                second.mul_(0.9).add_(0.1 * grad.square())
                update = first / (1 - 0.8**step) / ((second / (1 - 0.9**step)).sqrt() + 1e-6)
                weight.sub_(0.01 * (0.1 * weight + update))
    for moved, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(moved, expected, atol=1e-4, rtol=1e-3)  # a small gradient's sign decides its step


def learn_twice(world, tokens, config):
    """What a process's model is after two chunks: its adapters or its weights, and the nats of the first chunk."""
    stream, model = Stream(tokens, torch.ones(tokens.numel() - 1, dtype=torch.int64)), random_model()
    adapter = ChunkAdapter(model, stream, config=config, length=LENGTH, recurrent=True, world=world)
    windows = plan_windows(stream.positions, length=LENGTH, stride=EVALUATION.stride)
    found = evaluate(
        model.nats, stream, windows, config=EVALUATION, recurrent=True, world=world, chunk_tokens=96, adapter=adapter
    )
    learned = model.lora.parameters if model.lora else list(model.parameters())
    return [parameter.detach().tolist() for parameter in learned], found.score.nats, found.score.tokens


@pytest.mark.parametrize("config", [TTT, LORA], ids=["sgd", "lora"])
def test_two_processes_end_with_the_same_weights_and_the_score_of_one(stream, pair, config):
    config = dataclasses.replace(config, chunk_tokens=96, batch_sequences=3)  # which two cannot share equally
    (mine, nats, tokens), (others, *scores) = pair(learn_twice, stream.tokens_N, config)
    assert mine == others
    assert [nats, tokens] == scores
    alone, expected, _ = learn_twice(ALONE, stream.tokens_N, config)
    assert (nats, tokens) == (pytest.approx(expected, rel=1e-5), stream.positions)
    for one, both in zip(alone, mine, strict=True):
        torch.testing.assert_close(
            torch.tensor(both), torch.tensor(one), atol=2e-3, rtol=1e-2
        )  # AdamW on tiny gradients


def test_learning_rate_is_a_cosine_over_chunks():
    assert [chunk_lr(0.002, chunk, 5) for chunk in (0, 2, 4)] == pytest.approx([0.002, 0.001, 0.0])
    assert chunk_lr(0.002, 0, 1) == 0.002


@pytest.mark.parametrize("ttt_loss", [1.7613, 1.7609, math.nan])
def test_two_paths_that_score_differently_are_refused(ttt_loss):
    with pytest.raises(ParityError, match="plain evaluation 1.761100 on the same tokens") as caught:
        require_parity(1.7611, ttt_loss)
    assert "no TTT score" in caught.value.hint


def test_a_forward_path_that_lacks_a_part_is_caught(stream):
    """What #1787 met: the path that adapts had no gate that the other had."""
    plain, broken = random_model(), random_model()
    broken.skip_gates = None
    with pytest.raises(ParityError):
        require_parity(
            score(plain, stream).first_chunk_loss, score(broken, stream, adapter_of(broken, stream)).first_chunk_loss
        )
