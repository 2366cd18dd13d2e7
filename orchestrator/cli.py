"""The command line: its parser and its entry. Commands call one function and print: data to stdout, the rest to stderr.

What a command needs is imported when it runs: `caddie --help` loads neither MLflow nor Optuna nor pandas.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from orchestrator import __version__, datasets, hub
from orchestrator.assignments import RECORD_SEEDS
from orchestrator.attempt_commands import demo, replay, run
from orchestrator.data_commands import data_fetch, data_prepare, data_verify
from orchestrator.errors import CaddieError, MachineError
from orchestrator.home import Home, default_home
from orchestrator.record_commands import audit, compare, import_records, package_record, report, review_folder, verify
from orchestrator.retries import NAMEABLE
from orchestrator.study_commands import (
    study_check,
    study_enqueue,
    study_list,
    study_retry,
    study_run,
    study_status,
    study_stop,
)
from orchestrator.terminal import fail, silence
from orchestrator.view_commands import costs, doctor, track, ui
from trainer.protocol import STAGES, storage_error

SAMPLE_POSITIONS = 32_768  # a chunk of test-time training in the challenge's configurations
UI_HOST, UI_PORT = "127.0.0.1", 5000
USAGE = 2  # as argparse has it
OWN_PACKAGES = ("orchestrator", "trainer")
INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + signal, as shells have it
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ESTALE})

Command = Callable[[argparse.Namespace, Home], int]


class Parser(argparse.ArgumentParser):
    """Tells a usage error as every other error is told, with the nearest name or the command's help as its remedy."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)|unrecognized arguments: (\S+)", message)
        word = (unknown[1] or unknown[3] or "") if unknown else ""
        known = re.findall(r"[\w-]+", unknown[2]) if unknown and unknown[2] else list(self._option_string_actions)
        near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"{self.prog} --help"
        print(f"error: {self.prog}: {message}\nhint: {remedy}", file=sys.stderr)
        self.exit(USAGE)


