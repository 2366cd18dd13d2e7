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
import re
from collections.abc import Mapping

from orchestrator.cuts import BODIES, Cut, begin_of, cut_out, end_of, first_of, text_between
from orchestrator.errors import CaddieError
from orchestrator.facts import KINDS, Facts
from orchestrator.inference import Program
from orchestrator.syntax import children, walk
from trainer.config import Config, choice_of, knob_value

# Numbers and lists by whose sign, or emptiness, a technique is on or off. Of words and switches every one is a choice;
# of numbers only these, or trials that differ in nothing but a number would be packed apart.
SWITCHES = (
    "model.rope_dims", "model.qk_gain", "model.xsa_layers", "model.value_embedding_dim", "model.value_embedding_layers",
    "model.first_attention_layer", "model.skip_count", "model.bigram_buckets", "model.logit_softcap",
    "model.recurrence_layers", "model.recurrence_passes", "model.parallel_start_layer", "schedule.recurrence_full_frac",
    "schedule.validations",
    "data.order_seed", "optim.muon_momentum_ramp_steps", "optim.grad_clip_norm", "optim.ema_decay", "quant.coarse_matrices",
    "quant.clip_importance", "quant.low_rank_tensors", "evaluation.slot_steps", "ttt.grad_clip_norm",
    "runtime.cpu_threads",
)  # fmt: skip
TABLE, ANY = "FOLDED", ""

ENDINGS = (ast.Return, ast.Raise, ast.Continue, ast.Break)
UNFOLLOWED = {"setattr", "delattr", "vars", "globals", "locals", "eval", "exec"}
CALLED = re.compile(r"[)\]}\"']$|(?<!\w)(?!(return|if|else|and|or|not|in|is|yield|lambda)$)\w+$")
"""The end of what is called where a bracket follows it."""


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


class _Round:
    """One pass over the program: what can be decided now, as cuts; what follows from them is for the next."""

    def __init__(self, program: Program, sources: Mapping[str, str], chosen: Mapping[str, str], entry: str) -> None:
        self.program, self.facts = program, Facts(program, chosen, entry)
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
        return text_between(self.lines[self.program.places[node].module], begin, end)

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
        for child in children(node):
            if child not in gone:
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
                return name == other and not any(isinstance(n, ast.Name) and n.id == name for n in walk(value))
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
            for n in walk(s)
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
        read = {n.id for n in walk(function) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)}
        for node in walk(function):
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
        read = {n.id for s in function.body for n in walk(s) if isinstance(n, ast.Name)}
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
    for node in walk(tree):
        if isinstance(node, ast.Name) and node.id in UNFOLLOWED:
            raise CaddieError(
                f"{module}, line {node.lineno}: {node.id} sets attributes that cannot be followed",
                hint="set them by their names",
            )


def _parameters_of(function: ast.FunctionDef) -> list[ast.arg]:
    return [*function.args.args, *function.args.kwonlyargs]
