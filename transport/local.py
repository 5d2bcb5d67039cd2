"""local: Unix sockets and shared memory, for processes of one user on one host; no process or thread in between.

    outbox ── one datagram a message ──────────────► inbox        small: header and array
           ── one datagram, array in a segment ────►              large: see `segments`
           ◄─ the segment's number ─────────────────

Rules:

1. The kernel wakes the receiver: an inbox waits once, for all senders and for whatever it watches (`epoll`).
2. A send never waits. What the socket does not take is kept in order, and a thread of the outbox, which lives only as
   long, sends it on; two processes that send to each other cannot lock each other up, whatever they do meanwhile.
3. Addresses are abstract sockets: no file, gone with their owner. Both ends ask the kernel who the other is, and only
   the same user gets in.
4. Where no segment can be had or passed on (no descriptor left, no memfd), an array goes in pieces through the socket.
5. What a process sends to an inbox of the same transport does not leave it; it is copied all the same.
6. A forked copy of a process sends nothing and changes nothing of its parent's.
"""

from __future__ import annotations

import array
import contextlib
import errno
import math
import os
import re
import secrets
import select
import socket as socketlib
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from transport import codec
from transport.buffers import aligned_empty
from transport.channel import Inbox, Outbox, Transport, Watchable
from transport.errors import (
    AddressInUse,
    BadAddress,
    ChannelClosed,
    MalformedMessage,
    PeerLost,
    TransportTimeout,
    Watched,
)
from transport.limits import DEFAULT_LIMITS, Limits
from transport.message import Message
from transport.segments import ReceivedSegments, SegmentPool

INLINE_BYTES: Final = 16 << 10
"""Arrays up to this size go with their header through the socket; above, a segment costs less."""

LINGER_SECONDS: Final = 2.0
"""How long a closed outbox goes on delivering what its socket did not take, in the background."""

_SCHEME: Final = "local://"
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,80}")
_RETRY_SECONDS: Final = 0.01
_BACKLOG: Final = 256
_LOOK_MILLISECONDS: Final = 20
_SOCKET_BYTES: Final = 1 << 20  # asked for; the system may give less
_PIECE_BYTES: Final = 32 << 10
_DATAGRAM_BYTES: Final = 64 << 10  # more than any that is sent
_LEAST_SOCKET_BYTES: Final = 4 << 10

_prefix: Final = struct.Struct("<BBxxIIQ")  # form, whether a segment is new, bytes of header, segment, bytes of array
_number: Final = struct.Struct("<I")
_credentials: Final = struct.Struct("3i")  # process, user, group
_WITH_ARRAY, _IN_SEGMENT, _IN_PIECES, _PIECE, _HEADER_PART, _FORGET = range(6)
_FLAGS: Final = socketlib.MSG_DONTWAIT | socketlib.MSG_NOSIGNAL
_RECEIVE_FLAGS: Final = socketlib.MSG_DONTWAIT | socketlib.MSG_CMSG_CLOEXEC
_ROOM: Final = socketlib.CMSG_SPACE(_number.size)
_FULL: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})
_NO_SEGMENT: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL}
)
_REFUSED: Final = frozenset({errno.ECONNREFUSED, errno.EAGAIN, errno.ENOENT})

Buffer = bytes | memoryview


class _Datagram(NamedTuple):
    """One datagram to send, and the descriptor that travels with it, which is closed afterwards."""

    buffers: tuple[Buffer, ...]
    descriptor: int | None = None

    def kept(self) -> _Datagram:
        """The same with memory of its own."""
        return self._replace(buffers=(b"".join(self.buffers),))

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


class _Peer:
    """One sender that is connected to an inbox.

    Attributes:
        header: Parts of a long header so far.
        rest: The header, the array and how many bytes of it are there, of a message that comes in pieces.
    """

    __slots__ = ("header", "rest", "segments", "socket")

    def __init__(self, socket: socketlib.socket) -> None:
        self.socket = socket
        self.segments = ReceivedSegments()
        self.header = bytearray()
        self.rest: tuple[codec.Header, codec.Raw, int] | None = None

    def close(self) -> None:
        self.segments.close()
        self.socket.close()


