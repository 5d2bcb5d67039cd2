"""Every error that the `pipeline` package raises on purpose, under one base.

One family, so that a caller can catch `PipelineError` and be sure that what escapes is a defect of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Fault", "MicrobatchError", "PipelineError", "PlanError", "ScheduleError", "TimelineError"]


class PipelineError(Exception):
    """Base of all errors of this package."""


class ScheduleError(PipelineError, ValueError):
    """A schedule that does not exist, or one that was asked for an impossible plan."""


class MicrobatchError(PipelineError, ValueError):
    """A batch that cannot be cut into the microbatches asked for."""


class TimelineError(PipelineError, ValueError):
    """Times that cannot be: an action that ends before it starts, or a cost below zero."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a plan.

    Attributes:
        rule: the name of the broken rule, one of `pipeline.rules.RULES`.
        message: what was expected, what was found, and where.
    """

    rule: str
    message: str

    def __str__(self) -> str:
        return self.message


class PlanError(PipelineError, ValueError):
    """A plan that cannot run or would train something else; carries every fault that was found.

    Args:
        name: the name of the plan.
        faults: what is wrong with it, at least one.

    Attributes:
        faults: tuple of `Fault`, in the order of the rules.
    """

    SHOWN = 20

    def __init__(self, name: str, faults: Iterable[Fault]) -> None:
        self.name = name
        self.faults = tuple(faults)
        shown = [f"  {number}. [{fault.rule}] {fault}" for number, fault in enumerate(self.faults[: self.SHOWN], 1)]
        if len(self.faults) > self.SHOWN:
            shown.append(f"  ... and {len(self.faults) - self.SHOWN} more in `.faults`")
        count = f"{len(self.faults)} fault" + ("s" if len(self.faults) != 1 else "")
        super().__init__("\n".join([f"the plan {name!r} cannot be run, it has {count}:", *shown]))

    def __reduce__(self) -> tuple[type[PlanError], tuple[str, tuple[Fault, ...]]]:
        return type(self), (self.name, self.faults)
