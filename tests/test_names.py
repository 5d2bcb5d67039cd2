"""A name means one thing: no two modules define the same public name, and nobody touches another object's private one.

Each rule is a function from source to what it found, tried on sources that break it, then on all sources at once.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping

from tests.private_names import ADAPTERS, STANDARD
from tests.sources import PACKAGES, ROOT, modules, name_of

SOURCES = [path for path in modules(*PACKAGES) if path.name != "__init__.py"]

SHARED = {
    "Array": "an alias of one line, of NumPy's arrays; only the dynamic programme says float64",
    "run": "what each command of `pipeline.commands` does, under the name that the command line asks for",
    "arguments": "what each command of `pipeline.commands` takes, likewise",
    "main": "what a process runs, under the name in its entry ``module:main``",
    "check_origins": "pipeline's loads the one of stages by file, since stages itself may be the hidden package",
    "load": "of a checkpoint, of a Keras file, and of either by the name's ending; transport's is of a lazy name",
    "save": "likewise",
    "load_weights": "of a Keras file, and the method of Pipeline that hands on to it",
    "save_weights": "likewise",
    "explain": "one question: of a function with a tape, and of a pipeline",
}
"""Public names that several modules define, with the reason."""


def public_names(source: str) -> Iterator[str]:
    """The public classes, functions, aliases and constants that a module defines at its top."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


def homonyms(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """{name: the modules that define it} of names that more than one defines."""
    homes: dict[str, list[str]] = defaultdict(list)
    for module, source in sources.items():
        for name in dict.fromkeys(public_names(source)):
            homes[name].append(module)
    return {name: found for name, found in homes.items() if len(found) > 1}


def intrusions(source: str) -> Iterator[str]:
    """Private attributes of objects that a class of this module does not define, and private names imported."""
    tree = ast.parse(source)
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef):
                    own.add(inner.name)
                elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    own.add(inner.target.id)
                elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and _of_self(inner.value):
                    own.add(inner.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not _of_self(node.value):
            if _private(node.attr) and node.attr not in own | STANDARD:
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if _private(alias.name):
                    yield f"line {node.lineno}: imports {alias.name} of {node.module}"


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _of_self(node: ast.expr) -> bool:
    """``self``, ``cls`` or ``super()``."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_a_name_with_two_meanings_is_seen() -> None:
    sources = {"a": "class Part: ...\ndef _f(): ...", "b": "Part = tuple[int, int]\ndef _f(): ...\nclass Other: ..."}
    assert homonyms(sources) == {"Part": ["a", "b"]}


def test_a_public_name_means_one_thing() -> None:
    found = homonyms({name_of(path): path.read_text() for path in SOURCES})
    faults = [f"{name}: {', '.join(homes)}" for name, homes in found.items() if name not in SHARED]
    assert not faults, "rename, or say in SHARED why it is one thing:\n" + "\n".join(faults)
    assert set(SHARED) <= set(found), "no longer defined twice"


INTRUSIVE = ["pipe._trainer.fit()", "from stages.tape.eager import _Record", "class A:\n    def f(self, b): b._g()"]


def test_an_intrusion_is_seen() -> None:
    assert [len(list(intrusions(source))) for source in INTRUSIVE] == [1] * len(INTRUSIVE)
    innocent = "class A:\n    def f(self, b):\n        self._g = b._g\n        return super()._h, b._replace(x=1)"
    assert list(intrusions(innocent)) == []


def test_nobody_touches_the_private_names_of_another_modules_object() -> None:
    sources = [path for path in SOURCES if name_of(path) not in ADAPTERS]
    faults = [f"{name_of(path)}: {fault}" for path in sources for fault in intrusions(path.read_text())]
    assert not faults, "\n".join(faults)
    assert (ROOT / ADAPTERS[0]).exists()
