"""Smaller sources for the bundle: the same statements on the same lines, without what only a reader needs.

Taken out: comments, documenting strings, annotations that nothing looks at (a field's becomes `0`), definitions that
nothing in the bundle names, imports that are then unused, assertions (as `python -O` does) and the `strict` of a `zip`,
which is one, and white space. Names of our own are shortened (`short_names` and `short_attributes` say which). Statements
stay on the lines on which they begin, so a traceback of the bundle points into the readable source.

Taken on trust, where the caller says so: what a program is given by one that has already checked it.

    checks    functions that only raise: the statements that call them go, and they with them
    records   dataclasses that are read from files which state every field, and the classes made of them in their
              module: the fields go, with `__post_init__` and the defaults, but for those that a call needs; any keyword
              becomes an attribute; methods stay
    shown     classes of which somebody outside knows the names of attributes, as they are written to files: these stay
"""

from __future__ import annotations

import ast
import io
import itertools
import re
import tokenize
from collections.abc import Collection, Iterable, Iterator, Mapping

from orchestrator.cuts import BODIES, UP_TO_ARROW, Cut, begin_of, cut_out, end_of, first_of
from orchestrator.errors import CaddieError
from orchestrator.inference import Program
from orchestrator.short_attributes import short_attributes
from orchestrator.short_names import imported, is_looked_at, open_classes, parameters, require_followable, short_names
from orchestrator.syntax import children, walk

LOOKS_AT_FIELDS = {"dataclasses.fields", "get_type_hints", "__annotations__", "__dataclass_fields__"}
"""What finds the fields of a class it is not said which, whose names it may show."""

RECORD = "def __init__(self,/,**a):self.__dict__.update(a)"


def minify(
    sources: Mapping[str, str],
    *,
    entry: str,
    checks: Collection[str] = (),
    records: Collection[str] = (),
    shown: Collection[str] = (),
) -> dict[str, str]:
    """Smaller sources of a closed set of modules, by dotted name; `entry` is the one function that is called from outside.

    `checks`, `records` and `shown` are dotted names of what is taken on trust. Raises CaddieError where that cannot be done.
    """
    trees = {name: ast.parse(source) for name, source in sources.items()}
    program = Program({name: ast.parse(source) for name, source in sources.items()})  # with the types, which go below
    require_followable(trees)
    cuts = _take_on_trust(trees, checks, records)
    for module, tree in trees.items():
        cuts[module] += _take_out_strictness(tree)
    for _ in range(2):  # what is left out the first time may have been all that looked at types
        for module, tree in trees.items():
            cuts[module] += _take_out_types(tree)
        used = _used_names(trees.values(), entry)
        for module, tree in trees.items():
            cuts[module] += _leave_out(tree, used)
    taken = {pair for tree in trees.values() for pair in _taken(tree, trees)}
    for module, tree in trees.items():
        _leave_out_imports(tree, _words_in(tree) | {word for origin, word in taken if origin == module})
    short = short_names(trees, sources, entry=entry)
    unnamed = {name.rpartition(".")[2] for name in (*records, *shown)}
    attributes = {}
    if not any(_looks_at_fields(node) for tree in trees.values() for node in walk(tree)):
        _require_shown(trees, program, unnamed)
        attributes = short_attributes(program, shown=unnamed, shared=short.shared)
    smaller = {}
    for module, tree in trees.items():
        for node in walk(tree):
            cuts[module] += [*_annotation_cuts(node), *_import_cuts(node, short.shared if _is_of(node, trees) else {})]
        for (row, column), word, name in (*short.places[module], *attributes.get(module, [])):
            cuts[module].append(Cut((row, column), (row, column + len(word.encode())), name))
        smaller[module] = _spaces_out(cut_out(sources[module], cuts[module]))
    return smaller


