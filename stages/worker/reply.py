"""The one form of an answer: plain data of any length, and arrays.

On the wire the arrays come first, one message each; the reply's own message carries their number, and the data as JSON
in an array of bytes, since the values of messages are small.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stages.worker.step_notes import StepNotes
from transport.message import DRIVER, Key, Message

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Reply:
    """An answer to an order.

    Attributes:
        value: As JSON; {} where there is nothing to say but that the order is carried out.
        arrays: Arrays of any shape and dtype, None for one that does not exist.
    """

    value: Any = None
    arrays: Sequence[Array | None] = ()

    def messages(self, incarnation: int, number: int, source: int) -> Iterator[Message]:
        """What a worker sends.

        Args:
            incarnation: Of the run.
            number: The order's.
            source: The stage that the worker is known by.
        """
        for i, array in enumerate(self.arrays):
            yield Message("variable", incarnation, number, DRIVER, source, microbatch=i, array=array)
        text = np.frombuffer(json.dumps(self.value).encode(), np.uint8)
        yield Message("reply", incarnation, number, DRIVER, source, value=len(self.arrays), array=text)

    @classmethod
    def receive(cls, wait: Callable[[Key], Message], number: int, source: int) -> Reply:
        """What the driver makes of these messages.

        Args:
            wait: Waits for the message under a key.
            number: The order's.
            source: The stage that the worker is known by.
        """
        message = wait(Key("reply", number, DRIVER, source))
        count: Any = message.value
        assert message.array is not None
        arrays = [wait(Key("variable", number, DRIVER, source, microbatch=i)).array for i in range(count)]
        return cls(json.loads(message.array.tobytes()), arrays)


EdgePlace = tuple[str, int, int, str]
"""(what, producing stage, consuming stage, tensor name), as `stages.worker.observers.NormObserver` keeps them."""


@dataclass(frozen=True)
class StepReply:
    """A worker's reply to a step.

    Attributes:
        losses: {stage: (each head's loss, unweighted; the stage's own losses or None)}, of its stages.
        metrics: Those so far, of its heads.
        inner_metrics: Those so far of layers.
        masked: Whether masks of predictions count.
        spans: With a trace: (begin, end) of each action, seconds of the worker's monotonic clock.
        notes: With a trace: the messages that it took and sent.
        squared_norms: {(stage, place of a variable): sum of squares of its gradient}, where it was asked for.
        finite: Whether no gradient has an infinity or a NaN, where the loss was scaled.
        squares: {place: sum of squares of what crossed a cut}, where norms were asked for.
        roundings: Of a compiled reference: see `pipeline.batch.step.StepResult`.
    """

    losses: Mapping[int, tuple[Sequence[Any], float | None]]
    metrics: Mapping[str, float] = field(default_factory=dict)
    inner_metrics: Mapping[str, Any] = field(default_factory=dict)
    masked: bool = False
    spans: Sequence[tuple[float, float]] = ()
    notes: StepNotes | None = None
    squared_norms: Mapping[tuple[int, int], float] = field(default_factory=dict)
    finite: bool = True
    squares: Mapping[EdgePlace, float] = field(default_factory=dict)
    roundings: Mapping[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        losses = {str(stage): [list(by_head), own] for stage, (by_head, own) in self.losses.items()}
        norms = [[*place, value] for place, value in self.squared_norms.items()]
        squares = [[*place, value] for place, value in self.squares.items()]
        notes = None if self.notes is None else self.notes.plain()
        return {**vars(self), "losses": losses, "squared_norms": norms, "squares": squares, "notes": notes}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> StepReply:
        """From JSON."""
        return cls(
            **{
                **data,
                "losses": {int(stage): (by_head, own) for stage, (by_head, own) in data["losses"].items()},
                "spans": [(begin, end) for begin, end in data["spans"]],
                "notes": None if data["notes"] is None else StepNotes.from_plain(data["notes"]),
                "squared_norms": {(stage, k): value for stage, k, value in data["squared_norms"]},
                "squares": {tuple(place): value for *place, value in data["squares"]},
            }
        )


__all__ = ["Reply", "StepReply"]
