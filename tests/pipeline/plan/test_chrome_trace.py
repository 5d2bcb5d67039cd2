"""Traces keep the format's own rules, say what the timeline says, and take their place at once or not at all."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import TimelineError
from pipeline.plan import chrome_trace
from pipeline.plan.chrome_trace import trace_of
from pipeline.plan.plan import Plan
from pipeline.plan.schedules import SCHEDULES, build_plan
from pipeline.plan.simulator import Cost, simulate
from pipeline.plan.step_events import StepEvents, StepRecord, events_of
from pipeline.plan.timeline import measured_timeline
from stages.actions import Action, Kind
from stages.worker.step_notes import Passage, StepNotes
from tests import measured_steps, trace_events

COSTS = (Cost(0.01, 0.01, 0.01, 0.002), Cost(0.02, 0.02, 0.01, 0.001), Cost(0.01, 0.02, 0.02))
STEP = measured_steps.step(
    COSTS, names=("bottom", "middle", "top"), driver={"callbacks": 0.004, "data": 0.002}, update=0.003
)


@pytest.mark.gate
@given(
    st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=4),
    st.integers(1, 6),
    st.sampled_from(sorted(SCHEDULES)),
    st.floats(-1e5, 1e6),
    st.integers(1, 3),
)
def test_every_trace_keeps_the_rules_of_its_format(costs, microbatches, schedule, origin, steps):
    if schedule == "interleaved" and (len(costs) % 2 or microbatches % max(1, len(costs) // 2)):
        schedule = "1f1b"
    if schedule == "zb-v" and len(costs) % 2:
        schedule = "zb-h1"
    step = measured_steps.step([Cost(*each) for each in costs], microbatches, schedule, driver={"data": 0.5})
    later = [replace(step, origin=origin + k * (step.step_time + 0.5)) for k in range(steps)]
    assert trace_events.faults(trace_of(later)) == []


def test_a_simulated_step_is_a_trace_too():
    trace = trace_of([simulate(build_plan("zb-h1", 3, 4), COSTS)])
    assert trace_events.faults(trace) == []
    assert list(trace_events.tracks(trace).values()) == ["worker 0", "worker 1", "worker 2"]


def test_a_trace_says_when_which_action_ran_where():
    trace = trace_of([STEP])
    names = trace_events.tracks(trace)
    assert list(names.values()) == ["driver", "worker 0: bottom", "worker 1: middle", "worker 2: top"]
    found = {
        (e["name"], names[e["tid"]].split(":")[0], round(e["ts"] / 1e6 - 0.006, 9), round(e["dur"] / 1e6, 9))
        for kind in (Kind.FORWARD, Kind.BACKWARD)
        for e in trace_events.slices(trace, kind.phrase)
    }
    assert found == {(str(s.action), f"worker {s.worker}", round(s.start, 9), round(s.duration, 9)) for s in STEP.spans}
    microbatches = [e["args"]["microbatch"] for e in trace_events.slices(trace, "forward") if e["args"]["stage"] == 1]
    assert microbatches == [0, 1, 2, 3]


def test_a_trace_has_every_message_with_its_bytes_and_every_wait_with_whom_it_is_for():
    trace = trace_of([STEP])
    sent = trace_events.slices(trace, "send")
    assert len(sent) == 2 * 2 * 4  # two cuts, both ways, four microbatches
    assert {e["args"]["bytes"] for e in sent} == {measured_steps.SIZE}
    assert {(e["args"]["from"], e["args"]["to"]) for e in sent} == {
        *(("worker 0", "worker 1"), ("worker 1", "worker 2")),
        *(("worker 1", "worker 0"), ("worker 2", "worker 1")),
    }
    assert len([e for e in trace["traceEvents"] if e["ph"] == "s"]) == len(sent)
    first = min(trace_events.slices(trace, "wait"), key=lambda e: (e["ts"], e["tid"]))
    assert (first["name"], first["args"]["for"]) == ("wait for worker 0", "activation h")
    assert first["dur"] == pytest.approx((COSTS[0].forward + COSTS[0].transfer) * 1e6)


def test_a_trace_shows_the_driver_and_the_update():
    trace = trace_of([STEP])
    driver = [(e["name"], e["ts"], e["dur"]) for e in trace_events.slices(trace, "driver")]
    assert driver[:2] == [("callbacks", 0.0, 4000.0), ("data", 4000.0, 2000.0)]
    assert [(e["ts"], e["dur"]) for e in trace_events.slices(trace, "update")] == [(0.0, 3000.0)] * 3


def passage(kind, stage, source, microbatch, begin, end):
    return Passage(kind, stage, source, "h", microbatch, 0, begin, end, 40)


def test_clocks_of_workers_that_do_not_share_the_drivers_are_corrected():
    """Worker 1's clock is 1000 s ahead, as on another host: its forward still begins behind the message it takes."""
    actions = [Action(Kind.FORWARD, stage, 0) for stage in (0, 1)]
    plan = Plan("own", 2, 1, ((actions[0],), (actions[1],)), training=False)
    there = passage("activation", 1, 0, 0, 0.5, 0.5)
    record = StepRecord(
        (
            StepNotes(0.0, 0.5, sent=(passage("activation", 1, 0, 0, 0.3, 0.4),)),
            StepNotes(1000.0, 1001.0, taken=(replace(there, begin=1000.1, end=1000.5),), update=(999.0, 999.5)),
        ),
        *((), 0.0, 0.1, 1.2),
    )
    events = events_of(record, StepEvents(plan, {0: (), 1: (0,)}))
    assert events.offsets[0] == 0.0
    assert 999.8 <= events.offsets[1] <= 1000.0
    timeline = measured_timeline([[(0.1, 0.45)], [(1000.6, 1000.9)]], events)
    [one] = timeline.events.transits
    assert one.sent < one.taken <= timeline.of_worker(1)[0].start
    assert timeline.of_worker(1)[0].start == pytest.approx(1000.6 - events.offsets[1] - 0.1)
    assert timeline.events.updates[0].start == pytest.approx(999.0 - events.offsets[1] - 0.1)
    assert trace_events.faults(trace_of([timeline])) == []


