"""Timelines: the begin and end of each action of a step, simulated or measured, in one form that can be compared.

All times are seconds. The bubble is the share of worker time within the step in which nothing was done:

    worker 0 │ F0 F1 ·  ·  B0 B1 │  idle 2 of 6        bubble = (2 + 2) / (2 · 6) = 33 %
    worker 1 │ ·  F0 F1 B0 B1 ·  │  idle 2 of 6        parallelism = 2 · (1 - bubble) = 1.33

A measured one also has the step's messages, waits, updates and driver (`events`), so it can say what holds the step
back. Both can be opened in Perfetto or Chrome.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from pipeline.errors import TimelineError
from pipeline.plan.step_events import StepEvents
from stages.actions import Action, Kind, open_tapes

if TYPE_CHECKING:
    import numpy as np

    from pipeline.plan.bottleneck import Bottleneck

__all__ = ["Span", "SpanRows", "Timeline", "measured_timeline"]


@dataclass(frozen=True, slots=True)
class Span:
    """One action that `worker` did from `start` to `end` (seconds, of any clock that all workers share)."""

    worker: int
    action: Action
    start: float
    end: float

    @property
    def duration(self) -> float:
        """Seconds from start to end."""
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class SpanRows(Sequence[Span]):
    """The spans of a simulated step of many actions, as arrays; a `Span` is made when it is asked for.

    Args:
        programs: For each worker its actions in order.
        begins: For each worker where its actions begin in the arrays, and their number at the end.
        starts, ends: (actions,) seconds, the first 0; on each worker ascending.
    """

    programs: Sequence[Sequence[Action]]
    begins: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]
    ends: np.ndarray[Any, Any]

    @cached_property
    def _order(self) -> np.ndarray[Any, Any]:
        """The places of the spans in the arrays, ordered by start, end and worker."""
        import numpy as np  # imported by the arrays

        return np.lexsort((self.ends, self.starts))  # it is stable, and the arrays are in the order of the workers

    def _span(self, place: int) -> Span:
        worker = int(self.begins.searchsorted(place, side="right")) - 1
        action = self.programs[worker][place - int(self.begins[worker])]
        return Span(worker, action, float(self.starts[place]), float(self.ends[place]))

    def of_worker(self, worker: int) -> tuple[Span, ...]:
        """The spans of one worker, ordered by start."""
        own = slice(self.begins[worker], self.begins[worker + 1])
        times = zip(self.programs[worker], self.starts[own].tolist(), self.ends[own].tolist(), strict=True)
        return tuple(Span(worker, action, start, end) for action, start, end in times)

    def durations(self, worker: int) -> list[float]:
        """The seconds of each of a worker's actions."""
        own = slice(self.begins[worker], self.begins[worker + 1])
        found: list[float] = (self.ends[own] - self.starts[own]).tolist()
        return found

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Span: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Span, ...]: ...
    def __getitem__(self, index: int | slice) -> Span | tuple[Span, ...]:
        if isinstance(index, slice):
            return tuple(self._span(int(place)) for place in self._order[index])
        return self._span(int(self._order[index]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpanRows | tuple) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


@dataclass(frozen=True)
class Timeline:
    """The actions of every worker in one step, with their begin and end.

    Args:
        spans: the actions with their times, in any order. Times are moved so that the first action starts at 0.
        workers: the number of workers; left out, one more than the highest in `spans`.
        name: what is shown: `1f1b: 3 stages, 8 microbatches`.
        events: what else happened, where the step was measured; moved with the spans.
        origin: what the clock showed when the first action started, less the start that is given.

    Attributes:
        spans: ordered by start, then by worker; the first starts at 0.
        origin: what the clock showed at 0, seconds.

    Raises:
        TimelineError: a time is not finite, an action ends before it starts or while its worker does another,
            or a worker is out of range.
    """

    spans: Sequence[Span]
    workers: int = field(default=0)
    name: str = "step"
    events: StepEvents | None = field(default=None, compare=False, repr=False)
    origin: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.spans, SpanRows):  # from the simulator, which makes none that are wrong
            return
        spans = tuple(self.spans)
        workers = self.workers or max((span.worker for span in spans), default=0) + 1
        for span in spans:
            if not (math.isfinite(span.start) and math.isfinite(span.end) and span.start <= span.end):
                raise TimelineError(f"{span.action} on worker {span.worker} runs from {span.start} s to {span.end} s")
            if not 0 <= span.worker < workers:
                raise TimelineError(f"{span.action} is on worker {span.worker}, expected 0 to {workers - 1}")
        origin = min((span.start for span in spans), default=0.0)
        moved = (Span(span.worker, span.action, span.start - origin, span.end - origin) for span in spans)
        object.__setattr__(self, "spans", tuple(sorted(moved, key=lambda s: (s.start, s.end, s.worker))))
        object.__setattr__(self, "workers", workers)
        object.__setattr__(self, "origin", self.origin + origin)
        if self.events is not None and origin:
            object.__setattr__(self, "events", self.events.moved(-origin))
        for worker in range(workers):
            free, last = 0.0, None
            for span in self.of_worker(worker):
                if span.start < free and not math.isclose(span.start, free, abs_tol=1e-9):
                    raise TimelineError(f"worker {worker} starts {span.action} before {last} has ended")
                free, last = span.end, span.action

    def of_worker(self, worker: int) -> tuple[Span, ...]:
        """The spans of one worker, ordered by start."""
        return self._by_worker[worker] if 0 <= worker < self.workers else ()

    @cached_property
    def _by_worker(self) -> tuple[tuple[Span, ...], ...]:
        if isinstance(self.spans, SpanRows):
            return tuple(self.spans.of_worker(worker) for worker in range(self.workers))
        found: list[list[Span]] = [[] for _ in range(self.workers)]
        for span in self.spans:
            found[span.worker].append(span)
        return tuple(tuple(spans) for spans in found)

    @cached_property
    def step_time(self) -> float:
        """Seconds from the start of the first action to the end of the last one."""
        if isinstance(self.spans, SpanRows):
            return float(self.spans.ends.max())
        return max((span.end for span in self.spans), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """For each worker, the seconds in which it did something."""
        if isinstance(self.spans, SpanRows):
            return tuple(math.fsum(self.spans.durations(worker)) for worker in range(self.workers))
        return tuple(math.fsum(span.duration for span in self.of_worker(worker)) for worker in range(self.workers))

    @cached_property
    def idle(self) -> tuple[float, ...]:
        """For each worker, the seconds of the step in which it did nothing."""
        return tuple(self.step_time - busy for busy in self.busy)

    @cached_property
    def bubble(self) -> float:
        """The share of all worker time that is idle, 0 to 1."""
        return math.fsum(self.idle) / (self.workers * self.step_time) if self.step_time else 0.0

    @cached_property
    def parallelism(self) -> float:
        """How many workers are busy on average: the speed-up over one worker that would do it all as fast."""
        return math.fsum(self.busy) / self.step_time if self.step_time else 0.0

    @cached_property
    def peak_in_flight(self) -> tuple[int, ...]:
        """For each worker, the most tapes open at once; all 0 where no backward happens at all."""
        if all(span.action.kind is Kind.FORWARD for span in self.spans):
            return (0,) * self.workers
        programs = ((span.action for span in self.of_worker(worker)) for worker in range(self.workers))
        return tuple(max(open_tapes(program), default=0) for program in programs)

    def gaps(self, worker: int) -> tuple[tuple[float, float], ...]:
        """The (start, end) of every stretch of the step in which `worker` did nothing."""
        edges = [0.0, *(edge for span in self.of_worker(worker) for edge in (span.start, span.end)), self.step_time]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return tuple((start, end) for start, end in pairs if end > start)

    @cached_property
    def bottleneck(self) -> Bottleneck:
        """What holds the step back, and what would help by how much; ``print(timeline.bottleneck)`` is one sentence.

        Raises:
            TimelineError: The step was not measured by `Pipeline.timeline` or `TraceSteps`.
        """
        from pipeline.plan.bottleneck import bottleneck_of  # which simulates, and so makes timelines

        return bottleneck_of(self)

    def save(self, path: str | Path, names: Iterable[str] = ()) -> Path:
        """Write the step as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

        Args:
            path: where to, a name that ends with `.json`; missing folders are made, a file that is there is replaced.
            names: what to call the workers; left out, `worker 0` and so on.

        Raises:
            TimelineError: another ending (`save_timeline` draws pictures), or not one name for each worker.
        """
        from pipeline.plan.chrome_trace import save_trace  # which takes timelines

        return save_trace([self], path, names)

    def text(self, names: Iterable[str] = ()) -> str:
        """A table: for each worker the milliseconds busy and idle, its idle share and its most open tapes.

        Of a measured step the last line says what holds it back.

        Args:
            names: what to call the workers; left out, `worker 0` and so on.

        Raises:
            TimelineError: there is not one name for each worker.
        """
        titles = self.titles(names)
        width = max((len(title) for title in titles), default=0)
        lines = [
            f"{self.name}: step {_ms(self.step_time)} ms, bubble {self.bubble:.1%}, "
            f"{self.parallelism:.2f} of {self.workers} workers busy",
            f"{'':{width}}  {'busy ms':>10}  {'idle ms':>10}  {'idle':>6}  {'holds':>5}",
        ]
        for title, busy, idle, held in zip(titles, self.busy, self.idle, self.peak_in_flight, strict=True):
            share = idle / self.step_time if self.step_time else 0.0
            lines.append(f"{title:{width}}  {_ms(busy):>10}  {_ms(idle):>10}  {share:>6.1%}  {held:>5}")
        if self.events is not None and self.step_time:
            lines.append(str(self.bottleneck))
        return "\n".join(lines)

    def titles(self, names: Iterable[str] = ()) -> tuple[str, ...]:
        """What the workers are called: `names`, or `worker 0` and so on, with their stages where these are known.

        Raises:
            TimelineError: there is not one name for each worker.
        """
        titles = tuple(names) or tuple(self._title(worker) for worker in range(self.workers))
        if len(titles) != self.workers:
            raise TimelineError(f"`names` must name each of {self.workers} workers, received {list(titles)}")
        return titles

    def _title(self, worker: int) -> str:
        if self.events is None:
            return f"worker {worker}"
        hosted = [name for name, home in zip(self.events.names, self.events.plan.placement) if home == worker]  # noqa: B905
        return f"worker {worker}: {', '.join(hosted)}" if hosted else f"worker {worker}"

    def __str__(self) -> str:
        return self.text()


def measured_timeline(measured: Sequence[Sequence[tuple[float, float]]], events: StepEvents) -> Timeline:
    """The timeline of a step that ran.

    Args:
        measured: For each worker the (begin, end) of its actions, seconds of its own clock.
        events: What else happened, on the driver's clock.
    """
    plan = events.plan
    spans = tuple(
        Span(worker, action, start - ahead, end - ahead)
        for worker, (program, done, ahead) in enumerate(zip(plan.programs, measured, events.offsets, strict=True))
        for action, (start, end) in zip(program, done, strict=True)
    )
    return Timeline(spans, workers=plan.workers, name=f"{plan.name}, measured", events=events)


def _ms(seconds: float) -> str:
    return f"{abs(seconds) * 1e3:.2f}"