class Adder:
    """Adds commands to a parser, each with its sentence and an example."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(self, name: str, call: Command | None, sentence: str, example: str) -> argparse.ArgumentParser:
        parser = self.commands.add_parser(
            name, help=sentence, description=sentence[0].upper() + sentence[1:] + ".", epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if call is not None:
            parser.set_defaults(call=call, parser=parser)
            parser.add_argument(
                "--home", type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )  # in either place
        return parser


def make_parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="caddie",
        description="Sweeps and record attempts for budgeted language-model training.",
        epilog="example:\n  caddie demo\n  caddie study run studies/wd-qk-ttt-smoke.toml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"caddie {__version__}")
    top.add_argument(
        "--home", type=Path, metavar="DIR", help="where runs, data and views lie (default: CADDIE_HOME, or .caddie)"
    )
    commands = Adder(top)
    commands.add("demo", demo, "a real study on this machine's CPU, from text it has to a record table", "caddie demo")
    _add_data(commands)
    _add_study(commands)
    _add_run(commands)
    _add_replay(commands)
    _add_views(commands)
    return top


def _add_data(top: Adder) -> None:
    commands = Adder(top.add("data", None, "fetch, prepare and verify data sets", "caddie data fetch sp4096"))
    prepare = commands.add(
        "prepare", data_prepare, "text to tokenizer, shards and manifest",
        "caddie data prepare --corpus train.jsonl.xz --out books --vocab-size 4096",
    )  # fmt: skip
    prepare.add_argument("--corpus", nargs="+", default=[datasets.PYDOC], metavar="pydoc|FILE",
                         help="the documentation that Python carries (default), or JSON lines with a text, or plain text; also .xz, .gz, .zst")  # fmt: skip
    prepare.add_argument(
        "--out",
        default=datasets.PYDOC,
        metavar="NAME|DIR",
        help="name under CADDIE_HOME/data, or a folder (default: %(default)s)",
    )
    prepare.add_argument(
        "--vocab-size",
        type=int,
        default=datasets.PYDOC_VOCAB_SIZE,
        metavar="N",
        help="pieces of the tokenizer (default: %(default)s)",
    )
    prepare.add_argument("--tokenizer", metavar="MODEL", help="take this SentencePiece model instead of training one")
    share = prepare.add_mutually_exclusive_group()
    share.add_argument("--val-documents", type=int, metavar="N", help="number of documents kept for validation")
    share.add_argument("--val-frac", type=float, metavar="F", help="share of the documents kept for validation")
    prepare.add_argument("--shard-tokens", type=int, metavar="N", help="most tokens of a shard")
    _add_processes(prepare)
    _add_json(prepare)
    _add_fetch(commands)
    verify = commands.add(
        "verify", data_verify, "read a data set again, whole: checksums, counts, bytes, disjointness",
        "caddie data verify books --corpus train.jsonl.xz",
    )  # fmt: skip
    verify.add_argument("data", metavar="NAME|DIR")
    verify.add_argument(
        "--corpus", nargs="+", metavar="pydoc|FILE",
        help="what it was prepared from: count the documents' own bytes again, without tokens",
    )  # fmt: skip
    _add_processes(verify)
    _add_json(verify)


def _add_fetch(commands: Adder) -> None:
    fetch = commands.add(
        "fetch", data_fetch, "a published export from the Hugging Face hub; goes on where it ended",
        "caddie data fetch sp4096 --train-shards 80",
    )  # fmt: skip
    fetch.add_argument("variant", metavar="VARIANT", help="as the export's folder ends: sp1024, sp4096, sp8192, ...")
    fetch.add_argument(
        "--train-shards", type=int, default=hub.TRAIN_SHARDS, metavar="N",
        help="first N training shards (default: %(default)s); validation always comes whole",
    )  # fmt: skip
    fetch.add_argument("--repo", metavar="OWNER/NAME", help="the hub's data set (default: the one that records use)")
    fetch.add_argument("--revision", metavar="COMMIT", help="branch, tag or commit (default: the newest)")
    fetch.add_argument("--prefix", metavar="DIR", help="the export's folder, where the repository has several")
    fetch.add_argument(
        "--out", metavar="NAME|DIR", help="name under CADDIE_HOME/data, or a folder (default: fineweb-VARIANT)"
    )
    _add_json(fetch)


def _add_study(top: Adder) -> None:
    commands = Adder(
        top.add(
            "study",
            None,
            "search: run, continue, look at and stop studies",
            "caddie study run studies/wd-qk-ttt-smoke.toml",
        )
    )
    for name, call, sentence in (
        ("check", study_check, "check a study completely and submit nothing"),
        ("run", study_run, "run a study, or continue it to its total budget"),
    ):
        parser = commands.add(name, call, sentence, f"caddie study {name} studies/wd-qk-ttt-smoke.toml")
        parser.add_argument("file", type=Path, metavar="FILE", help="a study file, or the name of a shipped one")
        if name == "check":
            _add_json(parser)
        else:
            parser.add_argument(
                "--dry-run", action="store_true", help="print the plan, its hours and its price, and submit nothing"
            )
            parser.add_argument(
                "--until",
                default="",
                metavar="RUNG",
                help="of a ladder: end after this rung; without it, after the last",
            )
            _add_controller(parser)
    _add_enqueue(commands)
    for name, call, sentence in (
        ("status", study_status, "where a study stands"),
        ("stop", study_stop, "end a study after its running jobs"),
    ):
        parser = commands.add(name, call, sentence, f"caddie study {name} wd-qk-ttt-smoke")
        parser.add_argument("study", metavar="STUDY", help="a study's name")
        if name == "status":
            _add_json(parser)
        else:
            parser.add_argument("--cancel", action="store_true", help="stop the running jobs as well")
    _add_retry(commands)
    _add_json(commands.add("list", study_list, "every study and where it stands", "caddie study list"))


def _add_retry(commands: Adder) -> None:
    sentence = "attempt a study's failed runs again, once their cause is mended"
    parser = commands.add("retry", study_retry, sentence, "caddie study retry wd-qk-ttt-smoke")
    parser.add_argument("study", metavar="STUDY", help="a study's name")
    parser.add_argument(
        "--failure", action="append", default=[], choices=sorted(NAMEABLE), metavar="KIND",
        help=f"trials too that failed of themselves in this way: {', '.join(sorted(NAMEABLE))}; may be repeated",
    )  # fmt: skip


def _add_enqueue(commands: Adder) -> None:
    parser = commands.add(
        "enqueue", study_enqueue, "try a point next: by hand, or as another study, record, preset or run had it",
        "caddie study enqueue wd-qk-ttt-smoke --set model.qk_gain=4.5",
    )  # fmt: skip
    parser.add_argument("study", metavar="STUDY", help="a study's name, or its file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KNOB=VALUE",
        help="a knob of the point; may be repeated, the others are the preset's",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="source", metavar="SOURCE",
        help="a study's best trials (STUDY, or STUDY:trial-3), an imported record (imports/NAME), a preset or a run",
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=1, metavar="N", help="so many of another study's best trials")


def _add_run(top: Adder) -> None:
    parser = top.add(
        "run", run, "a record attempt: one configuration on several seeds",
        f"caddie run pr1326 --seeds {RECORD_SEEDS} --set optim.muon_weight_decay=0.08 --data fineweb-sp4096 --gpus 8",
    )  # fmt: skip
    parser.add_argument("preset", nargs="?", metavar="PRESET", help="a shipped preset, or a TOML file")
    parser.add_argument(
        "--from", dest="from_run", metavar="RUN,RUN",
        help="train nothing: score the stored models of these runs, or of a study's, with other knobs of ttt, evaluation or quant",
    )  # fmt: skip
    parser.add_argument(
        "--seeds",
        metavar="N,N,N",
        help=f"default: {RECORD_SEEDS}; with --from the runs' own",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KNOB=VALUE", help="change a knob; may be repeated"
    )
    parser.add_argument(
        "--data", metavar="NAME|DIR", help=f"data set (default: {datasets.PYDOC}; with --from the run's own)"
    )
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs of one run; 0 runs on the CPU (default)")
    parser.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="runs at a time on the CPU; in Slurm jobs at a time (default: every seed)",
    )
    parser.add_argument(
        "--timeout-minutes", type=float, metavar="MINUTES",
        help="end an attempt after this (default: 60; in Slurm the budgets of training and evaluation, and a margin)",
    )  # fmt: skip
    _add_cluster(parser)
    parser.add_argument("--name", help="name of the record (default: from what is asked)")
    _add_interleave(parser)
    _add_controller(parser)


def _add_replay(top: Adder) -> None:
    parser = top.add(
        "replay", replay, "somebody's own script as a record attempt, its numbers beside its folder's claim",
        "caddie replay parameter-golf/records/track_10min_16mb/2026-03-17_NaiveBaseline --data fineweb-sp1024 --gpus 8",
    )  # fmt: skip
    parser.add_argument("script", type=Path, metavar="SCRIPT|DIR", help="a script, or a folder with a train_gpt.py")
    parser.add_argument("--look", action="store_true", help="only tell which variables it looks at, by its text")
    parser.add_argument("--seeds", metavar="N,N,N", help=f"default: {RECORD_SEEDS}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="set a variable (MUON_WD=0.09), or a limit of the orchestrator's (limits.eval_seconds=600); may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--as-logged",
        action="store_true",
        help="take the settings that the record's logs have otherwise than the script",
    )
    parser.add_argument(
        "--data", metavar="NAME|DIR",
        help=f"data set, or a folder that has datasets/ and tokenizers/ as the challenge lays them out (default: {datasets.PYDOC})",
    )  # fmt: skip
    parser.add_argument(
        "--stage", choices=STAGES, help="take the score at this stage (default: the claim's, else the last in its text)"
    )
    parser.add_argument(
        "--against", metavar="DIR", help="compare with this record (default: the one of the script's own folder)"
    )
    parser.add_argument(
        "--gpus", type=int, default=0, metavar="N", help="GPUs of one run, under torchrun; 0 runs on the CPU"
    )
    parser.add_argument("--slots", type=int, metavar="N", help="runs at a time on the CPU; in Slurm jobs at a time")
    parser.add_argument("--timeout-minutes", type=float, metavar="MINUTES", help="end an attempt after this")
    _add_cluster(parser)
    parser.add_argument("--name", help="name of the record (default: from what is asked)")
    _add_controller(parser)
    _add_json(parser)


def _add_interleave(parser: argparse.ArgumentParser) -> None:
    """A candidate beside the preset."""
    group = parser.add_argument_group("beside another configuration, by turns on one node")
    group.add_argument(
        "--interleave", action="store_true", help="run preset and candidate by turns, seed by seed, ABBA"
    )
    group.add_argument(
        "--against", metavar="PRESET|DIR",
        help="with --interleave the candidate, a preset or a TOML file; without it a public record, by its folder or as it was "
        "imported: its numbers are put beside the run's",
    )  # fmt: skip
    group.add_argument(
        "--set-against", action="append", default=[], metavar="KNOB=VALUE", help="change a knob of the candidate alone"
    )
    group.add_argument(
        "--max-gap",
        type=float,
        metavar="SHARE",
        help="most by which a block's steps per second may differ (default: 0.02)",
    )
    group.add_argument(
        "--throughput", choices=("equal", "median"),
        help="what a block's speeds are compared with: one another (default), or the median block's ratio",
    )  # fmt: skip


def _add_controller(parser: argparse.ArgumentParser) -> None:
    """Where the controller itself runs."""
    parser.add_argument(
        "--detach", action="store_true", help="go on without this terminal, as a process of its own on this machine"
    )
    parser.add_argument(
        "--as-job", action="store_true", help="go on as a job of the cluster (Slurm), which queues its own successor"
    )
    parser.add_argument(
        "--job-options", default="", metavar="OPTIONS",
        help="for sbatch with --as-job: --job-options='--partition=cpu --time=12:00:00'",
    )  # fmt: skip


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    """Where runs go, as in a study's [resources]."""
    group = parser.add_argument_group("on a cluster")
    group.add_argument(
        "--launcher", choices=("local", "slurm"), help="this machine (default), or a job of Slurm's for each run"
    )
    group.add_argument("--nodes", type=int, metavar="N", help="nodes of one run; --gpus are the run's, on all of them")
    for name, words in (
        ("partition", "partition of the cluster"),
        ("account", "account that pays"),
        ("qos", "quality of service"),
        ("constraint", "features that a node must have"),
        ("python", "interpreter of the trainer on the nodes (default: caddie's own)"),
    ):
        group.add_argument(f"--{name}", metavar="NAME" if name != "python" else "PATH", help=words)
    group.add_argument("--exclusive", action="store_true", help="share the nodes with no other job")
    group.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION[=VALUE]",
        help="further options of sbatch by their long names; may be repeated",
    )  # fmt: skip


