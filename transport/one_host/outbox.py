"""The sending ends of one host: to another process through a socket and regions, and to an inbox of one's own."""

from __future__ import annotations

import array
import contextlib
import errno
import math
import os
import select
import socket as socketlib
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np

from transport import codec
from transport.channel import LINGER_SECONDS, Outbox
from transport.dtypes import BUFFER_NAMES, NAMES
from transport.errors import ChannelClosed, PeerLost
from transport.limits import Limits
from transport.message import Message
from transport.one_host.datagrams import (
    KNOWN_HEADERS,
    MOST_NUMBERS,
    NOWHERE,
    NUMBER,
    PIECE_BYTES,
    PREFIX,
    SEND_FLAGS,
    Datagram,
    Form,
    parts_of_bytes,
)
from transport.one_host.inbox import LocalInbox
from transport.one_host.regions import RegionPool

INLINE_BYTES: Final = 16 << 10
"""Arrays up to this size go with their header through the socket; above, a region costs less."""

_RETRY_SECONDS: Final = 0.01
_LOOK_MILLISECONDS: Final = 20
_FULL: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})
_NO_REGION: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL}
)


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
        self._queue: deque[Datagram] = deque()
        self._pool = RegionPool()
        self._known: dict[Hashable, bytes] = {}
        self._most = min(PIECE_BYTES, socket.getsockopt(socketlib.SOL_SOCKET, socketlib.SO_SNDBUF) // 4)
        self._inline = min(INLINE_BYTES, self._most // 2)
        self._later: threading.Thread | None = None
        self._until = math.inf

    def send(self, message: Message, timeout: float | None = None) -> None:
        """See `Outbox.send`."""
        if self.closed or self._pid != os.getpid():
            raise _gone(self, message, self._lost)
        header, raw = self._frames(message)
        place = (message.step, message.microbatch, message.window)
        with self._lock:
            if self.closed:  # the thread that sends on what waits has found the receiver gone just now
                raise _gone(self, message, self._lost)
            try:
                for datagram in self._datagrams(header, raw, place):
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
        except OSError:  # whatever it is: nobody is here to be told, so the next `send` is
            self._lose()

    def _frames(self, message: Message) -> tuple[bytes, memoryview | None]:
        """The header, with any step, microbatch and window, and the raw frame; those that are known are not made again.

        Raises:
            Unsendable, MessageTooLarge: As `transport.codec.encode`.
        """
        array = message.array
        key = None
        if (message.value is None or message.value is True) and (array is None or type(array) is np.ndarray):
            kind = None if array is None else (array.dtype, array.shape)
            key = (
                message.kind,
                message.incarnation,
                message.stage,
                message.source,
                message.tensor,
                message.value,
                kind,
            )
            header = self._known.get(key)
            if header is not None and codec.places_fit(message.step, message.microbatch, message.window):
                if array is None:
                    return header, None
                if array.flags.c_contiguous:
                    return header, array.data
        header, *raws = codec.encode(message, self._limits)
        if key is not None and (array is None or NAMES.get(array.dtype) in BUFFER_NAMES):
            if len(self._known) >= KNOWN_HEADERS:
                self._known.clear()
            self._known[key] = codec.encode(replace(message, step=0, microbatch=0, window=0), self._limits)[0]
        return header, raws[0] if raws else None

    def _datagrams(self, header: bytes, raw: memoryview | None, place: tuple[int, int, int]) -> Iterator[Datagram]:
        """What a message is sent as, one after the other."""
        nbytes = 0 if raw is None else raw.nbytes
        if len(header) > self._most // 2:
            for part in parts_of_bytes(memoryview(header), self._most):
                yield Datagram((PREFIX.pack(Form.HEADER_PART, 0, 0, 0, 0, *NOWHERE), part))
            header = b""
        if nbytes <= self._inline:
            prefix = PREFIX.pack(Form.WITH_ARRAY, 0, len(header), 0, nbytes, *place)
            yield Datagram((prefix, header) if raw is None else (prefix, header, raw))
            return
        assert raw is not None
        found = self._fill(raw)
        if found is not None:
            number, descriptor = found
            prefix = PREFIX.pack(Form.IN_REGION, descriptor is not None, len(header), number, nbytes, *place)
            yield Datagram((prefix, header), descriptor)
            for small in self._pool.surplus(nbytes):
                yield Datagram((PREFIX.pack(Form.FORGET, 0, 0, small, 0, *NOWHERE),))
            return
        yield Datagram((PREFIX.pack(Form.IN_PIECES, 0, len(header), 0, nbytes, *place), header))
        for part in parts_of_bytes(raw.cast("B"), self._most):
            yield Datagram((PREFIX.pack(Form.PIECE, 0, 0, 0, 0, *NOWHERE), part))

    def _fill(self, raw: memoryview) -> tuple[int, int | None] | None:
        """Copy an array into a region: its number, and its descriptor if the receiver does not know it yet."""
        descriptor = None
        self._take_back()
        taken = self._pool.take(raw.nbytes)
        if taken is None:
            try:
                number, region, descriptor = self._pool.make(raw.nbytes)
            except OSError as error:
                if error.errno not in _NO_REGION:
                    raise
                return None
        else:
            number, region = taken
        region.memory[: raw.nbytes] = np.frombuffer(raw, np.uint8)
        return number, descriptor

    def _take_back(self) -> None:
        """Hear which regions the receiver has done with."""
        with contextlib.suppress(BlockingIOError):
            while told := self._socket.recv(NUMBER.size * MOST_NUMBERS, SEND_FLAGS):
                for (number,) in NUMBER.iter_unpack(told):
                    self._pool.give_back(number)

    def _post(self, datagram: Datagram) -> None:
        """Send a datagram, or keep it behind those that wait already."""
        if self._queue or not self._try(datagram):
            self._queue.append(datagram.kept())
            if self._later is None:
                later = threading.Thread(target=self._send_later, daemon=True, name="tapeline-send-later")
                later.start()
                self._later = later

    def _try(self, datagram: Datagram) -> bool:
        """Send a datagram; False if the socket takes none now."""
        try:
            if datagram.descriptor is None:
                self._socket.sendmsg(datagram.buffers, (), SEND_FLAGS)
            else:
                rights = array.array("i", [datagram.descriptor])
                self._socket.sendmsg(
                    datagram.buffers, [(socketlib.SOL_SOCKET, socketlib.SCM_RIGHTS, rights)], SEND_FLAGS
                )
        except OSError as error:
            if error.errno in _FULL:
                return False
            raise
        if datagram.descriptor is not None:
            self._pool.passed_on(datagram.descriptor)
        return True

    def _lose(self, lost: bool = True) -> None:
        self._lost, self.closed = lost, True
        self._release()

    def _release(self) -> None:
        """Close the socket and forget what waits."""
        self._queue.clear()
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


def _gone(outbox: Outbox, message: Message, lost: bool) -> PeerLost | ChannelClosed:
    if lost:
        return PeerLost(f"the receiver at {outbox.address} is gone; {message} was not sent")
    return ChannelClosed(f"the outbox to {outbox.address} is closed, or of the process that forked it")


__all__ = ["INLINE_BYTES", "LocalOutbox", "OwnOutbox"]
