"""The model file: a flat binary format of our own, coded, checked, and read without running anything.

    file     coder    1 byte, its place in CODERS
             checksum uint32, CRC-32 of the content and then of all that follows
             length   uint32, bytes of the packed part
             packed   Brotli of the content; under "entropy" of the content without its integers, and of one byte more
                      for each quantised tensor, its largest integer
             words    under "entropy" the integers, through `coding`
    content  magic    8 bytes
             length   uint32, bytes of the header
             header   JSON: {"meta": {...}, "tensors": [[name, code, shape], ...]}
             integers int8, all quantised tensors one after the other
             halves   float16 scales and small tensors, byte planes apart
             floats   float32 tensors, byte planes apart

`code` says what a tensor is: "q" integers with a float16 scale a row, "h" float16, "f" float32. The content of a file is
at most BYTES_A_BYTE times as long as the file, and SMALL_BYTES more; a file that claims more is refused unread.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import brotli
import numpy as np
import torch
from torch import Tensor

from trainer import coding
from trainer.errors import ProtocolError
from trainer.gptq import Quantized

MAGIC = b"CADDIE\x00\x01"
CODERS = ("brotli", "entropy")
HEAD = struct.Struct("<BII")
LARGEST_WINDOW = 24  # Brotli's largest back-reference window, as a power of two
BYTES_A_BYTE, SMALL_BYTES = 32, 2**22  # trained weights shrink to a fifth or so, those of a test to nearly nothing
BROTLI_OVER_ENTROPY = 1.002  # of each tensor's integers; it finds likeness and pays for tables: benchmarks/coding.md

Stored = Quantized | Tensor
"""A tensor of a model file: quantised, or plain in float16 or float32."""


@dataclass(frozen=True)
class ModelFile:
    """What a model file holds."""

    meta: dict[str, Any]
    tensors: dict[str, Stored]

    def state(self) -> dict[str, Tensor]:
        """Every tensor in float32, by name."""
        return {n: t.dequantize() if isinstance(t, Quantized) else t.float() for n, t in self.tensors.items()}

    def matrices(self) -> list[np.ndarray]:
        """The integers of the quantised tensors, int8."""
        return [t.integers_MN.cpu().numpy() for t in self.tensors.values() if isinstance(t, Quantized)]


def _planes(array: np.ndarray[Any, Any]) -> bytes:
    """The array's bytes, all first bytes before all second ones: exponents compress apart from mantissas."""
    return array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T.tobytes()


def _from_planes(raw: bytes, dtype: str) -> np.ndarray[Any, Any]:
    size = np.dtype(dtype).itemsize
    return np.frombuffer(raw, np.uint8).reshape(size, -1).T.copy().view(dtype).reshape(-1)


def around_integers(file: ModelFile) -> tuple[bytes, bytes]:
    """What the content has before its integers and after them."""
    halves, floats, index = [np.zeros(0, "<f2")], [np.zeros(0, "<f4")], []
    for name, tensor in file.tensors.items():
        if isinstance(tensor, Quantized):
            halves.append(tensor.scales_M.cpu().numpy().astype("<f2"))
            index.append([name, "q", list(tensor.integers_MN.shape)])
        else:
            code, dtype, kind = ("h", "<f2", halves) if tensor.dtype == torch.float16 else ("f", "<f4", floats)
            kind.append(tensor.detach().cpu().numpy().astype(dtype).reshape(-1))
            index.append([name, code, list(tensor.shape)])
    header = json.dumps({"meta": file.meta, "tensors": index}, separators=(",", ":")).encode()
    before = MAGIC + struct.pack("<I", len(header)) + header
    return before, _planes(np.concatenate(halves)) + _planes(np.concatenate(floats))


def encode(file: ModelFile) -> bytes:
    """The content of a model file."""
    before, after = around_integers(file)
    return b"".join((before, *(matrix.tobytes() for matrix in file.matrices()), after))


@dataclass(frozen=True)
class _Index:
    """What a header says, and how many values each stream holds."""

    meta: dict[str, Any]
    tensors: list[tuple[str, str, list[int]]]
    begin: int
    """Where the streams begin."""

    integers: int
    halves: int
    floats: int


