"""The pipeline of a report as inline SVG: stages and hand-offs coloured by their worst verdict, each one a button.

Colours come from the page's style sheet by class; a glyph and the line's form say the same for those who do not see
colours. All names are escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from pipeline.report.layout import BOX, CHIP, WORDS, Arrow, Box, Clickable, Picture, Point, shortened
from stages.plain_text import escaped

if TYPE_CHECKING:
    from pipeline.report.report import Report

GLYPHS = {"none": "○", "equal": "✓", "within": "≈", "failed": "✕"}
"""The states as one character."""
_ROUND, _HEAD = 9.0, 8.0
_NAME, _CAPTION = 24, 17


def pipeline_svg(report: Report, drawn: Picture) -> str:
    """The picture as an ``<svg>`` element.

    Args:
        report: For the rows' verdicts.
        drawn: Its layout.
    """
    culprit = "" if report.first is None else report.first.stage
    parts = [_arrow(report, arrow) for arrow in drawn.arrows]
    parts += [_box(report, box, box.stage == culprit) for box in drawn.boxes]
    size = f'width="{drawn.width:g}" height="{drawn.height:g}" viewBox="0 0 {drawn.width:g} {drawn.height:g}"'
    return f'<svg class="picture" role="group" aria-label="The pipeline" {size}>{"".join(parts)}</svg>'


def button(part: Clickable, report: Report, classes: str, inside: str) -> str:
    """A part of the picture as a group that can be pressed: by mouse, by keyboard, known to screen readers."""
    failed = sum(not report.rows[index].ok for index in part.rows)
    count = f"{failed} of {len(part.rows)} comparisons deviate" if failed else f"{len(part.rows)} comparisons"
    label = f"{part.label}: {WORDS[part.state]}, {count}"
    return (
        f'<g class="part {classes} {part.state}" data-part="{escaped(part.key)}" role="button" tabindex="0" '
        f'aria-pressed="false" aria-label="{escaped(label)}"><title>{escaped(label)}</title>{inside}</g>'
    )


def _box(report: Report, box: Box, culprit: bool) -> str:
    middle = box.x + BOX / 2
    whole = (
        f'<rect x="{box.x:g}" y="{box.y:g}" width="{BOX:g}" height="{box.height:g}" rx="10"/>'
        f'<text class="name" x="{middle:g}" y="{box.y + (box.height - CHIP) / 2 - 1:g}">'
        f"{escaped(shortened(box.stage, _NAME))}</text>"
    )
    chips = []
    width = (BOX - 20.0) / len(box.phases)
    for number, part in enumerate(box.phases):
        x, y = box.x + 10.0 + number * width, box.y + box.height / 2 + 4.0
        word = part.label.rpartition(": ")[2]
        chips.append(
            button(
                part,
                report,
                "chip",
                f'<rect x="{x + 2:g}" y="{y:g}" width="{width - 4:g}" height="{CHIP:g}" rx="5"/>'
                f'<text x="{x + width / 2:g}" y="{y + CHIP / 2 + 4:g}">{word} {GLYPHS[part.state]}</text>',
            )
        )
    mark = ""
    if culprit:
        mark = f'<text class="culprit" x="{middle:g}" y="{box.y + box.height + 15:g}">▲ first to deviate</text>'
    return button(box.whole, report, "stage", whole) + "".join(chips) + mark


def _arrow(report: Report, arrow: Arrow) -> str:
    tip, *feet = arrow_head(arrow.points, _HEAD + 4.0 if arrow.part.state == "failed" else _HEAD)
    neck = ((feet[0][0] + feet[1][0]) / 2, (feet[0][1] + feet[1][1]) / 2)
    path = rounded((*arrow.points[:-1], neck))
    head = f"M{'L'.join(map(_pair, (tip, *feet)))}Z"
    inside = f'<path class="reach" d="{path}"/><path class="line" d="{path}"/><path class="head" d="{head}"/>'
    if arrow.caption:
        x, y = arrow.caption_at
        inside += f'<text class="caption" x="{x:g}" y="{y:g}">{escaped(shortened(arrow.caption, _CAPTION))}</text>'
    return button(arrow.part, report, f"arrow {arrow.phase}", inside)


def rounded(points: Sequence[Point]) -> str:
    """A path through points with rounded corners."""
    found = [f"M{_pair(points[0])}"]
    for (before, corner), (_, after) in pairwise(pairwise(points)):
        found.append(f"L{_pair(_towards(corner, before))}Q{_pair(corner)} {_pair(_towards(corner, after))}")
    found.append(f"L{_pair(points[-1])}")
    return "".join(found)


def _towards(start: Point, end: Point) -> Point:
    """The point where a rounded corner begins: never beyond the middle of its side."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = abs(dx) + abs(dy)
    step = min(_ROUND, length / 2) / length if length else 0.0
    return (start[0] + dx * step, start[1] + dy * step)


def arrow_head(points: Sequence[Point], size: float = _HEAD) -> tuple[Point, Point, Point]:
    """The triangle at the end of a way whose last part is level or upright: tip, then its two feet."""
    (x, y), (px, py) = points[-1], points[-2]
    length = abs(x - px) + abs(y - py) or 1.0
    along, down = (x - px) / length, (y - py) / length
    foot = (x - along * size, y - down * size)
    half = size * 0.5
    return (
        (x, y),
        (foot[0] - down * half, foot[1] + along * half),
        (foot[0] + down * half, foot[1] - along * half),
    )


def _pair(point: Point) -> str:
    return f"{point[0]:g} {point[1]:g}"


def legend(states: Iterable[str]) -> str:
    """What the colours and glyphs mean, as a list."""
    items = (f'<li><span class="swatch {state}">{GLYPHS[state]}</span>{WORDS[state]}</li>' for state in states)
    return f'<ul class="legend">{"".join(items)}</ul>'
