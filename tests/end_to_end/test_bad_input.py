"""What a hostile user tries: each has its own message and exit code, no traceback, and leaves nothing half-written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.home import Home
from tests.end_to_end.micro import DATA, KNOB, STUDY, caddie, environment, write_study
from tests.trainer.make_data import VOCAB_SIZE, texts, write_jsonl
from trainer.protocol import TRAIN, VALIDATION, DataDir

USAGE, CONFIG, DATA_CODE, PROTOCOL, STORAGE, FAILED, MACHINE = 2, 3, 4, 5, 6, 7, 8


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The command ended with this code and said all of this, as an error and a remedy and not as a traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "problem: "))]
    assert errors, done.stderr
    for word in words:
        assert word in done.stderr


def files_of(home: Home) -> set[Path]:
    return {path for path in home.root.rglob("*") if path.is_file()}


STUDIES = {
    "an unknown knob in the space": (f'"{KNOB}"]', '"optim.muon_weight_decai"]', "did you mean 'optim.muon_weight_decay'?"),
    "an unknown knob in [set]": ('"model.width"', '"model.widht"', "did you mean 'model.width'?"),
    "an unknown key": ("trials =", "trails =", "did you mean 'trials'?"),
    "an unknown preset": ('"smoke"', '"smok"', "did you mean 'smoke'?"),
    "low above high": ("low = 0.01", "low = 0.5", "low 0.5 must be below high 0.3"),
    "low equal to high": ("low = 0.01", "low = 0.3", "low 0.3 must be below high 0.3"),
    "a logarithm of zero": ("low = 0.01", "low = 0.0", "log needs low above 0, got 0.0"),
    "an infinite bound": ("high = 0.3", "high = inf", "must be finite, got inf"),
    "a value that no model has": (f'[space."{KNOB}"]\nlow = 0.01\nhigh = 0.3\nlog = true', '[space."model.heads"]\nlow = 3\nhigh = 4',
                                  "width 32 must be a multiple of heads 3"),
    "seeds given twice": ("seeds = [42]", "seeds = [42, 42]", "[confirm] seeds names a value twice"),
    "a negative seed": ("seeds = [42]", "seeds = [-42]", "[confirm] seeds must lie between 0 and"),
    "an endless timeout": ("timeout_minutes = 5", "timeout_minutes = inf", "timeout_minutes must be finite, got inf"),
    "another vocabulary": (f'"model.vocab_size" = {VOCAB_SIZE}', '"model.vocab_size" = 512', f"has {VOCAB_SIZE} pieces"),
    "no TOML": ("[search]", "[search", "not TOML"),
}  # fmt: skip


@pytest.mark.parametrize("case", STUDIES)
def test_a_study_that_cannot_be_meant_is_refused_before_anything_is_written(
    tmp_path: Path, make_home: Callable[[str], Home], case: str
) -> None:
    old, new, message = STUDIES[case]
    assert old in STUDY
    home, path = make_home("home"), write_study(tmp_path, STUDY.replace(old, new))
    before = files_of(home)
    refused(caddie("--home", home.root, "study", "run", path, cwd=tmp_path), CONFIG, message)
    assert files_of(home) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", 'a study needs name = "..."'),
        (b"\x7fELF\x02\x01\xd0\x00", "not UTF-8 text: byte 0xd0 at 6"),
        ("name = 'caf\u00e9'".encode("latin-1"), "hint: save the file as UTF-8"),
        (None, "is a folder, not a study file"),
    ],
    ids=["empty", "binary", "latin-1", "folder"],
)
def test_a_file_that_is_no_study_is_refused_with_its_name(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "study.toml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    refused(caddie("study", "check", path, cwd=tmp_path), CONFIG, f"error: {path}: ", message)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["stduy", "list"], USAGE, "hint: did you mean 'study'?"),
        (["run", "smoke", "--sees", "4"], USAGE, "hint: did you mean '--seeds'?"),
        (["ui", "--port", "http"], USAGE, "invalid int value: 'http'"),
        (["study", "check", "wd-qk-ttt-smok"], CONFIG, "did you mean 'wd-qk-ttt-smoke'?"),
        (["study", "status", "nothing"], CONFIG, "there is no study 'nothing'"),
        (["report", "../nothing"], CONFIG, "there is no study '../nothing'"),
        (["run", "smok"], CONFIG, "did you mean 'smoke'?"),
        (["run", "smoke", "--seeds", "abc"], CONFIG, "--seeds must be whole numbers between commas, got 'abc'"),
        (["run", "smoke", "--seeds", "7,7"], CONFIG, "seeds names a value twice"),
        (["run", "smoke", "--set", "model.widht=3"], CONFIG, "did you mean 'model.width'?"),
        (["run", "smoke", "--set", "model.width=wide"], CONFIG, "model.width is of type int, got 'wide'"),
        (["run", "smoke", "--set", "quant.clip_quantiles="], CONFIG, "quant.clip_quantiles must not be empty"),
        (["run", "smoke", "--timeout-minutes", "inf"], CONFIG, "timeout_minutes must be finite"),
        (["run", "smoke", "--data", "nothing"], DATA_CODE, "caddie data prepare --out nothing"),
        (["data", "verify", "nothing"], DATA_CODE, "there is no data set 'nothing'"),
        (["ui", "--port", "99999"], MACHINE, "port must be from 1 to 65535, got 99999"),
    ],
)
def test_an_argument_that_cannot_be_meant_is_refused(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    refused(caddie("--home", tmp_path / "home", *arguments, cwd=tmp_path), code, message)
    assert not (tmp_path / "home" / "studies").exists()


DAMAGES = {
    "a missing shard": (lambda d: d.shard(TRAIN, 1).unlink(), DATA_CODE, "train_000001.bin: the shard is missing"),
    "a truncated shard": (lambda d: os.truncate(d.shard(TRAIN, 0), 3001), DATA_CODE, "the shard is truncated: 3,001 bytes"),
    "a changed shard": (lambda d: change_byte(d.shard(VALIDATION, 0)), DATA_CODE, "val_000000.bin: changed bytes"),
    "a missing tokenizer": (lambda d: d.tokenizer.unlink(), DATA_CODE, "the tokenizer is missing"),
    "a torn manifest": (lambda d: os.truncate(d.manifest, 100), PROTOCOL, "manifest.json: not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_data_set_is_refused_before_anything_is_submitted(
    tmp_path: Path, make_home: Callable[[str], Home], case: str
) -> None:
    damage, code, message = DAMAGES[case]
    home, path = make_home("home"), write_study(tmp_path)
    damage(DataDir(home.dataset(DATA)))
    refused(caddie("--home", home.root, "study", "run", path, cwd=tmp_path), code, message, "hint: ")
    assert not home.runs.exists() and not home.studies.exists()


def change_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.slow
def test_a_tokenizer_that_cannot_be_counted_with_makes_no_data_set(
    tmp_path: Path, make_home: Callable[[str], Home]
) -> None:
    import sentencepiece

    home, corpus = make_home("home"), write_jsonl(tmp_path / "corpus.jsonl", texts())
    spaceless = tmp_path / "spaceless.model"
    with spaceless.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{'abcdefg' * 20}{n}" for n in range(300)), model_writer=model, vocab_size=300, model_type="bpe",
            byte_fallback=True, add_dummy_prefix=False, minloglevel=2,
        )  # fmt: skip
    before = files_of(home)

    def prepare(model: Path, size: int) -> subprocess.CompletedProcess[str]:
        options = ["--tokenizer", model, "--vocab-size", str(size), "--out", "other"]
        return caddie("--home", home.root, "data", "prepare", "--corpus", corpus, *options, cwd=tmp_path)

    refused(prepare(spaceless, 300), DATA_CODE, "no stand-alone ▁")
    own = DataDir(home.dataset(DATA)).tokenizer
    refused(prepare(own, 500), DATA_CODE, f"the tokenizer has {VOCAB_SIZE} pieces, the model's vocab_size is 500")
    refused(prepare(corpus, 500), DATA_CODE, "not a SentencePiece model")
    assert files_of(home) == before


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path, home = write_study(tmp_path), tmp_path / "home"
    home.write_text("mine")
    for arguments in (["study", "run", path], ["track"], ["ui"], ["data", "prepare"]):
        refused(caddie(*arguments, cwd=tmp_path, CADDIE_HOME=str(home)), STORAGE, "CADDIE_HOME must be a directory")
    assert home.read_text() == "mine"


def test_a_damaged_ledger_is_named_with_its_place_and_left_as_it_is(
    tmp_path: Path, make_home: Callable[[str], Home]
) -> None:
    home, path = make_home("home"), write_study(tmp_path)
    ledger = home.study("micro").ledger
    ledger.parent.mkdir(parents=True)
    ledger.write_text('{"kind": bro\n{"kind": "closed"}\n')
    for arguments in (["study", "run", path], ["study", "status", "micro"], ["study", "list"], ["report", "micro"]):
        done = caddie("--home", home.root, *arguments, cwd=tmp_path)
        refused(done, PROTOCOL, f"{ledger}: byte 0: not a JSON object")
    assert ledger.read_text() == '{"kind": bro\n{"kind": "closed"}\n'


# ---- disks -------------------------------------------------------------------------------------------------------


def can_mount() -> bool:
    """Whether this user may mount a file system of its own."""
    unshare = shutil.which("unshare")
    probe = [unshare or "", "--mount", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"]
    return unshare is not None and subprocess.run(probe, capture_output=True, check=False).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs the right to mount")


def mounted(script: str, *arguments: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script among mounts of its own, which end with it; `caddie` is this tree's."""
    head = f'set -u; caddie() {{ "{sys.executable}" -m orchestrator.cli "$@"; }}\n'
    return subprocess.run(
        ["unshare", "--mount", "bash", "-c", head + script, "bash", *map(str, arguments)],
        cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip


@needs_mount
def test_a_read_only_home_is_refused(tmp_path: Path, make_home: Callable[[str], Home]) -> None:
    home, path = make_home("home"), write_study(tmp_path)
    before = files_of(home)
    script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && caddie --home "$1" study run "$2"'
    refused(mounted(script, home.root, path, cwd=tmp_path), STORAGE, "Read-only file system", "set CADDIE_HOME to")
    assert files_of(home) == before


@needs_mount
def test_a_disk_that_is_too_small_or_full_is_refused_and_left_clean(
    tmp_path: Path, make_home: Callable[[str], Home]
) -> None:
    home, path = make_home("home"), write_study(tmp_path)
    small = tmp_path / "small"
    small.mkdir()
    prepare = 'mount -t tmpfs -o size=32m tmpfs "$1" && cp -r "$3/data" "$1" && '
    too_small = mounted(prepare + 'caddie --home "$1" study run "$2"', small, path, home.root, cwd=tmp_path)
    refused(too_small, STORAGE, "bytes are free", "may take", "hint: free some space")
    fill = '{ dd if=/dev/zero of="$1/filler" bs=64k 2>/dev/null; caddie --home "$1" study run "$2"; code=$?; ls -A "$1"; exit $code; }'
    full = mounted(prepare + fill, small, path, home.root, cwd=tmp_path)
    refused(full, STORAGE, "No space left on device", "hint: free some space")
    assert full.stdout.split() == ["data", "filler"]


@needs_mount
@pytest.mark.slow
def test_a_disk_that_fills_during_the_runs_ends_the_study_in_order_and_loses_nothing(
    tmp_path: Path, make_home: Callable[[str], Home]
) -> None:
    home, path = make_home("home"), write_study(tmp_path)
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    script = """
        mount -t tmpfs -o size=320m tmpfs "$1" && cp -r "$3/data" "$1" || exit 99
        caddie --home "$1" study run "$2" > "$4/first.txt" 2>&1 & controller=$!
        until grep -q '"ended"' "$1"/studies/micro/ledger.jsonl 2>/dev/null; do
            kill -0 $controller 2>/dev/null || break
            sleep 0.05
        done
        dd if=/dev/zero of="$1/filler" bs=64k 2>/dev/null; dd if=/dev/zero of="$1/rest" bs=1 2>/dev/null
        wait $controller; echo "full: $?"
        rm "$1/filler" "$1/rest"
        caddie --home "$1" study run "$2" > "$4/second.txt" 2>&1; echo "again: $?"
        cp -r "$1/studies" "$1/runs" "$4"
    """
    done = mounted(script, disk, path, home.root, kept, cwd=tmp_path)
    first, second = ((kept / name).read_text() for name in ("first.txt", "second.txt"))
    assert done.stdout.split("\n")[:2] == [f"full: {STORAGE}", "again: 0"], first + second
    assert "No space left on device" in first and "nothing was lost: run the command again" in first
    assert "Traceback" not in first
    from tests.end_to_end.micro import require_decided_once, state

    require_decided_once(Home(kept))
    assert {trial.state for trial in state(Home(kept)).trials.values()} == {"complete"}
    assert not list(kept.rglob("*.partial"))
