"""A report as a figure: the pipeline with its deviations coloured, below it every difference beside its tolerance.

    ┌──────┐ ──► ┌──────┐       colours: the worst verdict of a stage's phase, of an arrow
    │ F B S│ ◄── │ F B S│
    └──────┘     └──────┘
    1e-2 │            x         one point for each comparison, in the order in which data flows, check by check
    1e-7 │ ─ ─ ─ ─ ─ ─ ─ ─      its tolerance as a dash: a point above its dash deviates
       0 │ • • • •   • • •      equal bits lie on the line of their own at the bottom

As in `pipeline.report.timeline_figure` the figure is built on Agg's canvas, without pyplot: no global state is touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from pipeline.report.layout import BOX, CHIP, STATES, WORDS, Arrow, Box, Picture, picture, shortened, worst_state
from pipeline.report.svg import arrow_head
from pipeline.report.timeline_figure import DPI, FAINT, INK, PAPER, write_undated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pipeline.compare.rows import Row
    from pipeline.report.report import Report

COLOURS = {"none": "#8a929c", "equal": "#0b7a63", "within": "#2458c5", "failed": "#b8122f"}
"""The states, in the colours of the page."""
_TINTS = {"none": "#eef0f3", "equal": "#e1f4ee", "within": "#e4ecfc", "failed": "#fde6e9"}
_MARKS = {"equal": "o", "within": "o", "failed": "X"}
_WIDTH, _BELOW, _HEAD, _WIDEST = 11.0, 3.6, 1.0, 3.2
_PIXEL = 1 / 100
_NAME, _LETTERS = 26, 100
_FLOOR = 1e-17


def save_figure(report: Report, path: Path) -> Path:
    """Draw a report and save it where the suffix says how (png, svg, pdf).

    Returns:
        The path.
    """
    return write_undated(figure(report), path)


def figure(report: Report) -> Figure:
    """The figure; see the module."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = picture(report)
    width = max(_WIDTH, min(drawn.width * _PIXEL, _WIDTH * _WIDEST))
    scale = min(width / (drawn.width * _PIXEL), 1.0) if drawn.boxes else 1.0
    above = drawn.height * _PIXEL * scale if drawn.boxes else 0.0
    height = _HEAD + above + _BELOW
    found = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(found)
    _heading(found, report, width, height)
    if drawn.boxes:
        share = drawn.width * _PIXEL * scale / width
        axes = found.add_axes(((1 - share) / 2, _BELOW / height, share, above / height))
        _pipeline(axes, drawn, scale, "" if report.first is None else report.first.stage)
    axes = found.add_axes((0.95 / width, 0.62 / height, 1 - 1.25 / width, (_BELOW - 1.25) / height))
    _differences(axes, report)
    return found


def _heading(found: Figure, report: Report, width: float, height: float) -> None:
    """The verdict in up to two lines, what was verified below."""
    colour = COLOURS["equal" if report.ok else "failed"]
    fits = int(_LETTERS * width / _WIDTH)
    words = wrap(_plain(report.summary()), fits, max_lines=2, placeholder=" …")
    top = 1 - 0.28 / height
    for number, line in enumerate(words):
        y = top - number * 0.24 / height
        found.text(0.3 / width, y, line, fontsize=12, fontweight="bold", color=colour, va="center")
    headline = _plain(shortened(report.headline, fits))
    y = top - (0.24 * len(words) + 0.03) / height
    found.text(0.3 / width, y, headline, fontsize=9.5, color=INK, va="center")


def _plain(words: str) -> str:
    """What others wrote, without matplotlib's mathematics."""
    return words.replace("$", r"\$")


def _pipeline(axes: Axes, drawn: Picture, scale: float, culprit: str) -> None:
    axes.set_xlim(0, drawn.width)
    axes.set_ylim(drawn.height, 0)
    axes.set_axis_off()
    for arrow in drawn.arrows:
        _arrow(axes, arrow, scale)
    for box in drawn.boxes:
        _box(axes, box, scale, box.stage == culprit)


def _arrow(axes: Axes, arrow: Arrow, scale: float) -> None:
    from matplotlib.patches import Polygon

    colour, failed = COLOURS[arrow.part.state], arrow.part.state == "failed"
    tip, *feet = arrow_head(arrow.points, 13.0 if failed else 9.0)
    neck = ((feet[0][0] + feet[1][0]) / 2, (feet[0][1] + feet[1][1]) / 2)
    xs, ys = zip(*arrow.points[:-1], neck, strict=True)
    dashes = "--" if arrow.part.state == "none" else "-"
    axes.plot(xs, ys, color=colour, linewidth=2.6 if failed else 1.3, linestyle=dashes, solid_joinstyle="round")
    axes.add_patch(Polygon((tip, *feet), color=colour, linewidth=0))
    if arrow.caption:
        x, y = arrow.caption_at
        axes.text(x, y - 1, _plain(shortened(arrow.caption, 17)), fontsize=7.5 * scale, color=FAINT, ha="center")


