"""Pictures of timelines: workers as rows, actions as numbered boxes, the bubble hatched, milliseconds below.

A figure is built on Agg's canvas directly, without pyplot: no display is needed, no global state is touched, and a
user's own figures and backend stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.timeline import Span, Timeline
from stages.actions import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["save_timeline", "timeline_figure"]

_FILL = {
    Kind.FORWARD: "#3b76b8",
    Kind.BACKWARD: "#e58a2e",
    Kind.BACKWARD_INPUT: "#e58a2e",
    Kind.BACKWARD_WEIGHT: "#4c9a6a",
}
_INK, _FAINT, _PAPER, _BUBBLE = "#22272e", "#8a929c", "#ffffff", "#f1f2f4"
_DPI = 150
_WIDTH, _ROW, _HEAD, _GAP = 11.0, 0.52, 0.95, 1.1  # inches
_BOX = 0.78  # share of a row's height that a box fills


def save_timeline(
    timeline: Timeline | Mapping[str, Timeline],
    path: str | Path,
    *,
    title: str | None = None,
    names: Sequence[str] = (),
) -> Path:
    """Draw one timeline, or several below each other on one time axis, and save the picture.

    Args:
        timeline: what to draw; a mapping draws one panel each, under its key: `{"predicted": ..., "measured": ...}`.
        path: where to; the suffix chooses the format (png, svg, pdf). Missing directories are made.
        title: the heading; left out, the name of the (first) timeline.
        names: what to call the workers; left out, `worker 0` and so on.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    timeline_figure(timeline, title=title, names=names).savefig(path, dpi=_DPI, facecolor=_PAPER)
    return path


def timeline_figure(
    timeline: Timeline | Mapping[str, Timeline], *, title: str | None = None, names: Sequence[str] = ()
) -> Figure:
    """The figure that `save_timeline` saves; arguments as there."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {"": timeline} if isinstance(timeline, Timeline) else dict(timeline)
    rows = [panel.workers for panel in panels.values()]
    height = _HEAD + sum(rows) * _ROW + len(rows) * _GAP - 0.35
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    longest = max((panel.step_time for panel in panels.values()), default=0.0)
    top = height - _HEAD
    left, right = 0.115, 0.885
    for (label, panel), count in zip(panels.items(), rows, strict=True):
        bottom = top - count * _ROW
        axes = figure.add_axes((left, bottom / height, right - left, count * _ROW / height))
        _draw(axes, panel, longest, label, names)
        top = bottom - _GAP
    heading = title if title is not None else next((panel.name for panel in panels.values()), "")
    figure.text(left, 1 - 0.30 / height, heading, fontsize=13, fontweight="bold", color=_INK, va="center")
    _legend(figure, panels, (right, 1 - 0.30 / height))
    return figure


def _draw(axes: Axes, timeline: Timeline, longest: float, label: str, names: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    span_ms = longest * 1e3 or 1.0
    axes.set_xlim(0, span_ms)
    axes.set_ylim(timeline.workers - 0.5, -0.5)
    axes.set_yticks(range(timeline.workers), labels=names or [f"worker {w}" for w in range(timeline.workers)])
    axes.tick_params(axis="y", length=0, labelsize=10, labelcolor=_INK, pad=8)
    axes.tick_params(axis="x", labelsize=9, labelcolor=_INK, color=_FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, min_n_ticks=2))
    axes.set_xlabel("ms", fontsize=9, color=_INK, labelpad=2)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    summary = (
        f"step {timeline.step_time * 1e3:.4g} ms    bubble {timeline.bubble:.1%}    "
        f"{timeline.parallelism:.2f} of {timeline.workers} workers busy"
    )
    axes.set_title(f"{label}    {summary}" if label else summary, loc="left", fontsize=10, color=_INK, pad=6)
    pixels_per_ms = axes.get_window_extent().width / span_ms
    for worker in range(timeline.workers):
        for start, end in timeline.gaps(worker):
            axes.add_patch(
                Rectangle(
                    (start * 1e3, worker - _BOX / 2),
                    (end - start) * 1e3,
                    _BOX,
                    facecolor=_BUBBLE,
                    edgecolor="#c9cdd3",
                    hatch="////",
                    linewidth=0,
                )
            )
        for span in timeline.of_worker(worker):
            _box(axes, span, _label(span, timeline), pixels_per_ms)
        share = timeline.idle[worker] / timeline.step_time if timeline.step_time else 0.0
        axes.annotate(
            f"idle {share:.1%}",
            (1, worker),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_INK,
        )


def _box(axes: Axes, span: Span, label: str, pixels_per_ms: float) -> None:
    from matplotlib.patches import Rectangle

    start, width = span.start * 1e3, span.duration * 1e3
    pixels = width * pixels_per_ms
    axes.add_patch(
        Rectangle(
            (start, span.worker - _BOX / 2),
            width,
            _BOX,
            facecolor=_FILL[span.action.kind],
            edgecolor=_PAPER,
            linewidth=0.8 if pixels > 6 else 0.0,
        )
    )
    size = min(10.0, 72 * pixels / _DPI / (0.68 * len(label)))  # points that fit the width of the box
    if size >= 4.5:
        axes.text(
            start + width / 2,
            span.worker,
            label,
            ha="center",
            va="center_baseline",
            fontsize=size,
            color=_PAPER,
            fontweight="bold",
        )


def _label(span: Span, timeline: Timeline) -> str:
    """The microbatch; after the stage where the worker has several, before the window where there are several."""
    stages = {other.action.stage for other in timeline.of_worker(span.worker)}
    stage = f"{span.action.stage}." if len(stages) > 1 else ""
    window = f"/{span.action.window}" if any(other.action.window for other in timeline.spans) else ""
    return f"{stage}{span.action.microbatch}{window}"


def _legend(figure: Figure, panels: Mapping[str, Timeline], corner: tuple[float, float]) -> None:
    from matplotlib.patches import Patch

    kinds = {span.action.kind for panel in panels.values() for span in panel.spans}
    handles: list[Any] = [Patch(facecolor=_FILL[kind], label=kind.phrase) for kind in sorted(kinds)]
    handles.append(Patch(facecolor=_BUBBLE, edgecolor="#c9cdd3", hatch="////", linewidth=0, label="bubble"))
    figure.legend(
        handles=handles,
        loc="center right",
        bbox_to_anchor=corner,
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        handlelength=1.4,
        handleheight=1.1,
        columnspacing=1.4,
        borderaxespad=0,
    )
