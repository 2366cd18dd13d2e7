import numpy as np
import pytest

from trainer.data import BOS
from trainer.overlap import HEAD_TOKENS, Overlap, overlap


def shard(*documents):
    return np.array([token for document in documents for token in (BOS, *document)], dtype=np.uint16)


def text(seed, length=100):
    return np.random.default_rng(seed).integers(2, 500, length).tolist()


def test_splits_without_a_common_document_have_nothing_in_common():
    found = overlap([shard(text(0), text(1))], [shard(text(2)), shard(text(3), text(4, 5))])
    assert found == Overlap(val_documents=2, train_documents=3, repeated=0, repeated_tokens=0, first=None)


@pytest.mark.parametrize("length", [1, HEAD_TOKENS - 1, HEAD_TOKENS, HEAD_TOKENS + 1, 100])
def test_validation_text_in_the_training_split_is_told_with_its_place(length):
    leaked = text(1, length)
    found = overlap([shard(text(0), leaked)], [shard(text(2)), shard(text(3), leaked, text(4)), shard(leaked)])
    assert (found.repeated, found.repeated_tokens, found.first) == (2, 2 * length, 2)


def test_a_common_beginning_makes_no_common_document():
    stem = text(5, HEAD_TOKENS)
    found = overlap([shard([*stem, 7, 8])], [shard([*stem, 7, 9], stem, [*stem, 7, 8, 9])])
    assert found.repeated == 0


def test_empty_documents_and_tokens_before_the_first_document_are_none():
    continued = np.array([5, 6, *shard([], text(1))], dtype=np.uint16)
    assert overlap([shard([], text(0))], [continued]) == Overlap(
        val_documents=1, train_documents=1, repeated=0, repeated_tokens=0, first=None
    )


def test_the_first_documents_of_a_training_split_that_begins_inside_validation_are_all_told():
    """openai/parameter-golf#2127: training from document 10 on, validation up to 50."""
    documents = [text(seed) for seed in range(60)]
    found = overlap([shard(*documents[:50])], [shard(*documents[10:])])
    assert (found.val_documents, found.train_documents, found.repeated, found.first) == (50, 50, 40, 0)
