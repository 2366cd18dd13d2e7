"""Short names for what a closed set of modules names itself; the program stays the same, as it is renamed throughout.

One word has one short name, wherever it stands, so that lines which are alike stay alike and pack well. Only names are
renamed and the keywords of calls, never what stands after a dot, unless the dot follows a packed module (`protocol.START`).

    variables    of functions, those of functions inside them included, and their parameters
    parameters   that calls name, where all such calls are of functions and classes of ours, called by their names
    the rest     functions, classes and variables of modules, with the imports of them; errors stay: their names are shown

A word stays where something else may look it up, which is said where it is kept.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import keyword
import re
import string
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.cuts import Place, begin_of, end_of, text_between
from orchestrator.errors import CaddieError
from orchestrator.syntax import children, walk

LITERAL = re.compile(
    r"""(?P<prefix>\w*)(?P<quote>'{3}|"{3}|'|")(?P<body>(?:\\.|(?!(?P=quote)).)*)(?P=quote)""", re.DOTALL
)
UNSEEING = {"property", "staticmethod", "classmethod", "contextmanager", "cache", "no_grad", "inference_mode"}
"""Decorators that look at neither the types nor the names of parameters. Others may: torch's operators do."""

TYPES_ONLY = {"jit"}
"""Decorators that look at the types of parameters: Triton's; it hands arguments on by the names that our calls give."""

BUILTINS = set(dir(builtins))
LOOK_UPS = {"globals", "locals", "vars", "eval", "exec", "__import__", "sys.modules"}
LOOK_UPS_AFTER_DOTS = {"import_module", "get_type_hints", "__dict__", "__globals__"}
"""What finds a module's names by strings, called alone or after any dot; `getattr` does so where it is given a module."""

UNREAD = ("AsyncFunctionDef", "Match", "TypeAlias", "TypeVar", "TypeVarTuple", "ParamSpec")
"""Statements that bind names in ways that are not looked for here."""

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)


@dataclass(frozen=True)
class ShortNames:
    """What is to be written instead."""

    places: dict[str, list[tuple[Place, str, str]]]
    """By module: where a word stands, the word, and its short name; less those in import statements."""

    shared: dict[str, str]
    """Short names of what modules define, for the imports from them."""


@dataclass
class _Scope:
    """A function with all that is inside it, or what of a module stands outside functions."""

    module: str
    function: ast.FunctionDef | None
    places: list[tuple[Place, str]]
    """Where names stand, in no order."""

    hidden: set[str] = field(default_factory=set)
    """Names whose every place is not known."""

    bound: set[str] = field(default_factory=set)
    """Words that mean a variable of this function wherever they stand in it."""

    fixed: set[str] = field(default_factory=set)
    """Those of the bound words that stay."""

    avoided: set[str] = field(default_factory=set)
    """Words that no short name here may be: they would be found before it."""


def short_names(trees: Mapping[str, ast.Module], sources: Mapping[str, str], *, entry: str) -> ShortNames:
    """Short names for the modules, by dotted name; the function `entry` keeps its own."""
    calls = _Calls(trees)
    scopes = [s for module, tree in trees.items() for s in _scopes(module, tree, sources[module], calls)]
    defined = {module: _defined(tree) for module, tree in trees.items()}
    after_dots = {module: _module_words(tree, trees, calls.modules) for module, tree in trees.items()}
    shared = set().union(*defined.values()) - _kept_by_modules(trees, entry) - calls.looked_up
    shared -= set().union(*(hidden for _, hidden in after_dots.values()))
    for scope in scopes:
        scope.fixed |= scope.bound & (scope.hidden | BUILTINS | defined[scope.module])
        shared -= scope.hidden | (scope.bound & defined[scope.module])
    keywords = calls.agreed({id(scope.function): scope.fixed for scope in scopes})
    places = {module: keywords[module] for module in trees}
    together: list[tuple[set[str], set[str]]] = []  # words that are seen in one place: those to be renamed, the others
    staying = {module: words - shared for module, words in defined.items()}
    for scope in scopes:
        words = (scope.bound - scope.fixed) | (shared - scope.bound)
        places[scope.module] += [(place, word) for place, word in scope.places if word in words]
        standing = {word for _, word in scope.places} | scope.hidden
        together.append((standing & words, (standing - words) | scope.avoided))
        staying[scope.module] |= standing - words
    for module, words in defined.items():
        places[module] += [(place, word) for place, word in after_dots[module][0] if word in shared]
        together.append((words & shared, staying[module]))
    short = _chosen(Counter(word for found in places.values() for _, word in found), together)
    return ShortNames(
        {module: [(place, word, short[word]) for place, word in found] for module, found in places.items()},
        {word: short[word] for word in shared & short.keys()},
    )