class LocalInbox(Inbox):
    """The receiving end; see `Inbox`."""

    def __init__(self, listener: socketlib.socket, address: str, limits: Limits) -> None:
        self.address = address
        self.closed = False
        self._limits = limits
        self._pid = os.getpid()
        self._listener = listener
        self._peers: dict[int, _Peer] = {}
        self._ready: deque[_Peer] = deque()
        self._own: deque[tuple[bytes, codec.Raw | None]] = deque()
        self._waiting = False
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._scratch = bytearray(_DATAGRAM_BYTES)
        self._view = memoryview(self._scratch)
        self._watch: Sequence[Watchable] = ()
        self._sources: dict[int, Watchable] = {}
        self._epoll = select.epoll()
        for descriptor in (listener.fileno(), self._event):
            self._epoll.register(descriptor, select.EPOLLIN)

    def receive(self, timeout: float | None = None, watch: Sequence[Watchable] = ()) -> Message:
        """See `Inbox.receive`."""
        if self.closed or self._pid != os.getpid():
            raise ChannelClosed(f"the inbox {self.address} is closed, or of the process that forked it")
        if watch is not self._watch:
            self._prepare(watch)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._own:
                header, raw = self._own.popleft()
                return codec.assemble(codec.decode_header(header, self._limits), raw)
            while self._ready:
                message = self._read(self._ready.popleft())
                if message is not None:
                    return message
            self._wait(deadline, timeout)

    def put(self, header: bytes, raw: codec.Raw | None) -> bool:
        """Queue a message of this process, whose frames the inbox takes over. False when the inbox is closed."""
        if self.closed:
            return False
        self._own.append((header, raw))
        if self._waiting:
            os.eventfd_write(self._event, 1)
        return True

    def close(self) -> None:
        """See `Inbox`. The address is free when this returns."""
        if self.closed:
            return
        self.closed = True
        for peer in list(self._peers.values()):
            self._drop(peer)
        if self._pid == os.getpid():  # a forked copy shares the epoll set: it only closes its own descriptors
            for descriptor in self._sources:
                self._unregister(descriptor)
        self._epoll.close()
        os.close(self._event)
        self._listener.close()

    def _prepare(self, watch: Sequence[Watchable]) -> None:
        for descriptor in self._sources:
            self._unregister(descriptor)
        self._sources = {item if isinstance(item, int) else item.fileno(): item for item in watch}
        for descriptor in self._sources:
            self._epoll.register(descriptor, select.EPOLLIN)
        self._watch = watch

    def _wait(self, deadline: float | None, timeout: float | None) -> None:
        """Returns when a message may be there; raises when none is and something else happened."""
        self._waiting = True
        try:
            events, watched = self._look(None if deadline is None else max(0.0, deadline - time.monotonic()))
        finally:
            self._waiting = False
        if watched is not None and events > 1 and not self._ready:
            self._look(0)  # whoever was let in just now may have sent something, and a message comes first
        if self._ready or self._own:
            return
        if watched is not None:
            raise Watched(watched)
        if not events:
            raise TransportTimeout(f"no message arrived at {self.address} within {timeout} s")

    def _look(self, seconds: float | None) -> tuple[int, Watchable | None]:
        """Wait once for all sources and serve them; how many there were, and one of those that are watched."""
        events = self._epoll.poll(0 if self._own else seconds)
        watched = None
        for descriptor, _ in events:
            peer = self._peers.get(descriptor)
            if peer is not None:
                self._ready.append(peer)
            elif descriptor == self._event:
                os.eventfd_read(self._event)
            elif descriptor in self._sources:
                watched = self._sources[descriptor] if watched is None else watched
            else:
                self._accept()
        return len(events), watched

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                socket, _ = self._listener.accept()
                if _user_of(socket) != os.geteuid():
                    socket.close()
                    continue
                socket.setblocking(False)
                self._peers[socket.fileno()] = _Peer(socket)
                self._epoll.register(socket.fileno(), select.EPOLLIN)

    def _drop(self, peer: _Peer) -> None:
        descriptor = peer.socket.fileno()
        if self._pid == os.getpid():
            self._unregister(descriptor)
        self._peers.pop(descriptor, None)
        peer.close()

    def _unregister(self, descriptor: int) -> None:
        with contextlib.suppress(OSError):  # whoever owns it may have closed it
            self._epoll.unregister(descriptor)

    def _read(self, peer: _Peer) -> Message | None:
        """The message that one datagram completes; None where it completes none, or the sender is gone."""
        try:
            size, ancillary, flags, _ = peer.socket.recvmsg_into([self._scratch], _ROOM, _RECEIVE_FLAGS)
        except BlockingIOError:
            return None
        except ConnectionError:
            size, ancillary, flags = 0, [], 0
        descriptors = _descriptors(ancillary) if ancillary else ()
        try:
            if size == 0:  # its sender is gone; what it sent before was read
                self._drop(peer)
                return None
            if flags & socketlib.MSG_TRUNC or size < _prefix.size:
                raise MalformedMessage(f"a datagram of {size} bytes is none of this protocol")
            return self._interpret(peer, self._view[:size], descriptors)
        except MalformedMessage:
            peer.header.clear()
            peer.rest = None
            raise
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _interpret(self, peer: _Peer, datagram: memoryview, descriptors: Sequence[int]) -> Message | None:
        form, new, length, number, nbytes = _prefix.unpack_from(datagram)
        body = datagram[_prefix.size :]
        if form == _PIECE:
            return self._add_piece(peer, body)
        if form == _FORGET:
            peer.segments.forget(number)
            return None
        if form == _HEADER_PART:
            if len(peer.header) + len(body) > self._limits.max_header_bytes:
                raise MalformedMessage(f"a header is above the limit of {self._limits.max_header_bytes} bytes")
            peer.header += body
            return None
        if form > _IN_PIECES or length > len(body) or peer.rest is not None:
            raise MalformedMessage("a datagram is none of this protocol, or another was expected")
        if peer.header:
            long, peer.header = peer.header, bytearray()
            header = codec.decode_header(long, self._limits)
        else:
            header = codec.decode_header(body[:length], self._limits)
        inline = body[length:]
        if nbytes != header.nbytes or len(inline) != (nbytes if form == _WITH_ARRAY else 0):
            raise codec.wrong_size(header, nbytes)
        if header.dtype is None:
            return codec.assemble(header, None)
        raw = aligned_empty(nbytes)
        if form == _IN_PIECES:
            peer.rest = (header, raw, 0)
            return None
        if form == _WITH_ARRAY:
            raw.data[:] = inline
        else:
            self._copy_segment(peer, number, raw, descriptors if new else None)
        return codec.assemble(header, raw)

    def _copy_segment(self, peer: _Peer, number: int, raw: codec.Raw, descriptors: Sequence[int] | None) -> None:
        try:
            if descriptors is not None:
                if not descriptors:
                    raise OSError(errno.EMFILE, "a shared segment arrived and no file descriptor is free (ulimit -n)")
                peer.segments.learn(number, descriptors[0])
            peer.segments.read(number, raw)
        except ValueError as error:
            raise MalformedMessage(str(error)) from error
        with contextlib.suppress(OSError):  # its sender is gone, and the segment with it
            peer.socket.send(_number.pack(number), _FLAGS)

    def _add_piece(self, peer: _Peer, body: memoryview) -> Message | None:
        if peer.rest is None:
            raise MalformedMessage("a piece of an array arrived that nobody announced")
        header, raw, there = peer.rest
        if there + len(body) > raw.nbytes:
            raise codec.wrong_size(header, there + len(body))
        raw.data[there : there + len(body)] = body
        peer.rest = (header, raw, there + len(body))
        if there + len(body) < raw.nbytes:
            return None
        peer.rest = None
        return codec.assemble(header, raw)


