"""The status of a worker on eight int64 numbers that outlive it: written as it goes, read by the driver on failure.

The memory is `stages.process.status_board`'s; here its slots have names, and nobody else counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from stages.actions import Action, Kind

BoardArray = np.ndarray[Any, Any]
"""int64 array of shape (8,)."""


class Phase(IntEnum):
    """The phase of a worker."""

    IDLE = 0  # waits for the driver's next order
    WAITING = 1  # waits for a tensor
    RUNNING = 2  # computes an action of a step
    BUILDING = 3  # builds the model of a stage
    BUSY = 4  # carries out another order


class Status(NamedTuple):
    """The content of a status board, slot by slot.

    Attributes:
        phase: Number of a `Phase`.
        step: The last step that was begun; 0 before the first.
        kind: Number of the `Kind` of the step's action.
        stage: The action's stage; while building the stage that is built.
        microbatch: The action's.
        window: The action's.
        source: The stage that the awaited tensor comes from, or DRIVER.
        done: How many of the step's actions came before this one.
    """

    phase: int
    step: int
    kind: int
    stage: int
    microbatch: int
    window: int
    source: int
    done: int

    @classmethod
    def of(cls, slots: Sequence[int] | BoardArray) -> Status:
        """The content of a board, read from its memory (int64, shape (8,))."""
        return cls(*(int(slot) for slot in slots))

    @property
    def action(self) -> Action:
        """The action that was begun last."""
        return Action(Kind(self.kind), self.stage, self.microbatch, self.window)


class StatusBoard:
    """The writing end of a board.

    Args:
        slots: int64 array of shape (8,) that the driver's process shares.
    """

    __slots__ = ("_slots",)

    def __init__(self, slots: BoardArray) -> None:
        self._slots = slots.data  # as fast again as NumPy's items

    def idle(self) -> None:
        """An order is carried out; the next one is awaited."""
        self._slots[_PHASE] = Phase.IDLE

    def busy(self) -> None:
        """An order is carried out, outside of a step's actions."""
        self._slots[_PHASE] = Phase.BUSY

    def building(self, stage: int) -> None:
        """A stage's model is built."""
        self._slots[_STAGE] = stage
        self._slots[_PHASE] = Phase.BUILDING

    def begin(self, step: int, action: Action, done: int) -> None:
        """An action is next; its phase follows with `waiting` or `running`."""
        slots = self._slots
        slots[_STEP] = step
        slots[_KIND] = action.kind
        slots[_STAGE] = action.stage
        slots[_MICROBATCH] = action.microbatch
        slots[_WINDOW] = action.window
        slots[_DONE] = done

    def waiting(self, source: int) -> None:
        """The action waits for a tensor of a stage, or of the driver."""
        self._slots[_SOURCE] = source
        self._slots[_PHASE] = Phase.WAITING

    def running(self) -> None:
        """The action has all that it needs, and computes."""
        self._slots[_PHASE] = Phase.RUNNING


_PHASE, _STEP, _KIND, _STAGE, _MICROBATCH, _WINDOW, _SOURCE, _DONE = range(len(Status._fields))

__all__ = ["Phase", "Status", "StatusBoard"]
