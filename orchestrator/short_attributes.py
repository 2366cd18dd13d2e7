"""Short names for attributes and methods of the packed classes, one for a word wherever it stands.

A word is renamed where every use of it, in the whole program, is on an object that is known to be of a packed class, and
where nothing else may know it: no string is equal to it, and no class that has it is made of one from outside, read from
a file or written to one. Everything else keeps its name.
"""

from __future__ import annotations

import ast
import itertools
import keyword
import string
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping

from orchestrator.cuts import Place, begin_of, end_of
from orchestrator.inference import Program
from orchestrator.syntax import walk

PLAIN_BASES = {"object", "Protocol", "NamedTuple"}
"""Bases from outside that call nothing of the classes made of them by its name."""


def short_attributes(
    program: Program, *, shown: Collection[str], shared: Mapping[str, str]
) -> dict[str, list[tuple[Place, str, str]]]:
    """By module: where a word stands, the word, and its short name.

    `shown` are names of classes whose attributes are known by name outside the program. `shared` are the short names that
    modules' own words get: what a class body looks up must not be hidden by what it defines.
    """
    closed = {name for name in program.classes if _is_closed(name, program, shown)}
    places = _places(program, closed)
    hidden = _hidden(program, closed)
    words = {word: found for word, found in places.items() if word not in hidden and not word.startswith("__")}
    short = _chosen(program, {word: len(found) for word, found in words.items()}, shared)
    by_module: defaultdict[str, list[tuple[Place, str, str]]] = defaultdict(list)
    for word, found in words.items():
        for module, place in found:
            by_module[module].append((place, word, short[word]))
    return by_module


def _is_closed(name: str, program: Program, shown: Collection[str]) -> bool:
    """Whether a class is made of packed ones alone, none of them shown."""
    lineage = list(program.lineage(name))
    bases = [getattr(base, "id", "") for definition in lineage for base in definition.bases]
    is_ours = all(base in program.classes or base in PLAIN_BASES for base in bases)
    return is_ours and not {definition.name for definition in lineage} & set(shown)


def _places(program: Program, closed: Collection[str]) -> dict[str, list[tuple[str, Place]]]:
    """Where words are defined by closed classes or used on objects of them: (module, place)."""
    found: defaultdict[str, list[tuple[str, Place]]] = defaultdict(list)
    for name in closed:
        definition = program.classes[name]
        for statement in definition.body:
            defined = _defined(statement)
            if defined is not None:
                found[defined[0]].append((program.places[definition].module, defined[1]))
    for node in program.nodes():
        if isinstance(node, ast.Attribute) and program.type_of(node.value) in closed:
            row, column = end_of(node)
            found[node.attr].append((program.places[node].module, (row, column - len(node.attr.encode()))))
        elif isinstance(node, ast.keyword) and node.arg is not None and _builds(node, program) in closed:
            found[node.arg].append((program.places[node].module, begin_of(node)))
    own = {word for name in closed for word in _words_of(name, program)}
    return {word: places for word, places in found.items() if word in own}


def _defined(statement: ast.stmt) -> tuple[str, Place] | None:
    """The attribute that a statement of a class defines, and where its name stands."""
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return statement.target.id, begin_of(statement.target)
    if isinstance(statement, ast.FunctionDef):
        row, column = begin_of(statement)
        return statement.name, (row, column + len("def "))
    return None


def _words_of(name: str, program: Program) -> Iterator[str]:
    """The attributes that a class defines, in its body or on itself."""
    for statement in program.classes[name].body:
        defined = _defined(statement)
        if defined is not None:
            yield defined[0]
    for word, stores in program.stores.items():
        if any(program.type_of(store.value) == name for store in stores):
            yield word


def _builds(keyword_: ast.keyword, program: Program) -> str | None:
    """The dataclass or named tuple for whose field a keyword is."""
    call = program.parent(keyword_)
    called = program.called(call.func) if isinstance(call, ast.Call) else None
    if isinstance(called, ast.ClassDef) and not any(getattr(s, "name", "") == "__init__" for s in called.body):
        return called.name
    return None


def _hidden(program: Program, closed: Collection[str]) -> set[str]:
    """Words that something else may know, or whose every place is not known."""
    found: set[str] = set()
    for node in program.nodes():
        match node:
            case ast.Constant(value=str(text)):
                found.add(text)
            case ast.Attribute(value=value, attr=word):
                if program.places[node].is_in_text or program.type_of(value) not in closed:
                    found.add(word)
            case ast.Call(func=ast.Name(id="replace"), keywords=keywords):
                found |= {str(k.arg) for k in keywords}
            case ast.Call(keywords=keywords) if any(k.arg is None for k in keywords):
                called = program.called(node.func)
                if isinstance(called, ast.ClassDef):
                    found |= set(_words_of(called.name, program))
            case ast.keyword(arg=str(word)) if program.places[node].is_in_text and _builds(node, program) in closed:
                found.add(word)
            case ast.ClassDef(name=name) if name not in closed or program.classes.get(name) is not node:
                found |= {d[0] for s in node.body if (d := _defined(s))}
                found |= set(_words_of(name, program)) if name in program.classes else set()
    for definition in program.classes.values():
        found |= {n.id for s in definition.body for n in _outside_functions(s)}  # looked up where the class is made
    return found


def _outside_functions(statement: ast.stmt) -> Iterator[ast.Name]:
    """Names that a statement of a class looks up where it stands; of a function its decorators, defaults and types do."""
    roots: list[ast.AST | None] = [statement]
    if isinstance(statement, ast.FunctionDef):
        roots = [*statement.decorator_list, statement.args, statement.returns]
    for root in roots:
        for node in walk(root) if root is not None else ():
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                yield node


def _chosen(program: Program, uses: Mapping[str, int], shared: Mapping[str, str]) -> dict[str, str]:
    """A short name for each word, the shortest for those used most; none is a word that stays."""
    taken = {node.attr for node in program.nodes() if isinstance(node, ast.Attribute) and node.attr not in uses}
    avoided: defaultdict[str, set[str]] = defaultdict(set)
    for definition in program.classes.values():
        looked_up = {shared.get(n.id, n.id) for s in definition.body for n in _outside_functions(s)}
        for statement in definition.body:
            defined = _defined(statement)
            if defined is not None:
                avoided[defined[0]] |= looked_up
    letters = string.ascii_letters
    names = [*letters, *map("".join, itertools.product(letters, repeat=2))]
    names = [name for name in names if not keyword.iskeyword(name)]
    short: dict[str, str] = {}
    for word, _ in sorted(Counter(uses).items(), key=lambda item: (-item[1], item[0])):
        short[word] = next(name for name in names if name not in taken | avoided[word])
        taken.add(short[word])
    return short