def _box(axes: Axes, box: Box, scale: float, culprit: bool) -> None:
    from matplotlib.patches import FancyBboxPatch

    def rounded(x: float, y: float, width: float, height: float, radius: float, **looks: Any) -> None:
        style = f"round,pad=0,rounding_size={radius}"
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, mutation_aspect=1, **looks))

    state = box.whole.state
    line = {"edgecolor": COLOURS[state], "linewidth": 2.4 if state == "failed" else 1.3}
    rounded(box.x, box.y, BOX, box.height, 10, facecolor=PAPER, linestyle="--" if state == "none" else "-", **line)
    name = _plain(shortened(box.stage, _NAME))
    middle, y = box.x + BOX / 2, box.y + (box.height - CHIP) / 2 - 5
    axes.text(middle, y, name, fontsize=9.5 * scale, fontweight="bold", color=INK, ha="center", va="center")
    width = (BOX - 20) / len(box.phases)
    for number, part in enumerate(box.phases):
        x, y = box.x + 10 + number * width, box.y + box.height / 2 + 4
        edge = COLOURS["failed"] if part.state == "failed" else "none"
        rounded(x + 2, y, width - 4, CHIP, 5, facecolor=_TINTS[part.state], edgecolor=edge, linewidth=1)
        axes.text(
            x + width / 2,
            y + CHIP / 2,
            part.label.rpartition(": ")[2],
            fontsize=7.2 * scale,
            color=COLOURS[part.state],
            fontweight="bold" if part.state == "failed" else "normal",
            ha="center",
            va="center",
        )
    if culprit:
        axes.text(
            middle, box.y + box.height + 12, "first to deviate", fontsize=8 * scale, color=COLOURS["failed"],
            fontweight="bold", ha="center", va="center",
        )  # fmt: skip


def _differences(axes: Axes, report: Report) -> None:
    """Points and dashes over the numbers of the rows; differences of 0 and infinite ones have lines of their own."""
    rows = report.rows
    finite = [size for row in rows for size in (row.relative, row.tolerance) if math.isfinite(size) and size > 0]
    low, high = 10.0 ** (_power(min(finite, default=1e-8)) - 1), 10.0 ** (_power(max(finite, default=1.0)) + 1)
    zero, endless = low / 10, high * 10
    beyond = any(not math.isfinite(row.relative) for row in rows)

    def place(row: Row) -> float:
        if not math.isfinite(row.relative):
            return endless
        return max(row.relative, zero) if row.relative else zero

    for state in STATES[1:]:
        chosen = [(index, row) for index, row in enumerate(rows) if worst_state([row]) == state]
        axes.scatter(
            [index for index, _ in chosen],
            [place(row) for _, row in chosen],
            s=34 if state == "failed" else 14,
            marker=_MARKS[state],
            color=COLOURS[state],
            linewidths=0,
            zorder=3,
            label=WORDS[state],
        )
    allowed = [(index, row.tolerance) for index, row in enumerate(rows) if row.tolerance > 0]
    axes.hlines(
        [size for _, size in allowed],
        [index - 0.5 for index, _ in allowed],
        [index + 0.5 for index, _ in allowed],
        color=INK,
        linewidth=1.4,
        label="allowed",
    )
    axes.set_yscale("log")
    axes.set_ylim(zero / 4, (endless if beyond else high) * 4)
    axes.set_xlim(-0.8, max(len(rows), 1) - 0.2)
    _ticks(axes, low, high, zero, endless if beyond else None)
    _checks(axes, rows)
    axes.set_xlabel("comparisons, in the order in which data flows", fontsize=9, color=INK, labelpad=16)
    axes.set_ylabel("relative difference", fontsize=9, color=INK)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1.0), ncols=4, frameon=False, fontsize=8.5, labelcolor=INK,
        handletextpad=0.4, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(FAINT)


def _power(size: float) -> int:
    return math.floor(math.log10(max(size, _FLOOR)))


def _ticks(axes: Axes, low: float, high: float, zero: float, endless: float | None) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    first, last = _power(low * 1.5), _power(high * 1.5)
    step = max(1, (last - first) // 6)
    powers = range(first + (last - first) % step, last + 1, step)
    ends = [] if endless is None else [endless]
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(FixedLocator([zero, *(10.0**power for power in powers), *ends]))
    axes.set_yticklabels(["equal", *(f"1e{power}" for power in powers), *["inf, nan" for _ in ends]])
    axes.tick_params(axis="both", labelsize=8, labelcolor=INK, color=FAINT)
    axes.xaxis.set_major_locator(FixedLocator([]))
    axes.axhline(zero, color=FAINT, linewidth=0.6, zorder=1)


def _checks(axes: Axes, rows: Sequence[Row]) -> None:
    """A band for each run of rows of one check, its name below."""
    start = 0
    for number, (name, run) in enumerate(groupby(rows, key=lambda row: row.check)):
        count = len(list(run))
        if number % 2 == 0:
            axes.axvspan(start - 0.5, start + count - 0.5, color="#f4f5f7", zorder=0, linewidth=0)
        axes.annotate(
            name,
            (start + (count - 1) / 2, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -5),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
            color=INK,
            annotation_clip=False,
        )
        start += count
