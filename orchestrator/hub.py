"""Published exports of tokenised text on the Hugging Face hub: found, fetched piece by piece, each file proved by its hash.

<root>/manifest.json                                   names the tokenizer of each data set, and its totals
<root>/datasets/fineweb10B_<variant>/fineweb_{train,val}_<number>.bin
<root>/tokenizers/fineweb_<pieces>_bpe.model
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from orchestrator.errors import CaddieError, DataError, MachineError, StorageError
from trainer.protocol import TRAIN, VALIDATION, DataDir, storage_error

REPOSITORIES = {
    "sp1024": "willdepueoai/parameter-golf",
    "sp4096": "kevclark/parameter-golf",
    "sp8192": "kevclark/parameter-golf",
}
"""Where the exports lie that the challenge's records use."""

TRAIN_SHARDS = 80  # what most records load; of 100,000,000 tokens each

FILES_AT_A_TIME = 4
ATTEMPTS = 6
FIRST_WAIT_SECONDS = 1.0  # before the second attempt at a file; doubled for each that follows
PROGRESS_SECONDS = 2.0  # between two lines on how far it is
WAIT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})  # of a server that may do it later

SHARD = re.compile(
    r"(?:.*/)?(?P<name>fineweb[^/_]*_(?P<variant>[^/]+))/fineweb_(?P<split>train|val)_(?P<number>\d+)\.bin"
)
MANIFEST = DataDir(Path()).manifest.name  # publishers call theirs as we call ours
SIDE_CAR = "fineweb_val_bytes_"  # begins the name of a file with each target's bytes, where a table does not give them

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class HubFile:
    """One file of a repository at one commit."""

    path: str
    size: int
    hash: str
    """SHA-256 of a large file's bytes; of a small one's, the SHA-1 that git gives it."""

    def is_content(self, path: Path) -> bool:
        """Whether a local file is this one, by its bytes."""
        if path.stat().st_size != self.size:
            return False
        with path.open("rb") as file:
            if len(self.hash) == hashlib.sha256().digest_size * 2:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.hash
            digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            return digest.hexdigest() == self.hash


@dataclass(frozen=True)
class Export:
    """A published data set as it is to be fetched."""

    repo: str
    commit: str
    variant: str
    name: str
    tokenizer: HubFile
    shards: Mapping[str, Sequence[HubFile]]
    """By split; of the training split those that were asked for."""

    stated: dict[str, int]
    """What the publisher's manifest says of it: `docs_val`, `tokens_val` and the like."""


@dataclass(frozen=True)
class Repository:
    """The files of a repository at one commit."""

    repo: str
    commit: str
    files: Mapping[str, HubFile]


# ---- finding -----------------------------------------------------------------------------------------------------


def list_repository(repo: str, revision: str | None) -> Repository:
    """Ask the hub for the files of a data set's repository. Raises DataError, MachineError."""
    return _patiently(repo, lambda: _listed(repo, revision), threading.Event())


def _listed(repo: str, revision: str | None) -> Repository:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    commit = api.dataset_info(repo, revision=revision).sha
    assert commit is not None  # the hub leaves it out only where it is asked to
    entries = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")
    files = [
        HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in entries
        if isinstance(entry, RepoFile)
    ]
    return Repository(repo, commit, {file.path: file for file in files})


def find_export(found: Repository, variant: str, train_shards: int, manifest: Mapping[str, Any], root: str) -> Export:
    """The export of a variant under `root`, by the publisher's manifest there. Raises DataError."""
    shards: dict[str, dict[int, HubFile]] = {TRAIN: {}, VALIDATION: {}}
    for path, match in _shards(found):
        if match["variant"] == variant and _root(path) == root:
            shards[match["split"]][int(match["number"])] = found.files[path]
            name = match["name"]
    chosen = {split: _consecutive(numbered, split, found) for split, numbered in shards.items()}
    available = len(chosen[TRAIN])
    if train_shards > available:
        raise DataError(
            f"{found.repo} has {available} training shards of {variant}, {train_shards} were asked for",
            hint=f"--train-shards {available}",
        )
    entry = _entry(manifest.get("datasets"), name)
    stats = entry.get("stats")
    return Export(
        repo=found.repo, commit=found.commit, variant=variant, name=name,
        tokenizer=_tokenizer(found, variant, root, manifest, str(entry.get("tokenizer_name"))),
        shards={TRAIN: chosen[TRAIN][:train_shards], VALIDATION: chosen[VALIDATION]},
        stated={k: v for k, v in stats.items() if isinstance(v, int)} if isinstance(stats, dict) else {},
    )  # fmt: skip


