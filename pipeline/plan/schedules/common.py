"""Helpers of all schedules: the check of their numbers, and the blocks that they arrange.

Time runs forward in the forward pass and backward in the backward pass, so a microbatch of W windows is the
block F/0 F/1 ... F/W-1 and later the block B/W-1 ... B/0.  Where gradients are cut behind every k windows
(truncation), each k windows are a block of their own, and a microbatch is a row of blocks.
"""

from __future__ import annotations

from pipeline.errors import ScheduleError
from pipeline.saying import is_whole, not_whole
from stages.actions import Action, Kind

__all__ = ["Block", "backwards", "blocks", "check_numbers", "forwards", "refuse_windows", "workers_of"]

Block = tuple[int, range]
"""A microbatch and the windows of it that gradients stay in."""


def check_numbers(stages: int, microbatches: int, windows: int) -> None:
    """Refuse numbers that no plan can have.

    Raises:
        ScheduleError: a number is no whole number of at least 1.
    """
    for name, value in (("stages", stages), ("microbatches", microbatches), ("windows", windows)):
        if not is_whole(value):
            raise ScheduleError(not_whole(f"`{name}`", value))


def refuse_windows(schedule: str, windows: int) -> None:
    """For a schedule that cannot cut the time axis.

    Raises:
        ScheduleError: there are windows.
    """
    if windows > 1:
        raise ScheduleError(
            f"{schedule} has no place for windows of time, whose states and gradients bind a stage's own actions to "
            f"each other; windows={windows} goes with '1f1b' and 'gpipe'"
        )


def workers_of(schedule: str, stages: int, chunks: int) -> int:
    """The number of workers with `chunks` stages each.

    Raises:
        ScheduleError: `chunks` is no whole number of at least 1, or the stages cannot be divided so.
    """
    if not is_whole(chunks):
        raise ScheduleError(not_whole("`chunks`", chunks))
    workers, left = divmod(stages, chunks)
    if left:
        raise ScheduleError(
            f"{schedule} gives each worker {chunks} stages, and {stages} stage(s) cannot be divided so; cut the model "
            f"into a multiple of {chunks}, such as {chunks * (workers + 1)}"
        )
    return workers


def blocks(microbatches: int, windows: int, truncate: int | None = None) -> list[Block]:
    """All blocks of a step, microbatches ascending, and windows ascending within each.

    Raises:
        ScheduleError: `truncate` is no whole number of at least 1.
    """
    if truncate is not None:
        check_numbers(1, 1, truncate)
    length = windows if truncate is None else truncate
    starts = range(0, windows, length)
    return [(m, range(start, min(start + length, windows))) for m in range(microbatches) for start in starts]


def forwards(stage: int, some: list[Block]) -> tuple[Action, ...]:
    """The forwards of `stage` on some blocks, windows ascending within each."""
    return tuple(Action(Kind.FORWARD, stage, microbatch, w) for microbatch, windows in some for w in windows)


def backwards(stage: int, some: list[Block]) -> tuple[Action, ...]:
    """The backwards of `stage` on some blocks, windows descending within each."""
    return tuple(Action(Kind.BACKWARD, stage, microbatch, w) for microbatch, windows in some for w in reversed(windows))
