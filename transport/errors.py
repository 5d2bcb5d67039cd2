"""What can go wrong between two processes: one family, so that a caller can tell whose fault it was.

Four kinds of fault, told apart by class:

=====================  ===========================================================================
your mistake           `Unsendable`, `MessageTooLarge`, `AddressInUse`, `NotLoopback`, `BadAddress`
the other side's       `MalformedMessage`, `PeerLost`
time                   `TransportTimeout`
closed                 `ChannelClosed`
=====================  ===========================================================================
"""

from __future__ import annotations


class TransportError(Exception):
    """Base of every error that this package raises."""


class Unsendable(TransportError, ValueError):  # noqa: N818 (reads as what it says)
    """The message holds something that has no place on the wire. Nothing was sent."""


class MessageTooLarge(Unsendable):
    """The message is above the channel's limits. Nothing was sent and the channel stays usable."""


class BadAddress(TransportError, ValueError):  # noqa: N818
    """The address is not one that this transport understands."""


class AddressInUse(TransportError):  # noqa: N818
    """Somebody already receives at this address."""


class NotLoopback(BadAddress):
    """A tcp address that other hosts can reach; refused, because tcp without keys trusts everybody."""


class MalformedMessage(TransportError, ValueError):  # noqa: N818
    """What arrived is not a message of this protocol. It was dropped whole; the channel stays usable."""


class PeerLost(TransportError, ConnectionError):  # noqa: N818
    """The receiving side is gone. Messages sent just before may be lost too. The outbox stays lost."""


class TransportTimeout(TransportError, TimeoutError):  # noqa: N818
    """Nothing happened within the given time. The channel stays usable."""


class ChannelClosed(TransportError):  # noqa: N818
    """The channel was closed on this side."""


class Watched(TransportError):  # noqa: N818
    """Not a fault of the channel: an object that the receiver also watches became readable.

    Attributes:
        source: the very object that was given in `watch`.
    """

    def __init__(self, source: object) -> None:
        super().__init__(f"no message was waiting and {source!r}, which is watched, became readable")
        self.source = source
