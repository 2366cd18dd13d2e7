"""Folding: what a run's configuration decides is decided when its bundle is packed, and the code of other choices left out.

A choice is a word or a switch of the configuration, or the sign of a number that is off at zero; reads of it become
constants, and so does what follows from them alone: comparisons, branches, variables, parameters that every call gives
alike, attributes that are set once. Numbers that merely parametrise are read as ever. What cannot be followed by the
annotations is left as it stands, so that folding leaves out too little and never too much; and the table FOLDED of
`trainer.config`, which is filled in here, lets the packed code refuse every configuration of other choices.

Lines stay: a statement begins on the line on which it began.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.cuts import BODIES, Cut, begin_of, cut_out, end_of, first_of
from orchestrator.errors import CaddieError
from orchestrator.inference import Program, value_stored
from trainer.config import SECTIONS, Config, choice_of, knob_value, knobs

# Numbers and lists by whose sign, or emptiness, a technique is on or off. Of words and switches every one is a choice;
# of numbers only these, or trials that differ in nothing but a number would be packed apart.
SWITCHES = (
    "model.rope_dims", "model.qk_gain", "model.xsa_layers", "model.value_embedding_dim", "model.value_embedding_layers",
    "model.logit_softcap", "model.recurrence_layers", "model.recurrence_passes", "model.parallel_start_layer",
    "data.order_seed", "optim.muon_momentum_ramp_steps", "optim.grad_clip_norm", "optim.ema_decay",
    "quant.clip_importance", "quant.low_rank_tensors", "ttt.grad_clip_norm", "runtime.cpu_threads",
)  # fmt: skip
TABLE, ANY = "FOLDED", "_"
KINDS = knobs()

ENDINGS = (ast.Return, ast.Raise, ast.Continue, ast.Break)
IMPURE = (ast.Call, ast.Subscript, ast.NamedExpr, ast.Yield, ast.YieldFrom, ast.Await, ast.Starred)
UNFOLLOWED = {"setattr", "delattr", "vars", "globals", "locals", "eval", "exec"}
CALLED = re.compile(r"[)\]}\"']$|(?<!\w)(?!(return|if|else|and|or|not|in|is|yield|lambda)$)\w+$")
"""The end of what is called where a bracket follows it."""


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


def choices(config: Config) -> dict[str, str]:
    """The choices of a configuration by knob; what is packed depends on these alone."""
    return {k: choice_of(knob_value(config, k)) for k in KINDS if KINDS[k] in (bool, str) or k in SWITCHES}


def fold(sources: Mapping[str, str], chosen: Mapping[str, str], *, entry: str, table_in: str) -> dict[str, str]:
    """The sources of a closed set of modules, by dotted name, with the choices folded in.

    `entry` is the function that is called from outside; `table_in` is the module that holds FOLDED.

    Raises CaddieError where something sets attributes in a way that is not looked for here, or the table is missing.
    """
    folded, because = dict(sources), set[str]()
    while True:
        trees = {name: ast.parse(source) for name, source in folded.items()}
        found = _Round(Program(trees), folded, chosen, entry)
        found.run()
        because |= found.because
        if not any(found.cuts.values()):
            break
        folded = {name: cut_out(source, found.cuts[name]) for name, source in folded.items()}
    order = sorted(KINDS, key=lambda knob: knob.split("."))
    table = " ".join(chosen[knob] if knob in because else ANY for knob in order)
    return {**folded, table_in: _with_table(folded[table_in], table)}


def _with_table(source: str, table: str) -> str:
    """The source that says what was folded into it."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == TABLE:
            return cut_out(source, [Cut(begin_of(statement.value), end_of(statement.value), repr(table))])
    raise CaddieError(f"there is no {TABLE} in which to say what was folded")


class _Facts:
    """What is known of expressions, from the choices and from what the program does with them."""

    def __init__(self, program: Program, chosen: Mapping[str, str], entry: str) -> None:
        self.program, self.chosen, self.entry = program, chosen, entry
        self.sections = {cls.__name__: name for name, cls in SECTIONS.items()}
        self.subclassed = {b.id for c in program.classes.values() for b in c.bases if isinstance(b, ast.Name)}
        self._known: dict[ast.AST, Fact] = {}
        self._asked: set[ast.AST] = set()
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
        if node in self._known or node in self._asked:  # asked for while it is being found: it depends on itself
            return self._known.get(node, UNKNOWN)
        self._asked.add(node)
        fact = self._of(node)
        self._asked.discard(node)
        if not self._asked:
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
        return any(isinstance(n, IMPURE) and self.of(n).exact is None for n in ast.walk(node))

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


