"""The planted faults as a page: which test found each, in `make check` and in `make test`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tests.planted.catalogue import FAULTS
from tests.planted.planting import Found, Planted
from tests.sources import ROOT

PATH = ROOT / "docs" / "planted-faults.md"
MISSED, NOT_RUN, THE_SAME = "**missed**", "**not run**", "the same"
_HEAD = ("what is broken", "where", "found by `make check`", "found by `make test`")
_INTRODUCTION = """\
# Planted faults: the tests can fail

Printed by `make planted` (`python -m tests.planted`), which runs what it prints; do not edit.

A test moves from `make check` to `make test`, or from there to `make soak`, only if no fault gets through by that. So
{count} faults are planted in the sources, one at a time, each in a copy of the tree (`tests/planted`), and the tests
look for it until the first one fails. `make test` must find every one, `make check` nine in ten.

{run} of them have been run: `make check` found {check}, `make test` {gate}. {NOT_RUN} says that a fault was not.
"""
_CELL = re.compile(r"\[(\w+)\]\(\.\./(tests/[\w/]+\.py)\)|`(tests/[\w/]+\.py)`")


def page(found: Mapping[str, Found]) -> str:
    """The page.

    Args:
        found: {what a fault breaks: the tests that found it}; a fault that is missing was not run.
    """
    faults = [fault for room in FAULTS.values() for fault in room]
    parts = [
        _INTRODUCTION.format(
            count=len(faults),
            run=len(found),
            NOT_RUN=NOT_RUN,
            check=sum(bool(one.check) for one in found.values()),
            gate=sum(bool(one.gate) for one in found.values()),
        )
    ]
    for room, planted in FAULTS.items():
        parts += [f"## {room}\n", _line(_HEAD), _line(["---"] * len(_HEAD))]
        parts += [_line((fault.breaks, f"`{fault.path}`", *_cells(fault, found))) for fault in planted]
        parts.append("")
    return "\n".join(parts)


def _cells(fault: Planted, found: Mapping[str, Found]) -> tuple[str, str]:
    if fault.breaks not in found:
        return NOT_RUN, NOT_RUN
    one = found[fault.breaks]
    return link(one.check), THE_SAME if one.check else link(one.gate)


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def link(test: str) -> str:
    """A cell for "file::function", for a file alone (it could not be collected), or for nothing."""
    path, _, name = test.partition("::")
    return f"[{name}](../{path})" if name else f"`{path}`" if path else MISSED


def named(cell: str) -> str:
    """The test that `link` made a cell of; "" for none."""
    match = _CELL.fullmatch(cell)
    if match is None:
        return ""
    return match[3] or f"{match[2]}::{match[1]}"


def read(text: str) -> dict[str, Found]:
    """What a page says: {what a fault breaks: the tests that found it}, faults that were not run left out."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    found = {}
    for cells in rows:
        if len(cells) == len(_HEAD) and cells[0] not in (_HEAD[0], "---") and NOT_RUN not in cells:
            check = named(cells[2])
            found[cells[0]] = Found(check, check if cells[3] == THE_SAME else named(cells[3]))
    return found


def update(found: Mapping[str, Found], path: Path = PATH) -> dict[str, Found]:
    """Put new findings on the page, beside those of faults that did not run again."""
    known = read(path.read_text()) if path.is_file() else {}
    current = {fault.breaks for room in FAULTS.values() for fault in room}
    both = {breaks: one for breaks, one in {**known, **found}.items() if breaks in current}
    path.write_text(page(both))
    return both
