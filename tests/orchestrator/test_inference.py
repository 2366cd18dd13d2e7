import ast

import pytest

from orchestrator.inference import Items, Program

SOURCE = """\
from collections.abc import Iterator
from dataclasses import dataclass
class Part:
    size: int
class Base:
    def part(self) -> Part: ...
@dataclass
class Whole(Base):
    parts: list[Part]
    by_name: dict[str, Part]
    other: "Whole | None" = None
    def __init__(self, first: Part) -> None:
        self.first, self.count = first, 1
        self.again = Part()
        self.again = Part()
        self.unclear = first
        self.unclear = 1
    @property
    def last(self) -> Part: ...
def make() -> Whole: ...
def walk() -> Iterator[Part]: ...
def use(whole: Whole, maybe: Part | None, odd: Part | Whole, *many: Part, flag=None):
    pair, number = whole.first, 3
    same = whole if number else make()
    both = whole if number else maybe
    taken = None
    taken = maybe
    for item in whole.parts:
        pass
    for key in whole.by_name:
        pass
    for index, each in enumerate(whole.parts):
        pass
    nested = [p for p in walk()]
    def inner(whole):
        return whole
    later = 1
    later = whole
    ({expression})
"""

TYPES = [
    ("whole", "Whole"), ("maybe", "Part"), ("odd", None), ("many", None), ("flag", None), ("number", None),
    ("whole.first", "Part"), ("whole.again", "Part"), ("whole.unclear", None), ("whole.last", "Part"), ("whole.count", None),
    ("whole.other.first", "Part"), ("whole.parts", Items("Part")), ("whole.parts[0]", "Part"),
    ("whole.parts[1:]", Items("Part")), ("whole.by_name['a']", "Part"), ("whole.part()", "Part"), ("whole.part", None),
    ("make()", "Whole"), ("make().last", "Part"), ("Whole(maybe).first", "Part"), ("pair", "Part"), ("same", "Whole"),
    ("both", None), ("taken", "Part"), ("item", "Part"), ("key", None), ("each", None), ("later", None),
    ("[item for item in whole.parts]", None), ("unknown", None), ("whole.missing", None),
]  # fmt: skip


@pytest.mark.parametrize(("expression", "expected"), TYPES)
def test_a_type_is_what_annotations_and_assignments_say(expression, expected):
    tree = ast.parse(SOURCE.replace("{expression}", expression))
    asked = tree.body[-1].body[-1].value
    assert Program({"m": tree}).type_of(asked) == expected


INSIDE = [
    ("[item.size for item in whole.parts]", "Part"),
    ("[key.size for key in whole.by_name]", None),
    ("[i.size for i, j in whole.parts]", None),
    ("(lambda whole: whole.size)(1)", None),
    ("(lambda other: whole.size)(1)", "Whole"),
]


@pytest.mark.parametrize(("expression", "expected"), INSIDE)
def test_a_name_means_what_the_innermost_binding_says(expression, expected):
    tree = ast.parse(SOURCE.replace("{expression}", expression))
    (asked,) = (n.value for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "size")
    assert Program({"m": tree}).type_of(asked) == expected


def test_a_parameter_of_an_inner_function_is_not_the_outer_one():
    tree = ast.parse(SOURCE.replace("{expression}", "inner"))
    (asked,) = (n.value for n in ast.walk(tree) if isinstance(n, ast.Return) and ast.unparse(n) == "return whole")
    assert Program({"m": tree}).type_of(asked) is None


def test_classes_are_known_by_what_a_module_imports():
    other = ast.parse("from m import Whole\ndef f(whole: Whole, part: Part):\n    return whole.first, part.size\n")
    program = Program({"m": ast.parse(SOURCE.replace("{expression}", "1")), "n": other})
    first, part = other.body[1].body[0].value.elts
    assert program.type_of(first) == "Part"
    assert program.type_of(part.value) is None


def test_a_class_that_two_modules_define_has_no_type():
    trees = {name: ast.parse("class A: ...\ndef f(a: A):\n    return a\n") for name in ("m", "n")}
    assert Program(trees).type_of(trees["m"].body[1].body[0].value) is None
