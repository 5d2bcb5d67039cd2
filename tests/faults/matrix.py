"""Inject every fault at every place of a running pipeline and hear what `verify` says."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from tests.faults.catalogue import FAULTS, Fault
from tests.faults.live import Live
from tests.faults.places import Place
from tests.faults.unasked import without_own


@dataclass(frozen=True)
class Outcome:
    """What became of one fault at one place.

    Attributes:
        fault: Which.
        place: Where, in words.
        case: Name of the model.
        schedule: Its name.
        found: Whether the report is not ok.
        check: The check that found the first deviation; "" if none did.
        named: Whether the first deviation names the place.
        said: The report's sentence.
        seconds: What the verification took.
    """

    fault: Fault
    place: str
    case: str
    schedule: str
    found: bool
    check: str
    named: bool
    said: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the fault was found and named."""
        return self.found and self.named

    def __str__(self) -> str:
        verdict = "found and named" if self.ok else "WRONG PLACE" if self.found else "MISSED"
        return f"{verdict}: {self.fault}, {self.place} ({self.case}, {self.schedule}): {self.said}"


def outcomes(live: Live, faults: Iterable[Fault] = FAULTS, most: int | None = None) -> Iterator[Outcome]:
    """Every fault at every place, one after the other, or at the first so many places."""
    for fault in faults:
        for place in fault.places(live)[:most]:
            yield outcome(live, fault, place)


def outcome(live: Live, fault: Fault, place: Place) -> Outcome:
    """One fault at one place; afterwards the pipeline is as before."""
    begun = time.monotonic()
    with live.left_alone(), fault.inject(live, place):
        report = verified(live, fault.checks)
    first = report.first
    return Outcome(
        fault,
        place.text(live.names),
        live.case.name,
        live.schedule,
        not report.ok,
        "" if first is None else first.row.check,
        first is not None and is_named(first, place, live.names),
        report.summary(),
        time.monotonic() - begun,
    )


def verified(live: Live, checks: tuple[str, ...]) -> Any:
    """The report of the case's batch; the check "own", which is made unasked, only if it is asked for."""
    x, y, weights = live.case.data(0)
    with nullcontext() if "own" in checks else without_own():
        return live.pipe.verify(x, y, weights, checks=checks)


def is_named(first: Any, place: Place, names: tuple[str, ...]) -> bool:
    """Whether the first deviation is where the fault is: in its stage, or on its edge."""
    if place.edge is None or not place.named:
        return bool(first.stage == names[place.stage])
    ends = {names[place.edge.producer], names[place.edge.consumer]}
    row = first.row
    return row.check == "hand-off" and {row.stage, row.peer} == ends and place.edge.tensor in row.name
