import json
import struct

import brotli
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.tiny import rounded
from trainer.artifact import MAGIC, ModelFile, compress, decode, encode, load
from trainer.errors import ProtocolError
from trainer.gptq import Quantized


@pytest.fixture(scope="module")
def file():
    torch.manual_seed(0)
    tensors = {
        "matrix": rounded(torch.randn(48, 32)),
        "half": torch.randn(5, 3).half(),
        "vector": torch.randn(7),
        "scalar": torch.tensor(0.5),
    }
    return ModelFile({"config": {"model": {"width": 32}}, "recurrent": True}, tensors)


def same(a, b):
    if isinstance(a, Quantized):
        return torch.equal(a.integers_MN, b.integers_MN) and torch.equal(a.scales_M, b.scales_M)
    return a.dtype == b.dtype and torch.equal(a, b)


def test_a_model_file_comes_back_bit_for_bit(file):
    back = load(compress(encode(file), 11), "model")
    assert back.meta == file.meta
    assert list(back.tensors) == list(file.tensors)
    assert all(same(back.tensors[name], tensor) for name, tensor in file.tensors.items())
    assert all(torch.equal(back.state()[name], tensor) for name, tensor in file.state().items())


def test_the_same_tensors_give_the_same_bytes(file):
    assert compress(encode(file), 11) == compress(encode(load(compress(encode(file), 5), "model")), 11)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"PK\x03\x04" + raw[4:], "not a model file"),
        (lambda raw: raw[:4], "not a model file"),
        (lambda raw: raw[:-1], "its header describes"),
        (lambda raw: raw + b"\0", "its header describes"),
        (lambda raw: raw[:12] + b"[" + raw[13:], "damaged header"),
        (lambda raw: raw[:8] + struct.pack("<I", 2**31) + raw[12:], "damaged header"),
        (lambda raw: raw.replace(b'"q"', b'"z"', 1), "name, code or shape"),
        (
            lambda raw: raw.replace(b'"half"', b'"scalar"', 1).replace(b"\x00", b"\x00", 1),
            "damaged header|describes|name",
        ),
    ],
)
def test_damage_is_named_and_nothing_else_comes_out(file, damage, message):
    with pytest.raises(ProtocolError, match=message):
        decode(damage(encode(file)), "model")


@pytest.mark.parametrize(
    "damage", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"\xff" * 40, lambda c: c + b"more"]
)
def test_a_damaged_stream_is_named(file, damage):
    with pytest.raises(ProtocolError, match="model: compressed content is"):
        load(damage(compress(encode(file), 5)), "model")


def header_of(tensors):
    header = json.dumps({"meta": {}, "tensors": tensors}).encode()
    return MAGIC + struct.pack("<I", len(header)) + header


@pytest.mark.parametrize(
    "tensors",
    [
        [["a", "q", [2**40, 2**40]]], [["a", "f", [-1]]], [["a", "q", [4]]], [["a", "f"]], [["a", "f", ["x"]]], "abc", [7],
        [["a", "f", []], ["a", "f", []]], [["a", "", [1]]], [["a", "qh", [1, 1]]],
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused_before_memory_is_taken(tensors):
    with pytest.raises(ProtocolError):
        decode(header_of(tensors) + b"\0" * 8, "model")


@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_any_changed_byte_is_read_or_refused_in_our_own_words(position, value):
    raw = bytearray(
        encode(ModelFile({"a": 1}, {"m": Quantized(torch.ones(2, 3, dtype=torch.int8), torch.ones(2).half())}))
    )
    raw[position % len(raw)] = value
    try:
        assert decode(bytes(raw), "model").tensors
    except ProtocolError:
        pass
    try:
        load(bytes(raw), "model")
    except ProtocolError:
        pass


def test_bytes_are_brotli_of_the_flat_format(file):
    assert brotli.decompress(compress(encode(file), 11)) == encode(file)
    assert encode(file).startswith(MAGIC)
