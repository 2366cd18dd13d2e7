from __future__ import annotations

import dataclasses
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_data import AWKWARD, VOCAB_SIZE, manifest_in

from trainer import data
from trainer.data import BOS, HEADER_BYTES, SPACE, Dataset, TokenBytes, TrainLoader
from trainer.errors import ConfigError, DataError, ProtocolError
from trainer.prepare import TOKENIZER_SETTINGS, shard_bytes
from trainer.protocol import TRAIN, VALIDATION, DataDir, Manifest, Shard, Split, sha256_of, write_manifest

LENGTH = 64


def open_(folder: Path, **options: object) -> Dataset:
    return Dataset.open(folder, VOCAB_SIZE, **options)  # type: ignore[arg-type]


def rewrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


# ---- opening -----------------------------------------------------------------------------------------------------


def test_a_sound_data_set_opens_and_gives_its_whole_validation_split(prepared: Path) -> None:
    dataset = open_(prepared, manifest_sha256=sha256_of(DataDir(prepared).manifest))
    tokens = dataset.validation_tokens()
    assert tokens.dtype == torch.int32
    assert len(tokens) == dataset.manifest.splits[VALIDATION].tokens
    assert int(tokens[0]) == BOS
    assert int((tokens == BOS).sum()) == dataset.manifest.splits[VALIDATION].documents


def test_a_folder_without_a_manifest_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data set") as caught:
        open_(tmp_path)
    assert "caddie data prepare" in str(caught.value.hint)


def test_a_manifest_that_changed_after_the_run_was_planned_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="has changed: sha256 .* planned with 0000"):
        open_(folder, manifest_sha256="0000")


def test_a_manifest_of_another_format_is_refused(folder: Path) -> None:
    write_manifest(DataDir(folder).manifest, dataclasses.replace(manifest_in(folder), format=99))
    with pytest.raises(ProtocolError, match="data format 99"):
        open_(folder)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ('{"train": 3}', "splits must be tables"),
        ('{"train": {"shards": [], "tokens": 0, "documents": 0, "text_bytes": 0}}', "splits must be train and val"),
        ('{"train": {"shards": [{}]}}', "shard has unknown keys .* and lacks"),
    ],
)
def test_a_manifest_with_damaged_splits_is_refused(folder: Path, splits: str, message: str) -> None:
    DataDir(folder).manifest.write_text(
        f'{{"format": 1, "source": "", "recipe": {{}}, "tokenizer": "t", "tokenizer_sha256": "", "vocab_size": 9, "splits": {splits}}}'
    )
    with pytest.raises(ProtocolError, match=message):
        open_(folder)


@pytest.mark.parametrize("split", [TRAIN, VALIDATION])
def test_a_missing_shard_is_named(folder: Path, split: str) -> None:
    DataDir(folder).shard(split, 0).unlink()
    with pytest.raises(DataError, match=f"{split}_000000.bin: the shard is missing"):
        open_(folder)


@pytest.mark.parametrize("change", [-2, 2])
def test_a_shard_of_another_size_is_named_with_both_sizes(folder: Path, change: int) -> None:
    path = DataDir(folder).shard(TRAIN, 0)
    os.truncate(path, path.stat().st_size + change)
    with pytest.raises(
        DataError, match=f": {path.stat().st_size} bytes, .* tokens need {path.stat().st_size - change}"
    ):
        open_(folder)


@pytest.mark.parametrize("place", [0, 4, 8])
def test_a_shard_with_another_header_is_refused(folder: Path, place: int) -> None:
    rewrite(DataDir(folder).shard(TRAIN, 0), place, b"\7\0\0\0")
    with pytest.raises(DataError, match=r"header \[.*7.*must be \[20240520, 1, "):
        open_(folder)


def test_changed_bytes_in_a_validation_shard_are_found_at_every_start(folder: Path) -> None:
    rewrite(DataDir(folder).shard(VALIDATION, 0), HEADER_BYTES + 10, b"\7\0")
    with pytest.raises(DataError, match="changed bytes: sha256"):
        open_(folder)


def test_a_tokenizer_of_another_size_is_refused_with_both_sizes(prepared: Path) -> None:
    with pytest.raises(DataError, match=f"{VOCAB_SIZE} pieces, the model's vocab_size is 512"):
        Dataset.open(prepared, 512)


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    DataDir(folder).tokenizer.unlink()
    with pytest.raises(DataError, match="tokenizer.model: the tokenizer is missing"):
        open_(folder)


def test_a_file_that_is_no_tokenizer_is_refused(folder: Path) -> None:
    DataDir(folder).tokenizer.write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        open_(folder)


def test_another_tokenizer_of_the_same_size_is_refused(folder: Path) -> None:
    DataDir(folder).tokenizer.write_bytes(
        train(["other words " * 40 + chr(c) for c in range(300, 500)], vocab_size=VOCAB_SIZE)
    )
    with pytest.raises(DataError, match="tokenizer.model: changed bytes"):
        open_(folder)


