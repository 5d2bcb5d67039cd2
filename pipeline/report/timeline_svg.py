"""The timeline of a verified step as inline SVG: a row for each worker, a box for each action, words on demand.

The boxes are one stop for the Tab key; the arrow keys go from box to box (`report/page/page.js`).
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.plan.timeline import Span, Timeline
from stages.plain_text import escaped

WIDTH, GUTTER, RIGHT, ROW, BOX, AXIS = 1080.0, 150.0, 70.0, 34.0, 26.0, 34.0
"""Pixels: whole width, room for the workers' names, for their idle share, a row, a box in it, the axis."""
_DIGIT = 7.0
_NAME = 20


def timeline_svg(timeline: Timeline, stages: Sequence[str]) -> str:
    """The timeline as an ``<svg>`` element.

    Args:
        timeline: When each worker did what.
        stages: The stages' names by number.
    """
    height = timeline.workers * ROW + AXIS
    scale = (WIDTH - GUTTER - RIGHT) / (timeline.step_time or 1.0)
    rows = "".join(_row(timeline, worker, scale, stages) for worker in range(timeline.workers))
    return (
        f'<svg class="timeline" role="group" aria-label="Timeline of the step; the arrow keys go from action to action"'
        f' width="{WIDTH:g}" height="{height:g}" viewBox="0 0 {WIDTH:g} {height:g}">'
        f"{rows}{_axis(timeline, scale)}</svg>"
    )


def worker_names(timeline: Timeline, stages: Sequence[str]) -> list[str]:
    """Each worker by the stages it hosts."""
    names = []
    for worker in range(timeline.workers):
        hosted = sorted({span.action.stage for span in timeline.of_worker(worker)})
        known = [stages[stage] for stage in hosted if stage < len(stages)]
        names.append(", ".join(known) or f"worker {worker}")
    return names


def _row(timeline: Timeline, worker: int, scale: float, stages: Sequence[str]) -> str:
    from pipeline.report.layout import shortened

    top = worker * ROW
    name = worker_names(timeline, stages)[worker]
    idle = timeline.idle[worker] / timeline.step_time if timeline.step_time else 0.0
    middle = top + ROW / 2 + 4
    boxes = "".join(_box(span, top, scale, stages) for span in timeline.of_worker(worker))
    return (
        f'<g class="worker"><text class="who" x="{GUTTER - 10:g}" y="{middle:g}">{escaped(shortened(name, _NAME))}'
        f"<title>{escaped(name)}</title></text>"
        f'<rect class="bubble" x="{GUTTER:g}" y="{top + (ROW - BOX) / 2:g}" width="{timeline.step_time * scale:.6g}" '
        f'height="{BOX:g}"/>{boxes}'
        f'<text class="idle" x="{WIDTH - RIGHT + 8:g}" y="{middle:g}">idle {idle:.0%}</text></g>'
    )


def _box(span: Span, top: float, scale: float, stages: Sequence[str]) -> str:
    action = span.action
    stage = stages[action.stage] if action.stage < len(stages) else f"stage {action.stage}"
    words = (
        f"{stage}: {action.describe()}, {span.duration * 1e3:.3g} ms, "
        f"from {span.start * 1e3:.4g} to {span.end * 1e3:.4g} ms, on worker {span.worker}"
    )
    x, width = GUTTER + span.start * scale, max(span.duration * scale, 0.5)
    number = f"{action.microbatch}/{action.window}" if action.window else str(action.microbatch)
    label = ""
    if width > _DIGIT * len(number) + 4:
        label = f'<text x="{x + width / 2:.6g}" y="{top + ROW / 2 + 4:g}">{number}</text>'
    return (
        f'<g class="span {action.kind.name.lower()}" role="img" tabindex="-1" data-tip="{escaped(words)}" '
        f'data-microbatch="{action.microbatch}" data-stage="stage-{action.stage}" aria-label="{escaped(words)}">'
        f'<rect x="{x:.6g}" y="{top + (ROW - BOX) / 2:g}" width="{width:.6g}" height="{BOX:g}" rx="2"/>{label}</g>'
    )


def _axis(timeline: Timeline, scale: float) -> str:
    """A line with about eight round numbers of milliseconds."""
    y = timeline.workers * ROW + 2
    span_ms = timeline.step_time * 1e3
    line = f'<line x1="{GUTTER:g}" x2="{GUTTER + timeline.step_time * scale:.6g}" y1="{y:g}" y2="{y:g}"/>'
    ticks = []
    step = _round_step(span_ms / 8)
    for number in range(int(span_ms / step) + 1 if step else 1):
        x = GUTTER + number * step / 1e3 * scale
        ticks.append(
            f'<line x1="{x:.6g}" x2="{x:.6g}" y1="{y:g}" y2="{y + 4:g}"/>'
            f'<text x="{x:.6g}" y="{y + 18:g}">{number * step:g}{" ms" if number == 0 else ""}</text>'
        )
    return f'<g class="axis">{line}{"".join(ticks)}</g>'


def _round_step(least: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    if least <= 0.0:
        return 0.0
    power = (
        10.0 ** (len(f"{int(least)}") - 1)
        if least >= 1
        else 10.0 ** -next(places for places in range(1, 12) if least * 10**places >= 1 or places == 11)
    )
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least)
