import gzip
import io
import json
import os
import random
import tarfile
import time

import pytest
from fakes import MANIFEST, REPOSITORY

from orchestrator import compile_cache, worker
from orchestrator.compile_cache import COLD, LOCAL, NONE, OWN, RESTORED
from orchestrator.home import Home
from orchestrator.presets import load_preset
from orchestrator.runs import RunRequest, RunStore
from trainer import protocol
from trainer.config import knobs, with_knobs

extracts = pytest.mark.skipif(
    not hasattr(tarfile, "data_filter"), reason="this Python extracts no archive safely, and the cache does without"
)

KEY = "k" * 16
KERNEL = "triton/.triton/cache/ABC/kernel.cubin"
LISTING = "triton/.triton/cache/ABC/__grp__kernel.json"
PACKAGES = {"torch": "2.13.0+cu130", "triton": "3.6.0", "numpy": "2.3"}
H100 = "NVIDIA H100 80GB HBM3, 580.65, 81559 MiB"

# A trainer that compiles: it leaves a file in each directory unless it is there, and says in `found` what it found.
COMPILING = """
import os, sys
from pathlib import Path
sys.path.insert(0, "@REPOSITORY@")
from trainer import protocol
run, attempt = protocol.RunDir(Path(sys.argv[1])), int(sys.argv[3])
graph, kernel = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], "fxgraph/x"), Path(os.environ["TRITON_HOME"], ".triton/cache/y.cubin")
(run.attempt(attempt).root / "found").write_text(str([graph.exists(), kernel.exists()]))
for path in (graph, kernel):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.exists() or path.write_text("compiled")
    os.utime(path, (1e9, 1e9))
spec = protocol.read_spec(run.spec)
result = protocol.Result(run_id=spec.run_id, attempt=attempt, status="@STATUS@", seed=spec.seed)
protocol.write_result(run.attempt(attempt).result, result)
"""


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    """Nothing outside the test's folder is read or written, and nothing that the tests' own environment has set counts."""
    for variable in compile_cache.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(compile_cache.PLACE, str(tmp_path / "node-1"))


@pytest.fixture
def archive(tmp_path):
    return Home(tmp_path / "home").compiled(KEY)


def on(node, archive, *, key=KEY, **environment):
    """The cache of a trainer that starts on a node."""
    return compile_cache.lent(key, archive=archive, environment={compile_cache.PLACE: str(node), **environment})


def put(directory, name, content="compiled", *, age=3600.0):
    """What a compiler leaves, `age` seconds ago."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def filled(node, archive, *names):
    """A run on a node that compiles these files and ends well; returns the node's directory."""
    with on(node, archive) as cache:
        for name in names:
            put(cache.directory, name)
        cache.save()
    return cache.directory


def names_in(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------- the key


def spec_of(tmp_path, *, seed=1, preset="pr1326", bundle=b"bundle", **changes):
    config = with_knobs(load_preset(preset), {name.replace("__", "."): value for name, value in changes.items()})
    request = RunRequest(preset=preset, config=config, seed=seed, data_dir="/data", manifest_sha256=MANIFEST)
    return protocol.read_spec(RunStore(Home(tmp_path)).plan(request, bundle=bundle, code={}).spec)


def key_of(spec, *, processes=8, packages=PACKAGES, gpus=(H100,)):
    return compile_cache.key_of(spec, processes=processes, packages=packages, gpus=gpus)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2},
        {"optim__matrix_lr": 0.01},
        {"optim__muon_weight_decay": 0.2},
        {"ttt__lr": 0.01},
        {"ttt__momentum": 0.5},
        {"ttt__epochs": 1},
        {
            "ttt__weight_decay": 0.5,
            "ttt__adam_beta1": 0.0,
            "ttt__adam_beta2": 0.9,
            "ttt__adam_eps": 1e-10,
            "ttt__lora_seed": 3,
        },
        {"ttt__grad_clip_norm": 0.5},
        {"model__qk_gain": 2.5},
        {"model__embedding_std": 0.1},
        {"schedule__steps": 10},
        {"limits__train_seconds": 60.0},
        {"quant__mlp_bits": 5},
        {"data__order_seed": 3},
    ],
)
def test_numbers_that_change_no_graph_share_a_key(tmp_path, changes):
    assert key_of(spec_of(tmp_path, **changes)) == key_of(spec_of(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"bundle": b"other code"},
        {"model__width": 256},
        {"model__qk_gain": 0.0},
        {"model__rope_base": 500.0},
        {"data__micro_batch_sequences": 24},
        {"evaluation__batch_windows": 16},
        {"ttt__method": "off"},
        {"ttt__grad_clip_norm": 0.0},
        {"ttt__frozen_blocks": 2},
        {"runtime__precision": "float32"},
    ],
)
def test_what_changes_a_graph_or_a_shape_changes_the_key(tmp_path, changes):
    assert key_of(spec_of(tmp_path, **changes)) != key_of(spec_of(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"processes": 4},
        {"packages": {**PACKAGES, "torch": "2.12.0"}},
        {"packages": {**PACKAGES, "triton": "3.5.0"}},
        {"packages": {"torch": PACKAGES["torch"]}},
        {"gpus": (H100.replace("H100", "H200"),)},
        {"gpus": (H100.replace("580", "570"),)},
    ],
)
def test_another_machine_or_compiler_has_another_key(tmp_path, changes):
    spec = spec_of(tmp_path)
    assert key_of(spec, **changes) != key_of(spec)


