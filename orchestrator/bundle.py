"""The bundle: the trainer packed into one self-extracting `train_gpt.py`, whose bytes count against the cap.

Modules stay modules: a finder on `sys.meta_path` serves their sources from one LZMA table, so tracebacks,
`inspect.getsource`, torch.compile, Triton and spawned workers see real modules; line numbers are the readable source's.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import lzma
import subprocess
from pathlib import Path

import trainer
from orchestrator.errors import CaddieError
from orchestrator.minify import minify

LARGEST_BYTES = 25_000
PACKAGE, ENTRY = "trainer", "main"

# Modules that a run needs, in an order that packs well; `trainer/` holds others that prepare data or probe.
MODULES = (
    "errors", "config", "protocol", "distributed", "artifact", "data", "schedule", "attention", "model", "optim", "muon",
    "gptq", "train", "evaluate", "ttt", "main",
)  # fmt: skip

FILTERS = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "pb": 0}]

LAUNCHER = """\
import base64,importlib.util as u,lzma,sys
t=lzma.decompress(base64.b85decode("{table}")).decode().split("\\0")
S=dict(zip(t[::2],t[1::2]))
class F:
 def find_spec(s,n,p=None,m=None):
  if n in S:
   return u.spec_from_file_location(n,"train_gpt.py/"+n.replace(".","/")+".py",loader=s,submodule_search_locations=[]if n=="trainer"else None)
 def create_module(s,m):0
 def exec_module(s,m):exec(compile(S[m.__name__],m.__file__,"exec"),m.__dict__)
 def get_source(s,n):return S[n]
sys.meta_path.insert(0,F())
if __name__=="__main__":
 from trainer.main import main
 sys.exit(main())
"""


def module_sources(root: Path) -> dict[str, str]:
    """The packed source of each module by its dotted name."""
    readable = {f"{PACKAGE}.{name}": (root / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}
    return {PACKAGE: "", **minify(readable, entry=ENTRY)}


@functools.cache
def build() -> bytes:
    """The bundle of the installed trainer; the same sources give the same bytes. Raises CaddieError over the limit."""
    sources = module_sources(Path(trainer.__file__).parent)
    table = "\0".join(part for item in sources.items() for part in item)
    packed = base64.b85encode(lzma.compress(table.encode(), lzma.FORMAT_ALONE, filters=FILTERS)).decode()
    bundle = LAUNCHER.format(table=packed).encode()
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
