"""The layout of a report's picture: boxes and arrows with their places; one for the page and the figure.

    lane 1      ┌────────────────────────────────────┐         skip edges: up, over, down; the longest on top
    lane 0      │                 ┌────────────────┐ │
              ┌─┴───────┐ ──► ┌───┴─────┐ ──► ┌────▼─▼──┐      activations to the right,
              │ stage   │     │ stage   │     │ stage   │      output gradients back beside them
              │ F  B  S │ ◄── │ F  B  S │ ◄── │ F  B  S │      verdicts of forward, backward, state
              └─────────┘     └─────────┘     └─────────┘
              column 0        column 1        column 2         the longest way from a source

Each part of the picture knows the rows of the report that it stands for, so that a click on it shows just those.
Lengths are in pixels, x to the right, y down.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.compare.rows import Edge, Row
from pipeline.report.report import Report

PHASES = {
    "forward": ("activation", "received activation", "loss"),
    "backward": ("output gradient", "received output gradient", "gradient", "directional derivative"),
    "state": ("statistics", "seed", "weight", "optimizer", "metric", "prediction", "left as it was"),
}
"""The kinds of rows by what a stage does."""
STATES = ("none", "equal", "within", "failed")
"""What a part of the picture can be, the worst last."""
WORDS = {
    "none": "not compared",
    "equal": "equal bits",
    "within": "within tolerance",
    "failed": "differs",
}
"""The states for readers."""

BOX, TALL, CHIP = 240.0, 78.0, 22.0
GUTTER, LEVEL, LANE, MARGIN = 124.0, 60.0, 34.0, 20.0
_PORT, _PAIR, _EAVES, _APART = 34.0, 6.0, 14.0, 22.0

Point = tuple[float, float]


@dataclass(frozen=True)
class Clickable:
    """Something in the picture that can be clicked.

    Attributes:
        key: Unique in the picture.
        label: What it is, in words.
        state: One of `STATES`, the worst of its rows.
        rows: Which of the report's rows it stands for, by index.
    """

    key: str
    label: str
    state: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A stage: `whole` is all of it, `phases` its forward, backward and state."""

    stage: str
    x: float
    y: float
    height: float
    whole: Clickable
    phases: tuple[Clickable, ...]


@dataclass(frozen=True)
class Arrow:
    """The tensors between two stages in one direction: `points` from tail to head; `caption` only for activations."""

    part: Clickable
    points: tuple[Point, ...]
    phase: str
    caption: str = ""
    caption_at: Point = (0.0, 0.0)


@dataclass(frozen=True)
class Picture:
    """Boxes and arrows, and the size that holds them."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    width: float
    height: float

    @property
    def parts(self) -> tuple[Clickable, ...]:
        """Everything that can be clicked."""
        boxes = [part for box in self.boxes for part in (box.whole, *box.phases)]
        return (*boxes, *(arrow.part for arrow in self.arrows))


def worst_state(rows: Iterable[Row]) -> str:
    """The worst of some rows: one of `STATES`."""
    found = "none"
    for row in rows:
        state = "failed" if not row.ok else "equal" if row.difference == 0.0 else "within"
        found = max(found, state, key=STATES.index)
    return found


def phase_of(kind: str) -> str:
    """The phase that a kind of row belongs to."""
    return next((phase for phase, kinds in PHASES.items() if kind in kinds), "state")


def picture(report: Report) -> Picture:
    """Lay a report's pipeline out; without a recorded flow the stages that its rows name, side by side."""
    stages = report.flow.stages or tuple(dict.fromkeys(row.stage for row in report.rows if row.stage))
    links = _links(stages, report.flow.edges)
    columns = _columns(stages, links)
    skips = [link for link in links if columns[link[1]] - columns[link[0]] > 1]
    lanes = _lanes(stages, skips, columns)
    top = MARGIN + LANE * (max(lanes.values(), default=-1) + 1)
    places = _places(stages, links, columns, top)
    boxes = tuple(_box(report, number, stage, *places[stage]) for number, stage in enumerate(stages))
    arrows: list[Arrow] = []
    for number, link in enumerate(links):
        tensors = [edge for edge in report.flow.edges if (edge.producer, edge.consumer) == link]
        ends = _skip(link, skips, columns, lanes, places) if link in skips else _next(link, links, columns, places)
        arrows += _arrows(report, number, link, tensors, *ends)
    right = max((box.x + BOX for box in boxes), default=0.0)
    bottom = max((box.y + box.height for box in boxes), default=0.0)
    return Picture(boxes, tuple(arrows), right + MARGIN, bottom + MARGIN)