def require_followable(trees: Mapping[str, ast.Module]) -> None:
    """Raise CaddieError for what binds or reaches names in a way that is not looked for here."""
    for module, tree in trees.items():
        for node in walk(tree):
            is_star = isinstance(node, ast.ImportFrom) and any(a.name == "*" or node.level for a in node.names)
            is_whole = isinstance(node, ast.Import) and any(a.name in trees for a in node.names)
            if is_star or is_whole or type(node).__name__ in UNREAD:
                raise CaddieError(
                    f"{module}, line {getattr(node, 'lineno', 0)}: {type(node).__name__} of this kind cannot be packed",
                    hint="import what is needed by its name; write def, class and if",
                )


def _chosen(uses: Counter[str], seen: list[tuple[set[str], set[str]]]) -> dict[str, str]:
    """A short name for each word, the shortest for those used most; no two that stand together share one."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    taken = [set(staying) for _, staying in seen]
    for number, (words, _) in enumerate(seen):
        for word in words:
            groups[word].append(number)
    letters = string.ascii_letters
    names = [*letters, *map("".join, itertools.product(letters, repeat=2))]
    names = [name for name in names if not keyword.iskeyword(name) and name not in BUILTINS]
    short = {}
    for word in sorted(uses, key=lambda word: (-uses[word], word)):
        short[word] = next(name for name in names if not any(name in taken[number] for number in groups[word]))
        for number in groups[word]:
            taken[number].add(short[word])
    return short


def _defined(tree: ast.Module) -> set[str]:
    """Words that a module binds outside its functions and classes, imports among them."""
    found: set[str] = set()
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        else:
            found |= {node.id} if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) else imported(node)
            todo += children(node)
    return found


def imported(node: ast.AST) -> set[str]:
    """Names that a statement binds to what it imports."""
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return set()
    return {alias.asname or alias.name.partition(".")[0] for alias in node.names}


def _kept_by_modules(trees: Mapping[str, ast.Module], entry: str) -> set[str]:
    """Words of modules that stay: others know them, strings may hold them, or they mean something else beside."""
    kept = {entry, *BUILTINS, *_errors(trees)}
    for tree in trees.values():
        for node in walk(tree):
            if isinstance(node, ast.ClassDef):
                kept |= _looked_up_in_class(node)
            elif isinstance(node, ast.Global | ast.Nonlocal):
                kept |= set(node.names)
            elif isinstance(node, ast.Import):
                kept |= imported(node)
            elif isinstance(node, ast.ImportFrom):
                is_ours = node.module in trees and node in tree.body
                kept |= {word for a in node.names if a.asname or not is_ours for word in (a.name, a.asname or a.name)}
        for node in _outside_functions(tree):
            if isinstance(node, COMPREHENSIONS):
                kept |= _bound_in(walk(node))
    return kept


def _errors(trees: Mapping[str, ast.Module]) -> set[str]:
    """Classes of what is raised: their names are shown."""
    classes = [node for tree in trees.values() for node in walk(tree) if isinstance(node, ast.ClassDef)]
    bases = {c.name: {str(getattr(b, "attr", getattr(b, "id", ""))) for b in c.bases} for c in classes}
    found: set[str] = set()
    while more := {
        name for name, of in bases.items()
        if name not in found and (of & found or any(_is_error(base) for base in of))
    }:  # fmt: skip
        found |= more
    return found


def _is_error(name: str) -> bool:
    """Whether a class from outside is one of what is raised."""
    known = getattr(builtins, name, None)
    is_built_in = isinstance(known, type) and issubclass(known, BaseException)
    return is_built_in or name.endswith(("Error", "Exception", "Warning"))


def _looked_up_in_class(definition: ast.ClassDef) -> set[str]:
    """Words that a class both binds and uses in its own body, outside its methods."""
    nodes = [node for statement in definition.body for node in _outside_functions(statement)]
    bound = _bound_in(nodes)
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)} & bound


def _bound_in(nodes: Iterable[ast.AST]) -> set[str]:
    """Words that these nodes bind."""
    found: set[str] = set()
    for node in nodes:
        found |= imported(node)
        if isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler) and node.name:
            found.add(node.name)
    return found


def _outside_functions(root: ast.AST) -> Iterator[ast.AST]:
    """The nodes whose names are looked up outside functions; of a function its decorators, defaults and types are."""
    yield root
    inner: Iterable[ast.AST | None] = children(root)
    if isinstance(root, ast.FunctionDef):
        a = root.args
        types = [parameter.annotation for parameter in parameters(root)]
        inner = [*root.decorator_list, *a.defaults, *a.kw_defaults, *types, root.returns]
    for node in inner:
        if node is not None:
            yield from _outside_functions(node)


def _inside(function: ast.FunctionDef) -> list[ast.AST]:
    """The nodes whose names are looked up in a function."""
    nodes: list[ast.AST] = [*parameters(function)]
    for statement in function.body:
        nodes += walk(statement)
    return nodes


def parameters(function: ast.FunctionDef | ast.Lambda) -> list[ast.arg]:
    found = function.args
    rest = [parameter for parameter in (found.vararg, found.kwarg) if parameter is not None]
    return [*found.posonlyargs, *found.args, *found.kwonlyargs, *rest]


def open_classes(trees: Iterable[ast.Module]) -> set[str]:
    """Names of classes that are made, themselves or by a base of theirs, of a class that is not defined here."""
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    closed = {node.name for node in classes} | {"object", "Exception", "BaseException", "Protocol"}
    while left := [n for n in classes if n.name in closed and any(getattr(b, "id", "") not in closed for b in n.bases)]:
        closed -= {node.name for node in left}
    return {node.name for node in classes} - closed


def is_looked_at(function: ast.FunctionDef, *, unseeing: Collection[str] = UNSEEING) -> bool:
    """Whether a decorator may look at a function's parameters."""
    for decorator in function.decorator_list:
        node = decorator.func if isinstance(decorator, ast.Call) else decorator
        if str(getattr(node, "attr", getattr(node, "id", None))) not in unseeing:
            return True
    return False


