"""Norms at the cuts in the terminal: what was flagged on top, then a line for each boundary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from stages.plain_text import harmless, plain_text, printable
from stages.worker.observers import GRADIENT

if TYPE_CHECKING:
    from pipeline.norms.boundary_norms import BoundaryNorms

_COLUMNS = ("from", "to", "tensor", "first", "last", "smallest", "largest", "last, beside", "flagged")


def norms_text(norms: BoundaryNorms) -> str:
    """What was measured, as lines; what is beside what says `pipeline.norms.flags`."""
    lines = [norms_in_a_line(norms)]
    for flag in norms.flags:
        since = f" ({flag.count} of {len(norms.steps)} measured)" if len(norms.steps) > 1 else ""
        lines.append(f"  {printable(flag.sentence)}{since}")
    return "\n".join([*lines, *([plain_text(_table(norms))] if norms.steps else [])])


def norms_in_a_line(norms: BoundaryNorms) -> str:
    """One line."""
    if not norms.steps:
        return f"no norms were measured in {norms.step} steps"
    cuts = len({(boundary.producer, boundary.consumer) for boundary in norms.norms})
    counted = f"{len(norms.steps)} of {norms.step} steps" if norms.step > 1 else "1 step"
    skipped = f", {len(norms.skipped)} skipped by loss scaling" if norms.skipped else ""
    kinds = [flag.kind for flag in norms.flags]
    verdict = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "nothing flagged"
    return f"norms at {cuts} {'cut' if cuts == 1 else 'cuts'} in {counted}{skipped}: {verdict}"


def _table(norms: BoundaryNorms) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, show_edge=False)
    for name in _COLUMNS:
        numeric = name in _COLUMNS[3:8]
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for boundary in norms.boundaries:
        values = norms.norms[boundary]
        flags = dict.fromkeys(flag.kind for flag in norms.flags if flag.boundary == boundary)
        cells = (
            *norms.ends(boundary),
            f"dL/d{boundary.tensor}" if boundary.what == GRADIENT else boundary.tensor,
            *map(_number, (values[0], values[-1], *_range(values), norms.ratio(boundary))),
            ", ".join(flags),
        )
        table.add_row(*map(harmless, cells))
    return table


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest, of those that are finite."""
    finite = [value for value in values if math.isfinite(value)] or [math.nan]
    return min(finite), max(finite)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
