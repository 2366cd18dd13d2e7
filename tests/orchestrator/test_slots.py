import pytest

from orchestrator import slots
from orchestrator.errors import MachineError
from orchestrator.slots import JobResources, Slots, machine_gpus, machine_slots


def test_a_slot_is_given_once_and_again_after_its_release():
    places = Slots(((), ()))
    assert [places.acquire("a"), places.acquire("b"), places.acquire("c")] == [0, 1, None]
    places.release("a")
    places.release("nobody")
    assert places.acquire("c") == 0


def test_the_slot_that_is_wanted_is_given_while_it_is_free_and_else_the_first():
    places = Slots(((), (), ()))
    assert [places.acquire("a", rather=1), places.acquire("b", rather=1), places.acquire("c", rather=7)] == [1, 0, 2]


def test_a_slot_is_not_free_while_an_earlier_job_holds_one_of_its_gpus_under_another_division():
    places = Slots((("0", "1"), ("2", "3")))
    places.occupy("earlier", slot=5, gpus=("1",))
    assert places.free == [1]


def test_jobs_from_before_the_number_of_places_was_lowered_still_count():
    places = Slots(((),))
    places.occupy("earlier", slot=3, gpus=())
    assert places.free == []


def test_a_slot_that_rests_is_passed_over_each_time_longer_until_a_run_began_on_it(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(slots.time, "monotonic", lambda: now)
    places = Slots((("0",), ("1",)))
    rests = []
    for _ in range(5):
        rests.append(places.rest(0))
        assert places.free == [1]
        now += rests[-1] - 1
        assert places.acquire("a") == 1
        places.release("a")
        now += 1
        assert places.acquire("a") == 0
        places.release("a")
    assert rests == [15.0, 60.0, 300.0, 900.0, 900.0]
    places.has_served(0)
    assert places.rest(0) == 15.0


def test_gpus_are_grouped_and_the_rest_is_left_over(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5, GPU-ab,7,9")
    assert machine_slots(slots=1, gpus_per_run=2).groups == (("4", "5"), ("GPU-ab", "7"))


def test_places_on_the_cpu_have_no_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert machine_slots(slots=3, gpus_per_run=0).groups == ((), (), ())


def test_too_few_gpus_are_an_error_that_names_both_numbers(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(MachineError, match="gpus_per_run is 8, this machine offers 1") as caught:
        machine_slots(slots=1, gpus_per_run=8)
    assert "gpus_per_run = 0" in caught.value.hint


def test_minus_one_hides_every_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert machine_gpus() == []


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'; echo '  MIG 1g: x'; echo 'GPU 1: NVIDIA H100 (UUID: GPU-2)'",
            ["0", "1"],
        ),
        ("echo 'GPU 0: half a driver'; exit 9", []),
    ],
)
def test_without_a_restriction_the_driver_lists_the_gpus(tmp_path, monkeypatch, script, expected):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine_gpus() == expected


def test_without_a_driver_there_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine_gpus() == []


def test_resources_are_read_back_from_a_record():
    resources = JobResources(slot=1, gpus=("0", "3"), processes=2, timeout_seconds=60.0)
    assert (
        JobResources.from_record({"slot": 1, "gpus": ["0", "3"], "processes": 2, "timeout_seconds": 60.0}) == resources
    )


def test_resources_of_a_cluster_are_read_back_and_counted():
    resources = JobResources(
        slot=0, processes=8, timeout_seconds=60.0, nodes=2, gpus_per_node=8, exclude=("node3",), beside=3
    )
    assert JobResources.from_record({**vars(resources), "exclude": ["node3"]}) == resources
    assert (resources.gpu_count, JobResources(slot=0, gpus=("4", "7"), timeout_seconds=1.0).gpu_count) == (16, 2)