def _scopes(module: str, tree: ast.Module, source: str, calls: _Calls) -> Iterator[_Scope]:
    """What of a module stands outside functions, and each function that is not inside another one."""
    lines = source.encode().splitlines()
    outer = list(_outside_functions(tree))
    fields = {id(n) for c in outer if isinstance(c, ast.ClassDef) for s in c.body for n in _outside_functions(s)}
    named = [n for n in outer if id(n) not in fields or (isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))]
    attributes = _bound_in(n for n in outer if id(n) in fields)
    yield _Scope(module, None, *_places_of_names(named, lines), avoided=attributes)
    for function in outer:
        if isinstance(function, ast.FunctionDef):
            yield _function_scope(module, function, lines, calls)


def _function_scope(module: str, function: ast.FunctionDef, lines: Sequence[bytes], calls: _Calls) -> _Scope:
    nodes = _inside(function)
    places, hidden = _places_of_names(nodes, lines)
    scope = _Scope(module, function, places, hidden, _bound_in(nodes))
    if any(isinstance(node, ast.ClassDef | ast.Import | ast.ImportFrom) for node in nodes):  # scopes of another kind
        scope.hidden |= scope.bound | {word for _, word in places}
    scope.fixed |= {word for node in nodes if isinstance(node, ast.Global | ast.Nonlocal) for word in node.names}
    for inner in (function, *nodes):
        if isinstance(inner, ast.FunctionDef | ast.Lambda):
            scope.fixed |= calls.fixed_parameters(inner)
    return scope