def test_libraries_that_compile_nothing_and_the_number_of_equal_gpus_do_not_count(tmp_path):
    spec = spec_of(tmp_path)
    assert key_of(spec, packages={**PACKAGES, "numpy": "1"}, gpus=(H100, H100)) == key_of(spec)


def test_the_knobs_without_a_say_exist():
    assert knobs().keys() >= compile_cache.NUMBERS | compile_cache.SWITCHES


def test_a_processor_is_known_by_what_it_can_execute(tmp_path):
    info = tmp_path / "cpuinfo"
    targets = []
    for text in ("cpu MHz: 1\nflags : sse avx512f\n", "cpu MHz: 2\nflags : avx512f sse\n", "flags : sse\n"):
        info.write_text(text)
        targets.append(compile_cache.host_target(info))
    assert targets[0] == targets[1] != targets[2]
    assert compile_cache.host_target(tmp_path / "none")[0] == targets[0][0]


# ---------------------------------------------------------------------------------------------------- from node to node


@extracts
def test_what_one_node_compiled_another_finds(tmp_path, archive):
    with on(tmp_path / "node-1", archive) as cache:
        assert (cache.found.state, cache.found.restored_bytes) == (COLD, 0)
        graphs = cache.variables["TORCHINDUCTOR_CACHE_DIR"]
        assert graphs == str(cache.directory / "inductor")
        assert cache.variables["TRITON_HOME"] == str(cache.directory / "triton")
        put(cache.directory, "inductor/fxgraph/ab/x", "graph")
        cache.save()
    with on(tmp_path / "node-2", archive) as cache:
        assert (cache.found.key, cache.found.state, cache.found.restored_bytes) == (KEY, RESTORED, len("graph"))
        assert cache.directory.is_relative_to(tmp_path / "node-2")
        assert (cache.directory / "inductor/fxgraph/ab/x").read_text() == "graph"


def test_the_second_run_on_a_node_needs_no_archive(tmp_path, archive):
    filled(tmp_path / "node-1", archive, KERNEL)
    archive.unlink()
    with on(tmp_path / "node-1", archive) as cache:
        assert (cache.found.state, cache.found.restored_bytes) == (LOCAL, 0)


@extracts
def test_a_run_that_compiled_nothing_saves_nothing(tmp_path, archive, capsys):
    with on(tmp_path / "node-1", archive) as cache:
        cache.save()
    assert not archive.exists() and not cache.directory.exists()
    filled(tmp_path / "node-1", archive, KERNEL)
    before = archive.stat().st_mtime_ns
    capsys.readouterr()
    for node in ("node-1", "node-2"):
        with on(tmp_path / node, archive) as cache:
            os.utime(archive, ns=(before, before))
            cache.save()
        assert archive.stat().st_mtime_ns == before
    assert capsys.readouterr() == ("", "")


