"""Traces that ui.perfetto.dev and chrome://tracing open: measured or simulated steps as trace events in JSON.

    driver     ├ send the batch ┤├ wait for the workers ──────────────┤├ decide, order the update ┤
                      ╲ 40 KiB
    worker 0         ├ F 0.0 ┤├ F 0.1 ┤├ wait for worker 1 ┤├ B 0.0 ┤
                            ╲ 12 KiB
    worker 1              ├wait┤├ F 1.0 ┤├ B 1.0 ┤

Rules, which make a file that any reader of the format takes:

1. Microseconds, from the first event on, with a nanosecond's digits; none is before 0.
2. Slices are complete events ("X", with their duration), so none can lack its end; on one track they lie inside or
   behind each other and never overlap in part.
3. One process, numbered 1 (0 is the idle task to some readers), and one thread a track, with metadata that name and
   order them: the operating system's ids would fall together where workers are threads.
4. An arrow is one "s" and one "f" event of one id, each inside a slice of its track, the second one not earlier.
5. Metadata first, then everything in the order of time, outer slices before inner ones.
6. The file is written whole, and takes its place at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from pipeline.errors import TimelineError
from pipeline.plan.step_events import DRIVER_TRACK, StepEvents, Transit
from pipeline.plan.timeline import Timeline

__all__ = ["SHORTEST_WAIT", "save_trace", "trace_of"]

SHORTEST_WAIT = 20e-6
"""Seconds: taking a message that lies there is no wait, and is not drawn."""

_PROCESS = 1
_DRIVER_THREAD = 1
_FIRST_WORKER = 2
_CLOCKS = (
    "Times are those of the driver's monotonic clock. Processes of one host share it; where messages show that a "
    "worker's does not, its times are corrected by the offset in `offsets_us`."
)

Event = dict[str, Any]


def save_trace(timelines: Sequence[Timeline], path: str | Path, names: Iterable[str] = ()) -> Path:
    """Write steps as one trace; see `Timeline.save`.

    Args:
        timelines: The steps, of equally many workers, on one clock.
        path: Where to.
        names: What to call the workers.

    Raises:
        TimelineError: Another ending than ``.json``, not one name for each worker, or no step at all.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        raise TimelineError(
            f"a trace is written as .json, received {path.name!r}; pictures are drawn by save_timeline(timeline, path)"
        )
    text = json.dumps(trace_of(timelines, names), allow_nan=False, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        made.write_text(text, encoding="ascii")
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
    return path


def trace_of(timelines: Sequence[Timeline], names: Iterable[str] = ()) -> dict[str, Any]:
    """The same as an object for JSON: ``{"traceEvents": [...], ...}``."""
    if not timelines:
        raise TimelineError("there is no step to write: none was traced")
    titles = timelines[0].titles(names)
    if any(timeline.workers != len(titles) for timeline in timelines):
        raise TimelineError("the steps of one trace must have equally many workers")
    first = min((start for timeline in timelines for start in _starts(timeline)), default=0.0)
    numbers = count(1)
    free: dict[int, float] = {}
    events = [event for timeline in timelines for event in _step(_Track(timeline, first, free), timeline, numbers)]
    events.sort(key=lambda event: (event["ts"], event["ph"] != "X", -event.get("dur", 0.0)))
    offsets = [
        [round(offset * 1e6, 3) for offset in timeline.events.offsets] for timeline in timelines if timeline.events
    ]
    return {
        "traceEvents": [*_metadata(titles, any(timeline.events for timeline in timelines)), *events],
        "displayTimeUnit": "ms",
        "otherData": {
            "steps": [timeline.name for timeline in timelines],
            "clocks": _CLOCKS,
            "offsets_us": offsets,
        },
    }


def _starts(timeline: Timeline) -> Iterator[float]:
    """When things begin, on the clock."""
    yield timeline.origin
    if timeline.events is not None:
        events = timeline.events
        yield from (timeline.origin + span.start for span in events.driver)
        yield from (timeline.origin + update.start for update in events.updates)
        yield from (timeline.origin + min(transit.sent, transit.wanted) for transit in events.transits)


def _metadata(titles: Sequence[str], driver: bool) -> Iterator[Event]:
    yield _named("process_name", _DRIVER_THREAD, {"name": "pipeline"})
    tracks = [(_DRIVER_THREAD, "driver")] if driver else []
    tracks += [(_FIRST_WORKER + worker, title) for worker, title in enumerate(titles)]
    for thread, title in tracks:
        yield _named("thread_name", thread, {"name": title})
        yield _named("thread_sort_index", thread, {"sort_index": thread})


def _named(what: str, thread: int, arguments: Event) -> Event:
    return {"ph": "M", "name": what, "pid": _PROCESS, "tid": thread, "ts": 0, "args": arguments}


class _Track:
    """The tracks, as one step draws on them; times are those of its timeline."""

    def __init__(self, timeline: Timeline, first: float, free: dict[int, float]) -> None:
        self._later, self._free = timeline.origin - first, free

    def at(self, time: float) -> float:
        """Microseconds from the trace's begin."""
        return max(0.0, round((time + self._later) * 1e6, 3))

    def slice(self, track: int, name: str, category: str, times: tuple[float, float], arguments: Event) -> Event:
        """A complete event."""
        begin, end = self.at(times[0]), self.at(times[1])
        where = {"pid": _PROCESS, "tid": _thread(track), "ts": begin, "dur": round(end - begin, 3)}
        return {"ph": "X", "name": name, "cat": category, **where, "args": arguments}

    def next(self, track: int, name: str, category: str, times: tuple[float, float], arguments: Event) -> Event:
        """The same of one that comes behind all before it, which may overlap it by a rounding."""
        found = self.slice(track, name, category, times, arguments)
        end = round(found["ts"] + found["dur"], 3)
        begin = max(found["ts"], self._free.get(track, 0.0))
        self._free[track] = max(begin, end)
        return found | {"ts": begin, "dur": round(self._free[track] - begin, 3)}

    def arrow(self, number: int, name: str, begin: tuple[int, float], end: tuple[int, float]) -> Iterator[Event]:
        """The two ends of an arrow, each a (track, time) inside a slice."""
        both = {"name": name, "cat": "message", "id": number, "pid": _PROCESS}
        sent = self.at(begin[1])
        yield {"ph": "s", **both, "tid": _thread(begin[0]), "ts": sent}
        yield {"ph": "f", "bp": "e", **both, "tid": _thread(end[0]), "ts": max(sent, self.at(end[1]))}


def _thread(track: int) -> int:
    return _DRIVER_THREAD if track == DRIVER_TRACK else _FIRST_WORKER + track


def _step(track: _Track, timeline: Timeline, numbers: Iterator[int]) -> Iterator[Event]:
    for span in timeline.spans:
        action, times = span.action, (span.start, span.end)
        arguments = {"stage": action.stage, "microbatch": action.microbatch, "window": action.window}
        yield track.next(span.worker, str(action), action.kind.phrase, times, arguments)
    events = timeline.events
    if events is None:
        return
    for done in events.driver:
        yield track.next(DRIVER_TRACK, done.name, "driver", (done.start, done.end), {})
    for update in events.updates:
        yield track.slice(update.worker, "update", "update", (update.start, update.end), {})
    for transit in events.transits:
        yield from _message(track, timeline, events, transit, numbers)


def _message(
    track: _Track, timeline: Timeline, events: StepEvents, transit: Transit, numbers: Iterator[int]
) -> Iterator[Event]:
    """The sending of a message, the wait for it, and the arrow between them; inside one worker there is nothing."""
    if not transit.crosses:
        return
    what = f"{transit.kind} {transit.tensor}".strip()
    arguments = {
        "bytes": transit.bytes,
        "from": _called(transit.sender),
        "to": _called(transit.receiver),
        "stage": transit.stage,
        "microbatch": transit.microbatch,
        "window": transit.window,
    }
    yield track.slice(transit.sender, f"send {what}", "send", (transit.sent, transit.left), arguments)
    used = next((s for s in timeline.of_worker(transit.receiver) if s.end >= transit.taken), None)
    if transit.wait >= SHORTEST_WAIT or used is None:
        times = (transit.wanted, transit.taken)
        name = f"wait for {_called(transit.sender)}"
        yield track.slice(transit.receiver, name, "wait", times, {"for": what, **arguments})
    if used is None:  # behind all actions: tied gradients
        end = max(transit.sent, transit.wanted)
    else:
        end = max(used.start, transit.taken)
    yield from track.arrow(next(numbers), what, (transit.sender, transit.sent), (transit.receiver, end))


def _called(track: int) -> str:
    return "driver" if track == DRIVER_TRACK else f"worker {track}"
