"""What all schedules share: the check of their numbers and the blocks of windows that stand for a microbatch.

Time runs forward in the forward pass and backward in the backward pass, so a microbatch of W windows is the
block F/0 F/1 ... F/W-1 and later the block B/W-1 ... B/0.
"""

from __future__ import annotations

from operator import index

from pipeline.errors import ScheduleError
from stages.actions import Action, Kind

__all__ = ["backwards", "check", "forwards"]


def check(stages: int, microbatches: int, windows: int) -> None:
    """Refuse numbers that no plan can have.

    Raises:
        ScheduleError: a number is no whole number of at least 1.
    """
    for name, value in (("stages", stages), ("microbatches", microbatches), ("windows", windows)):
        try:
            good = index(value) >= 1 and not isinstance(value, bool)
        except TypeError:
            good = False
        if not good:
            raise ScheduleError(f"`{name}` must be a whole number of at least 1, received {value!r}")


def forwards(stage: int, microbatches: range, windows: int) -> tuple[Action, ...]:
    """The forwards of `stage` on some microbatches in ascending order, windows ascending within each."""
    return tuple(
        Action(Kind.FORWARD, stage, microbatch, window) for microbatch in microbatches for window in range(windows)
    )


def backwards(stage: int, microbatches: range, windows: int) -> tuple[Action, ...]:
    """The backwards of `stage` on some microbatches in ascending order, windows descending within each."""
    return tuple(
        Action(Kind.BACKWARD, stage, microbatch, window)
        for microbatch in microbatches
        for window in reversed(range(windows))
    )
