"""A report in the terminal: the verdict and the first deviation on top, then a table for each check.

A report of hundreds of rows says nothing when it scrolls by: beyond `LONG` rows only those that deviate are listed, the
others are counted and the largest difference among them is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from pipeline.compare.rows import ALWAYS, CHECKS
from pipeline.report.report import allowances
from stages.plain_text import WIDTH, harmless, plain_text

if TYPE_CHECKING:
    from pipeline.compare.rows import Row
    from pipeline.report.report import Report

LONG = 60
"""Reports with more rows are shortened unless every row is asked for."""
MOST = 40
"""Of a check that deviates everywhere a shortened report lists so many rows."""

_COLUMNS = (
    ("stage", "left"),
    ("what", "left"),
    ("name", "left"),
    ("shape", "right"),
    ("norm", "right"),
    ("max |diff|", "right"),
    ("relative", "right"),
    ("allowed", "right"),
    ("ULP", "right"),
    ("verdict", "left"),
)


def table(report: Report, every: bool | None = None) -> Table:
    """Verdict, first deviation, one table for each check, what was not checked.

    Args:
        report: What to show.
        every: List every row; None: unless there are more than `LONG`, and of the check "own" those that deviate.
    """
    asked = [row for row in report.rows if row.check != "own"]  # made unasked, and short unless it deviates
    everything = len(asked) <= LONG if every is None else every
    found = Table.grid(padding=0, expand=False)
    for line in _top(report):
        found.add_row(line)
    names = dict.fromkeys([*(check.name for check in report.checks), *(row.check for row in report.rows)])
    for name in names:
        rows = [row for row in report.rows if row.check == name]
        if rows:
            found.add_row("")
            found.add_row(_heading(report, name, rows))
            brief = not everything or (name == "own" and not every)
            shown = [row for row in rows if not row.ok][:MOST] if brief else rows
            if shown:
                found.add_row(_rows(shown))
            for line in _left_out(rows, shown) if not everything or name != "own" else ():
                found.add_row(line)
            for allowed in allowances(rows):
                found.add_row(harmless(f"  allowed {allowed}", style="dim"))
    idle = [check for check in report.checks if not check.ran]
    if idle:
        found.add_row("")
    for check in idle:
        found.add_row(harmless(f"{check.name}: not checked: {check.reason}", style="yellow"))
    return found


def text(report: Report, every: bool | None = None, width: int = WIDTH) -> str:
    """The same without colours, as lines.

    Args:
        report: What to show.
        every: As for `table`.
        width: Characters in a line.
    """
    return plain_text(table(report, every), width=width)


def _top(report: Report) -> Iterable[Text]:
    yield harmless(report.summary(), style="bold green" if report.ok else "bold red")
    yield harmless(f"verified: {report.headline}, {report.seconds:.2f} s")
    yield Text(f"loss {report.loss:.9g}, one tape {report.reference_loss:.9g}")


def _heading(report: Report, name: str, rows: Sequence[Row]) -> Text:
    failed = sum(not row.ok for row in rows)
    verdict = f"{failed} of {len(rows)} DEVIATE" if failed else f"{len(rows)} compared, all agree"
    seconds = next((check.seconds for check in report.checks if check.name == name), 0.0)
    took = f", {seconds:.2f} s" if seconds else ""
    heading = Text(name, style="bold")
    heading.append(f"  {(CHECKS | ALWAYS).get(name, '')}: ", style="none")
    return heading.append(f"{verdict}{took}", style="red" if failed else "green")


def _rows(rows: Sequence[Row]) -> Table:
    """One line a comparison; a stage is named where it changes, and once more in full in a name that deviates."""
    listed = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, show_edge=False)
    for name, justify in _COLUMNS:
        numeric = justify == "right"
        listed.add_column(name, justify=justify, no_wrap=numeric, overflow="fold")  # type: ignore[arg-type]
    before = None
    for row in rows:
        cells = (
            (row.stage or "-") if row.stage != before else "",
            row.kind,
            (row.name.removeprefix(f"{row.stage}/") if row.ok else row.name) + (f" ({row.peer})" if row.peer else ""),
            "x".join(map(str, row.shape)) or "scalar",
            f"{row.norm:.4g}",
            f"{row.difference:.2e}" if row.difference else "0",
            f"{row.relative:.1e}" if row.relative else "0",
            f"{row.tolerance:.1e}" if row.tolerance else "0",
            str(row.ulps) if row.ulps < 1_000_000 else f"{row.ulps:.0e}",
            f"{row.verdict}, {row.where}" if row.where and not row.ok else row.verdict,
        )
        listed.add_row(*map(harmless, cells), style=None if row.ok else "bold red")
        before = row.stage
    return listed


def _left_out(rows: Sequence[Row], shown: Sequence[Row]) -> Iterable[Text]:
    """What a shortened table does not list, in a line or two."""
    failed = sum(not row.ok for row in rows) - sum(not row.ok for row in shown)
    if failed:
        yield Text(f"  and {failed} more that deviate", style="bold red")
    agreeing = [row for row in rows if row.ok]
    if len(agreeing) > sum(row.ok for row in shown):
        kinds = dict.fromkeys(row.kind for row in agreeing)
        counted = ", ".join(f"{sum(row.kind == kind for row in agreeing)} {kind}" for kind in kinds)
        yield harmless(f"  not listed: {counted}: {_largest(agreeing)}", style="dim")


def _largest(rows: Sequence[Row]) -> str:
    worst = max(rows, key=lambda row: row.relative)
    if not worst.relative:
        return "all equal bits"
    return f"largest difference {worst.relative:.1e} of {worst.tolerance:.1e} allowed ({worst.name})"