def _take_on_trust(
    trees: Mapping[str, ast.Module], checks: Collection[str], records: Collection[str]
) -> dict[str, list[Cut]]:
    """Take checks and records' fields out of the trees; returns what that cuts out of each module."""
    cuts: dict[str, list[Cut]] = {module: [] for module in trees}
    trusted = {f"{module}.{s.name}" for module, s in _definitions(trees)} & {*checks, *records}
    if unknown := sorted({*checks, *records} - trusted):
        raise CaddieError(f"{', '.join(unknown)}: nothing in the bundle has this name, it cannot be taken on trust")
    names = {check.rpartition(".")[2] for check in checks}
    for module, tree in trees.items():
        for owner in walk(tree):
            cuts[module] += _check_cuts(owner, names)
    nodes = [node for tree in trees.values() for node in walk(tree)]
    read = {word for node in nodes for word in _looked_up(node)}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    plain: set[str] = set()
    for module, definition in _definitions(trees):
        if isinstance(definition, ast.ClassDef):
            bases = {f"{module}.{base.id}" for base in definition.bases if isinstance(base, ast.Name)}
            is_root = f"{module}.{definition.name}" in records
            if is_root or bases & set(records):
                plain.add(definition.name)
                needed = read & _left_unnamed(definition, calls)
                cuts[module] += _record_cuts(definition, is_root=is_root, needed=needed)
    for tree in trees.values():
        _require_trustable(tree, names, plain)
    return cuts


def _left_unnamed(definition: ast.ClassDef, calls: Iterable[ast.Call]) -> set[str]:
    """Fields of a record that some call with keywords does not name."""
    fields = {ast.unparse(field.target) for field in _fields(definition)}
    named = [
        {keyword.arg for keyword in call.keywords}
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == definition.name
    ]
    return set().union(*(fields - given for given in named if None not in given))


def _looked_up(node: ast.AST) -> Iterator[str]:
    """Words by which a node may read an attribute."""
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def _looks_at_fields(node: ast.AST) -> bool:
    """Whether a node gets at the fields of classes, whichever they are."""
    if isinstance(node, ast.ImportFrom):
        names = {a.name for a in node.names}
        return bool({*names, *(f"{node.module}.{name}" for name in names)} & LOOKS_AT_FIELDS)
    return isinstance(node, ast.Attribute) and bool({node.attr, ast.unparse(node)} & LOOKS_AT_FIELDS)


def _require_shown(trees: Mapping[str, ast.Module], program: Program, shown: Collection[str]) -> None:
    """Raise CaddieError where fields are written by their names that would be others."""
    left = {(module, *begin_of(n)) for module, tree in trees.items() for n in walk(tree) if isinstance(n, ast.Call)}
    for node in program.nodes():
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("asdict", "_asdict"):
            kinds = {program.type_of(argument) for argument in node.args}
            place = (program.places[node].module, *begin_of(node))
            if place in left and not kinds <= set(shown):
                raise CaddieError(
                    f"{place[0]}, line {place[1]}: asdict of what is not known to be of a class that is shown",
                    hint="annotate it, and name its class among those that are shown",
                )


def _definitions(trees: Mapping[str, ast.Module]) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Functions and classes of all modules, each with its module's name."""
    for module, tree in trees.items():
        for statement in tree.body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                yield module, statement


def _check_cuts(owner: ast.AST, names: set[str]) -> Iterator[Cut]:
    """Take the checks, and the statements that only call one, out of a block."""
    for field in BODIES:
        body = getattr(owner, field, None)
        if not isinstance(body, list):
            continue
        gone = [s for s in body if _is_check(s, names) or (isinstance(owner, ast.Module) and _is_named(s, names))]
        stand_in = "0" if len(gone) == len(body) else ""
        for statement in gone:
            yield Cut(first_of(statement), end_of(statement), stand_in)
            body.remove(statement)


def _is_named(statement: ast.stmt, names: set[str]) -> bool:
    return isinstance(statement, ast.FunctionDef) and statement.name in names


def _is_check(statement: ast.stmt, names: set[str]) -> bool:
    """Whether a statement only calls a check, with arguments whose evaluation changes nothing."""
    if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)):
        return False
    call = statement.value
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    return (
        isinstance(call.func, ast.Name)
        and call.func.id in names
        and all(
            isinstance(node, ast.Name | ast.Attribute | ast.Constant | ast.expr_context)
            for a in arguments
            for node in walk(a)
        )
    )


