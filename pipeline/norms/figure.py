"""Norms at the cuts as a picture: activations above, gradients below, one line for each boundary over the steps.

    1e1 │ ────────────  a → b        lines: from the input (light) to the loss (dark)
    1e-3│ ── ▼ ─── ▼ ─  b → c        ▼ vanishing, ▲ exploding, ✕ not finite: at the edge that it has left by
        └──────────────
          steps

As in `pipeline.report.timeline_figure` the figure is built on Agg's canvas, without pyplot: no global state is touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.norms.flags import EXPLODING, NOT_FINITE, VANISHING, Boundary
from pipeline.norms.text import norms_in_a_line
from pipeline.report.timeline_figure import DPI, FAINT, INK, PAPER, write_undated
from stages.worker.observers import ACTIVATION, GRADIENT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pipeline.norms.boundary_norms import BoundaryNorms

_WIDTH, _HEAD, _PANEL, _GAP, _FOOT, _LEFT, _RIGHT = 11.0, 0.75, 2.5, 0.5, 0.55, 0.85, 2.75  # inches
_LIGHT, _DARK = {ACTIVATION: "#a9c6e6", GRADIENT: "#f2c197"}, {ACTIVATION: "#163e6b", GRADIENT: "#8a3f05"}
_TITLES = {ACTIVATION: "activations, going forward", GRADIENT: "gradients dL/dOut, going back"}
_MARKS = {VANISHING: "v", EXPLODING: "^", NOT_FINITE: "X"}
_BAD, _GOOD = "#b8122f", "#0b7a63"
_LABELLED, _LONGEST = 12, 30
_FEW = 20
"""So few points are drawn as such: a line through one of them, or between gaps, is not seen."""
_MARKED = 40
"""Beyond so many marks on one line they say no more than every so many-th of them."""


def save_norms(norms: BoundaryNorms, path: Path) -> Path:
    """Draw and save; missing folders are made. Equal norms give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_undated(norms_figure(norms), path)


def norms_figure(norms: BoundaryNorms) -> Figure:
    """The figure; see the module."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [what for what in (ACTIVATION, GRADIENT) if any(b.what == what for b in norms.norms)]
    height = _HEAD + len(panels) * (_PANEL + _GAP) + _FOOT - _GAP * bool(panels)
    drawn = Figure(figsize=(_WIDTH, height), dpi=DPI)
    FigureCanvasAgg(drawn)
    colour = INK if not norms.steps else _BAD if norms.flags else _GOOD
    at = _LEFT / _WIDTH, 1 - 0.3 / height
    drawn.text(*at, norms_in_a_line(norms), fontsize=13, fontweight="bold", color=colour, va="center")
    for number, what in enumerate(panels):
        bottom = height - _HEAD - number * (_PANEL + _GAP) - _PANEL
        box = (_LEFT / _WIDTH, bottom / height, 1 - (_LEFT + _RIGHT) / _WIDTH, _PANEL / height)
        axes = drawn.add_axes(box)
        _panel(axes, norms, what, last=number == len(panels) - 1)
    return drawn


def _panel(axes: Axes, norms: BoundaryNorms, what: str, last: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    boundaries = sorted(boundary for boundary in norms.norms if boundary.what == what)
    finite = [v for b in boundaries for v in norms.norms[b] if math.isfinite(v) and v > 0.0] or [1.0]
    low, high = math.floor(math.log10(min(finite))), math.ceil(math.log10(max(finite)))
    high = max(high, low + 1)
    axes.set_yscale("log")
    axes.set_ylim(10 ** (low - 0.06 * (high - low)), 10 ** (high + 0.06 * (high - low)))
    steps = norms.steps
    pad = 0.02 * (steps[-1] - steps[0]) or 0.5
    axes.set_xlim(steps[0] - pad, steps[-1] + pad)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))
    axes.set_title(_TITLES[what], loc="left", fontsize=10, color=INK, pad=6)
    axes.set_ylabel("L2 norm over the batch", fontsize=9, color=INK)
    axes.tick_params(labelsize=9, labelcolor=INK, color=FAINT, which="both")
    axes.grid(axis="y", color="#eceef1", linewidth=0.8, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(FAINT)
    if last:
        axes.set_xlabel("training step", fontsize=9, color=INK, labelpad=2)
    marks = norms.marks()
    colours = _shades(what, len(boundaries))
    for boundary, colour in zip(boundaries, colours, strict=True):
        values = [v if math.isfinite(v) and v > 0.0 else math.nan for v in norms.norms[boundary]]
        few = sum(not math.isnan(v) for v in values) <= _FEW
        axes.plot(steps, values, color=colour, linewidth=1.6, marker="." if few else "", zorder=2)
        for kind, places in marks.get(boundary, {}).items():
            _mark(axes, norms, boundary, kind, places)
    _legend(axes, norms, boundaries, colours)


def _mark(axes: Axes, norms: BoundaryNorms, boundary: Boundary, kind: str, places: Sequence[int]) -> None:
    """Where a boundary was flagged; what has no place on the axis lies on the edge that it has left by."""
    bottom, top = axes.get_ylim()
    shown = places[:: math.ceil(len(places) / _MARKED)]
    values = [norms.norms[boundary][place] for place in shown]
    heights = [bottom if v == 0.0 else v if math.isfinite(v) else top for v in values]
    axes.plot(
        [norms.steps[place] for place in shown],
        heights,
        linestyle="",
        marker=_MARKS[kind],
        markersize=6,
        markerfacecolor=_BAD,
        markeredgecolor=PAPER,
        markeredgewidth=0.6,
        clip_on=False,
        zorder=3,
    )


def _shades(what: str, count: int) -> list[str]:
    """Colours from the input (light) to the loss (dark)."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    ramp = LinearSegmentedColormap.from_list(what, [_LIGHT[what], _DARK[what]])
    return [to_hex(ramp(k / max(1, count - 1) if count > 1 else 0.7)) for k in range(count)]


def _legend(axes: Axes, norms: BoundaryNorms, boundaries: Sequence[Boundary], colours: Sequence[str]) -> None:
    """Which line is which cut; of many every so many-th. The marks that there are, with their meaning."""
    from matplotlib.lines import Line2D

    every = math.ceil(len(boundaries) / _LABELLED)
    handles: list[Any] = []
    for boundary, colour in list(zip(boundaries, colours, strict=True))[::every]:
        sender, receiver = norms.ends(boundary)
        label = f"{sender} → {receiver}"
        if sum(b[:3] == boundary[:3] for b in boundaries) > 1:
            label += f", {boundary.tensor}"
        label = label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"
        handles.append(Line2D([], [], color=colour, linewidth=2, label=label.replace("$", r"\$")))
    kinds = {flag.kind for flag in norms.flags if flag.boundary in boundaries}
    for kind in (kind for kind in _MARKS if kind in kinds):
        handles.append(Line2D([], [], color=_BAD, linestyle="", marker=_MARKS[kind], markersize=6, label=kind))
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=1.4,
        borderaxespad=0,
    )
