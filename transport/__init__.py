"""transport: moves named arrays between processes. Knows NumPy, MessagePack and ZeroMQ, nothing of TensorFlow."""

from transport.buffers import aligned_empty
from transport.channel import Inbox, Outbox, Transport
from transport.errors import (
    AddressInUse,
    BadAddress,
    ChannelClosed,
    MalformedMessage,
    MessageTooLarge,
    NotLoopback,
    PeerLost,
    TransportError,
    TransportTimeout,
    Unsendable,
    Watched,
)
from transport.limits import Limits
from transport.mailbox import Mailbox
from transport.message import DATA_KINDS, DRIVER, KINDS, Key, Message, Plain
from transport.registry import open_transport

__all__ = [
    "DATA_KINDS",
    "DRIVER",
    "KINDS",
    "AddressInUse",
    "BadAddress",
    "ChannelClosed",
    "Inbox",
    "Key",
    "Limits",
    "Mailbox",
    "MalformedMessage",
    "Message",
    "MessageTooLarge",
    "NotLoopback",
    "Outbox",
    "PeerLost",
    "Plain",
    "Transport",
    "TransportError",
    "TransportTimeout",
    "Unsendable",
    "Watched",
    "aligned_empty",
    "open_transport",
]