class LocalOutbox(Outbox):
    """The sending end; see `Outbox`."""

    def __init__(self, socket: socketlib.socket, address: str, limits: Limits) -> None:
        self.address = address
        self.closed = False
        self._limits = limits
        self._pid = os.getpid()
        self._socket = socket
        self._lost = False
        self._lock = threading.RLock()  # the thread that sends on what waits has it too
        self._queue: deque[_Datagram] = deque()
        self._pool = SegmentPool()
        self._most = min(_PIECE_BYTES, socket.getsockopt(socketlib.SOL_SOCKET, socketlib.SO_SNDBUF) // 4)
        self._inline = min(INLINE_BYTES, self._most // 2)
        self._later: threading.Thread | None = None
        self._until = math.inf

    def send(self, message: Message, timeout: float | None = None) -> None:
        """See `Outbox.send`."""
        if self.closed or self._pid != os.getpid():
            raise _gone(self, message, self._lost)
        header, *raws = codec.encode(message, self._limits)
        with self._lock:
            try:
                for datagram in self._datagrams(header, raws[0] if raws else None):
                    self._post(datagram)
            except ConnectionError:
                self._lose()
            except BaseException:  # Ctrl-C between two datagrams: the next message would be taken for the rest of this
                self._lose(lost=False)
                raise
            if self._lost:
                raise _gone(self, message, self._lost)

    def close(self) -> None:
        """See `Outbox`. Goes on delivering in the background for at most `LINGER_SECONDS`, if anything is left."""
        if self._pid != os.getpid():  # a copy, whose lock may be held by a thread that was not copied
            self.closed = True
            self._socket.close()
            return
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._until = time.monotonic() + LINGER_SECONDS
            if not self._queue:
                self._release()

    def wait_delivered(self) -> None:
        """After `close`: until everything was taken, or the linger time is over."""
        later = self._later
        if later is not None and self._pid == os.getpid():
            later.join()

    def _send_later(self) -> None:
        """Send what the socket did not take as soon as it does; the thread of rule 2."""
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        while True:
            poll.poll(_LOOK_MILLISECONDS)
            with self._lock:
                waited = len(self._queue)
                self._flush()
                if not self._queue or time.monotonic() >= self._until:
                    if self.closed:
                        self._release()
                    self._later = None
                    return
                stuck = len(self._queue) == waited
            if stuck:  # the socket is not what is full
                time.sleep(_RETRY_SECONDS)

    def _flush(self) -> None:
        try:
            while self._queue and self._try(self._queue[0]):
                self._queue.popleft()
        except ConnectionError:
            self._lose()

    def _datagrams(self, header: bytes, raw: memoryview | None) -> Iterator[_Datagram]:
        """What a message is sent as, one after the other."""
        nbytes = 0 if raw is None else raw.nbytes
        if len(header) > self._most // 2:
            for part in _parts(memoryview(header), self._most):
                yield _Datagram((_prefix.pack(_HEADER_PART, 0, 0, 0, 0), part))
            header = b""
        if nbytes <= self._inline:
            prefix = _prefix.pack(_WITH_ARRAY, 0, len(header), 0, nbytes)
            yield _Datagram((prefix, header) if raw is None else (prefix, header, raw))
            return
        assert raw is not None
        found = self._fill(raw)
        if found is not None:
            number, descriptor = found
            yield _Datagram(
                (_prefix.pack(_IN_SEGMENT, descriptor is not None, len(header), number, nbytes), header), descriptor
            )
            for small in self._pool.surplus(nbytes):
                yield _Datagram((_prefix.pack(_FORGET, 0, 0, small, 0),))
            return
        yield _Datagram((_prefix.pack(_IN_PIECES, 0, len(header), 0, nbytes), header))
        for part in _parts(raw.cast("B"), self._most):
            yield _Datagram((_prefix.pack(_PIECE, 0, 0, 0, 0), part))

    def _fill(self, raw: memoryview) -> tuple[int, int | None] | None:
        """Copy an array into a segment: its number, and its descriptor if the receiver does not know it yet."""
        descriptor = None
        taken = self._pool.take(raw.nbytes)
        if taken is None:
            self._take_back()
            taken = self._pool.take(raw.nbytes)
        if taken is None:
            try:
                number, segment, descriptor = self._pool.make(raw.nbytes)
            except OSError as error:
                if error.errno not in _NO_SEGMENT:
                    raise
                return None
        else:
            number, segment = taken
        segment.memory[: raw.nbytes] = np.frombuffer(raw, np.uint8)
        return number, descriptor

    def _take_back(self) -> None:
        """Hear which segments the receiver has done with."""
        with contextlib.suppress(BlockingIOError):
            while told := self._socket.recv(_number.size, _FLAGS):
                self._pool.give_back(*_number.unpack(told))

    def _post(self, datagram: _Datagram) -> None:
        """Send a datagram, or keep it behind those that wait already."""
        if self._queue or not self._try(datagram):
            self._queue.append(datagram.kept())
            if self._later is None:
                self._later = threading.Thread(target=self._send_later, daemon=True, name="tapeline-send-later")
                self._later.start()

    def _try(self, datagram: _Datagram) -> bool:
        """Send a datagram; False if the socket takes none now."""
        try:
            if datagram.descriptor is None:
                self._socket.sendmsg(datagram.buffers, (), _FLAGS)
            else:
                rights = array.array("i", [datagram.descriptor])
                self._socket.sendmsg(datagram.buffers, [(socketlib.SOL_SOCKET, socketlib.SCM_RIGHTS, rights)], _FLAGS)
        except OSError as error:
            if error.errno in _FULL:
                return False
            raise
        datagram.close()
        return True

    def _lose(self, lost: bool = True) -> None:
        self._lost, self.closed = lost, True
        self._release()

    def _release(self) -> None:
        """Close the socket and forget what waits."""
        while self._queue:
            self._queue.popleft().close()
        self._pool.close()
        self._socket.close()


class OwnOutbox(Outbox):
    """The way to an inbox of the same transport."""

    def __init__(self, inbox: LocalInbox, limits: Limits) -> None:
        self.address = inbox.address
        self.closed = False
        self._inbox = inbox
        self._limits = limits
        self._lost = False

    def send(self, message: Message, timeout: float | None = None) -> None:
        """See `Outbox.send`."""
        if not self.closed:
            header, *raws = codec.encode(message, self._limits)
            if self._inbox.put(header, codec.aligned_copy(raws[0]) if raws else None):
                return
            self._lost = self.closed = True
        raise _gone(self, message, self._lost)

    def close(self) -> None:
        """See `Outbox`."""
        self.closed = True

    def wait_delivered(self) -> None:
        """Everything is."""


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
            if _user_of(socket) != os.geteuid():
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


def _user_of(socket: socketlib.socket) -> int:
    """The user at the other end, as the kernel knows it."""
    return _credentials.unpack(socket.getsockopt(socketlib.SOL_SOCKET, socketlib.SO_PEERCRED, _credentials.size))[1]


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> array.array[int]:
    found = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socketlib.SOL_SOCKET, socketlib.SCM_RIGHTS):
            found.frombytes(content[: len(content) - len(content) % found.itemsize])
    return found


def _parts(whole: memoryview, size: int) -> Iterator[memoryview]:
    return (whole[begin : begin + size] for begin in range(0, len(whole), size))


def _gone(outbox: Outbox, message: Message, lost: bool) -> PeerLost | ChannelClosed:
    if lost:
        return PeerLost(f"the receiver at {outbox.address} is gone; {message} was not sent")
    return ChannelClosed(f"the outbox to {outbox.address} is closed, or of the process that forked it")


__all__ = ["INLINE_BYTES", "LINGER_SECONDS", "LocalInbox", "LocalOutbox", "LocalTransport", "OwnOutbox"]
