import socket

import pytest

from orchestrator.allocation import Allocation, expand_nodes


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("node1", ("node1",)),
        ("a,b", ("a", "b")),
        ("node[1-3]", ("node1", "node2", "node3")),
        ("gpu[008-010,12],login", ("gpu008", "gpu009", "gpu010", "gpu12", "login")),
        ("r[1-2]n[1,3]-ib", ("r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib")),
    ],
)
def test_a_list_of_nodes_is_read_as_slurm_writes_it(text, names):
    assert expand_nodes(text) == names


@pytest.mark.parametrize("text", ["node[1", "a,,b", "a[1-x]"])
def test_what_is_no_list_of_nodes_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 of a library's number too
        expand_nodes(text)


def test_a_worker_finds_its_place_in_its_environment():
    environment = {
        "SLURM_JOB_ID": "77", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[4-5]", "SLURM_RESTART_COUNT": "2",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }  # fmt: skip
    found = Allocation.from_environment(environment)
    assert (found.job, found.restarts, found.node, found.nodes, found.name, found.gpus) == (
        "77",
        2,
        1,
        2,
        "node5",
        "0,1",
    )


def test_outside_slurm_there_is_one_node_without_a_name():
    found = Allocation.from_environment({})
    assert (found.job, found.restarts, found.node, found.nodes, found.name, found.gpus) == ("", 0, 0, 1, "", "")


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, "0,1,2,3"),
        ({"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "0,1"),
        ({"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "6,7"}, "6,7"),
        ({"CUDA_VISIBLE_DEVICES": ""}, ""),
    ],
)
def test_gpus_that_slurm_only_counts_are_the_first_ones(environment, gpus):
    assert Allocation.from_environment(environment).gpus == gpus


def test_the_nodes_meet_at_a_free_port_of_the_first_one():
    host, _, port = Allocation(job="1", names=("localhost", "other")).rendezvous().rpartition(":")
    assert host == "localhost"
    with socket.socket() as server:
        server.bind(("127.0.0.1", int(port)))


def test_a_node_whose_name_in_slurm_is_no_hosts_is_met_by_its_own():
    host, _, _ = Allocation(job="1", names=("no-such-host.invalid", "b")).rendezvous().rpartition(":")
    assert host == socket.gethostname()
