"""The bottleneck of a measured step, in one sentence, and what would help by how much.

A step's time is taken apart by simulating it again without one thing after the other:

    a turn of the training      as measured, from one step's end to the next one's
      driver      = it, less the workers' own step and their update
    the workers' step           simulated with what actions and messages took
      transfer    = it, less the same with messages that take no time
      stage       = that, less the same with all stages made equal
      bubble      = that, less the time of all actions over the number of workers
      compute     = what remains, and the update

The largest of the first four is named; where none makes up 15 % of the turn, it is compute. What would help is
simulated from the same costs, so it is a prediction at best: cuts cannot be placed everywhere, and a microbatch of half
the size takes more than half the time.

Rules:

1. A message counts by what its receiver still waited for it after it was sent; a way that nobody waits for holds
   nothing back.
2. The time that a worker spends on sending, and on taking what lies there already, is transfer and keeps it busy.
3. Of an action that occurs often the mean counts, so that the sums are those that were measured.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from pipeline.errors import PipelineError, TimelineError
from pipeline.plan.plan import Plan
from pipeline.plan.schedules import SCHEDULES, build_plan
from pipeline.plan.simulator import Cost, simulate
from pipeline.plan.step_events import StepEvents
from pipeline.plan.timeline import Timeline
from stages.actions import Kind

__all__ = ["CAUSES", "Bottleneck", "Help", "bottleneck_of"]

CAUSES = ("driver", "transfer", "stage", "bubble", "compute")
"""What may hold a step back."""

_NAMED = 0.15
"""The share of a turn from which on a cause is worth its name."""
_WORTH = 0.01
"""The share of a turn from which on a change is worth to be mentioned."""


@dataclass(frozen=True, slots=True)
class Help:
    """A change and the share of the step's time that it would save, 0 to 1, predicted by the simulator."""

    what: str
    saves: float

    def __str__(self) -> str:
        return f"{self.what}: -{self.saves:.0%}"


@dataclass(frozen=True)
class Bottleneck:
    """The thing that holds a step back.

    Attributes:
        cause: One of `CAUSES`.
        stage: The stage that is too heavy, or whose outputs travel too long; None for other causes.
        name: Its name; "" without one.
        seconds: A turn of the training, or the step where nothing else was measured.
        shares: {cause: its share of `seconds`}; they add up to 1.
        helps: What would help, the best first.
        detail: The figure behind it, in words.
    """

    cause: str
    stage: int | None
    name: str
    seconds: float
    shares: Mapping[str, float]
    helps: tuple[Help, ...]
    detail: str

    def __str__(self) -> str:
        share = f"{self.shares[self.cause]:.0%} of {self.seconds * 1e3:.4g} ms"
        if self.helps:
            help_ = "; would help, at best: " + ", or ".join(map(str, self.helps))
        else:
            help_ = "; nothing that the simulator knows would help by 1 %"
        return f"held back by {_WORDS[self.cause].format(name=self.name)} ({share}): {self.detail}{help_}"


_WORDS = {
    "driver": "the driver",
    "transfer": "transfer from {name}",
    "stage": "the heaviest stage, {name}",
    "bubble": "the bubble",
    "compute": "compute",
}


def bottleneck_of(timeline: Timeline) -> Bottleneck:
    """What holds a measured step back.

    Args:
        timeline: Of a step that was measured.

    Raises:
        TimelineError: It was not.
    """
    events = timeline.events
    if events is None or not timeline.step_time:
        raise TimelineError(
            "what holds a step back is found in measured ones, and this timeline has no events beside its actions; "
            "take pipe.timeline(x, y), or the steps of a TraceSteps callback"
        )
    return _Parts(timeline, events).bottleneck()


