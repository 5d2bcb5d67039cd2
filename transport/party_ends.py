"""The two ends of a connection between parties: the door, which others dial, and the line to it.

Both keep the rules of `transport.party_links`.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from transport import codec
from transport.errors import AddressInUse, BadAddress, NotAdmitted, PeerLost, TransportTimeout
from transport.key_files import PartyKeys, fingerprint
from transport.keys import Doorkeeper, lock
from transport.message import Message
from transport.party_links import HeaderCheck, LinkBounds, PartyLink

_RETRY_SECONDS: Final = 0.2
_REFUSED: Final = zmq.EVENT_HANDSHAKE_FAILED_AUTH
_BROKEN_OFF: Final = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_OTHER_KEY: Final = _BROKEN_OFF | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_GREETING_SECONDS: Final = 5.0
_NOT_THERE: Final = zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED


class PartyDoor(PartyLink):
    """The end that others dial.

    Args:
        address: ``tcp://host:port``; port 0 takes a free one.
        keys: The party's own pair.
        peers: {name: public key} of those who may connect.
        bounds: Of each connection.
        trusted: Asked at every connection besides, with the public key; default: all of `peers` are.

    Attributes:
        address: With the real port.

    Raises:
        AddressInUse: Another process listens there.
        BadAddress: It is no address of this host.
    """

    def __init__(
        self,
        address: str,
        keys: PartyKeys,
        peers: Mapping[str, str],
        bounds: LinkBounds,
        trusted: Callable[[str], bool] = lambda key: True,
    ) -> None:
        address = _address(address, listening=True)
        super().__init__(keys, bounds, zmq.ROUTER)
        self.peers = tuple(peers)
        self._names = {key: name for name, key in peers.items()}
        self._routes: dict[str, bytes] = {}
        self._descriptors: dict[int, str] = {}
        self._doorkeeper = Doorkeeper(self._context, lambda key: key in self._names and trusted(key))
        try:
            self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            lock(self._socket, keys.secret)
            self._monitor = self._socket.get_monitor_socket(int(zmq.EVENT_DISCONNECTED))
            self._socket.setsockopt(zmq.IPV6, "[" in address)
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            if error.errno == zmq.EADDRINUSE:
                raise AddressInUse(f"{address} is in use by another process; choose another port") from error
            raise BadAddress(f"cannot listen at {address}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def send(self, peer: str, message: Message, timeout: float) -> None:
        """See `PartyLink.send`."""
        if peer not in self._routes:
            raise PeerLost(f"{peer} is not connected; {message} was not sent")
        self._write([self._routes[peer], *codec.encode(message, self.bounds.limits)], timeout, peer)

    def close(self) -> None:
        """See `PartyLink.close`."""
        self._doorkeeper.close()
        super().close()

    def _taken(self, check: HeaderCheck) -> tuple[str, Message] | None:
        while True:
            try:
                route = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return None
            first = self._socket.recv(zmq.NOBLOCK, copy=False)
            sender = self._names.get(str(first.get("User-Id")), "")
            if sender and sender not in self._routes:
                self._routes[sender] = route
                self._descriptors[int(first.get(zmq.SRCFD))] = sender
            if not sender or self._routes[sender] != route:
                while self._socket.getsockopt(zmq.RCVMORE):
                    self._socket.recv(zmq.NOBLOCK, copy=False)
                self._turn_away(route, sender)
                continue
            return sender, self._decoded(sender, first, check)

    def _turn_away(self, route: bytes, sender: str) -> None:
        """Answer a second connection of a party; it goes on only with the first."""
        said = Message("error", value=f"{sender} is connected already; a party has one connection")
        try:
            self._socket.send_multipart([route, *codec.encode(said, self.bounds.limits)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return

    def _ended(self, event: Mapping[str, Any]) -> str | None:
        return self._descriptors.pop(int(event["value"]), None)


class PartyLine(PartyLink):
    """The end that dials.

    Args:
        address: ``tcp://host:port`` of the door.
        keys: The party's own pair.
        peer: The party at the door.
        public: Its pinned key.
        bounds: Of the connection.
        patience: Seconds for which it is tried again while nobody answers.

    Raises:
        NotAdmitted: The door does not let this key in, or has another key than the pinned one.
        TransportTimeout: Nobody answered.
        BadAddress: It is no address.
    """

    def __init__(
        self, address: str, keys: PartyKeys, peer: str, public: str, bounds: LinkBounds, patience: float
    ) -> None:
        self.peers, self.address = (peer,), _address(address, listening=False)
        super().__init__(keys, bounds, zmq.DEALER)
        self._public = public
        deadline = time.monotonic() + patience
        try:
            while not self._connected(deadline):
                if time.monotonic() + _RETRY_SECONDS > deadline:
                    raise TransportTimeout(
                        f"nobody answered at {address} within {patience:g} s; is {peer} serving there, and does the "
                        "port lead to it?"
                    )
                time.sleep(_RETRY_SECONDS)
        except BaseException:
            self.close()
            raise

    def send(self, peer: str, message: Message, timeout: float) -> None:
        """See `PartyLink.send`."""
        self._write(list(codec.encode(message, self.bounds.limits)), timeout, peer)

    def _taken(self, check: HeaderCheck) -> tuple[str, Message] | None:
        try:
            first = self._socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        return self.peers[0], self._decoded(self.peers[0], first, check)

    def _ended(self, event: Mapping[str, Any]) -> str | None:
        return self.peers[0]

    def _connected(self, deadline: float) -> bool:
        """One attempt, with a socket of its own."""
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)
            self._socket = self._made()
        self._socket.setsockopt(zmq.IPV6, "[" in self.address)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, self._public.encode())
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, self.keys.public.encode())
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, self.keys.secret.encode())
        watched = zmq.EVENT_HANDSHAKE_SUCCEEDED | _REFUSED | _OTHER_KEY | _NOT_THERE
        self._monitor = self._socket.get_monitor_socket(int(watched))
        try:
            self._socket.connect(self.address)
        except zmq.ZMQError as error:
            raise BadAddress(f"cannot connect to {self.address}: {error.strerror}") from error
        while self._monitor.poll(max(0, math.ceil((deadline - time.monotonic()) * 1000))):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return True
            peer = self.peers[0]
            if event == _REFUSED:
                raise NotAdmitted(
                    f"{peer} does not let the key of {self.keys.name} in ({fingerprint(self.keys.public)}): it is not "
                    f"in {peer}'s plan, or not trusted there"
                )
            if event == _BROKEN_OFF and not _greets(self.address, _GREETING_SECONDS):
                return False  # as a forwarder does while nobody serves behind it
            if event & _OTHER_KEY:
                raise NotAdmitted(
                    f"who answers at {self.address} is not {peer}: it has not the pinned key "
                    f"{fingerprint(self._public)}, or is no party of tapeline at all"
                )
            return False
        return False


def _greets(address: str, seconds: float) -> bool:
    """Whether ZeroMQ is at the other end of a new connection: it sends its first byte before it is asked."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), seconds) as probe:
            return probe.recv(1) == b"\xff"
    except OSError:
        return False


def _address(address: str, *, listening: bool) -> str:
    """A checked tcp address."""
    host, colon, port = str(address).removeprefix("tcp://").rpartition(":")
    if not str(address).startswith("tcp://") or not colon or not host or not port.isascii() or not port.isdigit():
        raise BadAddress(f"expected an address like tcp://host:7443, received {address!r}")
    if int(port) > 65535 or (int(port) == 0 and not listening):
        raise BadAddress(f"a port is within 1 .. 65535, received {address!r}")
    return str(address)


__all__ = ["PartyDoor", "PartyLine"]
