"""Cuts: stretches of a source that are taken out or replaced while every line stays where it is."""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence
from dataclasses import dataclass

BODIES = ("body", "orelse", "finalbody")
"""Fields of a node that hold statements."""

Place = tuple[int, int]
"""Row, from 1, and byte column, from 0."""

UP_TO_ARROW = "\0"
"""In a cut's place: nothing, and the arrow before it goes too."""


@dataclass(frozen=True, order=True)
class Cut:
    """A stretch of the source to be replaced; its line breaks stay."""

    begin: Place
    end: Place
    replacement: str = ""


def begin_of(node: ast.AST) -> Place:
    return node.lineno, node.col_offset  # type: ignore[attr-defined]  # statements, expressions and arguments have both


def end_of(node: ast.AST) -> Place:
    return node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]  # as above


def first_of(statement: ast.stmt) -> Place:
    """Where a statement begins, with its decorators."""
    decorators = getattr(statement, "decorator_list", [])
    return min([begin_of(statement), *((d.lineno, d.col_offset - 1) for d in decorators)])


def text_between(lines: Sequence[bytes], begin: Place, end: Place) -> str:
    """What of a source's lines stands between two places."""
    found = [*lines[begin[0] - 1 : end[0]]]
    found[-1] = found[-1][: end[1]]
    found[0] = found[0][begin[1] :]
    return b"\n".join(found).decode()


def cut_out(source: str, cuts: Collection[Cut]) -> str:
    """The source with the cuts made; a cut inside another goes with it."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    for cut in sorted(_outermost(cuts), reverse=True):
        (first, begin), (last, end) = cut.begin, cut.end
        head, tail = lines[first - 1][:begin], lines[last - 1][end:]
        replacement = cut.replacement
        if replacement == UP_TO_ARROW:
            head, replacement = head[: head.rindex(b"->")], ""
        lines[first - 1 : last] = [head + replacement.encode(), *([b""] * (last - first))]
        if first == last:
            lines[first - 1] += tail
        else:
            lines[first - 1] += b"\n"
            lines[first : last - 1] = [b"\n"] * (last - first - 1)
            lines[last - 1] = tail
    return b"".join(lines).decode()


def _outermost(cuts: Collection[Cut]) -> list[Cut]:
    kept: list[Cut] = []
    for cut in sorted(set(cuts), key=lambda c: (c.begin, [-n for n in c.end])):
        if not kept or cut.begin >= kept[-1].end:
            kept.append(cut)
    return kept
