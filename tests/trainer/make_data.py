"""A small real data set for tests: prepared by the trainer's own code from text that covers the awkward cases."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from trainer.prepare import Recipe, prepare
from trainer.protocol import Manifest

VOCAB_SIZE = 420

AWKWARD = (
    "An emoji 🎉, one with a modifier 👍🏽, and a flag 🇩🇪.",
    "Letters that only bytes can spell: ᚠᛇᚻ ༀ 𐍈.",
    "runs   of    spaces\n\n\nand\tlines \u00a0 with\u3000wide ones  ",
    "NFKC changes ﬁ, ①, Å, ｆｕｌｌ ｗｉｄｔｈ, 1⁄2 and ™.",
    "a lower block ▁ in the middle",
    "▁at the front",
    "zero\0byte and bell\x07 and zero\u200bwidth",
    "<s> </s> <unk> <0x41> spelt out",
    "e\u0301 decomposed, and 한국어 text",
    "x",
    "007 1,234.5 and 3.14159",
)
EMPTY = ("", "   \n\t ", "\u200b")

NOUNS = (
    "shard",
    "token",
    "seed",
    "study",
    "ledger",
    "runner",
    "window",
    "matrix",
    "vector",
    "kernel",
    "record",
    "trial",
)
VERBS = (
    "reads",
    "writes",
    "keeps",
    "scores",
    "moves",
    "splits",
    "joins",
    "counts",
    "trains",
    "checks",
    "stops",
    "starts",
)


def texts() -> list[str]:
    """Documents of a few sentences, all different, and the awkward ones."""
    sentences = [f"the {a} {verb} a {b}." for a, verb, b in itertools.product(NOUNS, VERBS, NOUNS)]
    plain = [" ".join(sentences[start :: len(sentences) // 6]) for start in range(len(sentences) // 6)]
    return [*plain, *AWKWARD]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def quiet(message: str) -> None:
    """Say nothing."""


def make_data(root: Path, *, name: str = "small", shard_tokens: int = 4000, documents: list[str] | None = None) -> Path:
    """Prepare the data set `name` under `root` and return its folder."""
    corpus = write_jsonl(root / f"{name}.jsonl", texts() if documents is None else documents)
    recipe = Recipe(corpus=[str(corpus)], vocab_size=VOCAB_SIZE, val_frac=0.2, shard_tokens=shard_tokens)
    prepare(recipe, root / name, say=quiet)
    return root / name


def manifest_in(folder: Path) -> Manifest:
    from trainer.protocol import DataDir, read_manifest

    return read_manifest(DataDir(folder).manifest)
