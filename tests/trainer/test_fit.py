import torch

from tests.trainer.tiny import rounded
from trainer.artifact import ModelFile, compress, encode, load
from trainer.fit import fit, prune
from trainer.gptq import Quantized


def test_pruning_zeroes_the_ones_with_the_smallest_scales_first():
    tensors = {
        "a": Quantized(torch.tensor([[1, -1, 2], [1, 0, 3]], dtype=torch.int8), torch.tensor([0.5, 0.1]).half()),
        "b": Quantized(torch.tensor([[-1, 5]], dtype=torch.int8), torch.tensor([0.2]).half()),
        "c": torch.ones(2),
    }
    pruned = prune(tensors, 2)
    assert pruned["a"].integers_MN.tolist() == [[1, -1, 2], [0, 0, 3]]
    assert pruned["b"].integers_MN.tolist() == [[0, 5]]
    assert tensors["b"].integers_MN.tolist() == [[-1, 5]]
    assert pruned["c"] is tensors["c"]


def small_file():
    torch.manual_seed(0)
    return ModelFile({}, {"m": rounded(torch.randn(20, 20))})


def big_file():
    torch.manual_seed(0)
    return ModelFile({}, {"m": rounded(torch.randn(200, 200))})


def test_a_file_that_fits_is_left_alone():
    compressed, pruned = fit(small_file(), cap_bytes=10**6, quality=5)
    assert pruned == 0
    assert compressed == compress(encode(small_file()), 5)


def test_a_file_over_its_cap_is_pruned_until_it_fits():
    whole, _ = fit(big_file(), cap_bytes=10**6, quality=9)
    cap = len(whole) - 300
    compressed, pruned = fit(big_file(), cap_bytes=cap, quality=9)
    assert len(compressed) <= cap
    assert 0 < pruned < 6000
    assert load(compressed, "model").tensors["m"].integers_MN.shape == (200, 200)


def test_a_cap_out_of_reach_gives_the_whole_file_back():
    whole, _ = fit(big_file(), cap_bytes=10**6, quality=5)
    assert fit(big_file(), cap_bytes=100, quality=5) == (whole, 0)


def test_a_file_without_quantised_tensors_cannot_be_pruned():
    plain = ModelFile({}, {"v": torch.randn(50)})
    assert fit(plain, cap_bytes=1, quality=5)[1] == 0
