"""A report as a table in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from pipeline.report import Report

_COLUMNS = (
    ("check", "left"),
    ("what", "left"),
    ("name", "left"),
    ("shape", "right"),
    ("norm", "right"),
    ("max |diff|", "right"),
    ("relative", "right"),
    ("ULP", "right"),
    ("allowed", "right"),
    ("verdict", "left"),
)


def table(report: Report) -> Table:
    """One line per comparison, the verdict below."""
    found = Table(title=f"Verification: {report.headline}", title_justify="left")
    for name, justify in _COLUMNS:
        found.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in report.rows:
        found.add_row(
            row.check,
            row.kind,
            f"{row.name} ({row.peer})" if row.peer else row.name,
            "x".join(map(str, row.shape)) or "scalar",
            f"{row.norm:.4g}",
            f"{row.difference:.2e}",
            f"{row.relative:.1e}",
            str(row.ulps),
            f"{row.tolerance:.1e}" if row.tolerance else "0",
            f"{row.verdict} {row.where}".rstrip() if not row.ok else row.verdict,
            style=None if row.ok else "bold red",
        )
    notes = [f"{check.name}: not checked, {check.reason}" for check in report.checks if not check.ran]
    found.caption = "\n".join(
        [
            f"loss {report.loss:.9g}, one tape {report.reference_loss:.9g}",
            f"gradients may differ by {report.tolerance.relative:g} of the largest ({report.tolerance.why})",
            *notes,
            report.summary(),
        ]
    )
    found.caption_justify = "left"
    return found
