import ast
from pathlib import Path

import pytest

import trainer
from orchestrator.bundle import MODULES, module_sources
from orchestrator.errors import CaddieError
from orchestrator.minify import minify

ROOT = Path(trainer.__file__).parent


def smaller(source, entry="main", **trusted):
    return minify({"m": source}, entry=entry, **trusted)["m"]


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


@pytest.mark.parametrize("kept", ["a:0=1", "=3", "import math", "amount="])
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


def test_the_trainer_keeps_its_lines():
    packed = module_sources(ROOT)
    for name in MODULES:
        readable, source = (ROOT / f"{name}.py").read_text(), packed[f"trainer.{name}"]
        assert source.count("\n") == readable.count("\n"), name
        lines, kept = (
            {(type(node).__name__, node.lineno) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)}
            for text in (readable, source)
        )
        stand_ins = {(kind, line) for kind, line in kept if kind == "Expr"}  # a block that lost all it had
        moved = {(kind, line) for kind, line in kept - lines - stand_ins if kind not in ("Assign", "FunctionDef")}
        assert not moved, name  # a typed assignment has become a plain one, a record's fields its constructor


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


def test_variables_that_are_no_parameters_lose_their_names_even_where_a_call_has_a_keyword_of_that_name():
    source = (
        "def scaled(*, amount):\n    return amount\n\n\ndef main():\n    amount = 3\n    return scaled(amount=amount)\n"
    )
    assert "amount" not in smaller(source)
    assert run(smaller(source)) == 3


def test_a_method_is_not_kept_for_a_variable_of_its_name():
    source = (
        "class A:\n    def total(self):\n        return 1\n\n    def size(self):\n        return 2\n\n\n"
        "def main():\n    total = A()\n    return total.size()\n"
    )
    assert "def total" not in smaller(source)
    assert run(smaller(source)) == 2


@pytest.mark.parametrize(
    "source",
    [
        "def main():\n    class A:\n        def size(self):\n            return helper()\n    return A().size()",
        "class A:\n    class B:\n        def size(self):\n            return helper()\n\n\ndef main():\n    return A.B().size()",
        "class A:\n    def get(self):\n        return helper()\n    size = property(get)\n\n\ndef main():\n    return A().size",
        "class A:\n    def one():\n        return helper()\n    def size(self, of=one):\n        return of()\n\n\n"
        "def main():\n    return A().size()",
    ],
)
def test_what_a_class_reaches_is_kept(source):
    source = f"def helper():\n    return 4\n\n\n{source}\n"
    assert run(smaller(source)) == 4


@pytest.mark.parametrize(
    "line",
    [
        'f\'{value}\' "{value}" f"{value!r:>{width}}|{{value}}|{value != 3}"',
        "f'{values[: width]}{values[0]:{width}.{width}f}{len(values[1:])}'",
        'f"""a\n{value}é{value + width:d}"""',
        "f'{value=}'",
        "rf'\\d{value}' + f'\\N{DASH}'.replace('x', f'{{{value}}}')",
        "f'{ {value: width}[value] }{dict(value=width)}'",
    ],
)
def test_names_in_f_strings_are_renamed_or_kept_together(line):
    source = f"def main():\n    value, width, values = 7, 5, [1.5, 2.5]\n    return value, {line}\n"
    source = source.replace("DASH", "EN DASH")
    assert run(smaller(source)) == run(source)


def test_an_attribute_of_an_object_keeps_no_function_of_its_name_and_one_of_a_module_does():
    sources = {
        "p.one": "def dead():\n    return 1\n\n\ndef alive():\n    return 2\n",
        "p.two": "from p import one\n\n\ndef main(x):\n    return one.alive() + x.dead\n",
    }
    packed = minify(sources, entry="main")["p.one"]
    assert "return 2" in packed
    assert "return 1" not in packed


def test_an_import_stays_only_where_its_module_needs_it_or_another_takes_it_from_there():
    sources = {
        "p.one": "import json\nimport math\nimport os\n\n\ndef half(x):\n    return math.floor(x / 2)\n",
        "p.two": "from p.one import half, os\nimport json\n\n\ndef main():\n    return json.dumps(half(5)) + os.sep\n",
    }
    packed = minify(sources, entry="main")["p.one"]
    assert "import math" in packed and "import os" in packed
    assert "json" not in packed


def test_the_future_of_annotations_goes_with_the_annotations():
    assert "__future__" not in smaller(SOURCE)
    looked_at = (
        "from __future__ import annotations\nimport typing\n\n\nclass A:\n    size: Late = 1\n\n\nLate = int\n\n\n"
    )
    looked_at += "def main():\n    return typing.get_type_hints(A, globals())\n"
    assert run(smaller(looked_at)) == {"size": int}


TRUSTED = '''\
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Prose."""

    def __post_init__(self) -> None:
        require_positive(self.size)


@dataclass(frozen=True)
class Box(Part):
    size: int = 1
    name: str = "box"

    @property
    def area(self) -> int:
        return self.size**2


@dataclass(frozen=True)
class Bag(Part):
    size: int = 1


def require_positive(size: int) -> None:
    if size <= 0:
        raise ValueError(size)


def read(cls, record):
    """Prose."""
    require_positive(record["size"]) if False else None
    return cls(**record)


def main():
    size = 3
    require_positive(size)
    return read(Box, {"size": size, "name": "b"}).area, read(Bag, {"size": 4}).size, Box(**{"size": 5}).size
'''


def trusting(source, checks=("m.require_positive",), records=("m.Part",)):
    return smaller(source, checks=checks, records=records)


PLAIN = TRUSTED.replace('    require_positive(record["size"]) if False else None\n', "")