def root_of(found: Repository, variant: str, prefix: str | None) -> str:
    """The folder that a variant's export lies in; raises DataError where there is none, several, or none of use."""
    variants = {match["variant"] for _, match in _shards(found)}
    if variant not in variants:
        known = f"it has: {', '.join(sorted(variants))}" if variants else "it has no shards of the challenge's layout"
        raise DataError(f"{found.repo} has no variant {variant!r}; {known}", hint="name another with --repo")
    roots = {_root(path) for path, match in _shards(found) if match["variant"] == variant}
    if prefix is not None:
        roots &= {prefix.strip("/")}
    if len(roots) != 1:
        lies = "in several folders: " + ", ".join(sorted(roots)) if roots else f"not under {prefix!r}"
        raise DataError(f"{found.repo} has {variant} {lies}", hint="name one folder with --prefix")
    root = roots.pop()
    if any(SIDE_CAR in path and f"_{variant}/" in path for path in found.files):
        raise DataError(
            f"{found.repo}: {variant} is a transformed text, whose bytes per token stand in a file of their own; by the "
            "tokenizer's pieces too many bytes would be counted, and scores would come out too low",
            hint="take a variant of plain text: sp1024, sp4096, sp8192",
        )
    return root


def manifest_file(found: Repository, root: str) -> HubFile | None:
    """The publisher's manifest of an export, where there is one."""
    return found.files.get(_under(root, MANIFEST))


def _shards(found: Repository) -> Iterator[tuple[str, re.Match[str]]]:
    for path in found.files:
        if match := SHARD.fullmatch(path):
            yield path, match


def _root(path: str) -> str:
    """The folder of the manifest: above the data set's folder, and above `datasets` where that stands between."""
    above = PurePosixPath(path).parents[1]
    root = str(above.parent if above.name == "datasets" else above)
    return "" if root == "." else root


def _under(root: str, path: str) -> str:
    return str(PurePosixPath(root, path))


def _consecutive(numbered: Mapping[int, HubFile], split: str, found: Repository) -> list[HubFile]:
    """Shards in the order of their numbers; raises DataError where one is missing."""
    numbers = sorted(numbered)
    if not numbers:
        raise DataError(f"{found.repo} has no {split} shards of this variant", hint="name another with --repo")
    for number, next_number in itertools.pairwise(numbers):
        if next_number != number + 1:
            raise DataError(
                f"{found.repo}: {split} shard {number + 1} is missing between {number} and {next_number}",
                hint="name another repository with --repo, or another --revision",
            )
    return [numbered[number] for number in numbers]


def _entry(entries: object, name: str) -> Mapping[str, Any]:
    """The entry of that name in a list of the publisher's manifest."""
    listed = entries if isinstance(entries, list) else []
    return next((entry for entry in listed if isinstance(entry, dict) and entry.get("name") == name), {})


def _tokenizer(found: Repository, variant: str, root: str, manifest: Mapping[str, Any], name: str) -> HubFile:
    """The SentencePiece model of a variant: the one that the manifest names, else the one that the layout gives it."""
    stated = _entry(manifest.get("tokenizers"), name).get("model_path")
    pieces = re.sub(r"\D", "", variant)
    usual = f"tokenizers/fineweb_{pieces}_bpe.model"
    for path in (stated, usual):
        if isinstance(path, str) and (file := found.files.get(_under(root, path))) is not None:
            return file
    raise DataError(
        f"{found.repo} has no SentencePiece model for {variant}: neither its manifest names one, nor is there "
        f"{_under(root, usual)}",
        hint="only variants of SentencePiece tokenizers can be used",
    )


# ---- fetching ----------------------------------------------------------------------------------------------------


def read_manifest_of(found: Repository, root: str, folder: Path, say: Say) -> Mapping[str, Any]:
    """The publisher's manifest, or nothing where there is none. Raises as `fetch` does, DataError where it is no JSON."""
    file = manifest_file(found, root)
    if file is None:
        return {}
    path = folder / ".published"
    fetch(found.repo, found.commit, {path: file}, say)
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise DataError(f"{found.repo}: {file.path} is damaged: {error}", hint="name another --revision") from error
    finally:
        path.unlink()
    return content


def fetch(repo: str, commit: str, wanted: Mapping[Path, HubFile], say: Say) -> None:
    """Fetch files to their places, some at a time. What is there already, whole or in part, is not fetched again.

    Raises DataError for a file that stays damaged or that the hub refuses, MachineError where the hub cannot be reached,
    StorageError.
    """
    _require_space(wanted)
    stopped = threading.Event()
    with ThreadPoolExecutor(FILES_AT_A_TIME) as executor:
        futures = [executor.submit(_fetch_file, repo, commit, file, path, stopped) for path, file in wanted.items()]
        try:
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=PROGRESS_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if pending:
                    say(_how_far(wanted))
        finally:
            stopped.set()
            executor.shutdown(cancel_futures=True)


def _require_space(wanted: Mapping[Path, HubFile]) -> None:
    for folder in {path.parent for path in wanted}:
        missing = sum(file.size for path, file in wanted.items() if path.parent == folder) - _bytes_there(wanted)
        free = shutil.disk_usage(folder).free
        if missing > free:
            raise StorageError(
                f"{folder}: {missing:,} bytes are still to be fetched, the disk has {free:,} free",
                hint="free some space, set CADDIE_HOME to a larger disk, or ask for fewer --train-shards",
            )


