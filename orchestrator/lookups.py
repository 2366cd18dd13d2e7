"""Lookups: the environment variables that a script looks at, by its syntax tree; none of it is run.

Scripts of the challenge take their settings from the environment, `int(os.environ.get("ITERATIONS", 20000))`, some by a
function of their own around it. Standard library only.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from orchestrator.packed_source import parse

INT, FLOAT, BOOL, TEXT = "int", "float", "bool", "text"
"""What a script makes of a variable's text."""

READS = frozenset({"get", "pop", "setdefault"})

# What a name stands for.
MAPPING, GETTER, MODULE = "mapping", "getter", "module"

NUMBERS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.LShift: lambda a, b: int(a) << min(int(b), 64), ast.Pow: lambda a, b: a ** min(b, 64),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """One variable as a script looks at it."""

    name: str
    kind: str = TEXT
    default: str | None = None
    """The text that an unset variable counts as; None where there is none, or it is only known when the script runs."""

    default_source: str = ""
    """The default as the script writes it; empty where it has none."""

    setting: str = ""
    """The name that the script gives to the value: scripts print their settings under it."""

    line: int = 0
    is_required: bool = False
    """Whether the script fails without it."""


@dataclass(frozen=True, kw_only=True)
class Lookups:
    """All that a script looks at."""

    found: Mapping[str, Lookup]
    """By name, in the order of the script; of several lookups of one name the first that has a default."""

    written: tuple[str, ...]
    """Variables that the script sets itself, whatever it was given."""

    is_partial: bool
    """Whether it also looks at names that it makes up as it runs."""


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A function of the script that looks a variable up for its callers."""

    arguments: tuple[str, ...]
    defaults: Mapping[str, ast.expr]
    name_argument: str
    default_argument: str
    """Empty where the function has a default of its own, or none."""

    own_default: ast.expr | None
    kind_argument: str
    """Argument that is called on the text; empty without one."""

    kind: str


def find_lookups(text: str) -> Lookups:
    """The variables that a script looks at. Raises SyntaxError."""
    return _Scan(parse(text)).lookups()


class _Scan:
    """One reading of a syntax tree."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self.names = self._standing_for()
        self.wrappers: dict[str, Wrapper] = {}
        self._find_wrappers()

    def lookups(self) -> Lookups:
        found: dict[str, Lookup] = {}
        is_partial = False
        for lookup in sorted(self._each(), key=lambda lookup: lookup.line):
            if not lookup.name:
                is_partial = True
            elif lookup.name not in found:
                found[lookup.name] = lookup
            else:
                found[lookup.name] = _joined(found[lookup.name], lookup)
        return Lookups(found=found, written=tuple(self._written()), is_partial=is_partial)

    # ---------------------------------------------------------------------------------------- what names stand for

    def _standing_for(self) -> dict[str, str]:
        """`os`, `environ`, `getenv` and what else the script calls them."""
        names: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names |= {alias.asname or "os": MODULE for alias in node.names if alias.name in ("os", "os.path")}
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                kinds = {"environ": MAPPING, "getenv": GETTER}
                names |= {a.asname or a.name: kinds[a.name] for a in node.names if a.name in kinds}
        for node in ast.walk(self.tree):  # E = os.environ; get = os.environ.get
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                kind = self._kind_of(node.value, names)
                if kind in (MAPPING, GETTER):
                    names[node.targets[0].id] = kind
        return names

    def _kind_of(self, node: ast.AST, names: Mapping[str, str]) -> str:
        match node:
            case ast.Name(id=name):
                return names.get(name, "")
            case ast.Attribute(value=value, attr="environ") if self._kind_of(value, names) == MODULE:
                return MAPPING
            case ast.Attribute(value=value, attr="getenv") if self._kind_of(value, names) == MODULE:
                return GETTER
            case ast.Attribute(value=value, attr=attribute) if self._kind_of(value, names) == MAPPING:
                return GETTER if attribute in READS else ""
        return ""

    # ---------------------------------------------------------------------------------------- the lookups themselves

    def _plain(self) -> Iterator[tuple[ast.expr, ast.expr, ast.expr | None, bool]]:
        """(node, name, default, whether it must be set) of every direct look at the environment."""
        for node in ast.walk(self.tree):
            match node:
                case ast.Call(func=function, args=[name, *rest]) if self._kind_of(function, self.names) == GETTER:
                    given = [k.value for k in node.keywords if k.arg == "default"]
                    yield node, name, next(iter([*rest, *given]), None), False
                case ast.Subscript(value=value, slice=name, ctx=ast.Load()) if self._is_mapping(value):
                    yield node, name, None, True
                case ast.Compare(left=name, ops=[ast.In() | ast.NotIn()], comparators=[value]) if self._is_mapping(
                    value
                ):
                    yield node, name, None, False

    def _is_mapping(self, node: ast.AST) -> bool:
        return self._kind_of(node, self.names) == MAPPING

    def _written(self) -> Iterator[str]:
        for node in ast.walk(self.tree):
            match node:
                case ast.Subscript(value=value, slice=ast.Constant(value=str(name)), ctx=ast.Store()) if (
                    self._is_mapping(value)
                ):
                    yield name

    def _each(self) -> Iterator[Lookup]:
        """Every lookup, a nameless one for a name that is made up as the script runs."""
        for node, name, default, is_required in self._plain():
            function = self._wrapper_around(node)
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield self._lookup(node, name.value, default, is_required=is_required)
            elif not (isinstance(name, ast.Name) and function is not None and name.id == function.name_argument):
                yield Lookup(name="", line=node.lineno)
        for call in ast.walk(self.tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in self.wrappers:
                yield from self._by_wrapper(call, self.wrappers[call.func.id])

    def _lookup(self, node: ast.expr, name: str, default: ast.expr | None, *, is_required: bool = False) -> Lookup:
        kind = self._converted(node) or _kind_of_default(default)
        return Lookup(
            name=name, kind=kind, default=text_of_default(default), default_source=ast.unparse(default) if default else "",
            setting=self._assigned(node), line=node.lineno, is_required=is_required,
        )  # fmt: skip

    def _converted(self, node: ast.AST) -> str:
        """What is made of the text: of `bool(int(...))` the outer."""
        kind = ""
        while isinstance(parent := self.parents.get(node), ast.Call) and node in parent.args:
            kind = _kind_of_converter(parent.func) or kind
            node = parent
        return BOOL if not kind and isinstance(parent, ast.Compare) and parent.left is node else kind

    def _assigned(self, node: ast.AST) -> str:
        """The name that the statement around a lookup gives to its value."""
        while node in self.parents and not isinstance(node, ast.stmt):
            node = self.parents[node]
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        match targets[0] if targets else None:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return name
        return ""

    # ---------------------------------------------------------------------------------------- functions around them

    def _find_wrappers(self) -> None:
        for node, name, default, _ in self._plain():
            function = self._function_around(node)
            if function is None or not isinstance(name, ast.Name):
                continue
            label, arguments = function
            names = tuple(argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
            if not label or name.id not in names:
                continue
            positional = names[: len(arguments.posonlyargs) + len(arguments.args)]
            defaults = dict(zip(reversed(positional), reversed(arguments.defaults), strict=False))
            defaults |= {a.arg: d for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d}
            used = {n.id for n in ast.walk(default) if isinstance(n, ast.Name)} if default else set()
            inner = next((argument for argument in names if argument in used and argument != name.id), "")
            self.wrappers[label] = Wrapper(
                arguments=names, defaults=defaults, name_argument=name.id, default_argument=inner or self._fallback(node, names, name.id),
                own_default=None if inner else default, kind_argument=self._converter_among(node, names), kind=self._converted(node),
            )  # fmt: skip

    def _function_around(self, node: ast.AST) -> tuple[str, ast.arguments] | None:
        """The innermost function around a node, with the name that it is called by."""
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, ast.FunctionDef):
                return node.name, node.args
            if isinstance(node, ast.Lambda):
                return self._assigned(node), node.args
        return None

    def _wrapper_around(self, node: ast.AST) -> Wrapper | None:
        function = self._function_around(node)
        return self.wrappers.get(function[0]) if function else None

    def _fallback(self, node: ast.AST, names: tuple[str, ...], name: str) -> str:
        """Argument that a function returns where the variable is not set, by its usual names."""
        return next(
            (argument for argument in names if argument in ("default", "d", "fallback") and argument != name), ""
        )

    def _converter_among(self, node: ast.AST, names: tuple[str, ...]) -> str:
        """Argument that the function around a lookup calls."""
        while node in self.parents and not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            node = self.parents[node]
        called = [n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        return next((argument for argument in names if argument in called), "")

    def _by_wrapper(self, call: ast.Call, wrapper: Wrapper) -> Iterator[Lookup]:
        given: dict[str, ast.expr] = dict(wrapper.defaults)
        given |= dict(zip(wrapper.arguments, call.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        match given.get(wrapper.name_argument):
            case ast.Constant(value=str(name)):
                default = given.get(wrapper.default_argument, wrapper.own_default)
                lookup = self._lookup(call, name, default)
                kind = _kind_of_converter(given.get(wrapper.kind_argument)) or self._converted(call) or wrapper.kind
                yield replace(lookup, kind=kind or lookup.kind)
            case _:
                yield Lookup(name="", line=call.lineno)


def _joined(first: Lookup, second: Lookup) -> Lookup:
    """Two lookups of one variable as one."""
    full, other = (first, second) if first.default_source or not second.default_source else (second, first)
    return replace(
        full, kind=full.kind if full.kind != TEXT else other.kind, setting=full.setting or other.setting, line=first.line,
        is_required=first.is_required and second.is_required,
    )  # fmt: skip


def _kind_of_converter(node: ast.AST | None) -> str:
    known = {"int": INT, "float": FLOAT, "bool": BOOL, "str": TEXT}
    return known.get(node.id, "") if isinstance(node, ast.Name) else ""


def _kind_of_default(node: ast.expr | None) -> str:
    value = _constant(node)
    kinds: dict[type, str] = {bool: BOOL, int: INT, float: FLOAT}
    return kinds.get(type(value), TEXT)


def text_of_default(node: ast.expr | None) -> str | None:
    """A default as the text that would mean the same in the environment; None where only the running script knows."""
    value = _constant(node)
    if isinstance(value, bool):
        return str(int(value))
    return str(value) if isinstance(value, (int, float, str)) else None


def _constant(node: ast.expr | None) -> object:
    """A constant, or a number worked out of constants; None for anything else."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            number = _constant(operand)
            return -number if isinstance(number, (int, float)) else None
        case ast.Call(func=ast.Name(id="str" | "int" | "float"), args=[inner], keywords=[]):
            return _constant(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in NUMBERS:
            a, b = _constant(left), _constant(right)
            if isinstance(a, (int, float)) and isinstance(b, (int, float)):
                try:
                    return NUMBERS[type(op)](a, b)
                except (ArithmeticError, ValueError):
                    return None
    return None
