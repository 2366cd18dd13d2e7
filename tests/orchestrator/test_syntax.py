import ast

import pytest

from orchestrator.bundle import MODULES, ROOT
from orchestrator.syntax import children, walk

SHARED = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)
ODD = """
import a.b as c
from d import e as f
async def g(x, /, y: int = 1, *z, w=2, **k) -> None:
    global h
    async with a as b, c: await d
    return [i async for i in j if i], {**k, 1: 2}, f"{x!r:>{y}}", lambda q: (yield q)
class C(B, metaclass=M):
    n: int = 3
try: pass
except* E as e: del a[1:2]
match x:
    case {"k": [1, *rest], **others} if others: pass
    case C(1, n=2) | None: pass
"""


@pytest.mark.parametrize("source", [ODD, *((ROOT / f"{name}.py").read_text() for name in MODULES)])
def test_it_gives_what_the_library_gives_less_what_all_nodes_share(source):
    tree = ast.parse(source)
    nodes = [node for node in ast.walk(tree) if not isinstance(node, SHARED)]
    assert walk(tree) == nodes
    for node in nodes:
        assert children(node) == [n for n in ast.iter_child_nodes(node) if not isinstance(n, SHARED)]


def test_what_is_taken_out_meanwhile_was_in_the_list():
    tree = ast.parse("def f():\n    a\n    b\n")
    for node in walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body.clear()
    assert [type(node).__name__ for node in walk(tree)] == ["Module", "FunctionDef", "arguments"]
