import dis
import sys
import types
from pathlib import Path

import pytest

import trainer
from orchestrator import minify as minifier
from orchestrator.bundle import MODULES, module_sources
from orchestrator.errors import CaddieError
from orchestrator.minify import minify
from orchestrator.short_names import ShortNames

ROOT = Path(trainer.__file__).parent


def run(sources):
    """What `main` of the last module gives, each module found by those after it."""
    made = {}
    try:
        for name, source in sources.items():
            package = name.partition(".")[0]
            made.setdefault(package, types.ModuleType(package)).__path__ = []
            made[name] = types.ModuleType(name)
            setattr(made[package], name.rpartition(".")[2], made[name])
            sys.modules.update(made)
            exec(compile(source, name, "exec"), made[name].__dict__)  # our own text
        return made[name].main()
    finally:
        for name in made:
            sys.modules.pop(name, None)


def shortened(*sources):
    """The packed sources, which do what the readable ones do."""
    readable = {f"p.m{number}": source for number, source in enumerate(sources)}
    packed = minify(readable, entry="main")
    assert run(packed) == run(readable)
    return packed


def test_functions_classes_and_constants_are_shortened_wherever_other_modules_name_them():
    packed = shortened(
        "LIMIT = 3\n\n\nclass Holder:\n    def __init__(self, size):\n        self.size = size\n\n\n"
        "def doubled(amount):\n    return amount * 2\n",
        "from p import m0\nfrom p.m0 import doubled\n\n\n"
        "def main():\n    return doubled(m0.LIMIT), m0.Holder(m0.doubled(4)).size\n",
    )
    for word in ("LIMIT", "Holder", "doubled", "amount"):
        assert word not in "".join(packed.values())


def test_one_word_has_one_short_name_in_all_modules():
    same = "def {}(first, second):\n    total = first + second\n    return total * second\n"
    packed = shortened(
        same.format("one"),
        same.format("two"),
        "from p.m0 import one\nfrom p.m1 import two\n\n\ndef main():\n    return one(2, 3), two(3, 4)\n",
    )
    first, second = (packed[name].partition("(")[2] for name in ("p.m0", "p.m1"))
    assert first == second


def test_errors_keep_their_names():
    packed = shortened(
        "class OddError(ValueError):\n    pass\n\n\nclass VeryOddError(OddError):\n    pass\n\n\nclass Stop(BaseException):\n    pass\n\n\n"
        "class Plain:\n    pass\n\n\ndef main():\n    Plain()\n    return [c.__name__ for c in (OddError, VeryOddError, Stop)]\n"
    )
    assert "Plain" not in packed["p.m0"]


KEYWORDS = [
    "def f(*, amount):\n    return amount\n\n\ndef main():\n    return f(amount=3)\n",
    "def f(a, *, amount=1):\n    return a + amount\n\n\ndef main():\n    amount = 4\n    return f(1, amount=amount) + f(2)\n",
    "class C:\n    def __init__(self, *, amount):\n        self.amount = amount\n\n\nclass D(C):\n    pass\n\n\n"
    "def main():\n    return C(amount=2).amount + D(amount=3).amount\n",
    "def f(amount):\n    def g(times):\n        return amount * times\n    return g(3)\n\n\ndef main():\n    return f(amount=3)\n",
]


@pytest.mark.parametrize("source", KEYWORDS)
def test_a_parameter_is_shortened_where_all_that_name_it_are_known(source):
    assert "amount=" not in shortened(source)["p.m0"].replace(".amount=", "")


