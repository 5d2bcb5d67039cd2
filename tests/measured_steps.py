"""Measured steps made by hand: a simulated plan, with the messages that it would have sent and waited for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pipeline.plan.plan import Plan
from pipeline.plan.schedules import build_plan
from pipeline.plan.simulator import Cost, simulate
from pipeline.plan.step_events import DriverSpan, StepEvents, Transit, Update
from pipeline.plan.timeline import Timeline
from stages.actions import Kind, Wiring, chain

SIZE = 1000
"""Bytes of every message."""


def step(
    costs: Sequence[Cost],
    microbatches: int = 4,
    schedule: str = "1f1b",
    *,
    samples: int = 64,
    names: Sequence[str] = (),
    driver: Mapping[str, float] | None = None,
    update: float = 0.0,
    wiring: Mapping[int, Iterable[int]] | None = None,
    **known: bool,
) -> Timeline:
    """A step of these stages, as it would have been measured, with the driver's spans before it, by their seconds."""
    plan = build_plan(schedule, len(costs), microbatches)
    above = Wiring.of(wiring or chain(len(costs)))
    timeline = simulate(plan, costs, above)
    spans, begin = [], -sum((driver or {}).values())
    updates = tuple(Update(worker, begin, begin + update) for worker in range(plan.workers) if update)
    for name, seconds in (driver or {}).items():
        spans.append(DriverSpan(name, begin, begin + seconds))
        begin += seconds
    spans.append(DriverSpan("wait for the workers", 0.0, timeline.step_time))
    events = StepEvents(
        *(plan, dict(above), tuple(names), samples),
        transits=tuple(transits(timeline, plan, costs, above)),
        updates=updates,
        driver=tuple(spans),
        **known,
    )
    return replace(timeline, events=events)


def transits(timeline: Timeline, plan: Plan, costs: Sequence[Cost], wiring: Wiring) -> Iterable[Transit]:
    """What the stages sent to each other: sent in no time where an action ends, and waited for where it must be."""
    at = {span.action: span for span in timeline.spans}
    for worker in range(plan.workers):
        free = 0.0
        for span in timeline.of_worker(worker):
            for needed in plan.needs(wiring)[span.action]:
                source = needed.stage
                if source == span.action.stage:
                    continue
                kind = "activation" if span.action.kind is Kind.FORWARD else "gradient"
                way = costs[source if kind == "activation" else span.action.stage].transfer
                sent = at[needed].end
                what = (kind, "h", span.action.microbatch, span.action.window, source, span.action.stage)
                homes = (plan.placement[source], plan.placement[span.action.stage])
                yield Transit(*what, *homes, SIZE, sent, sent, free, max(free, sent + way))
            free = span.end
