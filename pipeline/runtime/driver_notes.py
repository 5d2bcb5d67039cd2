"""The driver's own notes of a traced step: when it ordered it, what it sent, and when all workers had answered."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pipeline.plan.step_events import StepRecord
from stages.worker.reply import StepReply
from stages.worker.step_notes import Passage, passage
from transport.message import Message

__all__ = ["DriverNotes"]


class DriverNotes:
    """The notes of one step, which begins now."""

    def __init__(self) -> None:
        self._ordered = self._fed = time.monotonic()
        self._sent: list[Passage] = []

    def around(self, send: Callable[[int, Message], None]) -> Callable[[int, Message], None]:
        """The same way to a worker, with every message noted."""

        def noted(worker: int, message: Message) -> None:
            begin = time.monotonic()
            send(worker, message)
            self._fed = time.monotonic()
            self._sent.append(passage(message, begin, self._fed))

        return noted

    def record(self, answers: Sequence[StepReply]) -> StepRecord:
        """What driver and workers wrote; all have answered now."""
        notes = tuple(answer.notes for answer in answers if answer.notes is not None)
        return StepRecord(notes, tuple(self._sent), self._ordered, self._fed, time.monotonic())
