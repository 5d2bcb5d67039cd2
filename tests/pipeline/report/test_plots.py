"""The picture of a timeline holds a box for every action, a hatched one for every gap, and what explains them."""

import subprocess
import sys
from collections import Counter

import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from pipeline.errors import TimelineError
from pipeline.plan.plan import Plan
from pipeline.plan.schedules import build_plan, forward_only
from pipeline.plan.simulator import Cost, simulate
from pipeline.plan.timeline import Timeline
from pipeline.report.timeline_figure import save_timeline, timeline_figure
from stages.actions import Action, Kind

F, B, I, W = Kind  # noqa: E741


def boxes(axes, hatched):
    """The boxes of one panel, as (worker, start ms, end ms)."""
    rectangles = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return Counter(
        (round(r.get_y() + r.get_height() / 2), round(r.get_x(), 6), round(r.get_x() + r.get_width(), 6))
        for r in rectangles
        if bool(r.get_hatch()) == hatched
    )


def words(figure):
    """All that is written outside the axes' ticks."""
    legend = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    panels = [text.get_text() for axes in figure.axes for text in axes.texts]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    return [*legend, *panels, *titles, *(text.get_text() for text in figure.texts)]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_every_action_and_every_gap_has_its_box(schedule):
    timeline = simulate(build_plan(schedule, 3, 4), Cost(0.010, 0.012, 0.008))
    [axes] = timeline_figure(timeline).axes
    spans = Counter((s.worker, round(s.start * 1e3, 6), round(s.end * 1e3, 6)) for s in timeline.spans)
    gaps = Counter((w, round(a * 1e3, 6), round(b * 1e3, 6)) for w in range(3) for a, b in timeline.gaps(w))
    assert boxes(axes, hatched=False) == spans
    assert boxes(axes, hatched=True) == gaps
    assert axes.get_ylim() == (2.5, -0.5)  # worker 0 on top
    assert axes.get_xlabel() == "time in ms"


def test_boxes_are_numbered_and_the_bubble_is_a_percentage():
    figure = timeline_figure(simulate(build_plan("1f1b", 2, 8), Cost(0.010, 0.020)))
    written = words(figure)
    assert Counter(word for word in written if word.isdigit()) == {str(m): 4 for m in range(8)}
    assert written.count("idle 11.1%") == 2
    assert {"forward", "backward", "bubble", "1f1b: 2 stages, 8 microbatches"} <= set(written)
    assert "step 270.0 ms    bubble 11.1%    1.78 of 2 workers busy" in written


def test_forward_backward_and_halves_have_their_own_colours_in_the_legend():
    rows = ((Action(F, 0, 0), Action(B, 0, 0)), (Action(F, 1, 0), Action(I, 1, 0), Action(W, 1, 0)))
    figure = timeline_figure(simulate(Plan("halves", 2, 1, rows), Cost(1, 1, 1)))
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "forward",
        "backward",
        "input gradient",
        "weight gradient",
        "bubble",
    ]
    colours = [to_hex(patch.get_facecolor()) for patch in legend.get_patches()]
    assert len({colours[0], colours[1], colours[3], colours[4]}) == 4


def test_numbers_that_would_not_fit_are_left_out():
    figure = timeline_figure(simulate(build_plan("1f1b", 2, 200), Cost(0.001, 0.002)))
    assert not any(word.isdigit() for word in words(figure))


def test_labels_name_the_stage_and_the_window_where_there_are_several():
    actions = tuple(Action(F, stage, 0, window) for stage in (0, 1) for window in (0, 1))
    plan = Plan("one worker", 2, 1, (actions,), (0, 0), windows=2, training=False)
    written = words(timeline_figure(simulate(plan, Cost(1, 1))))
    assert [word for word in written if "/" in word] == ["0.0/0", "0.0/1", "1.0/0", "1.0/1"]


def test_panels_share_one_time_axis_so_that_they_can_be_compared():
    slow = simulate(build_plan("gpipe", 2, 4), Cost(2, 2))
    fast = simulate(build_plan("1f1b", 3, 4), Cost(1, 1))
    figure = timeline_figure({"predicted": slow, "measured": fast}, title="One step")
    first, second = figure.axes
    assert first.get_xlim() == second.get_xlim() == (0, slow.step_time * 1e3)
    assert first.get_title(loc="left").startswith("predicted    step 20,000 ms")
    assert second.get_title(loc="left").startswith("measured ")
    assert "One step" in words(figure)
    assert first.get_position().y0 > second.get_position().y1


def test_workers_can_be_named_and_long_names_are_shortened():
    timeline = simulate(build_plan("1f1b", 2, 2), Cost(1, 1))
    [axes] = timeline_figure(timeline, names=["convolutions", "a" * 40]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["convolutions", "a" * 23 + "…"]
    [axes] = timeline_figure(timeline).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["worker 0", "worker 1"]
    with pytest.raises(TimelineError, match="each of 2 workers"):
        timeline_figure(timeline, names=["only one"])


def test_nothing_reaches_over_the_edge_of_the_picture():
    timeline = simulate(build_plan("1f1b", 3, 4), Cost(1, 1))
    figure = timeline_figure({"predicted": timeline, "measured": timeline}, names=["a" * 40, "b", "m" * 24])
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    edge = figure.bbox
    parts = [*figure.texts, *figure.legends, *(text for axes in figure.axes for text in axes.texts)]
    parts += [label for axes in figure.axes for label in [*axes.get_yticklabels(), axes.xaxis.label]]
    for part in parts:
        box = part.get_window_extent(renderer)
        assert edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1, part


def test_a_saved_picture_is_a_png_of_the_full_width(tmp_path):
    path = save_timeline(simulate(forward_only(2, 2), Cost(1, 1)), tmp_path / "new" / "directory" / "step.png")
    assert path == tmp_path / "new" / "directory" / "step.png"
    height, width, _ = imread(path).shape
    assert width == 1650
    assert height > 200


def test_an_empty_timeline_is_an_empty_picture(tmp_path):
    assert save_timeline(Timeline(()), tmp_path / "empty.png").stat().st_size > 0


def test_drawing_leaves_pyplot_and_the_users_backend_alone(tmp_path):
    code = f"""
import sys
from pipeline.report.timeline_figure import save_timeline
from pipeline.plan.schedules import build_plan
from pipeline.plan.simulator import Cost, simulate
assert "matplotlib" not in sys.modules
save_timeline(simulate(build_plan("1f1b", 2, 2), Cost(1, 1)), {str(tmp_path / "a.png")!r})
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
