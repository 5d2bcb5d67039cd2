"""Plant one fault in a copy of the sources, and let the tests look for it.

    tree ──► copy ──► one snippet replaced ──► pytest -x ──► the test that found it, or nothing

The copy is thrown away. Tests that mirror the place run first; only what they miss is looked for by all others.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from tests.sources import PACKAGES, ROOT, repository_files

LEVELS = {
    "check": ["-m", "not gate and not soak", "--hypothesis-profile", "check"],
    "gate": ["-m", "not soak", "--hypothesis-profile", "gate"],
}
"""How pytest runs at a level, as in the Makefile."""
SECONDS = 60
"""After which a test that hangs has found the fault: none takes half as long."""
OURS = {*PACKAGES, "tests", "tapeline_pytest"}
"""What a fork of this process imports anew, from its tree."""
_VERDICT = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?\.py(?:::\w+)?)", re.MULTILINE)
_BEGUN = re.compile(r"^(tests/\S+?\.py::\w+)", re.MULTILINE)


class PlantingError(Exception):
    """A fault of the catalogue cannot be planted as it stands there."""


@dataclass(frozen=True)
class Planted:
    """One fault.

    Attributes:
        breaks: What goes wrong, in words; no two are alike.
        path: The source file, as the repository spells it.
        before: Text of it that occurs once.
        after: What stands there instead.
        tests: Names of the test modules that mirror it; they look first.
    """

    breaks: str
    path: str
    before: str
    after: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.breaks} ({self.path})"

    def source(self, root: Path = ROOT) -> str:
        """The file with the fault.

        Raises:
            PlantingError: There is no such file, or its text has the snippet not once, or not another one in its place.
        """
        if not (root / self.path).is_file():
            raise PlantingError(f"{self}: there is no such file")
        right = (root / self.path).read_text()
        if (count := right.count(self.before)) != 1:
            raise PlantingError(f"{self}: expected its snippet once, found it {count} times: {self.before!r}")
        if self.before == self.after:
            raise PlantingError(f"{self}: nothing is changed")
        return right.replace(self.before, self.after)

    def files(self, root: Path = ROOT) -> list[str]:
        """The test files that look first.

        Raises:
            PlantingError: There is no module of a name.
        """
        found = []
        for name in self.tests:
            paths = [path.relative_to(root).as_posix() for path in (root / "tests").rglob(f"{name}.py")]
            if not paths:
                raise PlantingError(f"{self}: there is no {name}.py among the tests")
            found += paths
        return found


@dataclass(frozen=True)
class Found:
    """Which test found a fault at a level; "" where none did."""

    check: str
    gate: str


def look(fault: Planted, everywhere: bool = True) -> Found:
    """Let the tests look for a fault: first those that mirror it, then all of check, then the gate's others.

    Args:
        fault: What is planted.
        everywhere: False: only those that mirror it, which takes less than a minute.
    """
    with copied() as tree:
        (tree / fault.path).write_text(fault.source(tree))
        for level in ("check", "gate"):
            for paths in (fault.files(tree), *([["tests"]] if everywhere else [])):
                test = failing(tree, level, paths)
                if test:
                    return Found(test if level == "check" else "", test)
    return Found("", "")


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the tree, with compiled modules where there are some, so that pytest starts sooner."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        tree = Path(folder).resolve()
        for path in repository_files():
            target = tree / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        for cache in [found for top in (*PACKAGES, "tests") for found in caches(ROOT / top)]:
            shutil.copytree(cache, tree / cache.relative_to(ROOT), dirs_exist_ok=True)
        yield tree


def caches(folder: Path) -> list[Path]:
    """The folders with compiled modules below one."""
    return [path for path in folder.rglob("__pycache__") if path.is_dir()]


def failing(tree: Path, level: str, paths: Sequence[str]) -> str:
    """The first test below ``paths`` that fails in a tree, as "file::function"; "" if all pass.

    pytest runs in a fork of this process, which has TensorFlow imported: that takes longer than most tests do.

    Raises:
        PlantingError: pytest itself did not run.
    """
    arguments = ["-x", "-v", "-p", "no:cacheprovider", "--timeout", str(SECONDS), *LEVELS[level], *paths]
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            _be_pytest(tree, arguments, output.fileno())
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return verdict(os.waitstatus_to_exitcode(status), output.read().decode(errors="replace"))


def _be_pytest(tree: Path, arguments: Sequence[str], output: int) -> NoReturn:
    """Run pytest on a tree in this process, a fork, as if it had just been started there."""
    status = 3
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
        importlib.invalidate_caches()
        status = int(pytest.main(list(arguments)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def verdict(status: int, output: str) -> str:
    """What a run of pytest with ``-x -v`` found.

    Raises:
        PlantingError: It did not run.
    """
    if status in (0, 5):  # all passed; none was chosen
        return ""
    failed = _VERDICT.findall(output)
    if failed:
        return str(failed[-1])
    begun = _BEGUN.findall(output)
    if status in (2, 3, 4) or not begun:
        raise PlantingError(f"pytest ended with status {status}:\n{output[-3000:]}")
    return str(begun[-1])  # it was killed by its time limit, or took the interpreter with it
