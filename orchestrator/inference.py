"""Which of the packed classes an expression is an instance of, as far as annotations and plain assignments say.

A type is the name of a packed class, or a container of one (`Items`); None is everything else: classes from outside, and
what cannot be followed. A class whose name two modules define has no type.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from orchestrator.syntax import children, walk

CONTAINERS = {"list", "tuple", "Sequence", "Iterable", "Iterator", "Collection", "deque", "set"}
MAPPINGS = {"dict", "Mapping", "defaultdict"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Items:
    """A container all of whose items are of one type."""

    each: Type
    is_mapping: bool = False
    """Its items are found by keys, which is also what a loop over it gives."""


Type = str | Items | None
D = TypeVar("D", ast.ClassDef, ast.FunctionDef)


@dataclass(frozen=True)
class Binding:
    """One way in which a name gets a value: an expression, a parameter; neither where it cannot be followed."""

    value: ast.expr | None = None
    argument: ast.arg | None = None
    annotation: ast.expr | None = None
    is_item: bool = False
    """The name is bound to the items of the value, one after the other."""


@dataclass(frozen=True)
class Place:
    """A node's surroundings."""

    module: str
    parent: ast.AST | None
    is_in_text: bool
    """Inside an f-string, where Python 3.11 does not know the positions of nodes."""


