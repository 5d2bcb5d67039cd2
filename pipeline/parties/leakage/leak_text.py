"""Measured leaks in the terminal: the worst of labels and of inputs on top, then each at its first and last epoch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pipeline.parties.leakage.leak import Leak
from stages.plain_text import harmless, plain_text, printable
from stages.worker.observers import GRADIENT

if TYPE_CHECKING:
    from pipeline.parties.leakage.leak_meter import LeakMeter

_COLUMNS = ("about", "from", "to", "read off", "measure", "first", "last", "nothing", "everything", "what it is")


def leak_text(meter: LeakMeter) -> str:
    """What was measured, as lines."""
    lines = [leaks_in_a_line(meter), *(f"  not measured: {printable(said)}" for said in meter.left_out)]
    return "\n".join([*lines, *([plain_text(_table(meter), width=170)] if meter.leaks else [])])


def leaks_in_a_line(meter: LeakMeter) -> str:
    """The worst of each kind."""
    if not meter.leaks:
        return f"no leaks were measured in {meter.step} steps"
    said = []
    for about in meter.about:
        known = [leak for leak in meter.leaks if leak.measure.about == about and leak.nothing is not None]
        if known:
            leak = meter.worst(about)
            said.append(
                f"{about} leak most through {tensor_name(leak)} to {leak.crossing.receiver!r}: {leak.measure.name} "
                f"{shown(leak.value)} ({shown(leak.nothing)} nothing, {shown(leak.measure.everything)} "
                f"everything) in epoch {leak.epoch}"
            )
    return "; ".join(map(printable, said))


def tensor_name(leak: Leak) -> str:
    """The tensor that crossed, its gradient as dL/d of it."""
    return f"dL/d{leak.crossing.tensor}" if leak.crossing.what == GRADIENT else leak.crossing.tensor


def shown(value: float | None) -> str:
    """Short."""
    return "" if value is None else "-" if math.isnan(value) else f"{value:.3f}" if math.isfinite(value) else "inf"


def _table(meter: LeakMeter) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, show_edge=False)
    for name in _COLUMNS:
        numeric = name in _COLUMNS[5:9]
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for series in series_of(meter):
        first, last = series[0], series[-1]
        cells = (
            f"{first.measure.about} ({first.target})" if first.target != first.measure.about else first.measure.about,
            first.crossing.sender,
            first.crossing.receiver,
            tensor_name(first),
            first.measure.name,
            *map(shown, (first.value, last.value, last.nothing, first.measure.everything)),
            first.measure.told,
        )
        table.add_row(*map(harmless, cells))
    return table


def series_of(meter: LeakMeter) -> list[list[Leak]]:
    """The leaks of one measure at one cut, over the epochs."""
    found: dict[tuple[object, ...], list[Leak]] = {}
    for leak in meter.leaks:
        found.setdefault((leak.measure.about, leak.crossing, leak.target, leak.measure.name), []).append(leak)
    return list(found.values())