@extracts
def test_a_run_that_compiled_more_replaces_the_archive(tmp_path, archive, capsys):
    filled(tmp_path / "node-1", archive, KERNEL)
    filled(tmp_path / "node-2", archive, "inductor/y")
    captured = capsys.readouterr()
    assert captured.out == "" and f"{archive}: 2 files, 16 bytes, saved in" in captured.err
    assert names_in(filled(tmp_path / "node-3", archive)) == ["inductor/y", KERNEL]


@extracts
def test_nodes_that_compiled_the_same_under_other_names_do_not_replace_each_other(tmp_path, archive):
    with on(tmp_path / "node-1", archive) as first, on(tmp_path / "node-2", archive) as second:
        put(first.directory, "inductor/entry-1")
        put(second.directory, "inductor/entry-2")
        first.save()
        second.save()
    assert names_in(filled(tmp_path / "node-3", archive)) == ["inductor/entry-1"]


def test_a_file_that_may_still_be_written_waits_for_the_next_run(tmp_path, archive):
    with on(tmp_path / "node-1", archive) as cache:
        put(cache.directory, KERNEL)
        growing = put(cache.directory, "inductor/growing.so", age=0.0)
        cache.save()
        assert compile_cache.archived_files(archive) == 1
        os.utime(growing, (1e9, 1e9))
        cache.save()
    assert compile_cache.archived_files(archive) == 2


@extracts
def test_a_link_in_the_directory_is_not_saved(tmp_path, archive):
    with on(tmp_path / "node-1", archive) as cache:
        put(cache.directory, KERNEL)
        (cache.directory / "secret").symlink_to("/etc/passwd")
        cache.save()
    assert names_in(filled(tmp_path / "node-2", archive)) == [KERNEL]


def test_a_reader_during_a_save_sees_the_archive_before_it(tmp_path, archive, monkeypatch):
    filled(tmp_path / "node-1", archive, KERNEL)
    seen = []
    replace = os.replace

    def look(source, target):
        seen.append(compile_cache.archived_files(archive))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    filled(tmp_path / "node-1", archive, "inductor/y")
    assert (seen, compile_cache.archived_files(archive)) == ([1], 2)
    assert names_in(archive.parent) == [archive.name]


@extracts
def test_an_attempt_that_finds_the_directory_filled_meanwhile_takes_it_as_it_is(tmp_path, archive):
    directory = filled(tmp_path / "node-1", archive, KERNEL)
    put(directory, KERNEL, "in use")
    assert compile_cache.restore_archive(archive, directory) == 0
    assert (directory / KERNEL).read_text() == "in use"
    assert names_in(directory.parent) == [f"{KEY}/{KERNEL}"]


@extracts
def test_the_empty_folder_that_torch_makes_at_once_is_not_a_warm_cache(tmp_path, archive):
    filled(tmp_path / "node-1", archive, KERNEL, "inductor/x")
    with on(tmp_path / "node-2", archive.with_name("none yet")) as cache:
        (cache.directory / "inductor").mkdir(parents=True)
    with on(tmp_path / "node-2", archive) as cache:
        assert cache.found.state == RESTORED
        assert names_in(cache.directory) == ["inductor/x", KERNEL]


@extracts
def test_tritons_listings_name_the_files_of_this_node(tmp_path, archive):
    """It lists a kernel's files by absolute path; the old one may be anybody's here."""
    with on(tmp_path / "node-1", archive) as cache:
        kernel = put(cache.directory, KERNEL)
        put(cache.directory, LISTING, json.dumps({"child_paths": {kernel.name: str(kernel)}}))
        put(cache.directory, "triton/DEF/__grp__other.json", "[]")
        cache.save()
    with on(tmp_path / "node-2", archive) as cache:
        listing = json.loads((cache.directory / LISTING).read_text())
        assert listing == {"child_paths": {kernel.name: str(cache.directory / KERNEL)}}
        assert not [name for name in names_in(cache.directory) if "node-1" in (cache.directory / name).read_text()]


