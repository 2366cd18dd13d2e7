"""`caddie data`: data sets that are fetched, prepared and verified."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from orchestrator import datasets
from orchestrator.errors import DataError
from orchestrator.home import Home
from orchestrator.terminal import show_json


def data_prepare(arguments: argparse.Namespace, home: Home) -> int:
    home.require_writable()
    out = home.dataset(arguments.out)
    options = ["--corpus", *arguments.corpus, "--out", str(out), "--vocab-size", str(arguments.vocab_size)]
    for name in ("tokenizer", "val_documents", "val_frac", "shard_tokens", "processes"):
        if getattr(arguments, name) is not None:
            options += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return show_data(datasets.prepare(options), arguments)


def data_fetch(arguments: argparse.Namespace, home: Home) -> int:
    home.require_writable()
    request = datasets.Request(
        variant=arguments.variant, repo=arguments.repo or datasets.known_repository(arguments.variant),
        train_shards=arguments.train_shards, revision=arguments.revision, prefix=arguments.prefix,
    )  # fmt: skip
    out = home.dataset(arguments.out or f"fineweb-{arguments.variant}")
    return show_data(datasets.fetch(request, out, lambda line: print(line, file=sys.stderr, flush=True)), arguments)


def data_verify(arguments: argparse.Namespace, home: Home) -> int:
    root = datasets.find(home, arguments.data).root
    options = ["--corpus", *arguments.corpus] if arguments.corpus else []
    options += ["--processes", str(arguments.processes)] if arguments.processes is not None else []
    found = datasets.verify(root, options)
    problems = found["problems"]
    if arguments.json:
        show_json({**found, "data": str(root)})
    else:
        for problem in problems:
            print(f"problem: {problem}", file=sys.stderr)
        show_splits(found)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        print(f"{root}: {count if problems else 'sound'}")
    return DataError.exit_code if problems else 0


def show_data(outcome: dict[str, Any], arguments: argparse.Namespace) -> int:
    """A data set that was made, and where it is."""
    if arguments.json:
        show_json(outcome)
    else:
        show_splits(outcome)
        print(outcome["data"])
    return 0


def show_splits(outcome: dict[str, Any]) -> None:
    """What each split comes to: bytes as the documents were given, where they are known, and as scores count them."""
    for name, split in outcome["splits"].items():
        raw = "" if split["raw_bytes"] is None else f"{split['raw_bytes']:>16,} raw bytes"
        print(
            f"{name:5} {split['documents']:>10,} documents {split['tokens']:>15,} tokens"
            f"{raw}{split['counted_bytes']:>16,} counted bytes"
        )
    for note in outcome.get("notes", []):
        print(f"note: {note}", file=sys.stderr)
