"""The bundle: the trainer packed into one self-extracting `train_gpt.py`, whose bytes count against the cap.

Modules stay modules: a finder on `sys.meta_path` serves their sources from one Brotli table, so tracebacks,
`inspect.getsource`, torch.compile, Triton and spawned workers see real modules; line numbers are the readable source's.
"""

from __future__ import annotations

import functools
import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

import brotli

import trainer
from orchestrator.errors import CaddieError
from orchestrator.minify import minify

LARGEST_BYTES = 25_000
PACKAGE, ENTRY = "trainer", "main"

# Modules that a run needs, in an order that packs well; `trainer/` holds others that prepare data or probe.
MODULES = (
    "protocol", "graphs", "distributed", "data", "errors", "main", "model", "attention", "train", "gptq", "schedule",
    "muon", "optim", "evaluate", "ttt", "artifact", "fit", "quantize", "kernels", "config",
)  # fmt: skip

# What a run takes on trust (`minify` says what becomes of it). Each check was made on the same values, by this code from
# source, before the run could start: what it guards is written by us, and a run still compares the SHA-256 of data.
CHECKS = (
    "config._require_known",  # when a run is planned: the orchestrator writes a checked Config, whole, into the spec
    "protocol._require_fields",  # the same; and by the worker, which reads the spec before it starts the trainer
    "protocol._require_manifest",  # when a run is planned; the spec holds the manifest's hash
    "data._require_lone_space",  # when a data set is prepared; the manifest holds the tokenizer's hash
    "artifact._require_written",  # needs none: a run reads only the model file that it has just written
)
# Read from a file that states every field. A tuple arrives as a list, as JSON has it.
RECORDS = (
    "config.Section", "config.Config", "protocol.Spec", "protocol.Manifest", "protocol.Split", "protocol.Shard",
)  # fmt: skip

FIRST_DIGIT, DIGITS = 32, 95  # the table is a number, written in the printable characters of ASCII
QUALITY = 11  # Brotli's highest effort
WINDOWS = (17, 18, 20, 22)  # Brotli's, as powers of two: sizes are alike, the numbers are not

LAUNCHER = """\
import importlib.abc as a,importlib.util as u,brotli,sys
n=0
for c in br'''{table}''':n=n*{digits}+c-{first}
t=brotli.decompress(n.to_bytes({size})).decode().split("\\0")
S=dict(zip(t[::2],t[1::2]))
class F(a.ExecutionLoader):
 def find_spec(s,n,*_):
  if n in S:return u.spec_from_loader(n,s)
 def is_package(s,n):return n=="trainer"
 def get_filename(s,n):return"train_gpt.py/"+n.replace(".","/")+".py"
 def get_source(s,n):return S[n]
sys.meta_path.insert(0,F())
if __name__=="__main__":
 from trainer.main import main
 sys.exit(main())
"""


def module_sources(root: Path) -> dict[str, str]:
    """The packed source of each module by its dotted name."""
    readable = {f"{PACKAGE}.{name}": (root / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}
    checks, records = ([f"{PACKAGE}.{name}" for name in names] for names in (CHECKS, RECORDS))
    return {PACKAGE: "", **minify(readable, entry=ENTRY, checks=checks, records=records)}


def as_text(content: bytes) -> str:
    """The number that these bytes are, written in DIGITS."""
    number, digits = int.from_bytes(content), []
    while number:
        number, digit = divmod(number, DIGITS)
        digits.append(chr(FIRST_DIGIT + digit))
    return "".join(reversed(digits))


def is_quotable(text: str) -> bool:
    """Whether br'''...''' can hold the text."""
    return "'''" not in text and not text.endswith(("'", "\\"))


def packings(table: str) -> list[bytes]:
    """The table, packed in several ways, the smallest first; which mode is better, is not known before."""
    modes = (brotli.MODE_GENERIC, brotli.MODE_FONT)  # MODE_TEXT does what the first does
    packed = [
        brotli.compress(table.encode(), mode=mode, quality=QUALITY, lgwin=size) for mode in modes for size in WINDOWS
    ]
    return sorted(packed, key=len)


def launcher(packed: Iterable[bytes]) -> str:
    """The bundle's text around the first table that can be quoted. Raises CaddieError where none can: one in thirty
    cannot, and there are several.
    """
    for content in packed:
        text = as_text(content)
        if is_quotable(text):
            return LAUNCHER.format(table=text, digits=DIGITS, first=FIRST_DIGIT, size=len(content))
    raise CaddieError("no packing of the trainer can be quoted in a Python source", hint="change anything in trainer/")


@functools.cache
def build() -> bytes:
    """The bundle of the installed trainer; the same sources give the same bytes. Raises CaddieError over the limit."""
    sources = module_sources(Path(trainer.__file__).parent)
    table = "\0".join(part for item in sources.items() for part in item)
    bundle = launcher(packings(table)).encode()
    if len(bundle) > LARGEST_BYTES:
        raise CaddieError(f"the bundle has {len(bundle)} bytes, the limit is {LARGEST_BYTES}", hint="shorten trainer/")
    return bundle


def code_state() -> dict[str, str]:
    """Commit and hash of uncommitted changes of the checkout that the trainer comes from; empty outside a checkout."""
    root = Path(trainer.__file__).parent.parent

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