def train(lines: list[str], **settings: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **{**TOKENIZER_SETTINGS, **settings}
    )
    return model.getvalue()


def test_a_tokenizer_without_a_stand_alone_space_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "no_space.model"
    path.write_bytes(train(["onewordaline", "otherword"], vocab_size=290, hard_vocab_limit=False))
    size = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    with pytest.raises(DataError, match="no stand-alone ▁"):
        data.load_tokenizer(path, size)


# ---- bytes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(prepared: Path) -> TokenBytes:
    return open_(prepared).byte_counts()


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> sentencepiece.SentencePieceProcessor:
    return open_(prepared).tokenizer


def counted(table: TokenBytes, ids: list[int]) -> int:
    tokens = torch.tensor([BOS, *ids])
    return int(table.bytes_of_targets(tokens[:-1], tokens[1:]).sum())


def test_the_bytes_of_the_validation_split_are_the_normalised_texts_exactly(prepared: Path) -> None:
    dataset = open_(prepared)
    tokens = dataset.validation_tokens()
    found = int(dataset.byte_counts().bytes_of_targets(tokens[:-1], tokens[1:]).sum())
    documents = np.split(tokens.numpy(), np.flatnonzero(tokens.numpy() == BOS)[1:])
    texts = [dataset.tokenizer.decode(document[1:].tolist()) for document in documents]
    assert found == sum(len(text.encode()) for text in texts) == dataset.manifest.splits[VALIDATION].text_bytes


@pytest.mark.parametrize("text", AWKWARD)
def test_the_bytes_of_awkward_text_are_its_normalised_bytes(
    text: str, table: TokenBytes, tokenizer: sentencepiece.SentencePieceProcessor
) -> None:
    text = text.replace(SPACE, " ").replace("\0", " ")  # as the preparation does
    assert counted(table, tokenizer.encode(text)) == len(tokenizer.normalize(text).replace(SPACE, " ").encode())


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_the_bytes_of_any_text_are_its_normalised_bytes(prepared: Path, text: str) -> None:
    tokenizer, table = _cached(prepared)
    text = text.replace(SPACE, " ").replace("\0", " ")
    assert counted(table, tokenizer.encode(text)) == len(tokenizer.normalize(text).replace(SPACE, " ").encode())


_CACHE: dict[Path, tuple[sentencepiece.SentencePieceProcessor, TokenBytes]] = {}


def _cached(folder: Path) -> tuple[sentencepiece.SentencePieceProcessor, TokenBytes]:
    if folder not in _CACHE:
        dataset = open_(folder)
        _CACHE[folder] = dataset.tokenizer, dataset.byte_counts()
    return _CACHE[folder]


def test_an_empty_document_has_no_bytes(table: TokenBytes) -> None:
    assert counted(table, []) == 0


def test_a_space_after_a_document_start_costs_nothing_and_later_costs_one(
    table: TokenBytes, tokenizer: sentencepiece.SentencePieceProcessor
) -> None:
    word = tokenizer.piece_to_id("▁the")
    letter, space = tokenizer.piece_to_id("e"), tokenizer.piece_to_id(SPACE)
    byte = tokenizer.piece_to_id("<0xF0>")
    previous = torch.tensor([BOS, letter, tokenizer.unk_id(), letter, BOS, letter, letter, letter])
    target = torch.tensor([word, word, word, space, space, byte, BOS, tokenizer.unk_id()])
    assert table.bytes_of_targets(previous, target).tolist() == [3, 4, 3, 1, 0, 1, 0, 0]