class _Round:
    """One pass over the program: what can be decided now, as cuts; what follows from them is for the next."""

    def __init__(self, program: Program, sources: Mapping[str, str], chosen: Mapping[str, str], entry: str) -> None:
        self.program, self.facts = program, _Facts(program, chosen, entry)
        self.lines = {name: [line.encode() for line in source.splitlines()] for name, source in sources.items()}
        self.cuts: dict[str, list[Cut]] = {name: [] for name in sources}
        self.because: set[str] = set()
        self.touched: set[tuple[str, int]] = set()
        """Modules and rows in which something was decided."""

    def run(self) -> None:
        for module, tree in self.program.trees.items():
            _require_followable(module, tree)
            self._visit(tree)
        for function in [node for node in self.program.nodes() if isinstance(node, ast.FunctionDef)]:
            self._leave_out_variables(function)
            self._leave_out_parameter(function)

    def _cut(self, node: ast.AST, *cuts: Cut) -> None:
        module = self.program.places[node].module
        self.cuts[module] += cuts
        self.touched |= {(module, row) for cut in cuts for row in range(cut.begin[0], cut.end[0] + 1)}

    def _is_touched(self, *nodes: ast.AST) -> bool:
        """Whether something on the lines of these was already decided in this round, so that they are for the next."""
        rows = {(self.program.places[n].module, r) for n in nodes for r in range(begin_of(n)[0], end_of(n)[0] + 1)}
        return bool(rows & self.touched)

    def _text(self, node: ast.AST, begin: tuple[int, int], end: tuple[int, int]) -> str:
        lines = self.lines[self.program.places[node].module][begin[0] - 1 : end[0]]
        lines[-1] = lines[-1][: end[1]]
        lines[0] = lines[0][begin[1] :]
        return b"\n".join(lines).decode()

    # ------------------------------------------------------------------------------------------------ branches

    def _visit(self, node: ast.AST) -> None:
        """Decide what can be, from outside to inside: what is inside something decided is for the next round."""
        if self._is_type(node) or isinstance(node, ast.JoinedStr):
            return
        if isinstance(node, ast.expr) and self._decide(node):
            return
        gone: set[ast.AST] = set()
        for field in BODIES:
            body = getattr(node, field, None)
            if isinstance(body, list):
                gone |= self._decide_statements(node, body)
        for child in ast.iter_child_nodes(node):
            if child not in gone and not isinstance(child, ast.expr_context):
                self._visit(child)

    def _is_type(self, node: ast.AST) -> bool:
        parent = self.program.parent(node)
        return node is getattr(parent, "annotation", None) or node is getattr(parent, "returns", None)

    def _decide_statements(self, owner: ast.AST, body: list[ast.stmt]) -> set[ast.AST]:
        """Take out of a block what never runs; the statements that have been dealt with."""
        gone: set[ast.AST] = set()
        removed: list[ast.stmt] = []
        for number, statement in enumerate(body):
            if any(isinstance(earlier, ENDINGS) for earlier in body[:number]):
                removed.append(statement)
            elif isinstance(statement, ast.If):
                fact = self.facts.of(statement.test)
                if fact.truth is None:
                    continue
                gone.add(statement)
                self.because |= fact.because
                if not fact.truth and not statement.orelse:
                    removed.append(statement)
                else:
                    self._splice(owner, statement, truth=fact.truth)
            elif _is_empty_loop(statement) or self._is_overwritten(statement, body[number + 1 :]):
                removed.append(statement)
        is_all = len(removed) == len(body) and not isinstance(owner, ast.Module)
        is_elif = owner is not None and len(body) == 1 and body[0] in removed and self._is_elif(body[0])
        for statement in removed:
            stand_in = "0" if is_all and statement is body[0] and not is_elif else ""
            self._cut(statement, Cut(first_of(statement), end_of(statement), stand_in))
        return gone | set(removed)

    def _is_elif(self, statement: ast.stmt) -> bool:
        parent = self.program.parent(statement)
        if not (isinstance(statement, ast.If) and isinstance(parent, ast.If) and parent.orelse == [statement]):
            return False
        row, column = begin_of(statement)
        return self.lines[self.program.places[statement].module][row - 1][column:].startswith(b"elif")

    def _is_overwritten(self, statement: ast.stmt, following: list[ast.stmt]) -> bool:
        """Whether a variable gets a constant, and another value by the very next statement."""
        match [statement, *following[:1]]:
            case [
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant()),
                ast.Assign(targets=[ast.Name(id=other)], value=value),
            ]:
                return name == other and not any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(value))
        return False

    def _splice(self, owner: ast.AST, statement: ast.If, *, truth: bool) -> None:
        """Put one branch in the place of an `if`."""
        taken, is_elif = statement.body if truth else statement.orelse, self._is_elif(statement)
        if truth and statement.orelse:
            self._cut(statement, Cut(end_of(statement.body[-1]), end_of(statement)))
        if not truth and self._is_elif(taken[0]):
            row, column = begin_of(taken[0])
            if is_elif:  # the next `elif` takes its place
                self._cut(statement, Cut(begin_of(statement), end_of(statement.body[-1])))
            else:
                self._cut(
                    statement,
                    Cut(begin_of(statement), end_of(statement.body[-1])),
                    Cut((row, column), (row, column + 2)),
                )
            return
        if not truth:
            self._cut(statement, Cut(begin_of(statement), end_of(statement.body[-1])))
        colon = self._colon_before(statement, taken[0])
        if is_elif:
            if truth:
                self._cut(statement, Cut(begin_of(statement), colon, "else:"))
            return  # what was its `else` is its parent's
        head = begin_of(statement) if truth else self._else_before(statement, taken[0])
        first = first_of(taken[0])
        if first[0] == colon[0]:
            self._cut(statement, Cut(head, first))
            return
        self._cut(statement, Cut(head, colon))
        self._dedent(statement, taken)

    def _colon_before(self, statement: ast.If, first: ast.stmt) -> tuple[int, int]:
        """The place after the colon of the line or lines that lead to a branch."""
        lines = self.lines[self.program.places[statement].module]
        row, column = first_of(first)
        if lines[row - 1][:column].strip():
            return row, lines[row - 1][:column].rindex(b":") + 1
        row -= 1
        while not lines[row - 1].split(b"#")[0].rstrip().endswith(b":"):
            row -= 1
        return row, len(lines[row - 1])

    def _else_before(self, statement: ast.If, first: ast.stmt) -> tuple[int, int]:
        lines = self.lines[self.program.places[statement].module]
        row = first_of(first)[0]
        while not lines[row - 1].lstrip().startswith(b"else"):
            row -= 1
        return row, lines[row - 1].index(b"else")

    def _dedent(self, statement: ast.If, body: list[ast.stmt]) -> None:
        """Move a branch to the left, to where the `if` stood; not what is inside a string of several lines."""
        lines = self.lines[self.program.places[statement].module]
        column, inner = statement.col_offset, body[0].col_offset
        kept = {
            row
            for s in body
            for n in ast.walk(s)
            if isinstance(n, ast.JoinedStr) or (isinstance(n, ast.Constant) and isinstance(n.value, str | bytes))
            for row in range(n.lineno + 1, (n.end_lineno or 0) + 1)
            if not self._is_pieced(n)
        }
        for row in range(first_of(body[0])[0], (body[-1].end_lineno or 0) + 1):
            if row not in kept and not lines[row - 1][column:inner].strip():
                self._cut(statement, Cut((row, column), (row, min(inner, len(lines[row - 1])))))

    def _is_pieced(self, text: ast.expr) -> bool:
        """Whether a string of several lines is written in pieces, one behind the other."""
        return not re.search("\"{3}|'{3}", self._text(text, begin_of(text), end_of(text)))

    # ------------------------------------------------------------------------------------------------ expressions

    def _decide(self, node: ast.expr) -> bool:
        """Replace an expression by what is known of it, as far as that is shorter."""
        fact = self.facts.of(node)
        if isinstance(node, ast.IfExp):
            test = self.facts.of(node.test)
            if test.truth is not None:
                self.because |= test.because
                self._keep_part(node, node.body if test.truth else node.orelse)
                return True
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            part = self.facts.chosen_part(node.value, node.slice)
            if part is not None:
                self.because |= self.facts.of(node.slice).because
                self._cut(node, Cut(begin_of(node), begin_of(part), "("), Cut(end_of(part), end_of(node), ")"))
                return True
        if isinstance(node, ast.BoolOp) and self._decide_bool_op(node):
            return True
        if isinstance(node, ast.Compare) and self._decide_chain(node):
            return True
        is_value = not isinstance(getattr(node, "ctx", ast.Load()), ast.Store | ast.Del)
        if fact.exact is None or isinstance(node, ast.Constant) or not is_value or self._is_named_here(node):
            return False
        is_short = isinstance(fact.exact[0], bool | None) or isinstance(node, ast.BinOp) or fact.because
        if not is_short or self.facts.may_do_something(node):
            return False
        self.because |= fact.because
        self._cut(node, Cut(begin_of(node), end_of(node), repr(fact.exact[0])))
        return True

    def _is_named_here(self, node: ast.expr) -> bool:
        """Whether a name stands where a value cannot."""
        parent = self.program.parent(node)
        return isinstance(parent, ast.Global | ast.Nonlocal | ast.Delete) or (
            isinstance(parent, ast.Call) and parent.func is node
        )

    def _keep_part(self, whole: ast.expr, part: ast.expr) -> None:
        """Leave one part of an expression, and brackets only where it may need them."""
        begin, end = begin_of(whole), end_of(whole)
        first, last = self._bracketed(part, within=whole)
        if begin[0] != first[0]:  # what is in front spans lines, and the part may need brackets to be found behind it
            self._cut(whole, Cut(begin, first, "("), Cut(last, end, ")"))
            return
        if _is_whole(part) and begin[0] == end[0]:
            begin, end = self._bracketed(whole)
            first, last = begin_of(part), end_of(part)
        self._cut(whole, Cut(begin, first), Cut(last, end))

    def _bracketed(self, node: ast.expr, within: ast.expr | None = None) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where an expression begins and ends, with the brackets that stand around it alone: those of a call do not."""
        begin, end = begin_of(node), end_of(node)
        while True:
            start = begin_of(within) if within else (begin[0], 0)
            stop = end_of(within) if within else (end[0], self._width(node, end[0]))
            before, after = self._text(node, start, begin), self._text(node, end, stop)
            opened, closed = re.search(r"\(\s*$", before), re.match(r"\s*\)", after)
            if not opened or not closed or CALLED.search(before[: opened.start()].rstrip()):
                return begin, end
            begin, end = _forth(start, before[: opened.start()]), _forth(end, closed[0])

    def _width(self, node: ast.AST, row: int) -> int:
        return len(self.lines[self.program.places[node].module][row - 1])

    def _decide_bool_op(self, node: ast.BoolOp) -> bool:
        """Leave out the parts of `and` and `or` that never decide, and what stands behind one that always does."""
        decides = isinstance(node.op, ast.Or)
        values, facts = list(node.values), [self.facts.of(value) for value in node.values]
        for number, fact in enumerate(facts[:-1]):
            if fact.truth is decides:
                self._cut(node, Cut(self._bracketed(values[number], within=node)[1], end_of(node)))
                self.because |= fact.because
                return True
        for number, fact in enumerate(facts):
            is_last = number == len(facts) - 1
            if fact.truth is (not decides) and not self.facts.may_do_something(values[number]):
                is_all_bool = isinstance((fact.exact or (0,))[0], bool) and all(map(_is_bool, values[:-1]))
                if is_last and not self._is_only_tested(node) and not is_all_bool:
                    continue
                self.because |= fact.because
                here = self._bracketed(values[number], within=node)
                if is_last:
                    self._cut(node, Cut(self._bracketed(values[number - 1], within=node)[1], end_of(node)))
                else:
                    self._cut(node, Cut(here[0], self._bracketed(values[number + 1], within=node)[0]))
                return True
            if (
                is_last
                and fact.truth is decides
                and self._is_only_tested(node)
                and not self.facts.may_do_something(node)
            ):
                self.because |= fact.because
                self._cut(node, Cut(begin_of(node), end_of(node), repr(decides)))
                return True
        return False

    def _is_only_tested(self, node: ast.expr) -> bool:
        """Whether only the truth of an expression matters."""
        parent = self.program.parent(node)
        if isinstance(parent, ast.If | ast.While | ast.IfExp | ast.Assert):
            return parent.test is node
        if isinstance(parent, ast.BoolOp):
            return self._is_only_tested(parent)
        return isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not)

    def _decide_chain(self, node: ast.Compare) -> bool:
        """Leave out the first of several comparisons where it holds: `0 <= a <= b`."""
        if len(node.ops) < 2:
            return False
        first = ast.Compare(node.left, node.ops[:1], node.comparators[:1])
        flipped = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
        left, right = self.facts.of(node.left), self.facts.of(node.comparators[0])
        if right.sign is None or left.exact != (0,) or type(node.ops[0]) not in flipped:
            return False
        holds = {ast.LtE: right.sign >= 0, ast.Lt: right.sign > 0}.get(type(node.ops[0]), False)
        if holds:
            self.because |= right.because
            self._cut(node, Cut(begin_of(first.left), begin_of(node.comparators[0])))
        return holds

    # ------------------------------------------------------------------------------------------------ variables

    def _leave_out_variables(self, function: ast.FunctionDef) -> None:
        """Take out what a function assigns to variables of its own that nothing reads."""
        if isinstance(self.program.function_of(function), ast.FunctionDef):
            return
        read = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)}
        for node in ast.walk(function):
            if not isinstance(node, ast.Assign) or len(node.targets) != 1 or self._is_touched(node):
                continue
            if self.program.function_of(node) is not function:
                continue
            target = node.targets[0]
            if self._is_unread(target, function, read) and not self.facts.may_do_something(node.value):
                self._leave_out_statement(node)
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                self._leave_out_pair(node, target, node.value, function, read)

    def _is_unread(self, target: ast.expr, function: ast.FunctionDef, read: set[str]) -> bool:
        if isinstance(target, ast.Attribute):
            return self._is_unread_attribute(target)
        if not isinstance(target, ast.Name) or target.id in read:
            return False
        bindings = self.program.bound_in(function).get(target.id, [])
        return all(b.argument is None and (b.value is not None or b.annotation is not None) for b in bindings)

    def _is_unread_attribute(self, target: ast.Attribute) -> bool:
        """Whether nothing reads an attribute that is set, on an object of a class made of packed ones alone."""
        owner = self.program.type_of(target.value)
        definition = self.program.classes.get(owner) if isinstance(owner, str) else None
        if definition is None or not self.facts.is_closed(definition) or target.attr in self.facts.strings:
            return False
        uses = [m for m in self.facts.mentions[target.attr] if isinstance(m, ast.Attribute)]
        is_declared = self.program.method(definition.name, target.attr) or target.attr.startswith("__")
        return not is_declared and all(isinstance(use.ctx, ast.Store) for use in uses)

    def _leave_out_statement(self, statement: ast.stmt) -> None:
        owner = self.program.parent(statement)
        bodies = [body for field in BODIES if statement in (body := getattr(owner, field, None) or [])]
        self._cut(statement, Cut(begin_of(statement), end_of(statement), "0" if bodies and len(bodies[0]) == 1 else ""))

    def _leave_out_pair(
        self, node: ast.Assign, targets: ast.Tuple, values: ast.Tuple, function: ast.FunctionDef, read: set[str]
    ) -> None:
        """Take one unread variable out of `a, b = x, y`."""
        if len(targets.elts) != len(values.elts) or any(
            isinstance(e, ast.Starred) for e in [*targets.elts, *values.elts]
        ):
            return
        for number, (target, value) in enumerate(zip(targets.elts, values.elts, strict=True)):
            if self._is_unread(target, function, read) and not self.facts.may_do_something(value):
                cuts = [self._item_cut(list(part.elts), number) for part in (targets, values)]
                if all(cuts):
                    self._cut(node, *(cut for cut in cuts if cut))
                return

    def _item_cut(self, items: list[ast.AST], number: int) -> Cut | None:
        """The cut that takes one of several items out, with the comma beside it; None where more stands between them."""
        if len(items) < 2:
            return None
        is_last = number == len(items) - 1
        before, after = (items[number - 1], items[number]) if is_last else (items[number], items[number + 1])
        begin, end = _end_of_item(before), _begin_of_item(after)
        if not re.fullmatch(r"\s*,\s*", re.sub("#.*", "", self._text(before, begin, end))):
            return None
        return Cut(begin, _end_of_item(after)) if is_last else Cut(_begin_of_item(before), end)

    # ------------------------------------------------------------------------------------------------ parameters

    def _leave_out_parameter(self, function: ast.FunctionDef) -> None:
        """Take out a parameter that nothing reads, with what the calls give for it."""
        calls = self.facts.callers(function)
        if not calls or self._is_touched(*_parameters_of(function), *calls):
            return
        is_bound = isinstance(self.program.parent(function), ast.ClassDef)
        a = function.args
        read = {n.id for s in function.body for n in ast.walk(s) if isinstance(n, ast.Name)}
        for argument in [*a.args[is_bound:], *a.kwonlyargs]:
            if argument.arg in read:
                continue
            cuts = [self._parameter_cut(function, argument)]
            cuts += [self._argument_cut(call, function, argument, is_bound=is_bound) for call in calls]
            if all(cut is not None for cut in cuts):
                for node, cut in zip([function, *calls], cuts, strict=True):
                    self._cut(node, *([cut] if cut != NOTHING and cut else []))
                return

    def _parameter_cut(self, function: ast.FunctionDef, argument: ast.arg) -> Cut | None:
        a = function.args
        same: list[ast.arg] = list(a.args if argument in a.args else a.kwonlyargs)
        defaults: dict[ast.arg, ast.expr] = dict(zip(reversed(a.args), reversed(a.defaults), strict=False))
        defaults |= {arg: d for arg, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d is not None}
        items: list[ast.AST] = [_Item(arg, defaults.get(arg)) for arg in same]
        for item in items:
            self.program.places[item] = self.program.places[argument]
        if len(items) > 1:
            return self._item_cut(items, same.index(argument))
        if same is not a.args and argument in a.kwonlyargs and a.args:  # the star before it goes too
            last = _Item(a.args[-1], defaults.get(a.args[-1]))
            between = self._text(argument, _end_of_item(last), begin_of(argument))
            return (
                Cut(_end_of_item(last), _end_of_item(items[0])) if re.fullmatch(r"\s*,\s*\*\s*,\s*", between) else None
            )
        return None

    def _argument_cut(
        self, call: ast.Call, function: ast.FunctionDef, argument: ast.arg, *, is_bound: bool
    ) -> Cut | None:
        """The cut that takes what a call gives for a parameter out; NOTHING where it gives nothing; else None."""
        items: list[ast.AST] = [*call.args, *call.keywords]
        found: ast.AST | None = next((k for k in call.keywords if k.arg == argument.arg), None)
        if found is None and argument in function.args.args:
            number = function.args.args.index(argument) - is_bound
            found = call.args[number] if number < len(call.args) else None
        if found is None:
            return NOTHING
        if self.program.places[call].is_in_text or self.facts.may_do_something(found):
            return None
        items.sort(key=_begin_of_item)
        if len(items) > 1:
            return self._item_cut(items, items.index(found))
        return Cut(_begin_of_item(found), _end_of_item(found))


NOTHING = Cut((0, 0), (0, 0))


class _Item(ast.AST):
    """A parameter with its default."""

    def __init__(self, argument: ast.arg, default: ast.expr | None) -> None:
        super().__init__()
        self.argument, self.default = argument, default


def _begin_of_item(node: ast.AST) -> tuple[int, int]:
    return begin_of(node.argument if isinstance(node, _Item) else node)


def _end_of_item(node: ast.AST) -> tuple[int, int]:
    return end_of((node.default or node.argument) if isinstance(node, _Item) else node)


def _is_bool(node: ast.expr) -> bool:
    """Whether an expression is True or False: arrays compare to arrays, but not with `is`, `in` or a string."""
    if isinstance(node, ast.Compare):
        are_words = any(isinstance(c, ast.Constant) and isinstance(c.value, str) for c in node.comparators)
        return are_words or all(isinstance(op, ast.Is | ast.IsNot | ast.In | ast.NotIn) for op in node.ops)
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _is_empty_loop(statement: ast.stmt) -> bool:
    """Whether a loop is over range(0)."""
    if not isinstance(statement, ast.For) or statement.orelse or not isinstance(statement.iter, ast.Call):
        return False
    call = statement.iter
    is_range = getattr(call.func, "id", "") == "range" and len(call.args) == 1
    return is_range and isinstance(call.args[0], ast.Constant) and call.args[0].value == 0


def _is_whole(node: ast.expr) -> bool:
    """Whether an expression needs no brackets anywhere."""
    return isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Constant | ast.Subscript)


def _forth(place: tuple[int, int], text: str) -> tuple[int, int]:
    """The place at the end of a text that begins at a place."""
    row, column = place
    breaks = text.count("\n")
    return (row + breaks, len(text.rpartition("\n")[2].encode())) if breaks else (row, column + len(text.encode()))


def _require_followable(module: str, tree: ast.Module) -> None:
    """Raise CaddieError where attributes may be set by names that are not written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in UNFOLLOWED:
            raise CaddieError(
                f"{module}, line {node.lineno}: {node.id} sets attributes that cannot be followed",
                hint="set them by their names",
            )


def _parameters_of(function: ast.FunctionDef) -> list[ast.arg]:
    return [*function.args.args, *function.args.kwonlyargs]