def test_a_directory_that_the_user_set_is_left_alone(tmp_path, archive):
    filled(tmp_path / "node-1", archive, KERNEL)
    before = archive.stat().st_mtime_ns
    for variable in compile_cache.VARIABLES:
        with on(tmp_path / "node-2", archive, **{variable: "/own"}) as cache:
            assert (cache.variables, cache.found.state) == ({}, OWN)
            cache.save()
    assert archive.stat().st_mtime_ns == before and not (tmp_path / "node-2").exists()


# ---------------------------------------------------------------------------------------------------- damage and limits


def damaged(content, how):
    """An archive with something wrong in it."""
    return {
        "cut": content[: len(content) // 2],
        "without its end": content[:-8],
        "empty": b"",
        "no archive": b"not gzip at all" * 100,
        "another archive": gzip.compress(tar_of({KERNEL: b"x"}, {})),
        "a file missing": gzip.compress(tar_of({KERNEL: b"x"}, {compile_cache.FILES: "2"})),
        "one that climbs out": gzip.compress(tar_of({"../../evil": b"x"}, {compile_cache.FILES: "1"})),
    }[how]


def tar_of(files, headers, *, kind=tarfile.REGTYPE):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", pax_headers=headers) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


@extracts
@pytest.mark.parametrize(
    "how",
    [
        "cut",
        "without its end",
        "empty",
        "no archive",
        "another archive",
        "a file missing",
        "one that climbs out",
    ],
)
def test_a_damaged_archive_is_told_ignored_and_replaced(tmp_path, archive, capsys, how):
    filled(tmp_path / "node-1", archive, KERNEL)
    archive.write_bytes(damaged(archive.read_bytes(), how))
    with on(tmp_path / "node-2", archive) as cache:
        assert (cache.found.state, cache.found.restored_bytes) == (COLD, 0)
        assert names_in(tmp_path / "node-2") == [] and not (tmp_path / "evil").exists()
        assert f"{archive}: damaged, and replaced after a complete run: " in capsys.readouterr().err
        put(cache.directory, KERNEL)
        cache.save()
    with on(tmp_path / "node-3", archive) as cache:
        assert cache.found.state == RESTORED


@extracts
def test_no_changed_byte_gets_through(tmp_path, archive):
    """Compiled code is run as it is. Whatever the change, reading ends in an error that is caught or in the same files."""
    directory = filled(tmp_path / "node-1", archive, *(f"inductor/{n}" for n in range(30)))
    written = {name: (directory / name).read_bytes() for name in names_in(directory)}
    whole, random_ = archive.read_bytes(), random.Random(0)
    harmless = 0  # a few bits say nothing: the time in gzip's head, the padding before its checksum
    for round_ in range(300):
        content = bytearray(whole)
        for _ in range(random_.choice((1, 1, 5))):
            content[random_.randrange(len(content))] ^= random_.randrange(1, 256)
        archive.write_bytes(content)
        stage = tmp_path / f"stage-{round_}"
        try:
            compile_cache.extract(archive, stage)
        except compile_cache.DAMAGE:
            continue
        assert {name: (stage / name).read_bytes() for name in names_in(stage)} == written
        harmless += 1
    assert harmless < 30


@extracts
def test_an_archive_holds_regular_files_only(tmp_path, archive):
    link = tar_of({"link": b""}, {compile_cache.FILES: "1"}, kind=tarfile.SYMTYPE)
    archive.parent.mkdir(parents=True)
    archive.write_bytes(gzip.compress(link))
    with pytest.raises(tarfile.ReadError, match="'link' is no regular file"):
        compile_cache.extract(archive, tmp_path / "stage")


@extracts
def test_without_safe_extraction_nothing_is_extracted(tmp_path, archive, monkeypatch, capsys):
    filled(tmp_path / "node-1", archive, KERNEL)
    monkeypatch.delattr(tarfile, "data_filter")
    with on(tmp_path / "node-2", archive) as cache:
        assert cache.found.state == COLD
    assert f"{archive}: not restored: [Errno 38] this Python extracts no archive safely" in capsys.readouterr().err


def test_a_store_that_cannot_be_written_is_told(tmp_path, archive, capsys):
    archive.parent.parent.mkdir()
    archive.parent.write_text("a file in its place")
    filled(tmp_path / "node-1", archive, KERNEL)
    assert f"{archive}: not saved: " in capsys.readouterr().err


def test_a_directory_over_the_limit_is_not_saved(tmp_path, archive, monkeypatch, capsys):
    monkeypatch.setattr(compile_cache, "LARGEST_BYTES", 7)
    directory = filled(tmp_path / "node-1", archive, KERNEL)
    assert not archive.exists()
    assert f"{directory}: not saved: it holds 8 bytes, the limit is 7" in capsys.readouterr().err


@extracts
def test_the_least_recently_used_archives_are_dropped(tmp_path, archive, monkeypatch):
    old, used, new = (archive.with_name(f"{name}.tar.gz") for name in ("old", "used", "new"))
    for path in (used, old):
        with on(tmp_path / "node-1", path, key=path.name) as cache:
            put(cache.directory, KERNEL)
            cache.save()
        os.utime(path, (1e9, 1e9))
    abandoned, current = archive.with_name("a.partial"), archive.with_name("b.partial")
    for path, age in ((abandoned, 2 * compile_cache.ABANDONED_SECONDS), (current, 0.0)):
        put(path.parent, path.name, age=age)
    with on(tmp_path / "node-2", used, key="x") as cache:
        assert cache.found.state == RESTORED
    monkeypatch.setattr(compile_cache, "STORE_BYTES", used.stat().st_size * 5 // 2)
    with on(tmp_path / "node-2", new, key="y") as cache:
        put(cache.directory, KERNEL)
        cache.save()
    assert sorted(archive.parent.iterdir()) == sorted([current, new, used])


def test_a_nodes_copy_goes_when_nobody_used_it_for_long(tmp_path, archive):
    directory = filled(tmp_path / "node-1", archive, KERNEL)
    forgotten = put(directory.parent, "forgotten/x").parent
    for path in (directory, forgotten):
        os.utime(path, (1e9, 1e9))
    filled(tmp_path / "node-1", archive)
    assert directory.exists() and not forgotten.exists()


# ---------------------------------------------------------------------------------------------------- somebody else's


def root_on(node):
    return node / f"caddie-compile-cache-{os.geteuid()}"


def test_the_directory_is_closed_to_others(tmp_path, archive):
    previous = os.umask(0)
    try:
        with on(tmp_path / "node-1", archive) as cache:
            assert cache.directory.parent == root_on(tmp_path / "node-1")
            assert cache.directory.parent.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(previous)


@extracts
@pytest.mark.parametrize("attack", ["open to all", "a link", "a file", "another user's"])
def test_a_directory_that_somebody_may_have_prepared_is_not_used(tmp_path, archive, monkeypatch, capsys, attack):
    filled(tmp_path / "node-1", archive, KERNEL)
    node = tmp_path / "node-2"
    root, elsewhere = root_on(node), tmp_path / "elsewhere"
    put(elsewhere, f"{KEY}/{KERNEL}", "evil")
    elsewhere.chmod(0o700)
    node.mkdir()
    if attack == "a link":
        root.symlink_to(elsewhere)
    elif attack == "a file":
        root.write_text("")
    else:
        elsewhere.rename(root)
        root.chmod(0o777 if attack == "open to all" else 0o700)
    if attack == "another user's":
        other = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: other)
        root.rename(root_on(node))
    before = {path: path.lstat() for path in node.rglob("*")}
    with on(node, archive) as cache:
        assert cache.found.state == RESTORED, "from the archive, into a directory of its own"
        assert (cache.directory / KERNEL).read_text() == "compiled"
        assert cache.directory.parent.stat().st_mode & 0o777 == 0o700
        put(cache.directory, "inductor/y")
        cache.save()
    assert "that belongs to this user, and is not used: remove it" in capsys.readouterr().err
    assert {path: path.lstat() for path in node.rglob("*")}.keys() == before.keys(), "it is removed after the attempt"
    assert compile_cache.archived_files(archive) == 2


def test_without_any_place_the_trainer_gets_no_directory(tmp_path, archive, capsys):
    (tmp_path / "file").write_text("")
    with on(tmp_path / "file" / "node", archive) as cache:
        assert (cache.found.state, cache.variables) == (NONE, {})
        cache.save()
    assert "compile cache: no directory on this node: " in capsys.readouterr().err


def test_the_temporary_directory_is_the_default_place(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert compile_cache.place({}) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert compile_cache.place({compile_cache.PLACE: "here"}) == tmp_path / "here"


# ---------------------------------------------------------------------------------------------------- in a job


def attempts_of(tmp_path, *, status=protocol.COMPLETE, nodes=("node-1",), monkeypatch, **knobs_):
    """Run a compiling trainer on one node after the other; returns the attempts."""
    text = COMPILING.replace("@REPOSITORY@", str(REPOSITORY)).replace("@STATUS@", status)
    config = with_knobs(load_preset("smoke"), {name.replace("__", "."): value for name, value in knobs_.items()})
    request = RunRequest(preset="smoke", config=config, seed=1, data_dir="/data", manifest_sha256=MANIFEST)
    run = RunStore(Home(tmp_path / "home")).plan(request, bundle=text.encode(), code={})
    attempts = []
    for node in nodes:
        monkeypatch.setenv(compile_cache.PLACE, str(tmp_path / node))
        attempts.append(run.attempt(1 + len(run.attempts())))
        worker.run_attempt(str(run.root), attempts[-1].number, 1, "", 60.0, 0.5)
        assert protocol.read_result(attempts[-1].result).status == status
    return attempts


@extracts
def test_a_job_on_another_node_starts_warm(tmp_path, monkeypatch, capfd):
    attempts = attempts_of(tmp_path, nodes=("node-1", "node-2", "node-2"), monkeypatch=monkeypatch)
    assert [(attempt.root / "found").read_text() for attempt in attempts] == [
        "[False, False]", "[True, True]", "[True, True]",
    ]  # fmt: skip
    described = [protocol.read_json(attempt.env) for attempt in attempts]
    assert [entry["compile_cache"]["state"] for entry in described] == [COLD, RESTORED, LOCAL]
    assert [entry["compile_cache"]["restored_bytes"] for entry in described] == [0, 16, 0]
    [archive] = Home(tmp_path / "home").compile_cache.iterdir()
    assert archive == Home(tmp_path / "home").compiled(described[0]["compile_cache"]["key"])
    directories = described[1]["environment"]
    assert all(directories[name].startswith(str(tmp_path / "node-2")) for name in compile_cache.DIRECTORIES)
    assert capfd.readouterr().out == ""


@extracts
def test_a_trial_with_another_learning_rate_starts_warm(tmp_path, monkeypatch):
    attempts_of(tmp_path, monkeypatch=monkeypatch, ttt__lr=0.001)
    [attempt] = attempts_of(tmp_path, nodes=("node-2",), monkeypatch=monkeypatch, ttt__lr=0.01, optim__matrix_lr=0.1)
    assert (attempt.root / "found").read_text() == "[True, True]"


@pytest.mark.parametrize("status", [protocol.FAILED, protocol.STOPPED])
def test_only_a_complete_run_is_saved(tmp_path, monkeypatch, status):
    attempts_of(tmp_path, status=status, monkeypatch=monkeypatch)
    assert not Home(tmp_path / "home").compile_cache.exists()


def test_the_users_own_directory_reaches_the_trainer(tmp_path, monkeypatch):
    for variable in compile_cache.DIRECTORIES:
        monkeypatch.setenv(variable, str(tmp_path / "own" / variable))
    [attempt] = attempts_of(tmp_path, monkeypatch=monkeypatch)
    assert protocol.read_json(attempt.env)["compile_cache"]["state"] == OWN
    assert len(names_in(tmp_path / "own")) == 2
    assert not Home(tmp_path / "home").compile_cache.exists()


def test_a_damaged_archive_fails_no_run(tmp_path, monkeypatch, capfd):
    [attempt] = attempts_of(tmp_path, monkeypatch=monkeypatch)
    [archive] = Home(tmp_path / "home").compile_cache.iterdir()
    archive.write_bytes(archive.read_bytes()[:20])
    [attempt] = attempts_of(tmp_path, nodes=("node-2",), monkeypatch=monkeypatch)
    assert protocol.read_json(attempt.env)["compile_cache"]["state"] == COLD
    assert "damaged" in capfd.readouterr().err and compile_cache.archived_files(archive) == 2
