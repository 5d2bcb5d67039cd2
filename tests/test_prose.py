"""The prose of the sources: first lines that say what a thing is, and no mention of names that do not exist.

Each rule is a function from source to faults, tried on sources that break it, then on all sources at once.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.private_names import ADAPTERS
from tests.sources import PACKAGES, ROOT, modules, name_of

SOURCES = modules(*PACKAGES)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUESTION = re.compile(r"(?:What|Which|Whether|How|Where|When|Why|Who|Does|The same|The other way)\b")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
A_PATH, A_NAME = re.compile(r"[\w-]+(?:/[\w.*-]+)+/?"), re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*\))?")
MADE_LATER = {"artifacts/demo/"}
"""Paths that a command of the same page makes."""
OF_OTHERS = {"IdentityN", "PR_SET_PDEATHSIG", "assert", "memfd", "pfor", "ps", "rich", "B2", "F0/1", "F2"}
OF_OTHERS |= {"keras.visualization", "keras.wrappers", "socket.recv_fds", "torch.distributed.pipelining"}
"""Names of operations, of other projects and of actions in drawings, which no source of ours says."""
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


@cache
def words_of_the_code() -> frozenset[str]:
    """Everything that has a name in our sources, tests, examples and benchmarks; and their strings of one word."""
    found: set[str] = set()
    for path in modules(*PACKAGES, "tests", "examples", "benchmarks"):
        found |= {*path.relative_to(ROOT).with_suffix("").parts}
        for node in ast.walk(ast.parse(path.read_text())):
            for name in ("name", "attr", "id", "arg", "value", "module"):
                value = getattr(node, name, None)
                if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value):
                    found |= {value, *value.split(".")}
    return frozenset(found)


def lost_names(text: str) -> Iterator[str]:
    """Names in backticks that nothing in the repository has."""
    for code in dict.fromkeys(CODE.findall(text)):
        name = A_NAME.fullmatch(code)
        if name and code not in OF_OTHERS and not all(part in words_of_the_code() for part in name[1].split(".")):
            yield f"`{code}`"


def lost_paths(text: str, folder: Path) -> Iterator[str]:
    """Files and folders that a page in a folder links or names, and that are not there."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for link in dict.fromkeys(LINK.findall(text)):
        if "://" not in link and not (folder / link).exists():
            yield link
    for code in dict.fromkeys(CODE.findall(text)):
        if A_PATH.fullmatch(code) and code not in MADE_LATER | OF_OTHERS and not list(ROOT.glob(code.rstrip("/"))):
            yield f"`{code}`"


def docstrings(source: str) -> str:
    """All strings that stand for themselves in a source, one after the other."""
    nodes = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


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


def test_a_path_and_a_word_that_are_gone_are_seen() -> None:
    page = "[x](docs/nowhere.md) [y](README.md#there) `stages/nowhere.py` `stages/tape/*.py` `nobody_has_this(x)` `fit`"
    assert [*lost_paths(page, ROOT), *lost_names(page)] == [
        "docs/nowhere.md",
        "`stages/nowhere.py`",
        "`nobody_has_this(x)`",
    ]


def test_every_path_and_name_on_a_page_exists() -> None:
    faults = []
    for page in [*PAGES, ROOT / "benchmarks" / "README.md"]:
        text = page.read_text(encoding="utf-8")
        bare = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        faults += [f"{name_of(page)}: {fault}" for fault in (*lost_paths(text, page.parent), *lost_names(bare))]
    assert not faults, "\n".join(faults)


def test_every_name_in_a_docstring_exists() -> None:
    ours = [path for path in SOURCES if name_of(path) not in ADAPTERS]
    faults = [f"{name_of(path)}: {fault}" for path in ours for fault in lost_names(docstrings(path.read_text()))]
    assert not faults, "\n".join(faults)
