"""A mailbox hands out messages by key; what arrives before anybody asks for it waits.

A schedule is then only an order of actions: each waits for its own inputs, and senders need not know that order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence

from transport import codec
from transport.channel import Inbox, Watchable
from transport.errors import TransportTimeout
from transport.message import DATA_KINDS, Key, Message

URGENT_KINDS = frozenset({"stop", "error", "abandon"})


class Mailbox:
    """Sorts what one inbox receives.

    Args:
        inbox: where messages come from. The mailbox becomes its only reader; closing stays with the caller.
        watch: objects to wait for at the same time (see `Inbox.receive`); replace `watch` to change them.
        urgent: kinds that every `take` returns at once, whatever it waits for.
        incarnation: messages of earlier incarnations are dropped on arrival.
    """

    def __init__(
        self,
        inbox: Inbox,
        watch: Sequence[Watchable] = (),
        urgent: frozenset[str] = URGENT_KINDS,
        incarnation: int = 0,
    ) -> None:
        self.inbox = inbox
        self.watch = watch
        self.urgent = urgent
        self.incarnation = incarnation
        self._held: dict[Key, deque[Message]] = {}

    def __len__(self) -> int:
        """How many messages wait here for somebody to ask for them."""
        return sum(map(len, self._held.values()))

    def held(self) -> tuple[Key, ...]:
        """The keys of the messages that wait here, for an error that says what did arrive."""
        return tuple(key for key, messages in self._held.items() for _ in messages)

    def take(self, keys: Collection[Key], timeout: float | None = None) -> Message:
        """Waits for the first message under one of `keys`, or of an urgent kind.

        Args:
            keys: what to wait for; of those that wait already, the first in this order is taken.
            timeout: seconds, or None.

        Raises:
            TransportTimeout: none came in time; the message names what was awaited and what is held.
            Watched, MalformedMessage, ChannelClosed: as `Inbox.receive`; nothing held is lost.
        """
        if self._held:
            for key in keys:
                if key in self._held:
                    return self._pop(key)
        deadline = None if timeout is None else time.monotonic() + timeout
        left = timeout
        while True:
            try:
                message = self.inbox.receive(left, self.watch)
            except TransportTimeout as error:
                raise TransportTimeout(self._describe(keys, timeout)) from error
            if message.incarnation >= self.incarnation:
                key = message.key
                if key in keys or message.kind in self.urgent:
                    return message
                self._held.setdefault(key, deque()).append(message)
            if deadline is not None:
                left = max(0.0, deadline - time.monotonic())

    def receive(self, timeout: float | None = None) -> Message:
        """The next message whatever its key: held ones first, in order of their keys' arrival.

        Raises:
            TransportTimeout, Watched, MalformedMessage, ChannelClosed: as `Inbox.receive`.
        """
        for key in self._held:
            return self._pop(key)
        deadline = None if timeout is None else time.monotonic() + timeout
        left = timeout
        while True:
            message = self.inbox.receive(left, self.watch)
            if message.incarnation >= self.incarnation:
                return message
            if deadline is not None:
                left = max(0.0, deadline - time.monotonic())

    def deliver(self, message: Message) -> None:
        """Holds a message of this process to itself, which never leaves it; its array is a fresh copy all the same.

        Raises:
            Unsendable: as `Outbox.send`.
        """
        header, *raws = codec.encode(message)
        raw = codec.aligned_copy(raws[0]) if raws else None
        copy = codec.assemble(codec.decode_header(header), raw)
        self._held.setdefault(copy.key, deque()).append(copy)

    def clear(self, before_step: int | None = None) -> int:
        """Forgets held messages: those of data kinds with a step below `before_step`, or all when it is None.

        Returns:
            How many were forgotten.
        """
        stale = [
            key for key in self._held if before_step is None or (key.kind in DATA_KINDS and key.step < before_step)
        ]
        return sum(len(self._held.pop(key)) for key in stale)

    def _pop(self, key: Key) -> Message:
        messages = self._held[key]
        message = messages.popleft()
        if not messages:
            del self._held[key]
        return message

    def _describe(self, keys: Collection[Key], timeout: float | None) -> str:
        wanted = ", ".join(map(_name, list(keys)[:4])) + (" ..." if len(keys) > 4 else "")
        held = ", ".join(map(_name, self.held()[:4])) + (" ..." if len(self) > 4 else "")
        return f"waited {timeout} s for {wanted or 'nothing'}; held are {held or 'no messages'}"


def _name(key: Key) -> str:
    tensor = f" {key.tensor!r}" if key.tensor else ""
    window = f" window {key.window}" if key.window else ""
    return f"{key.kind}{tensor} of step {key.step} microbatch {key.microbatch}{window} from {key.source}"
