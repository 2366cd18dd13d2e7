from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from make_verified import data_of, make_run

from orchestrator import clean_room, worker
from orchestrator.clean_room import Evaluation
from orchestrator.errors import DataError
from trainer.protocol import TIMEOUT, RunDir, read_manifest


def evaluate(run: RunDir, *, timeout_seconds: float = 60.0) -> Evaluation:
    data = data_of(run)
    return clean_room.evaluate(run, data, read_manifest(data.manifest), gpus=(), timeout_seconds=timeout_seconds)


def last_words(evaluation: Evaluation) -> str:
    assert evaluation.failure is not None
    return evaluation.failure.log.splitlines()[-1]


def look_around(run: RunDir) -> tuple[dict[str, str], dict[str, str]]:
    """What a bundle sees: files with their modes, and its environment."""
    files, environment = json.loads(last_words(evaluate(run)))
    return files, environment


def test_a_bundle_scores_its_model_file_alone(tmp_path: Path) -> None:
    found = evaluate(make_run(tmp_path))
    assert found.failure is None and found.result is not None
    assert found.result.scores["ttt"].bpb == 1.98
    assert found.environment["host"] and found.wall_seconds > 0
    assert not list(tmp_path.glob("**/recheck.json")), "the run's own directory stays as it was"


def test_the_room_holds_copies_of_bundle_model_and_validation_data_and_nothing_else(tmp_path: Path) -> None:
    files, _ = look_around(make_run(tmp_path, mode="look"))
    assert {Path(path).name: mode for path, mode in files.items()} == dict.fromkeys(
        ("train_gpt.py", "artifact.bin", "manifest.json", "tokenizer.model", "val_000000.bin"), "0o444"
    )
    assert not any(Path(path).exists() for path in files)
    assert not any(str(tmp_path) in path for path in files)


def test_the_bundle_sees_neither_our_checkout_nor_our_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = str(Path(worker.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", checkout)
    monkeypatch.setenv("API_TOKEN", "secret")
    monkeypatch.setenv("CADDIE_HOME", str(tmp_path))
    _, environment = look_around(make_run(tmp_path, mode="look"))
    assert not {"PYTHONPATH", "API_TOKEN", "CADDIE_HOME"} & set(environment)
    assert environment["PYTHONNOUSERSITE"] == environment["PYTHONSAFEPATH"] == "1"
    for name in ("HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME"):
        assert "caddie-clean-room-" in environment[name] and not Path(environment[name]).exists()


def test_the_bundle_reaches_nobody_where_this_machine_can_take_its_network_away(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = evaluate(make_run(tmp_path, mode="call", port=server.getsockname()[1]))
    assert found.is_offline == bool(clean_room.offline_namespace())
    assert last_words(found) == ("nobody answered" if found.is_offline else "somebody answered")


def test_a_machine_without_namespaces_evaluates_with_its_network_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clean_room, "NAMESPACES", (("no-such-program",), ("false",), ("env",)))
    found = evaluate(make_run(tmp_path))
    assert found.result is not None
    assert not found.is_offline


def test_a_bundle_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    found = evaluate(make_run(tmp_path, mode="hang"), timeout_seconds=2.0)
    assert found.failure is not None
    assert (found.failure.kind, found.failure.message) == (TIMEOUT, "not done after 2 s, and ended")
    left = [
        pid
        for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
        if pid != os.getpid() and b"caddie-clean-room-" in environment_of(pid)
    ]
    assert left == []


def environment_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("crash", "RuntimeError: a plain mistake"),
        ("silent", "the bundle ended well and wrote no scores"),
        ("garbled", "its scores cannot be read: "),
    ],
)
def test_a_bundle_that_gives_no_scores_says_why(tmp_path: Path, mode: str, message: str) -> None:
    found = evaluate(make_run(tmp_path, mode=mode))
    assert found.result is None and found.failure is not None
    assert found.failure.message.startswith(message)


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    data = data_of(run)
    data.manifest.write_text(data.manifest.read_text().replace('"tokenizer.model"', '"../tokenizer.model"'))
    with pytest.raises(DataError, match="a file of a data set must lie in its folder, got '../tokenizer.model'"):
        evaluate(run)
