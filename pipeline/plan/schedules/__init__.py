"""The schedules by name, and the one way from a name or a function to a checked plan.

A schedule is a function `(stages, microbatches, *, windows=1, truncate=None) -> Plan`; a user's own one has the same
form, and may leave out what it does not know.
A new schedule is a new file here and a row in `SCHEDULES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from pipeline.errors import ScheduleError
from pipeline.plan.plan import Plan, validate
from pipeline.plan.schedules.forward_only import forward_only
from pipeline.plan.schedules.gpipe import gpipe
from pipeline.plan.schedules.interleaved import interleaved
from pipeline.plan.schedules.one_f_one_b import one_f_one_b
from pipeline.plan.schedules.tuned import TunedSchedule
from pipeline.plan.schedules.zero_bubble import zb_h1, zb_h2, zero_bubble
from pipeline.plan.schedules.zero_bubble_v import zb_v
from pipeline.saying import did_you_mean

__all__ = [
    "SCHEDULES",
    "Schedule",
    "TunedSchedule",
    "build_plan",
    "forward_only",
    "gpipe",
    "interleaved",
    "one_f_one_b",
    "schedule_named",
    "zb_h1",
    "zb_h2",
    "zb_v",
    "zero_bubble",
]


class Schedule(Protocol):
    """A function that makes a plan for a number of stages, of microbatches and of windows."""

    def __call__(self, stages: int, microbatches: int, *, windows: int = 1, truncate: int | None = None) -> Plan:
        """The plan for one step of so many stages, microbatches and windows, each at least 1."""
        ...


SCHEDULES: Mapping[str, Schedule] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zb-v": zb_v,
}


def schedule_named(schedule: str | Schedule) -> Schedule:
    """The schedule that goes by a name.

    Args:
        schedule: a name of `SCHEDULES`, or a function of one's own, which is returned as it is.

    Raises:
        ScheduleError: no schedule has that name, or what was given is neither.
    """
    if isinstance(schedule, str):
        if schedule in SCHEDULES:
            return SCHEDULES[schedule]
        hint = did_you_mean(schedule, SCHEDULES)
        raise ScheduleError(f"there is no schedule {schedule!r}, expected one of {_names()}{hint}")
    if callable(schedule):
        return schedule
    raise ScheduleError(
        f"a schedule is one of {_names()} or a function (stages, microbatches) -> Plan, received {schedule!r}"
    )


def build_plan(
    schedule: str | Schedule,
    stages: int,
    microbatches: int,
    *,
    windows: int = 1,
    truncate: int | None = None,
    wiring: Mapping[int, Iterable[int]] | None = None,
) -> Plan:
    """The checked plan of a schedule.

    Args:
        schedule: as `schedule_named` takes it.
        stages: number of stages, at least 1.
        microbatches: number of microbatches in the step, at least 1.
        windows: number of windows of the time axis, at least 1. A function that knows no windows is fine for
            1.
        truncate: number of windows that a state's gradient goes back through; None: all.
        wiring: stage -> upstream stages; None means a chain.

    Raises:
        ScheduleError: no such schedule, impossible numbers, or the function made something else than asked.
        PlanError: the plan cannot run; with every fault.
    """
    make = schedule_named(schedule)
    options = {} if windows == 1 else {"windows": windows}
    if truncate is not None and windows > 1:
        options["truncate"] = truncate
    plan = make(stages, microbatches, **options)
    if not isinstance(plan, Plan):
        raise ScheduleError(f"the schedule {schedule!r} must return a Plan, it returned {plan!r}")
    asked, made = (stages, microbatches, windows), (plan.stages, plan.microbatches, plan.windows)
    if made != asked:
        raise ScheduleError(
            f"the schedule {schedule!r} was asked for (stages, microbatches, windows) = {asked}, but its plan "
            f"has {made}"
        )
    if plan.truncate != options.get("truncate"):
        raise ScheduleError(
            f"the schedule {schedule!r} was asked to cut gradients behind every {truncate} windows, its plan cuts them "
            f"behind {plan.truncate}"
        )
    return validate(plan, wiring)


def _names() -> str:
    return ", ".join(repr(name) for name in SCHEDULES)