def _add_views(top: Adder) -> None:
    parser = top.add("report", report, "record table, page and data of a study", "caddie report wd-qk-ttt-smoke")
    parser.add_argument("study", metavar="STUDY")
    parser.add_argument(
        "--against", metavar="B", help="compare with this, as `caddie compare` takes it (default: the study's preset)"
    )
    parser.add_argument(
        "--gate", action="append", default=[], metavar="NAME",
        help="apply this rule alone; may be repeated (default: the challenge's rules)",
    )  # fmt: skip
    _add_json(parser)
    _add_compare(top)
    _add_verify(top)
    _add_records(top)
    parser = top.add(
        "costs", costs, "GPU-hours and price by study, purpose and phase, and what an accepted improvement cost",
        "caddie costs wd-qk-ttt-smoke",
    )  # fmt: skip
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="default: every study")
    _add_json(parser)
    parser = top.add("ui", ui, "MLflow's pages on what has been run", f"caddie ui --port {UI_PORT}")
    parser.add_argument(
        "--host", default=UI_HOST, help="address to listen on (default: %(default)s, this machine only)"
    )
    parser.add_argument("--port", type=int, default=UI_PORT, help="default: %(default)s")
    parser = top.add("track", track, "bring MLflow up to date with the run directories", "caddie track --rebuild")
    parser.add_argument("--rebuild", action="store_true", help="make MLflow's database again from nothing")
    _add_json(
        top.add("doctor", doctor, "what this machine can do, what is missing, and what mends it", "caddie doctor")
    )