class Program:
    """A closed set of modules: what their names mean, and of which types their expressions are."""

    def __init__(self, trees: Mapping[str, ast.Module]) -> None:
        self.trees = trees
        self.places: dict[ast.AST, Place] = {}
        for module, tree in trees.items():
            self._place(tree, Place(module, None, is_in_text=False))
        self.classes = _once(
            (node.name, node) for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)
        )
        self.functions = _once(
            (node.name, node) for tree in trees.values() for node in tree.body if isinstance(node, ast.FunctionDef)
        )
        self.modules = {module.rpartition(".")[2] for module in trees}
        self._bound_in: dict[ast.FunctionDef, dict[str, list[Binding]]] = {}
        self._bindings: dict[ast.Name, list[Binding] | None] = {}
        self.stores: defaultdict[str, list[ast.Attribute]] = defaultdict(list)
        """Every place where an attribute is set, by its word."""
        for node in self.places:
            if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
                self.stores[node.attr].append(node)
        self._asked: set[ast.AST] = set()
        self._types: dict[ast.AST, Type] = {}

    def _place(self, node: ast.AST, place: Place) -> None:
        self.places[node] = place
        inner = Place(place.module, node, is_in_text=place.is_in_text or isinstance(node, ast.JoinedStr))
        for child in children(node):
            self._place(child, inner)

    def nodes(self) -> Iterator[ast.AST]:
        return iter(self.places)

    def parent(self, node: ast.AST) -> ast.AST | None:
        return self.places[node].parent

    # ------------------------------------------------------------------------------------------------ names

    def bindings(self, name: ast.Name) -> list[Binding] | None:
        """How a name gets its values, where it is a function's own; None where it is a module's or cannot be followed."""
        if name not in self._bindings:
            self._bindings[name] = self._find_bindings(name)
        return self._bindings[name]

    def _find_bindings(self, name: ast.Name) -> list[Binding] | None:
        child: ast.AST = name
        while (node := self.parent(child)) is not None:
            if isinstance(node, COMPREHENSIONS) and any(name.id in _targets(g.target) for g in node.generators):
                return [
                    _item_binding(g.target, g.iter, name.id) for g in node.generators if name.id in _targets(g.target)
                ]
            if isinstance(node, ast.Lambda) and name.id in {a.arg for a in _parameters(node)} and child is node.body:
                return [Binding()]
            if isinstance(node, ast.FunctionDef) and child in node.body and name.id in self.bound_in(node):
                return self.bound_in(node)[name.id]
            child = node
        return None

    def function_of(self, node: ast.AST) -> ast.FunctionDef | None:
        """The innermost named function that a node is in."""
        found = self.parent(node)
        while found is not None and not isinstance(found, ast.FunctionDef):
            found = self.parent(found)
        return found

    def bound_in(self, function: ast.FunctionDef) -> dict[str, list[Binding]]:
        """A function's own names, with what binds them; what functions inside it declare nonlocal cannot be followed."""
        if function not in self._bound_in:
            found: defaultdict[str, list[Binding]] = defaultdict(list)
            for argument in _parameters(function):
                is_plain = argument not in (function.args.vararg, function.args.kwarg)
                found[argument.arg].append(
                    Binding(argument=argument, annotation=argument.annotation) if is_plain else Binding()
                )
            _bind(function.body, found)
            for node in walk(function):
                if isinstance(node, ast.Nonlocal | ast.Global):
                    for name in node.names:
                        found[name] += [Binding(), Binding()]
            self._bound_in[function] = dict(found)
        return self._bound_in[function]

    def meaning(self, name: str, module: str) -> ast.ClassDef | ast.FunctionDef | None:
        """The packed class or function that a name outside functions means in a module."""
        found = self.classes.get(name) or self.functions.get(name)
        if found is None:
            return None
        origin = self.places[found].module
        if origin == module:
            return found
        for node in self.trees[module].body:
            taken = [(a.name, a.asname or name) for a in node.names] if isinstance(node, ast.ImportFrom) else []
            if (name, name) in taken and getattr(node, "module", None) == origin:
                return found
        return None

    def called(self, function: ast.expr) -> ast.ClassDef | ast.FunctionDef | None:
        """What of ours a call of this expression calls by its name."""
        if isinstance(function, ast.Name) and self.bindings(function) is None:
            return self.meaning(function.id, self.places[function].module)
        if (
            isinstance(function, ast.Attribute)
            and isinstance(function.value, ast.Name)
            and function.value.id in self.modules
            and self.bindings(function.value) is None
        ):
            found = self.classes.get(function.attr) or self.functions.get(function.attr)
            is_there = found is not None and self.places[found].module.rpartition(".")[2] == function.value.id
            return found if is_there else None
        return None

    # ------------------------------------------------------------------------------------------------ types

    def type_of(self, node: ast.expr) -> Type:
        """The type of an expression."""
        if node in self._types or node in self._asked:  # asked for while it is being found: it depends on itself
            return self._types.get(node)
        self._asked.add(node)
        found = self._type_of(node)
        self._asked.discard(node)
        if not self._asked:
            self._types[node] = found
        return found

    def _type_of(self, node: ast.expr) -> Type:
        match node:
            case ast.Name():
                return self._type_of_name(node)
            case ast.Attribute(value=value, attr=word):
                owner = self.type_of(value)
                return self.attribute_type(owner, word) if isinstance(owner, str) else None
            case ast.Call():
                return self._type_of_call(node)
            case ast.Subscript(value=value, slice=index):
                of = self.type_of(value)
                return of if isinstance(index, ast.Slice) else of.each if isinstance(of, Items) else None
            case ast.IfExp(body=body, orelse=orelse):
                found = {self.type_of(part) for part in (body, orelse) if not _is_none(part)}
                return found.pop() if len(found) == 1 else None
        return None

    def _type_of_name(self, name: ast.Name) -> Type:
        bindings = self.bindings(name)
        if bindings is None:
            return None
        own = self._type_of_self(name)
        if own is not None:
            return own
        found = {self._type_of_binding(b, self.places[name].module) for b in bindings if not _is_none(b.value)}
        return found.pop() if len(found) == 1 else None

    def _type_of_self(self, name: ast.Name) -> Type:
        """The class whose method a name is the first parameter of."""
        function: ast.AST | None = self.function_of(name)
        while isinstance(function, ast.FunctionDef):
            owner = self.parent(function)
            first = next(iter(_parameters(function)), None)
            if isinstance(owner, ast.ClassDef) and first is not None and first.arg == name.id:
                is_static = any(
                    getattr(d, "id", "") in ("staticmethod", "classmethod") for d in function.decorator_list
                )
                is_only = len(self.bound_in(function)[name.id]) == 1
                return owner.name if is_only and not is_static and self.classes.get(owner.name) is owner else None
            if name.id in self.bound_in(function):
                return None
            function = self.function_of(function)
        return None

    def _type_of_binding(self, binding: Binding, module: str) -> Type:
        if binding.annotation is not None:
            found = self.type_named(binding.annotation, module)
        else:
            found = None if binding.value is None else self.type_of(binding.value)
        if not binding.is_item:
            return found
        return found.each if isinstance(found, Items) and not found.is_mapping else None

    def _type_of_call(self, call: ast.Call) -> Type:
        called = self.called(call.func)
        if isinstance(called, ast.ClassDef):
            return called.name
        if isinstance(called, ast.FunctionDef):
            return self.type_named(called.returns, self.places[called].module)
        if isinstance(call.func, ast.Attribute) and isinstance(owner := self.type_of(call.func.value), str):
            method = self.method(owner, call.func.attr)
            return None if method is None else self.type_named(method.returns, self.places[method].module)
        return None

    def method(self, owner: str, word: str) -> ast.FunctionDef | None:
        """A class's method, its own or that of a packed base."""
        for definition in self.lineage(owner):
            for statement in definition.body:
                if isinstance(statement, ast.FunctionDef) and statement.name == word:
                    return statement
        return None

    def lineage(self, owner: str) -> Iterator[ast.ClassDef]:
        """A class and its packed bases."""
        definition = self.classes.get(owner)
        if definition is not None:
            yield definition
            for base in definition.bases:
                if isinstance(base, ast.Name) and base.id != owner:
                    yield from self.lineage(base.id)

    def attribute_type(self, owner: str, word: str) -> Type:
        """The type of an attribute of a class."""
        for definition in self.lineage(owner):
            module = self.places[definition].module
            for statement in definition.body:
                if isinstance(statement, ast.AnnAssign) and getattr(statement.target, "id", "") == word:
                    return self.type_named(statement.annotation, module)
                if isinstance(statement, ast.FunctionDef) and statement.name == word:
                    is_property = any(getattr(d, "id", "") == "property" for d in statement.decorator_list)
                    return self.type_named(statement.returns, module) if is_property else None
            stores = [s for s in self.stores[word] if self.type_of(s.value) == definition.name]
            found = {self._type_of_store(store) for store in stores}
            if found:
                return found.pop() if len(found) == 1 else None
        return None

    def _type_of_store(self, store: ast.Attribute) -> Type:
        parent = self.parent(store)
        if isinstance(parent, ast.AnnAssign):
            return self.type_named(parent.annotation, self.places[store].module)
        value = value_stored(store, self)
        return None if value is None else self.type_of(value)

    def type_named(self, annotation: ast.expr | None, module: str) -> Type:
        """The type that an annotation names; of a type or None it is the type."""
        match annotation:
            case ast.Constant(value=str(text)):
                return self.type_named(ast.parse(text, mode="eval").body, module)
            case ast.Name(id=name):
                found = self.meaning(name, module)
                return name if isinstance(found, ast.ClassDef) else None
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                parts = [part for part in (left, right) if not _is_none(part)]
                return self.type_named(parts[0], module) if len(parts) == 1 else None
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                if name in MAPPINGS and isinstance(index, ast.Tuple):
                    each = self.type_named(index.elts[-1], module)
                elif isinstance(index, ast.Tuple):
                    each = self.type_named(index.elts[0], module) if _is_ellipsis(index.elts[-1]) else None
                else:
                    each = self.type_named(index, module) if name in CONTAINERS else None
                return None if each is None else Items(each, is_mapping=name in MAPPINGS)
        return None


