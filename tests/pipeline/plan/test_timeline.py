"""What a timeline says about a step, simulated or measured."""

import math

import pytest

from pipeline.errors import TimelineError
from pipeline.plan.timeline import Span, Timeline
from stages.actions import Action, Kind

F, B, I, W = Kind  # noqa: E741


def span(worker, kind, microbatch, start, end):
    return Span(worker, Action(kind, worker, microbatch), start, end)


MEASURED = (
    span(1, F, 0, 101.0, 102.0),
    span(0, F, 0, 100.0, 101.0),
    span(1, B, 0, 102.0, 104.0),
    span(0, B, 0, 104.0, 106.0),
)


def test_a_measured_step_starts_at_zero_in_order_of_time():
    timeline = Timeline(MEASURED)
    assert [(str(s.action), s.start, s.end) for s in timeline.spans] == [
        ("F0.0", 0.0, 1.0),
        ("F1.0", 1.0, 2.0),
        ("B1.0", 2.0, 4.0),
        ("B0.0", 4.0, 6.0),
    ]
    assert timeline.workers == 2


def test_figures_of_a_step():
    timeline = Timeline(MEASURED)
    assert timeline.step_time == 6.0
    assert timeline.busy == (3.0, 3.0)
    assert timeline.idle == (3.0, 3.0)
    assert timeline.bubble == 0.5
    assert timeline.parallelism == 1.0
    assert timeline.peak_in_flight == (1, 1)
    assert timeline.gaps(0) == ((1.0, 4.0),)
    assert timeline.gaps(1) == ((0.0, 1.0), (4.0, 6.0))


def test_a_worker_that_did_nothing_is_all_bubble():
    timeline = Timeline(MEASURED, workers=3)
    assert timeline.idle[2] == 6.0
    assert timeline.gaps(2) == ((0.0, 6.0),)
    assert timeline.bubble == pytest.approx(12 / 18)


def test_nothing_at_all_is_a_step_of_no_time():
    timeline = Timeline(())
    assert (timeline.step_time, timeline.bubble, timeline.parallelism) == (0.0, 0.0, 0.0)
    assert timeline.gaps(0) == ()
    assert "0.00" in timeline.text()


def test_tapes_are_counted_in_order_of_time_and_not_without_backward():
    spans = [span(0, F, 0, 0, 1), span(0, F, 1, 1, 2), span(0, I, 0, 2, 3), span(0, B, 1, 3, 4), span(0, W, 0, 4, 5)]
    assert Timeline(spans).peak_in_flight == (2,)
    assert Timeline(spans[:2]).peak_in_flight == (0,)


def test_text_is_a_table_in_milliseconds():
    timeline = Timeline(MEASURED, name="measured step")
    assert timeline.text(["bottom", "top"]) == (
        "measured step: step 6000.00 ms, bubble 50.0%, 1.00 of 2 workers busy\n"
        "           busy ms     idle ms    idle  holds\n"
        "bottom     3000.00     3000.00   50.0%      1\n"
        "top        3000.00     3000.00   50.0%      1"
    )
    assert "worker 1 " in str(timeline)
    with pytest.raises(TimelineError, match="each of 2 workers"):
        timeline.text(["only one"])


@pytest.mark.parametrize(
    ("spans", "complaint"),
    [
        ([span(0, F, 0, 2.0, 1.0)], "F0.0 on worker 0 runs from 2.0 s to 1.0 s"),
        ([span(0, F, 0, math.nan, 1.0)], "from nan s"),
        ([span(0, F, 0, 0.0, math.inf)], "to inf s"),
        ([span(0, F, 0, 0.0, 2.0), span(0, F, 1, 1.0, 3.0)], "worker 0 starts F0.1 before F0.0 has ended"),
        ([span(2, F, 0, 0.0, 1.0)], "F2.0 is on worker 2, expected 0 to 1"),
        ([Span(-1, Action(F, 0, 0), 0.0, 1.0)], "F0.0 is on worker -1"),
    ],
)
def test_times_that_cannot_be_are_refused(spans, complaint):
    with pytest.raises(TimelineError, match=complaint):
        Timeline(spans, workers=2)