def _add_compare(top: Adder) -> None:
    parser = top.add(
        "compare", compare, "one arm against another: which rule is met, by how much, and how many seeds are missing",
        "caddie compare wd-qk-ttt-smoke wd-qk-ttt-smoke:preset --paired",
    )  # fmt: skip
    arm = (
        "a study (its best point) or STUDY:ARM, RUN[,RUN...], an imported record or a record's folder, a published record "
        "(pr1493), a score, or scores as N,N,N"
    )
    parser.add_argument("candidate", metavar="A", help=arm)
    parser.add_argument("baseline", metavar="B", help="what A should beat, in the same words")
    parser.add_argument(
        "--gate", action="append", default=[], metavar="NAME",
        help="apply this rule alone, and exit with 10 where it is not met; may be repeated (default: the challenge's rules)",
    )  # fmt: skip
    parser.add_argument("--paired", action="store_true", help="pair by seed, also where an arm is not ours")
    parser.add_argument("--stage", choices=STAGES, help="compare this stage (default: the last that the runs have)")
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="published split whose tokens and bytes turn nats into bits per byte: sp8192, ...",
    )
    _add_json(parser)


def _add_records(top: Adder) -> None:
    parser = top.add(
        "import", import_records, "record folders of others: their scores, where each stands, and a leaderboard of a tree of them",
        "caddie import parameter-golf/records",
    )  # fmt: skip
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a record's folder, or a tree of them")
    parser.add_argument("--details", action="store_true", help="every record's seeds, with the line of each score")
    parser.add_argument("--csv", action="store_true", help="print the leaderboard as CSV")
    parser.add_argument("--no-mlflow", action="store_true", help="leave MLflow as it is; `caddie track` catches up")
    _add_json(parser)
    parser = top.add(
        "package", package_record, "the submission folder of a record, made from its runs and reviewed",
        "caddie package record-pr1326-1a2b3c4d --out my-record --author APlayer --github-id aplayer",
    )  # fmt: skip
    parser.add_argument("record", metavar="RECORD", help="a study's name, with :ARM for another than its best point")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--author", required=True, help="your name, as the leaderboard shows it")
    parser.add_argument("--github-id", required=True, metavar="ID", help="your name on GitHub")
    parser.add_argument("--name", default="", help="of the record (default: from its preset and knobs)")
    parser.add_argument("--blurb", default="", metavar="TEXT", help="what is new (default: the study's question)")
    parser.add_argument(
        "--track", default="", choices=("10min_16mb", "non_record_16mb"), metavar="TRACK",
        help="10min_16mb or non_record_16mb (default: by the hardware of its runs)",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true", help="score each seed's model file again in an empty directory first"
    )
    parser.add_argument("--data", metavar="NAME|DIR", help="another copy of the data set for --verify")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs for --verify (default: as the runs had)")
    parser.add_argument(
        "--timeout-minutes",
        type=float,
        default=60.0,
        metavar="MINUTES",
        help="of one evaluation (default: %(default)s)",
    )
    _add_json(parser)
    parser = top.add(
        "review", review_folder, "check a submission folder as its reader would: files, sizes, seeds, source, numbers",
        "caddie review parameter-golf/records/track_10min_16mb/2026-04-09_A2_Muon097_3Seed",
    )  # fmt: skip
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds that it needs (default: %(default)s)")
    _add_json(parser)


