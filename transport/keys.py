"""The keys of a run: every tcp connection is encrypted, and only who has the keys gets one.

    inbox    CURVE server + ZAP domain + ZAP_ENFORCE_DOMAIN + a handler with an allow-list of one key
    outbox   CURVE client with the run's pair, who knows the inbox by the run's public key

Rules:

1. CURVE alone lets every stranger in. So does a domain without a handler, or a handler without a domain: only all of
   domain, enforcement and handler refuse, and a handler that has ended then refuses everybody.
2. One pair a run, new for each, held in memory only: workers get it through their launch, never on a command line, in
   the environment or in a file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Self

import zmq
from zmq.auth.thread import ThreadAuthenticator

FRAME_OVERHEAD: Final = 64
"""Bytes that encryption adds to a frame, and that ZeroMQ counts among those of a message; it adds 33."""

_DOMAIN: Final = "tapeline"
_log: Final = logging.getLogger("tapeline.keys")
_log.addHandler(logging.NullHandler())
_log.propagate = False


@dataclass(frozen=True)
class RunKeys:
    """The key pair that all processes of one run share.

    Args:
        public: 40 characters (Z85).
        secret: The same.
    """

    public: str
    secret: str = field(repr=False)

    @classmethod
    def new(cls) -> Self:
        """A pair that nobody else has."""
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    def plain(self) -> list[str]:
        """For a worker's launch."""
        return [self.public, self.secret]

    def lock_inbox(self, socket: zmq.Socket[Any]) -> None:
        """Let a socket that will be bound accept only who has the keys; see `Doorkeeper`."""
        lock(socket, self.secret)

    def lock_outbox(self, socket: zmq.Socket[Any]) -> None:
        """Let a socket that will be connected show the keys, and take nobody but an inbox of the run for one."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.public.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret.encode())


def lock(socket: zmq.Socket[Any], secret: str) -> None:
    """Let a socket that will be bound accept only whom the context's `Doorkeeper` admits; without one, nobody.

    Args:
        socket: Not bound yet.
        secret: The secret key of its side.
    """
    socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN.encode())
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret.encode())


class Doorkeeper:
    """The ZAP handler of one ZeroMQ context, a thread that lives until `close`: it says who may connect.

    Args:
        context: Whose inboxes it guards.
        admits: Whether the owner of a public key may connect; asked in the thread, once a connection.
    """

    def __init__(self, context: zmq.Context[Any], admits: Callable[[str], bool]) -> None:
        self._admits = admits
        self._handler = ThreadAuthenticator(context, log=_log)
        self._handler.start()
        self._handler.configure_curve_callback(_DOMAIN, self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client of a public key may connect; called by the handler."""
        try:
            return domain == _DOMAIN and self._admits(key.decode())
        except Exception:  # would end the thread, and with it the door for everybody until the process ends
            _log.exception("a connection was turned away: whether its key may connect could not be found out")
            return False

    def close(self) -> None:
        """End the thread: from now on nobody gets in."""
        self._handler.stop()


PROCESS_KEYS: Final = RunKeys.new()
"""Those of transports that were opened without keys, in this process and its forks."""

__all__ = ["FRAME_OVERHEAD", "PROCESS_KEYS", "Doorkeeper", "RunKeys", "lock"]