STAYING = {
    "a mapping may name it": "def f(amount):\n    return amount\n\n\ndef main():\n    return f(**{'amount': 3})\n",
    "it is called by another name": "def f(*, amount):\n    return amount\n\n\ndef main():\n    g = f\n    return g(amount=3)\n",
    "one of two that are meant is unknown": "def f(*, amount):\n    return amount\n\n\nT = {'f': f}\n\n\n"
    "def main():\n    return f(amount=3) + T['f'](amount=4)\n",
    "it is called by a method's name": "class C:\n    def f(self, *, amount):\n        return amount\n\n\n"
    "def main():\n    return C().f(amount=3)\n",
    "the call stands in a text": "def f(*, amount):\n    return amount\n\n\ndef main():\n    return f'{f(amount=3)}'\n",
    "others stand beside it": "def f(*, amount, **rest):\n    return amount, rest\n\n\ndef main():\n    return f(amount=3, a=1, b=2)\n",
    "a variable shadows the function": "def f(*, amount):\n    return amount\n\n\ndef main(f=f):\n    return f(amount=3)\n",
    "a decorator looks at it": "import inspect\n\n\ndef seen(f):\n    return lambda **k: list(inspect.signature(f).parameters)\n\n\n"
    "@seen\ndef f(*, amount):\n    return amount\n\n\ndef main():\n    return f(amount=3)\n",
    "a class makes itself": "class C:\n    def __init__(self, *, amount):\n        self.amount = amount\n\n"
    "    @classmethod\n    def of(cls):\n        return cls(amount=2)\n\n\ndef main():\n    return C.of().amount + C(amount=1).amount\n",
    "a base's constructor is called": "class B:\n    def __init__(self, *, amount):\n        self.amount = amount\n\n\n"
    "class C(B):\n    def __init__(self):\n        super().__init__(amount=5)\n\n\ndef main():\n    return C().amount + B(amount=1).amount\n",
    "something from outside has the function's name": "def f(*, amount):\n    return amount\n\n\n",
}


@pytest.mark.parametrize("source", STAYING.values(), ids=STAYING)
def test_a_parameter_keeps_its_name_where(source):
    other = "" if "main" in source else "import math\n\n\ndef main():\n    return math.floor(2.5)\n"
    shortened(source, other) if other else shortened(source)


SCOPES = {
    "builtin as a parameter": "def f(*, input):\n    return input\n\n\ndef main():\n    return f(input=3), str(input)[:9]\n",
    "handler": "def main():\n    try:\n        raise ValueError('x')\n    except (ValueError, KeyError) as problem:\n        return str(problem)\n",
    "inner function": "def main():\n    def inner(value):\n        return value + offset\n    offset = 3\n    return inner(value=4)\n",
    "nonlocal": "def main():\n    count = 0\n    def more():\n        nonlocal count\n        count += 1\n    more()\n    return count\n",
    "global": "TOTAL = 0\n\n\ndef more():\n    global TOTAL\n    TOTAL += 1\n\n\ndef main():\n    more()\n    return TOTAL\n",
    "class inside": "LIMIT = 3\n\n\ndef main():\n    class Inner:\n        size = LIMIT\n\n        def get(self):\n"
    "            return self.size + LIMIT\n    return Inner().get()\n",
    "import inside": "LIMIT = 3\n\n\ndef main():\n    import math as limits\n    return limits.floor(LIMIT + 0.5)\n",
    "shadowed": "size = 3\n\n\ndef f():\n    return size\n\n\ndef main():\n    size = 4\n    return size + f()\n",
    "looked up in a class": "size = 3\n\n\nclass C:\n    size = size + 1\n    other = size\n\n    def get(self, of=size):\n"
    "        return of, size\n\n\ndef main():\n    return C.other, C().get()\n",
    "field of a letter": "from dataclasses import dataclass\n\nstart = 7\n\n\n@dataclass\nclass C:\n    a: int = 1\n    b: int = start\n    c: int = 2\n\n\n"
    "def main():\n    return vars(C())\n",
    "string": "def wanted():\n    return 4\n\n\ndef main():\n    return globals()['wanted']()\n",
    "outside comprehensions": "words = [word for word in 'ab']\npick = lambda word: word\n\n\ndef main():\n    word = 'c'\n    return words, pick(word)\n",
    "in texts": "LIMIT = 3\n\n\ndef main():\n    value = 2\n    return f'{LIMIT:>{value}}{value=}' f'{LIMIT!r}'\n",
    "starred": "def main():\n    first, *others = range(3)\n    return first, others, [*others, *(item for item in others)]\n",
    "conditional": "try:\n    import no_such_module\nexcept ImportError:\n    no_such_module = None\n\nif no_such_module is None:\n\n"
    "    def f(amount):\n        return amount\n\n\ndef main():\n    return f(2), no_such_module\n",
}


