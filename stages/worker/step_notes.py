"""The notes of a traced step on one worker: which messages it took and sent, when, and how long it waited for each.

Times are seconds of the worker's own monotonic clock. Processes of one host share it; whoever lays the notes of several
workers side by side looks whether these do (`pipeline.plan.clock_offsets`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.worker.step_program import Links
    from transport.message import Key, Message

__all__ = ["NoteTaker", "Passage", "StepNotes", "passage"]


@dataclass(frozen=True, slots=True)
class Passage:
    """One message at one of its two ends.

    Attributes:
        kind: As `transport.message.Message` has it, like `stage` (where it goes), `source`, `tensor`, `microbatch` and
            `window`.
        begin: Seconds: when its sending began, or when its receiver began to wait for it.
        end: When it was sent, or there.
        bytes: Of its array; 0 without one.
    """

    kind: str
    stage: int
    source: int
    tensor: str
    microbatch: int
    window: int
    begin: float
    end: float
    bytes: int

    @property
    def key(self) -> tuple[str, int, int, str, int, int]:
        """Equal at both ends of one message of a step."""
        return (self.kind, self.stage, self.source, self.tensor, self.microbatch, self.window)


@dataclass(frozen=True)
class StepNotes:
    """All notes of one worker of one step.

    Attributes:
        begin: When it began the step.
        end: When it was done with it, but for its reply.
        taken: The messages that it took, in the order of time.
        sent: Those that it sent.
        update: (begin, end) of the last update before this step; None before the first.
    """

    begin: float
    end: float
    taken: tuple[Passage, ...] = ()
    sent: tuple[Passage, ...] = ()
    update: tuple[float, float] | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        rows = {
            name: [[*each.key, each.begin, each.end, each.bytes] for each in getattr(self, name)]
            for name in ("taken", "sent")
        }
        return {"begin": self.begin, "end": self.end, "update": self.update, **rows}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> StepNotes:
        """From JSON."""
        update = data["update"]
        return cls(
            data["begin"],
            data["end"],
            tuple(Passage(*row) for row in data["taken"]),
            tuple(Passage(*row) for row in data["sent"]),
            None if update is None else (update[0], update[1]),
        )


@dataclass
class NoteTaker:
    """Whoever writes the notes of one step, from its beginning."""

    begin: float = field(default_factory=time.monotonic)
    taken: list[Passage] = field(default_factory=list)
    sent: list[Passage] = field(default_factory=list)

    def around(self, links: Links) -> Links:
        """The same way in and out, with every message noted."""

        def take(key: Key) -> Message:
            begin = time.monotonic()
            message = links.take(key)
            self.taken.append(passage(message, begin, time.monotonic()))
            return message

        def send(message: Message) -> None:
            begin = time.monotonic()
            links.send(message)
            self.sent.append(passage(message, begin, time.monotonic()))

        return replace(links, take=take, send=send)

    def notes(self, updates: Sequence[tuple[float, float] | None]) -> StepNotes:
        """What was written; the step ends now.

        Args:
            updates: For each stage the (begin, end) of its last update.
        """
        times = [each for each in updates if each is not None]
        update = (min(begin for begin, _ in times), max(end for _, end in times)) if times else None
        return StepNotes(self.begin, time.monotonic(), tuple(self.taken), tuple(self.sent), update)


def passage(message: Message, begin: float, end: float) -> Passage:
    """A message, at an end of which something was done from `begin` to `end`."""
    size = 0 if message.array is None else message.array.nbytes
    where = (message.kind, message.stage, message.source, message.tensor, message.microbatch, message.window)
    return Passage(*where, begin, end, size)