Link = tuple[str, str]
BoxPlace = tuple[float, float, float]


def _links(stages: Sequence[str], edges: Sequence[Edge]) -> list[Link]:
    """The pairs of stages between which something crosses, forward in the stages' order."""
    order = {stage: number for number, stage in enumerate(stages)}
    pairs = dict.fromkeys((edge.producer, edge.consumer) for edge in edges)
    known = [pair for pair in pairs if pair[0] in order and pair[1] in order and order[pair[0]] < order[pair[1]]]
    return sorted(known, key=lambda pair: (order[pair[0]], order[pair[1]]))


def _columns(stages: Sequence[str], links: Sequence[Link]) -> dict[str, int]:
    if not links:
        return {stage: number for number, stage in enumerate(stages)}
    columns: dict[str, int] = {}
    for stage in stages:  # in order: everything upstream has its column already
        columns[stage] = max((columns[producer] + 1 for producer, consumer in links if consumer == stage), default=0)
    return columns


def _lanes(stages: Sequence[str], skips: Sequence[Link], columns: dict[str, int]) -> dict[Link, int]:
    """The shortest first and lowest; two that overlap never share a lane."""
    lanes: dict[Link, int] = {}
    for link in sorted(skips, key=lambda pair: (columns[pair[1]] - columns[pair[0]], stages.index(pair[0]))):
        start, end = columns[link[0]], columns[link[1]]
        taken = {
            lane for other, lane in lanes.items() if columns[other[0]] <= end and start <= columns[other[1]]
        }  # fmt: skip
        lanes[link] = next(lane for lane in range(len(skips)) if lane not in taken)
    return lanes


def _places(stages: Sequence[str], links: Sequence[Link], columns: dict[str, int], top: float) -> dict[str, BoxPlace]:
    """Left, top and height of each stage's box; columns are centred beside the tallest."""

    def height(stage: str) -> float:
        near = [link for link in links if columns[link[1]] - columns[link[0]] == 1]
        ports = max(sum(link[side] == stage for link in near) for side in (0, 1)) if near else 0
        return max(TALL, _PORT * ports + 12.0)

    members: dict[int, list[str]] = {}
    for stage in stages:
        members.setdefault(columns[stage], []).append(stage)
    total = {column: sum(map(height, rows)) + LEVEL * (len(rows) - 1) for column, rows in members.items()}
    tallest = max(total.values(), default=0.0)
    places: dict[str, BoxPlace] = {}
    for column, rows in members.items():
        y = top + (tallest - total[column]) / 2
        for stage in rows:
            places[stage] = (MARGIN + column * (BOX + GUTTER), y, height(stage))
            y += height(stage) + LEVEL
    return places


def _box(report: Report, number: int, stage: str, x: float, y: float, height: float) -> Box:
    mine = [
        (index, row)
        for index, row in enumerate(report.rows)
        if row.stage == stage and not row.kind.startswith("received")
    ]
    phases = tuple(
        _part(f"stage-{number}-{phase}", f"{stage}: {phase}", [one for one in mine if one[1].kind in kinds])
        for phase, kinds in PHASES.items()
    )
    return Box(stage, x, y, height, _part(f"stage-{number}", stage, mine), phases)


def _part(key: str, label: str, rows: Sequence[tuple[int, Row]]) -> Clickable:
    return Clickable(key, label, worst_state(row for _, row in rows), tuple(index for index, _ in rows))


def _next(link: Link, links: Sequence[Link], columns: dict[str, int], places: dict[str, BoxPlace]) -> tuple[Point, ...]:
    """The way to a stage in the next column."""
    near = [one for one in links if columns[one[1]] - columns[one[0]] == 1]

    def port(side: int) -> float:
        _, y, height = places[link[side]]
        mates = sorted((one for one in near if one[side] == link[side]), key=lambda one: places[one[1 - side]][1])
        return y + height / 2 + (mates.index(link) - (len(mates) - 1) / 2) * _PORT

    start, end = (places[link[0]][0] + BOX, port(0)), (places[link[1]][0], port(1))
    if start[1] == end[1]:
        return (start, end)
    bends = [one for one in near if columns[one[0]] == columns[link[0]]]
    middle = (start[0] + end[0]) / 2 + (bends.index(link) - (len(bends) - 1) / 2) * 2 * _PAIR
    return (start, (middle, start[1]), (middle, end[1]), end)


