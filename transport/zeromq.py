"""ipc and tcp: PUSH to PULL over ZeroMQ, for processes on one host.

Rules:

1. One outbox is one connection. It never reconnects by itself: after a loss nobody knows what arrived, so the outbox
   stays lost, and whoever restarts the run connects anew.
2. No high-water mark (ZeroMQ's is not flow control), so a send that would block means that the peer is gone.
3. A frame is received straight into memory of ours, its size known from the validated header.
4. Socket files are made and removed here, not by ZeroMQ (see `endpoints`).
5. Every tcp connection is encrypted, and only who has the run's keys gets one (see `keys`).
"""

from __future__ import annotations

import math
import os
import shutil
import socket as socketlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

import zmq
from zmq.utils.monitor import recv_monitor_message

from transport import codec, endpoints
from transport.buffers import aligned_empty
from transport.channel import LINGER_SECONDS, Inbox, Outbox, Transport, Watchable
from transport.errors import (
    BadAddress,
    ChannelClosed,
    MalformedMessage,
    PeerLost,
    TransportTimeout,
    Watched,
)
from transport.keys import FRAME_OVERHEAD, PROCESS_KEYS, Doorkeeper, RunKeys
from transport.limits import DEFAULT_LIMITS, Limits
from transport.message import Message

SEND_IN_PLACE: Final = 256 * 1024
"""Bytes from which a read-only array is sent without a copy; below, the copy is cheaper than the bookkeeping."""

_RETRY_SECONDS: Final = 0.01
_NOBLOCK: Final = int(zmq.NOBLOCK)
_NOBLOCK_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_FAILED: Final = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_NOTHING: Final = bytearray()
_UNBIND_MILLISECONDS: Final = 1000


