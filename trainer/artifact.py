"""The model file: a flat binary format of our own, compressed, fitted under a cap, and read without running anything.

    compressed: Brotli of
        magic    8 bytes
        length   uint32, bytes of the header
        header   JSON: {"meta": {...}, "tensors": [[name, code, shape], ...]}
        integers int8, all quantised tensors one after the other
        halves   float16 scales and small tensors, byte planes apart
        floats   float32 tensors, byte planes apart

`code` says what a tensor is: "q" integers with a float16 scale a row, "h" float16, "f" float32.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import brotli
import numpy as np
import torch
from torch import Tensor

from trainer.errors import ProtocolError
from trainer.gptq import Quantized

MAGIC = b"CADDIE\x00\x01"
LARGEST_WINDOW = 24  # Brotli's largest back-reference window, as a power of two
MOST_BYTES = 2**34  # a file that claims more than 16 GiB of content is damaged

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


def _planes(array: np.ndarray[Any, Any]) -> bytes:
    """The array's bytes, all first bytes before all second ones: exponents compress apart from mantissas."""
    return array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T.tobytes()


def _from_planes(raw: bytes, dtype: str) -> np.ndarray[Any, Any]:
    size = np.dtype(dtype).itemsize
    return np.frombuffer(raw, np.uint8).reshape(size, -1).T.copy().view(dtype).reshape(-1)


def encode(file: ModelFile) -> bytes:
    """The uncompressed bytes of a model file."""
    integers, halves, floats, index = [], [np.zeros(0, "<f2")], [np.zeros(0, "<f4")], []
    for name, tensor in file.tensors.items():
        if isinstance(tensor, Quantized):
            integers.append(tensor.integers_MN.cpu().numpy().astype(np.int8).tobytes())
            halves.append(tensor.scales_M.cpu().numpy().astype("<f2"))
            index.append([name, "q", list(tensor.integers_MN.shape)])
        else:
            code, dtype, kind = ("h", "<f2", halves) if tensor.dtype == torch.float16 else ("f", "<f4", floats)
            kind.append(tensor.detach().cpu().numpy().astype(dtype).reshape(-1))
            index.append([name, code, list(tensor.shape)])
    header = json.dumps({"meta": file.meta, "tensors": index}, separators=(",", ":")).encode()
    streams = (*integers, _planes(np.concatenate(halves)), _planes(np.concatenate(floats)))
    return b"".join((MAGIC, struct.pack("<I", len(header)), header, *streams))


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


def _index(content: bytes, place: str) -> _Index:
    """The header, checked against the content's length."""
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
    halves = values["h"] + sum(shape[0] for _, code, shape in tensors if code == "q")
    expected = start + length + values["q"] + 2 * halves + 4 * values["f"]
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
    """Read uncompressed bytes; `place` names the file in errors. Raises ProtocolError for anything that is not whole."""
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


def compress(content: bytes, quality: int) -> bytes:
    compressed: bytes = brotli.compress(content, quality=quality, lgwin=LARGEST_WINDOW)
    return compressed


def decompress(compressed: bytes, place: str) -> bytes:
    """Undo `compress`; raises ProtocolError for a damaged or truncated stream, or one that never ends."""
    decoder, parts, size = brotli.Decompressor(), [], 0
    try:
        part = decoder.process(compressed, output_buffer_limit=2**24)
        while part or not decoder.is_finished():
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES or not part:
                raise ProtocolError(f"{place}: compressed content is cut off or too long, after {size} bytes")
            part = decoder.process(b"", output_buffer_limit=2**24)
    except brotli.error as error:
        raise ProtocolError(f"{place}: compressed content is damaged: {error}") from error
    return b"".join(parts)


def load(compressed: bytes, place: str) -> ModelFile:
    """Read a compressed model file. Raises ProtocolError."""
    return decode(decompress(compressed, place), place)
