from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from make_data import AWKWARD, EMPTY, VOCAB_SIZE, make_data, manifest_in, quiet, texts, write_jsonl

from trainer import __main__ as command
from trainer import corpus as corpus_module
from trainer import prepare as prepare_module
from trainer.data import BOS, Dataset
from trainer.errors import DataError, StorageError
from trainer.prepare import Recipe, prepare
from trainer.protocol import TRAIN, VALIDATION, DataDir, sha256_of
from trainer.verification import verify


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", texts())


def recipe_of(path: Path, **options: object) -> Recipe:
    return Recipe(**{"corpus": [str(path)], "vocab_size": VOCAB_SIZE, "val_frac": 0.2, **options})  # type: ignore[arg-type]


def test_every_distinct_document_is_in_exactly_one_split_with_a_start_before_it(tmp_path: Path) -> None:
    every = texts()
    folder = make_data(tmp_path, documents=[*every, *EMPTY, *every[:7]])
    manifest = manifest_in(folder)
    assert sum(split.documents for split in manifest.splits.values()) == len(set(every))
    assert (manifest.recipe["duplicates"], manifest.recipe["empty"]) == (7, len(EMPTY))
    dataset = Dataset.open(folder, VOCAB_SIZE)
    for name, split in manifest.splits.items():
        tokens = np.concatenate(dataset.shards(name))
        assert tokens[0] == BOS
        assert int((tokens == BOS).sum()) == split.documents > 0


def test_texts_that_only_differ_before_normalisation_are_one_document(tmp_path: Path) -> None:
    folder = make_data(tmp_path, documents=[*texts(), "ﬁne  words", "fine words", " fine\nwords "])
    assert manifest_in(folder).recipe["duplicates"] == 2


def test_the_tokens_decode_to_the_normalised_documents(prepared: Path) -> None:
    dataset = Dataset.open(prepared, VOCAB_SIZE)
    found = set()
    for name in (TRAIN, VALIDATION):
        tokens = np.concatenate(dataset.shards(name))
        found |= {
            dataset.tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, np.flatnonzero(tokens == BOS)[1:])
        }
    raw = [text.replace("▁", " ").replace("\0", " ") for text in texts()]
    assert found == {dataset.tokenizer.normalize(text).replace("▁", " ") for text in raw}


def test_the_tokenizer_has_the_challenges_settings(prepared: Path) -> None:
    tokenizer = Dataset.open(prepared, VOCAB_SIZE).tokenizer
    assert (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()) == (0, 1, 2, 3)
    assert sum(tokenizer.is_byte(token) for token in range(VOCAB_SIZE)) == 256
    assert len(tokenizer.encode("12345")) >= 5  # digits are never joined
    assert tokenizer.encode("the", out_type=str)[0][0] != "▁"


def test_shards_end_with_a_document_and_say_which_documents_they_hold(prepared: Path) -> None:
    split = manifest_in(prepared).splits[TRAIN]
    assert len(split.shards) > 2
    assert all(shard.tokens <= 4000 for shard in split.shards)
    starts = [shard.first_document for shard in split.shards]
    assert starts == [sum(shard.documents for shard in split.shards[:n]) for n in range(len(split.shards))]


def test_a_document_longer_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    folder = make_data(tmp_path, shard_tokens=10)
    assert all(shard.documents == 1 or shard.tokens <= 10 for shard in manifest_in(folder).splits[TRAIN].shards)
    assert verify(folder, say=quiet).problems == []


def test_the_same_corpus_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        prepare(recipe_of(corpus), tmp_path / name, say=quiet)
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("first", "second"))
    assert [sha256_of(path) for path in first] == [sha256_of(path) for path in second]


def test_the_number_of_processes_changes_no_byte(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(corpus, [*texts(), *EMPTY, *texts()[:7]] * 3)
    monkeypatch.setattr(corpus_module, "BATCH_BYTES", 3000)  # many batches, the last of them short
    for processes in (1, 3):
        prepare(recipe_of(corpus, processes=processes), tmp_path / str(processes), say=quiet)
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("1", "3"))
    assert [sha256_of(path) for path in first] == [sha256_of(path) for path in second]


