"""What a record is known by: a hash of the definitions that its numbers were computed with.

A fingerprint starts at a few functions or classes and follows every name of mcar_lib that they use, so it holds the
training loop, the loading of weights and the reading of photos, and nothing that only prints. What computes nothing is
left out: imports, docstrings, annotations, error and progress messages, and the file that a definition stands in.
"""

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "mcar_lib"
SILENT = (
    "mcar_lib.errors",
    "mcar_lib.files",
    "mcar_lib.progress",
    "mcar_lib.runs.environment",
)  # what they define computes nothing
MESSAGES = ("say", "Progress")  # what calls of these are told computes nothing either

# A fingerprint of today -> those before it whose records came out the same, bit for bit on one machine. Records of
# another fingerprint are not taken for today's. Who changes code without changing numbers names the value before here;
# tests/test_fingerprints.py trains a committed run again to hold that to account.
SAME_NUMBERS: dict[str, tuple[str, ...]] = {
    # arithmetic_fingerprint: runs, evaluations. With the former ones colour jitter rounds single pixels to another
    # level; no record that is kept here has any.
    "86a081bcf4e40df9": (
        *("f6b7f20cf6ab71e2", "a837d1ecbcce332c", "0e754be387261cfb", "0c043c259e1f200a"),
        *("8dee706c12bf52cb", "05748d78c8abe5e9", ""),
    ),
    # regions_fingerprint
    "a64d2c0de09c346d": ("f70b8b1a906cd4a7",),
    # comparison_fingerprint
    "6a62f3d833af0833": ("e3f62aeec6dc2fee",),
    # cheaper_fingerprint, and that of its comparisons
    "45364ab4c1b369bb": ("06b9e75c7e64e24b",),
    "bfbfca0907c61fc9": ("e885264a99a19efa",),
}


def accepted(fingerprint: str) -> tuple[str, ...]:
    """The fingerprint and those before it that gave the same numbers."""
    return fingerprint, *SAME_NUMBERS.get(fingerprint, ())


def fingerprint(*roots: Callable[..., Any]) -> str:
    """16 hex characters for what these functions or classes of mcar_lib, and all that they use of it, compute."""
    return fingerprint_of(tuple((root.__module__, root.__qualname__) for root in roots))


@functools.cache
def fingerprint_of(roots: tuple[tuple[str, str], ...]) -> str:
    """As fingerprint, from (module, name) pairs."""
    texts = sorted({f"{name}: {text}" for name, text in definitions(roots)})
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def definitions(roots: tuple[tuple[str, str], ...]) -> Iterator[tuple[str, str]]:
    """Name and text of each definition that is reached from the roots, (module, name) pairs, by the names in it.

    A name from outside the package stands for where it is imported from. Raises LookupError for a root that is not
    there.
    """
    for place, name in roots:
        if name not in _parsed(place).defined:
            raise LookupError(f"{place} defines no {name}")
    waiting, seen = list(roots), set(roots)
    while waiting:
        place, name = waiting.pop()
        module = _parsed(place)
        for node in module.defined.get(name, ()):
            yield name, _text(node)
            yield from ((used, module.outside[used]) for used in _used(node) if used in module.outside)
        for found in module.resolve(name):
            if found not in seen and found[0] not in SILENT:
                seen.add(found)
                waiting.append(found)


