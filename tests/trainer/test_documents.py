"""Bytes of documents, counted by ways that share nothing: by hand, by Python's own Unicode, by the judge's table."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from make_data import AWKWARD, EMPTY, VOCAB_SIZE, quiet, write_jsonl

from trainer.corpus import Batch
from trainer.data import HEADER_BYTES, TokenBytes
from trainer.documents import Document, Encoder, Reader, line_of, read_listing
from trainer.errors import DataError
from trainer.prepare import TOKENIZER_SETTINGS, Recipe, bytes_of_documents, prepare
from trainer.protocol import TRAIN, DataDir
from trainer.verification import Part, Span, Speller

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"  # public tokenizers and text, on some machines
MODELS = sorted(SHARED.glob("tokenizers/fineweb_*_bpe.model"))
WITHOUT_BYTES = SHARED / "tokenizers" / "lab_1024_bpe_no_byte_fallback.model"

# Given text, and what of it is scored, written by hand from the Unicode standard and the challenge's settings.
BY_HAND = (
    ("plain words", "plain words"),
    ("  leading and trailing  ", "leading and trailing"),
    ("runs   of    spaces", "runs of spaces"),
    ("lines\r\n\r\nand\ttabs\n", "lines and tabs"),
    ("wide\u00a0and\u3000ideographic\u2003spaces", "wide and ideographic spaces"),
    ("a line\u2028separator", "a line separator"),
    ("an emoji 🎉, one with a modifier 👍🏽, a flag 🇩🇪", "an emoji 🎉, one with a modifier 👍🏽, a flag 🇩🇪"),
    ("a family 👨\u200d👩\u200d👧", "a family 👨\u200d👩\u200d👧"),
    ("bytes alone spell ᚠᛇᚻ ༀ 𐍈", "bytes alone spell ᚠᛇᚻ ༀ 𐍈"),
    ("ﬁ ① Å ｆｕｌｌ ™ ½", "fi 1 Å full TM 1⁄2"),
    ("e\u0301 and \u1112\u1161\u11ab", "é and 한"),
    ("zero\u200bwidth", "zero width"),
    ("a byte order\ufeffmark", "a byte order mark"),
    ("a bell\x07 rings", "a bell rings"),
    ("a zero\0byte", "a zero byte"),
    ("a lower▁block", "a lower block"),
    ("▁▁at the front", "at the front"),
    ("<s> </s> <unk> <0x41> are letters", "<s> </s> <unk> <0x41> are letters"),
    ("q" * 100_000, "q" * 100_000),
    ("", ""),
    (" \n\t\u200b ", ""),
)

OTHER_SETTINGS = {
    "no normalisation, spaces kept": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "spaces kept": {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "dummy prefix": {"add_dummy_prefix": True},
    "dummy prefix, spaces kept": {"add_dummy_prefix": True, "remove_extra_whitespaces": False},
    "case folded": {"normalization_rule_name": "nmt_nfkc_cf"},
    "space behind": {"treat_whitespace_as_suffix": True},
    "symbols of its own": {"user_defined_symbols": ["<sep>", "the"]},
}


def model_of(settings_: dict[str, object]) -> bytes:
    """A small tokenizer with the challenge's settings, changed."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the plain  words of a text, é 日本"] * 50), model_writer=model, minloglevel=2,
        vocab_size=300, hard_vocab_limit=False, **{**TOKENIZER_SETTINGS, **settings_},
    )  # fmt: skip
    return model.getvalue()


def batch_of(*texts: str) -> Batch:
    return Batch("x.jsonl", [json.dumps({"text": text}).encode() for text in texts], list(range(1, len(texts) + 1)))


class Counter:
    """Counts a text in each of the ways."""

    def __init__(self, model: bytes, folder: Path) -> None:
        self.encoder = Encoder(Reader(model))
        self.tokenizer = self.encoder.reader.tokenizer
        self.table, self.speller = TokenBytes(self.tokenizer), Speller(self.tokenizer)
        self.path = folder / "tokens"

    def __call__(self, *texts: str) -> list[Document]:
        """The documents; fails where the tokens' bytes, the spelled text's and the text's own are not the same."""
        encoded = self.encoder(batch_of(*texts))
        self.path.write_bytes(bytes(HEADER_BYTES) + encoded.tokens_N.tobytes())
        spelled = self.speller(Span((Part(self.path, 0, len(encoded.tokens_N)),), 0))
        counted = [document.counted_bytes for document in encoded.documents]
        assert bytes_of_documents(self.table, encoded.tokens_N, encoded.starts) == counted
        assert spelled.counted_bytes == spelled.spelled_bytes == counted
        assert spelled.keys == [document.key for document in encoded.documents]
        return encoded.documents