def test_the_manifest_and_the_list_say_how_many_bytes_were_given(corpus: Path, tmp_path: Path) -> None:
    made = prepare(recipe_of(corpus), tmp_path / "d", say=quiet)
    given = sum(len(text.encode()) for text in texts())
    assert sum(made.raw_bytes.values()) == made.manifest.recipe["raw_bytes"] == given
    counted = sum(split.text_bytes for split in made.manifest.splits.values())
    assert counted < given  # runs of spaces were joined


def test_a_small_corpus_is_read_by_one_process_and_a_number_that_is_asked_for_is_taken(corpus: Path) -> None:
    assert recipe_of(corpus).workers() == 1
    assert recipe_of(corpus, processes=5).workers() == 5


def test_a_data_set_that_is_there_already_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert prepare(recipe_of(corpus), tmp_path / "d", say=quiet).is_new
    before = DataDir(tmp_path / "d").manifest.stat()
    assert not prepare(recipe_of(corpus), tmp_path / "d", say=said.append).is_new
    assert DataDir(tmp_path / "d").manifest.stat() == before
    assert any("there already" in line for line in said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "d"]


def test_another_data_set_at_the_same_place_is_refused(corpus: Path, tmp_path: Path) -> None:
    prepare(recipe_of(corpus), tmp_path / "d", say=quiet)
    with pytest.raises(DataError, match="another data set is there: corpus.jsonl, 420 pieces"):
        prepare(recipe_of(corpus, val_frac=0.3), tmp_path / "d", say=quiet)


def test_a_folder_that_is_no_data_set_is_not_written_over(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="exists and is not a data set"):
        prepare(recipe_of(corpus), tmp_path / "d", say=quiet)
    assert (tmp_path / "d" / "thesis.txt").read_text() == "mine"


def test_an_exact_number_of_validation_documents_can_be_asked_for(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(recipe_of(corpus, val_documents=7), tmp_path / "d", say=quiet).manifest
    assert manifest.splits[VALIDATION].documents == 7


def test_a_given_tokenizer_is_taken_as_it_is(prepared: Path, corpus: Path, tmp_path: Path) -> None:
    model = DataDir(prepared).tokenizer
    manifest = prepare(recipe_of(corpus, tokenizer=model), tmp_path / "d", say=quiet).manifest
    assert manifest.tokenizer_sha256 == sha256_of(model)
    assert verify(tmp_path / "d", say=quiet).problems == []


def test_a_given_tokenizer_must_have_the_size_that_is_asked_for(prepared: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="420 pieces, the model's vocab_size is 512"):
        prepare(recipe_of(corpus, tokenizer=DataDir(prepared).tokenizer, vocab_size=512), tmp_path / "d", say=quiet)


def test_a_given_tokenizer_that_cannot_spell_the_text_is_refused(corpus: Path, tmp_path: Path) -> None:
    model = tmp_path / "no_bytes.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the plain words of a text"] * 9), model_writer=file, vocab_size=40,
            model_type="bpe", add_dummy_prefix=False, bos_id=1, unk_id=3, pad_id=0, eos_id=2, minloglevel=2,
        )  # fmt: skip
    with pytest.raises(
        DataError, match=r"corpus.jsonl:\d+: the tokens of this document count .* its normalised text has"
    ) as caught:
        prepare(recipe_of(corpus, tokenizer=model, vocab_size=40), tmp_path / "d", say=quiet)
    assert "byte fallback" in str(caught.value.hint)
    assert not (tmp_path / "d").exists()


