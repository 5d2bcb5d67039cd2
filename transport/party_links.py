"""The one connection between two parties: the party that others dial has the door, each other party a line to it.

    door   ROUTER, bound: CURVE server, enforced ZAP domain, a doorkeeper with the plan's keys
    line   DEALER, connected: CURVE client, knows the door by its pinned key

Rules:

1. Who a message is from is said by the key that its connection proved (``User-Id``), never by the message. A second
   connection with a key that has one already is answered with an error and not heard.
2. A connection is never made again by itself: after a loss nobody knows what arrived. What did arrive is received
   before the loss is told (so neither ZMQ_IMMEDIATE nor a RECONNECT_IVL of -1, which drop it).
3. Queues are bounded by what the plan has in flight, a frame by the largest tensor and the 33 bytes that CURVE adds to
   each; a frame that is larger ends its connection.
4. Heartbeats show that the other process lives, by ZeroMQ's own thread, and nothing more.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from transport import codec
from transport.codec import Header
from transport.errors import (
    BadAddress,
    MalformedMessage,
    PeerLost,
    TransportTimeout,
    Unsendable,
)
from transport.key_files import PartyKeys
from transport.limits import Limits
from transport.message import Message

CURVE_BYTES: Final = 33
"""Bytes that CURVE adds to every frame, and that ZeroMQ counts among those of a message."""

_LINGER: Final = 2000
_NEVER: Final = 7 * 86_400_000
"""Milliseconds before ZeroMQ would connect again. A -1 would drop what arrived before the loss and was not read."""
_SETTLE: Final = 20
_FULL_SECONDS: Final = 0.002
_OLDEST: Final = (4, 3, 5)

HeaderCheck = Callable[[str, Header], None]
"""Raises if a header of that party is not one that is expected now; called before memory for its array is taken."""


@dataclass(frozen=True)
class LinkBounds:
    """Upper bounds of a connection.

    Args:
        limits: Of one message.
        messages: In each direction, sent and not yet taken.
        silence: Seconds without a sign of life after which the other process counts as gone.
    """

    limits: Limits
    messages: int = 64
    silence: float = 15.0


class PartyLink(ABC):
    """One party's end of its connections; used by one thread.

    Args:
        keys: The party's own pair.
        bounds: Of each connection.
        kind: The type of its socket.

    Attributes:
        peers: Names of the parties at the other ends.
    """

    peers: tuple[str, ...]

    def __init__(self, keys: PartyKeys, bounds: LinkBounds, kind: int) -> None:
        version = zmq.zmq_version_info()
        if version < _OLDEST:
            raise BadAddress(f"parties need ZeroMQ {'.'.join(map(str, _OLDEST))}, this is {zmq.zmq_version()}")
        self.keys, self.bounds = keys, bounds
        self._context: zmq.Context[Any] = zmq.Context()
        self._kind = kind
        self._socket = self._made()
        self._monitor: zmq.Socket[Any] | None = None
        self._lost: list[str] = []
        self._let_go: set[str] = set()

    @abstractmethod
    def send(self, peer: str, message: Message, timeout: float) -> None:
        """Send a message to a party.

        Raises:
            PeerLost: It is gone.
            TransportTimeout: It does not take messages.
        """

    @abstractmethod
    def _taken(self, check: HeaderCheck) -> tuple[str, Message] | None:
        """The next message that is here, or None."""

    @abstractmethod
    def _ended(self, event: Mapping[str, Any]) -> str | None:
        """Whose connection ended, by an event of the monitor."""

    def receive(self, timeout: float, check: HeaderCheck) -> tuple[str, Message]:
        """The next message of any party.

        Args:
            timeout: Seconds.
            check: Sees a header before memory for its array is taken.

        Returns:
            The party that sent it, by its key, and the message.

        Raises:
            TransportTimeout: None came.
            PeerLost: A party is gone, and all that it sent has been received.
            MalformedMessage: A message is none of ours; it was dropped.
        """
        assert self._monitor is not None
        deadline = time.monotonic() + timeout
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        while True:
            found = self._taken(check)
            if found is not None:
                return found
            if self._lost:
                raise PeerLost(f"{self._lost[0]} is gone: its connection has ended")
            left = deadline - time.monotonic()
            if left <= 0:
                raise TransportTimeout(f"no message came within {timeout:g} s")
            poller.poll(math.ceil(left * 1000))
            self._notice()

    def let_go(self, peer: str) -> None:
        """Take it for no loss when this party's connection ends: it has said goodbye."""
        self._let_go.add(peer)
        self._lost = [name for name in self._lost if name != peer]  # the end may have been seen before the goodbye

    def _notice(self) -> None:
        """Note whose connections have ended."""
        assert self._monitor is not None
        while self._monitor.poll(0):
            ended = self._ended(recv_monitor_message(self._monitor))
            self._lost += [] if ended is None or ended in self._let_go else [ended]

    def close(self) -> None:
        """End the connections, after what was sent has gone out, or two seconds; what was not received is dropped.

        It is taken off the socket first: a heartbeat of a connection that ended behind a full queue is an assertion of
        libzmq (4364), which ends the process.
        """
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None
        self._socket.close(linger=_LINGER if self._emptied() else 0)
        self._context.term()

    def _emptied(self) -> bool:
        """Drop what was not received; whether nothing more comes within the time that what was sent has to go out."""
        deadline, settle = time.monotonic() + _LINGER / 1000, 0
        while not self._socket.closed and self._socket.poll(settle):
            self._socket.recv(zmq.NOBLOCK, copy=False)
            settle = _SETTLE  # where a queue was full, more is on its way into it
            if time.monotonic() > deadline:
                return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _made(self) -> zmq.Socket[Any]:
        socket: zmq.Socket[Any] = self._context.socket(self._kind)
        limits, beat = self.bounds.limits, max(1, int(self.bounds.silence * 1000))
        for option, value in (
            (zmq.MAXMSGSIZE, max(limits.max_bytes, limits.max_header_bytes) + CURVE_BYTES),
            (zmq.SNDHWM, self.bounds.messages),
            (zmq.RCVHWM, self.bounds.messages),
            (zmq.RECONNECT_IVL, _NEVER),
            (zmq.HANDSHAKE_IVL, 5000),
            (zmq.HEARTBEAT_IVL, max(1, beat // 3)),
            (zmq.HEARTBEAT_TIMEOUT, beat),
            (zmq.HEARTBEAT_TTL, beat),
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.LINGER, _LINGER),
        ):
            socket.setsockopt(option, value)
        return socket

    def _write(self, frames: list[Any], timeout: float, peer: str) -> None:
        deadline = time.monotonic() + timeout
        while True:
            self._notice()
            if peer in self._lost:
                raise PeerLost(f"{peer} is gone: its connection has ended")
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK, copy=True)
                return
            except zmq.Again:
                if time.monotonic() >= deadline:
                    raise TransportTimeout(f"{peer} took no message for {timeout:g} s") from None
                time.sleep(_FULL_SECONDS)  # a ROUTER cannot be asked when one of its peers has room again
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise Unsendable(f"a message to {peer} was not sent: {error}") from error
                raise PeerLost(f"{peer} is gone: its connection has ended") from None

    def _decoded(self, sender: str, first: zmq.Frame, check: HeaderCheck) -> Message:
        """The message whose header has been taken off the socket; a bad one is dropped whole."""
        try:
            header = codec.decode_header(first.buffer, self.bounds.limits)
            check(sender, header)
            raw, more = None, first.more
            if header.dtype is not None:
                if not more:
                    raise MalformedMessage(f"{sender} announced an array, and no frame follows")
                body = self._socket.recv(zmq.NOBLOCK, copy=False)
                more = body.more
                if len(body) != header.nbytes:
                    raise codec.wrong_size(header, len(body))
                raw = codec.aligned_copy(body.buffer)
            if more:
                raise MalformedMessage(f"{sender} sent more frames than its header announces")
            return codec.assemble(header, raw)
        finally:
            while self._socket.getsockopt(zmq.RCVMORE):
                self._socket.recv(zmq.NOBLOCK, copy=False)


__all__ = ["CURVE_BYTES", "HeaderCheck", "LinkBounds", "PartyLink"]
