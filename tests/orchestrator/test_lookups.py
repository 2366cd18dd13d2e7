"""The environment variables that a script looks at, by its text."""

from __future__ import annotations

import pytest

from orchestrator.lookups import BOOL, FLOAT, INT, TEXT, Lookup, find_lookups


def only(text: str) -> Lookup:
    (found,) = find_lookups(f"import os\n{text}\n").found.values()
    return found


@pytest.mark.parametrize(
    ("text", "kind", "default"),
    [
        ('steps = int(os.environ.get("X", 20_000))', INT, "20000"),
        ('steps = int(os.environ.get("X", "20000"))', INT, "20000"),
        ('steps = float(os.getenv("X", 1e-8))', FLOAT, "1e-08"),
        ('steps = float(os.getenv("X", default=-0.5))', FLOAT, "-0.5"),
        ('steps = bool(int(os.environ.get("X", "1")))', BOOL, "1"),
        ('steps = os.environ.get("X", "1") == "1"', BOOL, "1"),
        ('steps = int(os.environ.get("X", 524_288 * 2))', INT, "1048576"),
        ('steps = os.environ.get("X", str(uuid.uuid4()))', TEXT, None),
        ('steps = os.environ.get("X")', TEXT, None),
        ('steps = os.environ["X"]', TEXT, None),
        ('steps = os.environ.setdefault("X", "a")', TEXT, "a"),
    ],
)
def test_a_look_has_its_type_and_the_text_of_its_default(text: str, kind: str, default: str | None) -> None:
    found = only(text)
    assert (found.name, found.kind, found.default, found.setting) == ("X", kind, default, "steps")


@pytest.mark.parametrize(
    "text",
    [
        'from os import environ as E\nlr = float(E.get("X", 0.1))',
        'from os import getenv\nlr = float(getenv("X", 0.1))',
        'env = os.environ\nlr = float(env.get("X", 0.1))',
        'g = os.environ.get\nlr = float(g("X", 0.1))',
        'import os as o\nlr = float(o.environ.get("X", 0.1))',
        'def e(name, default, kind=str):\n    text = os.environ.get(name, str(default))\n    return kind(text)\nlr = e("X", 0.1, float)',
        'def e(k, d):\n    v = os.environ.get(k)\n    return d if v is None else float(v)\nlr = e("X", 0.1)',
        'f = lambda n, d: float(os.environ.get(n, d))\nlr = f("X", 0.1)',
        'def e(*, name, default=0.1):\n    return float(os.environ.get(name, default))\nlr = e(name="X")',
    ],
)
def test_a_look_by_another_name_or_by_a_function_around_it_is_a_look(text: str) -> None:
    found = only(text)
    assert (found.name, found.kind, found.default, found.setting) == ("X", FLOAT, "0.1", "lr")


def test_a_variable_that_is_asked_for_is_not_required() -> None:
    assert only('if "X" in os.environ:\n    n = int(os.environ["X"])').is_required is False
    assert only('n = int(os.environ["X"])').is_required is True


def test_what_a_script_sets_itself_is_no_look() -> None:
    found = find_lookups('import os\nos.environ["OMP_NUM_THREADS"] = "1"\n')
    assert (dict(found.found), found.written) == ({}, ("OMP_NUM_THREADS",))


def test_names_that_are_made_up_at_run_time_are_told() -> None:
    assert find_lookups('import os\nfor i in range(3):\n    os.environ.get(f"LR_{i}")').is_partial
    assert find_lookups("import os\ndef e(n):\n    return os.environ.get(n)\nfor n in names:\n    e(n)").is_partial
    assert not find_lookups('import os\ndef e(n):\n    return os.environ.get(n)\ne("X")').is_partial


def test_of_two_looks_the_one_with_a_default_counts() -> None:
    found = only('a = os.environ.get("X")\nb = int(os.environ.get("X", "3"))')
    assert (found.default, found.kind, found.line) == ("3", INT, 2)


def test_other_dictionaries_are_not_the_environment() -> None:
    assert not find_lookups('import os\nconfig = {}\nconfig.get("X", 1)\nos.path.join("X")').found
