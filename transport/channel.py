"""The contract that every way of moving messages keeps; `transport.testing` checks it.

::

    worker 0                    worker 1
    Outbox ----send----------->  Inbox  <----- every other outbox of the run
      (one a destination)          (one a process)

Rules, for every implementation:

1. Messages from one outbox arrive once, whole and in the order sent. Those of several outboxes interleave.
2. A received array is fresh: 64-byte aligned, writable, contiguous and shared with nobody.
3. After `send` returns the caller may free its array. It may also write to it if the array was writable then: that is
   copied. A *read-only* array is sent in place: nobody may write to its memory (through another view) before the
   receiver has the message. Tensors and read-only views are sent without a copy that way.
4. `send` does not wait for the receiver. What is in flight is bounded by the plan, not by the channel.
5. A channel that raised TransportTimeout, Unsendable or MalformedMessage goes on working.
6. `close` may be called again and never hangs: what an outbox could not deliver within its linger time is lost.
7. A channel is used by one thread at a time. Different channels of one transport may be used by different threads.

Timeouts are seconds, or None to wait for ever; 0 does not wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Final, Protocol, Self

from transport.message import Message

LINGER_SECONDS: Final = 2.0
"""How long a closed outbox goes on delivering, in the background."""


class HasFileno(Protocol):
    """Something that can be waited for: a socket, a pipe, a process sentinel."""

    def fileno(self) -> int:
        """The descriptor, which becomes readable when there is something to notice."""


Watchable = HasFileno | int


class Closeable(Protocol):
    """An object that can be closed, by hand or as a context manager."""

    def close(self) -> None:
        """Releases everything; harmless when called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Inbox(Closeable, Protocol):
    """The receiving end of one process, for everything that is sent to it."""

    address: str
    closed: bool

    def receive(self, timeout: float | None = None, watch: Sequence[Watchable] = ()) -> Message:
        """Waits for the next message.

        Args:
            timeout: seconds, or None.
            watch: objects to wait for at the same time. A message that is there already comes first. Pass the same
                sequence object each time: it is prepared once.

        Raises:
            TransportTimeout: nothing arrived in time.
            Watched: one of `watch` is readable and no message is there.
            MalformedMessage: something arrived that is not a message; it is dropped.
            ChannelClosed: the inbox is closed.
        """


class Outbox(Closeable, Protocol):
    """The way to one other process."""

    address: str
    closed: bool

    def send(self, message: Message, timeout: float | None = None) -> None:
        """Hands one message over; see rule 3 for its array.

        Args:
            message: what to send.
            timeout: seconds, or None; no implementation here ever waits.

        Raises:
            Unsendable: the message holds what the wire does not carry; nothing was sent.
            MessageTooLarge: it is above the limits; nothing was sent.
            PeerLost: the receiver is gone, for good; noticed as soon as the system reports it.
            ChannelClosed: the outbox is closed.
        """


class Transport(Closeable, Protocol):
    """One way of moving messages; makes inboxes and outboxes and closes those that are left."""

    scheme: str

    def bind(self, address: str | None = None) -> Inbox:
        """Opens an inbox.

        Args:
            address: where; None picks a free address, which `Inbox.address` tells.

        Raises:
            AddressInUse: somebody receives there.
            BadAddress: it is not an address of this transport.
            NotLoopback: it could be reached from other hosts.
            ChannelClosed: the transport is closed.
        """

    def connect(self, address: str, timeout: float | None = None) -> Outbox:
        """Opens an outbox and returns once the connection stands; the inbox may be bound later than this is called.

        Raises:
            TransportTimeout: nobody receives at the address within `timeout` seconds.
            BadAddress, NotLoopback, ChannelClosed: as for `bind`.
        """
