from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from make_data import EMPTY, manifest_in, quiet, texts, write_jsonl

from trainer import publication, verification
from trainer.data import BOS, HEADER_BYTES, TokenBytes
from trainer.errors import DataError
from trainer.prepare import shard_bytes
from trainer.protocol import TRAIN, VALIDATION, DataDir, sha256_of, write_manifest
from trainer.publication import adopt
from trainer.verification import verify


def test_a_sound_data_set_has_no_problems_and_three_counts_that_agree(prepared: Path) -> None:
    found = verify(prepared, say=quiet)
    assert (found.problems, found.notes) == ([], [])
    for name, split in manifest_in(prepared).splits.items():
        counted = found.splits[name]
        assert counted.counted_bytes == counted.spelled_bytes == split.text_bytes
        assert (counted.documents, counted.tokens) == (split.documents, split.tokens)
    given = sum(len(text.encode()) for text in texts())
    assert sum(counted.raw_bytes or 0 for counted in found.splits.values()) == given


def test_the_documents_are_compared_with_the_corpus_where_it_is_given(folder: Path, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [*texts(), *EMPTY, texts()[0]])
    assert verify(folder, say=quiet, corpus=[str(corpus)], processes=1).problems == []
    write_jsonl(corpus, [texts()[0] + "  ", "a new one", *texts()[2:]])
    changed, new, missing = verify(folder, say=quiet, corpus=[str(corpus)], processes=1).problems
    size = len(texts()[0].encode())
    assert f"corpus.jsonl:1: this document has {size + 2} raw and" in changed
    assert "corpus.jsonl:2: this document is not in the data set" in new
    assert "documents.txt: 1 documents are not in the corpus, the first is" in missing


def test_processes_find_what_one_finds(folder: Path) -> None:
    other_words(folder)
    assert verify(folder, say=quiet, processes=2) == verify(folder, say=quiet, processes=1)


def test_every_damage_is_named_at_once(folder: Path) -> None:
    other_words(folder)
    DataDir(folder).shard(TRAIN, 1).unlink()
    os.truncate(DataDir(folder).shard(TRAIN, 2), 2000)
    path = DataDir(folder).shard(VALIDATION, 0)
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff")
    DataDir(folder).documents.write_text(DataDir(folder).documents.read_text() + "train abc\n")
    problems = "\n".join(verify(folder, say=quiet).problems)
    for part in ("train_000001.bin: the shard is missing", "train_000002.bin: 2000 bytes, the shard's", "documents.txt:",
                 "val_000000.bin: changed bytes", "val_000000.bin: token 65535 at byte"):  # fmt: skip
        assert part in problems


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


def a_shard_in_both_splits(folder: Path) -> None:
    shutil.copyfile(DataDir(folder).shard(VALIDATION, 0), DataDir(folder).shard(TRAIN, 0))
    manifest = manifest_in(folder)
    train, validation = manifest.splits[TRAIN], manifest.splits[VALIDATION]
    shard = dataclasses.replace(validation.shards[0], file=train.shards[0].file)
    train = dataclasses.replace(train, shards=(shard, *train.shards[1:]))
    write_manifest(DataDir(folder).manifest, dataclasses.replace(manifest, splits={**manifest.splits, TRAIN: train}))


def a_list_with_another_count(folder: Path) -> None:
    path = DataDir(folder).documents
    lines = path.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(TRAIN))
    lines[first] += "0"
    path.write_text("\n".join(lines) + "\n")