def value_stored(target: ast.expr, program: Program) -> ast.expr | None:
    """What an assignment gives to one of its targets, where that is written beside it."""
    parent = program.parent(target)
    if isinstance(parent, ast.Assign | ast.AnnAssign):
        return parent.value
    outer = program.parent(parent) if isinstance(parent, ast.Tuple) else None
    if not (isinstance(parent, ast.Tuple) and isinstance(outer, ast.Assign) and len(outer.targets) == 1):
        return None
    values = outer.value
    if not isinstance(values, ast.Tuple) or len(values.elts) != len(parent.elts):
        return None
    is_paired = not any(isinstance(e, ast.Starred) for e in [*parent.elts, *values.elts])
    return values.elts[parent.elts.index(target)] if is_paired else None


def _once(found: Iterator[tuple[str, D]]) -> dict[str, D]:
    """What is defined under a name by one module alone."""
    pairs = list(found)
    times = Counter(name for name, _ in pairs)
    return {name: node for name, node in pairs if times[name] == 1}


def _parameters(function: ast.FunctionDef | ast.Lambda) -> list[ast.arg]:
    a = function.args
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x is not None)]


def _targets(target: ast.expr) -> set[str]:
    return {node.id for node in walk(target) if isinstance(node, ast.Name)}


def _is_none(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def _item_binding(target: ast.expr, items: ast.expr, name: str) -> Binding:
    return Binding(value=items, is_item=True) if isinstance(target, ast.Name) and target.id == name else Binding()


def _bind(body: list[ast.stmt], found: dict[str, list[Binding]]) -> None:
    """Note what the statements of a function bind, those of functions inside it left out."""
    todo: list[ast.AST] = list(body)
    while todo:
        node = todo.pop()
        for name, binding in _bound_by(node):
            found[name].append(binding)
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            todo += children(node)


def _bound_by(node: ast.AST) -> Iterator[tuple[str, Binding]]:
    """What one statement or expression binds, less what is inside it."""
    match node:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                yield from _bound_by_target(target, value)
        case ast.AnnAssign(target=ast.Name(id=name), value=value, annotation=annotation):
            yield name, Binding(value=value, annotation=annotation)
        case ast.NamedExpr(target=ast.Name(id=name), value=value):
            yield name, Binding(value=value)
        case ast.AugAssign(target=ast.Name(id=name)) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            yield name, Binding()
        case ast.ExceptHandler(name=str(name)):
            yield name, Binding()
        case ast.For(target=target, iter=items):
            yield from ((name, _item_binding(target, items, name)) for name in _targets(target))
        case ast.withitem(optional_vars=ast.expr() as target):
            yield from ((name, Binding()) for name in _targets(target))
        case ast.Delete(targets=targets):
            yield from ((name, Binding()) for target in targets for name in _deleted(target))
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            yield from ((alias.asname or alias.name.partition(".")[0], Binding()) for alias in aliases)


def _deleted(target: ast.expr) -> set[str]:
    return {target.id} if isinstance(target, ast.Name) else set()


def _bound_by_target(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, Binding]]:
    if isinstance(target, ast.Name):
        yield target.id, Binding(value=value)
        return
    if not isinstance(target, ast.Tuple | ast.List | ast.Starred):
        return
    parts = target.elts if not isinstance(target, ast.Starred) else []
    values = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == len(parts) else []
    if values and not any(isinstance(e, ast.Starred) for e in [*parts, *values]):
        for part, own in zip(parts, values, strict=True):
            yield from _bound_by_target(part, own)
        return
    for node in walk(target):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, Binding()