def _places_of_names(nodes: list[ast.AST], lines: Sequence[bytes]) -> tuple[list[tuple[Place, str]], set[str]]:
    """Where names stand, and names whose every place is not known.

    Python 3.11 does not know where in an f-string a name is, so these are looked for, and counted to be sure.
    """
    texts = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    inside = {id(inner) for text in texts for inner in walk(text) if inner is not text}
    places: list[tuple[Place, str]] = []
    hidden = {node.arg for node in nodes if isinstance(node, ast.arg) and id(node) in inside}
    for node in nodes:
        if id(node) in inside:
            continue
        if isinstance(node, ast.JoinedStr):
            names = sorted(inner.id for inner in walk(node) if isinstance(inner, ast.Name))
            text = text_between(lines, begin_of(node), end_of(node))
            found = list(_names_in_text(text, begin_of(node)))
            if sorted(word for _, word in found) == names:
                places += found
            else:
                hidden |= set(names)
        elif isinstance(node, ast.Name):
            places.append((begin_of(node), node.id))
        elif isinstance(node, ast.arg):
            places.append((begin_of(node), node.arg))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler) and node.name:
            place = _place_of_definition(node, lines)
            if place:
                places.append((place, node.name))
            else:
                hidden.add(node.name)
    return places, hidden


def _place_of_definition(
    node: ast.FunctionDef | ast.ClassDef | ast.ExceptHandler, lines: Sequence[bytes]
) -> Place | None:
    """Where the name stands that is defined, or None where it is not beside its `def`, `class` or `as`."""
    (row, column), before = begin_of(node), rb"(def|class) +"
    if isinstance(node, ast.ExceptHandler):
        assert node.type, "a handler without a type has no name"
        (row, column), before = (node.type.end_lineno or 0, node.type.end_col_offset or 0), rb" +as +"
    found = re.compile(before + re.escape(str(node.name).encode()) + rb"\b").match(lines[row - 1], column)
    return (row, found.end() - len(str(node.name).encode())) if found else None


def _names_in_text(text: str, begin: Place) -> Iterator[tuple[Place, str]]:
    """Names in the replacement fields of f-strings, `text`, that begin at a place of the source."""
    for literal in LITERAL.finditer(text):
        place, end = literal.span("body")
        while "f" in literal["prefix"].lower() and (place := text.find("{", place, end)) >= 0:
            if text[place + 1] == "{":
                place += 2
                continue
            place += 1
            stops = (n for n in range(place, end) if text[n] in "!:}" and text[n : n + 2] != "!=")
            expression = next((tree for n in stops if (tree := _expression(text[place:n]))), None)
            for node in walk(expression) if expression else ():
                if isinstance(node, ast.Name) and node.lineno == 1:
                    before = text[:place].rpartition("\n")
                    row, column = before[0].count("\n") + len(before[1]), len(before[2].encode()) + node.col_offset - 1
                    yield (begin[0] + row, column + (0 if row else begin[1])), node.id


def _expression(text: str) -> ast.Expression | None:
    try:
        return ast.parse(f"({text})", mode="eval")
    except SyntaxError:
        return None


