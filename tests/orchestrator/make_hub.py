"""A stand-in for the Hugging Face hub on loopback, and a published export for it to serve."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np

from trainer.data import BOS
from trainer.prepare import shard_bytes
from trainer.protocol import SPLITS, TRAIN, DataDir, read_manifest

REPO = "somebody/golf"
COMMIT = "c0ffee" + 34 * "0"
LARGE = 4096  # files beyond this are kept apart, known by their SHA-256, and served from another address
PAGE = 3  # entries of one page of a listing


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Hub:
    """The repository that is served, what goes wrong with it, and what was asked for."""

    files: dict[str, bytes]
    faults: dict[str, list[str]] = field(default_factory=dict)
    """By path, what the next requests meet: `drop` half way, a status, `flip` a byte, `hold` until released."""

    requests: list[tuple[str, str]] = field(default_factory=list)
    """Paths of the files that were fetched, with the Range that was asked for."""

    released: threading.Event = field(default_factory=threading.Event)
    endpoint: str = ""

    def fault(self, path: str) -> str:
        return self.faults[path].pop(0) if self.faults.get(path) else ""

    def entries(self) -> list[dict[str, object]]:
        """The repository's tree as the hub lists it."""
        found: list[dict[str, object]] = [{"type": "directory", "path": "datasets", "oid": "0" * 40, "size": 0}]
        for path, content in self.files.items():
            entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if len(content) > LARGE:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            found.append(entry)
        return found


class Handler(BaseHTTPRequestHandler):
    """Speaks as much of the hub's protocol as a download needs."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if match := re.fullmatch(rf"/api/datasets/{REPO}(?:/revision/(.+))?", url.path):
            self._about(match[1])
        elif re.fullmatch(rf"/api/datasets/{REPO}/tree/{COMMIT}", url.path):
            self._tree(int(parse_qs(url.query).get("cursor", ["0"])[0]))
        elif match := re.fullmatch(rf"/datasets/{REPO}/resolve/{COMMIT}/(.+)", url.path):
            self._resolve(match[1])
        elif match := re.fullmatch(r"/elsewhere/(.+)", url.path):
            self._send_file(match[1])
        else:
            self._refuse(404, "RepoNotFound")

    def _about(self, revision: str | None) -> None:
        status = self.hub.fault("about")
        if status:
            self._refuse(int(status), "GatedRepo" if status == "403" else "")
        elif revision in (None, "main", COMMIT):
            self._send_json({"id": REPO, "sha": COMMIT, "siblings": []})
        else:
            self._refuse(404, "RevisionNotFound")

    def _tree(self, first: int) -> None:
        entries = self.hub.entries()
        more = {}
        if first + PAGE < len(entries):
            place = f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive=True&cursor={first + PAGE}"
            more = {"Link": f'<{place}>; rel="next"'}
        self._send_json(entries[first : first + PAGE], more)

    def _resolve(self, path: str) -> None:
        if path not in self.hub.files:
            self._refuse(404, "EntryNotFound")
        elif len(self.hub.files[path]) > LARGE:
            self.send_response(302)
            self.send_header("Location", f"{self.hub.endpoint}/elsewhere/{path}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send_file(path)

    def _send_file(self, path: str) -> None:
        content, asked = self.hub.files[path], self.headers.get("Range", "")
        self.hub.requests.append((path, asked))
        fault = self.hub.fault(path)
        if fault.isdecimal():
            self._refuse(int(fault), "EntryNotFound" if fault == "404" else "")
            return
        if fault == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        begin = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if fault in ("drop", "hold"):
            self.wfile.write(content[begin : (begin + len(content)) // 2])
            self.wfile.flush()
            if fault == "hold":
                self.hub.released.wait(60)
            self.close_connection = True
        else:
            self.wfile.write(content[begin:])

    def _send_json(self, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        for name, value in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free port of loopback."""
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def published(folder: Path, *, shard_tokens: int, variant: str = "sp420", first: int = 0) -> dict[str, bytes]:
    """A prepared data set as its publisher would lay it out: cut where a shard is full, in the midst of documents."""
    manifest = read_manifest(DataDir(folder).manifest)
    name = f"fineweb10B_{variant}"
    files = {
        "README.md": b"# shards\n",
        "datasets/tokenizers/fineweb_420_bpe.model": DataDir(folder).tokenizer.read_bytes(),
    }
    stats = {}
    for split in SPLITS:
        tokens = np.concatenate([
            np.fromfile(folder / shard.file, dtype="<u2", offset=1024) for shard in manifest.splits[split].shards
        ])  # fmt: skip
        stats |= {f"tokens_{split}": len(tokens), f"docs_{split}": int((tokens == BOS).sum())}
        size = shard_tokens if split == TRAIN else len(tokens)
        for number, start in enumerate(range(0, len(tokens), size)):
            path = f"datasets/datasets/{name}/fineweb_{split}_{first + number:06d}.bin"
            files[path] = shard_bytes(tokens[start : start + size])
    listing = {
        "datasets": [{"name": name, "tokenizer_name": "sp_bpe", "stats": stats}],
        "tokenizers": [{"name": "sp_bpe", "model_path": "tokenizers/fineweb_420_bpe.model"}],
    }
    return {**files, "datasets/manifest.json": json.dumps(listing).encode()}