def test_a_file_is_written_whole_and_replaces_an_older_one(tmp_path):
    path = tmp_path / "new folder" / "trace.json"
    for _ in range(2):
        assert STEP.save(path, ["a", 'b "quoted"\n', "c \u2192"]) == path
    assert trace_events.read(path) == json.loads(json.dumps(trace_of([STEP], ["a", 'b "quoted"\n', "c \u2192"])))
    assert [each.name for each in path.parent.iterdir()] == ["trace.json"]


def test_what_cannot_be_written_leaves_the_older_file(tmp_path, monkeypatch):
    path = STEP.save(tmp_path / "trace.json")
    before = path.read_bytes()
    monkeypatch.setattr(chrome_trace.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        STEP.save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["trace.json"]


@pytest.mark.parametrize("name", ["trace.png", "trace", "trace.json.txt"])
def test_another_ending_is_refused(tmp_path, name):
    with pytest.raises(TimelineError, match=r"a trace is written as \.json, received .*save_timeline"):
        STEP.save(tmp_path / name)


def test_nothing_and_steps_of_different_pipelines_are_refused():
    with pytest.raises(TimelineError, match="no step to write"):
        trace_of([])
    with pytest.raises(TimelineError, match="equally many workers"):
        trace_of([STEP, simulate(build_plan("1f1b", 2, 2), COSTS[:2])])
    with pytest.raises(TimelineError, match="must name each of 3 workers"):
        STEP.save("trace.json", ["one"])


BAD = {
    "a slice without its end": lambda e: e.update(ph="B"),
    "a time in the past": lambda e: e.update(ts=-1.0),
    "a number as text": lambda e: e.update(ts="0"),
    "track 0": lambda e: e.update(tid=0),
    "an unnamed track": lambda e: e.update(tid=77),
    "a slice that reaches into the next": lambda e: e.update(dur=e["dur"] + 15000.0),
}


@pytest.mark.parametrize("bad", BAD)
def test_the_rules_see_what_is_wrong(bad):
    trace = trace_of([STEP])
    BAD[bad](trace_events.slices(trace, "forward")[0])
    assert trace_events.faults(trace)


def test_the_rules_see_a_lost_arrow_and_a_wrong_order():
    trace = trace_of([STEP])
    trace["traceEvents"].remove(next(e for e in trace["traceEvents"] if e["ph"] == "f"))
    assert len(trace_events.faults(trace)) == 1
    trace = trace_of([STEP])
    trace["traceEvents"].append(trace_events.slices(trace, "forward")[0])
    assert "events are not in the order of time" in trace_events.faults(trace)


def test_what_is_said_of_a_step_survives_the_way_to_the_driver():
    notes = StepNotes(0.1, 0.2, (passage("activation", 1, 0, 3, 1 / 3, 0.5),), (), (2 / 3, 1.0))
    assert StepNotes.from_plain(json.loads(json.dumps(notes.plain()))) == notes