class _Calls:
    """What calls name: which parameters must keep their names, and where the names of the others stand in calls."""

    def __init__(self, trees: Mapping[str, ast.Module]) -> None:
        self.trees = trees
        self.nodes = {module: walk(tree) for module, tree in trees.items()}
        self.modules = _packed_modules(trees)
        outer = [node for tree in trees.values() for node in _outside_functions(tree)]
        classes = [node for node in outer if isinstance(node, ast.ClassDef)]
        self.methods = {id(s): s for c in classes for s in c.body if isinstance(s, ast.FunctionDef)}
        opened = open_classes(trees.values())
        self.closed = {id(s) for c in classes if c.name not in opened for s in c.body}
        self.targets = self._targets(outer, classes)
        nodes = [node for found in self.nodes.values() for node in found]
        in_texts = {id(n) for text in nodes if isinstance(text, ast.JoinedStr) for n in walk(text)}
        self.looked_up = _looked_up(nodes, self.modules, trees)
        names, self.escaping_methods = _escaping(nodes, self.modules)
        self.escaping = names | self.looked_up
        self.starred: set[int] = set()
        self.named: defaultdict[int, set[str]] = defaultdict(set)
        self.blocked: set[str] = set()
        self.blocked_after_dot: defaultdict[str, set[str]] = defaultdict(set)
        for node in nodes:
            self.blocked |= _keys(node)
            if isinstance(node, ast.Call):
                self._read(node, is_hidden=id(node) in in_texts)
        reached = {id(t): word in self.escaping for word, found in self.targets.items() for t in found}
        reached |= {id(t): True for word, found in self.targets.items() for t in found if word in self.escaping}
        self.direct = {target for target, otherwise in reached.items() if not otherwise}

    def _targets(self, outer: list[ast.AST], classes: list[ast.ClassDef]) -> dict[str, list[ast.FunctionDef | None]]:
        """What a call of a word may call; None among them where nobody knows."""
        targets: defaultdict[str, list[ast.FunctionDef | None]] = defaultdict(list)
        functions = [node for node in outer if isinstance(node, ast.FunctionDef)]
        for function in functions:
            if id(function) not in self.methods:
                targets[function.name].append(function)
        for definition in classes:
            targets[definition.name].append(_constructor(definition, classes))
        unclear = [word for tree in self.trees.values() for word in _unclear(tree, self.trees)]
        for word in set(unclear).union(*(_bound_in(_inside(function)) for function in functions)):
            targets[word].append(None)
        return targets

    def _read(self, call: ast.Call, *, is_hidden: bool) -> None:
        """Note what a call may name."""
        targets, words = self._called(call), {k.arg for k in call.keywords if k.arg is not None}
        if targets is not None and (is_hidden or any(k.arg is None for k in call.keywords)):
            self.starred |= {id(target) for target in targets}
        elif targets is None and isinstance(call.func, ast.Attribute):
            self.blocked_after_dot[call.func.attr] |= words
        if targets is None:
            self.blocked |= words
        for target in targets or ():
            self.named[id(target)] |= words

    def _called(self, call: ast.Call) -> list[ast.FunctionDef] | None:
        """The functions of ours that a call is of, or None where that is not known."""
        word = _word(call.func.value if isinstance(call.func, ast.Subscript) else call.func, self.modules)
        targets = self.targets.get(word)  # the subscript is Triton's: kernel[grid](...)
        return None if targets is None or None in targets else [t for t in targets if t is not None]

    def fixed_parameters(self, function: ast.FunctionDef | ast.Lambda) -> set[str]:
        """Those parameters that must keep their names, by the function alone."""
        words = {parameter.arg for parameter in parameters(function)}
        is_seen = isinstance(function, ast.FunctionDef) and is_looked_at(function, unseeing=UNSEEING | TYPES_ONLY)
        if is_seen or id(function) in self.starred or function.args.kwarg is not None:
            return words  # a decorator looks at them, a mapping may name any, or is taken beside them
        name = getattr(function, "name", "")
        if id(function) in self.direct:
            return words & self.blocked_after_dot[name]
        only_named = {a.arg for a in function.args.kwonlyargs} - self.named[id(function)]  # by whom, is not known
        is_found_by_name = (
            id(function) in self.closed and name not in self.escaping_methods and not name.startswith("__")
        )
        return words & (self.blocked_after_dot[name] if is_found_by_name else self.blocked) | only_named

    def agreed(self, fixed: Mapping[int, set[str]]) -> dict[str, list[tuple[Place, str]]]:
        """Where keywords stand that may be renamed, by module. `fixed` are the words that stay in each function, by its
        id; to them is added what must stay for the sake of a call.
        """
        found = [
            (module, k, k.arg, [fixed[id(target)] for target in targets], [_nameable(target) for target in targets])
            for module, nodes in self.nodes.items()
            for call in nodes
            if isinstance(call, ast.Call) and (targets := self._called(call))
            for k in call.keywords
            if k.arg is not None
        ]
        while odd := [
            (word, sets) for _, _, word, sets, named in found
            if any(word in s or word not in n for s, n in zip(sets, named, strict=True)) and any(word not in s for s in sets)
        ]:  # fmt: skip
            for word, sets in odd:
                for words in sets:
                    words.add(word)
        places: dict[str, list[tuple[Place, str]]] = {module: [] for module in self.trees}
        for module, k, word, sets, _ in found:
            if not any(word in words for words in sets):
                places[module].append((begin_of(k), word))
        return places