@dataclass(frozen=True)
class _Module:
    """A parsed module: the statements that define each of its names, and where its imported names come from.

    Methods are defined as Class.method too. Statements that define no name are those of "": they count wherever
    anything of the module does.
    """

    name: str
    defined: dict[str, list[ast.stmt]]
    imported: dict[str, tuple[str, str]]  # local name -> (module, name); the name is "" for a whole module
    outside: dict[str, str]  # local name -> what it is elsewhere: all names of other packages, new names of this one's

    def note(self, place: str, alias: ast.alias) -> None:
        """An import from a module, or of one where the place is ""."""
        local = alias.asname or alias.name.partition(".")[0]
        name = alias.name if alias.asname else local
        if place.split(".")[0] != PACKAGE:
            self.outside[local] = f"{place}.{name}"
            return
        self.imported[local] = (f"{place}.{name}", "") if _is_module(place, name) else (place, name)
        if local != name:
            self.outside[local] = name

    def resolve(self, name: str) -> Iterator[tuple[str, str]]:
        """Where the definition of a name, or what it uses, is to be looked up."""
        yield self.name, ""
        if name in self.imported:  # only handed on from here
            yield self.imported[name]
        for node in self.defined.get(name, ()):
            for used in _used(node):
                yield from self._places(used)

    def _places(self, used: str) -> Iterator[tuple[str, str]]:
        first, _, rest = used.partition(".")
        if first in self.defined:
            yield self.name, first
        if first in self.imported:
            place, name = self.imported[first]
            yield (place, name or rest)


def source_of(module: str) -> str:
    """The text of a module of this package."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


@functools.cache
def _parsed(module: str) -> _Module:
    tree = ast.parse(source_of(module))
    parsed = _Module(module, {}, {}, {})
    for node in tree.body:
        for name, part in _defined(node):
            parsed.defined.setdefault(name, []).append(part)
    for found in ast.walk(tree):
        if isinstance(found, ast.Import | ast.ImportFrom):
            for alias in found.names:
                parsed.note((found.module or "") if isinstance(found, ast.ImportFrom) else "", alias)
    return parsed


def _defined(node: ast.stmt) -> Iterator[tuple[str, ast.stmt]]:
    """The names that a statement of a module defines; "" for one that does something else."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name, node
        methods = node.body if isinstance(node, ast.ClassDef) else []
        yield from ((f"{node.name}.{part.name}", part) for part in methods if isinstance(part, ast.FunctionDef))
        return
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    parts = [part for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    names = [part.id for part in parts if isinstance(part.ctx, ast.Store)]
    yield from ((name, node) for name in names or ([] if _is_silent(node) else [""]))


def _is_module(package: str, name: str) -> bool:
    spec = importlib.util.find_spec(package)
    is_package = spec is not None and spec.submodule_search_locations is not None
    return is_package and importlib.util.find_spec(f"{package}.{name}") is not None


def _used(node: ast.AST) -> Iterator[str]:
    """The names that a definition uses, with the attribute behind them; those in annotations are not used."""
    for part in _computing(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            yield f"{part.value.id}.{part.attr}"
        elif isinstance(part, ast.Name):
            yield part.id


def _computing(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for _, value in _fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_silent(child):
                yield from _computing(child)


def _fields(node: ast.AST) -> Iterator[tuple[str, Any]]:
    silent = ("annotation", "returns", *(("args", "keywords") if _is_message(node) else ()))
    return ((name, value) for name, value in ast.iter_fields(node) if name not in silent)


def _is_message(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MESSAGES


def _is_silent(node: ast.AST) -> bool:
    """Whether a statement computes nothing: a message, an error, an import, a docstring, or a branch of only such."""
    if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.Pass):
        return True
    if isinstance(node, ast.Expr):
        return _is_message(node.value) or isinstance(node.value, ast.Constant)
    if not isinstance(node, ast.If) or any(isinstance(part, ast.NamedExpr) for part in ast.walk(node.test)):
        return False
    return all(map(_is_silent, [*node.body, *node.orelse]))


def _text(node: object) -> str:
    """A syntax tree as text that does not depend on the Python version, less what is silent."""
    if isinstance(node, ast.AST):
        if _is_silent(node):
            return ""
        if isinstance(node, ast.AnnAssign) and node.value:
            node = ast.Assign([node.target], node.value)
        fields = ((name, _text(value)) for name, value in _fields(node))
        return f"{type(node).__name__}({','.join(f'{name}={text}' for name, text in fields if text)})"
    if isinstance(node, list):
        return "".join("None" if item is None else _text(item) for item in node)
    return "" if node is None else repr(node)
