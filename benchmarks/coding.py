"""Bytes of a model file's integers by coder, beside Shannon's bounds, on the same quantised weights.

    python -m benchmarks.coding RUN... [--reorder] [--quality 11]

RUN is a run's directory or a model file. Prints a page in Markdown: for each group of tensors (by role) its values, the
bounds, and each coder's bytes, ratio to the bound and seconds; then the whole file as it would be written. `--reorder`
adds rows put in order of likeness, as #1855 does (minutes at full size). zstd is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import bz2
import importlib
import io
import lzma
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import brotli
import numpy as np
import torch

from trainer import artifact, coding
from trainer.artifact import CODERS, ModelFile, entropy_bytes
from trainer.gptq import Quantized
from trainer.protocol import RunDir

# Dimensions: M, N rows and columns of a matrix.

Matrices = Sequence[np.ndarray]
ROLES = ("query", "key", "value", "out", "up", "down")
LZMA_PRESET, ZSTD_LEVEL = 9 | lzma.PRESET_EXTREME, 22


@dataclass(frozen=True)
class Coder:
    """A lossless coder of int8 matrices: to bytes, and from them where that is timed."""

    name: str
    encode: Callable[[Matrices], bytes]
    decode: Callable[[bytes, Matrices], object] | None = None
    """Given the matrices for their shapes."""


def role_of(name: str) -> str:
    """The group of a tensor by its name: what it does in its block, or the table that it is."""
    words = name.split(".")
    return next((role for role in ROLES if role in words and "blocks" in words), words[0].replace("_", " "))


def groups(file: ModelFile) -> dict[str, list[np.ndarray]]:
    """The integers of the quantised tensors by role."""
    found: dict[str, list[np.ndarray]] = {}
    for name, tensor in file.tensors.items():
        if isinstance(tensor, Quantized):
            found.setdefault(role_of(name), []).append(tensor.integers_MN.cpu().numpy())
    return found


def in_bits(matrices: Matrices) -> bytes:
    """Each matrix's integers in the fewest whole bits."""
    packed = []
    for matrix in matrices:
        bits = (2 * coding.limit_of(matrix)).bit_length()
        digits = (matrix.reshape(-1).astype(np.int16) + coding.limit_of(matrix)).astype(np.uint8)
        packed.append(np.packbits(np.unpackbits(digits[:, None], axis=1)[:, 8 - bits :]).tobytes())
    return b"".join(packed)


def as_bytes(matrices: Matrices) -> bytes:
    return b"".join(matrix.tobytes() for matrix in matrices)


def transposed(matrices: Matrices) -> list[np.ndarray]:
    return [np.ascontiguousarray(matrix.T) for matrix in matrices]


def by_likeness(matrix_MN: np.ndarray) -> np.ndarray:
    """The order of rows in which each is followed by the nearest that is left, by absolute differences. uint16 (M)"""
    rows = torch.from_numpy(matrix_MN).float()
    order, left = [0], torch.ones(len(rows), dtype=torch.bool)
    left[0] = False
    for _ in range(len(rows) - 1):
        distances = (rows - rows[order[-1]]).abs_().sum(1).masked_fill_(~left, math.inf)
        order.append(int(distances.argmin()))
        left[order[-1]] = False
    return np.array(order, np.uint16)


def reordered(matrices: Matrices) -> bytes:
    """Rows by likeness, transposed, with the permutations before them."""
    orders = [by_likeness(matrix) for matrix in matrices]
    return as_bytes([*orders, *transposed([matrix[order] for matrix, order in zip(matrices, orders, strict=True)])])


def coders(quality: int, *, with_reorder: bool) -> Iterator[Coder]:
    """All that are compared; the last is ours."""

    def by_brotli(content: bytes) -> bytes:
        compressed: bytes = brotli.compress(content, quality=quality, lgwin=artifact.LARGEST_WINDOW)
        return compressed

    yield Coder("whole bits", in_bits)
    yield Coder("bzip2", lambda m: bz2.compress(as_bytes(m), 9), lambda c, _: bz2.decompress(c))
    yield Coder("LZMA", lambda m: lzma.compress(as_bytes(m), preset=LZMA_PRESET), lambda c, _: lzma.decompress(c))
    if importlib.util.find_spec("zstandard"):
        zstd = importlib.import_module("zstandard")
        yield Coder(
            f"zstd-{ZSTD_LEVEL}", lambda m: zstd.compress(as_bytes(m), ZSTD_LEVEL), lambda c, _: zstd.decompress(c)
        )
    yield Coder(f"Brotli-{quality}", lambda m: by_brotli(as_bytes(m)), lambda c, _: brotli.decompress(c))
    yield Coder("Brotli, transposed", lambda m: by_brotli(as_bytes(transposed(m))))
    if with_reorder:
        yield Coder("Brotli, re-ordered, transposed", lambda m: by_brotli(reordered(m)))
        yield Coder("LZMA, re-ordered, transposed", lambda m: lzma.compress(reordered(m), preset=LZMA_PRESET))
    yield Coder("entropy", coding.encode, decoded)