def _record_cuts(definition: ast.ClassDef, *, is_root: bool, needed: set[str]) -> Iterator[Cut]:
    """Leave of a record its methods, and the defaults of the `needed` fields; a root's fields give way to a constructor
    that takes any. Raises CaddieError where a needed field has no plain default.
    """
    for decorator in definition.decorator_list:
        yield Cut((decorator.lineno, decorator.col_offset - 1), end_of(decorator))
    staying = [field for field in _fields(definition) if ast.unparse(field.target) in needed]
    for field in staying:
        if not isinstance(field.value, ast.Constant | ast.Name):
            word = ast.unparse(field.target)
            raise CaddieError(f"{definition.name} is a record taken on trust, and is built without its {word}")
    left_out = [field for field in _fields(definition) if field not in staying]
    gone = [s for s in definition.body if s in left_out or _is_prose(s) or _is_named(s, {"__post_init__"})]
    stand_in = RECORD if is_root else "0" if len(gone) == len(definition.body) else ""
    for statement in gone:
        yield Cut(begin_of(statement), end_of(statement), stand_in if statement is gone[0] else "")
    definition.decorator_list = []
    definition.body = [s for s in definition.body if s not in gone]


def _fields(definition: ast.ClassDef) -> list[ast.AnnAssign]:
    return [statement for statement in definition.body if isinstance(statement, ast.AnnAssign)]


