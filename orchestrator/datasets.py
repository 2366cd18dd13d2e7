"""Data sets: found by name, read off their manifests; fetched, prepared and verified, the counting being done by the
trainer in a process of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainer
from orchestrator import hub
from orchestrator.errors import CaddieError, ConfigError, DataError, MachineError, ProtocolError, StorageError
from orchestrator.home import Home
from trainer.protocol import (
    VALIDATION,
    DataDir,
    Manifest,
    Shard,
    read_manifest,
    require_types,
    sha256_of,
    storage_error,
)

PYDOC = "pydoc"
"""The data set that every machine can make: the documentation that CPython carries."""

PYDOC_VOCAB_SIZE = 1024

ERRORS: dict[str, type[CaddieError]] = {
    error.__name__: error for error in (CaddieError, ConfigError, DataError, ProtocolError, StorageError)
}
"""What the trainer's process can name."""


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A data set as its manifest describes it."""

    root: Path
    manifest: Manifest
    manifest_sha256: str

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size


def manifest_of(data_dir: Path) -> PreparedData:
    """Read a data set's manifest; raises DataError where there is none, ProtocolError where it is damaged."""
    path = DataDir(data_dir).manifest
    if not path.is_file():
        raise DataError(f"{data_dir}: there is no data set", hint="caddie data prepare makes one")
    manifest = read_manifest(path)
    for split in manifest.splits.values():
        for record in (manifest, split, *split.shards):
            require_types(record, path)
    return PreparedData(root=data_dir, manifest=manifest, manifest_sha256=sha256_of(path))


def names(home: Home) -> list[str]:
    """Names of the data sets under CADDIE_HOME; what a preparation is still writing begins with a dot."""
    return sorted(path.name for path in home.data.glob("[!.]*") if DataDir(path).manifest.is_file())


def find(home: Home, name_or_path: str) -> PreparedData:
    """The data set of a study; raises DataError that names the ones there are."""
    root = home.dataset(name_or_path)
    if DataDir(root).manifest.is_file():
        return manifest_of(root)
    known = names(home)
    remedy = f"caddie data prepare --out {name_or_path} --corpus ... makes one"
    raise DataError(
        f"there is no data set {name_or_path!r} at {root}",
        hint=f"there are: {', '.join(known)}; {remedy}" if known else remedy,
    )


def require_vocabulary(data: PreparedData, vocab_size: int) -> None:
    """Raise ConfigError where a model's vocabulary is not the data set's."""
    if data.vocab_size != vocab_size:
        raise ConfigError(
            f"model.vocab_size is {vocab_size}, the data set {data.root} has {data.vocab_size} pieces",
            hint=f"take another data set, or set model.vocab_size to {data.vocab_size}",
        )


def damage(data: PreparedData) -> str | None:
    """The first of the data set's files that is not what the manifest says, in words; None where all are.

    Sizes, and the content of what every run reads whole. The content of the training shards is left to `verify`.
    """
    for name, split in data.manifest.splits.items():
        for shard in split.shards:
            problem = _damage_of_shard(data.root / shard.file, shard, is_hashed=name == VALIDATION)
            if problem is not None:
                return problem
    path = data.root / data.manifest.tokenizer
    if not path.is_file():
        return f"{path}: the tokenizer is missing"
    if sha256_of(path) != data.manifest.tokenizer_sha256:
        return f"{path}: changed bytes: its sha256 is not the manifest's"
    return None


def _damage_of_shard(path: Path, shard: Shard, *, is_hashed: bool) -> str | None:
    if not path.is_file():
        return f"{path}: the shard is missing"
    size = path.stat().st_size
    if size != shard.bytes:
        state = "truncated" if size < shard.bytes else "too long"
        return f"{path}: the shard is {state}: {size:,} bytes, the manifest says {shard.bytes:,}"
    if is_hashed and sha256_of(path) != shard.sha256:
        return f"{path}: changed bytes: its sha256 is not the manifest's"
    return None


def require_sound(data: PreparedData) -> None:
    """Raise DataError where a file of the data set is missing, truncated or changed."""
    problem = damage(data)
    if problem is not None:
        raise DataError(
            problem,
            hint=f"put the file back, or move {data.root} away and fetch or prepare the data set again; "
            "caddie data verify tells all that is wrong",
        )


def ensure_pydoc(home: Home) -> PreparedData:
    """The data set `pydoc`, prepared where it is missing. Raises what `prepare` raises."""
    root = home.dataset(PYDOC)
    if not DataDir(root).manifest.is_file():
        prepare(["--corpus", PYDOC, "--out", str(root), "--vocab-size", str(PYDOC_VOCAB_SIZE)])
    return manifest_of(root)


def prepare(options: Sequence[str]) -> dict[str, Any]:
    """Run `python -m trainer prepare`; its progress goes to stderr. Returns what it made.

    Raises the trainer's DataError, ProtocolError or StorageError; MachineError where the trainer cannot run here.
    """
    return ask_trainer(["prepare", *options])