class _Parts:
    """A step taken apart."""

    def __init__(self, timeline: Timeline, events: StepEvents) -> None:
        self._timeline, self._events, self._plan = timeline, events, events.plan
        self._names = events.names or tuple(f"stage {i}" for i in range(self._plan.stages))
        self._sending = _sending(timeline, events)
        self._bare = self._costs(without_sending=True)
        self._taking, self._delays = _ways(events, self._plan.stages)
        full = self._costs(without_sending=False)
        self._costs_now = [replace(cost, transfer=delay) for cost, delay in zip(full, self._delays, strict=True)]

    def bottleneck(self) -> Bottleneck:
        """The verdict."""
        work = self._timeline.step_time
        turn = max(self._events.period, work)
        began = min((span.start for span in self._events.driver), default=0.0)
        updates = max((each.end - max(each.start, began) for each in self._events.updates), default=0.0)
        updates = min(max(updates, 0.0), turn - work)
        driver = turn - work - updates
        now = self._time(self._costs_now)
        free = self._time(self._bare)
        even = self._time(self._even())
        ideal = math.fsum(map(self._total, self._bare)) / self._plan.workers
        scale = work / now if now else 1.0  # what the simulation lacks is spread over its parts
        parts = {
            "driver": driver,
            "transfer": max(0.0, now - free) * scale,
            "stage": max(0.0, free - even) * scale,
            "bubble": max(0.0, even - ideal) * scale,
        }
        shares = {cause: seconds / turn for cause, seconds in parts.items()}
        shares["compute"] = max(0.0, 1.0 - math.fsum(shares.values()))
        cause = max(parts, key=parts.__getitem__)
        if shares[cause] < _NAMED:
            cause = "compute"
        stage = {"transfer": self._longest_way, "stage": self._heaviest}.get(cause, lambda: None)()
        helps = sorted(self._helps(cause, stage, now, turn, work), key=lambda each: -each.saves)
        return Bottleneck(
            cause,
            stage,
            "" if stage is None else repr(self._names[stage]),
            turn,
            shares,
            tuple(each for each in helps if each.saves >= _WORTH)[:2],
            self._detail(cause, stage, driver, turn),
        )

    def _costs(self, without_sending: bool) -> list[Cost]:
        """The mean cost of each stage's actions."""
        seconds: dict[tuple[int, Kind], list[float]] = defaultdict(list)
        for place, span in enumerate(self._timeline.spans):
            inside = self._sending[place] if without_sending else 0.0
            seconds[span.action.stage, span.action.kind].append(max(0.0, span.duration - inside))
        mean = {key: fmean(each) for key, each in seconds.items()}
        costs = []
        for stage in range(self._plan.stages):
            whole = mean.get((stage, Kind.BACKWARD))
            first = mean.get((stage, Kind.BACKWARD_INPUT), 0.0) if whole is None else whole / 2
            second = mean.get((stage, Kind.BACKWARD_WEIGHT), 0.0) if whole is None else whole / 2
            forward = mean.get((stage, Kind.FORWARD), 0.0)
            if not without_sending:
                forward += self._taking.get((stage, "activation"), 0.0)
                first += self._taking.get((stage, "gradient"), 0.0)
            costs.append(Cost(forward, first, second))
        return costs

    def _time(self, costs: Sequence[Cost], plan: Plan | None = None) -> float:
        return simulate(plan or self._plan, costs, self._events.wiring).step_time

    def _total(self, cost: Cost) -> float:
        """The seconds of all actions of a stage."""
        units = self._plan.microbatches * self._plan.windows
        return units * (cost.forward + cost.backward)

    def _even(self) -> list[Cost]:
        """The same costs, all stages made equal."""
        each = [cost.forward + cost.backward for cost in self._bare]
        mean = fmean(each)
        return [
            _times(cost, mean / own) if own else Cost(mean / 3, mean / 3, mean / 3)
            for cost, own in zip(self._bare, each, strict=True)
        ]

    def _heaviest(self) -> int:
        each = [cost.forward + cost.backward for cost in self._bare]
        return each.index(max(each))

    def _longest_way(self) -> int:
        """The stage without whose messages' time the step would be the shortest."""
        found = []
        for stage in range(self._plan.stages):
            costs = list(self._costs_now)
            costs[stage] = self._bare[stage]
            for other, above in self._events.wiring.items():
                if stage in above:  # it sends gradients back
                    costs[other] = replace(self._bare[other], transfer=self._delays[other])
            found.append(self._time(costs))
        return found.index(min(found))

    def _helps(self, cause: str, stage: int | None, now: float, turn: float, work: float) -> Iterator[Help]:
        """Changes, with what they would save."""

        def saved(then: float) -> float:
            return max(0.0, (now - then) / now * work / turn) if now else 0.0

        if cause == "driver":
            part = 1.0 - work / turn
            yield Help("a driver that does nothing between the workers' steps", part)
            return
        if cause == "stage":
            even = [replace(c, transfer=way) for c, way in zip(self._even(), self._delays, strict=True)]
            yield Help("cuts that give every stage as much to compute", saved(self._time(even)))
            return
        if cause == "transfer":
            yield Help("cuts where next to nothing crosses", saved(self._time(self._bare)))
        plan, events = self._plan, self._events
        options = {"windows": plan.windows, "truncate": plan.truncate, "wiring": events.wiring}
        best: dict[str, Help] = {}
        if plan.name in SCHEDULES:
            for factor in (2, 4):
                count = plan.microbatches * factor
                if count <= events.samples:
                    costs = [_times(cost, 1 / factor) for cost in self._costs_now]
                    if (then := self._other(plan.name, count, costs, options)) is not None:
                        _keep(best, "more", Help(f"{count} microbatches in place of {plan.microbatches}", saved(then)))
        for name in () if events.one_schedule else SCHEDULES:
            if name != plan.name and (
                (then := self._other(name, plan.microbatches, self._costs_now, options)) is not None
            ):
                _keep(best, "schedule", Help(f"schedule={name!r}", saved(then)))
        yield from best.values()

    def _other(self, schedule: str, count: int, costs: Sequence[Cost], options: Mapping[str, object]) -> float | None:
        """Seconds of a step under another plan for the same workers; None where there is none."""
        try:
            plan = build_plan(schedule, self._plan.stages, count, **options)  # type: ignore[arg-type]
        except PipelineError:
            return None
        return self._time(costs, plan) if plan.placement == self._plan.placement else None

    def _detail(self, cause: str, stage: int | None, driver: float, turn: float) -> str:
        """The figure behind a cause, in words."""
        events, plan = self._events, self._plan
        if cause == "driver":
            spans: dict[str, float] = defaultdict(float)
            for span in events.driver:
                if not span.name.startswith("wait"):
                    spans[span.name] += span.end - span.start
            most = sorted(spans.items(), key=lambda item: -item[1])[:2]
            parts = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in most)
            return f"workers have nothing to do for {driver * 1e3:.3g} ms a step, meanwhile it has: {parts}"
        each = [self._total(cost) for cost in self._bare]
        if cause == "stage" and stage is not None:
            others = [seconds for i, seconds in enumerate(each) if i != stage]
            return f"it computes {each[stage] * 1e3:.3g} ms a step, the others {fmean(others) * 1e3:.3g} ms on average"
        if cause == "transfer" and stage is not None:
            size = sum(t.bytes for t in events.transits if t.crosses and stage == _producer(t.kind, t.source, t.stage))
            return f"{size / 2**20:.3g} MiB a step cross behind it, both ways"
        if cause == "bubble":
            return f"{plan.workers} workers wait for each other with {plan.microbatches} microbatches under {plan.name}"
        return f"the workers compute {math.fsum(self._timeline.busy) / plan.workers / turn:.0%} of the time"


