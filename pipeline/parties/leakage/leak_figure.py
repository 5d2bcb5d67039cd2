"""Leaks over the epochs as a picture: labels above, inputs below, a line for each measure at each cut.

    everything ┤ ───────── cosine, top → bottom
               │   ─────── logistic, bottom → top
    nothing    ┤ ────
               └──────────
                 epochs

Only measures that go from nothing to everything are drawn, on that scale, so that they can be laid beside each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.parties.leakage.leak import Leak, read_of_all
from pipeline.parties.leakage.leak_text import leaks_in_a_line, series_of, tensor_name
from pipeline.report.timeline_figure import DPI, FAINT, INK, write_undated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pipeline.parties.leakage.leak_meter import LeakMeter

_WIDTH, _HEAD, _PANEL, _GAP, _FOOT, _LEFT, _RIGHT = 11.0, 1.0, 2.8, 0.5, 0.55, 0.95, 3.4  # inches
_LONGEST = 46
_SAID = 118


def save_leaks(meter: LeakMeter, path: Path) -> Path:
    """Draw and save; missing folders are made. Equal leaks give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_undated(leak_figure(meter), path)


def leak_figure(meter: LeakMeter) -> Figure:
    """The figure; see the module."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn_series = [series for series in series_of(meter) if series[0].measure.nothing is not None]
    panels = [about for about in meter.about if any(series[0].measure.about == about for series in drawn_series)]
    height = _HEAD + len(panels) * (_PANEL + _GAP) + _FOOT - _GAP * bool(panels)
    drawn = Figure(figsize=(_WIDTH, height), dpi=DPI)
    FigureCanvasAgg(drawn)
    for number, sentence in enumerate(leaks_in_a_line(meter).split("; ")):
        said = sentence if len(sentence) <= _SAID else sentence[: _SAID - 1] + "…"
        drawn.text(
            _LEFT / _WIDTH, 1 - (0.22 + 0.22 * number) / height, said.replace("$", r"\$"), fontsize=10, color=INK
        )
    for number, about in enumerate(panels):
        bottom = height - _HEAD - number * (_PANEL + _GAP) - _PANEL
        box = (_LEFT / _WIDTH, bottom / height, 1 - (_LEFT + _RIGHT) / _WIDTH, _PANEL / height)
        axes = drawn.add_axes(box)
        _panel(axes, about, [series for series in drawn_series if series[0].measure.about == about])
        if number == len(panels) - 1:
            axes.set_xlabel("epoch", fontsize=9, color=INK, labelpad=2)
    return drawn


def _panel(axes: Axes, about: str, drawn_series: list[list[Leak]]) -> None:
    from matplotlib.ticker import MaxNLocator

    colours = _colours(len(drawn_series))
    for series, colour in zip(drawn_series, colours, strict=True):
        ends = f"{series[0].crossing.sender} → {series[0].crossing.receiver}"
        label = f"{series[0].measure.name} of {tensor_name(series[0])}, {ends}"
        label = label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"
        values = [max(-0.05, read_of_all(leak)) for leak in series]
        axes.plot(
            [leak.epoch for leak in series],
            values,
            color=colour,
            linewidth=1.6,
            marker="." if len(series) <= 20 else "",
            label=label.replace("$", r"\$"),
        )
    axes.set_title(f"what tells {about}", loc="left", fontsize=10, color=INK, pad=6)
    axes.set_ylim(-0.08, 1.08)
    axes.set_yticks([0.0, 0.5, 1.0], ["nothing", "half", "everything"])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.tick_params(labelsize=9, labelcolor=INK, color=FAINT, which="both")
    axes.grid(axis="y", color="#eceef1", linewidth=0.8, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False, labelcolor=INK)


def _colours(count: int) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](k / max(1, count - 1) * 0.9)) for k in range(count)]
