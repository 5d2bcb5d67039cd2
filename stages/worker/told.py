"""Two words of the driver to a worker that waits for something else: the run has ended, or orders are taken back."""

from __future__ import annotations

from transport.message import Message


class Stopped(Exception):  # noqa: N818 - not an error: the driver asked for it
    """The driver ended the run while this worker waited."""


class Abandoned(Exception):  # noqa: N818 - not an error: the driver asked for it
    """The driver took back what it had ordered while this worker waited.

    Attributes:
        number: The last order that was taken back; the next one has the number behind it.
        first_step: The first step that does not count.
    """

    def __init__(self, number: int, first_step: int) -> None:
        super().__init__()
        self.number, self.first_step = number, first_step


def obeyed(message: Message) -> Message:
    """The message itself, unless it is one of these.

    Raises:
        Stopped, Abandoned: It is.
    """
    if message.kind == "stop":
        raise Stopped
    if message.kind == "abandon":
        raise Abandoned(message.step, int(message.value or 0))  # type: ignore[arg-type]
    return message


__all__ = ["Abandoned", "Stopped", "obeyed"]
