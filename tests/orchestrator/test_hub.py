from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import close_session, constants
from make_data import make_data, manifest_in
from make_hub import COMMIT, REPO, Hub, published, serving

from orchestrator import cli, datasets, hub
from orchestrator.datasets import Request
from orchestrator.errors import ConfigError, DataError, MachineError, StorageError
from orchestrator.home import Home
from trainer.data import BOS
from trainer.prepare import shard_bytes
from trainer.protocol import SPLITS, TRAIN, VALIDATION, DataDir

ROOT = Path(cli.__file__).parent.parent
FOLDER = "datasets/datasets/fineweb10B_sp420"
SHARDS = [f"{FOLDER}/fineweb_train_{number:06d}.bin" for number in range(4)]
VAL = f"{FOLDER}/fineweb_val_000000.bin"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("original"))


@pytest.fixture
def stand_in(original: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub, "FIRST_WAIT_SECONDS", 0.0)
    with serving(Hub(published(original, shard_tokens=2500))) as served:
        point_to(served.endpoint, monkeypatch)
        yield served


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, which the library reads once, when it is loaded."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def request(train_shards: int = 3, **changes: object) -> Request:
    return Request(**{"variant": "sp420", "repo": REPO, "train_shards": train_shards, **changes})  # type: ignore[arg-type]


def quiet(line: str) -> None:
    """Say nothing."""


def fetched(out: Path, **changes: object) -> dict[str, object]:
    return datasets.fetch(request(**changes), out, quiet)  # type: ignore[arg-type]


def test_an_export_becomes_a_data_set_that_verifies(stand_in: Hub, original: Path, tmp_path: Path) -> None:
    out = tmp_path / "golf"
    outcome = fetched(out)
    assert outcome["is_new"]
    manifest, before = manifest_in(out), manifest_in(original)
    assert manifest.splits[VALIDATION].text_bytes == before.splits[VALIDATION].text_bytes
    assert manifest.splits[VALIDATION].documents == before.splits[VALIDATION].documents
    assert manifest.recipe["commit"] == COMMIT
    assert manifest.recipe["files"]["train_000002.bin"] == SHARDS[2]
    tokens = [np.fromfile(DataDir(out).shard(TRAIN, number), dtype="<u2", offset=1024) for number in range(3)]
    assert tokens[1][0] != BOS  # a document crosses the shards
    assert [shard.first_document for shard in manifest.splits[TRAIN].shards][1] == int((tokens[0] == BOS).sum())
    found = datasets.verify(out)
    assert found["problems"] == []
    for split in SPLITS:
        counted = found["splits"][split]
        assert counted["counted_bytes"] == counted["spelled_bytes"] == manifest.splits[split].text_bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["golf"]


def test_a_data_set_that_is_there_is_left_alone_without_asking_the_hub(stand_in: Hub, tmp_path: Path) -> None:
    out = tmp_path / "golf"
    fetched(out)
    stand_in.requests.clear()
    stand_in.faults["about"] = ["500"] * 99
    assert not fetched(out)["is_new"]
    assert not fetched(out, revision=COMMIT)["is_new"]
    assert stand_in.requests == []
    for other in ({"train_shards": 2}, {"revision": "another"}):
        with pytest.raises(
            DataError, match="another data set is there: fineweb10B_sp420 of somebody/golf at c0ffee0000"
        ):
            fetched(out, **other)


def download(folder: Path) -> None:
    """Fetch the validation split and two training shards, one after the other."""
    found = hub.list_repository(REPO, None)
    hub.fetch(REPO, COMMIT, {folder / Path(path).name: found.files[path] for path in (*SHARDS[:2], VAL)}, quiet)


