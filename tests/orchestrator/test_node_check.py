import dataclasses
import errno
import hashlib
import os
import stat
import sys
import time

import pytest
from fakes import FAKE_BUNDLE, tiny_study, write_plans
from make_controller import controller

from orchestrator import compile_cache, node_check, slots
from orchestrator.demands import DemandBook
from orchestrator.errors import DataError, StorageError
from orchestrator.launcher import LocalLauncher
from orchestrator.ledger import Attempt, StudyState
from orchestrator.node_check import Demands, Node, NodeRefused, Pace
from orchestrator.runs import RunRequest, RunStore
from trainer import protocol
from trainer.protocol import DataDir, EventLog, Manifest, Shard, Split


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The node's temporary directory."""
    monkeypatch.setenv(compile_cache.PLACE, str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    return tmp_path / "node"


@pytest.fixture
def data(tmp_path):
    """A data set of four small shards."""
    folder = DataDir(tmp_path / "data")
    folder.root.mkdir()
    splits = {}
    for split, count in (("train", 3), ("val", 1)):
        shards = []
        for number in range(count):
            path = folder.shard(split, number)
            path.write_bytes(f"{split} {number} ".encode() * 100)
            shards.append(
                Shard(
                    file=path.name, tokens=1, bytes=path.stat().st_size, sha256=protocol.sha256_of(path),
                    first_document=number, documents=1,
                )
            )  # fmt: skip
        splits[split] = Split(shards=tuple(shards), tokens=count, documents=count, text_bytes=10)
    folder.tokenizer.write_bytes(b"model")
    manifest = Manifest(
        source="test", recipe={}, tokenizer=folder.tokenizer.name, vocab_size=8, splits=splits,
        tokenizer_sha256=hashlib.sha256(b"model").hexdigest(),
    )  # fmt: skip
    protocol.write_manifest(folder.manifest, manifest)
    return folder


@pytest.fixture
def node(home, data):
    """The node of a run that is asked for on the CPU."""
    study = tiny_study()
    request = RunRequest(
        preset="smoke", config=study.config, seed=1, data_dir=str(data.root),
        manifest_sha256=protocol.sha256_of(data.manifest),
    )  # fmt: skip
    run = RunStore(home).plan(request, bundle=FAKE_BUNDLE, code={})
    files = run.attempt(1)
    ask(files)
    return Node(run=run, files=files, spec=protocol.read_spec(run.spec), name="node7", gpus="")


def ask(files, **demands):
    protocol.write_json_atomically(files.demands, dataclasses.asdict(Demands(**demands)))


def found(node, number=0):
    """Status of each check on record."""
    record = protocol.read_json(node.files.node_check(number))
    assert record["node"] == "node7"
    return {check["name"]: check["status"] for check in record["checks"]}


def test_a_sound_node_is_let_through_with_what_was_found(node):
    began = time.monotonic()
    node_check.require(node)
    assert time.monotonic() - began < 3.0
    assert found(node) == {"disk": "passed", "data": "passed", "compile cache": "passed"}
    assert not node_check.was_refused(node.files, 1)


def test_without_demands_nothing_is_looked_at(node):
    node.files.demands.unlink()
    node_check.require(node)
    assert not node.files.node_check(0).exists()


# ------------------------------------------------------------------------------------------------ data and disk


def test_a_node_that_does_not_see_the_data_set_is_refused_and_named(node, data):
    data.root.rename(data.root.with_name("elsewhere"))
    with pytest.raises(NodeRefused, match="node node7 was refused: data: .*manifest.json: not there") as caught:
        node_check.require(node)
    assert "preflight = false" in caught.value.hint
    assert found(node)["data"] == "failed" and node_check.was_refused(node.files, 1)


@pytest.mark.parametrize("harm", ["missing", "shorter", "changed", "another manifest"])
def test_a_data_set_that_is_wrong_for_every_node_is_no_nodes_fault(node, data, harm):
    path = data.shard("val", 0)
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "shorter":
        path.write_bytes(content[:-1])
    elif harm == "changed":
        path.write_bytes(b"x" + content[1:])
    else:
        data.manifest.write_text(data.manifest.read_text() + "\n")
    words = {"missing": "the shard is missing", "shorter": "bytes, the manifest says", "changed": "changed bytes"}
    with pytest.raises(DataError, match=words.get(harm, "its SHA-256 is not the spec's")):
        node_check.require(node)


def test_a_shard_that_cannot_be_read_here_is_the_nodes_fault(node, data, monkeypatch):
    monkeypatch.setattr(node_check, "_unreadable", lambda path, shard: f"{path}: {os.strerror(errno.ESTALE)}")
    with pytest.raises(NodeRefused, match="Stale file handle"):
        node_check.require(node)


def test_what_a_node_has_hashed_it_hashes_once(node, monkeypatch):
    node_check.require(node)
    hashed = []
    monkeypatch.setattr(node_check, "_require_content", lambda path, *_: hashed.append(path.name))
    node_check.require(node)
    assert hashed == []
    path = DataDir(node.run.root.parents[2] / "data").shard("train", 1)
    os.utime(path, (1, 1))
    node_check.require(node)
    assert hashed == [path.name]


def test_without_time_for_all_shards_each_run_takes_others_after_the_validation_split(node, data, monkeypatch):
    shards = [shard for split in protocol.read_manifest(data.manifest).splits.values() for shard in split.shards]
    validation = tuple(shard for shard in shards if shard.file.startswith("val"))
    orders = {tuple(shard.file for shard in node_check._in_order(validation, shards, f"run{n}")) for n in range(20)}
    assert len(orders) > 2 and {order[0] for order in orders} == {validation[0].file}
    assert all(sorted(order) == sorted(shard.file for shard in shards) for order in orders)
    monkeypatch.setattr(node_check, "HASH_SECONDS", -1.0)
    status, words = node_check.check_data(node, node_check.State(None))
    assert (status, "0 hashed now, 0 on this node so far" in words) == ("passed", True)


def test_a_disk_without_room_for_the_run_is_no_nodes_fault(node):
    limits = {**node.spec.config["limits"], "artifact_bytes": 2**60}
    full = dataclasses.replace(node, spec=dataclasses.replace(node.spec, config={**node.spec.config, "limits": limits}))
    with pytest.raises(StorageError, match="No space left on device"):
        node_check.require(full)


def test_a_node_without_room_for_what_is_compiled_is_refused(node, monkeypatch):
    monkeypatch.setattr(node_check, "NODE_BYTES", 2**60)
    with pytest.raises(NodeRefused, match="disk: .* bytes free for the run"):
        node_check.require(node)


# ------------------------------------------------------------------------------------------------ GPUs

SOUND = "NVIDIA H100 80GB HBM3, 81559, 4, 1980, 0, Not Active, Not Active"


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """An nvidia-smi that answers with these lines, or ends with this exit code."""

    def answers(lines, code=0):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "answer").write_text("".join(f"{line}\n" for line in lines))
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat {folder}/answer\nexit {code}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return answers


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({0: "NVIDIA A100-SXM4-80GB"}, "the GPUs are not alike: name is NVIDIA A100"),
        ({1: "40000"}, "the GPUs are not alike: memory.total"),
        ({2: "30000"}, "GPU 0 is in use: 30000 MiB"),
        ({3: "1200"}, "the GPUs are not alike: clocks.max.sm is 1200.0, 1980.0"),
        ({4: "2"}, "GPU 0 had 2 uncorrectable memory errors"),
        ({4: "[N/A]"}, ""),
        ({5: "Active"}, "GPU 0 is throttled: hw_slowdown"),
        ({6: "Active"}, "GPU 0 is throttled: hw_thermal_slowdown"),
    ],
)
def test_gpus_that_are_not_as_asked_are_refused_with_the_number(node, smi, changes, words):
    fields = SOUND.split(", ")
    smi([", ".join(changes.get(i, value) for i, value in enumerate(fields)), SOUND])
    status, said = node_check.check_gpus(
        dataclasses.replace(node, gpus="0,1"), Demands(gpus=2, gpu_model="h100", gpu_memory_gib=79)
    )
    assert status == ("failed" if words else "passed")
    assert words in said


