import ast
from pathlib import Path

import pytest

import trainer
from orchestrator.bundle import MODULES, module_sources
from orchestrator.minify import minify

ROOT = Path(trainer.__file__).parent


def smaller(source, entry="main"):
    return minify({"m": source}, entry=entry)["m"]


def run(source, entry="main"):
    namespace = {}
    exec(compile(source, "m", "exec"), namespace)  # our own text
    return namespace[entry]()


SOURCE = '''\
"""Module prose."""
from __future__ import annotations

import json  # unused once `unused` is gone
import math

LIMIT: int = 3  # a comment
OTHER = 5


def unused() -> str:
    """Prose."""
    return json.dumps({})


class Thing:
    """Prose."""

    field: int = 1
    """Documented field."""

    def called(self, amount: int = 2) -> int:
        # why
        total = 0
        for value in range(amount):
            total += value
        return total + self.field

    @property
    def never(self) -> int:
        return 9


def main() -> list[object]:
    thing: Thing = Thing()
    text = f"{thing.called(amount=LIMIT)!r:>4}" "tail"
    values = [math.floor(item) for item in (1.5, 2.5) if item != 2]
    later: int
    later = -1 if values else not values
    return [text, values, later, lambda argument: argument + later]
'''


def test_the_smaller_source_does_the_same():
    before, after = run(SOURCE), run(smaller(SOURCE))
    assert before[:3] == after[:3]
    assert before[3](5) == after[3](5)


def test_every_statement_stays_on_its_line():
    kept = {
        type(node).__name__ + str(node.lineno)
        for node in ast.walk(ast.parse(smaller(SOURCE)))
        if isinstance(node, ast.Return)
    }
    assert kept < {
        type(node).__name__ + str(node.lineno) for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Return)
    }
    assert smaller(SOURCE).count("\n") == SOURCE.count("\n")


@pytest.mark.parametrize("gone", ["Prose", "comment", "unused", "json", "OTHER", "never", "-> int", "values", "why"])
def test_what_only_a_reader_needs_is_gone(gone):
    assert gone not in smaller(SOURCE)


@pytest.mark.parametrize("kept", ["field:0=1", "LIMIT=3", "import math", "amount=LIMIT"])
def test_what_the_program_needs_is_kept(kept):
    assert kept in smaller(SOURCE)


@pytest.mark.parametrize(
    "body",
    [
        "def inner():\n        nonlocal count\n        count += 1\n    count = 0\n    inner()\n    return count",
        "values = {}\n    for name, number in (('a', 1),):\n        values[name] = number\n    return values",
        "try:\n        raise ValueError('x')\n    except ValueError as problem:\n        return str(problem)",
        "first, *rest = 'a b'.split()\n    return first + rest[0] + '' 'x'",
        "total = 0\n    while (step := total + 1) < 4:\n        total = step\n    return total",
        "with open(__import__('os').devnull) as handle:\n        return handle.read()",
        "sorted_words = sorted(['b', 'a'], key=lambda word: word)\n    return sorted_words",
        "number = 1\n    return 1 if number else 0",
        "print = 3\n    return print",
        "return [[inner for inner in outer] for outer in ((1, 2),)]",
        "text = 'x'\n    return f'{text}' f'{text:>3}'",
        "value = 5\n    import math as value_of\n    return value_of.floor(value)",
    ],
)
def test_scopes_survive_short_names(body):
    source = f"def main():\n    {body}\n"
    assert run(smaller(source)) == run(source)


def test_a_definition_reached_only_by_its_name_in_a_string_is_kept():
    source = "def wanted():\n    return 1\n\n\ndef main():\n    return globals()['wanted']()\n"
    assert run(smaller(source)) == 1


def test_parameters_that_a_call_names_keep_their_names():
    source = "def scaled(amount, by):\n    return amount * by\n\n\ndef main():\n    return scaled(3, by=4)\n"
    assert run(smaller(source)) == 12


def test_the_trainer_keeps_its_lines_and_its_module_level_names():
    packed = module_sources(ROOT)
    for name in MODULES:
        readable = (ROOT / f"{name}.py").read_text()
        source = packed[f"trainer.{name}"]
        lines = {
            node.name: node.lineno
            for node in ast.parse(readable).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        kept = {
            node.name: node.lineno
            for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert kept.items() <= lines.items(), name


def test_fields_keep_their_types_where_the_module_looks_at_them():
    source = "import typing\n\n\nclass A:\n    size: int = 1\n\n\ndef main():\n    return typing.get_type_hints(A)\n"
    assert run(smaller(source)) == {"size": int}


def test_a_dataclass_keeps_its_fields_without_their_types():
    source = (
        "from dataclasses import dataclass, fields\n\n\n@dataclass\nclass A:\n    size: int = 1\n    names: list[str] = None\n\n\n"
        "def main():\n    return [field.name for field in fields(A)]\n"
    )
    assert run(smaller(source)) == ["size", "names"]
    assert "list" not in smaller(source)
