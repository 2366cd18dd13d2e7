import pytest
import torch

from tests.trainer.tiny import ALONE
from trainer.config import RuntimeConfig


def numbers(world, rows):
    """Of this process: (rows, 3), each process's a hundred above the one before."""
    return torch.arange(3.0 * rows).view(rows, 3) + 100 * world.rank


def sums(world):
    return world.begin_sum(numbers(world, 2)).arrived().tolist()


def shares_of_a_sum(world):
    return world.begin_scatter(numbers(world, 4)).arrived().tolist()


def shares_together(world):
    return world.begin_gather(numbers(world, 2)[:, :1]).arrived().flatten().tolist()


def decisions(world):
    return world.agree(float(world.rank), 0.1), world.largest(float(world.rank))


def test_processes_add_up(pair):
    total = (2 * torch.arange(6.0).view(2, 3) + 100).tolist()
    assert pair(sums) == [total, total]


def test_each_process_gets_its_share_of_a_sum(pair):
    total = 2 * torch.arange(12.0).view(4, 3) + 100
    assert pair(shares_of_a_sum) == [total[:2].tolist(), total[2:].tolist()]


def test_shares_are_put_one_behind_the_other_by_rank(pair):
    assert pair(shares_together) == 2 * [[0.0, 3.0, 100.0, 103.0]]


def test_the_first_process_decides_and_the_slowest_is_heard(pair):
    assert pair(decisions) == 2 * [((0.0, 0.1), 1.0)]


def test_a_process_alone_has_what_it_brings():
    assert sums(ALONE) == numbers(ALONE, 2).tolist()
    assert shares_of_a_sum(ALONE) == numbers(ALONE, 4).tolist()
    assert shares_together(ALONE) == [0.0, 3.0]
    assert decisions(ALONE) == ((0.0, 0.1), 0.0)


def test_on_a_cpu_a_batch_stays_where_it_is():
    batch = torch.arange(3)
    assert ALONE.moved(batch) is batch


@pytest.mark.parametrize(
    ("asked", "precision"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_a_cpu_computes_in_float32_unless_asked(asked, precision):
    assert ALONE.precision(RuntimeConfig(precision=asked)) == precision
