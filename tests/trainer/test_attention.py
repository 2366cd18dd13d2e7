import pytest
import torch

from tests.trainer.tiny import CONFIG
from trainer.attention import Attention, causal_attention, rotary_tables
from trainer.config import Config, with_knobs
from trainer.kernels import rotate

MODEL = Config().model


def joined(attention):
    """Its first three matrices, as the block hands them to it."""
    return torch.cat((attention.query.weight, attention.key.weight, attention.value.weight))


def test_rotary_tables_are_exact_to_float32_at_every_position():
    cos, sin = rotary_tables(2048, MODEL, train_length=2048, device=torch.device("cpu"))
    positions = torch.arange(2048, dtype=torch.float64)
    frequencies = MODEL.rope_base ** (-torch.arange(0, MODEL.rope_dims, 2, dtype=torch.float64) / MODEL.rope_dims)
    angles = torch.outer(positions, frequencies)
    # An angle of 2,047 has a spacing of 1.2e-4 in float32; half of it is the largest error of its cosine.
    assert (cos.double() - angles.cos()).abs().max() < 1.3e-4
    assert (sin.double() - angles.sin()).abs().max() < 1.3e-4


def test_rotary_tables_ignore_the_model_being_cast_to_bfloat16():
    torch.set_default_dtype(torch.bfloat16)
    try:
        cos, _ = rotary_tables(2048, MODEL, train_length=2048, device=torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert cos.dtype == torch.float32
    assert cos[:, 0].unique().numel() > 2000  # bfloat16 positions leave 641 values


def test_a_longer_context_stretches_the_base():
    base = with_knobs(Config(), {"model.rope_base": MODEL.rope_base * 2 ** (16 / 14)}).model
    stretched, _ = rotary_tables(4096, MODEL, train_length=2048, device=torch.device("cpu"))
    expected, _ = rotary_tables(4096, base, train_length=4096, device=torch.device("cpu"))
    # base ** x is rounded to float32, and 4,095 times that rounding is an angle
    torch.testing.assert_close(stretched, expected, atol=2e-3, rtol=0)


def test_rotation_keeps_lengths_and_leaves_the_other_dimensions_alone():
    x = torch.randn(2, 8, 3, 64)
    tables = rotary_tables(8, MODEL, train_length=8, device=torch.device("cpu"))
    y = rotate(x, *tables)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(y[..., MODEL.rope_dims :], x[..., MODEL.rope_dims :], atol=0, rtol=0)
    torch.testing.assert_close(y[:, 0], x[:, 0], atol=0, rtol=0)


def test_rotated_products_depend_on_distance_alone():
    q, k = torch.randn(16), torch.randn(16)
    cos, sin = rotary_tables(64, MODEL, train_length=64, device=torch.device("cpu"))

    def product(i, j):
        at_i = rotate(q.expand(1, 64, 1, 16), cos, sin)[0, i, 0]
        return at_i @ rotate(k.expand(1, 64, 1, 16), cos, sin)[0, j, 0]

    torch.testing.assert_close(product(7, 3), product(60, 56), atol=1e-4, rtol=1e-4)  # float32 angles near 60


@pytest.mark.parametrize(("knob", "value"), [("qk_norm", False), ("qk_gain", 0.0), ("rope_dims", 0), ("xsa_layers", 0)])
def test_each_part_of_attention_can_be_off_and_changes_the_output(knob, value):
    def output(config):
        torch.manual_seed(0)
        attention = Attention(config, layer=0)
        x = torch.randn(1, 8, config.width, generator=torch.Generator().manual_seed(1))
        rotary = rotary_tables(8, config, train_length=8, device=torch.device("cpu"))
        return attention(x, joined(attention), rotary, None, scored=8)

    assert not torch.allclose(output(CONFIG.model), output(with_knobs(CONFIG, {f"model.{knob}": value}).model))


def test_grouped_queries_share_the_right_key_and_value_heads():
    torch.manual_seed(0)
    config = with_knobs(
        CONFIG, {"model.qk_norm": False, "model.qk_gain": 0.0, "model.rope_dims": 0, "model.xsa_layers": 0}
    ).model
    attention = Attention(config, layer=0)
    x = torch.randn(1, 6, config.width)
    q, k, v = (f(x).view(6, -1, config.head_dim) for f in (attention.query, attention.key, attention.value))
    mask = torch.full((6, 6), float("-inf")).triu(1)
    heads = []
    for head in range(config.heads):
        shared = head // (config.heads // config.kv_heads)
        weights = (q[:, head] @ k[:, shared].T * config.head_dim**-0.5 + mask).softmax(-1)
        heads.append(weights @ v[:, shared])
    expected = torch.stack(heads, dim=1).view(1, 6, -1)
    torch.testing.assert_close(attention(x, joined(attention), None, None, scored=6), expected)


@pytest.mark.parametrize("changes", [{}, {"qk_gain": 0.0}, {"rope_dims": 0}, {"xsa_layers": 0}])
def test_asking_the_last_positions_alone_gives_what_they_read_of_all(changes):
    torch.manual_seed(0)
    config = with_knobs(CONFIG, {f"model.{name}": value for name, value in changes.items()}).model
    attention = Attention(config, layer=0)
    x, added = torch.randn(2, 8, config.width), torch.randn(2, 8, config.kv_heads * config.head_dim)
    rotary = rotary_tables(8, config, train_length=8, device=x.device) if config.rope_dims else None
    everything = attention(x, joined(attention), rotary, added, scored=8)
    for scored in (1, 3, 7):
        last = attention(x, joined(attention), rotary, added, scored=scored)
        torch.testing.assert_close(last, everything[:, -scored:])  # products of fewer rows


def test_the_last_queries_see_everything_up_to_themselves():
    q, k, v = torch.randn(1, 3, 4, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
    before = causal_attention(q, k, v)
    k[:, 5], v[:, 5] = 7.0, 7.0  # the last position
    after = causal_attention(q, k, v)
    torch.testing.assert_close(after[:, :2], before[:, :2], atol=0, rtol=0)
    assert not torch.allclose(after[:, 2], before[:, 2])
