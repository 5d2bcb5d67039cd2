"""Errors: the ground class of all of ours, the four families, and those that the transport raises.

    TapelineError
    ├── MistakeError     your mistake: an argument, a model, a batch, a file that does not fit
    ├── PeerError        the other side's fault: another process raised, died, sent nonsense, computed something else
    ├── TimedOutError    nothing happened in time
    └── ClosedError      it was closed before

Every error that our packages raise on purpose is of exactly one family, and of the package that raised it
(`TransportError`, `stages.StageError`, `pipeline.PipelineError`). All can be imported from `pipeline`; docs/errors.md
lists them. They stand here since every package may import this one.
"""

from __future__ import annotations


class TapelineError(Exception):
    """Base of every error that our packages raise on purpose."""


class MistakeError(TapelineError):
    """Your mistake: an argument, a model, a batch or a file that does not fit; raised before anything has changed."""


class PeerError(TapelineError):
    """The other side's fault: another process raised, died, sent nonsense, or computed something else."""


class TimedOutError(TapelineError):
    """Nothing happened within the time."""


class ClosedError(TapelineError):
    """Something that was closed is asked for."""


class TransportError(TapelineError):
    """Base of every error that the package `transport` raises."""


class Unsendable(TransportError, MistakeError, ValueError):  # noqa: N818 (reads as what it says)
    """The message holds something that has no place on the wire. Nothing was sent."""


class MessageTooLarge(Unsendable):
    """The message is above the channel's limits. Nothing was sent and the channel stays usable.

    Attributes:
        limit: Bytes that an array may have, if it has more.
    """

    def __init__(self, words: str, limit: int | None = None) -> None:
        super().__init__(words)
        self.limit = limit


class BadAddress(TransportError, MistakeError, ValueError):  # noqa: N818
    """The address is not one that this transport understands."""


class AddressInUse(TransportError, MistakeError):  # noqa: N818
    """Somebody already receives at this address."""


class NotLoopback(BadAddress):
    """A tcp address that other hosts can reach; refused: a run and its keys are for the processes of one host."""


class KeyFileError(TransportError, MistakeError, ValueError):
    """A key file of a party that is not there, is none, can be read by others, or would replace another one."""


class NotAdmitted(TransportError, PeerError, ConnectionError):  # noqa: N818
    """The other party does not let this key in, or is not who its pinned key says; trying again would not help."""


class MalformedMessage(TransportError, PeerError, ValueError):  # noqa: N818
    """An arrived message is not of this protocol. It was dropped whole; the channel stays usable."""


class PeerLost(TransportError, PeerError, ConnectionError):  # noqa: N818
    """The receiving side is gone. Messages sent just before may be lost too. The outbox stays lost."""


class TransportTimeout(TransportError, TimedOutError, TimeoutError):  # noqa: N818
    """Nothing happened within the given time. The channel stays usable."""


class ChannelClosed(TransportError, ClosedError):  # noqa: N818
    """The channel was closed on this side."""


class Watched(TransportError):  # noqa: N818
    """Not a fault of the channel: an object that the receiver also watches became readable.

    Attributes:
        source: the very object that was given in `watch`.
    """

    def __init__(self, source: object) -> None:
        super().__init__(f"no message was waiting and {source!r}, which is watched, became readable")
        self.source = source