def _add_verify(top: Adder) -> None:
    parser = top.add(
        "verify", verify, "check a run's files, and score its artifact again in an empty directory without network",
        "caddie verify 3f2a --data fineweb-sp4096",
    )  # fmt: skip
    _add_examined(parser)
    parser = top.add(
        "audit", audit, "probe whether a run's scores mean what they say: causality, order, coverage, bytes, limits",
        "caddie audit 3f2a --sample 65536",
    )  # fmt: skip
    _add_examined(parser)
    parser.add_argument(
        "--sample", type=int, default=SAMPLE_POSITIONS, metavar="N",
        help="positions of the split that are probed (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (default: %(default)s)")
    parser.add_argument(
        "--no-evaluation", action="store_true", help="leave out the watched evaluation of the whole split"
    )


def _add_examined(parser: argparse.ArgumentParser) -> None:
    """The run that is looked at, and how its bundle is run for it."""
    parser.add_argument("run", metavar="RUN", help="a run's id, the beginning of one, or a run's directory")
    parser.add_argument("--data", metavar="NAME|DIR", help="another copy of the data set (default: the run's own)")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs to score on; 0 for the CPU (default: as the run had)"
    )
    parser.add_argument(
        "--timeout-minutes",
        type=float,
        default=60.0,
        metavar="MINUTES",
        help="end the evaluation after this (default: %(default)s)",
    )
    _add_json(parser)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, metavar="N", help="processes to work with (default: one a processor)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of text")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; see `trainer.errors` and `orchestrator.errors`."""
    arguments, unknown = make_parser().parse_known_args(argv)
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.words = list(sys.argv[1:] if argv is None else argv)  # for a command that gives itself again
    try:
        home = Home(arguments.home.expanduser().resolve()) if arguments.home else default_home()
        code: int = arguments.call(arguments, home)
        sys.stdout.flush()
        return code
    except CaddieError as error:
        return fail(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OWN_PACKAGES:
            raise  # a fault of ours
        return fail(
            MachineError(
                f"{error.name} is not installed in {sys.prefix}, and this command needs it",
                hint="pip install 'caddie[orchestrator]'; caddie doctor says all that is missing here",
            )
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, `head` say, had enough
        silence(sys.stdout)
        return PIPE_CLOSED
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return fail(storage_error(error, Path(error.filename or _place_of_output())))


def _place_of_output() -> str:
    """Where a command's output goes, where that takes nothing; else the current directory."""
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)
        return "/dev/stdout"
    return "."


if __name__ == "__main__":
    sys.exit(main())
