"""The receiving end of one host: one wait for all senders and whatever else is watched (`epoll`)."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket as socketlib
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from transport import codec
from transport.buffers import aligned_empty
from transport.channel import Inbox, Watchable
from transport.errors import ChannelClosed, MalformedMessage, TransportTimeout, Watched
from transport.limits import Limits
from transport.message import Message
from transport.one_host.datagrams import (
    DATAGRAM_BYTES,
    KNOWN_HEADERS,
    MOST_NUMBERS,
    NUMBER,
    PREFIX,
    RECEIVE_FLAGS,
    ROOM,
    SEND_FLAGS,
    Form,
    descriptors_in,
    user_of,
)
from transport.one_host.regions import ReceivedRegions

_NONE_FREE: Final = frozenset({errno.EMFILE, errno.ENFILE})
_VALUE: Final = 9
"""Where a header has the value."""
_WITH_ARRAY, _IN_PIECES, _TRUNCATED = int(Form.WITH_ARRAY), int(Form.IN_PIECES), int(socketlib.MSG_TRUNC)
_LOST_DESCRIPTORS: Final = int(socketlib.MSG_CTRUNC)
"""As plain integers, with which every message is compared: members of an enumeration are ten times slower."""


class _Peer:
    """One sender that is connected to an inbox.

    Attributes:
        header: Parts of a long header so far.
        rest: The header, the array, how many bytes of it are there, and the place, of a message that comes in pieces.
        untold: Numbers of regions that are done with, of which the sender does not know yet.
    """

    __slots__ = ("header", "regions", "rest", "socket", "untold")

    def __init__(self, socket: socketlib.socket) -> None:
        self.socket = socket
        self.regions = ReceivedRegions()
        self.header = bytearray()
        self.rest: tuple[codec.Header, codec.Raw, int, tuple[int, int, int]] | None = None
        self.untold: list[int] = []

    def give_back(self, number: int) -> None:
        """Tell the sender that a region is free, and those before of which its socket took no word.

        A number is never told twice, whenever Ctrl-C comes: the second time its region may hold the next message.
        """
        self.untold.append(number)
        while self.untold:
            numbers = self.untold[-MOST_NUMBERS:]
            del self.untold[-MOST_NUMBERS:]
            try:
                self.socket.send(b"".join(map(NUMBER.pack, numbers)), SEND_FLAGS)
            except OSError:  # the socket is full; or the sender is gone, and the region with it
                self.untold += numbers
                return

    def close(self) -> None:
        self.regions.close()
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
        self._known: dict[bytes, codec.Header] = {}
        self._scratch = bytearray(DATAGRAM_BYTES)
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
                try:
                    socket, _ = self._listener.accept()
                except OSError as error:
                    if error.errno not in _NONE_FREE:
                        raise
                    raise OSError(
                        error.errno, "a process connects and no file descriptor is free (ulimit -n)"
                    ) from error
                if user_of(socket) != os.geteuid():
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
            size, ancillary, flags, _ = peer.socket.recvmsg_into([self._scratch], ROOM, RECEIVE_FLAGS)
        except (BlockingIOError, ConnectionError):
            # A sender that closed with numbers unread is reported once, before what it sent: that is read next, then 0.
            return None
        descriptors = descriptors_in(ancillary) if ancillary else ()
        try:
            if size == 0:  # its sender is gone; what it sent before was read
                self._drop(peer)
                return None
            if flags & _TRUNCATED or size < PREFIX.size:
                raise MalformedMessage(f"a datagram of {size} bytes is none of this protocol")
            if flags & _LOST_DESCRIPTORS and not descriptors:
                raise OSError(errno.EMFILE, "a shared region arrived and no file descriptor is free (ulimit -n)")
            return self._interpret(peer, self._view[:size], descriptors)
        except MalformedMessage:
            peer.header.clear()
            peer.rest = None
            raise
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _interpret(self, peer: _Peer, datagram: memoryview, descriptors: Sequence[int]) -> Message | None:
        form, new, length, number, nbytes, step, microbatch, window = PREFIX.unpack_from(datagram)
        body = datagram[PREFIX.size :]
        if form > _IN_PIECES:
            return self._continue(peer, form, number, body)
        if length > len(body) or peer.rest is not None or not codec.places_fit(step, microbatch, window):
            raise MalformedMessage("a datagram is none of this protocol, or another was expected")
        place = (step, microbatch, window)
        header = self._header(peer, bytes(body[:length]))
        inline = body[length:]
        if nbytes != header.nbytes or len(inline) != (nbytes if form == _WITH_ARRAY else 0):
            raise codec.wrong_size(header, nbytes)
        if header.dtype is None:
            return codec.assemble(header, None, place)
        raw = aligned_empty(nbytes)
        if form == _IN_PIECES:
            peer.rest = (header, raw, 0, place)
            return None
        if form == _WITH_ARRAY:
            raw.data[:] = inline
        else:
            self._copy_region(peer, number, raw, descriptors if new else None)
        return codec.assemble(header, raw, place)

    def _continue(self, peer: _Peer, form: int, number: int, body: memoryview) -> Message | None:
        """Interpret a datagram that begins no message."""
        if form == Form.PIECE:
            return self._add_piece(peer, body)
        if form == Form.FORGET:
            peer.regions.forget(number)
        elif form != Form.HEADER_PART:
            raise MalformedMessage(f"a datagram has the form {form}, which is none of this protocol")
        elif len(peer.header) + len(body) > self._limits.max_header_bytes:
            raise MalformedMessage(f"a header is above the limit of {self._limits.max_header_bytes} bytes")
        else:
            peer.header += body
        return None

    def _header(self, peer: _Peer, packed: bytes) -> codec.Header:
        """The header of a message: known, or decoded, or what came in parts before."""
        if peer.header:
            packed, peer.header = bytes(peer.header), bytearray()
        header = self._known.get(packed)
        if header is None:
            header = codec.decode_header(packed, self._limits)
            if header.fields[_VALUE] in (None, True):  # else: what is in it belongs to the receiver
                if len(self._known) >= KNOWN_HEADERS:
                    self._known.clear()
                self._known[packed] = header
        return header

    def _copy_region(self, peer: _Peer, number: int, raw: codec.Raw, descriptors: Sequence[int] | None) -> None:
        try:
            if descriptors is not None:
                if not descriptors:
                    raise MalformedMessage("a new region was announced, and none came")
                peer.regions.learn(number, descriptors[0])
            peer.regions.read(number, raw)
        except ValueError as error:
            raise MalformedMessage(str(error)) from error
        peer.give_back(number)

    def _add_piece(self, peer: _Peer, body: memoryview) -> Message | None:
        if peer.rest is None:
            raise MalformedMessage("a piece of an array arrived that nobody announced")
        header, raw, there, place = peer.rest
        if there + len(body) > raw.nbytes:
            raise codec.wrong_size(header, there + len(body))
        raw.data[there : there + len(body)] = body
        peer.rest = (header, raw, there + len(body), place)
        if there + len(body) < raw.nbytes:
            return None
        peer.rest = None
        return codec.assemble(header, raw, place)


__all__ = ["LocalInbox"]