@pytest.mark.parametrize("source", SCOPES.values(), ids=SCOPES)
def test_every_name_means_what_it_meant(source):
    shortened(source)


def test_names_are_kept_where_a_packed_module_is_looked_up_by_strings():
    shortened(
        "def wanted():\n    return 1\n\n\ndef other():\n    return 2\n",
        "from p import m0\nfrom p.m0 import other\n\n\ndef main():\n    return getattr(m0, 'wanted')(), other()\n",
    )


def test_a_module_s_name_may_mean_something_else_elsewhere():
    shortened(
        "def wanted():\n    return 1\n",
        "from p import m0\n\n\ndef first():\n    return m0.wanted()\n\n\ndef second(m0):\n    return m0.wanted\n",
        "from p.m1 import first, second\nimport types\n\n\ndef main():\n"
        "    return first(), second(types.SimpleNamespace(wanted=5))\n",
    )


@pytest.mark.parametrize(
    "source",
    [
        "import p.m0\n\n\ndef main():\n    return p.m0.LIMIT\n",
        "from p.m0 import *\n\n\ndef main():\n    return LIMIT\n",
        "async def main():\n    return 1\n",
        "def main():\n    match 1:\n        case other:\n            return other\n",
    ],
)
def test_what_cannot_be_followed_is_refused(source):
    with pytest.raises(CaddieError, match=r"p\.m1, line \d+: \w+ of this kind cannot be packed"):
        minify({"p.m0": "LIMIT = 3\n", "p.m1": source}, entry="main")


CLOSURES = {"MAKE_CELL", "LOAD_CLOSURE"}  # the interpreter sorts these by their names
JUMPS = {*dis.hasjrel, *dis.hasjabs}
IN_MODULE, ELSEWHERE = "module", ""


def instructions(code):
    """What a code object does; how a method is called depends on whether the module imports what has its owner's name."""
    return [
        i._replace(opname="LOAD_ATTR" if i.opname == "LOAD_METHOD" else i.opname)
        for i in dis.get_instructions(code)
        if i.opname != "PUSH_NULL"
    ]


def renamed(before, after):
    """(name space, word, name) of two code objects that do the same; AssertionError where they do not."""
    for one, other in zip(instructions(before), instructions(after), strict=True):
        assert (one.opname, one.positions.lineno) == (other.opname, other.positions.lineno), before
        words = one.argval, other.argval
        if isinstance(one.argval, types.CodeType):
            yield from renamed(*words)
            yield ELSEWHERE, one.argval.co_name, other.argval.co_name
        elif isinstance(one.argval, tuple):  # keywords, or what is imported
            yield from ((ELSEWHERE, *pair) for pair in zip(*words, strict=True))
        elif one.opname.endswith(("_GLOBAL", "_NAME", "_FAST", "_DEREF")):
            is_in_module = one.opname.endswith("_GLOBAL") or before.co_name == "<module>"
            yield IN_MODULE if is_in_module else str(before), *words
        elif one.opname in CLOSURES or one.opcode in JUMPS:
            continue  # to another byte, as calls differ
        elif one.argval != other.argval:  # after a module's dot, or a class's name
            yield ELSEWHERE, *(str(word).rpartition(".")[2] for word in words)


def test_the_shortened_trainer_has_the_same_instructions_on_other_names(monkeypatch):
    monkeypatch.setattr(minifier, "short_attributes", lambda *_, **__: {})  # they have their own test
    short = module_sources(ROOT)
    monkeypatch.setattr(minifier, "short_names", lambda trees, *_, **__: ShortNames({name: [] for name in trees}, {}))
    plain = module_sources(ROOT)
    every = {}
    for module in (f"trainer.{name}" for name in MODULES):
        inside = {}
        for place, word, name in renamed(*(compile(text[module], module, "exec") for text in (plain, short))):
            if word != name:
                assert every.setdefault(word, name) == name, f"{module}: {word} has two short names"
            if place != ELSEWHERE:
                assert inside.setdefault((place, name), word) == word, f"{module}: {name} stands for two words"
    assert len(every) > 500
    assert sum(map(len, short.values())) < 0.9 * sum(map(len, plain.values()))