def partial_of(path: Path, file: HubFile) -> Path:
    """Where a file is kept while it comes; named by its content, so that no other is continued with it."""
    return path.with_name(f".{path.name}.{file.hash[:16]}.partial")


def _bytes_there(wanted: Mapping[Path, HubFile]) -> int:
    return sum(_size(place) for path, file in wanted.items() for place in (path, partial_of(path, file)))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # not begun, or moved to its place while one looks
        return 0


def _how_far(wanted: Mapping[Path, HubFile]) -> str:
    done = sum(path.exists() for path in wanted)
    size = sum(file.size for file in wanted.values())
    return f"fetching: {done} of {len(wanted)} files, {_bytes_there(wanted) / 1e6:,.1f} of {size / 1e6:,.1f} MB"


def _fetch_file(repo: str, commit: str, file: HubFile, path: Path, stopped: threading.Event) -> None:
    """Fetch one file. Raises as `fetch` does."""
    if not (path.exists() and file.is_content(path)):
        _patiently(f"{repo}: {file.path}", lambda: _continue(repo, commit, file, path, stopped), stopped)


def _continue(repo: str, commit: str, file: HubFile, path: Path, stopped: threading.Event) -> None:
    """Fetch what is missing of a file and put it into its place where its hash is right; else raises Damaged."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars  # type: ignore[attr-defined]  # no __all__

    disable_progress_bars()
    partial = partial_of(path, file)
    if _size(partial) > file.size:
        partial.unlink()
    url = hf_hub_url(repo, file.path, repo_type="dataset", revision=commit)
    with Partial(partial, stopped) as content:
        http_get(url, content, resume_size=content.tell(), headers=build_hf_headers(), expected_size=file.size)
    if not file.is_content(partial):
        partial.unlink()
        raise Damaged(f"what was fetched is not what the hub lists: its hash is not {file.hash}")
    partial.replace(path)


class Partial(io.BufferedWriter):
    """A file that is appended to until somebody stops it."""

    def __init__(self, path: Path, stopped: threading.Event) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self.stopped = stopped

    def write(self, content: Any) -> int:
        if self.stopped.is_set():
            raise CaddieError("the fetch was stopped")
        return super().write(content)


# ---- failing -----------------------------------------------------------------------------------------------------


class Later(Exception):
    """The hub could not be reached, or not just now."""


class Damaged(Exception):
    """A file came whole and was not the right one."""


def _patiently(what: str, ask: Callable[[], T], stopped: threading.Event) -> T:
    """Ask the hub until it answers or patience ends. Raises DataError, MachineError, StorageError."""
    for attempt in range(ATTEMPTS - 1):
        try:
            with _told(what):
                return ask()
        except (Later, Damaged):
            if stopped.wait(FIRST_WAIT_SECONDS * 2**attempt):
                break
    try:
        with _told(what):
            return ask()
    except Later as error:
        raise MachineError(
            f"{what}: {error}; tried {ATTEMPTS} times",
            hint="what was fetched is kept: run the command again when there is a connection",
        ) from error
    except Damaged as error:
        raise DataError(
            f"{what}: {error}; tried {ATTEMPTS} times", hint="a proxy may change files: try another connection"
        ) from error


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn what the hub's library raises into an error of ours, or into Later."""
    try:
        import httpx2
        from huggingface_hub import errors
    except ImportError as error:
        raise MachineError(
            "huggingface_hub is not installed, or older than 2", hint="pip install 'caddie[orchestrator]'"
        ) from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell each retry with the whole address
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise MachineError(
            f"{what}: HF_HUB_OFFLINE is set, nothing is fetched", hint="unset it, or fetch on a machine with a network"
        ) from error
    except errors.HFValidationError as error:
        raise DataError(f"{what}: not a repository's id: {error}", hint="--repo OWNER/NAME") from error
    except errors.GatedRepoError as error:
        raise DataError(
            f"{what}: its owner gives access on request", hint="ask on its page, then set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"{what}: the hub has no such data set, or shows it to its members only",
            hint="check --repo; for a private one set HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"{what}: the repository has no such revision", hint="check --revision") from error
    except errors.RemoteEntryNotFoundError as error:
        raise DataError(
            f"{what}: the hub lists this file and does not have it", hint="name another --revision"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in WAIT_STATUS:
            raise Later(f"the hub answered {status}") from error
        raise DataError(f"{what}: the hub refuses with {status}", hint="check HF_TOKEN and HF_ENDPOINT") from error
    except httpx2.HTTPError as error:
        raise Later(f"the hub cannot be reached: {error}") from error
    except OSError as error:
        if error.errno is None:  # the library's own, for a file that ended early
            raise Later(str(error).partition("\n")[0]) from error
        raise storage_error(error, Path(error.filename or what)) from error