def _keys(node: ast.AST) -> set[str]:
    """Strings of a mapping, which may become the names of arguments."""
    keys = node.keys if isinstance(node, ast.Dict) else [node.slice] if isinstance(node, ast.Subscript) else []
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def _word(function: ast.expr, modules: set[str]) -> str:
    """The name by which something is called, after a packed module's or alone; empty where it is called otherwise."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id in modules:
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _escaping(nodes: list[ast.AST], modules: set[str]) -> tuple[set[str], set[str]]:
    """Names, and words after a dot, of functions and classes that may be called otherwise than by them."""
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    called += [function.value for function in called if isinstance(function, ast.Subscript)]
    plain = {id(function) for function in called}
    names, after_dots = set(), set()
    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in plain:
            names.add(_word(node, modules))
            after_dots.add(getattr(node, "attr", ""))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            after_dots.add(node.value)
        elif isinstance(node, ast.ClassDef) and any(
            "classmethod" in ast.unparse(d)
            for s in node.body
            if isinstance(s, ast.FunctionDef)
            for d in s.decorator_list
        ):
            names.add(node.name)  # it makes itself, as `cls`
    return names, after_dots


def _looked_up(nodes: list[ast.AST], modules: set[str], packed: Collection[str]) -> set[str]:
    """Strings that may be names of a packed module; none where nothing looks such names up by strings."""
    of_others = {
        id(call.func.value) for call in nodes
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "get"
        and all(isinstance(a, ast.Constant) and a.value not in packed for a in call.args)
    }  # fmt: skip
    before_dots = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if (
            not isinstance(node, ast.Name | ast.Attribute)
            or not isinstance(node.ctx, ast.Load)
            or id(node) in of_others
        ):
            continue
        is_module = isinstance(node, ast.Name) and node.id in modules and id(node) not in before_dots
        if is_module or _dotted(node) in LOOK_UPS or _dotted(node).rpartition(".")[2] in LOOK_UPS_AFTER_DOTS:
            return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return set()


def _dotted(node: ast.Name | ast.Attribute) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return f"{_dotted(node.value)}.{node.attr}" if isinstance(node.value, ast.Name | ast.Attribute) else f".{node.attr}"


def _packed_modules(trees: Mapping[str, ast.Module]) -> set[str]:
    """Words that mean a packed module wherever they are names."""
    found, other = set(), set()
    for tree in trees.values():
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        ours = {a.name for n in imports for a in n.names if f"{n.module}.{a.name}" in trees and not a.asname}
        found |= ours
        other |= _defined(tree) - ours
        for node in _outside_functions(tree):
            if isinstance(node, ast.FunctionDef):
                other |= _bound_in(_inside(node))
            elif isinstance(node, ast.ClassDef):
                other |= _looked_up_in_class(node)
    return found - other


def _constructor(definition: ast.ClassDef, classes: list[ast.ClassDef]) -> ast.FunctionDef | None:
    """What a call of a class calls, or None where something else has made it."""
    own = [s for s in definition.body if isinstance(s, ast.FunctionDef) and s.name in ("__init__", "__new__")]
    bases = [c for b in definition.bases for c in classes if isinstance(b, ast.Name) and b.id == c.name]
    if definition.decorator_list or definition.keywords or any(s.name == "__new__" for s in own):
        return None
    if own or len(bases) != 1 or len(definition.bases) != 1:
        return own[0] if own else None
    return _constructor(bases[0], classes)


def _unclear(tree: ast.Module, packed: Collection[str]) -> Iterator[str]:
    """Names outside functions that may mean something else than a packed function or class of this name."""
    for node in _outside_functions(tree):
        if isinstance(node, ast.ClassDef):
            yield from _looked_up_in_class(node)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module not in packed):
            yield from imported(node)
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname for alias in node.names if alias.asname)


def _nameable(function: ast.FunctionDef) -> set[str]:
    return {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}


def _module_words(
    tree: ast.Module, packed: Mapping[str, ast.Module], modules: set[str]
) -> tuple[list[tuple[Place, str]], set[str]]:
    """Where names of packed modules stand after a dot, and those whose place is not known."""
    in_texts = {id(n) for text in walk(tree) if isinstance(text, ast.JoinedStr) for n in walk(text)}
    imports = [(node.module, a) for node in walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names]
    unclear = {a.asname or a.name for origin, a in imports if f"{origin}.{a.name}" in packed} - modules
    places, hidden = [], set()
    for node in walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules and id(node) not in in_texts:
                places.append(((node.end_lineno or 0, (node.end_col_offset or 0) - len(node.attr.encode())), node.attr))
            elif node.value.id in modules | unclear:
                hidden.add(node.attr)
    return places, hidden
