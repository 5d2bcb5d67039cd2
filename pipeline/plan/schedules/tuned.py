"""A schedule by name, made for stages whose costs are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.plan.plan import Plan
from pipeline.plan.schedules.gpipe import gpipe
from pipeline.plan.schedules.interleaved import interleaved
from pipeline.plan.schedules.one_f_one_b import one_f_one_b
from pipeline.plan.schedules.zero_bubble import zb_h1, zb_h2
from pipeline.plan.schedules.zero_bubble_v import zb_v
from pipeline.plan.simulator import Cost

__all__ = ["TunedSchedule"]

_MAKERS: Mapping[str, tuple[Callable[..., Plan], tuple[str, ...]]] = {
    "1f1b": (one_f_one_b, ("chunks",)),
    "gpipe": (gpipe, ()),
    "interleaved": (interleaved, ("chunks",)),
    "zb-h1": (zb_h1, ("costs",)),
    "zb-h2": (zb_h2, ("costs",)),
    "zb-v": (zb_v, ("costs",)),
}
"""Each schedule's function, and what it takes of what is known."""


@dataclass(frozen=True, repr=False)
class TunedSchedule:
    """A schedule that "auto" has chosen: a function that makes its plans for known costs.

    Attributes:
        name: As `pipeline.plan.schedules.SCHEDULES` has it.
        costs: What each stage costs; plans of halves are made for it.
        chunks: How many stages a worker has.
    """

    name: str
    costs: tuple[Cost, ...] = ()
    chunks: int = 1

    def __call__(self, stages: int, microbatches: int, *, windows: int = 1, truncate: int | None = None) -> Plan:
        """The plan for one step, as the schedule's own function makes it."""
        make, takes = _MAKERS[self.name]
        given: dict[str, Any] = {name: getattr(self, name) for name in takes}
        return make(stages, microbatches, windows=windows, truncate=truncate, **given)

    def __repr__(self) -> str:
        return f"{self.name} (auto)"
