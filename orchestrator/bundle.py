"""The bundle: the trainer packed into one self-extracting `train_gpt.py`, whose bytes count against the cap.

Modules stay modules: a finder on `sys.meta_path` serves their sources from one Brotli table, so tracebacks,
`inspect.getsource`, torch.compile, Triton and spawned workers see real modules; line numbers are the readable source's.
"""

from __future__ import annotations

import functools
import hashlib
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import brotli

import trainer
from orchestrator.errors import CaddieError
from orchestrator.folding import choices, fold
from orchestrator.minify import minify
from trainer.config import Config

ROOT = Path(trainer.__file__).parent
LARGEST_BYTES = 25_000
PACKAGE, ENTRY, CONFIG = "trainer", "main", "config"

# Modules that a run needs, in an order that packs well; `trainer/` holds others that prepare data or probe.
MODULES = (
    "graphs", "checkpoint", "protocol", "data", "main", "train", "distributed", "optim", "calibration", "schedule",
    "quantize", "lora", "ttt", "config", "fit", "gptq", "coding", "errors", "slot", "artifact", "model",
    "attention", "evaluate", "by_document", "muon", "kernels",
)  # fmt: skip

# What a run takes on trust (`minify` says what becomes of it). Each check was made on the same values, by this code from
# source, before the run could start: what it guards is written by us, and a run still compares the SHA-256 of data.
CHECKS = (
    "config._require_known",  # when a run is planned: the orchestrator writes a checked Config, whole, into the spec
    "protocol._require_fields",  # the same; and by the worker, which reads the spec before it starts the trainer
    "protocol._require_protocol",  # the same: a run directory holds the bundle of the code that wrote the spec
    "protocol._require_manifest",  # when a run is planned; the spec holds the manifest's hash
    "data._require_lone_space",  # when a data set is prepared; the manifest holds the tokenizer's hash
)
# Read from a file that states every field. A tuple arrives as a list, as JSON has it.
RECORDS = (
    "config.Section", "config.Config", "protocol.Spec", "protocol.Manifest", "protocol.Split", "protocol.Shard",
)  # fmt: skip

# Written to a file, or handed to somebody, by the names of their fields.
SHOWN = ("protocol.Result", "protocol.Failure", "protocol.Score")

QUALITY = 11  # Brotli's highest effort
WINDOWS = (17, 18, 20, 22)  # Brotli's, as powers of two: sizes are alike, the numbers are not

# The table is a number whose digits are characters of Latin-1: all but NUL, which no source may hold, and CR, which the
# reader of a source takes for LF.
DIGITS, CARRIAGE_RETURN = 254, 13
AT_ONCE = 128  # digits: to take them off the long number one by one takes a second
CODING = "latin-1"

LAUNCHER = """\
#coding:l1
import brotli
n=0
for c in r'''{table}'''.encode("l1"):n=n*{digits}+c-1-(c>{carriage_return})
t=brotli.decompress(n.to_bytes({size})).decode().split("\\0")
exec(t[0])
"""

# Packed before the modules and their names.
FINDER = """\
import importlib.abc as a,importlib.util as u,sys
S=dict(zip(t[1::2],t[2::2]))
class F(a.ExecutionLoader):
 def find_spec(s,n,*_):
  if n in S:return u.spec_from_loader(n,s)
  if n[:8]=="trainer.":raise ModuleNotFoundError("No module named "+repr(n))
 def is_package(s,n):return n=="trainer"
 def get_filename(s,n):return"train_gpt.py/"+n.replace(".","/")+".py"
 def get_source(s,n):return S[n]
sys.meta_path.insert(0,F())
if __name__=="__main__":
 from trainer.main import main
 sys.exit(main())
"""


def module_sources(root: Path, chosen: Mapping[str, str] | None = None) -> dict[str, str]:
    """The packed source of each module by its dotted name, with a configuration's choices folded in; empty ones left out."""
    sources = {f"{PACKAGE}.{name}": (root / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}
    if chosen is not None:
        sources = fold(sources, chosen, entry=ENTRY, table_in=f"{PACKAGE}.{CONFIG}")
    checks, records, shown = ([f"{PACKAGE}.{name}" for name in names] for names in (CHECKS, RECORDS, SHOWN))
    smaller = minify(sources, entry=ENTRY, checks=checks, records=records, shown=shown)
    return {PACKAGE: "", **{name: source for name, source in smaller.items() if source.strip()}}


def as_text(content: bytes) -> str:
    """The number that these bytes are, written in DIGITS."""
    number, digits = int.from_bytes(content), []
    while number:
        number, part = divmod(number, DIGITS**AT_ONCE)
        for _ in range(AT_ONCE):
            part, digit = divmod(part, DIGITS)
            digits.append(digit)
    while digits and not digits[-1]:
        digits.pop()  # zeros before the highest
    return bytes(digit + 1 + (digit + 1 >= CARRIAGE_RETURN) for digit in reversed(digits)).decode(CODING)


def is_quotable(text: str) -> bool:
    """Whether r'''...''' can hold the text."""
    return "'''" not in text and not text.endswith(("'", "\\"))


def packings(table: str) -> list[bytes]:
    """The table, packed in several ways, the smallest first; which mode is better, is not known before."""
    modes = (brotli.MODE_GENERIC, brotli.MODE_FONT)  # MODE_TEXT does what the first does
    packed = [
        brotli.compress(table.encode(), mode=mode, quality=QUALITY, lgwin=size) for mode in modes for size in WINDOWS
    ]
    return sorted(packed, key=len)


def launcher(packed: Iterable[bytes]) -> str:
    """The bundle's text around the first table that can be quoted. Raises CaddieError where none can: one in a hundred
    cannot, and there are several.
    """
    for content in packed:
        text = as_text(content)
        if is_quotable(text):
            return LAUNCHER.format(table=text, digits=DIGITS, carriage_return=CARRIAGE_RETURN, size=len(content))
    raise CaddieError("no packing of the trainer can be quoted in a Python source", hint="change anything in trainer/")


def build(config: Config | None = None) -> bytes:
    """The bundle of the installed trainer for runs of a configuration's choices; the same sources and choices give the
    same bytes. Without a configuration it is for any run, and of any size: it says what the trainer is. Raises
    CaddieError over the limit.
    """
    if config is None:
        return _build(None)
    bundle = _build(tuple(choices(config).items()))
    if len(bundle) > LARGEST_BYTES and not config.runtime.resumable:  # which no record is
        raise CaddieError(f"the bundle has {len(bundle)} bytes, the limit is {LARGEST_BYTES}", hint="shorten trainer/")
    return bundle


@functools.cache
def _build(chosen: tuple[tuple[str, str], ...] | None) -> bytes:
    sources = module_sources(ROOT, None if chosen is None else dict(chosen))
    table = "\0".join([FINDER, *(part for item in sources.items() for part in item)])
    return launcher(packings(table)).encode(CODING)


def code_state() -> dict[str, str]:
    """Commit and hash of uncommitted changes of the checkout that the trainer comes from; empty outside a checkout."""
    root = ROOT.parent

    def git(*arguments: str) -> bytes | None:
        try:
            return subprocess.run(["git", "-C", root, *arguments], capture_output=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None

    commit, changes = git("rev-parse", "HEAD"), git("diff", "HEAD")
    state = {} if commit is None else {"git_sha": commit.decode().strip()}
    if changes:
        state["diff_sha256"] = hashlib.sha256(changes).hexdigest()
    return state