def _keep(best: dict[str, Help], kind: str, help_: Help) -> None:
    if kind not in best or help_.saves > best[kind].saves:
        best[kind] = help_


def _times(cost: Cost, factor: float) -> Cost:
    return Cost(
        cost.forward * factor, cost.input_gradient * factor, cost.weight_gradient * factor, cost.transfer * factor
    )


def _producer(kind: str, source: int, stage: int) -> int:
    """The stage whose output, or whose output's gradient, a message is."""
    return stage if kind == "gradient" else source


def _sending(timeline: Timeline, events: StepEvents) -> list[float]:
    """For each action the seconds that its worker spent on messages meanwhile."""
    done: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for transit in events.transits:
        if transit.crosses:
            done[transit.sender].append((transit.sent, transit.left))
            done[transit.receiver].append((transit.wanted, transit.taken))
    starts = {worker: sorted(times) for worker, times in done.items()}
    found = []
    for span in timeline.spans:
        times = starts.get(span.worker, [])
        inside = times[bisect_left(times, (span.start,)) : bisect_right(times, (span.end,))]
        found.append(math.fsum(end - begin for begin, end in inside if end <= span.end))
    return found


def _ways(events: StepEvents, stages: int) -> tuple[dict[tuple[int, str], float], list[float]]:
    """How long messages take (rules 1 and 2).

    Returns:
        {(stage, kind): the seconds that it takes it to take such a message that lies there}; and for each stage the
        seconds that its outputs, and their gradients, are under way besides.
    """
    there: dict[tuple[int, str], list[float]] = defaultdict(list)
    awaited: dict[int, list[tuple[tuple[int, str], float]]] = defaultdict(list)
    for t in events.transits:
        if t.crosses and t.kind in ("activation", "gradient") and t.source >= 0:
            if t.wanted <= t.left:
                awaited[_producer(t.kind, t.source, t.stage)].append(((t.stage, t.kind), t.taken - t.left))
            else:
                there[t.stage, t.kind].append(t.wait)
    taking = {key: median(each) for key, each in there.items()}
    found = (
        [max(0.0, seconds - taking.get(key, 0.0)) for key, seconds in awaited.get(stage, [])] for stage in range(stages)
    )
    return taking, [median(each) if each else 0.0 for each in found]
