import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.places import lines_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


def at(value, pointer):
    """The value that a pointer leads to (RFC 6901)."""
    for token in pointer.split("/")[1:]:
        token = token.replace("~1", "/").replace("~0", "~")
        value = value[int(token)] if isinstance(value, list) else value[token]
    return value


def test_each_value_is_on_its_line():
    text = '{\n "a": [\n  1,\n  {"b/c~d": "x\\"}"}\n ],\n "e": {}, "f": []\n}\n'
    assert lines_of(text) == {"": 1, "/a": 2, "/a/0": 3, "/a/1": 4, "/a/1/b~1c~0d": 4, "/e": 6, "/f": 6}


@given(JSON)
def test_every_value_of_any_json_is_found_on_a_line_that_shows_it(value):
    text = json.dumps(value, indent=1)
    lines = text.split("\n")
    for pointer, line in lines_of(text).items():
        found = at(value, pointer)
        shown = json.dumps(found) if not isinstance(found, (list, dict)) else "[{"[json.dumps(found)[0] != "["]
        assert shown in lines[line - 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cut off"), ("{", "cut off"), ('{"a": 1', "cut off"), ('{"a" 1}', "Expecting value"), ("[1 2]", "not JSON: '2]'"),
        ("{} {}", "more than one JSON value"),
    ],
)  # fmt: skip
def test_what_is_no_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        lines_of(text)