def _index(content: bytes, place: str, *, coded: bool = False) -> _Index:
    """The header, checked against the content's length; of `coded` integers only their limits are there."""
    start = len(MAGIC) + 4
    if content[: len(MAGIC)] != MAGIC or len(content) < start:
        raise ProtocolError(f"{place}: not a model file: it begins with {content[: len(MAGIC)]!r}")
    (length,) = struct.unpack_from("<I", content, len(MAGIC))
    try:
        header = json.loads(content[start : start + length])
        _require_written(header)
        meta, tensors = header["meta"], header["tensors"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProtocolError(f"{place}: damaged header: {error}") from error
    values = {code: sum(math.prod(s) for _, c, s in tensors if c == code) for code in "qhf"}
    scales = [shape[0] for _, code, shape in tensors if code == "q"]
    halves = values["h"] + sum(scales)
    expected = start + length + (len(scales) if coded else values["q"]) + 2 * halves + 4 * values["f"]
    if len(content) != expected:
        raise ProtocolError(f"{place}: {len(content)} bytes, its header describes {expected}")
    return _Index(meta, tensors, start + length, values["q"], halves, values["f"])


def _require_written(header: Any) -> None:
    """Raise ValueError, KeyError or TypeError for a header that `encode` does not write."""
    tensors = [(name, code, list(shape)) for name, code, shape in header["tensors"]]
    is_written = isinstance(header["meta"], dict) and all(
        isinstance(name, str)
        and code in ("q", "h", "f")
        and all(type(size) is int and 0 <= size < 2**31 for size in shape)
        and (code != "q" or len(shape) == 2)
        for name, code, shape in tensors
    )
    if not is_written or len({name for name, _, _ in tensors}) < len(tensors):
        raise ValueError("a tensor's name, code or shape is not one that is written")


def decode(content: bytes, place: str) -> ModelFile:
    """Read a content; `place` names the file in errors. Raises ProtocolError for anything that is not whole."""
    index = _index(content, place)
    after_integers = index.begin + index.integers
    after_halves = after_integers + 2 * index.halves
    streams = {
        "q": torch.from_numpy(np.frombuffer(content, np.int8, index.integers, index.begin).copy()),
        "h": torch.from_numpy(_from_planes(content[after_integers:after_halves], "<f2")),
        "f": torch.from_numpy(_from_planes(content[after_halves:], "<f4")),
    }
    taken = dict.fromkeys("qhf", 0)

    def take(code: str, shape: list[int]) -> Tensor:
        begin, taken[code] = taken[code], taken[code] + math.prod(shape)
        return streams[code][begin : taken[code]].view(shape)

    tensors: dict[str, Stored] = {}
    for name, code, shape in index.tensors:
        tensors[name] = Quantized(take("q", shape), take("h", shape[:1])) if code == "q" else take(code, shape)
    return ModelFile(index.meta, tensors)


def _compress(content: bytes, quality: int) -> bytes:
    compressed: bytes = brotli.compress(content, quality=quality, lgwin=LARGEST_WINDOW)
    return compressed


def _decompress(compressed: bytes, most: int, place: str) -> bytes:
    """Undo `_compress`; raises ProtocolError for a damaged or truncated stream, or one of more than `most` bytes."""
    decoder, parts, size = brotli.Decompressor(), [], 0
    try:
        part = decoder.process(compressed, output_buffer_limit=2**24)
        while part or not decoder.is_finished():
            parts.append(part)
            size += len(part)
            if size > most or not part:
                raise ProtocolError(f"{place}: compressed content is cut off or too long, after {size} bytes")
            part = decoder.process(b"", output_buffer_limit=2**24)
    except brotli.error as error:
        raise ProtocolError(f"{place}: compressed content is damaged: {error}") from error
    return b"".join(parts)


def pack(file: ModelFile, coder: str, quality: int) -> bytes:
    """The bytes of a model file. `coder` is one of CODERS, `quality` Brotli's effort, 0 to 11."""
    content, words = encode(file), b""
    packed = content
    if coder == "entropy":
        matrices = file.matrices()
        before, after = around_integers(file)
        packed = before + after + bytes(coding.limit_of(matrix) for matrix in matrices)
        words = coding.encode(matrices)
    packed = _compress(packed, quality)
    checksum = zlib.crc32(packed + words, zlib.crc32(content))
    return HEAD.pack(CODERS.index(coder), checksum, len(packed)) + packed + words


def load(packed: bytes, place: str) -> ModelFile:
    """Read a model file; `place` names it in errors. Raises ProtocolError for anything that `pack` does not write."""
    most = BYTES_A_BYTE * len(packed) + SMALL_BYTES
    try:
        number, checksum, length = HEAD.unpack_from(packed)
        coder = CODERS[number]
    except (struct.error, IndexError) as error:
        raise ProtocolError(f"{place}: not a model file: it begins with {packed[: HEAD.size]!r}") from error
    words = packed[HEAD.size + length :]
    content = _decompress(packed[HEAD.size : HEAD.size + length], most, place)
    if coder == "entropy":
        content = _with_integers(content, words, most, place)
    if zlib.crc32(packed[HEAD.size :], zlib.crc32(content)) != checksum:
        raise ProtocolError(
            f"{place}: its content has another checksum than {checksum:08x}: the file is damaged, or decoded otherwise here",
            hint="fetch the file again, or read it with the numpy and constriction that wrote it",
        )
    return decode(content, place)


def _with_integers(content: bytes, words: bytes, most: int, place: str) -> bytes:
    """The content with its integers decoded."""
    index = _index(content, place, coded=True)
    if index.integers > most:
        raise ProtocolError(
            f"{place}: its header describes {index.integers} integers, so small a file has at most {most}"
        )
    shapes = [shape for _, code, shape in index.tensors if code == "q"]
    limits = content[len(content) - len(shapes) :]
    matrices = coding.decode(words, shapes, limits, place)
    after = content[index.begin : len(content) - len(shapes)]
    return b"".join((content[: index.begin], *(matrix.tobytes() for matrix in matrices), after))


def estimate(file: ModelFile, coder: str, quality: int) -> int:
    """Bytes that `pack` would take, its integers by their entropy and without coding them; all else is packed.

    Under "entropy" within 0.1 %, by the tables that coding would use. Under "brotli" by frequencies alone: at quality 11
    within 2 % for trained weights.
    """
    before, after = around_integers(file)
    if coder == "entropy":
        integer_bytes = coding.estimate(file.matrices())
    else:
        integer_bytes = BROTLI_OVER_ENTROPY * sum(map(entropy_bytes, file.matrices()))
    return HEAD.size + len(_compress(before + after, quality)) + math.ceil(integer_bytes)


def entropy_bytes(integers_MN: np.ndarray) -> float:
    """Shannon's bound of order 0: how often each integer comes up, given for nothing."""
    counts = np.bincount(integers_MN.reshape(-1).view(np.uint8))
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / integers_MN.size)).sum() / 8)
