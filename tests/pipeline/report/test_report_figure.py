"""The figure of a report: the pipeline in the colours of its verdicts, every difference beside its tolerance."""

from __future__ import annotations

import subprocess
import sys

import pytest
from matplotlib.colors import to_hex

from pipeline.compare.rows import Flow
from pipeline.report.figure import COLOURS, figure
from pipeline.report.layout import picture
from pipeline.report.report import Report
from tests.pipeline.report import synthetic_reports as reports
from tests.sources import ROOT


def words(axes):
    return [text.get_text() for text in axes.texts]


def points(axes):
    """{state: the (number, size) of its rows}."""
    told = {"equal bits": "equal", "within tolerance": "within", "differs": "failed"}
    return {
        told[found.get_label()]: [tuple(map(float, point)) for point in found.get_offsets()]
        for found in axes.collections
        if found.get_label() in told
    }


def test_every_row_is_a_point_in_the_colour_of_its_verdict():
    report = reports.failing()
    _, axes = figure(report).axes
    drawn = points(axes)
    failed = [(float(k), row.relative) for k, row in enumerate(report.rows) if not row.ok]
    assert drawn["failed"] == failed and len(failed) == 3
    assert sum(map(len, drawn.values())) == len(report.rows)
    [marks] = [found for found in axes.collections if found.get_label() == "differs"]
    assert to_hex(marks.get_facecolor()[0]) == COLOURS["failed"]
    assert axes.get_yscale() == "log"


def test_points_above_their_dash_are_those_that_deviate():
    report = reports.failing()
    _, axes = figure(report).axes
    [dashes] = [found for found in axes.collections if found.get_label() == "allowed"]
    allowed = {round((a[0] + b[0]) / 2): a[1] for a, b in dashes.get_segments()}
    assert allowed == {k: row.tolerance for k, row in enumerate(report.rows) if row.tolerance}
    for state, found in points(axes).items():
        for k, size in found:
            if int(k) in allowed:
                assert (size > allowed[int(k)]) == (state == "failed")


def test_equal_bits_lie_below_all_differences_and_what_is_no_number_above():
    report = reports.not_finite()
    _, axes = figure(report).axes
    drawn = points(axes)
    [floor] = {size for _, size in drawn["equal"]}
    assert floor < min(size for _, size in drawn["within"])
    [(_, top)] = drawn["failed"]
    assert top > max(row.tolerance for row in report.rows)
    bottom, roof = axes.get_ylim()
    assert bottom < floor and top < roof
    labels = {tick.get_text() for tick in axes.get_yticklabels()}
    assert {"equal", "inf, nan"} <= labels


def test_the_pipeline_is_drawn_with_its_culprit():
    report = reports.failing()
    above, _ = figure(report).axes
    assert {"bottom", "middle", "top", "pool1", "pool2", "skip", "first to deviate"} <= set(words(above))
    thick = {to_hex(line.get_color()) for line in above.lines if line.get_linewidth() > 2}
    assert thick == {COLOURS["failed"]}
    assert len(above.lines) == len(picture(report).arrows) == 6
    assert sum(to_hex(line.get_color()) == COLOURS["failed"] for line in above.lines) == 1


def test_the_verdict_is_written_in_full_in_two_lines():
    sentence = "stage 'encoder' sends another dL/dblock_3_out to 'embedding' in microbatch 2 (tape: by 1.2e-01)"
    found = figure(reports.failing(sentence))
    told = [text.get_text() for text in found.texts]
    assert " ".join(told[:-1]) == f"NOT equal to one tape: {sentence}" and len(told) == 3
    assert told[-1] == "3 stages, 4 microbatches, 1f1b, compiled"


@pytest.mark.parametrize("make", [reports.failing, reports.long, reports.towers], ids=lambda make: make.__name__)
def test_nothing_reaches_over_the_edge(make):
    found = figure(make())
    found.canvas.draw()
    edge = found.bbox
    parts = [*found.texts, *(text for axes in found.axes for text in axes.texts)]
    parts += [
        label for axes in found.axes[1:] for label in (*axes.get_yticklabels(), axes.xaxis.label, axes.yaxis.label)
    ]
    for part in parts:
        box = part.get_window_extent()
        assert edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1, part


def test_names_are_not_read_as_mathematics():
    report = reports.healthy(headline="a $x^ b $")
    found = figure(report)
    found.canvas.draw()
    assert found.texts[-1].get_text() == r"a \$x^ b \$"


@pytest.mark.parametrize(
    "report",
    [reports.healthy(flow=Flow(), rows=()), Report((), (), 1.0, 1.0, reports.BITS, "nothing"), reports.hostile()],
    ids=["no pipeline", "no rows", "hostile"],
)
def test_any_report_can_be_drawn(tmp_path, report):
    assert report.save(tmp_path / "report.png").stat().st_size > 0


def test_drawing_leaves_pyplot_alone_and_needs_no_tensorflow(tmp_path):
    code = f"""
import sys
from tests.pipeline.report import synthetic_reports as reports
for suffix in ("png", "html", "json", "txt"):
    reports.failing().save({str(tmp_path)!r} + "/report." + suffix)
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
assert "tensorflow" not in sys.modules and "keras" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