@pytest.mark.parametrize(
    ("demands", "words"),
    [
        ({"gpu_model": "H200"}, "GPU 0 is NVIDIA H100 80GB HBM3, H200 was asked for"),
        ({"gpu_memory_gib": 141}, "GPU 0 has 80 GiB, 141 were asked for"),
        ({"gpus": 8}, r"2 GPUs are visible (0,1), 8 were asked for"),
    ],
)
def test_another_model_size_or_number_of_gpus_is_refused(node, smi, demands, words):
    smi([SOUND, SOUND])
    status, said = node_check.check_gpus(dataclasses.replace(node, gpus="0,1"), Demands(**{"gpus": 2, **demands}))
    assert (status, words in said) == ("failed", True)


def test_a_gpu_that_the_driver_does_not_list_and_a_driver_that_fails_are_refused(node, smi):
    two = dataclasses.replace(node, gpus="0,1")
    smi([SOUND])
    assert node_check.check_gpus(two, Demands(gpus=2)) == ("failed", "nvidia-smi lists 1 of 2 GPUs")
    smi(["Unable to determine the device handle for GPU0: Unknown Error"], code=15)
    status, said = node_check.check_gpus(two, Demands(gpus=2))
    assert (status, "nvidia-smi: Unable to determine the device handle" in said) == ("failed", True)