def test_spaces_inside_a_piece_count_one_byte_each() -> None:
    model = train(
        ["a  b   c"] * 50,
        vocab_size=275,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert counted(TokenBytes(tokenizer), tokenizer.encode("a  b   c")) == len("a  b   c")


def test_the_tables_count_the_same_for_int32_and_any_shape(table: TokenBytes, prepared: Path) -> None:
    tokens = open_(prepared).validation_tokens()[:129]
    flat = table.bytes_of_targets(tokens[:-1], tokens[1:])
    square = table.bytes_of_targets(tokens[:-1].view(4, 32).long(), tokens[1:].view(4, 32).long())
    assert square.dtype == torch.int64
    assert torch.equal(square.flatten(), flat)


# ---- order of the training data ----------------------------------------------------------------------------------


def shards_of(root: Path, lengths: list[int]) -> Dataset:
    """A data set whose training tokens are all different numbers, so that a batch tells where it comes from."""
    folder, shards, first = DataDir(root), [], 0
    root.mkdir()
    for number, length in enumerate(lengths):
        path = folder.shard(TRAIN, number)
        path.write_bytes(shard_bytes(np.arange(first, first + length, dtype=np.uint16)))
        shards.append(
            Shard(file=path.name, tokens=length, bytes=path.stat().st_size, sha256="", first_document=0, documents=0)
        )
        first += length
    split = Split(shards=tuple(shards), tokens=first, documents=0, text_bytes=0)
    manifest = dataclasses.replace(EMPTY_MANIFEST, splits={TRAIN: split, VALIDATION: split})
    return Dataset(folder, manifest, sentencepiece.SentencePieceProcessor())


EMPTY_MANIFEST = Manifest(source="", recipe={}, tokenizer="", tokenizer_sha256="", vocab_size=65536, splits={})


def test_a_row_is_consecutive_tokens_with_the_last_target(tmp_path: Path) -> None:
    loader = TrainLoader(shards_of(tmp_path / "a", [1000, 3000]), sequence_length=16, seed=1)
    batch = loader.next(32)
    assert batch.shape == (32, 17)
    assert batch.dtype == torch.int64
    assert torch.equal(batch - batch[:, :1], torch.arange(17).expand(32, 17))


def test_the_same_seed_gives_the_same_order_wherever_the_folder_lies(prepared: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(prepared, tmp_path / "moved"))
    here, there = (TrainLoader(open_(root), sequence_length=LENGTH, seed=5) for root in (prepared, moved))
    assert all(torch.equal(here.next(8), there.next(8)) for _ in range(5))


def test_another_seed_gives_another_order_at_the_first_batch(prepared: Path) -> None:
    first, second = (TrainLoader(open_(prepared), sequence_length=LENGTH, seed=seed).next(8) for seed in (1, 2))
    assert not torch.equal(first, second)


def test_ranks_share_one_global_batch(prepared: Path) -> None:
    whole = TrainLoader(open_(prepared), sequence_length=LENGTH, seed=3)
    ranks = [TrainLoader(open_(prepared), sequence_length=LENGTH, seed=3) for _ in range(4)]
    for _ in range(3):
        batch = whole.next(8)
        for rank, loader in enumerate(ranks):
            assert torch.equal(loader.next(8, rank, 4), batch[rank::4])


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 40), tokens=st.integers(3, 400), seed=st.integers(0, 10**6))
def test_an_epoch_of_a_shard_reads_each_of_its_blocks_once(length: int, tokens: int, seed: int) -> None:
    if tokens <= length:
        return
    cursor = data._Cursor(np.arange(tokens), length, np.random.default_rng(seed))
    for _ in range(3):
        starts = [cursor.next()[1]]
        starts += [cursor.next()[1] for _ in range(cursor.left)]
        assert len(set(starts)) == len(starts) == cursor.blocks
        assert min(starts) == cursor.phase < length
        assert tokens - length <= max(starts) + length <= tokens - 1


def test_blocks_of_a_shard_do_not_overlap_within_an_epoch(tmp_path: Path) -> None:
    loader = TrainLoader(shards_of(tmp_path / "a", [2000]), sequence_length=16, seed=9)
    starts = sorted(loader.next(loader.cursors[0].blocks)[:, 0].tolist())
    assert np.diff(starts).tolist() == [16] * (len(starts) - 1)


def test_a_batch_takes_its_shards_in_turn_and_early_batches_take_few(tmp_path: Path) -> None:
    dataset = shards_of(tmp_path / "a", [600] * 100)
    loader = TrainLoader(dataset, sequence_length=4, seed=2)
    early = (loader.next(512)[:, 0] // 600).tolist()
    loader.batches = data.MIX_BATCHES
    late = (loader.next(512)[:, 0] // 600).tolist()
    assert (len(set(early)), len(set(late))) == data.MIX_SHARDS
    assert len(set(early[:8])) == 8


def test_shards_with_more_blocks_left_are_drawn_more_often(tmp_path: Path) -> None:
    loader = TrainLoader(shards_of(tmp_path / "a", [500, 5000]), sequence_length=4, seed=2)
    from_small = sum(int((loader.next(16)[:, 0] < 500).sum()) for _ in range(20)) / 320
    share = 500**0.9 / (500**0.9 + 5000**0.9)
    assert from_small == pytest.approx(share, abs=0.08)  # three standard deviations of 320 draws: 0.056


def test_shards_that_are_too_short_are_left_out_and_none_left_is_an_error(tmp_path: Path) -> None:
    loader = TrainLoader(shards_of(tmp_path / "a", [16, 100]), sequence_length=16, seed=1)
    assert len(loader.cursors) == 1
    with pytest.raises(ConfigError, match="no training shard holds 101 tokens") as caught:
        TrainLoader(shards_of(tmp_path / "b", [16, 100]), sequence_length=100, seed=1)
    assert "data.sequence_length" in str(caught.value.hint)
