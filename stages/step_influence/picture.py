"""An influence map as a picture: the darker, the larger; what is not connected is hatched.

    colour   size on a logarithmic scale        0        white cell, connected, derivative zero
    number   the size, where it fits            hatched  not connected

The figure is built on Agg's canvas directly, without pyplot: no display is needed and no global state is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stages.plain_text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    from stages.step_influence.map import InfluenceMap

_INK, _FAINT, _HATCHED = "#22272e", "#c9cdd3", "#f1f2f4"
_DPI = 150
_CELL_WIDTH, _CELL_HEIGHT = 0.72, 0.42  # inches, of a map whose cells have numbers
_MOST_LABELLED = 24  # rows or columns up to which cells have numbers and every row a label
_LARGEST = 14.0  # inches
_LETTER = 0.075  # inches that a letter of a label takes


def influence_figure(drawn: InfluenceMap, title: str | None = None) -> Figure:
    """Draw a map.

    Args:
        drawn: the map.
        title: the heading; left out, a general one.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows, columns = drawn.matrix.shape
    labelled = max(rows, columns) <= _MOST_LABELLED
    beside, below = (_LETTER * max(map(len, labels), default=0) for labels in (drawn.outputs, drawn.sources))
    width = min(_LARGEST, columns * _CELL_WIDTH) + beside + 1.6
    height = min(_LARGEST, rows * _CELL_HEIGHT) + below + 1.3
    figure = Figure(figsize=(max(width, 5.0), max(height, 2.4)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    scale = _scale(drawn)
    image = axes.imshow(
        np.ma.masked_where(~_finite(drawn), drawn.matrix),
        cmap=colormaps["Blues"],
        norm=scale,
        aspect="auto",
        interpolation="nearest",
    )
    if _finite(drawn).any():
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.ax.tick_params(which="both", labelsize=8, labelcolor=_INK)
    _hatching(axes, drawn)
    if labelled:
        _numbers(axes, drawn, scale)
    for axis, labels, rotation in ((axes.xaxis, drawn.sources, 90), (axes.yaxis, drawn.outputs, 0)):
        stride = -(-len(labels) // _MOST_LABELLED) or 1
        axis.set_ticks(
            range(0, len(labels), stride),
            labels=[printable(label) for label in labels[::stride]],
            rotation=rotation,
            fontsize=8,
        )
    axes.tick_params(length=0, labelcolor=_INK)
    axes.set_xlabel("source", fontsize=9, color=_INK)
    axes.set_ylabel("output", fontsize=9, color=_INK)
    axes.set_title(title or "Influence: size of d output / d source", fontsize=11, color=_INK, loc="left")
    handles = [
        Patch(facecolor="white", edgecolor=_FAINT, label="0: connected, derivative zero"),
        Patch(facecolor=_HATCHED, edgecolor=_FAINT, hatch="////", label="not connected"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=8, labelcolor=_INK)
    return figure


def _finite(drawn: InfluenceMap) -> Any:
    """Which cells have a colour."""
    return drawn.flows & np.isfinite(drawn.matrix)


def _scale(drawn: InfluenceMap) -> LogNorm:
    """Colours over at least a decade, or nearly equal sizes would look like extremes; the smallest is not yet white."""
    from matplotlib.colors import LogNorm

    sizes = drawn.matrix[_finite(drawn)]
    largest = float(sizes.max(initial=0.0)) or 1.0
    smallest = float(sizes.min(initial=largest / 10))
    return LogNorm(max(smallest / 3, np.finfo(np.float64).tiny), largest)


def _hatching(axes: Axes, drawn: InfluenceMap) -> None:
    from matplotlib.patches import Rectangle

    for (row, column), connected in np.ndenumerate(drawn.connected):
        if not connected:
            corner = (column - 0.5, row - 0.5)
            axes.add_patch(
                Rectangle(corner, 1, 1, facecolor=_HATCHED, edgecolor=_FAINT, hatch="////", linewidth=0, gid="hatched")
            )


def _numbers(axes: Axes, drawn: InfluenceMap, scale: LogNorm) -> None:
    for row, texts in enumerate(drawn.cells()):
        for column, text in enumerate(texts):
            if drawn.connected[row, column]:
                dark = _finite(drawn)[row, column] and scale(drawn.matrix[row, column]) > 0.55
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else _INK)
