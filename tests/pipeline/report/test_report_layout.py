"""The layout of a report's picture: nothing overlaps, arrows end at their stages, every part knows its rows."""

from __future__ import annotations

from itertools import combinations, pairwise, product

import pytest

from pipeline.compare.rows import CHECKS, ROW_KINDS, Edge, Flow
from pipeline.report.layout import (
    BOX,
    PHASES,
    STATES,
    nice_bytes,
    phase_of,
    picture,
    shortened,
    worst_state,
)  # fmt: skip
from tests.pipeline.report import synthetic_reports as reports
from tests.pipeline.report.synthetic_reports import row


def ladder(stages=9):
    """Every stage feeds every later one."""
    names = tuple(f"s{number}" for number in range(stages))
    edges = tuple(Edge(a, b, f"{a}-{b}", 1) for a, b in combinations(names, 2))
    return reports.healthy(rows=tuple(reports.rows(names, edges)), flow=Flow(names, edges, None))


MAKERS = [reports.healthy, reports.failing, reports.towers, reports.long, reports.hostile, ladder]
every_report = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


@every_report
def test_boxes_stand_apart_and_within_the_picture(make):
    drawn = picture(make())
    for box in drawn.boxes:
        assert box.x >= 0 and box.x + BOX <= drawn.width and box.y >= 0 and box.y + box.height <= drawn.height
    for one, other in combinations(drawn.boxes, 2):
        beside = one.x + BOX < other.x or other.x + BOX < one.x
        above = one.y + one.height < other.y or other.y + other.height < one.y
        assert beside or above, (one.stage, other.stage)


@every_report
def test_arrows_go_level_and_upright_from_stage_to_stage_within_the_picture(make):
    report = make()
    drawn = picture(report)
    links = list(dict.fromkeys((edge.producer, edge.consumer) for edge in report.flow.edges))
    assert len(drawn.arrows) == 2 * len(links)
    ends = {(arrow.phase, touched(drawn, arrow.points[0]), touched(drawn, arrow.points[-1])) for arrow in drawn.arrows}
    assert ends == {("forward", a, b) for a, b in links} | {("backward", b, a) for a, b in links}
    for arrow in drawn.arrows:
        for (x, y), (u, v) in pairwise(arrow.points):
            assert x == u or y == v
            assert min(x, u) >= 0 and max(x, u) <= drawn.width and min(y, v) >= 0


def touched(drawn, point):
    """The stage on whose border a point lies."""
    x, y = point
    [found] = [
        box.stage
        for box in drawn.boxes
        if (x in (box.x, box.x + BOX) and box.y < y < box.y + box.height) or (y == box.y and box.x < x < box.x + BOX)
    ]
    return found


@every_report
def test_no_arrow_crosses_a_box(make):
    drawn = picture(make())
    for arrow in drawn.arrows:
        for (x, y), (u, v) in pairwise(arrow.points):
            for box in drawn.boxes:
                inside_x = max(x, u) > box.x and min(x, u) < box.x + BOX
                inside_y = max(y, v) > box.y and min(y, v) < box.y + box.height
                assert not (inside_x and inside_y), (arrow.part.label, box.stage)


@every_report
def test_no_two_arrows_lie_on_each_other(make):
    drawn = picture(make())
    parts = [(arrow.part.label, *part) for arrow in drawn.arrows for part in pairwise(arrow.points)]
    for (one, a, b), (other, c, d) in combinations(parts, 2):
        if one == other:
            continue
        for axis in (0, 1):
            if a[axis] == b[axis] == c[axis] == d[axis]:
                along = 1 - axis
                apart = max(a[along], b[along]) <= min(c[along], d[along]) or max(c[along], d[along]) <= min(
                    a[along], b[along]
                )
                assert apart, (one, other)


def test_arrows_that_share_an_end_do_not_cross():
    drawn = picture(ladder())
    names = {arrow.part.key: arrow.part.label.partition(":")[0].split()[1:] for arrow in drawn.arrows}
    for one, other in combinations(drawn.arrows, 2):
        if set(names[one.part.key][::2]) & set(names[other.part.key][::2]):
            for first, second in product(pairwise(one.points), pairwise(other.points)):
                assert not cross(first, second) and not cross(second, first), (one.part.label, other.part.label)


