"""Smaller sources for the bundle: the same statements on the same lines, without what only a reader needs.

Taken out: comments, documenting strings, annotations (a field's becomes `0` where nothing looks at it), definitions that
nothing in the bundle names, imports that are then unused, and white space. Lines are never joined or moved, so a
traceback of the bundle points into the readable source.
"""

from __future__ import annotations

import ast
import builtins
import io
import itertools
import keyword
import re
import string
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class _Cut:
    """A stretch of the source, in (row, byte column), to be replaced; its line breaks stay."""

    begin: tuple[int, int]
    end: tuple[int, int]
    replacement: str = ""


def minify(sources: Mapping[str, str], *, entry: str) -> dict[str, str]:
    """Smaller sources of a closed set of modules, by dotted name; `entry` is the one function that is called from outside."""
    trees = {name: _with_bare_fields(ast.parse(source)) for name, source in sources.items()}
    used = _used_names(trees.values(), entry)
    keywords = {str(node.arg) for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    return {
        name: _spaces_out(_cut(source, [*_cuts(trees[name], used), *_rename_cuts(trees[name], keywords)]))
        for name, source in sources.items()
    }


def _with_bare_fields(tree: ast.Module) -> ast.Module:
    """The tree with `0` for the types of fields, which only say that a field is there, unless the module looks at them."""
    nodes = list(ast.walk(tree))
    if not any(isinstance(node, ast.Attribute) and node.attr == "get_type_hints" for node in nodes):
        for node in nodes:
            if isinstance(node, ast.AnnAssign):
                node.annotation = ast.copy_location(ast.Constant(0), node.annotation)
    return tree


def _used_names(trees: Iterable[ast.Module], entry: str) -> set[str]:
    """Every name that the entry can reach; a definition counts as reached as soon as anything reached mentions its name.

    Names are compared as words, without regard to scope or type, so this keeps too much and never too little. Words in
    strings count too: attributes are also looked up by name.
    """
    pending: dict[str, list[ast.stmt]] = {}
    used: set[str] = set()
    fresh = {entry}
    for tree in trees:
        owners: list[ast.Module | ast.ClassDef] = [
            tree,
            *(node for node in tree.body if isinstance(node, ast.ClassDef)),
        ]
        for owner in owners:
            for statement in owner.body:
                name = _defined_name(statement, in_class=owner is not tree)
                if name is None or name.startswith("__"):
                    fresh |= _words(statement, skip_definitions=isinstance(statement, ast.ClassDef))
                else:
                    pending.setdefault(name, []).append(statement)
    while fresh:
        used |= fresh
        reached = [statement for name in fresh for statement in pending.pop(name, [])]
        fresh = set().union(*(_words(statement, skip_definitions=True) for statement in reached)) - used
    return used


def _defined_name(statement: ast.stmt, *, in_class: bool) -> str | None:
    """The one name that a statement defines and does nothing else, or None. Fields of a class are never left out."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return statement.name
    if in_class or not isinstance(statement, ast.Assign | ast.AnnAssign):
        return None
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else None


def _words(statement: ast.AST, *, skip_definitions: bool) -> set[str]:
    """Names, attributes and words of strings in a statement; of a class not its methods, which are reached by name."""
    found: set[str] = set()
    todo: list[ast.AST] = [statement]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
        for child in _without_prose(node):
            is_method = (
                isinstance(node, ast.ClassDef)
                and isinstance(child, ast.FunctionDef)
                and not child.name.startswith("__")
            )
            if not (skip_definitions and is_method):
                todo.append(child)
    return found


def _without_prose(node: ast.AST) -> Iterator[ast.AST]:
    """A node's children, less what the bundle leaves out: annotations of functions and documenting strings."""
    for name, value in ast.iter_fields(node):
        if name == "returns" or (name == "annotation" and isinstance(node, ast.arg)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_prose(child):
                yield child


def _is_prose(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _begin(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset  # type: ignore[attr-defined]  # statements, expressions and arguments have both


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]  # as above


def _cuts(tree: ast.Module, used: set[str]) -> list[_Cut]:
    """What is left out of a module."""
    cuts: list[_Cut] = []
    for owner in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(owner, field, None)
            if isinstance(body, list):
                in_class = isinstance(owner, ast.ClassDef)
                dropped = [s for s in body if _is_dropped(s, used, in_class=in_class, is_module=owner is tree)]
                for statement in dropped:
                    begin = min(
                        [
                            _begin(statement),
                            *((d.lineno, d.col_offset - 1) for d in getattr(statement, "decorator_list", [])),
                        ]
                    )
                    keeps_body = len(dropped) == len(body) and statement is body[0] and owner is not tree
                    cuts.append(_Cut(begin, _end(statement), "0" if keeps_body else ""))
        cuts.extend(_annotation_cuts(owner))
        if isinstance(owner, ast.Import | ast.ImportFrom):
            cuts.extend(_import_cuts(owner, used))
    return cuts


def _rename_cuts(tree: ast.Module, keywords: set[str]) -> Iterator[_Cut]:
    """Short names for variables of functions, and for parameters that no call names."""
    outside = {word for node in tree.body for word in _bound_outside(node)} | set(dir(builtins))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    nested = {id(inner) for f in functions for inner in ast.walk(f) if inner is not f}
    for function in functions:
        if id(function) not in nested:
            yield from _renamed_variables(function, outside | keywords)


def _bound_outside(statement: ast.stmt) -> set[str]:
    """Names that a statement of a module binds there."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}


def _renamed_variables(function: ast.FunctionDef, outside: set[str]) -> Iterator[_Cut]:
    """One function's variables, those of functions inside it included.

    A word that is bound in the function and nowhere outside it means a variable of the function wherever it stands in
    it. Words that something else may look up keep their names: what calls name, what f-strings mention (Python 3.11 does
    not know where in the line), handlers' names, functions and classes inside.
    """
    nodes = list(ast.walk(function))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    parameters = [node for node in nodes if isinstance(node, ast.arg)]
    kept = outside | {a.arg for f in nodes if isinstance(f, ast.FunctionDef | ast.Lambda) for a in f.args.kwonlyargs}
    kept |= {
        inner.id
        for node in nodes
        if isinstance(node, ast.JoinedStr)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name)
    }
    kept |= {str(getattr(node, "name", None)) for node in nodes}
    kept |= {word for node in nodes if isinstance(node, ast.Global | ast.Nonlocal) for word in node.names}
    for node in nodes:
        if isinstance(node, ast.ClassDef | ast.Import | ast.ImportFrom):
            return  # a scope of another kind: leave the function as it is
    stored = [*(a.arg for a in parameters), *(n.id for n in names if isinstance(n.ctx, ast.Store))]
    bound = [word for word in dict.fromkeys(stored) if word not in kept]
    taken = kept | {n.id for n in names}
    free = (
        word
        for word in itertools.chain(
            *(map("".join, itertools.product(string.ascii_lowercase, repeat=k)) for k in (1, 2))
        )
    )
    short = {
        word: next(w for w in free if w not in taken and not keyword.iskeyword(w)) for word in bound if len(word) > 1
    }
    for name in names:
        if name.id in short:
            yield _Cut(_begin(name), _end(name), short[name.id])
    for parameter in parameters:
        (row, column), word = _begin(parameter), parameter.arg
        if word in short:
            yield _Cut((row, column), (row, column + len(word.encode())), short[word])


def _is_dropped(statement: ast.stmt, used: set[str], *, in_class: bool, is_module: bool) -> bool:
    if _is_prose(statement):
        return True
    if not (in_class or is_module):
        return False
    name = _defined_name(statement, in_class=in_class)
    return name is not None and name not in used and not name.startswith("__")


def _annotation_cuts(node: ast.AST) -> Iterator[_Cut]:
    if isinstance(node, ast.arg) and node.annotation is not None:
        yield _Cut((node.lineno, node.col_offset + len(node.arg.encode())), _end(node))
    elif isinstance(node, ast.FunctionDef) and node.returns is not None:
        yield _Cut(_begin(node.returns), _end(node.returns), "\0")  # the arrow before it goes with it
    if isinstance(node, ast.ClassDef):
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.annotation, ast.Constant):
                yield _Cut(_begin(field.annotation), _end(field.annotation), "0")
    if isinstance(node, ast.FunctionDef | ast.Module):
        for statement in ast.walk(node) if isinstance(node, ast.FunctionDef) else node.body:
            if isinstance(statement, ast.AnnAssign) and (
                statement.value is not None or isinstance(node, ast.FunctionDef)
            ):
                if statement.value is None:
                    yield _Cut(_begin(statement), _end(statement), "0")
                else:
                    yield _Cut(_end(statement.target), _end(statement.annotation))


def _import_cuts(node: ast.Import | ast.ImportFrom, used: set[str]) -> Iterator[_Cut]:
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return
    kept = [a for a in node.names if (a.asname or a.name.partition(".")[0]) in used]
    if len(kept) < len(node.names) or _begin(node)[0] != _end(node)[0]:
        names = ",".join(f"{a.name} as {a.asname}" if a.asname else a.name for a in kept)
        start = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
        yield _Cut(_begin(node), _end(node), start + names if kept else "")


def _cut(source: str, cuts: list[_Cut]) -> str:
    """The source with the cuts made; a cut inside another goes with it."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    for cut in sorted(_outermost(cuts), reverse=True):
        (first, begin), (last, end) = cut.begin, cut.end
        head, tail = lines[first - 1][:begin], lines[last - 1][end:]
        replacement = cut.replacement
        if replacement == "\0":
            head, replacement = head[: head.rindex(b"->")], ""
        lines[first - 1 : last] = [head + replacement.encode(), *([b""] * (last - first))]
        if first == last:
            lines[first - 1] += tail
        else:
            lines[first - 1] += b"\n"
            lines[first : last - 1] = [b"\n"] * (last - first - 1)
            lines[last - 1] = tail
    return b"".join(lines).decode()


def _outermost(cuts: list[_Cut]) -> list[_Cut]:
    kept: list[_Cut] = []
    for cut in sorted(set(cuts), key=lambda c: (c.begin, [-n for n in c.end])):
        if not kept or cut.begin >= kept[-1].end:
            kept.append(cut)
    return kept


def _spaces_out(source: str) -> str:
    """Comments gone, one space a level, and none between tokens that do not need it."""
    rows: dict[int, list[tokenize.TokenInfo]] = {}
    indents: dict[int, int] = {}
    level, starts_statement = 0, True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            level += 1 if token.type == tokenize.INDENT else -1
        elif token.type == tokenize.NEWLINE:
            starts_statement = True
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            row = token.start[0]
            if row not in rows:
                indents[row] = level if starts_statement else 0
            rows.setdefault(row, []).append(token)
            starts_statement = False
    lines = source.splitlines()
    return "".join(
        " " * indents.get(n, 0) + _row(lines[n - 1], rows.get(n, [])) + "\n" for n in range(1, len(lines) + 1)
    )


def _row(line: str, tokens: list[tokenize.TokenInfo]) -> str:
    """One line's tokens, close together; a line with an f-string that Python took apart stays as it is, less its comment."""
    if not tokens:
        return ""
    if any(tokenize.tok_name[token.type].startswith("FSTRING") for token in tokens):
        return line[tokens[0].start[1] : tokens[-1].end[1]]
    text = tokens[0].string
    for before, token in itertools.pairwise(tokens):
        text += " " * _needs_space(before, token) + token.string
    return text


def _needs_space(before: tokenize.TokenInfo, after: tokenize.TokenInfo) -> bool:
    if before.type == after.type == tokenize.STRING or (before.type == tokenize.NUMBER and after.type == tokenize.NAME):
        return True
    return bool(re.match(r"\w\w", before.string[-1] + after.string[0]))
