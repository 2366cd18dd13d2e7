"""What is known of a program's values once the choices of a configuration are: constants, truth, signs, and from which knobs."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.inference import Program, value_stored
from orchestrator.syntax import walk
from trainer.config import SECTIONS, knobs

KINDS = knobs()

IMPURE = (ast.Call, ast.Subscript, ast.NamedExpr, ast.Yield, ast.YieldFrom, ast.Await, ast.Starred)

Value = str | bool | float | None


@dataclass(frozen=True)
class Fact:
    """What is known of a value; None where a part is not."""

    exact: tuple[Value] | None = None
    """The value itself."""

    truth: bool | None = None
    sign: int | None = None
    is_none: bool | None = None
    is_number: bool = False
    because: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)
    """The knobs that it follows from."""


UNKNOWN = Fact()
SOMETHING = Fact(is_none=False)


def exactly(value: Value, because: frozenset[str] = frozenset()) -> Fact:
    is_number = isinstance(value, int | float)
    sign = (value > 0) - (value < 0) if isinstance(value, int | float) else None
    return Fact((value,), bool(value), sign, value is None, is_number, because)


def joined(facts: Iterable[Fact]) -> Fact:
    """What is known of a value that is one of these."""
    found: Fact | None = None
    for fact in facts:
        found = fact if found is None else _common(found, fact)
    return found or UNKNOWN


def _common(one: Fact, other: Fact) -> Fact:
    is_same = one.exact == other.exact and [type(v) for v in one.exact or ()] == [type(v) for v in other.exact or ()]
    return Fact(
        exact=one.exact if is_same else None, truth=one.truth if one.truth is other.truth else None,
        sign=one.sign if one.sign == other.sign else None, is_none=one.is_none if one.is_none is other.is_none else None,
        is_number=one.is_number and other.is_number, because=one.because | other.because,
    )  # fmt: skip


class Facts:
    """What is known of expressions, from the choices and from what the program does with them."""

    def __init__(self, program: Program, chosen: Mapping[str, str], entry: str) -> None:
        self.program, self.chosen, self.entry = program, chosen, entry
        self.sections = {cls.__name__: name for name, cls in SECTIONS.items()}
        self.subclassed = {b.id for c in program.classes.values() for b in c.bases if isinstance(b, ast.Name)}
        self._known: dict[ast.AST, Fact] = {}
        self._asked: set[ast.AST] = set()
        self._circles = 0
        """How often something was asked for while it was being found."""

        self._callers: dict[ast.AST, list[ast.Call] | None] = {}
        constants = (node.value for node in program.nodes() if isinstance(node, ast.Constant))
        self.strings = {value for value in constants if isinstance(value, str)}
        imports = [node for node in program.nodes() if isinstance(node, ast.ImportFrom)]
        self.hidden = {
            alias.name
            for node in imports
            for alias in node.names
            if alias.asname or not isinstance(program.parent(node), ast.Module)
        }
        """What is also called by names that are not looked for."""

        self.mentions: defaultdict[str, list[ast.expr]] = defaultdict(list)
        for node in program.nodes():
            if isinstance(node, ast.Name):
                self.mentions[node.id].append(node)
            elif isinstance(node, ast.Attribute):
                self.mentions[node.attr].append(node)

    def of(self, node: ast.AST) -> Fact:
        """What is known of an expression's value, or of a parameter's."""
        if node in self._known:
            return self._known[node]
        if node in self._asked:  # while it is being found: it depends on itself
            self._circles += 1
            return UNKNOWN
        self._asked.add(node)
        circles = self._circles
        fact = self._of(node)
        self._asked.discard(node)
        if not self._asked or circles == self._circles:  # otherwise what is on the way would have it differ
            self._known[node] = fact
        return fact

    def _of(self, node: ast.AST) -> Fact:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return exactly(value)
            case ast.Constant():
                return SOMETHING
            case ast.Name():
                return self._of_name(node)
            case ast.Attribute(value=value, attr=word):
                owner = self.program.type_of(value)
                return self._of_attribute(owner, word) if isinstance(owner, str) else UNKNOWN
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                fact = self.of(operand)
                return UNKNOWN if fact.truth is None else exactly(not fact.truth, fact.because)
            case ast.BoolOp():
                return self._of_bool_op(node)
            case ast.Compare():
                return self._of_comparison(node)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                fact = self.of(test)
                if fact.truth is None:
                    return joined([self.of(body), self.of(orelse)])
                chosen = self.of(body if fact.truth else orelse)
                return dataclasses.replace(chosen, because=chosen.because | fact.because)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                facts = self.of(left), self.of(right)
                because = facts[0].because | facts[1].because
                is_zero = all(f.is_number for f in facts) and any(f.sign == 0 for f in facts)  # all numbers are finite
                return exactly(0, because) if is_zero else UNKNOWN
            case ast.Subscript(value=ast.Dict() as table, slice=key):
                return self.of(part) if (part := self.chosen_part(table, key)) else UNKNOWN
            case ast.Call():
                return self._of_call(node)
            case ast.arg():
                return self._of_parameter(node)
            case ast.List() | ast.Dict() | ast.JoinedStr() | ast.Lambda() | ast.ListComp() | ast.Tuple():
                return SOMETHING
        return UNKNOWN

    def chosen_part(self, table: ast.Dict, key: ast.expr) -> ast.expr | None:
        """What a table written out gives for a known key, where nothing else in it does anything."""
        fact = self.of(key)
        for name, value in zip(table.keys, table.values, strict=True):
            is_plain = isinstance(name, ast.Constant) and not self.may_do_something(value)
            if fact.exact is not None and is_plain and (name.value,) == fact.exact:  # type: ignore[union-attr]
                return value
        return None

    def _of_bool_op(self, node: ast.BoolOp) -> Fact:
        """`and` and `or`: decided by the first part that decides, or by all."""
        decides = isinstance(node.op, ast.Or)
        facts = [self.of(part) for part in node.values]
        for number, fact in enumerate(facts):
            if fact.truth is decides:
                return fact if number == 0 else Fact(truth=decides, because=fact.because)
            if self.may_do_something(node.values[number]):
                return UNKNOWN
        if all(fact.truth is not None for fact in facts):
            because = frozenset[str]().union(*(fact.because for fact in facts))
            return dataclasses.replace(facts[-1], because=because)
        return UNKNOWN

    def _of_comparison(self, node: ast.Compare) -> Fact:
        if len(node.ops) != 1 or self.may_do_something(node):
            return UNKNOWN
        (left, right), op = (self.of(node.left), self.of(node.comparators[0])), node.ops[0]
        because = left.because | right.because
        if isinstance(op, ast.Is | ast.IsNot) and right.exact == (None,) and left.is_none is not None:
            return exactly(left.is_none is isinstance(op, ast.Is), because)
        if isinstance(op, ast.In | ast.NotIn) and isinstance(node.comparators[0], ast.Tuple | ast.List | ast.Set):
            items = [self.of(item).exact for item in node.comparators[0].elts]
            if left.exact and all(items):
                return exactly((left.exact in items) is isinstance(op, ast.In), because)
        if isinstance(op, ast.Eq | ast.NotEq) and left.exact and right.exact:
            return exactly((left.exact == right.exact) is isinstance(op, ast.Eq), because)
        if left.sign is not None and right.exact is not None and right.exact[0] == 0:
            signs: dict[type[ast.cmpop], bool] = {
                ast.Gt: left.sign > 0, ast.GtE: left.sign >= 0, ast.Lt: left.sign < 0, ast.LtE: left.sign <= 0,
                ast.Eq: left.sign == 0, ast.NotEq: left.sign != 0,
            }  # fmt: skip
            return exactly(signs[type(op)], because) if type(op) in signs else UNKNOWN
        return UNKNOWN

    def _of_name(self, name: ast.Name) -> Fact:
        bindings = self.program.bindings(name)
        if bindings is None or not bindings:
            return UNKNOWN
        function = self.program.function_of(name)
        facts = []
        for binding in bindings:
            if binding.is_item:
                return UNKNOWN
            if binding.value is not None:
                facts.append(self.of(binding.value))
            elif binding.argument is not None:
                facts.append(self.of(binding.argument))
            else:
                return UNKNOWN
        return joined(facts) if function is not None else UNKNOWN

    def _of_parameter(self, argument: ast.arg) -> Fact:
        """What all calls give, or else what the annotation says."""
        function = self.program.parent(self.program.parent(argument) or argument)
        if not isinstance(function, ast.FunctionDef) or function.decorator_list:
            return UNKNOWN
        calls = self.callers(function)
        fact = joined(self._given(call, function, argument) for call in calls) if calls else UNKNOWN
        if fact.is_none is None and self._is_something(argument.annotation):
            fact = dataclasses.replace(fact, is_none=False)
        return fact

    def _given(self, call: ast.Call, function: ast.FunctionDef, argument: ast.arg) -> Fact:
        given = argument_of(call, function, argument, is_bound=isinstance(self.program.parent(function), ast.ClassDef))
        return UNKNOWN if given is None else self.of(given)

    def callers(self, function: ast.FunctionDef) -> list[ast.Call] | None:
        """Every call of a function; None where something else may call it."""
        if function not in self._callers:
            self._callers[function] = self._find_callers(function)
        return self._callers[function]

    def _find_callers(self, function: ast.FunctionDef) -> list[ast.Call] | None:
        owner = self.program.parent(function)
        if function.name == self.entry or function.name in self.hidden:
            return None
        if function.decorator_list or function.args.vararg or function.args.kwarg or function.args.posonlyargs:
            return None
        if isinstance(owner, ast.Module) and self.program.functions.get(function.name) is function:
            return self._calls_by_name(function)
        if not isinstance(owner, ast.ClassDef) or self.program.classes.get(owner.name) is not owner:
            return None
        if owner.name in self.subclassed or not self.is_closed(owner):
            return None
        if function.name == "__init__":
            return None if owner.decorator_list else self._calls_by_name(owner)
        return None if function.name.startswith("__") else self._calls_by_type(function, owner)

    def may_do_something(self, node: ast.AST) -> bool:
        """Whether evaluating an expression may do more than read."""
        return any(isinstance(n, IMPURE) and self.of(n).exact is None for n in walk(node))

    def is_closed(self, definition: ast.ClassDef) -> bool:
        """Whether a class is made of packed ones alone, so that nothing from outside calls its methods."""
        bases = [c.name for c in self.program.lineage(definition.name)]
        every = [b for name in bases for b in self.program.classes[name].bases]
        return all(isinstance(b, ast.Name) and b.id in self.program.classes for b in every)

    def _calls_by_name(self, definition: ast.FunctionDef | ast.ClassDef) -> list[ast.Call] | None:
        """The calls of a function or class, if it is only called; types do not matter."""
        if definition.name in self.hidden:
            return None
        calls: list[ast.Call] = []
        for mention in self.mentions[definition.name]:
            if isinstance(mention, ast.Name) and self.program.bindings(mention) is not None:
                continue
            if self.program.called(mention) is not definition:
                is_other = isinstance(mention, ast.Name) and isinstance(mention.ctx, ast.Load)
                if isinstance(mention, ast.Attribute) or is_other:
                    continue
                return None
            parent = self.program.parent(mention)
            if isinstance(parent, ast.Call) and parent.func is mention and is_plain_call(parent):
                calls.append(parent)
            elif not self._only_names(mention):
                return None
        return calls

    def _only_names(self, mention: ast.AST) -> bool:
        """Whether a mention of a class only says of which class something is."""
        node, parent = mention, self.program.parent(mention)
        while isinstance(parent, ast.expr | ast.arg | ast.stmt | ast.arguments):
            if (
                isinstance(parent, ast.Call)
                and getattr(parent.func, "id", "") == "isinstance"
                and node in parent.args[1:]
            ):
                return True
            if getattr(parent, "annotation", None) is node or getattr(parent, "returns", None) is node:
                return True
            if isinstance(parent, ast.stmt):
                return False
            node, parent = parent, self.program.parent(parent)
        return False

    def _calls_by_type(self, function: ast.FunctionDef, owner: ast.ClassDef) -> list[ast.Call] | None:
        """The calls of a method, if every use of its word is a call on a packed class."""
        calls: list[ast.Call] = []
        for mention in self.mentions[function.name]:
            if isinstance(mention, ast.Name):
                continue
            kind, parent = self.program.type_of(mention.value), self.program.parent(mention)  # type: ignore[attr-defined]
            if not isinstance(kind, str):
                return None
            if kind != owner.name:
                continue
            if not (isinstance(parent, ast.Call) and parent.func is mention and is_plain_call(parent)):
                return None
            calls.append(parent)
        return calls

    def _of_attribute(self, owner: str, word: str) -> Fact:
        if owner in self.sections:
            knob = f"{self.sections[owner]}.{word}"
            if knob in self.chosen:
                return self._of_choice(knob)
            if KINDS.get(knob) in (int, float):
                return Fact(is_none=False, is_number=True)
        definition = self.program.classes[owner]
        method = self.program.method(owner, word)
        if method is not None:
            return self._of_property(method)
        for statement in definition.body:
            if isinstance(statement, ast.AnnAssign) and getattr(statement.target, "id", "") == word:
                fact = self._of_field(definition, statement)
                is_something = fact.is_none is None and self._is_something(statement.annotation)
                return dataclasses.replace(fact, is_none=False) if is_something else fact
        return self._of_stores(owner, word)

    def _of_choice(self, knob: str) -> Fact:
        choice, because, kind = self.chosen[knob], frozenset([knob]), KINDS[knob]
        if kind is str:
            return exactly(choice, because)
        sign = int(choice)
        if kind is bool:
            return exactly(bool(sign), because)
        is_number = kind in (int, float)
        return Fact(None, bool(sign), sign if is_number else None, False, is_number, because)

    def _of_property(self, method: ast.FunctionDef) -> Fact:
        is_property = [getattr(d, "id", "") for d in method.decorator_list] == ["property"]
        return self._of_returned(method, of_property=True) if is_property else UNKNOWN

    def _of_returned(self, function: ast.FunctionDef, *, of_property: bool = False) -> Fact:
        """Of a function that only returns an expression, what is known of that; of another one nothing."""
        body = [s for s in function.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        is_plain = of_property or not function.decorator_list
        if is_plain and len(body) == 1 and isinstance(body[0], ast.Return) and body[0].value is not None:
            return self.of(body[0].value)
        return UNKNOWN

    def _of_field(self, definition: ast.ClassDef, field: ast.AnnAssign) -> Fact:
        """Of a dataclass's field, what all that is built gets."""
        is_frozen = any("frozen=True" in ast.unparse(d) for d in definition.decorator_list)
        word = ast.unparse(field.target)
        is_replaced = any(
            k.arg == word
            for node in self.mentions["replace"]
            if isinstance(call := self.program.parent(node), ast.Call)
            for k in call.keywords
        )
        if not is_frozen or definition.name in self.subclassed or definition.bases or is_replaced:
            return UNKNOWN
        if any(
            isinstance(s, ast.FunctionDef) and s.decorator_list and "class" in ast.unparse(s.decorator_list[0])
            for s in definition.body
        ):
            return UNKNOWN
        calls = self._calls_by_name(definition)
        if not calls:
            return UNKNOWN
        fields = [ast.unparse(s.target) for s in definition.body if isinstance(s, ast.AnnAssign)]
        given = [_field_given(call, fields, word) or field.value for call in calls]
        return joined(UNKNOWN if value is None else self.of(value) for value in given)

    def _of_stores(self, owner: str, word: str) -> Fact:
        """Of an attribute that one statement sets, what is known of what it is set to."""
        stores = self.program.stores[word]
        types = [self.program.type_of(store.value) for store in stores]
        if any(not isinstance(kind, str) for kind in types) or owner in self.subclassed:
            return UNKNOWN
        own = [store for store, kind in zip(stores, types, strict=True) if kind == owner]
        of_class = [s for c in self.program.lineage(owner) for s in c.body if isinstance(s, ast.Assign)]
        if any(isinstance(t, ast.Name) and t.id == word for s in of_class for t in s.targets):
            return UNKNOWN
        if len(own) != 1 or (value := value_stored(own[0], self.program)) is None:
            return UNKNOWN
        return self.of(value)

    def _of_call(self, call: ast.Call) -> Fact:
        if isinstance(call.func, ast.Name) and call.func.id == "bool" and len(call.args) == 1:
            fact = self.of(call.args[0])
            if fact.truth is not None:
                return exactly(fact.truth, fact.because)
        called = self.program.called(call.func)
        if isinstance(called, ast.ClassDef):
            return SOMETHING
        if isinstance(called, ast.FunctionDef):
            fact = self._of_returned(called)
            return dataclasses.replace(fact, is_none=False) if self._is_something(called.returns) else fact
        word = getattr(call.func, "attr", getattr(call.func, "id", ""))
        return SOMETHING if re.match("[A-Z][A-Z]*[a-z]", word) else UNKNOWN  # a class makes something

    def _is_something(self, annotation: ast.expr | None) -> bool:
        """Whether an annotation leaves out None."""
        words = set(re.findall(r"\w+", ast.unparse(annotation))) if annotation is not None else {"None"}
        return not words & {"None", "Any", "Optional", "object"}


def is_plain_call(call: ast.Call) -> bool:
    """Whether a call says which parameter gets what."""
    return not any(isinstance(a, ast.Starred) for a in call.args) and all(k.arg for k in call.keywords)


def argument_of(call: ast.Call, function: ast.FunctionDef, argument: ast.arg, *, is_bound: bool) -> ast.expr | None:
    """What a call gives to a parameter, or its default; None where neither is found."""
    for keyword in call.keywords:
        if keyword.arg == argument.arg:
            return keyword.value
    a = function.args
    if argument in a.args:
        number = a.args.index(argument)
        if number - is_bound < len(call.args):
            return call.args[number - is_bound] if number >= is_bound else None
        without = len(a.args) - len(a.defaults)
        return a.defaults[number - without] if number >= without else None
    if argument in a.kwonlyargs:
        return a.kw_defaults[a.kwonlyargs.index(argument)]
    return None


def _field_given(call: ast.Call, fields: list[str], word: str) -> ast.expr | None:
    for keyword in call.keywords:
        if keyword.arg == word:
            return keyword.value
    number = fields.index(word)
    return call.args[number] if number < len(call.args) else None
