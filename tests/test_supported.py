"""What README.md says is supported is tested: every row of its table names tests, and these exist.

A row's last column holds links of the form ``[test_name](tests/file.py)``, nothing else. Whether the tests pass is for
the tests to say; here a row without a test, or with one that was renamed or removed, is a fault.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.sources import ROOT

HEADING = "## What is supported"
TITLES = ["what", "how", "proved by"]
LINK = re.compile(r"\[(test_\w+)\]\((tests/[\w/]+\.py)\)")


class BadRow(Exception):
    """A row of the table that proves nothing."""


def section(markdown: str) -> str:
    """The text below the heading of the table, up to the next heading."""
    return markdown.partition(f"{HEADING}\n")[2].partition("\n## ")[0]


def rows(markdown: str) -> dict[str, tuple[str, ...]]:
    """{what is supported: the tests as "file::function"}.

    Raises:
        BadRow: A row has other columns, names no test, or has something beside tests in the last column.
    """
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section(markdown).splitlines()
        if line.startswith("|")
    ]
    if not cells or cells[0] != TITLES:
        raise BadRow(f"{HEADING}: expected a table with the columns {TITLES}")
    found: dict[str, tuple[str, ...]] = {}
    for row in cells[2:]:
        if len(row) != len(TITLES) or not all(row) or row[0] in found:
            raise BadRow(f"expected {len(TITLES)} filled cells and a name of its own, received {row}")
        links = LINK.findall(row[2])
        if not links or LINK.sub("", row[2]).strip(" ,"):
            raise BadRow(f"{row[0]}: expected links like [test_name](tests/file.py) with commas, received {row[2]!r}")
        found[row[0]] = tuple(f"{path}::{name}" for name, path in links)
    return found


@cache
def functions_of(path: Path) -> frozenset[str]:
    """The test functions of a file, as pytest finds them: those of the module itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def exists(test: str) -> bool:
    """Whether "file::function" is there."""
    path, _, name = test.partition("::")
    return (ROOT / path).is_file() and name in functions_of(ROOT / path)


SUPPORTED = rows((ROOT / "README.md").read_text(encoding="utf-8"))


def test_what_is_supported_has_tests_that_exist() -> None:
    missing = [f"{what!r}: {test}" for what, tests in SUPPORTED.items() for test in tests if not exists(test)]
    assert not missing, "README.md names tests that do not exist:\n" + "\n".join(missing)


# -- this test's own eyes ----------------------------------------------------------------------------------------

TABLE = f"# x\n\n{HEADING}\n\n| what | how | proved by |\n|---|---|---|\n{{}}\n\nWords.\n\n## Next\n\n| a | b | c |\n"


def test_a_row_is_read() -> None:
    row = "| a thing | well | [test_a](tests/test_x.py), [test_b](tests/more/test_y.py) |"
    assert rows(TABLE.format(row)) == {"a thing": ("tests/test_x.py::test_a", "tests/more/test_y.py::test_b")}


@pytest.mark.parametrize(
    "row",
    [
        "| a thing | well | |",
        "| a thing | well |",
        "| a thing | well | of course |",
        "| a thing | well | [test_a](tests/test_x.py) and more |",
        "| a thing | well | [a](tests/test_x.py) |",
        "| a thing | well | [test_a](tests/test_x.py) |\n| a thing | badly | [test_b](tests/test_x.py) |",
    ],
)
def test_a_row_that_names_no_test_is_a_fault(row: str) -> None:
    with pytest.raises(BadRow, match="received"):
        rows(TABLE.format(row))


def test_a_readme_without_the_table_is_a_fault() -> None:
    with pytest.raises(BadRow, match="the columns"):
        rows("# x\n")


def test_a_test_that_is_not_there_is_seen() -> None:
    here = "tests/test_supported.py"
    assert exists(f"{here}::test_a_row_is_read")
    assert not exists(f"{here}::test_a_row_is_red")
    assert not exists(f"{here}::rows_of_nothing")
    assert not exists("tests/test_no_such_file.py::test_a_row_is_read")