@pytest.mark.parametrize("model", ["prepared", *(path.name for path in MODELS)])
def test_the_bytes_of_awkward_text_are_those_counted_by_hand(model: str, prepared: Path, tmp_path: Path) -> None:
    path = DataDir(prepared).tokenizer if model == "prepared" else SHARED / "tokenizers" / model
    found = Counter(path.read_bytes(), tmp_path)(*(given for given, _ in BY_HAND))
    for document, (given_text, scored) in zip(found, BY_HAND, strict=True):
        key = hashlib.sha256(scored.encode()).digest()
        assert document == Document(key, len(given_text.encode()), len(scored.encode())), given_text[:40]


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.name)
def test_the_bytes_of_real_text_are_those_that_python_normalises_it_to(model: Path, tmp_path: Path) -> None:
    with lzma.open(SHARED / "val.jsonl.xz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for number, line in enumerate(lines) if number % 4 == 0]
    for text, document in zip(texts, Counter(model.read_bytes(), tmp_path)(*texts), strict=True):
        own = " ".join(unicodedata.normalize("NFKC", text).split())
        assert (document.raw_bytes, document.counted_bytes) == (len(text.encode()), len(own.encode()))


LETTERS = st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\r▁a1éﬁ①🎉\u200b\u200d\ufeff\ufffd\0\x07<>s/")
)


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_the_bytes_are_the_texts_own_with_any_tokenizer_that_can_spell_it(name: str, tmp_path: Path) -> None:
    counter = Counter(model_of(OTHER_SETTINGS[name]), tmp_path)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.text(LETTERS, max_size=12), min_size=1, max_size=8))
    def check(texts: list[str]) -> None:
        counter(*texts)

    check()
    counter(*AWKWARD, *EMPTY, " x", "  x", "x ", "\nx")


def test_a_space_at_the_start_of_a_document_costs_nothing(tmp_path: Path) -> None:
    counter = Counter(model_of(OTHER_SETTINGS["no normalisation, spaces kept"]), tmp_path)
    none, one, two, end = counter("word", " word", "  word", "word ")
    assert [document.counted_bytes for document in (none, one, two, end)] == [4, 4, 5, 5]
    assert [document.raw_bytes for document in (none, one, two, end)] == [4, 5, 6, 5]


@pytest.mark.skipif(not WITHOUT_BYTES.is_file(), reason="needs the public tokenizer that has no byte pieces")
def test_a_tokenizer_that_loses_letters_is_refused_with_the_document(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", ["plain words", "other words", "more 🎉 words"])
    recipe = Recipe(corpus=[str(corpus)], vocab_size=1024, tokenizer=WITHOUT_BYTES, val_documents=1)
    with pytest.raises(DataError, match=r"a.jsonl:3: the tokens of this document count \d+ bytes, .* 'more 🎉 words'"):
        prepare(recipe, tmp_path / "d", say=quiet)


def test_the_list_of_documents_is_read_as_it_was_written(tmp_path: Path) -> None:
    document = Document(hashlib.sha256(b"text").digest(), 7, 4)
    DataDir(tmp_path).documents.write_text(line_of(TRAIN, document) * 2)
    assert read_listing(DataDir(tmp_path))[TRAIN] == [document, document]


@pytest.mark.parametrize(
    "line",
    ["train abc", "train " + 64 * "a", "test " + 64 * "a" + " 1 1\n", "train " + 64 * "a" + " 1 1", "train ab 1 1\n"],
)
def test_a_damaged_line_of_the_list_is_named(tmp_path: Path, line: str) -> None:
    good = line_of(TRAIN, Document(hashlib.sha256(b"text").digest(), 7, 4))
    DataDir(tmp_path).documents.write_text(good + line)
    with pytest.raises(DataError, match="documents.txt:2: not a split, a sha256 and two numbers of bytes"):
        read_listing(DataDir(tmp_path))


def test_the_awkward_documents_are_in_the_data_set_of_the_tests(prepared: Path) -> None:
    keys = {document.key for documents in read_listing(DataDir(prepared)).values() for document in documents}
    reader = Reader(DataDir(prepared).tokenizer.read_bytes())
    assert {reader.document(text).key for text in AWKWARD} <= keys
    assert reader.tokenizer.vocab_size() == VOCAB_SIZE
