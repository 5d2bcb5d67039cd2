"""Faults between the halves of a backward, where a plan has halves: the weight half reads, or adds, something wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from pipeline import build_plan
from tests.faults.cases import MICROBATCHES
from tests.faults.catalogue import Fault
from tests.faults.live import Live, replaced
from tests.faults.places import Place

Half = Callable[[Any], None]


def halved(live: Live) -> list[Place]:
    """Stages with variables to train whose backwards come in halves."""
    halves = {stage for stage, _, _ in build_plan(live.schedule, len(live.names), MICROBATCHES).halved}
    return [Place(i) for i, hosted in live.hosted.items() if i in halves and hosted.stage.trainable_variables]


def _weight_half(change: Callable[[Half, Any, Any], None]) -> Callable[[Live, Place], AbstractContextManager[None]]:
    """Change what a stage's weight half does; ``change(right, key, waiting)``, `waiting` being {key: what is left}."""

    def inject(live: Live, place: Place) -> AbstractContextManager[None]:
        tapes: Any = live.hosted[place.stage].stage._tapes
        waiting = tapes._found if hasattr(tapes, "_found") else tapes._halfway
        return replaced(tapes, "backward_weight", lambda right: lambda key: change(right, key, waiting))

    return inject


def _of_the_first(remembered: dict[Any, Any]) -> Callable[[Half, Any, Any], None]:
    def change(right: Half, key: Any, waiting: Any) -> None:
        if key.microbatch == 0:
            remembered[0] = waiting[key]
        elif key.microbatch == 1:
            waiting[key] = remembered[0]
        right(key)

    return change


def _lost(right: Half, key: Any, waiting: Any) -> None:
    if key.microbatch != 1:
        right(key)


def _twice(right: Half, key: Any, waiting: Any) -> None:
    left = waiting[key]
    right(key)
    if key.microbatch == 1:
        waiting[key] = left
        right(key)


FAULTS_OF_HALVES = (
    Fault(
        "halves mixed up",
        "the second microbatch's weight half reads what the first left",
        halved,
        _weight_half(_of_the_first({})),
    ),
    Fault("weight half lost", "of one microbatch", halved, _weight_half(_lost)),
    Fault("weight half counted twice", "of one microbatch", halved, _weight_half(_twice)),
)
"""What can go wrong only where backwards come in halves."""
