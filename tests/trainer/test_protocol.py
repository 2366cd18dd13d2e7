"""The contract's files: what is damaged is refused with its place, and nothing is half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer import protocol
from trainer.errors import ProtocolError, StorageError
from trainer.protocol import Result, Score, read_lines, read_result, read_spec, write_result


def result_with(path: Path, **changes: Any) -> Path:
    score = Score(nats=2.0, tokens=2, bytes=3, loss=1.0, bpb=1.1, seconds=0.5)
    write_result(path, Result(run_id="r", attempt=1, status=protocol.COMPLETE, seed=7, scores={protocol.TTT: score}))
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **changes}))
    return path


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_result(result_with(tmp_path / "result.json")).scores[protocol.TTT].bpb == 1.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "seven"}, "result seed must be of type int, got 'seven'"),
        ({"train_seconds": None}, "result train_seconds must be of type float, got None"),
        ({"steps": True}, "result steps must be of type int, got True"),
        ({"scores": [1]}, "failure and scores must be tables"),
        ({"failure": 3}, "failure and scores must be tables"),
        ({"extra": 1}, "result has unknown keys ['extra'] and lacks []"),
    ],
)
def test_a_damaged_result_is_refused_with_its_file_and_value(tmp_path: Path, changes: Any, message: str) -> None:
    path = result_with(tmp_path / "result.json", **changes)
    with pytest.raises(ProtocolError) as caught:
        read_result(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_a_damaged_score_is_refused(tmp_path: Path) -> None:
    path = result_with(tmp_path / "result.json")
    path.write_text(path.read_text().replace("1.1", '"1.1"'))
    with pytest.raises(ProtocolError, match="score bpb must be of type float, got '1.1'"):
        read_result(path)


def test_a_spec_of_another_protocol_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text('{"protocol": 99}')
    with pytest.raises(ProtocolError, match="protocol 99, this code speaks 1") as caught:
        read_spec(tmp_path / "spec.json")
    assert caught.value.hint


def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    for content in (b"{", b"\xff\xfe", b"[1]"):
        (tmp_path / "spec.json").write_bytes(content)
        with pytest.raises(ProtocolError, match="spec.json: not a JSON object"):
            read_spec(tmp_path / "spec.json")


def test_a_damaged_line_is_refused_with_its_byte_and_an_unfinished_last_one_is_left(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b"')
    assert [record for _, record in read_lines(path)] == [{"a": 1}]
    path.write_bytes(b'{"a": 1}\n{"b"\n')
    with pytest.raises(ProtocolError, match="events.jsonl: byte 9: not a JSON object"):
        list(read_lines(path))


def test_a_full_disk_is_told_with_its_remedy() -> None:
    with pytest.raises(StorageError, match="/dev/full: cannot be written: No space left on device") as caught:
        protocol.append_line(Path("/dev/full"), {"a": 1})
    assert "free some space" in str(caught.value.hint)


def test_a_file_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "result.json").mkdir()
    with pytest.raises(StorageError, match="result.json: cannot be written"):
        protocol.write_json_atomically(tmp_path / "result.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
