"""The source inside a script that unpacks itself: `exec(lzma.decompress(base64.b85decode("...")))` and its kin.

Submissions are packed so because their bytes count. The expression is worked out here from a short list of decoders, and
nothing of the script is run. Standard library only.
"""

from __future__ import annotations

import ast
import base64
import binascii
import bz2
import gzip
import lzma
import operator
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any

MODULES: Mapping[str, Any] = {
    "base64": base64, "binascii": binascii, "bz2": bz2, "gzip": gzip, "lzma": lzma, "zlib": zlib,
}  # fmt: skip
DECODERS = frozenset({
    "a85decode", "b16decode", "b32decode", "b64decode", "b85decode", "standard_b64decode", "urlsafe_b64decode", "a2b_base64",
    "unhexlify", "a2b_hex", "decompress",
})  # fmt: skip
METHODS = frozenset({"decode", "encode", "join", "replace", "strip", "split", "translate"})
"""Of text and bytes; none of them reaches further than its own value."""

MOST_BYTES = 20_000_000
"""A source that unpacks to more is not looked into."""

DEEPEST = 4  # how often a packed script may hold another one


class Unclear(Exception):
    """An expression that is not made of decoders and constants alone."""


def unpack(text: str) -> tuple[str, bool]:
    """The innermost source of a script, and whether all that it executes was found. Raises SyntaxError."""
    for _ in range(DEEPEST):
        found = _executed(parse(text))
        if not found:
            return text, True
        inner = [source for source in found if source is not None]
        if not inner:
            return text, False
        text = max(inner, key=len)
    return text, False


def parse(text: str) -> ast.Module:
    """The syntax tree of a script. Raises SyntaxError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in strings, which are its author's
        return ast.parse(text)


def _executed(tree: ast.Module) -> list[str | None]:
    """What the script's own `exec` calls run; None for one that is not clear."""
    calls = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "exec" and node.args
    ]  # fmt: skip
    names = _names(tree)
    return [_source(call.args[0], names) for call in calls]


def _source(node: ast.expr, names: Mapping[str, Any]) -> str | None:
    try:
        value = _value(node, names)
        return value.decode() if isinstance(value, bytes) else value if isinstance(value, str) else None
    except (Unclear, ValueError, TypeError, KeyError, lzma.LZMAError, zlib.error, OSError, EOFError, MemoryError):
        return None


def _names(tree: ast.Module) -> dict[str, Any]:
    """What the script's names stand for, as far as they are decoders, their modules or constants."""
    names: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    names[alias.asname or alias.name] = MODULES[alias.name]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module in MODULES:
            for alias in node.names:
                names[alias.asname or alias.name] = getattr(MODULES[node.module], alias.name, None)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                names[node.targets[0].id] = _value(node.value, names)
            except (Unclear, ValueError, TypeError, KeyError, lzma.LZMAError, zlib.error, OSError, EOFError):
                names.pop(node.targets[0].id, None)
    return names


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression of constants and decoders. Raises Unclear, and what the decoders raise."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.List(elts=items):
            return [_value(item, names) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item, names) for item in items)
        case ast.Dict(keys=keys, values=values) if all(key is not None for key in keys):
            return {_value(key, names): _value(v, names) for key, v in zip(keys, values, strict=True) if key}
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return operator.add(_value(left, names), _value(right, names))
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):  # of presets: 9 | lzma.PRESET_EXTREME
            return operator.or_(_value(left, names), _value(right, names))
        case ast.Attribute(value=ast.Name(id=module), attr=attribute) if _is_module(names.get(module)):
            return getattr(names[module], attribute)
        case ast.Call(func=ast.Name(id="compile"), args=[source, *_]):
            return _value(source, names)
        case ast.Call(func=ast.Name(id="__import__"), args=[ast.Constant(value=str(module))]) if module in MODULES:
            return MODULES[module]
        case ast.Call(func=function, args=args, keywords=keywords):
            call = _function(function, names)
            options = {k.arg: _value(k.value, names) for k in keywords if k.arg}
            return _bounded(call(*(_value(arg, names) for arg in args), **options))
    raise Unclear(ast.dump(node)[:80])


def _function(node: ast.expr, names: Mapping[str, Any]) -> Callable[..., Any]:
    """A decoder, or a method of text or bytes. Raises Unclear."""
    if isinstance(node, ast.Name) and getattr(names.get(node.id), "__name__", "") in DECODERS:
        return names[node.id]  # type: ignore[no-any-return]  # a decoder, by its name
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, names)
        is_decoder = _is_module(owner) and node.attr in DECODERS
        if is_decoder or (isinstance(owner, (str, bytes)) and node.attr in METHODS):
            return getattr(owner, node.attr)  # type: ignore[no-any-return]  # likewise
    raise Unclear(ast.dump(node)[:80])


def _is_module(value: Any) -> bool:
    return any(value is module for module in MODULES.values())


def _bounded(value: Any) -> Any:
    if isinstance(value, (str, bytes)) and len(value) > MOST_BYTES:
        raise Unclear(f"{len(value):,} bytes")
    return value
