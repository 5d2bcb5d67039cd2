"""The datagrams between an outbox and an inbox of one host, and who may send them.

::

    PREFIX (44 bytes, little-endian):
        form | 1 if a region is new | 2 unused | bytes of the header | number of a region | bytes of the array
        | step | microbatch | window
    header as the codec makes it, or nothing where it came before in parts
    array, where it is small

Step, microbatch and window count from the prefix, whatever the header says: so the same header serves all messages of
one tensor, and neither end makes or takes apart the same bytes twice.

The way back carries numbers of regions that the receiver has done with, one or several in a datagram.
"""

from __future__ import annotations

import array
import socket
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Final, NamedTuple

PIECE_BYTES: Final = 32 << 10
"""The most that one datagram carries of a long header or of an array that comes in pieces."""
DATAGRAM_BYTES: Final = 64 << 10
"""More than any datagram has."""

KNOWN_HEADERS: Final = 4096
"""So many headers either end keeps, before it begins anew."""

PREFIX: Final = struct.Struct("<BBxxIIQqqq")
NOWHERE: Final = (0, 0, 0)
"""Step, microbatch and window of a datagram that is no message."""
NUMBER: Final = struct.Struct("<I")
MOST_NUMBERS: Final = 1024
"""So many numbers one datagram of the way back has at most: 4 KiB, which the smallest socket holds."""


class Form(IntEnum):
    """The form of a datagram."""

    WITH_ARRAY = 0  # a message, and its array if it has one
    IN_REGION = 1  # a message, whose array lies in a region
    IN_PIECES = 2  # a message, whose array follows in pieces
    PIECE = 3  # one of them
    HEADER_PART = 4  # a part of the header of the message that follows
    FORGET = 5  # a region is not used any more


SEND_FLAGS: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
RECEIVE_FLAGS: Final = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
ROOM: Final = socket.CMSG_SPACE(NUMBER.size)
"""For one descriptor."""
_credentials: Final = struct.Struct("3i")  # process, user, group

Buffer = bytes | memoryview


class Datagram(NamedTuple):
    """One datagram to send, and the descriptor that travels with it, which stays the pool's of its region."""

    buffers: tuple[Buffer, ...]
    descriptor: int | None = None

    def kept(self) -> Datagram:
        """The same with memory of its own."""
        return self._replace(buffers=(b"".join(self.buffers),))


def user_of(connection: socket.socket) -> int:
    """The user at the other end, as the kernel knows it."""
    user: int = _credentials.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _credentials.size))[1]
    return user


def descriptors_in(ancillary: Sequence[tuple[int, int, bytes]]) -> array.array[int]:
    """The descriptors that came with a datagram; they are the caller's to close."""
    found = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(content[: len(content) - len(content) % found.itemsize])
    return found


def parts_of_bytes(whole: memoryview, size: int) -> Iterator[memoryview]:
    """Consecutive parts of some bytes, of `size` each but for the last."""
    return (whole[begin : begin + size] for begin in range(0, len(whole), size))


__all__ = [
    "DATAGRAM_BYTES",
    "KNOWN_HEADERS",
    "MOST_NUMBERS",
    "NOWHERE",
    "NUMBER",
    "PIECE_BYTES",
    "PREFIX",
    "RECEIVE_FLAGS",
    "ROOM",
    "SEND_FLAGS",
    "Datagram",
    "Form",
    "descriptors_in",
    "parts_of_bytes",
    "user_of",
]
