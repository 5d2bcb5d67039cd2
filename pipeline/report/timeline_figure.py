"""Pictures of timelines: workers as rows, actions as numbered boxes, the bubble hatched, milliseconds below.

A figure is built on Agg's canvas directly, without pyplot: no display is needed, no global state is touched, and a
user's own figures and backend stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pipeline.errors import TimelineError
from pipeline.plan.timeline import Span, Timeline
from stages.actions import Kind
from stages.plain_text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["save_timeline", "timeline_figure"]

_FILL = {
    Kind.FORWARD: "#3b76b8",
    Kind.BACKWARD: "#d4701c",
    Kind.BACKWARD_INPUT: "#d4701c",
    Kind.BACKWARD_WEIGHT: "#4c9a6a",
}
INK, FAINT, PAPER, _BUBBLE = "#22272e", "#8a929c", "#ffffff", "#f1f2f4"
DPI = 150
_WIDTH, _ROW, _HEAD, _GAP = 11.0, 0.52, 0.88, 1.0  # inches
_BOX = 0.78  # share of a row's height that a box fills
_LONGEST_NAME = 24
_LARGEST, _SMALLEST, _GLYPH = 10.0, 5.0, 0.82  # points, points, width of a bold digit and its air in font sizes


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

    Raises:
        TimelineError: there is not one name for each worker.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    without_controls(timeline_figure(timeline, title=title, names=names)).savefig(path, dpi=DPI, facecolor=PAPER)
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
    figure = Figure(figsize=(_WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)
    slowest = max((panel.step_time for panel in panels.values()), default=0.0)
    top = height - _HEAD
    titles = {label: _titles(panel, names) for label, panel in panels.items()}
    gutter = max((_text_width(figure, title) for panel in titles.values() for title in panel), default=0.0)
    left, right = (gutter + 0.4) / _WIDTH, 0.885
    for (label, panel), count in zip(panels.items(), rows, strict=True):
        bottom = top - count * _ROW
        axes = figure.add_axes((left, bottom / height, right - left, count * _ROW / height))
        _draw(axes, panel, slowest, label, titles[label])
        top = bottom - _GAP
    heading = title if title is not None else next((panel.name for panel in panels.values()), "")
    figure.text(left, 1 - 0.30 / height, heading, fontsize=13, fontweight="bold", color=INK, va="center")
    _legend(figure, panels, (right, 1 - 0.30 / height))
    return figure


def write_undated(figure: Figure, path: Path) -> Path:
    """Save a figure where the suffix says how (png, svg, pdf), its texts printable; equal figures give equal files."""
    from matplotlib import rc_context

    undated = {"Date": None} if path.suffix.lower() == ".svg" else {}
    with rc_context({"svg.hashsalt": "tapeline", "svg.fonttype": "none"}):
        without_controls(figure).savefig(path, dpi=DPI, facecolor=PAPER, metadata=undated)
    return path


def without_controls(figure: Figure) -> Figure:
    """The figure, with all texts as they can be printed: a control character makes an SVG that no reader opens."""
    from matplotlib.text import Text

    for text in figure.findobj(lambda artist: isinstance(artist, Text)):
        assert isinstance(text, Text)
        text.set_text(printable(text.get_text(), breaks=True))
    return figure


def _draw(axes: Axes, timeline: Timeline, slowest: float, label: str, titles: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    span_ms = slowest * 1e3 or 1.0
    axes.set_xlim(0, span_ms)
    axes.set_ylim(timeline.workers - 0.5, -0.5)
    axes.set_yticks(range(timeline.workers), labels=titles)
    axes.tick_params(axis="y", length=0, labelsize=_LARGEST, labelcolor=INK, pad=8)
    axes.tick_params(axis="x", labelsize=9, labelcolor=INK, color=FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, min_n_ticks=2))
    axes.set_xlabel("time in ms", fontsize=9, color=INK, labelpad=2)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    summary = (
        f"step {_ms(timeline.step_time)} ms    bubble {timeline.bubble:.1%}    "
        f"{timeline.parallelism:.2f} of {timeline.workers} workers busy"
    )
    axes.set_title(f"{label}    {summary}" if label else summary, loc="left", fontsize=10, color=INK, pad=6)
    points_per_ms = axes.get_window_extent().width * 72 / DPI / span_ms
    labels = _labels(timeline)
    sizes = _font_sizes(labels, points_per_ms)
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
            _box(axes, span, labels[span], sizes[span.action.kind], points_per_ms)
        share = timeline.idle[worker] / timeline.step_time if timeline.step_time else 0.0
        axes.annotate(
            f"idle {share:.1%}",
            (1, worker),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=9,
            color=INK,
        )


def _ms(seconds: float) -> str:
    """Milliseconds with as many decimals as are worth reading."""
    number = seconds * 1e3
    return f"{number:,.{0 if number >= 1000 else 1 if number >= 10 else 3}f}"


def _text_width(figure: Figure, text: str) -> float:
    """The width in inches of a worker's name."""
    probe = figure.text(0, 0, text, fontsize=_LARGEST)
    width = probe.get_window_extent().width / DPI
    probe.remove()
    return float(width)


def _titles(timeline: Timeline, names: Sequence[str]) -> list[str]:
    if not names:
        return [f"worker {worker}" for worker in range(timeline.workers)]
    if len(names) != timeline.workers:
        raise TimelineError(f"`names` must name each of {timeline.workers} workers, received {list(names)}")
    return [name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…" for name in names]


def _font_sizes(labels: Mapping[Span, str], points_per_ms: float) -> dict[Kind, float]:
    """For each kind one size for all its boxes, so that most of the labels fit; even sizes read calmer."""
    sizes = {}
    for kind in {span.action.kind for span in labels}:
        spans = [span for span in labels if span.action.kind is kind]
        longest = max(len(labels[span]) for span in spans)
        typical = median(span.duration for span in spans) * 1e3 * points_per_ms
        sizes[kind] = min(_LARGEST, typical / (_GLYPH * longest))
    return sizes


def _box(axes: Axes, span: Span, label: str, size: float, points_per_ms: float) -> None:
    from matplotlib.patches import Rectangle

    start, width = span.start * 1e3, span.duration * 1e3
    points = width * points_per_ms
    axes.add_patch(
        Rectangle(
            (start, span.worker - _BOX / 2),
            width,
            _BOX,
            facecolor=_FILL[span.action.kind],
            edgecolor=PAPER,
            linewidth=0.8 if points > 3 else 0.0,
        )
    )
    if size >= _SMALLEST and points >= 0.9 * size * _GLYPH * len(label):  # a label that does not fit is left out
        axes.text(
            start + width / 2,
            span.worker,
            label,
            ha="center",
            va="center_baseline",
            fontsize=size,
            color=PAPER,
            fontweight="bold",
        )


def _labels(timeline: Timeline) -> dict[Span, str]:
    """The microbatches; after the stage where a worker has several, before the window where there are several."""
    windows = any(span.action.window for span in timeline.spans)
    labels = {}
    for worker in range(timeline.workers):
        spans = timeline.of_worker(worker)
        several = len({span.action.stage for span in spans}) > 1
        for span in spans:
            stage = f"{span.action.stage}." if several else ""
            window = f"/{span.action.window}" if windows else ""
            labels[span] = f"{stage}{span.action.microbatch}{window}"
    return labels


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
        labelcolor=INK,
        handlelength=1.4,
        handleheight=1.1,
        columnspacing=1.4,
        borderaxespad=0,
    )
