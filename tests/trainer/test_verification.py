from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from make_data import manifest_in, quiet

from trainer.data import BOS, HEADER_BYTES
from trainer.errors import DataError
from trainer.protocol import TRAIN, VALIDATION, DataDir, sha256_of, write_manifest
from trainer.verification import verify


def test_a_sound_data_set_has_no_problems(prepared: Path) -> None:
    assert verify(prepared, say=quiet) == []


def change_token(folder: Path, place: int, token: int) -> None:
    path = DataDir(folder).shard(TRAIN, 0)
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + 2 * place : HEADER_BYTES + 2 * place + 2] = token.to_bytes(2, "little")
    path.write_bytes(content)


def agree(folder: Path, **changes: object) -> None:
    """Let the manifest agree with the changed first training shard, so that only the content is wrong."""
    manifest = manifest_in(folder)
    split = manifest.splits[TRAIN]
    shard = dataclasses.replace(split.shards[0], sha256=sha256_of(DataDir(folder).shard(TRAIN, 0)))
    split = dataclasses.replace(split, shards=(shard, *split.shards[1:]), **changes)  # type: ignore[arg-type]
    write_manifest(DataDir(folder).manifest, dataclasses.replace(manifest, splits={**manifest.splits, TRAIN: split}))


def a_missing_shard(folder: Path) -> None:
    DataDir(folder).shard(TRAIN, 0).unlink()


def a_truncated_shard(folder: Path) -> None:
    os.truncate(DataDir(folder).shard(TRAIN, 0), 2000)


def changed_bytes(folder: Path) -> None:
    change_token(folder, 5, 300)


def a_token_beyond_the_vocabulary(folder: Path) -> None:
    change_token(folder, 5, 60_000)
    agree(folder)


def a_document_start_too_many(folder: Path) -> None:
    change_token(folder, 5, BOS)
    agree(folder)


def other_words(folder: Path) -> None:
    path = DataDir(folder).shard(TRAIN, 0)
    tokens = np.fromfile(path, dtype="<u2", offset=HEADER_BYTES)
    place = next(n for n in range(1, len(tokens) - 1) if tokens[n] != tokens[n + 1] and BOS not in tokens[n : n + 2])
    first, second = int(tokens[place]), int(tokens[place + 1])
    change_token(folder, place, second)
    change_token(folder, place + 1, first)
    agree(folder)


def wrong_byte_count(folder: Path) -> None:
    agree(folder, text_bytes=7)


def wrong_totals(folder: Path) -> None:
    agree(folder, documents=7)


def a_gap_between_shards(folder: Path) -> None:
    manifest = manifest_in(folder)
    split = manifest.splits[TRAIN]
    shard = dataclasses.replace(split.shards[1], first_document=0)
    split = dataclasses.replace(split, shards=(split.shards[0], shard, *split.shards[2:]))
    write_manifest(DataDir(folder).manifest, dataclasses.replace(manifest, splits={**manifest.splits, TRAIN: split}))


def a_tokenizer_of_another_size(folder: Path) -> None:
    write_manifest(DataDir(folder).manifest, dataclasses.replace(manifest_in(folder), vocab_size=512))


def a_changed_tokenizer(folder: Path) -> None:
    path = DataDir(folder).tokenizer
    path.write_bytes(path.read_bytes() + b"\x9a\x01\x00")  # an unknown field, which the reader passes over


def a_missing_list_of_documents(folder: Path) -> None:
    DataDir(folder).documents.unlink()


def a_damaged_list_of_documents(folder: Path) -> None:
    DataDir(folder).documents.write_text("train abc\n")


def a_document_in_both_splits(folder: Path) -> None:
    path = DataDir(folder).documents
    lines = path.read_text().splitlines()
    shared = next(line for line in lines if line.startswith(TRAIN)).replace(TRAIN, VALIDATION)
    path.write_text("\n".join([*lines, shared]) + "\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (a_missing_shard, "train_000000.bin: the shard is missing"),
        (a_truncated_shard, "the shard is truncated: 2000 bytes"),
        (changed_bytes, "train_000000.bin: changed bytes"),
        (a_token_beyond_the_vocabulary, "token 60000 at byte 1034, the vocabulary has 420"),
        (a_document_start_too_many, "document starts, the manifest says"),
        (other_words, "the train documents are not the listed ones"),
        (wrong_byte_count, "bytes, the manifest says 7"),
        (wrong_totals, "documents, the split says"),
        (a_gap_between_shards, "train_000001.bin begins with document 0, must be"),
        (a_tokenizer_of_another_size, "the tokenizer has 420 pieces, the model's vocab_size is 512"),
        (a_changed_tokenizer, "tokenizer.model: changed bytes"),
        (a_missing_list_of_documents, "disjointness cannot be proved"),
        (a_damaged_list_of_documents, "documents.txt:1: not a split and a sha256: 'train abc'"),
        (a_document_in_both_splits, "1 documents are in both splits"),
    ],
)
def test_each_damage_has_its_own_message(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    assert message in "\n".join(verify(folder, say=quiet))


def test_verifying_a_folder_without_a_manifest_says_that_there_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data set"):
        verify(tmp_path, say=quiet)
