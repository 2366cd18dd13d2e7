"""Bytes of the bundle, by module and by what makes it smaller.

    python -m benchmarks.bundle [PRESET...] [--set KNOB=VALUE...]

Prints a page in Markdown for each preset (pr1326 and smoke): the bundle after each measure, then each module's readable
and packed source and its share, which is what the bundle would lose without it. A module that shares words with others has
a smaller share than it would take alone, so shares do not add up to the whole.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import brotli

from orchestrator import bundle
from orchestrator.bundle import PACKAGE, ROOT
from orchestrator.folding import choices
from orchestrator.presets import load_preset
from trainer.config import Config, parse_value, with_knobs

PRINTABLE_DIGITS = 95  # of the number that a bundle of printable characters holds


@dataclass(frozen=True)
class Module:
    """Bytes of one module."""

    name: str
    readable: int
    for_any: int
    """Of its source in a bundle for any run, line breaks included."""

    folded: int
    share: int
    """By how much the packed table is smaller without it."""


def table_of(sources: Mapping[str, str]) -> str:
    """Modules with their names and the finder, as they are packed."""
    return "\0".join([bundle.FINDER, *(part for item in sources.items() for part in item)])


def packed_bytes(sources: Mapping[str, str]) -> int:
    return len(bundle.packings(table_of(sources))[0])


def modules_of(chosen: Mapping[str, str]) -> list[Module]:
    """Every packed module, in the order of the bundle."""
    for_any, folded = bundle.module_sources(ROOT), bundle.module_sources(ROOT, chosen)
    whole = packed_bytes(folded)
    found = []
    for name in bundle.MODULES:
        word = f"{PACKAGE}.{name}"
        without = {other: source for other, source in folded.items() if other != word}
        before, after = (len(sources.get(word, "").encode()) for sources in (for_any, folded))
        readable, share = (ROOT / f"{name}.py").stat().st_size, whole - packed_bytes(without)
        found.append(Module(name, readable, before, after, share))
    return found


def measures(config: Config) -> list[tuple[str, int]]:
    """Bytes of the bundle as each measure is added to those before it."""
    readable = {f"{PACKAGE}.{name}": (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in bundle.MODULES}
    for_any = bundle.module_sources(ROOT)
    launcher = len(bundle.launcher([b"\1"])) - 1

    def printable(content: int) -> int:
        return launcher + math.ceil(8 * content / math.log2(PRINTABLE_DIGITS))

    return [
        ("readable sources, packed by Brotli, in 95 printable digits", printable(packed_bytes(readable))),
        ("without what only a reader needs, names shortened", printable(packed_bytes(for_any))),
        ("in 254 digits of Latin-1", len(bundle.build())),
        ("the preset's choices folded", len(bundle.build(config))),
    ]


def page(preset: str, config: Config) -> str:
    """What is known of one preset's bundle."""
    lines = [f"## {preset}", "", "| measure | bytes |", "|---|---|"]
    lines += [f"| {what} | {size:,} |" for what, size in measures(config)]
    lines += ["", "| module | readable | for any run | folded | share |", "|---|---|---|---|---|"]
    modules = modules_of(choices(config))
    totals = [[getattr(m, field) for m in modules] for field in ("readable", "for_any", "folded", "share")]
    modules.append(Module("all", *map(sum, totals)))
    lines += [f"| {m.name} | {m.readable:,} | {m.for_any:,} | {m.folded:,} | {m.share:,} |" for m in modules]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", default=["pr1326", "smoke"])
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE", dest="knobs")
    options = parser.parse_args()
    pairs = (text.partition("=") for text in options.knobs)
    knobs = {knob: parse_value(knob, value) for knob, _, value in pairs}
    print(
        f"Python {platform.python_version()}, Brotli {brotli.__version__}, {datetime.date.today()}, "
        f"trainer of {bundle.code_state()}.\n"
    )
    for preset in options.presets:
        print(page(preset, with_knobs(load_preset(preset), knobs)))


if __name__ == "__main__":
    main()
