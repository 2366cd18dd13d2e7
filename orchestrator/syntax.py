"""The nodes of a syntax tree, as `ast.walk` gives them in twice the time; packing a bundle does little else.

Left out are contexts and operators (`ast.Load`, `ast.Add`): each is one object that all nodes share, and no place of it.
"""

from __future__ import annotations

import ast

PLAIN = {
    "arg", "asname", "attr", "conversion", "ctx", "id", "is_async", "kind", "level", "module", "name", "op", "ops",
    "simple", "type_comment", "type_ignores",
}  # fmt: skip
"""Fields without nodes of their own, in whatever node they are."""

FIELDS = {
    kind: tuple(field for field in kind._fields if field not in PLAIN and kind is not ast.Constant)
    for kind in vars(ast).values()
    if isinstance(kind, type) and issubclass(kind, ast.AST)
}
"""By class of node, the fields in which it holds others."""


def children(node: ast.AST) -> list[ast.AST]:
    """The nodes right below a node, by the order of its fields."""
    found: list[ast.AST] = []
    for field in FIELDS[type(node)]:
        value = getattr(node, field)
        if isinstance(value, list):
            found += [each for each in value if isinstance(each, ast.AST)]
        elif isinstance(value, ast.AST):
            found.append(value)
    return found


def walk(root: ast.AST) -> list[ast.AST]:
    """A node and all below it, those that stand higher first; what is done to the tree afterwards changes no list."""
    found = [root]
    for node in found:
        found += children(node)
    return found
