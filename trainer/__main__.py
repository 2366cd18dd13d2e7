"""`python -m trainer prepare|adopt|verify-data|audit|sizes|target-bytes`: the heavy part of `caddie data`, `caddie audit`
and `caddie report`, in the trainer's own process.

With `--json` the last line of stdout is one object: the outcome, or an error with its kind and hint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import CaddieError, DataError
from trainer.protocol import Manifest, RunDir

INTERRUPTED = 130  # the shell's exit code after Ctrl-C


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m trainer", description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="text to tokenizer, shards and manifest")
    prepare.add_argument("--corpus", nargs="+", required=True, metavar="pydoc|FILE")
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR")
    prepare.add_argument("--vocab-size", type=int, required=True, metavar="N")
    prepare.add_argument("--tokenizer", type=Path, metavar="MODEL")
    share = prepare.add_mutually_exclusive_group()
    share.add_argument("--val-documents", type=int, metavar="N")
    share.add_argument("--val-frac", type=float, metavar="F")
    prepare.add_argument("--shard-tokens", type=int, metavar="N")
    prepare.add_argument("--processes", type=int, metavar="N")
    adopt = commands.add_parser("adopt", help="count published shards and write their manifest")
    adopt.add_argument("data_dir", type=Path, metavar="DIR")
    adopt.add_argument("--variant", required=True, metavar="NAME")
    adopt.add_argument("--source", required=True, metavar="TEXT", help="where they come from, in words")
    adopt.add_argument("--recipe", type=json.loads, required=True, metavar="JSON", help="how they were chosen")
    adopt.add_argument("--stated", type=json.loads, default={}, metavar="JSON", help="the publisher's totals")
    verify = commands.add_parser("verify-data", help="read a data set again and compare it with its manifest")
    verify.add_argument("data_dir", type=Path, metavar="DIR")
    verify.add_argument("--corpus", nargs="+", default=[], metavar="pydoc|FILE")
    verify.add_argument("--processes", type=int, metavar="N")
    audit = commands.add_parser("audit", help="probe a run's stored model on a sample of its validation split")
    audit.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    audit.add_argument("--data", type=Path, required=True, metavar="DIR")
    audit.add_argument("--sample", type=int, required=True, metavar="N", help="positions that whole evaluations score")
    audit.add_argument("--seed", type=int, required=True, metavar="N", help="of everything that is drawn")
    sizes = commands.add_parser("sizes", help="bytes of runs' model files by group of tensors")
    sizes.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    counted = commands.add_parser("target-bytes", help="bytes of text behind the first targets of validation shards")
    counted.add_argument("shards", type=Path, nargs="+", metavar="SHARD")
    counted.add_argument("--tokenizer", type=Path, required=True, metavar="MODEL")
    counted.add_argument("--targets", type=int, nargs="+", default=[], metavar="N")
    for command in (prepare, adopt, verify, audit, sizes, counted):
        command.add_argument("--json", action="store_true", help="the outcome as one JSON object on stdout")
    return top


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Do what was asked for; raises CaddieError."""
    from trainer import prepare, publication, verification  # after the arguments are known to be right: they load torch

    say = prepare.to_stderr
    if arguments.command == "sizes":
        from trainer.sizes import sizes_of

        return sizes_of([RunDir(path) for path in arguments.run_dirs])
    if arguments.command == "target-bytes":
        from trainer.target_bytes import count

        return count(arguments.shards, arguments.tokenizer, arguments.targets)
    if arguments.command == "verify-data":
        found = verification.verify(arguments.data_dir, say=say, corpus=arguments.corpus, processes=arguments.processes)
        return {"data": str(arguments.data_dir), **dataclasses.asdict(found)}
    if arguments.command == "audit":
        from trainer import audit

        sampling = audit.Sampling(arguments.sample, arguments.seed)
        return audit.audit(RunDir(arguments.run_dir.resolve()), arguments.data, sampling=sampling, say=say)
    if arguments.command == "adopt":
        manifest, notes = publication.adopt(
            arguments.data_dir, variant=arguments.variant, source=arguments.source, recipe=arguments.recipe,
            stated=arguments.stated, say=say,
        )  # fmt: skip
        return {"data": str(arguments.data_dir), "notes": notes, "splits": totals(manifest, {})}
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(prepare.Recipe)}
    recipe = prepare.Recipe(**{name: value for name, value in given.items() if value is not None})
    prepared = prepare.prepare(recipe, arguments.out, say=say)
    return {
        "data": str(arguments.out), "is_new": prepared.is_new,
        "splits": totals(prepared.manifest, prepared.raw_bytes),
    }  # fmt: skip


def totals(manifest: Manifest, raw_bytes: Mapping[str, int]) -> dict[str, Any]:
    """What each split comes to; raw bytes where they are known."""
    return {
        name: {
            "documents": split.documents, "tokens": split.tokens, "raw_bytes": raw_bytes.get(name),
            "counted_bytes": split.text_bytes,
        }
        for name, split in manifest.splits.items()
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = parser().parse_args(argv)
    try:
        outcome = run(arguments)
    except CaddieError as error:
        outcome = {"error": str(error), "hint": error.hint, "kind": type(error).__name__}
        code = error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    else:
        code = DataError.exit_code if outcome.get("problems") else 0
    if arguments.json:
        print(json.dumps(outcome))
    else:
        tell(outcome)
    return code


def tell(outcome: dict[str, Any]) -> None:
    """The outcome for people: results to stdout, what is wrong to stderr."""
    for problem in outcome.get("problems", []):
        print(f"problem: {problem}", file=sys.stderr)
    if "error" in outcome:
        print(f"error: {outcome['error']}", file=sys.stderr)
        if outcome["hint"]:
            print(f"hint: {outcome['hint']}", file=sys.stderr)
    elif {"probes", "sizes", "first"} & outcome.keys():
        print(json.dumps(outcome, indent=1))
    elif not outcome.get("problems"):
        print(f"{outcome['data']}: sound" if "problems" in outcome else json.dumps(outcome["splits"]))


if __name__ == "__main__":
    sys.exit(main())
