"""transport: moves named arrays between processes. Knows NumPy, MessagePack and ZeroMQ, nothing of TensorFlow.

Names are imported when first used: planning needs the errors and neither NumPy nor ZeroMQ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transport.lazy import load

if TYPE_CHECKING:  # the same names once more, for type checkers and editors
    from transport.buffers import aligned_empty as aligned_empty
    from transport.channel import Inbox as Inbox
    from transport.channel import Outbox as Outbox
    from transport.channel import Transport as Transport
    from transport.errors import AddressInUse as AddressInUse
    from transport.errors import BadAddress as BadAddress
    from transport.errors import ChannelClosed as ChannelClosed
    from transport.errors import ClosedError as ClosedError
    from transport.errors import KeyFileError as KeyFileError
    from transport.errors import MalformedMessage as MalformedMessage
    from transport.errors import MessageTooLarge as MessageTooLarge
    from transport.errors import MistakeError as MistakeError
    from transport.errors import NotAdmitted as NotAdmitted
    from transport.errors import NotLoopback as NotLoopback
    from transport.errors import PeerError as PeerError
    from transport.errors import PeerLost as PeerLost
    from transport.errors import TapelineError as TapelineError
    from transport.errors import TimedOutError as TimedOutError
    from transport.errors import TransportError as TransportError
    from transport.errors import TransportTimeout as TransportTimeout
    from transport.errors import Unsendable as Unsendable
    from transport.errors import Watched as Watched
    from transport.limits import Limits as Limits
    from transport.mailbox import Mailbox as Mailbox
    from transport.message import DATA_KINDS as DATA_KINDS
    from transport.message import DRIVER as DRIVER
    from transport.message import KINDS as KINDS
    from transport.message import Key as Key
    from transport.message import Message as Message
    from transport.message import Plain as Plain
    from transport.registry import open_transport as open_transport

_HOME = {
    "aligned_empty": "transport.buffers",
    "Inbox": "transport.channel",
    "Outbox": "transport.channel",
    "Transport": "transport.channel",
    "AddressInUse": "transport.errors",
    "BadAddress": "transport.errors",
    "ChannelClosed": "transport.errors",
    "ClosedError": "transport.errors",
    "KeyFileError": "transport.errors",
    "MalformedMessage": "transport.errors",
    "MessageTooLarge": "transport.errors",
    "MistakeError": "transport.errors",
    "NotAdmitted": "transport.errors",
    "NotLoopback": "transport.errors",
    "PeerError": "transport.errors",
    "PeerLost": "transport.errors",
    "TapelineError": "transport.errors",
    "TimedOutError": "transport.errors",
    "TransportError": "transport.errors",
    "TransportTimeout": "transport.errors",
    "Unsendable": "transport.errors",
    "Watched": "transport.errors",
    "Limits": "transport.limits",
    "Mailbox": "transport.mailbox",
    "DATA_KINDS": "transport.message",
    "DRIVER": "transport.message",
    "KINDS": "transport.message",
    "Key": "transport.message",
    "Message": "transport.message",
    "Plain": "transport.message",
    "open_transport": "transport.registry",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    value = load("transport", _HOME, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
