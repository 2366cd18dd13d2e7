"""Places: the line on which each value of a JSON file stands, so that a number in a report can be looked up."""

from __future__ import annotations

import bisect
import json
import re
from json.decoder import scanstring  # type: ignore[attr-defined]  # the standard library's own, left out of its types

SPACE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()


def lines_of(text: str) -> dict[str, int]:
    """Line, from 1, of each value of a JSON text by its JSON pointer (RFC 6901). Raises ValueError for no JSON."""
    offsets: dict[str, int] = {}
    try:
        end = _note(text, _skip(text, 0), "", offsets)
    except IndexError as error:
        raise ValueError("the JSON text is cut off") from error
    if text[end:].strip():
        raise ValueError(f"more than one JSON value: {text[end : end + 40]!r}")
    breaks = [match.start() for match in re.finditer("\n", text)]
    return {pointer: 1 + bisect.bisect_left(breaks, at) for pointer, at in offsets.items()}


def _note(text: str, at: int, pointer: str, offsets: dict[str, int]) -> int:
    """Note the offsets of the value at `at` and of all inside it; returns the offset behind it."""
    offsets[pointer] = at
    if text[at] not in "{[":
        return DECODER.raw_decode(text, at)[1]
    close, index = ("}" if text[at] == "{" else "]"), 0
    at = _skip(text, at + 1)
    while text[at] != close:
        name = str(index)
        if close == "}":
            key, at = scanstring(text, at + 1, True)
            name = key.replace("~", "~0").replace("/", "~1")
            at = _skip(text, _skip(text, at) + 1)  # behind the colon
        at = _skip(text, _note(text, at, f"{pointer}/{name}", offsets))
        index += 1
        if text[at] not in ("," + close):
            raise ValueError(f"not JSON: {text[at : at + 40]!r}")
        at = _skip(text, at + 1) if text[at] == "," else at
    return at + 1


def _skip(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    assert found is not None, "the pattern matches nothing too"
    return found.end()