def _require_trustable(tree: ast.Module, checks: set[str], records: set[str]) -> None:
    """Raise CaddieError where the program would miss what was taken out."""
    for node in walk(tree):
        word = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if word in checks:
            raise CaddieError(
                f"line {begin_of(node)[0]}: {word} is taken on trust, but not called as a statement with plain arguments"
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in records and node.args:
            raise CaddieError(
                f"line {node.lineno}: {node.func.id} is a record taken on trust: name what it is built from, or give one **mapping"
            )


def _take_out_strictness(tree: ast.Module) -> Iterator[Cut]:
    """Take out of the tree what `zip` asserts of its arguments' lengths."""
    in_texts = {n for text in walk(tree) if isinstance(text, ast.JoinedStr) for n in walk(text)}
    for node in walk(tree):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "zip" or node in in_texts:
            continue
        if (
            node.args
            and [k.arg for k in node.keywords] == ["strict"]
            and isinstance(node.keywords[0].value, ast.Constant)
        ):
            strict = node.keywords.pop()
            yield Cut(begin_of(strict), end_of(strict))  # the comma before it means nothing then


def _take_out_types(tree: ast.Module) -> Iterator[Cut]:
    """Take the types of parameters and results out of the tree, and write `0` for those of fields, which only say that
    a field is there; unless something looks at them."""
    nodes = walk(tree)
    if not any(isinstance(node, ast.Attribute) and node.attr == "get_type_hints" for node in nodes):
        for node in nodes:
            if isinstance(node, ast.AnnAssign):
                node.annotation = ast.copy_location(ast.Constant(0), node.annotation)
    for node in nodes:
        if not isinstance(node, ast.FunctionDef) or is_looked_at(node):
            continue
        if node.returns is not None:
            yield Cut(begin_of(node.returns), end_of(node.returns), UP_TO_ARROW)  # the arrow before it goes with it
            node.returns = None
        for parameter in parameters(node):
            if parameter.annotation is not None:
                yield Cut((parameter.lineno, parameter.col_offset + len(parameter.arg.encode())), end_of(parameter))
                parameter.annotation = None


def _used_names(trees: Iterable[ast.Module], entry: str) -> set[str]:
    """Every name that the entry can reach; a definition counts as reached as soon as anything reached mentions its name.

    Names are compared as words, without regard to scope or type, so this keeps too much and never too little; a word
    after a dot, which alone can mean a method, is told apart by its dot. Words in strings count as both: attributes are
    also looked up by name. A class made of one from outside is kept whole: what is outside may call any method.
    """
    trees = list(trees)
    opened = open_classes(trees)
    modules = {word for tree in trees for node in walk(tree) for word in imported(node)}
    pending: dict[str, list[set[str]]] = {}
    used: set[str] = set()
    fresh = {entry}
    for tree in trees:
        owners: list[ast.Module | ast.ClassDef] = [tree, *(s for s in tree.body if isinstance(s, ast.ClassDef))]
        for owner in owners:
            in_class = isinstance(owner, ast.ClassDef)
            for statement in owner.body:
                name = _defined_name(statement, in_class=in_class)
                words = _words(statement, modules, skip_methods=not in_class and name not in opened)
                if isinstance(statement, ast.ClassDef) and name in opened:
                    words |= {f".{method.name}" for method in statement.body if isinstance(method, ast.FunctionDef)}
                if in_class:  # where a class is made, its methods have names without a dot
                    words |= {f".{word}" for node in _evaluated(statement) for word in _words(node, modules)}
                if name is None or name.startswith("__"):
                    fresh |= words
                else:
                    pending.setdefault("." * in_class + name, []).append(words)
    while fresh:
        used |= fresh
        fresh = set().union(*(words for name in fresh for words in pending.pop(name, []))) - used
    return used


def _evaluated(statement: ast.stmt) -> list[ast.AST]:
    """What of a statement is evaluated where it stands; of a function its decorators and defaults."""
    if not isinstance(statement, ast.FunctionDef):
        return [statement]
    defaults = [*statement.args.defaults, *statement.args.kw_defaults]
    return [*statement.decorator_list, *(node for node in defaults if node is not None)]


def _taken(tree: ast.Module, packed: Collection[str]) -> Iterator[tuple[str, str]]:
    """What a module imports from the packed ones, or looks up in them: (module, word)."""
    nodes = walk(tree)
    imports = [(str(node.module), a) for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names]
    modules = {a.asname or a.name: f"{origin}.{a.name}" for origin, a in imports if f"{origin}.{a.name}" in packed}
    yield from ((origin, a.name) for origin, a in imports)
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield modules[node.value.id], node.attr


def _words_in(tree: ast.Module) -> set[str]:
    """Names in a module, and `annotations` where it has any."""
    found: set[str] = set()
    for node in walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        if not isinstance(getattr(node, "annotation", None) or getattr(node, "returns", None), ast.Constant | None):
            found.add("annotations")
    return found


def _defined_name(statement: ast.stmt, *, in_class: bool) -> str | None:
    """The one name that a statement defines and does nothing else, or None. Fields of a class are never left out."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return statement.name if statement.name != "_" else None  # made for what its decorator does
    if in_class or not isinstance(statement, ast.Assign | ast.AnnAssign):
        return None
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else None


def _words(statement: ast.AST, modules: set[str], *, skip_methods: bool = False) -> set[str]:
    """Names, attributes and words of strings in a statement; of a class its methods only where they are not skipped.

    `modules` are words that may mean a module, whose attributes are names.
    """
    found: set[str] = set()
    todo: list[ast.AST] = [statement]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(f".{node.attr}")
            if isinstance(node.value, ast.Name) and node.value.id in modules:
                found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found |= {node.value, f".{node.value}"}
        for child in _without_prose(node):
            is_method = (
                node is statement
                and isinstance(node, ast.ClassDef)
                and isinstance(child, ast.FunctionDef)
                and not child.name.startswith("__")
            )
            if not (skip_methods and is_method):
                todo.append(child)
    return found


def _without_prose(node: ast.AST) -> Iterator[ast.AST]:
    """A node's children, less the documenting strings."""
    return (child for child in children(node) if not _is_prose(child))


def _is_prose(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _leave_out(tree: ast.Module, used: set[str]) -> Iterator[Cut]:
    """Take prose, assertions and what nothing reaches out of a module's tree."""
    for owner in walk(tree):
        for field in BODIES:
            body = getattr(owner, field, None)
            if isinstance(body, list):
                in_class = isinstance(owner, ast.ClassDef)
                dropped = [s for s in body if _is_dropped(s, used, in_class=in_class, is_module=owner is tree)]
                for statement in dropped:
                    keeps_body = len(dropped) == len(body) and statement is body[0] and owner is not tree
                    yield Cut(first_of(statement), end_of(statement), "0" if keeps_body else "")
                setattr(owner, field, [s for s in body if s not in dropped])


def _is_dropped(statement: ast.stmt, used: set[str], *, in_class: bool, is_module: bool) -> bool:
    if _is_prose(statement) or isinstance(statement, ast.Assert):
        return True
    if not (in_class or is_module):
        return False
    name = _defined_name(statement, in_class=in_class)
    return name is not None and "." * in_class + name not in used and not name.startswith("__")


def _annotation_cuts(node: ast.AST) -> Iterator[Cut]:
    if isinstance(node, ast.ClassDef):
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.annotation, ast.Constant):
                yield Cut(begin_of(field.annotation), end_of(field.annotation), "0")
    if isinstance(node, ast.FunctionDef | ast.Module):
        for statement in walk(node) if isinstance(node, ast.FunctionDef) else node.body:
            if isinstance(statement, ast.AnnAssign) and (
                statement.value is not None or isinstance(node, ast.FunctionDef)
            ):
                if statement.value is None:
                    yield Cut(begin_of(statement), end_of(statement), "0")
                else:
                    yield Cut(end_of(statement.target), end_of(statement.annotation))


def _leave_out_imports(tree: ast.Module, needed: set[str]) -> None:
    """Leave the imports that bind the words needed; what is left of the others imports nothing."""
    for node in walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [a for a in node.names if (a.asname or a.name.partition(".")[0]) in needed]


def _is_of(node: ast.AST, packed: Collection[str]) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module in packed


def _import_cuts(node: ast.AST, short: Mapping[str, str]) -> Iterator[Cut]:
    """The import as it is left, on one line."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = ",".join(short.get(a.name, a.name) + (f" as {a.asname}" if a.asname else "") for a in node.names)
        start = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
        yield Cut(begin_of(node), end_of(node), start + names if names else "")


def _spaces_out(source: str) -> str:
    """Comments gone, each statement on its first line, one space a level, none between tokens that do not need it."""
    text, row = "", 1
    for level, tokens in _statements(source):
        (first, _), (last, _) = tokens[0].start, tokens[-1].end
        statement = " " * level + _close_together(_without_last_commas(tokens))
        text += "\n" * (first - row) + statement + "\n" * (last + 1 - first - statement.count("\n"))
        row = last + 1
    return text + "\n" * (source.count("\n") + 1 - row)


def _statements(source: str) -> Iterator[tuple[int, list[tokenize.TokenInfo]]]:
    """The tokens of each statement and how deep it stands; what shares a line counts as one statement."""
    level = 0
    found: list[tokenize.TokenInfo] = []
    for token in _tokens(source):
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            level += 1 if token.type == tokenize.INDENT else -1
        elif token.type == tokenize.NEWLINE:
            yield level, found
            found = []
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            found.append(token)


def _tokens(source: str) -> Iterator[tokenize.TokenInfo]:
    """The source's tokens, an f-string as one: Python 3.12 takes them apart, 3.11 does not."""
    lines, depth, start = source.splitlines(keepends=True), 0, (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":
            start = start if depth else token.start
            depth += 1
        if not depth:
            yield token
        if kind == "FSTRING_END":
            depth -= 1
            if not depth:
                (first, begin), (last, end) = start, token.end
                rows = [*lines[first - 1 : last - 1], lines[last - 1][:end]]
                yield tokenize.TokenInfo(tokenize.STRING, "".join(rows)[begin:], start, token.end, token.line)


def _without_last_commas(tokens: list[tokenize.TokenInfo]) -> list[tokenize.TokenInfo]:
    """The tokens less a comma before a closing bracket, where others stand in the brackets: then it means nothing."""
    kept: list[tokenize.TokenInfo] = []
    commas: list[int] = []
    for token in tokens:
        if token.type == tokenize.OP and token.string in ("(", "[", "{"):
            commas.append(0)
        elif token.type == tokenize.OP and token.string in (")", "]", "}"):
            if commas.pop() > 1 and kept[-1].string == ",":
                kept.pop()
        elif commas and token.string == ",":
            commas[-1] += 1
        elif commas and token.string == "lambda":
            commas[-1] -= len(tokens)  # its own commas are others
        kept.append(token)
    return kept


def _close_together(tokens: list[tokenize.TokenInfo]) -> str:
    text = tokens[0].string
    for before, token in itertools.pairwise(tokens):
        text += " " * _needs_space(before, token) + token.string
    return text


def _needs_space(before: tokenize.TokenInfo, after: tokenize.TokenInfo) -> bool:
    if before.type == after.type == tokenize.STRING or (before.type == tokenize.NUMBER and after.type == tokenize.NAME):
        return True
    return bool(re.match(r"\w\w", before.string[-1] + after.string[0]))
