"""local: Unix sockets and shared memory, for processes of one user on one host; no process or thread in between.

    outbox ── one datagram a message ──────────────► inbox        small: header and array
           ── one datagram, array in a region ────►              large: see `regions`
           ◄─ the region's number ─────────────────

Rules:

1. The kernel wakes the receiver: an inbox waits once, for all senders and for whatever it watches (`epoll`).
2. A send never waits. What the socket does not take is kept in order, and a thread of the outbox, which lives only as
   long, sends it on; two processes that send to each other cannot lock each other up, whatever they do meanwhile.
3. Addresses are abstract sockets: no file, gone with their owner. Both ends ask the kernel who the other is, and only
   the same user gets in.
4. Where no region can be had or passed on (no descriptor left, no memfd), an array goes in pieces through the socket.
5. What a process sends to an inbox of the same transport does not leave it; it is copied all the same.
6. A forked copy of a process sends nothing and changes nothing of its parent's.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket as socketlib
import time
from pathlib import Path
from typing import Final

from transport.channel import Transport
from transport.errors import AddressInUse, BadAddress, ChannelClosed, TransportTimeout
from transport.limits import DEFAULT_LIMITS, Limits
from transport.one_host.datagrams import user_of
from transport.one_host.inbox import LocalInbox
from transport.one_host.outbox import LocalOutbox, OwnOutbox

_SCHEME: Final = "local://"
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,80}")
_RETRY_SECONDS: Final = 0.01
_BACKLOG: Final = 256
_SOCKET_BYTES: Final = 1 << 20  # asked for; the system may give less
_REFUSED: Final = frozenset({errno.ECONNREFUSED, errno.EAGAIN, errno.ENOENT})


class LocalTransport(Transport):
    """Ways between processes of this user on this host; see `Transport`."""

    scheme = "local"

    def __init__(self, directory: Path | None = None, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._inboxes: list[LocalInbox] = []
        self._outboxes: list[LocalOutbox | OwnOutbox] = []
        self._closed = False

    def bind(self, address: str | None = None) -> LocalInbox:
        """See `Transport.bind`. Without an address, one that nobody can guess."""
        self._require_open()
        address = f"{_SCHEME}{secrets.token_hex(16)}" if address is None else address
        listener = _socket()
        try:
            listener.bind(_place(address))
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(f"{address} already has a receiver; close it or choose another name") from error
            raise BadAddress(f"cannot receive at {address}: {error.strerror}") from error
        except BadAddress:
            listener.close()
            raise
        inbox = LocalInbox(listener, address, self._limits)
        self._inboxes[:] = [one for one in self._inboxes if not one.closed]
        self._inboxes.append(inbox)
        return inbox

    def connect(self, address: str, timeout: float | None = None) -> LocalOutbox | OwnOutbox:
        """See `Transport.connect`."""
        self._require_open()
        place = _place(address)
        deadline = None if timeout is None else time.monotonic() + timeout
        while (outbox := self._try_connect(address, place)) is None:
            if deadline is not None and time.monotonic() + _RETRY_SECONDS > deadline:
                raise TransportTimeout(
                    f"no inbox answered at {address} within {timeout} s; is its process running, on this host?"
                )
            time.sleep(_RETRY_SECONDS)
        self._outboxes = [one for one in self._outboxes if not one.closed]
        self._outboxes.append(outbox)
        return outbox

    def close(self) -> None:
        """Closes every channel of this transport, and waits at most `LINGER_SECONDS` for undelivered messages."""
        self._closed = True
        for outbox in self._outboxes:
            outbox.close()
        for outbox in self._outboxes:
            outbox.wait_delivered()
        for inbox in self._inboxes:
            inbox.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ChannelClosed("the local transport is closed")

    def _try_connect(self, address: str, place: str) -> LocalOutbox | OwnOutbox | None:
        """An outbox, or None where nobody receives at present."""
        for inbox in self._inboxes:
            if inbox.address == address and not inbox.closed:
                return OwnOutbox(inbox, self._limits)
        socket = _socket()
        try:
            socket.connect(place)
            if user_of(socket) != os.geteuid():
                raise BadAddress(f"another user receives at {address}, and this transport is for one user's processes")
        except OSError as error:
            socket.close()
            if error.errno in _REFUSED:
                return None
            raise
        except BadAddress:
            socket.close()
            raise
        return LocalOutbox(socket, address, self._limits)


def _socket() -> socketlib.socket:
    socket = socketlib.socket(socketlib.AF_UNIX, socketlib.SOCK_SEQPACKET)
    socket.setblocking(False)
    socket.setsockopt(socketlib.SOL_SOCKET, socketlib.SO_SNDBUF, _SOCKET_BYTES)
    return socket


def _place(address: str) -> str:
    """The abstract socket of an address."""
    name = address.removeprefix(_SCHEME)
    if name == address or not _NAME.fullmatch(name):
        raise BadAddress(f"expected an address like {_SCHEME}name (letters, digits, . _ -), got {address!r}")
    return f"\0tapeline/{name}"


__all__ = ["LocalTransport"]