def verify(data_dir: Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """Run `python -m trainer verify-data`: `problems`, `notes`, and what each of the `splits` comes to. Raises as
    `prepare` does."""
    return ask_trainer(["verify-data", str(data_dir), *options])


# ---- fetching ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Request:
    """A published data set that somebody wants."""

    variant: str
    repo: str
    train_shards: int = hub.TRAIN_SHARDS
    revision: str | None = None
    """Branch, tag or commit; the newest of the main branch where it is left out."""

    prefix: str | None = None
    """Folder of the export, where the repository has several."""

    def __post_init__(self) -> None:
        if self.train_shards < 1:
            raise ConfigError(f"train_shards must be at least 1, got {self.train_shards}", hint="--train-shards 1")

    def recipe(self) -> dict[str, Any]:
        """What is asked for, as the manifest keeps it."""
        return {
            "variant": self.variant, "repo": self.repo, "train_shards": self.train_shards, "prefix": self.prefix
        }  # fmt: skip


def known_repository(variant: str) -> str:
    """Where the records' export of a variant lies; raises ConfigError for another variant."""
    if variant not in hub.REPOSITORIES:
        raise ConfigError(
            f"no repository is known for the variant {variant!r}; known are {', '.join(hub.REPOSITORIES)}",
            hint="name one with --repo OWNER/NAME",
        )
    return hub.REPOSITORIES[variant]


def fetch(request: Request, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Fetch a published data set to `out`, or leave it alone where it is there; what it comes to.

    What has come is kept beside `out` until all is there, so that a fetch can go on where it ended. Raises DataError,
    MachineError, StorageError, ProtocolError.
    """
    if (found := _fetched(request, out)) is not None:
        say(f"{out}: this data set is there already; left as it is")
        return found
    try:
        with _staging(out) as folder:
            repository = hub.list_repository(request.repo, request.revision)
            root = hub.root_of(repository, request.variant, request.prefix)
            stated = hub.read_manifest_of(repository, root, folder.root, say)
            export = hub.find_export(repository, request.variant, request.train_shards, stated, root)
            wanted = {folder.tokenizer: export.tokenizer} | {
                folder.shard(split, number): file
                for split, files in export.shards.items()
                for number, file in enumerate(files)
            }
            _remove_others(folder, wanted)
            size = sum(file.size for file in wanted.values())
            say(f"fetching {export.name} of {export.repo} at {export.commit[:10]}: {len(wanted)} files, {size:,} bytes")
            hub.fetch(export.repo, export.commit, wanted, say)
            outcome = _adopt(folder, request, export, {path.name: file.path for path, file in wanted.items()})
            os.rename(folder.root, out)
    except OSError as error:
        raise storage_error(error, out) from error
    return {**outcome, "data": str(out), "is_new": True}


def _adopt(folder: DataDir, request: Request, export: hub.Export, files: dict[str, str]) -> dict[str, Any]:
    """Let the trainer count what was fetched and write the manifest; what it comes to."""
    recipe = {"asked": request.recipe(), "commit": export.commit, "files": files}
    return ask_trainer([
        "adopt", str(folder.root), "--variant", export.variant, "--stated", json.dumps(export.stated),
        "--source", f"{export.name} of {export.repo} at {export.commit[:10]}", "--recipe", json.dumps(recipe),
    ])  # fmt: skip


def _fetched(request: Request, out: Path) -> dict[str, Any] | None:
    """What the data set at `out` comes to where it is the one that is asked for; raises DataError for anything else."""
    hint = "take another --out, or move it away"
    if not DataDir(out).manifest.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out}: exists and is not a data set", hint=hint)
        return None
    manifest = manifest_of(out).manifest
    revisions = (None, "main", manifest.recipe.get("commit"))
    if manifest.recipe.get("asked") != request.recipe() or request.revision not in revisions:
        raise DataError(f"{out}: another data set is there: {manifest.source}", hint=hint)
    splits = {
        name: {
            "documents": split.documents,
            "tokens": split.tokens,
            "raw_bytes": None,
            "counted_bytes": split.text_bytes,
        }
        for name, split in manifest.splits.items()
    }
    return {"data": str(out), "is_new": False, "notes": [], "splits": splits}


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[DataDir]:
    """A sibling folder that keeps what has come, held by one process at a time."""
    folder = out.with_name(f".{out.name}.fetched")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield DataDir(folder)
    except BlockingIOError as error:
        raise DataError(
            f"{out}: another process is fetching it", hint="wait for it, then run the command again"
        ) from error
    finally:
        os.close(descriptor)


def _remove_others(folder: DataDir, wanted: dict[Path, hub.HubFile]) -> None:
    """Remove what an earlier fetch of something else left."""
    kept = {path.name for path in wanted} | {hub.partial_of(path, file).name for path, file in wanted.items()}
    for path in folder.root.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def ask_trainer(arguments: Sequence[str], **variables: str) -> dict[str, Any]:
    """Run a command of `python -m trainer`, with these variables in its environment, and return what it found.

    Its progress goes to stderr. Raises the trainer's errors; MachineError where it cannot run here.
    """
    source = str(Path(trainer.__file__).parent.parent)
    path = os.pathsep.join(part for part in (source, os.environ.get("PYTHONPATH", "")) if part)
    process = subprocess.run(
        [sys.executable, "-m", "trainer", *arguments, "--json"],
        stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "PYTHONPATH": path, **variables},
    )  # fmt: skip
    try:
        outcome: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise MachineError(
            f"the trainer ended with {process.returncode} and said nothing that can be read",
            hint="its own words are above; is it installed? pip install 'caddie[trainer]'",
        ) from error
    if "error" in outcome:
        raise ERRORS.get(outcome["kind"], CaddieError)(outcome["error"], hint=outcome["hint"])
    return outcome
