"""Find where sources touch what Keras, TensorFlow and NumPy do not promise: private names, and methods replaced.

Only the adapters may. A private name (``_x``) is judged by where it is defined, which needs no library to be loaded:

1. On ``self``, ``cls`` and ``super()`` it must be one of ours: defined somewhere in the sources.
2. On anything else it must be defined in the same file, or be one of ours that no adapter touches (`foreign`).

`getattr` and its like count as the attribute that they name. Replacing is found by its tools: ``setattr``, ``vars``
and ``__dict__`` of another object, a function assigned to another's attribute, `replaced` with a place of its own.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.sources import imported, modules

ADAPTERS = ("stages/keras_internals.py", "stages/keras_training_internals.py", "stages/tensorflow_internals.py")
# Taking objects apart is nothing but such names; `tests/stages/recipe/test_by_value.py` tries what they rely on.
_COPYING = (
    "attributes",
    "keras_state",
    "keras_kinds",
    "graph_state",
    "optimizer_state",
    "tracked_state",
    "tensorflow_state",
)
ADAPTERS += tuple(f"stages/recipe/{name}.py" for name in _COPYING)
PRIVATE = re.compile(r"(?:keras\.src|tensorflow\.(?:python|core|compiler))(?:[.:]\w+)*")
# Documented names of Python's own that look private.
STANDARD = {"_exit", "_getframe", "_replace", "_asdict", "_fields", "_make"}
NAMING = {"getattr", "hasattr", "setattr", "delattr"}
REPLACING = {"replaced", "replace_while_open"}


def defined_in(tree: ast.Module) -> set[str]:
    """The private names that a file makes: functions, classes, variables, attributes of ``self`` and ``cls``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            found.add(node.attr)
    return {name for name in found if _is_private(name)}


def touched_by(tree: ast.Module) -> set[str]:
    """The private names that an adapter uses on other objects, as attributes or in strings."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return {name for name in found if _is_private(name)} - defined_in(tree) - STANDARD


def names_of_the_house(root: Path) -> tuple[set[str], set[str]]:
    """(private names that our sources define, private names of others that the adapters touch)."""
    ours = [ast.parse(path.read_text()) for path in modules("pipeline", "stages", "transport")]
    theirs = [ast.parse((root / name).read_text()) for name in ADAPTERS]
    return set().union(*map(defined_in, ours)), set().union(*map(touched_by, theirs))


def private_faults(source: str, package: str, ours: Iterable[str], foreign: Iterable[str]) -> Iterator[str]:
    """Private names of others, and replaced methods, in the source of a module of a package."""
    tree = ast.parse(source)
    here, own, others = defined_in(tree), set(ours), set(foreign)
    functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    stored = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value)
    }

    def may(owner: ast.expr, name: str) -> bool:
        if not _is_private(name) or name in STANDARD:
            return True
        return name in own | here if _is_own(owner) else name in here or (name in own and name not in others)

    for line, name in imported(tree, package):
        if PRIVATE.match(name):
            yield f"line {line}: imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and PRIVATE.fullmatch(node.value):
            yield f"line {node.lineno}: names {node.value}"
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if PRIVATE.fullmatch(text) and not PRIVATE.fullmatch(ast.unparse(node.value)):
                yield f"line {node.lineno}: reaches into {text}"
            elif node.attr == "__dict__" and not _is_own(node.value):
                yield f"line {node.lineno}: opens {text}"
            elif not may(node.value, node.attr):
                yield f"line {node.lineno}: touches {text}"
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).removeprefix("object.").strip("_").rpartition(".")[2]
            first, named = node.args[0], node.args[1] if len(node.args) > 1 else None
            if called in NAMING and isinstance(named, ast.Constant) and not may(first, str(named.value)):
                yield f"line {node.lineno}: touches {ast.unparse(first)}.{named.value}"
            elif called in ("setattr", "delattr", "vars") and not _is_own(first):
                yield f"line {node.lineno}: opens {ast.unparse(first)} with {called}"
            elif called in REPLACING and not isinstance(first, ast.Starred | ast.Name):
                yield f"line {node.lineno}: replaces {ast.unparse(first)} by itself"
        elif isinstance(node, ast.Assign) and (
            isinstance(node.value, ast.Lambda) or (isinstance(node.value, ast.Name) and node.value.id in functions)
        ):
            for target in node.targets:
                if isinstance(target, ast.Attribute) and not _is_own(target.value) and target.attr not in stored:
                    yield f"line {node.lineno}: replaces {ast.unparse(target)}"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_own(owner: ast.expr) -> bool:
    if isinstance(owner, ast.Call):
        return isinstance(owner.func, ast.Name) and owner.func.id == "super"
    return isinstance(owner, ast.Name) and owner.id in ("self", "cls")