def test_a_connection_that_ends_early_is_taken_up_where_it_ended(
    stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what comes is written in such pieces
    stand_in.faults[SHARDS[1]] = ["drop"]
    download(tmp_path)
    asked = [asked for path, asked in stand_in.requests if path == SHARDS[1]]
    assert asked == ["", f"bytes={len(stand_in.files[SHARDS[1]]) // 2 // 1000 * 1000}-"]
    assert (tmp_path / Path(SHARDS[1]).name).read_bytes() == stand_in.files[SHARDS[1]]


def test_a_hub_that_is_busy_is_asked_again(stand_in: Hub, tmp_path: Path) -> None:
    stand_in.faults = {VAL: ["503", "500"], "about": ["504"]}
    download(tmp_path)
    assert [path for path, _ in stand_in.requests].count(VAL) == 3


def test_a_file_that_comes_changed_is_fetched_again(stand_in: Hub, tmp_path: Path) -> None:
    stand_in.faults[SHARDS[0]] = ["flip"]
    download(tmp_path)
    assert (tmp_path / Path(SHARDS[0]).name).read_bytes() == stand_in.files[SHARDS[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(Path(path).name for path in (*SHARDS[:2], VAL))


def test_a_small_file_is_proved_by_the_hash_that_git_gives_it(stand_in: Hub, tmp_path: Path) -> None:
    file = hub.list_repository(REPO, None).files["README.md"]
    stand_in.faults["README.md"] = ["flip"]
    hub.fetch(REPO, COMMIT, {tmp_path / "README.md": file}, quiet)
    assert (tmp_path / "README.md").read_bytes() == stand_in.files["README.md"]


def test_a_file_that_stays_changed_is_refused(stand_in: Hub, tmp_path: Path) -> None:
    stand_in.faults[SHARDS[0]] = ["flip"] * 99
    with pytest.raises(DataError, match=r"train_000000.bin: what was fetched is not what the hub lists.*tried 6 times"):
        download(tmp_path)


def test_what_came_before_a_failure_is_not_fetched_again(
    stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "FILES_AT_A_TIME", 1)
    stand_in.faults[SHARDS[1]] = ["503"] * hub.ATTEMPTS
    with pytest.raises(MachineError, match="the hub answered 503; tried 6 times") as caught:
        download(tmp_path)
    assert "what was fetched is kept" in str(caught.value.hint)
    stand_in.requests.clear()
    download(tmp_path)
    assert [path for path, _ in stand_in.requests] == [SHARDS[1], VAL]


def test_a_long_fetch_tells_how_far_it_is(stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PROGRESS_SECONDS", 0.01)
    stand_in.faults[VAL] = ["hold"]
    told: list[str] = []

    def hear(line: str) -> None:
        told.append(line)
        stand_in.released.set()

    hub.fetch(REPO, COMMIT, {tmp_path / "val": hub.list_repository(REPO, None).files[VAL]}, hear)
    size = len(stand_in.files[VAL]) / 1e6
    assert told[0].startswith("fetching: 0 of 1 files, 0.0 of") and told[0].endswith(f"{size:.1f} MB")


def test_a_kept_file_that_was_changed_is_fetched_again(stand_in: Hub, tmp_path: Path) -> None:
    kept = DataDir(tmp_path / ".golf.fetched")
    kept.root.mkdir()
    content = bytearray(stand_in.files[SHARDS[0]])
    content[-1] ^= 1
    kept.shard(TRAIN, 0).write_bytes(content)
    kept.shard(TRAIN, 1).write_bytes(stand_in.files[SHARDS[1]])
    kept.shard(TRAIN, 7).write_bytes(b"of another request")
    fetched(tmp_path / "golf")
    paths = [path for path, _ in stand_in.requests]
    assert SHARDS[0] in paths
    assert SHARDS[1] not in paths
    assert not DataDir(tmp_path / "golf").shard(TRAIN, 7).exists()


@pytest.mark.parametrize(
    ("changes", "kind", "message", "hint"),
    [
        ({"variant": "sp9"}, DataError, "somebody/golf has no variant 'sp9'; it has: sp420", "--repo"),
        ({"train_shards": 99}, DataError, r"has 4 training shards of sp420, 99 were asked for", "--train-shards 4"),
        ({"repo": "nobody/golf"}, DataError, "nobody/golf: the hub has no such data set", "--repo"),
        ({"repo": "not an id"}, DataError, "not an id: not a repository's id", "OWNER/NAME"),
        ({"revision": "old"}, DataError, "the repository has no such revision", "--revision"),
        ({"prefix": "other"}, DataError, "has sp420 not under 'other'", "--prefix"),
    ],
)
def test_what_the_hub_does_not_have_is_told(
    stand_in: Hub, tmp_path: Path, changes: dict[str, object], kind: type[Exception], message: str, hint: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        fetched(tmp_path / "golf", **changes)
    assert hint in str(caught.value.hint)  # type: ignore[attr-defined]
    assert not (tmp_path / "golf").exists()


def change_layout(stand_in: Hub, change: str) -> None:
    files = stand_in.files
    if change == "gap":
        del files[SHARDS[1]]
    elif change == "side-car":
        files[f"{FOLDER}/fineweb_val_bytes_000000.bin"] = b"bytes"
    elif change == "no tokenizer":
        del files["datasets/tokenizers/fineweb_420_bpe.model"]
    elif change == "no shards":
        stand_in.files = {"README.md": b"#"}
    elif change == "no validation":
        del files[VAL]
    elif change == "two roots":
        files[f"old/{SHARDS[0].partition('/')[2]}"] = b"x"
    elif change == "damaged manifest":
        files["datasets/manifest.json"] = b"{"
    elif change == "other tokenizer":
        files["datasets/tokenizers/fineweb_420_bpe.model"] = b"no model"
    elif change == "other tokens":
        files[SHARDS[1]] = files[SHARDS[1]][:-2] + b"\xff\xff"
    elif change == "no start":
        files[VAL] = files[VAL][:1024] + b"\x09\x00" + files[VAL][1026:]
    elif change == "no header":
        files[SHARDS[1]] = b"\0" * 5000
    elif change == "not there":
        stand_in.faults[VAL] = ["404"]
    elif change == "gated":
        stand_in.faults["about"] = ["403"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gap", "train shard 1 is missing between 0 and 2"),
        ("side-car", "sp420 is a transformed text, whose bytes per token stand in a file of their own"),
        (
            "no tokenizer",
            "no SentencePiece model for sp420: neither its manifest names one, nor is there datasets/tokenizers/",
        ),
        ("no shards", "it has no shards of the challenge's layout"),
        ("no validation", "has no val shards of this variant"),
        ("two roots", "has sp420 in several folders: datasets, old"),
        ("damaged manifest", "datasets/manifest.json is damaged"),
        ("other tokenizer", "tokenizer.model: not a SentencePiece model"),
        ("other tokens", "train_000001.bin: token 65535, the tokenizer has 420 pieces"),
        ("no start", "val_000000.bin: a split must begin with token 1"),
        ("no header", r"train_000001.bin: header \[0, 0, 0\]"),
        ("not there", "the hub lists this file and does not have it"),
        ("gated", "its owner gives access on request"),
    ],
)
def test_an_export_that_cannot_be_used_is_refused(stand_in: Hub, tmp_path: Path, change: str, message: str) -> None:
    change_layout(stand_in, change)
    with pytest.raises(DataError, match=message):
        fetched(tmp_path / "golf")
    assert not (tmp_path / "golf").exists()


def test_totals_that_are_not_the_publishers_are_noted_at_every_check(stand_in: Hub, tmp_path: Path) -> None:
    path = "datasets/manifest.json"
    stand_in.files[path] = stand_in.files[path].replace(b'"docs_val": ', b'"docs_val": 1')
    (note,) = fetched(tmp_path / "golf")["notes"]  # type: ignore[misc]
    assert note.startswith("the publisher's manifest says docs_val 162, the validation shards have 62")
    assert datasets.verify(tmp_path / "golf")["notes"] == [note]


def test_an_export_at_the_root_without_a_manifest_is_found(original: Path, tmp_path: Path) -> None:
    files = published(original, shard_tokens=4000, first=1)
    flat = {path.removeprefix("datasets/"): hub.HubFile(path, 1, "") for path in files if "manifest" not in path}
    found = hub.Repository(REPO, COMMIT, flat)
    export = hub.find_export(found, "sp420", 1, {}, hub.root_of(found, "sp420", None))
    assert export.tokenizer.path.endswith("fineweb_420_bpe.model")
    assert export.shards[TRAIN][0].path.endswith("train_000001.bin")  # some publishers count from one


def test_a_hub_that_cannot_be_reached_is_told(stand_in: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point_to("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(MachineError, match="somebody/golf: the hub cannot be reached: .*; tried 6 times") as caught:
        fetched(tmp_path / "golf")
    assert "when there is a connection" in str(caught.value.hint)


def test_offline_mode_is_told(stand_in: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE is set"):
        fetched(tmp_path / "golf")
    monkeypatch.undo()
    close_session()


def test_a_machine_without_the_library_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MachineError, match="huggingface_hub is not installed"):
        fetched(tmp_path / "golf")


def test_a_disk_without_room_is_told_before_anything_comes(tmp_path: Path) -> None:
    wanted = {tmp_path / "shard": hub.HubFile("shard", 1 << 60, "0" * 64)}
    with pytest.raises(StorageError, match="bytes are still to be fetched, the disk has") as caught:
        hub.fetch(REPO, COMMIT, wanted, quiet)
    assert "--train-shards" in str(caught.value.hint)


def test_two_fetches_of_one_data_set_do_not_meet(stand_in: Hub, tmp_path: Path) -> None:
    stand_in.faults[VAL] = ["hold"]
    begun = threading.Thread(target=lambda: fetched(tmp_path / "golf"))
    begun.start()
    wait_for(lambda: any(path == VAL for path, _ in stand_in.requests))
    with pytest.raises(DataError, match="another process is fetching it"):
        fetched(tmp_path / "golf")
    stand_in.released.set()
    begun.join()
    assert (tmp_path / "golf").is_dir()


def wait_for(is_so: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_variant_of_no_known_repository_needs_one() -> None:
    assert datasets.known_repository("sp4096") == "kevclark/parameter-golf"
    with pytest.raises(ConfigError, match="no repository is known for the variant 'sp420'; known are sp1024") as caught:
        datasets.known_repository("sp420")
    assert "--repo" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="train_shards must be at least 1, got 0"):
        request(0)


# ---- the command, in a process of its own ------------------------------------------------------------------------


def command(served: Hub, home: Home) -> subprocess.Popen[str]:
    arguments = ["data", "fetch", "sp420", "--repo", REPO, "--train-shards", "3", "--out", "golf", "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "--home", str(home.root), *arguments],
        cwd=ROOT, env={**os.environ, "HF_ENDPOINT": served.endpoint, "HF_HOME": str(home.root / "hf")},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_killed_fetch_goes_on_in_the_middle_of_a_file(original: Path, home: Home) -> None:
    files = published(original, shard_tokens=2500)
    tokens = np.frombuffer(files[SHARDS[2]], dtype="<u2", offset=1024)
    files[SHARDS[2]] = shard_bytes(np.tile(tokens, 5000))  # what comes is written in pieces of ten megabytes
    with serving(Hub(files, faults={SHARDS[2]: ["hold"]})) as served:
        killed = command(served, home)
        kept = home.data / ".golf.fetched"
        wait_for(lambda: sizes_of(kept, 2) > [0] and DataDir(kept).shard(VALIDATION, 0).exists())
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        size = sizes_of(kept, 2)[0]
        served.requests.clear()
        done = command(served, home)
        out, err = done.communicate()
        assert done.returncode == 0, err
        assert (SHARDS[2], f"bytes={size}-") in served.requests
        assert VAL not in [path for path, _ in served.requests]
    assert json.loads(out)["splits"]["val"]["documents"] == manifest_in(original).splits[VALIDATION].documents
    assert datasets.names(home) == ["golf"]


def sizes_of(kept: Path, number: int) -> list[int]:
    """Bytes of what has come of a training shard."""
    return [path.stat().st_size for path in kept.glob(f".{DataDir(kept).shard(TRAIN, number).name}.*.partial")]
