"""inproc: a queue inside one process, for tests and for workers that are threads.

Messages go through the codec like everywhere else, so that a run that works here works between processes. The queue
has an eventfd, so that a receiver can wait for it and for other descriptors at once.
"""

from __future__ import annotations

import itertools
import os
import select
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from transport import codec
from transport.channel import Inbox, Outbox, Transport, Watchable
from transport.errors import AddressInUse, BadAddress, ChannelClosed, PeerLost, TransportTimeout, Watched
from transport.limits import DEFAULT_LIMITS, Limits
from transport.message import Message

_inboxes: Final[dict[str, InprocInbox]] = {}
_changed: Final = threading.Condition()
_numbers: Final = itertools.count()
_SCHEME: Final = "inproc://"


class InprocInbox(Inbox):
    """The receiving end; see `Inbox`."""

    def __init__(self, address: str, limits: Limits) -> None:
        self.address = address
        self._limits = limits
        self._queue: deque[tuple[bytes, codec.Raw | None]] = deque()
        self._lock = threading.Lock()  # guards `closed` and the eventfd's life against senders in other threads
        self.closed = False
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watch: Sequence[Watchable] = ()
        self._sources: dict[int, Watchable] = {}
        self._poll = select.poll()
        self._prepare(())

    def put(self, header: bytes, raw: codec.Raw | None) -> bool:
        """Queues one message's frames, which the inbox takes over. False when the inbox is closed."""
        with self._lock:
            if self.closed:
                return False
            self._queue.append((header, raw))
            os.eventfd_write(self._event, 1)
            return True

    def receive(self, timeout: float | None = None, watch: Sequence[Watchable] = ()) -> Message:
        """See `Inbox.receive`."""
        if watch is not self._watch:
            self._prepare(watch)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self.closed:
                raise ChannelClosed(f"the inbox {self.address} is closed")
            try:
                header_frame, raw = self._queue.popleft()
            except IndexError:
                self._wait(deadline, timeout)
                continue
            return codec.assemble(codec.decode_header(header_frame, self._limits), raw)

    def close(self) -> None:
        """See `Inbox`. A receiver that waits in another thread gets ChannelClosed."""
        with _changed:
            if _inboxes.get(self.address) is self:
                del _inboxes[self.address]
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._queue.clear()
            os.eventfd_write(self._event, 1)  # wakes a receiver; the descriptor itself goes with the last user

    def __del__(self) -> None:
        os.close(self._event)

    def _prepare(self, watch: Sequence[Watchable]) -> None:
        self._poll = select.poll()
        self._poll.register(self._event, select.POLLIN)
        self._sources = {item if isinstance(item, int) else item.fileno(): item for item in watch}
        for descriptor in self._sources:
            self._poll.register(descriptor, select.POLLIN)
        self._watch = watch

    def _wait(self, deadline: float | None, timeout: float | None) -> None:
        """Returns when the queue may hold something; raises when it does not and something else happened."""
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = [descriptor for descriptor, _ in self._poll.poll(left)]
        if self._event in ready:
            os.eventfd_read(self._event)
        elif ready:
            raise Watched(self._sources[ready[0]])
        else:
            raise TransportTimeout(f"no message arrived at {self.address} within {timeout} s")


class InprocOutbox(Outbox):
    """The sending end; see `Outbox`."""

    def __init__(self, inbox: InprocInbox, limits: Limits) -> None:
        self.address = inbox.address
        self.closed = False
        self._lost = False
        self._inbox = inbox
        self._limits = limits

    def send(self, message: Message, timeout: float | None = None) -> None:
        """See `Outbox.send`."""
        if self._lost:
            raise self._gone(message)
        if self.closed:
            raise ChannelClosed(f"the outbox to {self.address} is closed")
        header, *raws = codec.encode(message, self._limits)
        raw = codec.aligned_copy(raws[0]) if raws else None
        if not self._inbox.put(header, raw):
            self._lost = self.closed = True
            raise self._gone(message)

    def close(self) -> None:
        """See `Outbox`."""
        self.closed = True

    def _gone(self, message: Message) -> PeerLost:
        return PeerLost(f"the receiver at {self.address} is gone; {message} was not sent")


class InprocTransport(Transport):
    """Inboxes known by name to every thread of this process; see `Transport`."""

    scheme = "inproc"

    def __init__(self, directory: Path | None = None, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._open: list[Inbox | Outbox] | None = []

    def bind(self, address: str | None = None) -> InprocInbox:
        """See `Transport.bind`."""
        channels = self._channels()
        name = f"{_SCHEME}{next(_numbers)}" if address is None else _checked(address)
        with _changed:
            if name in _inboxes:
                raise AddressInUse(f"{name} already has an inbox in this process; close it or use another name")
            inbox = _inboxes[name] = InprocInbox(name, self._limits)
            _changed.notify_all()
        channels.append(inbox)
        return inbox

    def connect(self, address: str, timeout: float | None = None) -> InprocOutbox:
        """See `Transport.connect`."""
        channels = self._channels()
        name = _checked(address)
        with _changed:
            if not _changed.wait_for(lambda: name in _inboxes, timeout):
                raise TransportTimeout(f"nobody receives at {name} in this process after {timeout} s")
            outbox = InprocOutbox(_inboxes[name], self._limits)
        channels.append(outbox)
        return outbox

    def close(self) -> None:
        """Closes every inbox and outbox of this transport."""
        channels, self._open = self._open or [], None
        for channel in reversed(channels):
            channel.close()

    def _channels(self) -> list[Inbox | Outbox]:
        if self._open is None:
            raise ChannelClosed("the inproc transport is closed")
        self._open = [channel for channel in self._open if not channel.closed]
        return self._open


def _checked(address: str) -> str:
    if not address.startswith(_SCHEME) or address == _SCHEME:
        raise BadAddress(f"expected an address like {_SCHEME}name, got {address!r}")
    return address
