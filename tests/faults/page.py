"""The matrix as a page: every fault, where it was put in, and how often it was found and named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.faults import copies as in_copies
from tests.faults.cases import CASES, MICROBATCHES, SAMPLES, SCHEDULES
from tests.faults.catalogue import FAULTS
from tests.faults.healthy import Verdict
from tests.faults.live import Live
from tests.faults.matrix import Outcome
from tests.faults.shared import CHECKS, Found
from tests.faults.shared import FAULTS as SHARED
from tests.sources import ROOT

PATH = ROOT / "docs" / "fault-matrix.md"
NONE = "-"
COPIES = """
## In the copies of the user's objects

Workers and reference get copies of the model, the loss and the optimizer. A copy that lost something is another model,
right in itself: one tape and its updates agree, and so do all witnesses. The user's own objects do not; the check `own`
names the stage whose copy it is, and the first thing that differs.
"""
_HEAD = ("fault", "where", "found by", *CASES)
_INTRODUCTION = """\
# The fault matrix: `verify` can fail

Printed by `make fault-matrix` (`python -m tests.faults`), which runs what it prints; do not edit.

A check is worth what it finds. So whatever can go wrong in a hand-off is done on purpose, by a layer that only tests
use (`tests/faults`): each fault at each stage and each cut edge where it makes sense, in three models, under
{schedules}, with {microbatches} microbatches of a batch of {samples}. `pipe.verify` must report each, and its first
deviation must name the stage; for a fault on the way between two stages, both of them and the tensor.

A cell counts the places in a model under both schedules: found and rightly named, of all. {none} is a fault that the
model cannot have.
"""


def page(
    eager: Sequence[Outcome],
    compiled: Sequence[Outcome],
    shared: Sequence[Found],
    copies: Sequence[in_copies.Found],
    healthy: Verdict,
    models: Mapping[str, str],
) -> str:
    """The page.

    Args:
        eager: What became of all faults in eager stages.
        compiled: The same in compiled stages.
        shared: What became of faults in code that the pipeline and its reference share.
        copies: What became of faults in the copies of the user's objects.
        healthy: What was said of healthy pipelines.
        models: {case: its stages and cut edges, in words}.
    """
    parts = [
        _INTRODUCTION.format(
            schedules=" and ".join(SCHEDULES), microbatches=MICROBATCHES, samples=SAMPLES, none=f"`{NONE}`"
        ),
        "## Models\n",
        *(f"- **{name}**: {_sentence(CASES[name].build.__doc__)} {text}" for name, text in models.items()),
        "\n## Eager stages\n",
        _summary(eager),
        _table(eager),
        "\n## Compiled stages\n",
        _summary(compiled),
        _table(compiled),
        "\n## In code that the pipeline and its reference share\n",
        "One tape on the same microbatches has these faults too and agrees; the independent checks find them, and name",
        "a stage with a loss.\n",
        _shared_table(shared),
        COPIES,
        _copies_table(copies),
        "\n## Over processes\n",
        "A bit flipped and a cast to bfloat16 are also made in the frames that worker processes send each other over",
        "`local` and `ipc`, and found (`tests/faults/test_processes.py`).",
        "\n## Nothing wrong\n",
        _health(healthy),
    ]
    return "\n".join(parts) + "\n"


def described(live: Live) -> str:
    """A model's stages and cut edges."""
    names = live.names
    edges = [f"{names[e.producer]} → {names[e.consumer]} ({e.tensor})" for e in live.edges]
    recompute = [name for name, again in zip(names, live.case.recompute, strict=True) if again]
    return f"{len(names)} stages, {', '.join(recompute)} recomputing; cut edges {', '.join(edges)}."


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def _summary(outcomes: Sequence[Outcome]) -> str:
    found, named = sum(one.found for one in outcomes), sum(one.ok for one in outcomes)
    return f"{len(outcomes)} faults put in, {found} reported, {named} with the right stage or edge named.\n"


def _table(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for fault in FAULTS:
        mine = [one for one in outcomes if one.fault is fault]
        checks = dict.fromkeys(one.check for one in mine)
        rows.append((fault.name, fault.how, ", ".join(checks), *(_cell(mine, case) for case in CASES)))
    return _markdown(_HEAD, rows)


def _cell(outcomes: Iterable[Outcome], case: str) -> str:
    mine = [one for one in outcomes if one.case == case]
    return f"{sum(one.ok for one in mine)} of {len(mine)}" if mine else NONE


def _shared_table(found: Sequence[Found]) -> str:
    rows = []
    for fault in SHARED:
        for check in CHECKS:
            cells = []
            for case in CASES:
                mine = [one for one in found if (one.fault, one.check, one.case) == (fault, check, case)]
                cells.append(f"{sum(one.ok for one in mine)} of {len(mine)}" if mine else NONE)
            rows.append((fault.name, fault.how, check, *cells))
    return _markdown(_HEAD, rows)


def _copies_table(found: Sequence[in_copies.Found]) -> str:
    rows = []
    for fault in in_copies.FAULTS:
        cells = []
        for case in CASES:
            mine = [one for one in found if (one.fault, one.case) == (fault, case)]
            cells.append(f"{sum(one.ok for one in mine)} of {len(mine)}" if mine else NONE)
        rows.append((fault.name, fault.how, "own", *cells))
    return _markdown(_HEAD, rows)


def _health(verdict: Verdict) -> str:
    checks = ", ".join(f"{name} {count}" for name, count in sorted(verdict.checks.items()))
    return (
        f"{verdict.count} healthy random configurations, {verdict.compiled} of them compiled (models, cuts, "
        "microbatches, windows, schedules,\nrecomputation, optimizers, clipping, dtype policies, sample weights, steps "
        f"before): {len(verdict.alarms)} false alarms.\nChecks made: {checks}."
    )


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(text: str) -> list[list[tuple[str, ...]]]:
    """The rows of every table of a page, without their heads."""
    found: list[list[tuple[str, ...]]] = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        lines = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in block.strip().splitlines()]
        found.append(lines[2:])
    return found


def write(text: str, path: Path = PATH) -> None:
    """Put the page where it belongs."""
    path.write_text(text)