def _skip(
    link: Link, skips: Sequence[Link], columns: dict[str, int], lanes: dict[Link, int], places: dict[str, BoxPlace]
) -> tuple[Point, ...]:
    """The way over the stages in between: out of one roof and into the other, through the gutter from a lower row.

    Of several at one roof the highest lane is outermost all the way, so that they do not cross each other.
    """
    lane = min(y for _, y, _ in places.values()) - LANE * (lanes[link] + 0.65)

    def end(side: int) -> tuple[Point, ...]:
        stage, out = link[side], 1 - 2 * side  # out: +1 leaves to the right, -1 comes from the left
        x, y, _ = places[stage]
        mates = sorted((one for one in skips if one[side] == stage), key=lambda one: -lanes[one])
        inner, outer = mates.index(link), len(mates) - 1 - mates.index(link)
        apart = min(_APART, (BOX / 2 - _EAVES - _PAIR) / len(mates))
        wall = x + BOX if side == 0 else x
        door = wall - out * (_EAVES + apart * (outer + 1))
        if all(places[other][1] >= y for other in columns if columns[other] == columns[stage]):
            return ((door, y), (door, lane))
        level = y - 0.6 * apart - apart * outer
        gutter = wall + out * 0.8 * apart * (inner + 1)
        return ((door, y), (door, level), (gutter, level), (gutter, lane))

    return (*end(0), *reversed(end(1)))


def _arrows(report: Report, number: int, link: Link, tensors: Sequence[Edge], *way: Point) -> list[Arrow]:
    names = {edge.tensor for edge in tensors}
    size = sum(edge.bytes for edge in tensors)
    caption = next(iter(names)) if len(names) == 1 else f"{len(names)} tensors"
    crossing = [
        (index, row)
        for index, row in enumerate(report.rows)
        if row.name in names and row.stage in link and row.peer in ("", *link)
    ]
    arrows = []
    listed = ", ".join(edge.tensor for edge in tensors)
    for phase, side in (("forward", -1.0), ("backward", 1.0)):
        rows = [one for one in crossing if phase_of(one[1].kind) == phase]
        words = f"activation {link[0]} to {link[1]}" if phase == "forward" else f"gradient {link[1]} to {link[0]}"
        label = f"{words}: {listed} ({nice_bytes(size)})"
        points = _beside(way, side * _PAIR)
        arrows.append(
            Arrow(
                _part(f"link-{number}-{phase}", label, rows),
                points if phase == "forward" else points[::-1],
                phase,
                caption if phase == "forward" else "",
                _caption_at(points),
            )
        )
    return arrows


def _beside(way: Sequence[Point], distance: float) -> tuple[Point, ...]:
    """The same way, so far to the right of it as seen by who goes along; all its parts are level or upright."""
    if len(way) == 2:
        return tuple((x, y + distance) for x, y in way)
    sides = [(_sign(b[0] - a[0]), _sign(b[1] - a[1])) for a, b in pairwise(way)]
    shifted = []
    for index, (x, y) in enumerate(way):
        around = {sides[max(index - 1, 0)], sides[min(index, len(sides) - 1)]}
        for along, down in around:  # a corner is moved by both of its parts
            x, y = x - down * distance, y + along * distance
        shifted.append((x, y))
    return tuple(shifted)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _caption_at(points: Sequence[Point]) -> Point:
    """Above the middle of the first level part, or of the longest one if it is longer than a gutter."""
    level = [(a, b) for a, b in pairwise(points) if a[1] == b[1]]
    long = max(level, key=lambda part: abs(part[1][0] - part[0][0]), default=(points[0], points[-1]))
    start, end = long if abs(long[1][0] - long[0][0]) > GUTTER else (level[0] if level else long)
    return ((start[0] + end[0]) / 2, start[1] - 5.0)


def nice_bytes(size: float) -> str:
    """A size as people read it: ``1.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
        size /= 1000
    raise AssertionError("the loop ends with GB")


def shortened(text: str, longest: int) -> str:
    """At most so many characters, with an ellipsis in place of the middle: names differ at both ends."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[len(text) - (longest - 1 - head) :]}"
