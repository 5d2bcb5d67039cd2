"""The trace event format's own rules, as strict as its readers are; nothing here knows who wrote the file.

Rules from the format's description (Trace Event Format, "JSON Object Format") and from what Perfetto's importer drops
or reports: a slice that overlaps another one in part, an arrow's end without its begin or outside of any slice.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NEEDS = {
    "X": {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"},
    "s": {"name", "cat", "ph", "ts", "id", "pid", "tid"},
    "f": {"name", "cat", "ph", "ts", "id", "pid", "tid", "bp"},
    "M": {"name", "ph", "ts", "pid", "tid", "args"},
}
METADATA = {"process_name": "name", "thread_name": "name", "thread_sort_index": "sort_index"}


def read(path: Path) -> dict[str, Any]:
    """A trace file, strictly: standard JSON, no NaN or Infinity."""

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is no JSON")

    found: dict[str, Any] = json.loads(path.read_text(encoding="ascii"), parse_constant=refuse)
    return found


def faults(trace: dict[str, Any]) -> list[str]:
    """Everything that is wrong with a trace."""
    shape, events = [*_shape(trace)], trace["traceEvents"]
    return shape or [*_order(events), *_nesting(events), *_arrows(trace)]


def slices(trace: dict[str, Any], category: str) -> list[dict[str, Any]]:
    """The complete events of a category."""
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["cat"] == category]


def tracks(trace: dict[str, Any]) -> dict[int, str]:
    """{thread: its name}."""
    return {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}


def _shape(trace: dict[str, Any]) -> Iterator[str]:
    if trace.get("displayTimeUnit") not in ("ms", "ns"):
        yield f"displayTimeUnit is {trace.get('displayTimeUnit')!r}"
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["name"] == "thread_name"}
    processes = {e["pid"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    for event in trace["traceEvents"]:
        kind = event.get("ph")
        if set(event) != NEEDS.get(kind):
            yield f"the fields of {event}"
            continue
        numbers = [event["ts"], *([event["dur"]] if kind == "X" else [])]
        if not all(type(n) in (int, float) and math.isfinite(n) and n >= 0 for n in numbers):
            yield f"the times of {event}"
        if not all(type(event[where]) is int and event[where] > 0 for where in ("pid", "tid")):
            yield f"the track of {event}"
        if kind == "M" and set(event["args"]) != {METADATA.get(event["name"])}:
            yield f"the metadata {event}"
        if kind != "M" and (event["pid"], event["tid"]) not in named:
            yield f"a track without a name: {event}"
        if event["pid"] not in processes:
            yield f"a process without a name: {event}"
        if kind == "f" and event["bp"] != "e":
            yield f"an arrow to the next slice: {event}"


def _order(events: list[dict[str, Any]]) -> Iterator[str]:
    kinds = [event["ph"] for event in events]
    if "M" in kinds[kinds.index("X") :]:
        yield "metadata behind a slice"
    times = [event["ts"] for event in events if event["ph"] != "M"]
    if times != sorted(times):
        yield "events are not in the order of time"
    names = [(e["name"], e["tid"]) for e in events if e["ph"] == "M"]
    if len(names) != len(set(names)):
        yield "a track is named twice"


def _nesting(events: list[dict[str, Any]]) -> Iterator[str]:
    open_slices: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] != "X":
            continue
        stack = open_slices[event["pid"], event["tid"]]
        while stack and _end(stack[-1]) <= event["ts"]:
            stack.pop()
        if stack and _end(event) > _end(stack[-1]):
            yield f"{event} overlaps {stack[-1]} in part"
        stack.append(event)


def _end(event: dict[str, Any]) -> float:
    return round(float(event["ts"]) + float(event["dur"]), 3)


def _arrows(trace: dict[str, Any]) -> Iterator[str]:
    ends: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    inside = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] in ("s", "f"):
            ends[event["cat"], event["id"]].append(event)
        elif event["ph"] == "X":
            inside[event["tid"]].append(event)
    for number, both in ends.items():
        if [event["ph"] for event in both] != ["s", "f"]:
            yield f"the arrow {number} has the ends {[event['ph'] for event in both]}"
        elif both[0]["name"] != both[1]["name"] or both[0]["tid"] == both[1]["tid"]:
            yield f"the arrow {both}"
        for event in both:
            if not any(e["ts"] <= event["ts"] <= _end(e) for e in inside[event["tid"]]):
                yield f"an arrow's end outside of any slice: {event}"