def test_a_driver_that_does_not_know_a_field_is_asked_for_the_others(node, smi, tmp_path):
    smi([SOUND.rpartition(", 4,")[0] + ", 4"] * 2)
    program = tmp_path / "bin" / "nvidia-smi"
    program.write_text(
        f'#!/bin/sh\ncase "$1" in *throttle*) echo "Field is not a valid field to query." >&2; exit 2;; esac\n'
        f"cat {program.parent}/answer\n"
    )
    status, said = node_check.check_gpus(dataclasses.replace(node, gpus="0,1"), Demands(gpus=2, gpu_memory_gib=80))
    assert (status, said) == ("passed", "2 × NVIDIA H100 80GB HBM3 at up to None MHz")


def test_where_there_is_no_nvidia_smi_nothing_is_decided(node, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    gpus = dataclasses.replace(node, gpus="0,1")
    assert node_check.check_gpus(gpus, Demands(gpus=2))[0] == "undecided"
    assert node_check.check_all_reduce(gpus, node_check.State(None))[0] == "undecided"


@pytest.mark.parametrize(("script", "status", "words"), [
    ("import os; print('310.5 GB/s') if os.environ['LOCAL_RANK'] == '0' else None", "passed", "2 GPUs, 310.5 GB/s"),
    ("raise SystemExit('rank 1: the sum over 2 GPUs is wrong: [3.5], not 3.0')", "failed", "is wrong: [3.5]"),
    ("import time; time.sleep(60)", "failed", "did not come within 2 s"),
])  # fmt: skip
def test_the_sum_over_the_gpus_is_believed_for_an_hour_where_it_was_right(
    node, smi, monkeypatch, script, status, words
):
    smi([SOUND, SOUND])
    monkeypatch.setattr(node_check, "ALL_REDUCE", script)
    monkeypatch.setattr(node_check, "REDUCE_SECONDS", 2.0 if "sleep" in script else 120.0)
    two = dataclasses.replace(node, gpus="0,1", python=str(torchrun_of(node.run.root)))
    state = node_check.State(None)
    found_status, said = node_check.check_all_reduce(two, state)
    assert (found_status, words in said) == (status, True), said
    if status == "passed":
        monkeypatch.setattr(node_check, "ALL_REDUCE", "raise SystemExit(1)")
        assert node_check.check_all_reduce(two, state) == ("passed", "shown within the last hour")


def torchrun_of(folder):
    """An interpreter that takes torchrun's options and starts two processes; torch itself takes seconds to load."""
    program = folder / "python"
    program.write_text(
        f'#!/bin/sh\nfor script; do :; done\nLOCAL_RANK=1 {sys.executable} "$script" && LOCAL_RANK=0 {sys.executable} "$script"\n'
    )
    program.chmod(0o755)
    return program


# ------------------------------------------------------------------------------------------------ pace


def log_steps(files, speeds):
    events = EventLog(files.events)
    for step, speed in enumerate(speeds, start=1):
        events.metrics(step, step * 0.1, train_loss=2.0, tokens_per_second=speed)


@pytest.mark.parametrize(("speed", "is_slow"), [(1000.0, False), (810.0, False), (790.0, True)])
def test_first_steps_far_slower_than_those_of_earlier_runs_are_the_nodes_fault(node, speed, is_slow):
    ask(node.files, gpus=8, tokens_per_second=1000.0)
    pace = Pace(node.files, is_alone=True)
    log_steps(node.files, [speed] * 9)
    assert pace.problem() == "", "not before the step that is compared"
    node.files.events.unlink()
    log_steps(node.files, [speed] * 12)
    assert bool(pace.problem()) == is_slow
    if is_slow:
        assert pace.problem() == "pace: 790 tokens/s over 10 steps; earlier runs of the study had 1,000"
        error = node_check.refuse("node7", node.files, pace.problem())
        assert "node node7 was refused: pace: 790 tokens/s" in str(error)
        assert found(node) == {"pace": "failed"}


def test_on_the_cpu_and_on_several_nodes_the_pace_says_nothing(node):
    log_steps(node.files, [1.0] * 12)
    ask(node.files, gpus=0, tokens_per_second=1000.0)
    assert not Pace(node.files, is_alone=True).problem()
    ask(node.files, gpus=8, tokens_per_second=1000.0)
    assert not Pace(node.files, is_alone=False).problem()


def test_the_median_is_that_of_complete_runs_that_compute_alike(home, node):
    study = checked(tiny_study(resources="gpus_per_run = 8"))
    book = DemandBook(study, home)
    state = StudyState()
    runs = [node.run.run_id]
    for seed, config in ((2, study.config), (3, study.config), (4, study.config), (5, other_depth(study))):
        request = RunRequest(preset="smoke", config=config, seed=seed, data_dir="/d", manifest_sha256="m")
        run = RunStore(home).plan(request, bundle=FAKE_BUNDLE, code={})
        log_steps(run.attempt(1), [seed * 100.0] * 12)
        state.add(Attempt(run_id=run.run_id, number=1, tag="t", resources={}, submitted=0.0, status=protocol.COMPLETE))
        runs.append(run.run_id)
    assert book.median(runs[0], state) == 300.0
    assert book.median(runs[-1], state) == 0.0, "one alike is too few"
    book.write(runs[0], 1, state)
    asked = node_check.read_demands(home.run(runs[0]).attempt(1))
    assert (asked.gpus, asked.tokens_per_second) == (8, 300.0)


def checked(study):
    return dataclasses.replace(study, resources=dataclasses.replace(study.resources, preflight=True))


def other_depth(study):
    return dataclasses.replace(study.config, evaluation=dataclasses.replace(study.config.evaluation, stride=32))


# ------------------------------------------------------------------------------------------------ a real job


def test_a_run_is_attempted_again_where_its_node_was_refused_and_no_trainer_started(home, data, monkeypatch):
    """The node does not see the data set at first."""
    monkeypatch.setattr(slots, "REST_SECONDS", (0.1,))
    away = data.root.with_name("away")
    data.root.rename(away)

    class Mounting(LocalLauncher):
        def submit(self, run, attempt, *, tag, resources):
            if attempt == 2:
                away.rename(data.root)
            return super().submit(run, attempt, tag=tag, resources=resources)

    write_plans(home, {})
    study = checked(tiny_study(trials=1, confirm=None))
    manifest_sha256 = protocol.sha256_of(DataDir(away).manifest)
    state = controller(
        study, home, launcher=Mounting(), poll_seconds=0.02, data_dir=data.root, manifest_sha256=manifest_sha256
    ).run()
    (run_id,) = state.run_ids
    first, second = state.attempts_of(run_id)
    assert (first.status, first.failure, first.is_refused) == ("failed", protocol.NODE, True)
    assert second.status == protocol.COMPLETE
    assert not home.run(run_id).attempt(1).events.exists()
    result = protocol.read_result(home.run(run_id).attempt(1).result)
    assert f"node {os.uname().nodename} was refused: data" in result.failure.message
