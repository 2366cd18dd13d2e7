"""Measures `prepare` and `verify` on a corpus by the number of processes, and that the data set does not depend on it.

python -m benchmarks.data --corpus train.jsonl.xz --vocab-size 4096 --processes 1 4 16
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from trainer.prepare import Recipe, prepare
from trainer.protocol import sha256_of
from trainer.verification import verify

T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its seconds."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


class Phases:
    """Seconds between the messages that tell a new phase."""

    def __init__(self) -> None:
        self.begins = [("reading", time.perf_counter())]

    def __call__(self, message: str) -> None:
        word = message.partition(" ")[0]
        if word in ("training", "encoding") and self.begins[-1][0] != word:
            self.begins.append((word, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        ends = [*self.begins, ("", time.perf_counter())]
        return {word: after - begin for (word, begin), (_, after) in itertools.pairwise(ends)}


def measure(corpus: Sequence[str], vocab_size: int, processes: int, folder: Path) -> dict[str, str]:
    """Prepare and verify once, print a line of the table, and return the hash of every file."""
    phases = Phases()
    recipe = Recipe(corpus=corpus, vocab_size=vocab_size, processes=processes)
    made, prepare_seconds = timed(lambda: prepare(recipe, folder, say=phases))
    parts = phases.seconds()
    found, verify_seconds = timed(lambda: verify(folder, say=print_nothing, processes=processes))
    whole, corpus_seconds = timed(lambda: verify(folder, say=print_nothing, corpus=corpus, processes=processes))
    if found.problems or whole.problems:
        raise SystemExit(f"problems: {found.problems + whole.problems}")
    cells = [
        prepare_seconds, parts["reading"], parts["training"], parts["encoding"], verify_seconds, corpus_seconds,
    ]  # fmt: skip
    print(f"| {processes} | " + " | ".join(f"{seconds:.1f}" for seconds in cells) + " |", flush=True)
    assert made.is_new
    return {path.name: sha256_of(path) for path in folder.iterdir()}


def print_nothing(message: str) -> None:
    """The benchmark prints its table only."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    arguments = parser.parse_args()
    print("| processes | prepare, s | reading | tokenizer | encoding | verify, s | with the corpus |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        hashes = [
            measure(arguments.corpus, arguments.vocab_size, processes, Path(root, str(processes)))
            for processes in arguments.processes
        ]
    same = all(found == hashes[0] for found in hashes)
    print(f"every file the same whatever the number of processes: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