def decoded(words: bytes, matrices: Matrices) -> list[np.ndarray]:
    limits = [coding.limit_of(matrix) for matrix in matrices]
    found = coding.decode(words, [matrix.shape for matrix in matrices], limits, "benchmark")
    if not all(np.array_equal(a, b) for a, b in zip(found, matrices, strict=True)):
        raise AssertionError("what was decoded is not what was encoded")
    return found


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def report_group(name: str, matrices: Matrices, compared: Sequence[Coder]) -> Iterator[str]:
    """One group of tensors: what it holds, its bounds, and every coder."""
    values = sum(matrix.size for matrix in matrices)
    bits = max((2 * coding.limit_of(matrix)).bit_length() for matrix in matrices)
    bound = sum(map(entropy_bytes, matrices))
    rows = sum(entropy_bytes(row) for matrix in matrices for row in matrix)
    together = entropy_bytes(np.concatenate([matrix.reshape(-1) for matrix in matrices]))
    yield f"\n### {name}\n\n{len(matrices)} tensors, {values:,} values of at most {bits} bits. "
    yield (
        f"Order-0 entropy in bytes: the group as one {together:,.0f}, each tensor {bound:,.0f} "
        f"({8 * bound / values:.4f} bits a value), each row {rows:,.0f} (tables not counted).\n"
    )
    yield "| coder | bytes | to each tensor's entropy | encode s | decode s |\n|---|---|---|---|---|"
    for coder in compared:
        started = time.perf_counter()
        coded = coder.encode(matrices)
        took = time.perf_counter() - started
        decode = coder.decode
        back = "–" if decode is None else f"{seconds(lambda d=decode, c=coded: d(c, matrices)):.2f}"  # type: ignore[misc]
        yield f"| {coder.name} | {len(coded):,} | {len(coded) / bound:.4f} | {took:.2f} | {back} |"


def public_packing(file: ModelFile, quality: int) -> bytes:
    """As public scripts write it: torch.save of integers and scales, bytes of even places before odd ones, Brotli."""
    saved, content = {}, io.BytesIO()
    for name, tensor in file.tensors.items():
        if isinstance(tensor, Quantized):
            saved[f"{name}.q"], saved[f"{name}.scale"] = tensor.integers_MN, tensor.scales_M
        else:
            saved[name] = tensor.half() if tensor.ndim > 1 else tensor
    torch.save(saved, content)
    raw = np.frombuffer(content.getvalue(), np.uint8)
    shuffled: bytes = brotli.compress(
        np.concatenate((raw[::2], raw[1::2])).tobytes(), quality=quality, lgwin=artifact.LARGEST_WINDOW
    )
    return shuffled


def report_file(file: ModelFile, quality: int) -> Iterator[str]:
    """The whole file: what is around the integers, and each way to write it."""
    before, after = artifact.around_integers(file)
    yield "\n### The file\n\n| what | bytes | packed |\n|---|---|---|"
    for name, part in (("header", before), ("scales, vectors", after)):
        yield f"| {name} | {len(part):,} | {len(brotli.compress(part, quality=quality)):,} |"
    yield "\n| file | bytes | estimate | error | pack s | load s | estimate s |\n|---|---|---|---|---|---|---|"
    yield f"| public packing, Brotli-{quality} | {len(public_packing(file, quality)):,} | | | | | |"
    for coder in CODERS:
        started = time.perf_counter()
        packed = artifact.pack(file, coder, quality)
        middle = time.perf_counter()
        if artifact.encode(artifact.load(packed, "benchmark")) != artifact.encode(file):
            raise AssertionError("what was loaded is not what was packed")
        end = time.perf_counter()
        guess = artifact.estimate(file, coder, quality)
        took = (middle - started, end - middle, time.perf_counter() - end)
        cells = " | ".join(f"{value:.2f}" for value in took)
        yield f"| {coder} | {len(packed):,} | {guess:,} | {guess / len(packed) - 1:+.4%} | {cells} |"


def read(path: Path) -> ModelFile:
    """A model file, or that of a run's directory."""
    file = RunDir(path).artifact if path.is_dir() else path
    return artifact.load(file.read_bytes(), str(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--reorder", action="store_true")
    parser.add_argument("--quality", type=int, default=11)
    options = parser.parse_args()
    compared = list(coders(options.quality, with_reorder=options.reorder))
    for path in options.runs:
        file = read(path)
        print(f"\n## {path.name}")
        for name, matrices in groups(file).items():
            for line in report_group(name, matrices, compared):
                print(line, flush=True)
        for line in report_group("all integers", [m for group in groups(file).values() for m in group], compared):
            print(line, flush=True)
        for line in report_file(file, options.quality):
            print(line, flush=True)


if __name__ == "__main__":
    main()
