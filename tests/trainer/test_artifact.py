import contextlib
import json
import struct

import brotli
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.tiny import rounded
from trainer.artifact import (
    BYTES_A_BYTE,
    CODERS,
    HEAD,
    MAGIC,
    SMALL_BYTES,
    ModelFile,
    decode,
    encode,
    estimate,
    load,
    pack,
)
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


@pytest.mark.parametrize("coder", CODERS)
def test_a_model_file_comes_back_bit_for_bit(file, coder):
    back = load(pack(file, coder, 11), "model")
    assert back.meta == file.meta
    assert list(back.tensors) == list(file.tensors)
    assert all(same(back.tensors[name], tensor) for name, tensor in file.tensors.items())
    assert all(torch.equal(back.state()[name], tensor) for name, tensor in file.state().items())


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize(
    "tensors",
    [
        {}, {"v": torch.zeros(0)}, {"m": Quantized(torch.zeros(0, 4, dtype=torch.int8), torch.zeros(0).half())},
        {"m": Quantized(torch.zeros(4, 0, dtype=torch.int8), torch.ones(4).half())},
        {"m": Quantized(torch.full((1, 1), -127, dtype=torch.int8), torch.ones(1).half()), "s": torch.tensor(2.0).half()},
    ],
)  # fmt: skip
def test_empty_and_single_values_come_back(tensors, coder):
    back = load(pack(ModelFile({}, tensors), coder, 5), "model")
    assert all(same(back.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("coder", CODERS)
def test_the_same_tensors_give_the_same_bytes(file, coder):
    assert pack(file, coder, 11) == pack(load(pack(file, coder, 5), "model"), coder, 11)


def trained_like(seed, spread_of_rows, spread_of_columns):
    """Matrices whose rows and columns differ in size (spreads of its logarithm), and a table."""
    chance = torch.Generator().manual_seed(seed)

    def matrix(rows, columns, bits):
        spread = (
            torch.randn(rows, 1, generator=chance) * spread_of_rows
            + torch.randn(columns, generator=chance) * spread_of_columns
        ).exp()
        return rounded(torch.randn(rows, columns, generator=chance) * spread, bits=bits)

    return ModelFile({}, {"up": matrix(512, 256, 6), "down": matrix(256, 512, 5), "table": matrix(1024, 64, 8)})


@pytest.mark.parametrize(("coder", "tolerance"), [("entropy", 0.001), ("brotli", 0.02)])
def test_the_size_is_known_before_packing(coder, tolerance):
    file = trained_like(0, 0.05, 0.1)
    assert estimate(file, coder, 11) == pytest.approx(len(pack(file, coder, 11)), rel=tolerance)


def test_rows_and_columns_that_differ_are_worth_coding():
    file = trained_like(1, 0.2, 0.3)
    assert len(pack(file, "entropy", 11)) < 0.985 * len(pack(file, "brotli", 11))


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


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[: len(c) // 2], "compressed content is|checksum|coded integers are"), (lambda c: b"", "not a model file: it begins with b''"),
        (lambda c: b"\xff" * 40, "not a model file"), (lambda c: c + b"more", "checksum"),
        (lambda c: c[:9] + b"\xff" * 9 + c[18:], "compressed content is damaged"),
        (lambda c: c[:2] + bytes([c[2] ^ 1]) + c[3:], "checksum"), (lambda c: c[:-5] + b"wrong", "checksum|compressed content is"),
        (lambda c: bytes([1 - c[0]]) + c[1:], "its header describes|checksum"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(file, coder, damage, message):
    with pytest.raises(ProtocolError, match=rf"^model: .*({message})"):
        load(damage(pack(file, coder, 5)), "model")


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


def coded_file(tensors, limits, words=b"", *, halves=0):
    """A file of the entropy coder whose header and words say what they like; its checksum is of nothing."""
    part = brotli.compress(header_of(tensors) + b"\0" * 2 * halves + bytes(limits), quality=1)
    return HEAD.pack(CODERS.index("entropy"), 0, len(part)) + part + words


def test_a_small_file_cannot_claim_many_integers():
    packed = coded_file([["a", "q", [1, 2**31 - 1]]], [31], halves=1)
    most = BYTES_A_BYTE * len(packed) + SMALL_BYTES
    with pytest.raises(ProtocolError, match=f"describes {2**31 - 1} integers, so small a file has at most {most}"):
        load(packed, "model")


def test_a_small_file_cannot_unpack_to_much():
    part = brotli.compress(b"\0" * (SMALL_BYTES + 2**20))
    with pytest.raises(ProtocolError, match="cut off or too long"):
        load(HEAD.pack(0, 0, len(part)) + part, "model")


def test_a_wrong_largest_integer_is_named():
    with pytest.raises(ProtocolError, match=r"model: the largest integers .* got \[200\]"):
        load(coded_file([["a", "q", [2, 3]]], [200], halves=2), "model")


def read_or_refused(read):
    """What was read; None where it was refused in our own words, with the file's name first."""
    with contextlib.suppress(ProtocolError):
        return read()
    with pytest.raises(ProtocolError, match="^model: "):
        read()
    return None


@pytest.mark.parametrize("coder", CODERS)
def test_a_changed_byte_never_gives_another_model(file, coder):
    packed, content = pack(file, coder, 5), encode(file)

    @given(position=st.integers(0, len(packed) - 1), change=st.integers(1, 255))
    @settings(max_examples=1000, deadline=None)
    def holds(position, change):
        damaged = packed[:position] + bytes([packed[position] ^ change]) + packed[position + 1 :]
        assert read_or_refused(lambda: encode(load(damaged, "model"))) in (content, None)

    holds()


@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
@settings(max_examples=2000, deadline=None)
def test_any_changed_content_is_read_or_refused_in_our_own_words(position, value):
    matrix = Quantized(torch.ones(2, 3, dtype=torch.int8), torch.ones(2).half())
    raw = bytearray(encode(ModelFile({"a": 1}, {"m": matrix})))
    raw[position % len(raw)] = value
    found = read_or_refused(lambda: decode(bytes(raw), "model").tensors)
    assert found is None or len(found) == 1


SIZES = st.one_of(st.integers(-1, 9), st.sampled_from([2**12, 2**31, 2**63, 1.5, True, None, "4"]))
ENTRIES = st.tuples(st.text(max_size=2), st.sampled_from(["q", "h", "f", "x"]), st.lists(SIZES, max_size=3))


@given(st.lists(ENTRIES, max_size=3), st.binary(max_size=4), st.binary(max_size=64))
@settings(max_examples=2000, deadline=None)
def test_any_header_over_coded_integers_is_refused_in_our_own_words(tensors, limits, words):
    with pytest.raises(ProtocolError, match="^model: "):
        load(coded_file([list(entry) for entry in tensors], limits, words), "model")


def test_a_file_of_bytes_is_brotli_of_the_flat_format(file):
    packed = pack(file, "brotli", 11)
    assert brotli.decompress(packed[HEAD.size :]) == encode(file)
    assert encode(file).startswith(MAGIC)
