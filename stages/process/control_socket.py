"""Messages between the driver and its fork server: one JSON object a datagram, and open files.

Not `socket.recv_fds`: in Python 3.11 it ignores its flags, so it would block, and leave what it received inheritable.
"""

from __future__ import annotations

import array
import json
import socket
from collections.abc import Sequence
from typing import Any

__all__ = ["receive", "send"]

_MAX_BYTES = 1 << 18
_MAX_DESCRIPTORS = 8


def send(connection: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send one message with copies of open file descriptors.

    Raises:
        OSError: the peer is gone, or the message is larger than a datagram can be (about 200 KB).
    """
    socket.send_fds(connection, [json.dumps(message).encode()], descriptors)


def receive(connection: socket.socket, flags: int = 0) -> tuple[dict[str, Any] | None, list[int]]:
    """Receive one message.

    Args:
        connection: a connected SOCK_SEQPACKET socket.
        flags: for `recvmsg`, such as `socket.MSG_DONTWAIT`.

    Returns:
        The message, or None if the peer closed its end; and the descriptors, which are the caller's to close. There are
        fewer than were sent if this process may not open more.

    Raises:
        OSError: as `recvmsg` raises it.
    """
    numbers = array.array("i")
    room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * numbers.itemsize)
    data, ancillary, _, _ = connection.recvmsg(_MAX_BYTES, room, flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
    return (json.loads(data) if data else None), list(numbers)