class ZeromqInbox(Inbox):
    """The receiving end; see `Inbox`."""

    def __init__(
        self, socket: zmq.Socket[bytes], address: str, limits: Limits, file: endpoints.SocketFile | None
    ) -> None:
        self.address = address
        self.closed = False
        self._limits = limits
        self._file = file
        self._pid = os.getpid()
        self._socket = socket
        self._inside = False  # a message was begun, and its rest may still have to be skipped
        self._watch: Sequence[Watchable] = ()
        self._sources: dict[int, Watchable] = {}
        self._poller = zmq.Poller()
        self._prepare(())

    def receive(self, timeout: float | None = None, watch: Sequence[Watchable] = ()) -> Message:
        """See `Inbox.receive`."""
        socket = self._socket
        if self.closed:
            raise ChannelClosed(f"the inbox {self.address} is closed")
        if watch is not self._watch:
            self._prepare(watch)
        if self._inside:  # the last message was malformed, or its receipt was interrupted (Ctrl-C)
            self._skip_rest(socket)
        frame = self._first_frame(socket, timeout)
        self._inside = True
        header = codec.decode_header(frame.buffer, self._limits)
        raw, more = None, frame.more
        if header.dtype is not None:
            if not more:
                raise MalformedMessage("the header announces an array, and no frame follows")
            raw = aligned_empty(header.nbytes)
            received = socket.recv_into(raw.data if header.nbytes else _NOTHING, flags=_NOBLOCK)
            if received != header.nbytes:
                raise codec.wrong_size(header, received)
            more = bool(socket.getsockopt(zmq.RCVMORE))
        if more:
            raise MalformedMessage("more frames arrived than the header announces")
        self._inside = False
        return codec.assemble(header, raw)

    def close(self) -> None:
        """See `Inbox`. The address is free and the socket file gone when this returns."""
        if self.closed or self._pid != os.getpid():  # a forked copy must not remove its parent's file;
            return  # pyzmq itself leaves a parent's sockets alone
        self.closed = True
        if self._file is not None:
            self._file.remove()
        with self._socket.get_monitor_socket(int(zmq.EVENT_CLOSED)) as monitor:
            self._socket.unbind(cast(bytes, self._socket.last_endpoint))
            monitor.poll(_UNBIND_MILLISECONDS)  # ZeroMQ closes the listening descriptor in its own thread
            self._socket.disable_monitor()
        self._socket.close(linger=0)

    def _prepare(self, watch: Sequence[Watchable]) -> None:
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._sources = {item if isinstance(item, int) else item.fileno(): item for item in watch}
        for descriptor in self._sources:
            self._poller.register(descriptor, zmq.POLLIN)
        self._watch = watch

    def _first_frame(self, socket: zmq.Socket[bytes], timeout: float | None) -> zmq.Frame:
        deadline = None if timeout is None else time.monotonic() + timeout
        self._wait(socket, timeout)
        while True:
            try:
                return socket.recv(_NOBLOCK, copy=False)
            except zmq.Again:  # said to be there while only a part of it was; seen over encrypted connections
                self._wait(socket, None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _wait(self, socket: zmq.Socket[bytes], timeout: float | None) -> None:
        milliseconds = None if timeout is None else max(0, math.ceil(timeout * 1000))
        ready = self._poller.poll(milliseconds)
        if not ready:
            raise TransportTimeout(f"no message arrived at {self.address} within {timeout} s")
        first, _ = ready[0]  # in order of registration: the socket comes before what is watched
        if first is not socket:
            raise Watched(self._sources[first])

    def _skip_rest(self, socket: zmq.Socket[bytes]) -> None:
        while socket.getsockopt(zmq.RCVMORE):
            socket.recv_into(_NOTHING, flags=_NOBLOCK)
        self._inside = False


class ZeromqOutbox(Outbox):
    """The sending end; see `Outbox`."""

    def __init__(self, socket: zmq.Socket[bytes], address: str, limits: Limits) -> None:
        self.address = address
        self.closed = False
        self._limits = limits
        self._socket = socket
        self._lost = False

    def send(self, message: Message, timeout: float | None = None) -> None:
        """See `Outbox.send`."""
        socket = self._socket
        if self.closed:
            raise self._gone(message)
        frames = codec.encode(message, self._limits)
        try:
            if len(frames) == 1:
                socket.send(frames[0], _NOBLOCK)
            else:
                header, raw = frames
                socket.send(header, _NOBLOCK_MORE)
                socket.send(raw, _NOBLOCK, copy=raw.nbytes < SEND_IN_PLACE or not raw.readonly)
        except zmq.Again:
            self._lost = True
            self.close()
            raise self._gone(message) from None
        except BaseException:  # Ctrl-C between two frames: the next message would be glued to this one
            self.close()
            raise

    def close(self) -> None:
        """See `Outbox`. Goes on delivering in the background for at most `LINGER_SECONDS`."""
        self.closed = True
        self._socket.close()

    def _gone(self, message: Message) -> PeerLost | ChannelClosed:
        if self._lost:
            return PeerLost(f"the receiver at {self.address} is gone; {message} was not sent")
        return ChannelClosed(f"the outbox to {self.address} is closed")


class ZeromqTransport(Transport):
    """The base of ipc and tcp: one ZeroMQ context, with one I/O thread; see `Transport`."""

    def __init__(self, directory: Path | None = None, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._open: list[Inbox | Outbox] = []

    def connect(self, address: str, timeout: float | None = None) -> ZeromqOutbox:
        """See `Transport.connect`. Returns after the handshake: the socket file is not needed any more."""
        self._require_open()
        self._check(address)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            socket, failure = self._try_connect(address, deadline)
            if socket is not None:
                outbox = ZeromqOutbox(socket, address, self._limits)
                self._keep(outbox)
                return outbox
            if deadline is not None and time.monotonic() + _RETRY_SECONDS > deadline:
                raise TransportTimeout(
                    f"no inbox answered at {address} within {timeout} s (last attempt: {failure}); "
                    "is its process running?"
                )
            time.sleep(_RETRY_SECONDS)

    def close(self) -> None:
        """Closes every channel of this transport, and waits at most `LINGER_SECONDS` for undelivered messages."""
        while self._open:
            self._open.pop().close()
        self._context.term()

    def _check(self, address: str) -> None:
        raise NotImplementedError

    def _lock_inbox(self, socket: zmq.Socket[bytes]) -> None:
        """Nothing: only this user can open a socket file."""

    def _lock_outbox(self, socket: zmq.Socket[bytes]) -> None:
        """Nothing, for the same reason."""

    def _require_open(self) -> None:
        if self._context.closed:
            raise ChannelClosed(f"the {self.scheme} transport is closed")

    def _keep(self, channel: Inbox | Outbox) -> None:
        self._open = [one for one in self._open if not one.closed]
        self._open.append(channel)

    def _receive_from(self, listener: socketlib.socket, address: str, file: endpoints.SocketFile | None) -> ZeromqInbox:
        socket = self._socket(zmq.PULL)
        largest = max(self._limits.max_bytes, self._limits.max_header_bytes)
        socket.setsockopt(zmq.MAXMSGSIZE, largest + FRAME_OVERHEAD)
        self._lock_inbox(socket)
        socket.setsockopt(zmq.USE_FD, listener.detach())
        socket.bind(address)
        inbox = ZeromqInbox(socket, address, self._limits, file)
        self._keep(inbox)
        return inbox

    def _try_connect(self, address: str, deadline: float | None) -> tuple[zmq.Socket[bytes] | None, str]:
        """One attempt: a socket whose handshake has succeeded, or None and the reason."""
        socket = self._socket(zmq.PUSH)
        self._lock_outbox(socket)
        monitor = socket.get_monitor_socket(int(zmq.EVENT_HANDSHAKE_SUCCEEDED | _FAILED))
        connected = False
        failure = "no answer"
        try:
            socket.connect(address)
            left = None if deadline is None else max(0, math.ceil((deadline - time.monotonic()) * 1000))
            if monitor.poll(left):
                event: Any = recv_monitor_message(monitor)["event"]
                connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
                failure = str(zmq.Event(event).name).lower().replace("_", " ")
        finally:
            socket.disable_monitor()
            monitor.close(linger=0)
            if not connected:
                socket.close(linger=0)
        return (socket if connected else None), failure

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.LINGER, int(LINGER_SECONDS * 1000))
        return socket


class IpcTransport(ZeromqTransport):
    """Local sockets in a directory that only this user can enter."""

    scheme = "ipc"

    def __init__(self, directory: Path | None = None, limits: Limits = DEFAULT_LIMITS) -> None:
        super().__init__(directory, limits)
        self._directory = directory
        self._own_directory: Path | None = None
        self._pid = os.getpid()

    def bind(self, address: str | None = None) -> ZeromqInbox:
        """See `Transport.bind`. Without an address, the socket file gets a fresh name in the directory."""
        self._require_open()
        if address is None:
            if self._directory is None:
                self._directory = self._own_directory = Path(tempfile.mkdtemp(prefix="tapeline-"))
            address = endpoints.free_ipc_address(self._directory)
        listener, file = endpoints.listen_ipc(address)
        return self._receive_from(listener, address, file)

    def close(self) -> None:
        """Closes every channel and removes the directory if it was made here."""
        super().close()
        if self._own_directory is not None and self._pid == os.getpid():
            shutil.rmtree(self._own_directory, ignore_errors=True)
            self._own_directory = self._directory = None

    def _check(self, address: str) -> None:
        endpoints.ipc_path(address)


class TcpTransport(ZeromqTransport):
    """Loopback sockets, which every user of this host can reach: so all connections need the run's keys."""

    scheme = "tcp"

    def __init__(
        self, directory: Path | None = None, limits: Limits = DEFAULT_LIMITS, keys: RunKeys | None = None
    ) -> None:
        super().__init__(directory, limits)
        self._keys = PROCESS_KEYS if keys is None else keys
        self._doorkeeper: Doorkeeper | None = None
        self._pid = os.getpid()

    def close(self) -> None:
        """Closes every channel, and the door."""
        while self._open:
            self._open.pop().close()
        doorkeeper, self._doorkeeper = self._doorkeeper, None
        if doorkeeper is not None and self._pid == os.getpid():
            doorkeeper.close()
        super().close()

    def _lock_inbox(self, socket: zmq.Socket[bytes]) -> None:
        if self._doorkeeper is None:
            self._doorkeeper = Doorkeeper(self._context, self._keys.public.__eq__)
        self._keys.lock_inbox(socket)

    def _lock_outbox(self, socket: zmq.Socket[bytes]) -> None:
        self._keys.lock_outbox(socket)

    def bind(self, address: str | None = None) -> ZeromqInbox:
        """See `Transport.bind`. Without an address, a free port of 127.0.0.1."""
        self._require_open()
        listener, real = endpoints.listen_tcp("tcp://127.0.0.1:0" if address is None else address)
        return self._receive_from(listener, real, None)

    def _check(self, address: str) -> None:
        _, port = endpoints.tcp_host_port(address)
        if port == 0:
            raise BadAddress(f"port 0 is only for bind, got {address!r}")