def test_a_text_too_small_for_the_vocabulary_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", list(AWKWARD))
    with pytest.raises(DataError, match=r"does not give a tokenizer of 9000 pieces: Vocabulary size too high \(9000\)"):
        prepare(recipe_of(corpus, vocab_size=9000), tmp_path / "d", say=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_a_single_document_cannot_be_both_splits(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("one long document")
    with pytest.raises(DataError, match="1 distinct documents give . for validation and . for training") as caught:
        prepare(recipe_of(tmp_path / "book.txt"), tmp_path / "d", say=quiet)
    assert "a plain text file is one document" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 70_000}, r"vocab_size must be in \[8, 65536\], shards hold uint16; got 70000"),
        ({"val_frac": 1.0}, "val_frac must lie between 0 and 1, got 1.0"),
        ({"val_documents": 0}, "val_documents must be at least 1, got 0"),
        ({"shard_tokens": 0}, "shard_tokens must be at least 1, got 0"),
        ({"corpus": []}, "a corpus is needed"),
        ({"processes": 0}, "processes must be at least 1, got 0"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        recipe_of(Path("corpus.jsonl"), **options)


def test_a_corpus_that_changes_while_it_is_read_is_noticed(corpus: Path, tmp_path: Path) -> None:
    def shrink(message: str) -> None:
        if message.startswith("training a tokenizer"):
            write_jsonl(corpus, texts()[:-3])

    with pytest.raises(DataError, match=r"the corpus changed while it was read: \d+ of \d+ documents were found again"):
        prepare(recipe_of(corpus), tmp_path / "d", say=shrink)
    assert not (tmp_path / "d").exists()


def test_a_document_that_changes_while_the_corpus_is_read_is_noticed(corpus: Path, tmp_path: Path) -> None:
    def change(message: str) -> None:
        if message.startswith("encoding"):
            write_jsonl(corpus, [*texts()[:5], "something else", *texts()[6:]])

    with pytest.raises(DataError, match="not all of the documents .* are what they were"):
        prepare(recipe_of(corpus), tmp_path / "d", say=change)


def test_two_preparations_of_one_data_set_do_not_meet(corpus: Path, tmp_path: Path) -> None:
    staging = tmp_path / ".d.partial"
    staging.mkdir()
    descriptor = os.open(staging, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is preparing it"):
        prepare(recipe_of(corpus), tmp_path / "d", say=quiet)
    os.close(descriptor)
    (staging / "train_000000.bin").write_bytes(b"left by a killed process")
    assert prepare(recipe_of(corpus), tmp_path / "d", say=quiet).is_new


def test_a_place_that_cannot_be_written_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written: "):
        prepare(recipe_of(corpus), tmp_path / "file" / "d", say=quiet)


def test_long_phases_tell_how_far_they_are(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "PROGRESS_SECONDS", 0.0)
    said: list[str] = []
    prepare(recipe_of(corpus), tmp_path / "d", say=said.append)
    assert any(line.startswith("reading: ") for line in said)
    assert any(line.startswith("encoding: ") for line in said)


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command_prepares_and_tells_the_totals(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare", "--corpus", str(corpus), "--out", str(tmp_path / "d"), "--vocab-size", str(VOCAB_SIZE)]
    assert command.main([*arguments, "--val-frac", "0.2", "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["is_new"]
    assert sum(split["raw_bytes"] for split in outcome["splits"].values()) == sum(
        len(text.encode()) for text in texts()
    )
    assert outcome["splits"]["val"]["documents"] == manifest_in(tmp_path / "d").splits[VALIDATION].documents
    assert command.main(["verify-data", str(tmp_path / "d")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'd'}: sound\n"


def test_the_command_tells_problems_and_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DataDir(folder).shard(TRAIN, 0).unlink()
    assert command.main(["verify-data", str(folder)]) == DataError.exit_code
    assert "problem: " in capsys.readouterr().err
    assert command.main(["verify-data", str(folder), "--json"]) == DataError.exit_code
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 1


def test_the_command_tells_an_error_with_its_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["verify-data", str(tmp_path)]) == DataError.exit_code
    assert capsys.readouterr().err.endswith("hint: caddie data prepare makes one\n")
    assert command.main(["verify-data", str(tmp_path), "--json"]) == DataError.exit_code
    assert json.loads(capsys.readouterr().out)["kind"] == "DataError"


def test_the_command_keeps_sentencepiece_quiet(corpus: Path, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "trainer", "prepare", "--corpus", corpus, "--out", tmp_path / "d", "--vocab-size", "420"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "trainer_interface" not in process.stderr
    assert process.stderr.splitlines()[0] == f"reading {corpus}"
