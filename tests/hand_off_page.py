"""Runs docs/is-my-hand-off-right.md and writes what it prints into it: python -m tests.hand_off_page."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.commands.cli import main
from tests.sources import ROOT

PAGE = ROOT / "docs" / "is-my-hand-off-right.md"
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")


def ran(page: str) -> Iterator[tuple[re.Match[str], str]]:
    """Every block that shows output, with what it should show, in the order of the page; run in the current folder.

    A Python block is run, or written to the file that its first line names. A block of text is the output of the
    Python above it; in a console block the lines after a command are its output.
    """
    names: dict[str, Any] = {}
    printed = ""
    for block in BLOCK.finditer(page):
        language, text = block["language"], block["text"]
        if language == "text":
            yield block, printed
            printed = ""
            continue
        assert printed == "", f"the page does not show this output:\n{printed}"
        with contextlib.redirect_stdout(io.StringIO()) as out:
            if language == "console":
                for line in text.splitlines():
                    if line.startswith("$ tapeline "):
                        print(line)
                        assert main(line.split()[2:]) == 0, line
            elif file := FILE.match(text):
                Path(file[1]).write_text(text)
            else:
                exec(compile(text, str(PAGE.name), "exec"), names)
        printed = out.getvalue()
        if language == "console":
            yield block, printed
            printed = ""
    assert printed == "", f"the page does not show this output:\n{printed}"


@contextlib.contextmanager
def folder(path: Path) -> Iterator[None]:
    """Work in a folder, whose modules can be imported, and leave no trace of them."""
    with contextlib.chdir(path):
        sys.path.insert(0, str(Path.cwd()))
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(str(Path.cwd()))
            sys.modules.pop("my_model", None)


def written() -> str:
    """The page with what its code prints now."""
    page, parts, end = PAGE.read_text(), [], 0
    with tempfile.TemporaryDirectory() as path, folder(Path(path)):
        for block, printed in ran(page):
            parts += [page[end : block.start("text")], printed]
            end = block.end("text")
    return "".join([*parts, page[end:]])


if __name__ == "__main__":
    PAGE.write_text(written())