def a_shard_that_begins_in_a_document(folder: Path) -> None:
    change_token(folder, 0, 300)
    agree(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (a_missing_shard, "train_000000.bin: the shard is missing"),
        (a_truncated_shard, "train_000000.bin: 2000 bytes, the shard's 3996 tokens need 9016"),
        (changed_bytes, "train_000000.bin: changed bytes"),
        (a_token_beyond_the_vocabulary, "token 60000 at byte 1034, the vocabulary has 420"),
        (a_document_start_too_many, "document starts, the manifest says"),
        (other_words, "train_000000.bin: byte 1024: train document 0: not the one that"),
        (wrong_byte_count, "bytes, the manifest says 7"),
        (wrong_totals, "documents, the split says"),
        (a_gap_between_shards, "train_000001.bin begins with document 0, must be"),
        (a_tokenizer_of_another_size, "the tokenizer has 420 pieces, the model's vocab_size is 512"),
        (a_changed_tokenizer, "tokenizer.model: changed bytes"),
        (a_missing_list_of_documents, "disjointness cannot be proved by it"),
        (a_damaged_list_of_documents, "documents.txt:1: not a split, a sha256 and two numbers of bytes: 'train abc'"),
        (a_document_in_both_splits, "1 documents are in both splits"),
        (a_document_in_both_splits, "lists 63 val documents, the manifest says 62"),
        (a_shard_in_both_splits, "training documents have the text of a validation document, the first at"),
        (a_list_with_another_count, "train document 0: not the one that"),
        (a_shard_that_begins_in_a_document, "train_000000.bin: byte 1024: must begin with token 1"),
    ],
)
def test_each_damage_has_its_own_message(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    assert message in "\n".join(verify(folder, say=quiet).problems)


def test_verifying_a_folder_without_a_manifest_says_that_there_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data set"):
        verify(tmp_path, say=quiet)


# ---- documents that cross shards ---------------------------------------------------------------------------------


def as_published(folder: Path, shard_tokens: int) -> None:
    """Cut the training split as publishers do, wherever a shard is full."""
    manifest = manifest_in(folder)
    split = manifest.splits[TRAIN]
    tokens = np.concatenate([np.fromfile(folder / s.file, dtype="<u2", offset=HEADER_BYTES) for s in split.shards])
    for shard in split.shards:
        (folder / shard.file).unlink()
    for number, start in enumerate(range(0, len(tokens), shard_tokens)):
        DataDir(folder).shard(TRAIN, number).write_bytes(shard_bytes(tokens[start : start + shard_tokens]))
    DataDir(folder).documents.unlink()
    adopt(folder, variant="sp420", source="published", recipe={}, stated={}, say=quiet)


def test_documents_that_cross_shards_are_put_together_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = manifest_in(folder).splits[TRAIN]
    as_published(folder, 1001)
    monkeypatch.setattr(verification, "SPAN_TOKENS", 300)
    found = verify(folder, say=quiet)
    assert found.problems == []
    train = found.splits[TRAIN]
    assert (train.documents, train.counted_bytes, train.spelled_bytes) == (
        before.documents, before.text_bytes, before.text_bytes,
    )  # fmt: skip
    assert train.raw_bytes is None


def test_a_character_that_is_cut_at_the_end_of_an_export_is_counted_as_far_as_it_goes(folder: Path) -> None:
    as_published(folder, 1000)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(DataDir(folder).tokenizer))
    emoji = tokenizer.encode("so 🎉")
    assert all(tokenizer.is_byte(token) for token in emoji[-4:])
    path = DataDir(folder).shard(TRAIN, 0)
    for number in range(1, len(manifest_in(folder).splits[TRAIN].shards)):
        DataDir(folder).shard(TRAIN, number).unlink()
    path.write_bytes(shard_bytes(np.array([BOS, *emoji[:-2]], dtype=np.uint16)))
    adopt(folder, variant="sp420", source="published", recipe={}, stated={}, say=quiet)
    found = verify(folder, say=quiet)
    assert found.problems == []
    assert found.splits[TRAIN].counted_bytes == found.splits[TRAIN].spelled_bytes == len("so 🎉".encode()) - 2


def test_a_damaged_shard_of_an_export_does_not_hide_the_next(folder: Path) -> None:
    as_published(folder, 1000)
    DataDir(folder).shard(TRAIN, 1).unlink()
    path = DataDir(folder).shard(TRAIN, 3)
    path.write_bytes(path.read_bytes()[:-2] + b"\x50\x01")
    problems = verify(folder, say=quiet).problems
    assert [problem.split(": ", 1)[1] for problem in problems] == [
        "the shard is missing", "changed bytes: its sha256 is not the manifest's",
    ]  # fmt: skip


def test_a_published_split_that_repeats_a_document_is_noted_and_one_that_leaks_is_a_problem(folder: Path) -> None:
    as_published(folder, 100_000)
    train, val = (
        np.fromfile(DataDir(folder).shard(name, 0), dtype="<u2", offset=HEADER_BYTES) for name in (TRAIN, VALIDATION)
    )
    starts = np.flatnonzero(val == BOS)
    for tokens, is_usual in ((np.concatenate((train, val[: starts[1]])), True), (np.concatenate((train, val)), False)):
        DataDir(folder).shard(TRAIN, 0).write_bytes(shard_bytes(tokens))
        adopt(folder, variant="sp420", source="published", recipe={}, stated={}, say=quiet)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verification, "REPEATED_FRAC", 0.02)  # one of the 62 documents here
            found = verify(folder, say=quiet)
        assert len(found.notes) == is_usual and len(found.problems) == (not is_usual)
        assert "training documents have the text of a validation document" in (found.notes + found.problems)[0]


def test_a_split_of_a_known_variant_is_compared_with_public_logs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.fromfile(DataDir(folder).shard(VALIDATION, 0), dtype="<u2", offset=HEADER_BYTES)
    table = TokenBytes(sentencepiece.SentencePieceProcessor(model_file=str(DataDir(folder).tokenizer)))
    targets = len(tokens) - 1 - (len(tokens) - 1) % publication.WINDOW_TOKENS
    counted = publication.stream_bytes(table, tokens[: targets + 1])
    assert publication.against_known("sp420", tokens, table) is None
    monkeypatch.setitem(publication.KNOWN, "sp420", publication.Known(targets, counted))
    assert "as the public logs of sp420" in str(publication.against_known("sp420", tokens, table))
    monkeypatch.setitem(publication.KNOWN, "sp420", publication.Known(targets, counted + 99))
    assert "scores on it do not compare with theirs" in str(publication.against_known("sp420", tokens, table))
    as_published(folder, 5000)
    assert ["do not compare" in note for note in verify(folder, say=quiet).notes] == [True]