def cross(level, upright):
    """Whether a level part goes through an upright one."""
    (a, y), (b, v) = level
    (x, c), (u, d) = upright
    return y == v and x == u and min(a, b) < x < max(a, b) and min(c, d) < y < max(c, d)


def test_stages_stand_in_the_column_of_their_longest_way():
    places = {box.stage: box for box in picture(reports.towers()).boxes}
    columns = sorted({box.x for box in places.values()})
    assert {name: columns.index(box.x) for name, box in places.items()} == {
        "left_1": 0, "right": 0, "left_2": 1, "join": 2, "head": 3
    }  # fmt: skip
    assert places["left_1"].y < places["right"].y


def test_every_row_of_a_stage_or_a_hand_off_is_in_the_picture():
    for make in MAKERS:
        report = make()
        held = {index for part in picture(report).parts for index in part.rows}
        missing = [one for index, one in enumerate(report.rows) if index not in held]
        assert missing == [], make.__name__


def test_a_part_holds_its_own_rows_only():
    report = reports.failing()
    parts = {part.key: part for part in picture(report).parts}
    backward = [report.rows[index] for index in parts["link-0-backward"].rows]
    assert {(one.kind, one.stage, one.name) for one in backward} == {
        ("output gradient", "middle", "pool1"),
        ("received output gradient", "bottom", "pool1"),
    }
    middle = [report.rows[index] for index in parts["stage-1-forward"].rows]
    assert [(one.kind, one.name) for one in middle] == [("activation", "pool2")]


def test_of_one_tensor_for_two_stages_only_the_hand_off_that_deviates_is_failed():
    edges = (Edge("a", "b", "x", 1), Edge("a", "c", "x", 1))
    found = [row("activation", "a", "x", peer=edge.consumer) for edge in edges]
    found[1] = row("activation", "a", "x", peer="c", relative=1.0)
    drawn = picture(reports.healthy(rows=tuple(found), flow=Flow(("a", "b", "c"), edges, None)))
    states = {arrow.part.label: arrow.part.state for arrow in drawn.arrows if arrow.phase == "forward"}
    assert states == {"activation a to b: x (1 B)": "equal", "activation a to c: x (1 B)": "failed"}


def test_only_what_deviates_is_failed():
    found = {part.key: part.state for part in picture(reports.failing()).parts}
    failed = {key for key, state in found.items() if state == "failed"}
    assert failed == {"stage-0", "stage-0-backward", "stage-1", "stage-1-backward", "link-0-backward"}
    assert (found["stage-1-forward"], found["stage-2-backward"]) == ("equal", "within")


def test_the_worst_row_decides():
    equal, within = row("gradient", "a", "v"), row("gradient", "a", "v", tolerance=reports.FUSED, relative=1e-8)
    failed = row("gradient", "a", "v", relative=1.0)
    assert [worst_state(rows) for rows in ([], [equal], [equal, within], [failed, equal])] == list(STATES)


def test_a_report_without_a_flow_shows_the_stages_of_its_rows():
    drawn = picture(reports.healthy(flow=Flow()))
    assert {box.stage for box in drawn.boxes} == set(reports.STAGES) and drawn.arrows == ()
    assert picture(reports.healthy(flow=Flow(), rows=())).boxes == ()


def test_every_kind_of_row_has_one_phase():
    for kind in ROW_KINDS:
        assert sum(kind in kinds for kinds in PHASES.values()) == 1, kind
        assert kind in PHASES[phase_of(kind)]
    assert "tape" in CHECKS


@pytest.mark.parametrize(
    ("size", "told"),
    [(0, "0 B"), (999, "999 B"), (1254400, "1.25 MB"), (5e9, "5 GB"), (7.2e12, "7,200 GB")],
)
def test_sizes_are_told_in_three_digits(size, told):
    assert nice_bytes(size) == told


def test_a_long_name_keeps_both_ends():
    assert shortened("encoder_block_7_attention", 11) == "encod…ntion"
    assert shortened("short", 5) == "short"
