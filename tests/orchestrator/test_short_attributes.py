import pytest
from test_short_names import renamed

from orchestrator import minify as minifier
from orchestrator.bundle import MODULES, ROOT, module_sources
from orchestrator.errors import CaddieError
from orchestrator.minify import minify

BEFORE = """\
import json
from collections import UserDict
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, Protocol
class Learner(Protocol):
    def learns(self, amount: int) -> int: ...
@dataclass(frozen=True)
class Box:
    breadth: int
    height: int = 2
    @property
    def area(self) -> int:
        return self.breadth * self.height
class Pair(NamedTuple):
    first_one: int
    second_one: int
@dataclass
class Written:
    amount: int
class Outer(UserDict):
    depth = 3
    def deepest(self) -> int:
        return self.depth
class Pupil:
    def __init__(self) -> None:
        self.learnt, self.seen = 0, "seen twice"
        self.seen_twice = 1
    def learns(self, amount: int) -> int:
        self.learnt += amount
        return self.learnt
def taught(learner: Learner) -> int:
    return learner.learns(amount=3)
"""


def packed(body):
    source = BEFORE + body
    return minify({"m": source}, entry="main", shown=["m.Written"])["m"]


def run(source):
    namespace = {"__name__": "m"}
    exec(compile(source, "m", "exec"), namespace)  # our own text
    return namespace["main"]()


RENAMED = [
    ("    box = Box(breadth=3)\n    return box.area, box.height\n", ("breadth", "height", "area")),
    ("    pair = Pair(first_one=1, second_one=2)\n    return pair.first_one + pair.second_one, len(pair)\n", ("first_one", "second_one")),
    ("    pupil = Pupil()\n    return taught(pupil), pupil.learnt\n", ("learns", "learnt")),
    ("    boxes: list[Box] = [Box(1), Box(2, 3)]\n    return [box.area for box in boxes]\n", ("area", "breadth")),
]  # fmt: skip
"""Programs, and the words that need not stay."""


@pytest.mark.parametrize(("body", "words"), RENAMED)
def test_what_only_packed_classes_have_is_renamed(body, words):
    body = f"def main() -> object:\n{body}"
    assert run(packed(body)) == run(BEFORE + body)
    assert not [word for word in words if word in packed(body)]


KEPT = [
    ("    return getattr(Box(3), 'breadth'), Box(3).breadth\n", "breadth"),  # found by a string
    (
        "    box = Box(3)\n    return f'{box.breadth}', box.breadth\n",
        "breadth",
    ),  # in a text, where places are not known
    ("    unknown = [Box(3)][0]\n    return unknown.breadth\n", "breadth"),
    ("    return replace(Box(3), breadth=5).breadth\n", "breadth"),
    ("    return Box(**{'breadth': 4}).area\n", "breadth"),
    ("    written = Written(amount=2)\n    return json.dumps(asdict(written)), written.amount\n", "amount"),
    ("    return Outer().deepest()\n", "deepest"),  # what is outside may call any method
    ("    return Pupil().seen_twice, 'seen_twice'\n", "seen_twice"),
]
"""Programs, and a word that must stay."""


@pytest.mark.parametrize(("body", "word"), KEPT)
def test_what_something_else_may_know_keeps_its_name(body, word):
    body = f"def main() -> object:\n{body}"
    assert run(packed(body)) == run(BEFORE + body)
    assert word in packed(body)


def test_a_short_name_hides_nothing_that_its_class_looks_up():
    words = "".join(f"    word{n}: int = LIMIT\n" for n in range(60))
    reads = "+".join(f"many.word{n}" for n in range(60))
    body = f"LIMIT = 1\n@dataclass(frozen=True)\nclass Many:\n{words}def main() -> object:\n    many = Many()\n    return {reads}\n"
    assert run(packed(body)) == 60
    assert "word1" not in packed(body)


def test_fields_that_are_written_must_be_said_to_be_shown():
    body = "def main() -> object:\n    return asdict(Box(3))\n"
    with pytest.raises(CaddieError, match="asdict of what is not known to be of a class that is shown"):
        packed(body)


def test_the_trainer_has_the_same_instructions_on_shorter_attributes(monkeypatch):
    short = module_sources(ROOT)
    monkeypatch.setattr(minifier, "short_attributes", lambda *_, **__: {})
    plain = module_sources(ROOT)
    names = {}
    for module in (f"trainer.{name}" for name in MODULES):
        for _, word, name in renamed(*(compile(text[module], module, "exec") for text in (plain, short))):
            if word != name:
                assert names.setdefault(word, name) == name, f"{module}: {word} has two short names"
    assert len(names) == len(set(names.values())) > 60
