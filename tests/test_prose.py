"""The prose of the sources: first lines that say what a thing is, and no mention of names that do not exist.

Each rule is a function from source to faults, tried on sources that break it, then on all sources at once.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.sources import PACKAGES, ROOT, modules, name_of

SOURCES = modules(*PACKAGES)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUESTION = re.compile(r"(?:What|Which|Whether|How|Where|When|Why|Who|Does|The same|The other way)\b")
MENTION = re.compile(r"`((?:pipeline|stages|transport)(?:\.\w+)+)(?:\(\))?`")


def clauses(source: str) -> Iterator[str]:
    """Modules and public classes whose first line begins with a clause in place of a noun."""
    tree = ast.parse(source)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for node in (tree, *classes):
        first = (ast.get_docstring(node) or "").partition("\n")[0]
        if QUESTION.match(first):
            yield f"{getattr(node, 'name', 'module')}: {first}"


@cache
def defined_in(path: Path) -> frozenset[str]:
    """The names that a module or package makes or imports at its top, and those of its classes as ``Class.name``."""
    found: set[str] = set()

    def names(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    names(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.ImportFrom | ast.Import):
                found.update(alias.asname or alias.name for alias in node.names)
            elif isinstance(node, ast.If | ast.Try):
                names([*node.body, *node.orelse], prefix)

    names(ast.parse(path.read_text()).body, "")
    return frozenset(found)


def exists(dotted: str) -> bool:
    """Whether a dotted name leads to a module of ours, or to something in one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:count])
        file = place.with_suffix(".py") if place.with_suffix(".py").exists() else place / "__init__.py"
        if file.exists():
            rest = ".".join(parts[count:])
            return not rest or rest in defined_in(file)
    return False


def lost_mentions(text: str) -> Iterator[str]:
    """Names of ours in backticks that do not exist."""
    for dotted in dict.fromkeys(MENTION.findall(text)):
        if not dotted.endswith(".py") and not exists(dotted):
            yield f"`{dotted}`"


def test_a_clause_in_place_of_a_noun_is_seen() -> None:
    assert len(list(clauses('"""What a worker does."""'))) == 1
    assert len(list(clauses('"""A worker."""\nclass Worker:\n    """How it runs."""'))) == 1
    assert list(clauses('"""The worker."""\nclass Worker:\n    """A process that hosts stages."""')) == []


def test_a_first_line_says_what_a_thing_is() -> None:
    faults = [f"{name_of(path)}, {fault}" for path in SOURCES for fault in clauses(path.read_text())]
    assert not faults, "\n".join(faults)


def test_a_name_that_is_gone_is_seen() -> None:
    assert list(lost_mentions("see `stages.gradient_flow` and `pipeline.plan.plan.Plan.nothing`")) == [
        "`stages.gradient_flow`",
        "`pipeline.plan.plan.Plan.nothing`",
    ]
    assert list(lost_mentions("`pipeline.plan.plan.Plan.validate`, `stages.tape`, `pipeline.Pipeline`")) == []


def test_every_name_of_ours_in_prose_exists() -> None:
    paths = [*SOURCES, *PAGES]
    faults = [f"{name_of(path)}: {fault}" for path in paths for fault in lost_mentions(path.read_text())]
    assert not faults, "\n".join(faults)