def test_checks_and_the_fields_of_records_are_taken_on_trust():
    packed = trusting(PLAIN)
    assert run(packed) == run(PLAIN) == (9, 4, 5)
    for gone in ("require_positive", "ValueError", "dataclass", "__post_init__", "name:", "=1"):
        assert gone not in packed
    assert packed.count("\n") == PLAIN.count("\n")
    assert packed.splitlines().index("def main():") == PLAIN.splitlines().index("def main():")


@pytest.mark.parametrize("values", ["size=5", "name='b'", ""])
def test_a_record_that_is_built_by_names_has_the_defaults_of_others_that_are_read(values):
    source = PLAIN.replace('Box(**{"size": 5})', f"Box({values})")
    assert run(trusting(source)) == run(source) == (9, 4, 5 if "size" in values else 1)
    assert ("size:0=1" in trusting(source)) == ("size" not in values)


def test_a_block_that_only_checks_still_stands():
    source = "def require(x):\n    raise ValueError(x)\n\n\ndef main():\n    x = 2\n    if x:\n        require(x)\n    return x\n"
    assert run(trusting(source, checks=["m.require"], records=[])) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TRUSTED, "require_positive is taken on trust, but not called as a statement with plain arguments"),
        (PLAIN.replace("require_positive(size)\n    return", "require_positive(print(size))\n    return"), "plain arguments"),
        (PLAIN.replace("size: int = 1", "size: int").replace('Box(**{"size": 5})', "Box(name='b')"), "Box is a record taken on trust, and is built without its size"),
        (PLAIN.replace('Box(**{"size": 5})', "Box(5)"), "Box is a record taken on trust: name what it is built from, or give one **mapping"),
        (PLAIN.replace("class Part", "class Other").replace("(Part)", "(Other)"), "m.Part: nothing in the bundle has this name"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_on_trust_is_refused(source, message):
    with pytest.raises(CaddieError) as caught:
        trusting(source)
    assert message in str(caught.value)


def test_a_class_made_of_one_from_outside_keeps_the_methods_that_only_the_outside_calls():
    source = (
        "import threading\n\n\ndef helper():\n    return 5\n\n\nclass Base(threading.Thread):\n    pass\n\n\n"
        "class Job(Base):\n    found = 0\n\n    def run(self):\n        self.found = helper()\n\n\n"
        "def main():\n    job = Job()\n    job.start()\n    job.join()\n    return job.found\n"
    )
    assert run(smaller(source)) == 5


LOOKED_AT = """\
from __future__ import annotations

import inspect
from decimal import Decimal

SEEN = []


def register(function):
    SEEN.append({name: str(p.annotation) for name, p in inspect.signature(function).parameters.items()})
    return function


@register
def scaled(amount: Decimal, by: int) -> Decimal:
    result: Decimal = amount * by
    return result


@register
def _(other: str):
    return other


def main(first: int = 1):
    return [scaled(2, 3), *SEEN]
"""


def test_a_decorator_sees_the_names_and_types_of_parameters():
    packed = smaller(LOOKED_AT)
    assert run(packed) == run(LOOKED_AT) == [6, {"amount": "Decimal", "by": "int"}, {"other": "str"}]
    assert "first" not in packed and "result" not in packed


def test_a_parameter_keeps_its_name_where_a_mapping_may_name_it():
    source = (
        "def area(width, size, times):\n    return width * size * times\n\n\n"
        "def main():\n    shape = {'width': 5}\n    shape['size'] = 3\n    return area(times=2, **shape)\n"
    )
    assert run(smaller(source)) == run(source) == 30


@pytest.mark.parametrize(
    ("line", "smaller_line"),
    [
        ("print(\n        1,\n        2,\n    )", "print(1,2)\n"),
        ("print((\n        1,\n    ))", "print((1,))\n"),
        ("print((lambda a, b: a,))", "print((lambda a,b:a,))"),
        ("print({\n        1: 2,  # why\n        3: 4,\n    }[1,])", "print({1:2,3:4}[1,])\n"),
        ("print(\n        f'{1}'\n        ''\n        '2'\n    )", "print(f'{1}' '' '2')\n"),
        ("print('''a\nb''', [\n        1])", "print('''a\nb''',[1])\n"),
        ("return (\n        1\n        if 2\n        else 3\n    )", "return(1 if 2 else 3)\n"),
    ],
)
def test_a_statement_stands_on_the_line_where_it_begins(line, smaller_line):
    source = f"def main():\n    {line}\n    return 9\n"
    assert f"\n {smaller_line}" in smaller(source)
    assert smaller(source).count("\n") == source.count("\n")
    assert smaller(source).splitlines().index(" return 9") == source.splitlines().index("    return 9")


def test_assertions_are_left_out_as_by_the_interpreter_s_switch():
    source = "def main():\n    value = 1\n    assert value == 2, 'never'\n    if value:\n        assert value\n    return value\n"
    assert run(smaller(source)) == 1
    assert "assert" not in smaller(source)


def test_what_only_a_definition_needs_that_is_left_out_goes_with_it():
    source = (
        "from __future__ import annotations\nimport typing\n\nTABLE: dict[str, typing.Any] = {'a': 1}\n\n\n"
        "def unused(cls):\n    return typing.get_type_hints(cls)\n\n\ndef main():\n    return TABLE['a']\n"
    )
    assert run(smaller(source)) == 1
    assert "import" not in smaller(source)


def test_what_zip_asserts_is_left_out():
    source = "def main():\n    xs = [1]\n    return [*zip(xs, (xs), strict=True)], f'{[*zip(xs, xs, strict=False)]}'\n"
    found = smaller(source)
    assert found.count("strict") == 1 and "[*zip(a,(a))]" in found
    assert run(found) == run(source)
