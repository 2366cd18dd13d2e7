"""Damaged model files, many of them: the reader must load each or refuse it in its own words.

    python -m benchmarks.fuzz_artifact [--inputs 100000] [--seed 1]

Mutates small valid files of both coders: bits flipped, bytes put in, taken out, repeated or exchanged with another file's;
cut off; headers edited with their length put right; content damaged behind a right checksum; words behind a right
checksum replaced. Prints what came out, by kind of damage, and the most memory that the process took. Exits 1 if anything
but a ModelFile or a ProtocolError came out.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import brotli
import torch

from trainer import artifact
from trainer.artifact import HEAD, MAGIC, ModelFile, load, pack
from trainer.errors import ProtocolError
from trainer.gptq import Quantized

QUALITY = 4  # of Brotli; the damage is what counts
SIZES: tuple[object, ...] = (
    -1,
    0,
    1,
    2,
    3,
    7,
    48,
    2**16,
    2**31 - 1,
    2**31,
    2**63,
    1.5,
    True,
    None,
    "4",
    [],
    {},
)  # in a header's shapes
NAMES: tuple[object, ...] = ("matrix", "", "\0", "x" * 3000, 7, None, ["a"])
CODES: tuple[object, ...] = ("q", "h", "f", "", "qh", "Q", 0, None)
DEEP = "[" * 100_000  # more than Python's parser nests


@dataclass(frozen=True)
class Parts:
    """A packed file, taken apart."""

    coder: int
    content: bytes
    """What Brotli holds."""

    words: bytes

    @classmethod
    def of(cls, packed: bytes) -> Parts:
        coder, _, length = HEAD.unpack_from(packed)
        middle = HEAD.size + length
        return cls(coder, brotli.decompress(packed[HEAD.size : middle]), packed[middle:])

    def packed(self) -> bytes:
        """Put together again, with the checksum that is right where the content has its integers."""
        stream: bytes = brotli.compress(self.content, quality=QUALITY)
        checksum = zlib.crc32(stream + self.words, zlib.crc32(self.content))
        return HEAD.pack(self.coder, checksum, len(stream)) + stream + self.words


def examples() -> list[bytes]:
    """Valid files: both coders, every kind of tensor, empty ones, several limits, one that shrinks to nearly nothing."""
    torch.manual_seed(0)

    def quantized(limit: int, *shape: int) -> Quantized:
        return Quantized(torch.randint(-limit, limit + 1, shape, dtype=torch.int8), torch.rand(shape[0]).half())

    mixed: dict[str, artifact.Stored] = {
        "matrix": quantized(31, 48, 32), "table": quantized(127, 200, 8), "factor": quantized(1, 3, 40),
        "half": torch.randn(5, 3).half(), "vector": torch.randn(7), "scalar": torch.tensor(0.5),
    }  # fmt: skip
    empty: dict[str, artifact.Stored] = {"none": quantized(31, 0, 4), "thin": quantized(31, 4, 0), "v": torch.zeros(0)}
    zeros: dict[str, artifact.Stored] = {"m": Quantized(torch.zeros(64, 512, dtype=torch.int8), torch.ones(64).half())}
    files = [ModelFile({"config": {"model": {"width": 32}}}, tensors) for tensors in (mixed, empty, zeros, {})]
    return [pack(file, coder, QUALITY) for file in files for coder in artifact.CODERS]


def damaged(raw: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """One to four small accidents at random places."""
    found = bytearray(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        begin = chance.randrange(len(found) + 1)
        end = min(len(found), begin + chance.choice((1, 1, 2, 4, 16, 64)))
        kind = chance.randrange(6)
        if kind == 0 and begin < len(found):
            found[begin] ^= 1 << chance.randrange(8)
        elif kind == 1:
            found[begin:end] = chance.randbytes(end - begin)
        elif kind == 2:
            del found[begin:end]
        elif kind == 3:
            found[begin:begin] = found[begin:end] * chance.choice((1, 2, 50))
        elif kind == 4:
            other = chance.choice(others)
            found[begin:end] = other[begin:end]
        else:
            found[begin:end] = b"\xff" * (end - begin)
    return bytes(found)


def flipped(packed: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    return damaged(packed, chance, others)


def cut(packed: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    return packed[: chance.randrange(len(packed))] + chance.choice((b"", b"", chance.randbytes(9)))


def spliced(packed: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """The beginning of one file and the end of another."""
    return packed[: chance.randrange(len(packed))] + (other := chance.choice(others))[chance.randrange(len(other)) :]


def noise(packed: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    return chance.choice((b"", HEAD.pack(chance.randrange(3), 0, chance.randrange(99)))) + chance.randbytes(
        chance.randrange(300)
    )


def recompressed(packed: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """Damage inside the Brotli stream, behind a checksum that is right where the integers are in it."""
    parts = Parts.of(packed)
    content = damaged(parts.content, chance, [Parts.of(other).content for other in others])
    return Parts(parts.coder, content, parts.words).packed()


def retold(packed: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """A header that says something else, its length put right."""
    parts = Parts.of(packed)
    start = len(MAGIC) + 4
    (length,) = struct.unpack_from("<I", parts.content, len(MAGIC))
    header = json.loads(parts.content[start : start + length])
    for _ in range(chance.choice((1, 1, 2))):
        edit_header(header, chance)
    text = json.dumps(header).encode()
    if chance.random() < 0.02:
        text = chance.choice((DEEP.encode(), b"\xff\xfe", b"NaN", b"1e999", b'{"meta":1e999,"tensors":[]}'))
    content = MAGIC + struct.pack("<I", len(text)) + text + parts.content[start + length :]
    return Parts(parts.coder, content, parts.words).packed()


def edit_header(header: dict, chance: random.Random) -> None:
    tensors = header["tensors"]
    kind = chance.randrange(7)
    if kind == 0:
        header[chance.choice(("meta", "tensors", "other"))] = chance.choice((None, 7, [], {}, "x", [[1]]))
    elif not isinstance(tensors, list) or not tensors or not isinstance(tensor := chance.choice(tensors), list):
        header.pop("tensors", None)
        header["tensors"] = []
    elif kind == 1:
        tensors.append(list(tensor))
    elif kind == 2:
        tensors.remove(tensor)
    elif kind == 3:
        tensor[0:1] = [chance.choice(NAMES)]
    elif kind == 4:
        tensor[1:2] = [chance.choice(CODES)]
    elif len(tensor) > 2 and isinstance(tensor[2], list) and tensor[2] and kind == 5:
        tensor[2][chance.randrange(len(tensor[2]))] = chance.choice(SIZES)
    else:
        tensor[2:3] = [[chance.choice(SIZES) for _ in range(chance.randrange(4))]]


def reworded(packed: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """Other words for the range coder, and other limits, behind a checksum that was made for the content that is there.

    No such file passes as loaded, but each goes through the decoder to its end.
    """
    parts = Parts.of(packed)
    words = chance.choice((damaged(parts.words, chance, others), chance.randbytes(4 * chance.randrange(900)), b""))
    content = parts.content
    if chance.random() < 0.3:
        content = content[:-3] + bytes(chance.choice((0, 1, 2, 31, 127, 128, 255)) for _ in range(3))
    return Parts(1, content, words).packed()


ACCIDENTS = (flipped, cut, spliced, noise)  # what the checksum is for: none may be taken for another model
DAMAGES: tuple[Callable[[bytes, random.Random, list[bytes]], bytes], ...] = (
    *ACCIDENTS, recompressed, retold, reworded,
)  # fmt: skip


def outcome_of(content: bytes, known: set[bytes], *, is_accident: bool) -> str:
    """What the reader makes of one input; `known` are the contents that were packed."""
    try:
        file = load(content, "fuzz")
    except ProtocolError as error:
        return "refused" if str(error).startswith("fuzz: ") else "WRONG: refused without its place"
    except Exception as error:
        traceback.print_exc()
        return f"WRONG: {type(error).__name__}"
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"WRONG: {type(error).__name__}"
    return "WRONG: another model" if is_accident and artifact.encode(file) not in known else "loaded"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance, valid, found = random.Random(options.seed), examples(), Counter[tuple[str, str]]()
    known = {artifact.encode(load(packed, "example")) for packed in valid}
    started, longest = time.perf_counter(), 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(options.inputs):
        damage = DAMAGES[number % len(DAMAGES)]
        content = damage(chance.choice(valid), chance, valid)
        began = time.perf_counter()
        outcome = outcome_of(content, known, is_accident=damage in ACCIDENTS)
        if outcome.startswith("WRONG"):
            print(f"input {number}, {damage.__name__}, {outcome}: {content[:80]!r}", file=sys.stderr)
        longest = max(longest, time.perf_counter() - began)
        found[damage.__name__, outcome] += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("| damage | outcome | inputs |\n|---|---|---|")
    for (name, outcome), count in sorted(found.items()):
        print(f"| {name} | {outcome} | {count:,} |")
    took = time.perf_counter() - started
    print(f"\n{options.inputs:,} inputs in {took:.0f} s, the longest {longest:.2f} s.")
    print(f"Peak memory {peak / 1024:,.0f} MiB, {before / 1024:,.0f} MiB of it before the first input.")
    return int(any(outcome.startswith("WRONG") for _, outcome in found))


if __name__ == "__main__":
    sys.exit(main())
